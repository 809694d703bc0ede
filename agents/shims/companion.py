"""The companion shim: a device whose state lives outside the VMM, held by a process of its own.

An agent starts that process with the program that its configuration names, or finds the one that an earlier agent
started, and speaks the shim protocol with it (client.py). What the program is given and must do is in docs/shims.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents.host.processes import Watched, note_down, spawned, tail_of
from agents.host.scopes import scoped
from agents.shims.base import DestinationShim, InVmmDevices, OptionsRefused, ShimError, SourceShim, WrongOption
from agents.shims.client import RemoteDestination, RemoteInside, RemoteSource, ShimClient
from orchestrator.core.liveness import Liveness, LivenessUnknown
from orchestrator.core.records import DeviceSpec, ShimKind

_START_S = 10.0
_END_S = 2.0
_MAX_SOCKET_PATH = 107
_REFUSED = b"r"
READY_VARIABLE = "DROVER_READY_FD"
"""Names the descriptor by which a device program says `p`: the VMM may connect, and `c`: it takes calls; or, before
it ends, `r` and what it has against the devices' options (docs/shims.md)."""
_MAX_SAID = 64 << 10


@dataclass(frozen=True, slots=True)
class DevicesSpec:
    """All devices of one VMM process that a device process holds. `directory` is the guest's own and exists."""

    guest: str
    """Uuid."""
    inc: str
    directory: Path
    devices: tuple[DeviceSpec, ...]
    """Devices with other shims are left out. The order numbers them on the guest's second serial port."""
    seed: int
    """The guest's, 32 bits: what its devices start from."""
    program: tuple[str, ...] = ()
    """The command that holds the devices (AgentConfig.device_program); empty: this host has none."""

    @property
    def companions(self) -> tuple[DeviceSpec, ...]:
        """Those outside the VMM, which the guest reaches by its doorbell port."""
        return tuple(device for device in self.devices if device.shim == ShimKind.COMPANION)

    @property
    def in_vmm(self) -> tuple[DeviceSpec, ...]:
        """Those inside the VMM, which QEMU drives by VFIO."""
        return tuple(device for device in self.devices if device.shim == ShimKind.VFIO)

    def path(self, suffix: str) -> Path:
        """`<directory>/<inc>.<suffix>`: one of the process's sockets, its note or its log."""
        return self.directory / f"{self.inc}.{suffix}"


