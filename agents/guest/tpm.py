"""The program that emulates a guest's TPM (swtpm): one process for each copy, found again by its note.

Its state is a file of the copy's own, and travels to another host in the VMM's stream: what is made there is empty, and
two copies never share one. The process ends with its VMM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

from agents.engine.base import EngineError
from agents.host.processes import Watched, gated, let_in, note_down, spawned, tail_of
from agents.host.scopes import scoped
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.liveness import Liveness, LivenessUnknown

PROGRAM = "swtpm"
_START_S = 5.0
_END_S = 2.0
_POLL_S = 0.01
_MAX_SOCKET_PATH = 107


def available() -> bool:
    """Whether this host has the program."""
    return shutil.which(PROGRAM) is not None


def program() -> str:
    """Where it is. Raises TPM_NOT_AVAILABLE."""
    if (found := shutil.which(PROGRAM)) is None:
        said = f"this host has no program that emulates a TPM ({PROGRAM}): install it, or choose another host"
        raise DroverError(RefusalReason.TPM_NOT_AVAILABLE, said)
    return found


class Tpm:
    """Of one copy, whose files are `<directory>/<inc>.tpm*`."""

    def __init__(self, directory: Path, inc: str, watched: Watched | None) -> None:
        self._directory = directory
        self._inc = inc
        self._process = watched

    def _path(self, suffix: str) -> Path:
        return self._directory / f"{self._inc}.{suffix}"

    @property
    def socket(self) -> Path:
        """Where the VMM finds it."""
        return self._path("tpm")

    @classmethod
    async def launch(cls, directory: Path, inc: str, *, state: Path | None = None) -> Tpm:
        """It waits for its VMM. `state`: what another one kept, if it is there; left as it is.

        Raises TPM_NOT_AVAILABLE where there is no such program, else EngineError; no process is left then.
        """
        made = cls(directory, inc, None)
        if len(os.fsencode(made.socket)) > _MAX_SOCKET_PATH:
            raise EngineError(f"socket path {made.socket} is longer than {_MAX_SOCKET_PATH} bytes")
        if state is not None and state.exists():
            await asyncio.to_thread(shutil.copyfile, state, made._path("tpmstate"))
        command = [program(), "socket", "--tpm2", "--terminate"]
        command += ["--tpmstate", f"backend-uri=file://{made._path('tpmstate').absolute()}"]
        command += ["--ctrl", f"type=unixio,path={made.socket}"]
        child = await spawned(lambda: made._spawn(command))
        try:
            made._process, start_time = await Watched.adopt_child(child)
        except LivenessUnknown as error:
            raise EngineError(f"the TPM cannot be watched, and was ended: {error}") from error
        try:
            note_down(made._path("tpm.note"), {"pid": child.pid, "start_time": start_time})
            let_in(child)
            await made._listens()
        except BaseException:
            await made.destroy()
            raise
        return made

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._path("tpm.log").open("ab") as log:
            try:
                return subprocess.Popen(
                    gated(scoped(command, self._directory.name, "tpm")),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    cwd="/",
                )
            except OSError as error:
                raise EngineError(f"cannot run {command[0]}: {error}") from error

    async def _listens(self) -> None:
        try:
            async with asyncio.timeout(_START_S):
                while not self.socket.exists():
                    if self._process is None or self._process.liveness() is Liveness.GONE:
                        raise EngineError(f"the TPM did not start: {tail_of(self._path('tpm.log'))}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise EngineError(f"the TPM did not start in {_START_S:g} s: {tail_of(self._path('tpm.log'))}") from None

    @classmethod
    def adopt(cls, directory: Path, inc: str) -> Tpm:
        """What an earlier agent started, dead or alive. Raises EngineError when that cannot be told."""
        found = cls(directory, inc, None)
        note = found._path("tpm.note")
        try:
            known = json.loads(note.read_text())
            found._process = Watched.find(int(known["pid"]), int(known["start_time"]))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, LivenessUnknown) as error:
            raise EngineError(f"{note}: whether the TPM lives cannot be told: {error}") from error
        return found

    async def end(self) -> None:
        """It is gone; its files are left. Idempotent. Raises EngineError when it does not end."""
        if self._process is not None:
            self._process.kill()
            try:
                async with asyncio.timeout(_END_S):
                    await self._process.dead.wait()
            except TimeoutError:
                said = f"the TPM's process {self._process.pid} was killed and has not ended in {_END_S:g} s"
                raise EngineError(said) from None
            self.detach()

    async def destroy(self, *, keep: Path | None = None) -> None:
        """It is gone, with its files; its state is put aside as `keep`. Idempotent.

        Raises EngineError when it does not end; to be repeated then.
        """
        await self.end()
        if keep is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path("tpmstate").replace(keep)
        for suffix in ("tpm", "tpmstate", "tpm.log", "tpm.note", "tpm.note.tmp"):
            with contextlib.suppress(FileNotFoundError):
                self._path(suffix).unlink()
        with contextlib.suppress(FileNotFoundError):
            (self._directory / f".lock-{self._inc}.tpmstate").unlink()

    def detach(self) -> None:
        """Leave it to a later agent."""
        if self._process is not None:
            self._process.close()
