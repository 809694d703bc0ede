"""Which machine in which power cycle this is, which installation, and that the agent is alone on it.

Assumptions A5 and A7 of docs/protocol.md: the id changes with every power cycle, markers vanish with the power, and
there is one agent per host, also when its predecessor only seemed dead. What follows from it for the host's place in
the ledger is decided in `orchestrator.core.identity`.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import select
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agents.config import AgentConfig
from orchestrator import proc
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.whole import write_whole

_KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_HARDWARE = (Path("/sys/class/dmi/id/product_uuid"), Path("/proc/device-tree/serial-number"))
_MEANINGLESS = frozenset(
    (
        "03000200-0400-0500-0006-000700080009",
        "00020003-0004-0005-0006-000700080009",
        "12345678-1234-5678-90ab-cddeefaabbcc",
        "not settable",
        "not specified",
        "not present",
        "none",
    )
)
"""What boards say that were never given a number of their own."""
_VOLATILE_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
_PIDS = Path("/proc/self/ns/pid")
_KILL_S = 5.0


@dataclass(frozen=True, slots=True)
class PowerCycle:
    """One power cycle of one machine."""

    boot_id: str
    machine: str
    """Bound to the hardware, never to a disk; empty when nothing in the hardware is unique."""


class HostIdentity(Protocol):
    """The port: one implementation reads the kernel, the other a file that the local cluster replaces."""

    def read(self) -> PowerCycle:
        """Raises DroverError when one power cycle cannot be told from another."""
        ...

    def check_volatile(self, directory: Path) -> None:
        """Raises VOLATILE_DIRECTORY_UNSAFE when the directory would survive a loss of power."""
        ...


class KernelIdentity(HostIdentity):
    """A real host. `/etc/machine-id` says nothing: it lies on the disk and is copied with it."""

    def read(self) -> PowerCycle:
        return PowerCycle(_read_id(_KERNEL_BOOT_ID), _digest(_hardware_number()))

    def check_volatile(self, directory: Path) -> None:
        kind = file_system_magic(directory)
        if kind not in _VOLATILE_FILE_SYSTEMS:
            raise DroverError(
                RefusalReason.VOLATILE_DIRECTORY_UNSAFE,
                f"{directory} lies on a file system (0x{kind:x}) that survives a loss of power: markers would prove "
                "what is not so; name a directory on tmpfs",
                field="volatile_dir",
            )


class SimulatedIdentity(HostIdentity):
    """A host of the local cluster: whoever simulates its loss of power replaces the file and empties the directory.

    The file's first line is the boot_id, the second one the machine; without that the machine is unknown.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> PowerCycle:
        boot_id, _, machine = _read_id(self._file).partition("\n")
        return PowerCycle(boot_id.strip(), _digest(machine.strip()))

    def check_volatile(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)


def make_identity(config: AgentConfig) -> HostIdentity:
    """Raises DroverError when a simulated identity names no file."""
    if config.identity.kind == "kernel":
        return KernelIdentity()
    if config.identity.file is None:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, "a simulated identity needs a file", field="identity.file")
    return SimulatedIdentity(config.identity.file)


def _read_id(path: Path) -> str:
    try:
        found = path.read_text().strip()
    except OSError as error:
        raise DroverError(RefusalReason.INTERNAL, f"cannot read this host's identity: {error}") from error
    if not found:
        raise DroverError(RefusalReason.INTERNAL, f"{path} is empty: this host has no identity")
    return found


def _hardware_number() -> str:
    """Empty when there is none, when we may not read it, or when every board of its kind says the same."""
    for path in _HARDWARE:
        with contextlib.suppress(OSError):
            found = path.read_text(errors="replace").strip("\0 \n").lower()
            same_everywhere = len(set(found.replace("-", ""))) < 3
            if not same_everywhere and found not in _MEANINGLESS:
                return found
    return ""


def _digest(number: str) -> str:
    """Serial numbers are nobody's business: what stands in the ledger tells machines apart and nothing else."""
    return hashlib.sha256(f"drover machine {number}".encode()).hexdigest()[:32] if number else ""


