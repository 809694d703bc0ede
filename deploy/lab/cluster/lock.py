"""The lock of a cluster's directory: held by whoever starts, runs or ends the cluster, and gone with its process.

`drover up` takes it and hands it over to the supervisor by an inherited descriptor: a second `up` cannot slip through
in between. The file also marks the directory as made by Drover: nothing else is ever emptied.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time

from deploy.lab.cluster import processes
from deploy.lab.cluster.layout import Layout, LocalClusterError
from deploy.lab.cluster.processes import Identity


class Lock:
    """A lock that is held. Closing it does not remove the file (see teardown.remove_files)."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def sign(self, pid: int | None = None, role: str = "running") -> None:
        """Note down who holds it: this process, or the child that it is handed over to."""
        holder = processes.identify(pid or os.getpid())
        if holder:
            os.ftruncate(self.descriptor, 0)
            os.pwrite(self.descriptor, f"{holder.pid} {holder.start_time} {role}\n".encode(), 0)

    def keep(self) -> None:
        """Not for our children: a lock lives as long as anybody has it."""
        os.set_inheritable(self.descriptor, False)

    def release(self) -> None:
        """Let go in this process. Whoever inherited the descriptor still holds it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def acquire(layout: Layout, *, create: bool, wait_s: float = 0.0, clearing: bool = False) -> Lock | None:
    """None: somebody else holds it, or (without `create`) there is no such directory.

    Raises LocalClusterError for a directory with other things in it than ours.
    """
    deadline = time.monotonic() + wait_s
    while True:
        if create:
            _make_directory(layout)
        try:
            descriptor = os.open(layout.lock, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            if create:
                continue  # it was removed between the two calls
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_current(layout, descriptor):
                lock = Lock(descriptor)
                lock.sign(role="clearing" if clearing else "running")
                return lock
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
        os.close(descriptor)
        time.sleep(0.02)


def holder(layout: Layout) -> Identity | None:
    """Who signed last, if that process lives: the one that starts, runs or ends the cluster."""
    try:
        pid, start_time, _ = layout.lock.read_text().split()
        identity = Identity(int(pid), int(start_time))
    except (OSError, ValueError):
        return None
    return identity if processes.is_alive(identity) else None


def may_be_stopped(layout: Layout) -> bool:
    """Is the holder a cluster or its start, and not somebody who is ending one?"""
    with contextlib.suppress(OSError):
        return layout.lock.read_text().split()[2:] == ["running"]
    return False


def is_held(layout: Layout) -> bool:
    """Does any process hold it?"""
    try:
        descriptor = os.open(layout.lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _make_directory(layout: Layout) -> None:
    try:
        layout.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        foreign = not layout.lock.exists() and any(layout.dir.iterdir())
        if not foreign:
            layout.dir.chmod(0o700)  # also one that was there before, or was made with another umask
    except FileNotFoundError:
        return
    except OSError as error:
        raise LocalClusterError(f"cannot use the directory {layout.dir}: {error.strerror}") from error
    # Looked at again: another `up` may have put its lock there meanwhile.
    if foreign and not layout.lock.exists():
        raise LocalClusterError(
            f"{layout.dir} holds files that are not Drover's, and `drover down` would remove them: "
            "name another directory with --dir"
        )


def _is_current(layout: Layout, descriptor: int) -> bool:
    """Is the locked file still the one with that name? `down` may have removed it before we got the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), layout.lock.stat())
    except FileNotFoundError:
        return False
