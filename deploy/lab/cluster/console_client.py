"""Talk to the collector: which consoles there are, and ask a guest to check all of its memory.

Each question exists twice: for coroutines, and (`_sync`) for scripts and tests without an event loop.
"""

from __future__ import annotations

import asyncio
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from deploy.lab.cluster.evidence import Vmm, parse_verify

SOCKET = "collector.sock"
REPLY_MOST_BYTES = 4 << 20
REPLY_S = 5.0
"""What the collector may take for a reply, beyond the time that the guest is given."""


class ConsoleError(Exception):
    """The collector is not there, knows no such console, or the guest did not answer. The text says which."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """A guest's own check of all of its memory."""

    ok: bool
    pages: int
    """Pages checked; 0 if any was bad."""
    bad: int
    console: Vmm
    """Where the answer came from."""
    ns: int


@dataclass(frozen=True, slots=True)
class ConsoleInfo:
    """One VMM's console as the collector knows it."""

    vmm: Vmm
    connected: bool
    last_line: str | None
    age_ms: float | None
    """Since the last line; None when there was none."""


async def verify(dir: Path | str, guest: str, host: str | None = None, *, timeout_s: float = 60.0) -> VerifyResult:
    """Ask the guest to check all of its memory and wait for its word.

    Without `host` the VMM that spoke last is asked. Raises ConsoleError; a paused guest does not answer.
    """
    return _verified(guest, await _request(dir, _verify_request(guest, host, timeout_s), timeout_s))


def verify_sync(dir: Path | str, guest: str, host: str | None = None, *, timeout_s: float = 60.0) -> VerifyResult:
    """`verify` for callers without an event loop."""
    return _verified(guest, _request_sync(dir, _verify_request(guest, host, timeout_s), timeout_s))


async def list_consoles(dir: Path | str) -> list[ConsoleInfo]:
    """All consoles that the collector knows, ended ones included. Raises ConsoleError."""
    return _listed(await _request(dir, {"op": "list"}))


def list_consoles_sync(dir: Path | str) -> list[ConsoleInfo]:
    """`list_consoles` for callers without an event loop."""
    return _listed(_request_sync(dir, {"op": "list"}))


async def send(dir: Path | str, guest: str, text: str, host: str | None = None) -> Vmm:
    """Type text on a guest's console; the VMM that got it. Raises ConsoleError."""
    return _vmm(await _request(dir, {"op": "send", "guest": guest, "host": host, "text": text}))


def send_sync(dir: Path | str, guest: str, text: str, host: str | None = None) -> Vmm:
    """`send` for callers without an event loop."""
    return _vmm(_request_sync(dir, {"op": "send", "guest": guest, "host": host, "text": text}))


async def tail(dir: Path | str, guest: str, host: str | None = None, *, lines: int = 20) -> list[str]:
    """The last lines of a guest, `<ns> <text>`, also after its end. Raises ConsoleError."""
    reply = await _request(dir, {"op": "tail", "guest": guest, "host": host, "lines": lines})
    return cast("list[str]", reply["lines"])


def _verify_request(guest: str, host: str | None, timeout_s: float) -> dict[str, Any]:
    return {"op": "ask", "guest": guest, "host": host, "text": "v", "expect": "V ", "timeout_s": timeout_s}


def _verified(guest: str, reply: dict[str, Any]) -> VerifyResult:
    result = parse_verify(reply["ns"], reply["line"])
    if result is None:
        raise ConsoleError(f"guest {guest} answered {reply['line']!r}, not the end of a verify: is it our image?")
    return VerifyResult(result.ok, result.pages, result.bad, _vmm(reply), result.ns)


def _listed(reply: dict[str, Any]) -> list[ConsoleInfo]:
    return [
        ConsoleInfo(Vmm(each["host"], each["guest"], each["inc"]), each["connected"], each["last_line"], each["age_ms"])
        for each in reply["consoles"]
    ]


def _vmm(reply: dict[str, Any]) -> Vmm:
    host, guest, inc = reply["console"].split(".")
    return Vmm(host, guest, inc)


def _path(dir: Path | str) -> str:
    return str(Path(dir).expanduser().resolve() / SOCKET)


def _absent(dir: Path | str, error: Exception) -> ConsoleError:
    return ConsoleError(f"the collector of {dir} does not answer ({error or 'timeout'}): is the cluster up?")


def _encoded(request: dict[str, Any]) -> bytes:
    return json.dumps({key: value for key, value in request.items() if value is not None}).encode() + b"\n"


def _decoded(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise ConsoleError("the collector ended before it replied")
    reply = json.loads(line)
    if not reply["ok"]:
        raise ConsoleError(reply["error"])
    return reply


async def _request(dir: Path | str, request: dict[str, Any], guest_s: float = 0.0) -> dict[str, Any]:
    try:
        async with asyncio.timeout(guest_s + REPLY_S):
            reader, writer = await asyncio.open_unix_connection(_path(dir), limit=REPLY_MOST_BYTES)
            try:
                writer.write(_encoded(request))
                line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise _absent(dir, error) from error
    return _decoded(line)


def _request_sync(dir: Path | str, request: dict[str, Any], guest_s: float = 0.0) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(guest_s + REPLY_S)
            connection.connect(_path(dir))
            connection.sendall(_encoded(request))
            with connection.makefile("rb") as reader:
                line = reader.readline()
    except (OSError, TimeoutError) as error:
        raise _absent(dir, error) from error
    return _decoded(line)