class Installation:
    """What the agent's directory says of itself: its id, and the claims under which it may have been registered.

    `installation.json`; it survives a restart of the agent and a loss of power, and is copied with the disk.
    """

    KEPT = 8
    """Claims: one is registered, the others were noted by agents that ended before they knew."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "installation.json"
        self.id = ""
        self.claims: tuple[str, ...] = ()
        """The newest last."""

    def open(self) -> None:
        """Read it, or make it where the directory is new. Raises DroverError when it cannot be read, and OSError when
        it cannot be made: without it a host that lost power could not prove that it is itself."""
        try:
            content = json.loads(self._file.read_bytes())
            self.id, self.claims = str(content["id"]), tuple(map(str, content["claims"]))
        except FileNotFoundError:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self.id = uuid.uuid4().hex
            self._write()
        except (ValueError, KeyError, TypeError) as error:
            raise DroverError(
                RefusalReason.INTERNAL,
                f"{self._file} cannot be read ({error!r}): restore it; where that is not possible, remove it and see "
                "`declare-dead` in docs/operations.md",
            ) from error

    def claim(self, claim: str) -> None:
        """Note that the next registration is made under it. Durable. Raises OSError; then nothing was noted."""
        before, self.claims = self.claims, (*self.claims, claim)[-self.KEPT :]
        try:
            self._write()
        except OSError:
            self.claims = before
            raise

    def _write(self) -> None:
        write_whole(self._file, json.dumps({"id": self.id, "claims": self.claims}).encode(), durable=True)


class _StatFs(ctypes.Structure):
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 240))


def file_system_magic(directory: Path) -> int:
    """`f_type` of statfs(2); os.statvfs does not tell it. Makes the directory where missing. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    found = _StatFs()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.statfs(os.fsencode(directory), ctypes.byref(found)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(directory))
    return int(found.f_type) & 0xFFFFFFFF


def _file_name(found: os.stat_result) -> str:
    """What one kernel tells a file from all others by."""
    return f"{found.st_dev}:{found.st_ino}"


def identity_of(cycle: PowerCycle, *, lock: str, volatile_dir: Path) -> AgentIdentity:
    """Of this process, as far as it is known before its installation is opened.

    Raises OSError when the volatile directory cannot be made, LivenessUnknown when the kernel says nothing of us.
    """
    volatile_dir.mkdir(parents=True, exist_ok=True)
    return AgentIdentity(
        "",
        cycle.machine,
        cycle.boot_id,
        agent=uuid.uuid4().hex,
        lock=lock,
        pid=os.getpid(),
        start_time=proc.start_time_of(os.getpid()) or 0,
        pids=_file_name(_PIDS.stat()),
        markers=_file_name(volatile_dir.stat()),
    )


def has_ended(holder: AgentIdentity, me: AgentIdentity) -> bool:
    """This kernel knows for certain that the holder's process has ended. False: it lives, or nobody can tell."""
    if not holder.pid or not holder.start_time or not holder.pids:
        return False
    if (holder.machine, holder.boot_id, holder.pids) != (me.machine, me.boot_id, me.pids):
        return False  # the number says nothing here
    try:
        descriptor = proc.open_process(holder.pid, holder.start_time)
    except (LivenessUnknown, OSError):
        return False
    if descriptor is None:
        return True
    os.close(descriptor)
    return False


class OneAgent:
    """The lock that makes an agent the only one of its host. Held for life; the kernel lets go of it at death."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def take(self) -> str:
        """Kills a predecessor that still holds it: one that was frozen must never wake up and drive a VMM (A7).

        Returns `device:inode` of the file: on one kernel, who held it before and is not us is dead. Raises DroverError
        when the holder does not die, and OSError when the file cannot be made.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._try():
            self._kill_holder()
            if not self._try():
                raise DroverError(RefusalReason.INTERNAL, f"another agent holds {self._path} and could not be ended")
        note = {"pid": os.getpid(), "start_time": proc.start_time_of(os.getpid())}
        # Of one length, and never truncated: it needs no room on a disk that has become full.
        os.pwrite(self._descriptor, json.dumps(note).encode().ljust(128), 0)
        return _file_name(os.fstat(self._descriptor))

    def _try(self) -> bool:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _kill_holder(self) -> None:
        """Through a pid descriptor whose start time was compared: a recycled pid cannot be hit."""
        with contextlib.suppress(ValueError, KeyError, TypeError, OSError, LivenessUnknown):
            note = json.loads(os.pread(self._descriptor, 4096, 0))
            descriptor = proc.open_process(int(note["pid"]), int(note["start_time"]))
            if descriptor is None:
                return
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                waiting = select.poll()  # unlike select(2), it takes descriptors of any number
                waiting.register(descriptor, select.POLLIN)
                waiting.poll(_KILL_S * 1000)
            finally:
                os.close(descriptor)