class DeviceProcess:
    """Handle to the process that holds a VMM's devices. It outlives the agent and the VMM."""

    def __init__(self, spec: DevicesSpec, watched: Watched) -> None:
        self.spec = spec
        self.com_path = spec.path("dev")
        """Unix socket that the VMM's second serial port connects to."""
        self.vfio_path = spec.path("vfio")
        """Unix socket that the preload of a VMM with devices inside it connects to."""
        self._process = watched
        self._client = ShimClient(spec.path("ctl"), spec.guest, spec.inc, watched.liveness)
        self._steps: _Steps | None = None

    @classmethod
    async def launch(cls, spec: DevicesSpec, *, incoming: bool) -> DeviceProcess:
        """Devices that wait for a load (`incoming`), or newborn ones, ready for their VMM to connect.

        `ready` says when they take calls. Raises ShimError; no process is left then.
        """
        if not spec.program:
            raise ShimError("this host has no program for its devices: set device_program in the agent's configuration")
        if len(os.fsencode(spec.path("dev"))) > _MAX_SOCKET_PATH:
            raise ShimError(
                f"socket path {spec.path('dev')} is longer than {_MAX_SOCKET_PATH} bytes: use a shorter state directory"
            )
        if (running := _known_process(spec)) is not None:
            running.close()
            raise ShimError(f"the devices of {spec.guest} ({spec.inc}) are running already: adopt them")
        description = _description(spec, incoming=incoming)
        steps = _Steps()
        try:
            child = await spawned(lambda: _spawn(spec, steps.write_fd))
        except BaseException:
            steps.close()
            raise
        steps.close_write()
        try:
            watched, start_time = await Watched.adopt_child(child)
        except BaseException as error:
            steps.close()
            if isinstance(error, LivenessUnknown):
                raise ShimError(f"the device process cannot be watched, and was ended: {error}") from error
            raise
        started = cls(spec, watched)
        started._steps = steps
        await started._started_or_gone(started._described(child, start_time, description))
        await started._reached(b"p")
        return started

    async def _described(self, child: subprocess.Popen[bytes], start_time: int, description: bytes) -> None:
        """It is noted down before it can know what it is to hold: one that nobody would find never begins. The program
        may write that note again. Raises ShimError."""
        known = {"guest": self.spec.guest, "inc": self.spec.inc, "pid": child.pid, "start_time": start_time}
        try:
            note_down(self.spec.path("devices.json"), known)
        except OSError as error:
            assert child.stdin is not None
            child.stdin.close()
            raise ShimError(f"it cannot be noted down: {error}") from error
        await asyncio.to_thread(_describe, child, description)

    async def ready(self) -> None:
        """The devices take calls. Raises ShimError; no process is left then."""
        if self._steps is not None:
            await self._reached(b"c")
            self._steps.close()
            self._steps = None
        await self._started_or_gone(self._client.must_be_ours(_START_S))

    @classmethod
    async def start(cls, spec: DevicesSpec, *, incoming: bool) -> DeviceProcess:
        """`launch`, and wait until it is `ready`."""
        started = await cls.launch(spec, incoming=incoming)
        await started.ready()
        return started

    async def _reached(self, step: bytes) -> None:
        assert self._steps is not None
        await self._started_or_gone(self._steps.reached(step))

    async def _started_or_gone(self, waited_for: Awaitable[object]) -> None:
        try:
            await waited_for
        except BaseException as error:
            if isinstance(error, OptionsRefused):
                await self.destroy()
                raise
            words = tail_of(self.spec.path("devices.log"))
            await self.destroy()
            if isinstance(error, ShimError):
                raise ShimError(f"the device process did not start: {error}; {words}") from None
            raise

    @classmethod
    async def adopt(cls, spec: DevicesSpec) -> DeviceProcess | None:
        """The process that an earlier agent started. None: it is gone.

        Raises ShimError when it does not answer, and when it cannot be told whether it is gone.
        """
        watched = _known_process(spec)
        if watched is None:
            return None
        found = cls(spec, watched)
        try:
            await found._client.must_be_ours()
        except BaseException as error:
            gone = found.liveness() is Liveness.GONE
            await found.detach()
            if gone and isinstance(error, ShimError):
                return None
            raise
        return found

    @classmethod
    async def end_left(cls, spec: DevicesSpec) -> None:
        """End the process that an earlier agent started for a VMM which never came to be, whatever it answers, and
        remove its files. Raises ShimError and OSError when something is left."""
        await cls(spec, _known_process(spec) or Watched(0, None)).destroy()

    @property
    def pid(self) -> int:
        """Of the process; its start time is needed as well to recognise it later."""
        return self._process.pid

    def liveness(self) -> Liveness:
        """Of the process. GONE only when that is certain; UNKNOWN decides nothing."""
        return self._process.liveness()

    def source_shims(self) -> list[SourceShim]:
        """One per device, in the order of the specification. Each list is for one attempt."""
        return [RemoteSource(device.name, self._client) for device in self.spec.companions]

    def destination_shims(self) -> list[DestinationShim]:
        """One per device, in the order of the specification. Each list is for one attempt."""
        return [RemoteDestination(device.name, self._client) for device in self.spec.companions]

    def in_vmm(self) -> InVmmDevices | None:
        """The devices inside the VMM; None when there are none."""
        return RemoteInside(self._client) if self.spec.in_vmm else None

    async def instruct(self, device: str, instruction: str) -> str:
        """See `ShimClient.instruct`."""
        return await self._client.instruct(device, instruction)

    async def destroy(self) -> None:
        """End the process and remove its files; returns when it is gone. Idempotent.

        Raises ShimError when it does not end, and OSError when a file cannot be removed; to be repeated then.
        """
        if self.liveness() is not Liveness.GONE:
            with contextlib.suppress(ShimError):
                await self._client.end(_END_S / 2)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_END_S):
                    await self._process.dead.wait()
        self._process.kill()
        if self.liveness() is not Liveness.GONE:
            try:
                async with asyncio.timeout(_END_S):
                    await self._process.dead.wait()
            except TimeoutError:
                raise ShimError(f"the device process {self.pid} was killed and has not ended in {_END_S:g} s") from None
        await self.detach()
        for suffix in (
            "dev",
            "ctl",
            "vfio",
            "devices.json",
            "devices.json.tmp",
            "devices.tmp",
            "devices.log",
            "vfio.log",
        ):
            self.spec.path(suffix).unlink(missing_ok=True)

    async def detach(self) -> None:
        """Let go of the process and leave it as it is, for `adopt` by a later agent."""
        await self._client.close()
        self._process.close()
        if self._steps is not None:
            self._steps.close()
            self._steps = None


