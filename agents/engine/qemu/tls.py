"""What QEMU and its storage daemon are told of certificates, for one stream at a time.

QEMU reads certificates when its object for them is made, so each stream gets an object of its own, made when it is
begun: a certificate that was renewed meanwhile holds for the next attempt, without any VMM being told. `tls-hostname`
says whom a source sends to, `tls-authz` whom a destination takes from: neither takes any other host of the cluster
(docs/adr/0058-qemu-encrypts-the-stream.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agents.engine.base import EngineError, StreamTls

Execute = Callable[..., Awaitable[Any]]

_OBJECT_S = 5.0
"""Files are read, and keys looked at."""
_INCOMING, _OUTGOING, _SENDER, _DISKS = "stream-in", "stream-out", "stream-sender", "disks-out"
NBD_SERVER, NBD_CLIENT = "disks-in", "disks-sender"


def server_credentials(tls: StreamTls, name: str = _INCOMING) -> dict[str, object]:
    """The object of one that listens: it wants a certificate of whoever connects."""
    return _credentials(tls, name, "server")


def sender(tls: StreamTls, name: str = _SENDER) -> dict[str, object]:
    """The object that knows the one who may connect."""
    return {"qom-type": "authz-simple", "id": name, "identity": tls.peer}


def _credentials(tls: StreamTls, name: str, end: str) -> dict[str, object]:
    certificate = {"qom-type": "tls-creds-x509", "id": name, "dir": str(tls.directory), "endpoint": end}
    return {**certificate, "verify-peer": True}


async def receive_by(execute: Execute, tls: StreamTls) -> None:
    """A VMM that is about to listen takes its stream from that sender only. Raises EngineError."""
    await execute("object-add", server_credentials(tls), timeout_s=_OBJECT_S)
    await execute("object-add", sender(tls))
    await execute("migrate-set-parameters", {"tls-creds": _INCOMING, "tls-authz": _SENDER, "tls-hostname": ""})


async def send_by(execute: Execute, tls: StreamTls | None) -> None:
    """A VMM that is about to send does so by TLS, or without, whatever it has done before. Raises EngineError."""
    told = {"tls-creds": "", "tls-hostname": "", "tls-authz": ""}
    if tls is not None:
        await anew(execute, _credentials(tls, _OUTGOING, "client"))
        told |= {"tls-creds": _OUTGOING, "tls-hostname": tls.peer}
    await execute("migrate-set-parameters", told)


async def disk_options(execute: Execute, tls: StreamTls | None) -> dict[str, object]:
    """What a block node that leads to the other host is told besides. Raises EngineError."""
    if tls is None:
        return {}
    await anew(execute, _credentials(tls, _DISKS, "client"))
    return {"tls-creds": _DISKS, "tls-hostname": tls.peer}


async def anew(execute: Execute, made: Mapping[str, object]) -> None:
    """An object in place of the one of that name; whoever uses that one keeps it. Raises EngineError."""
    with contextlib.suppress(EngineError):  # there was none, as a rule
        await execute("object-del", {"id": made["id"]})
    await execute("object-add", made, timeout_s=_OBJECT_S)
