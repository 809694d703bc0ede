"""Which power cycle of which host this is, whether its volatile directory is volatile, and that the agent is alone.

Assumptions A5 and A7 of docs/protocol.md: the id changes with every power cycle, markers vanish with the power, and
there is one agent per host, also when its predecessor only seemed dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
from pathlib import Path
from typing import Protocol

from agents.config import AgentConfig
from orchestrator import proc
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from orchestrator.core.liveness import LivenessUnknown

_KERNEL_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_VOLATILE_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}
_KILL_S = 5.0


class HostIdentity(Protocol):
    """The port: one implementation reads the kernel, the other a file that the local cluster replaces."""

    def read(self) -> HostRef:
        """Raises DroverError when the host cannot be told from another."""
        ...

    def check_volatile(self, directory: Path) -> None:
        """Raises VOLATILE_DIRECTORY_UNSAFE when the directory would survive a loss of power."""
        ...


class KernelIdentity:
    """A real host."""

    def __init__(self, host: str) -> None:
        self._host = host

    def read(self) -> HostRef:
        return HostRef(self._host, _read_id(_KERNEL_BOOT_ID))

    def check_volatile(self, directory: Path) -> None:
        kind = file_system_magic(directory)
        if kind not in _VOLATILE_FILE_SYSTEMS:
            raise DroverError(
                RefusalReason.VOLATILE_DIRECTORY_UNSAFE,
                f"{directory} lies on a file system (0x{kind:x}) that survives a loss of power: markers would prove "
                "what is not so; name a directory on tmpfs",
                field="volatile_dir",
            )


class SimulatedIdentity:
    """A host of the local cluster: whoever simulates its loss of power replaces the file and empties the directory."""

    def __init__(self, host: str, file: Path) -> None:
        self._host = host
        self._file = file

    def read(self) -> HostRef:
        return HostRef(self._host, _read_id(self._file))

    def check_volatile(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)


def make_identity(config: AgentConfig) -> HostIdentity:
    """Raises DroverError when a simulated identity names no file."""
    if config.identity.kind == "kernel":
        return KernelIdentity(config.host)
    if config.identity.file is None:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, "a simulated identity needs a file", field="identity.file")
    return SimulatedIdentity(config.host, config.identity.file)


def _read_id(path: Path) -> str:
    try:
        found = path.read_text().strip()
    except OSError as error:
        raise DroverError(RefusalReason.INTERNAL, f"cannot read this host's identity: {error}") from error
    if not found:
        raise DroverError(RefusalReason.INTERNAL, f"{path} is empty: this host has no identity")
    return found


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


class OneAgent:
    """The lock that makes an agent the only one of its host. Held for life; the kernel lets go of it at death."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def take(self) -> None:
        """Kills a predecessor that still holds it: one that was frozen must never wake up and drive a VMM (A7).

        Raises DroverError when the holder does not die.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._try():
            self._kill_holder()
            if not self._try():
                raise DroverError(RefusalReason.INTERNAL, f"another agent holds {self._path} and could not be ended")
        os.ftruncate(self._descriptor, 0)
        note = {"pid": os.getpid(), "start_time": proc.start_time_of(os.getpid())}
        os.pwrite(self._descriptor, json.dumps(note).encode(), 0)

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