class _Steps:
    """What a starting process says through a pipe of how far it has come. Bounded by _START_S for each step."""

    def __init__(self) -> None:
        self._read_fd, self.write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        self._said = b""

    async def reached(self, step: bytes) -> None:
        """Raises OptionsRefused when the program does not take them, other ShimErrors when the process ended first, or
        did not come so far in time."""
        loop, more = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._read_fd, more.set)
        try:
            async with asyncio.timeout(_START_S):
                while step not in self._said.partition(_REFUSED)[0]:
                    await more.wait()
                    more.clear()
                    self._hear()
        except TimeoutError:
            raise ShimError(f"it has not come far enough in {_START_S:g} s") from None
        finally:
            loop.remove_reader(self._read_fd)

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            said = os.read(self._read_fd, 4096)
            if not said or len(self._said) > _MAX_SAID:
                _, refused, wrong = self._said.partition(_REFUSED)
                raise OptionsRefused(_wrong_options(wrong)) if refused else ShimError("its device program is gone")
            self._said += said

    def close_write(self) -> None:
        """Once the child has it: its end is then seen as the end of the pipe."""
        os.close(self.write_fd)
        self.write_fd = -1

    def close(self) -> None:
        for descriptor in (self._read_fd, self.write_fd):
            if descriptor >= 0:
                os.close(descriptor)
        self._read_fd = self.write_fd = -1


def _wrong_options(said: bytes) -> list[WrongOption]:
    """Of what a program wrote after `r`: a JSON list of {device, option, message}. Raises ShimError."""
    try:
        found = [WrongOption(str(one["device"]), str(one["option"]), str(one["message"])) for one in json.loads(said)]
    except (ValueError, KeyError, TypeError) as error:
        raise ShimError(f"it refused its devices' options in words that we do not know: {error}") from error
    if not found:
        raise ShimError("it refused its devices' options and did not say why")
    return found


def _description(spec: DevicesSpec, *, incoming: bool) -> bytes:
    devices: list[dict[str, Any]] = [
        {
            "name": device.name,
            "shim": device.shim.value,
            "initial_bytes": device.initial_bytes,
            "stop_copy_bytes": device.stop_copy_bytes,
            "dirty_bytes_per_s": device.dirty_bytes_per_s,
            "options": device.options,
        }
        for device in (*spec.companions, *spec.in_vmm)
    ]
    return json.dumps(
        {
            "guest": spec.guest,
            "inc": spec.inc,
            "directory": str(spec.directory.absolute()),
            "seed": spec.seed,
            "incoming": incoming,
            "devices": devices,
        }
    ).encode()


def _spawn(spec: DevicesSpec, ready_fd: int) -> subprocess.Popen[bytes]:
    """A program that waits for its description. Blocking. Its own session lets the devices outlive this process."""
    with spec.path("devices.log").open("ab") as log:
        try:
            return subprocess.Popen(
                scoped(spec.program, spec.guest, "devices"),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd="/",
                env={**os.environ, READY_VARIABLE: str(ready_fd)},
                pass_fds=(ready_fd,),
            )
        except OSError as error:
            raise ShimError(f"cannot run {spec.program[0]}: {error}") from error


def _describe(child: subprocess.Popen[bytes], description: bytes) -> None:
    """Blocking. A program that has ended already is told of elsewhere."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
        stdin.write(description)


def _known_process(spec: DevicesSpec) -> Watched | None:
    """The process that the metadata file names; None: there is no such file, or the process is gone.

    Raises ShimError when that cannot be told.
    """
    note = spec.path("devices.json")
    try:
        known = json.loads(note.read_text())
        pid, start_time = int(known["pid"]), int(known["start_time"])
        ours = (known.get("guest"), known.get("inc")) == (spec.guest, spec.inc)
        return Watched.find(pid, start_time) if ours else None
    except FileNotFoundError:
        return None
    except LivenessUnknown as error:
        raise ShimError(f"device process of {spec.inc}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShimError(f"{note}: the note of a device process cannot be read: {error}") from error
