"""The state of a TPM that was somebody else's, as a new guest's own begins with it.

libvirt keeps it in a directory, and a TPM of ours in one file: swtpm reads the one and writes the other, each in a
process that is asked through its control socket (swtpm_ioctls(3)) and ended. What was given is only read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path

from agents.engine.base import EngineError
from agents.host.processes import end_leashed, leashed, spawned, tail_of

MAX_STATE_BYTES = 1 << 20
"""Of a TPM's; they have some 10 KiB."""
_INIT, _SHUTDOWN, _GET_STATE, _SET_STATE = 2, 3, 12, 13
_PERMANENT = 1
_ENCRYPTED = 2
_CALL_S = 10.0
_POLL_S = 0.01


async def taken(program: str, given: Path, into: Path) -> None:
    """Write to `into`, as a TPM of ours keeps it, what `given` has: the file of a TPM whose state is in a directory
    (tpm2-00.permall). Raises EngineError when swtpm makes nothing of it; `into` is not there then.
    """
    try:
        # A short path: there are sockets in it.
        with tempfile.TemporaryDirectory(prefix="drover-tpm-") as directory:
            before = Path(directory) / "before"
            before.mkdir()
            await asyncio.to_thread(_copied, given, before / "tpm2-00.permall")
            async with _tpm(program, f"dir={before}", Path(directory) / "a") as old:
                await old.begin()
                blob = await old.state()
            made = Path(directory) / "state"
            async with _tpm(program, f"backend-uri=file://{made}", Path(directory) / "b") as new:
                await new.set_state(blob)
                await new.begin()  # which writes it
            await asyncio.to_thread(_whole, made, into)
    except TimeoutError as error:
        raise EngineError(f"swtpm did not answer in {_CALL_S:g} s when it was to read {given.name}") from error
    except (OSError, EOFError) as error:
        raise EngineError(f"the state {given.name} of a TPM cannot be taken over: {error}") from error


def _copied(given: Path, to: Path) -> None:
    if (size := given.stat().st_size) > MAX_STATE_BYTES:
        raise EngineError(f"{given.name} is no state of a TPM: it has {size} bytes")
    shutil.copyfile(given, to)


def _whole(made: Path, into: Path) -> None:
    fresh = into.with_name(f"{into.name}.tmp")
    try:
        shutil.copyfile(made, fresh)
        fresh.replace(into)
    finally:
        fresh.unlink(missing_ok=True)


class _Control:
    """The control socket of a swtpm. Raises EngineError, OSError and EOFError (it has ended)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def begin(self) -> None:
        """It reads its state, or what it was given as such."""
        await self._asked("read it", struct.pack(">II", _INIT, 0))

    async def state(self) -> bytes:
        """What it would keep without power."""
        await self._asked("say it", struct.pack(">IIII", _GET_STATE, 0, _PERMANENT, 0))
        flags, total, length = struct.unpack(">III", await self._reader.readexactly(12))
        if flags & _ENCRYPTED:
            raise EngineError("the state of the TPM is encrypted, and its key is not here")
        if not length or length != total or length > MAX_STATE_BYTES:
            raise EngineError(f"swtpm says {length} of {total} bytes of its state")
        return await self._reader.readexactly(length)

    async def set_state(self, blob: bytes) -> None:
        """It has this state from its `begin` on."""
        await self._asked("take it", struct.pack(">IIII", _SET_STATE, 0, _PERMANENT, len(blob)) + blob)

    async def end(self) -> None:
        """It ends by itself, so that all is written."""
        self._writer.write(struct.pack(">I", _SHUTDOWN))
        await self._reader.read(4)

    async def _asked(self, what: str, message: bytes) -> None:
        self._writer.write(message)
        (result,) = struct.unpack(">I", await self._reader.readexactly(4))
        if result:
            raise EngineError(f"swtpm was to {what}, and refused ({result:#x})")


@contextlib.asynccontextmanager
async def _tpm(program: str, where: str, socket: Path) -> AsyncGenerator[_Control]:
    log = socket.with_suffix(".log")
    command = [program, "socket", "--tpm2", "--tpmstate", where, "--ctrl", f"type=unixio,path={socket}"]
    child = await spawned(lambda: _spawned(command, log))
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(_CALL_S):
            reader, writer = await _connected(child, socket)
            control = _Control(reader, writer)
            yield control
            await control.end()
            await asyncio.to_thread(child.wait, _CALL_S)
    except (EngineError, EOFError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{error}: {tail_of(log)}") from error
    finally:
        if writer is not None:
            writer.close()
        await asyncio.to_thread(end_leashed, child)


async def _connected(child: subprocess.Popen[bytes], socket: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    while True:
        try:
            return await asyncio.open_unix_connection(socket)
        except OSError:
            if child.poll() is not None:
                raise EngineError("swtpm ended at its start") from None
            await asyncio.sleep(_POLL_S)


def _spawned(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as sink:
        return subprocess.Popen(
            leashed(command), stdin=subprocess.PIPE, stdout=sink, stderr=sink, start_new_session=True, cwd=os.sep
        )
