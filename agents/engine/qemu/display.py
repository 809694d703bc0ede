"""The guest's screen: QEMU's own VNC server, which a viewer finds on the guest's host and which moves with nobody."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.engine.base import DisplayAt, EngineError
from agents.engine.qemu.arguments import escaped
from orchestrator.core.endpoint import Endpoint

PORTS = (5900, 6099)
"""QEMU takes the first of them that is free."""


def argument(listen: str, socket: Path) -> str:
    """Of `-vnc`. At an address nobody is let in before a password has been set; the socket is guarded by its file's
    and its directory's modes."""
    if not listen:
        return f"unix:{escaped(socket)}"
    host = f"[{listen}]" if ":" in listen else listen
    return f"{host}:0,to={PORTS[1] - PORTS[0]},password=on"


async def opened(execute: Callable[..., Awaitable[Any]], password: str, valid_s: int) -> DisplayAt:
    """See `base.Displaying.open_display`."""
    servers: Sequence[Mapping[str, Any]] = await execute("query-vnc-servers")
    listening = [where for server in servers for where in server["server"]]
    if not listening:
        raise EngineError("its VMM serves no screen")
    where = listening[0]
    if where["family"] == "unix":
        return DisplayAt(socket=Path(str(where["service"] or where["host"])))
    if not password:
        raise EngineError("a screen that is served at an address needs a password")
    # The time first: the password of before is never good for longer than it was to be.
    await execute("expire_password", {"protocol": "vnc", "time": f"+{valid_s}"})
    await execute("set_password", {"protocol": "vnc", "password": password})
    return DisplayAt(endpoint=Endpoint(str(where["host"]), int(where["service"])))
