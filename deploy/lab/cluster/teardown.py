"""Finding and ending everything that a cluster ever started, also after a crash of anything.

Nothing here trusts that anybody ended well: processes are found by what was recorded and by marks in /proc, and each
is killed by pid and start time. Every function may be repeated and finds less the second time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

from deploy.lab.cluster import network, processes, state
from deploy.lab.cluster.layout import CLUSTER_VARIABLE, HOST_VARIABLE, PART_VARIABLE, RAY, Layout
from deploy.lab.cluster.processes import Identity, RunningProcess

_COLLECTOR = "collector"
_COLLECTOR_GRACE_S = 2.0
_PATIENCE_S = 10.0
"""A process that SIGKILL does not end within this time hangs in the kernel."""
_RAY_TITLE = "ray::"
_DEVICES_NOTE = ".devices.json"


class _Marks:
    """What tells that a process belongs to a cluster, read once for one look at /proc."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.places: dict[tuple[int, int], str] = {}
        for name in network.existing(layout):
            with contextlib.suppress(OSError):
                status = (network.NAMESPACES / name).stat()
                self.places[status.st_dev, status.st_ino] = name
        # A half-made namespace is a plain file on the machine's disk, whose numbers no namespace has.
        record = state.read(layout.cluster_json)
        self.recorded = set(record.processes()) if record else set[Identity]()
        self.ray = set(record.ray_processes) if record else set[Identity]()
        self.noted = noted_processes(layout)

    def why(self, seen: RunningProcess) -> str | None:
        """Why this process is ours; None if nothing says so. A mere mention of the directory is no proof."""
        if seen.identity in self.recorded:
            return "recorded"
        if seen.identity in self.noted:
            return f"guest process on {self.noted[seen.identity]}"
        if seen.environment().get(CLUSTER_VARIABLE) == str(self.layout.dir):
            return "started by the cluster"
        if (place := seen.network()) in self.places:
            return f"in namespace {self.places[place]}" if place else None
        return "left by the Ray head" if self.is_ray_leftover(seen) else None

    def is_ray_leftover(self, seen: RunningProcess, head: str = RAY) -> bool:
        """Ray's agents and workers overwrite arguments and environment by a title, but not where they were started."""
        arguments = seen.arguments()
        if not arguments or not arguments[0].startswith(_RAY_TITLE):
            return False
        directory = seen.directory()
        started_below = self.layout.dir if head == RAY else self.layout.ray_work(head)
        return directory is not None and directory.is_relative_to(started_below)

    def host_of(self, seen: RunningProcess) -> str | None:
        """The simulated host on which this process runs, if any."""
        if seen.identity in self.noted:
            return self.noted[seen.identity]
        environment = seen.environment()
        if environment.get(CLUSTER_VARIABLE) == str(self.layout.dir) and HOST_VARIABLE in environment:
            return environment[HOST_VARIABLE]
        prefix = f"{self.layout.namespace_prefix}h"
        place = seen.network()
        name = self.places.get(place, "") if place else ""
        return f"host-{name.removeprefix(prefix)}" if name.startswith(prefix) else None


def guest_processes(layout: Layout) -> dict[Identity, str]:
    """The VMMs that agents noted down (hosts/<host>/guests/*/<inc>.json), by host; any may be dead by now."""
    return _notes(layout, lambda path: not path.name.endswith(_DEVICES_NOTE))


def noted_processes(layout: Layout) -> dict[Identity, str]:
    """`guest_processes`, and the processes that hold their devices (<inc>.devices.json)."""
    return _notes(layout, lambda _: True)


def _notes(layout: Layout, wanted: Callable[[Path], bool]) -> dict[Identity, str]:
    found: dict[Identity, str] = {}
    for path in filter(wanted, layout.hosts.glob("*/guests/*/*.json")):
        # Not every note is of a process, and one may be removed while we look.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads(path.read_bytes())
            found[Identity(int(raw["pid"]), int(raw["start_time"]))] = path.relative_to(layout.hosts).parts[0]
    return found


def find(layout: Layout) -> dict[Identity, str]:
    """Every living process of the cluster and why we know it for ours, without this process and its ancestors."""
    marks = _Marks(layout)
    spared = processes.ancestors_and_self()
    return {seen.identity: why for seen in processes.scan() if seen.pid not in spared and (why := marks.why(seen))}


def find_host(layout: Layout, host: str) -> set[Identity]:
    """Every living process of one simulated host: its agent, VMMs, device processes."""
    marks = _Marks(layout)
    spared = processes.ancestors_and_self()
    return {seen.identity for seen in processes.scan() if seen.pid not in spared and marks.host_of(seen) == host}


def find_ray(layout: Layout, head: str = RAY, noted: Collection[Identity] | None = None) -> set[Identity]:
    """Every living process of a Ray head, actors and workers included; `ray` is the only head, or all of them.

    `noted`: descendants of that head, by the supervisor's list. What cluster.json has is of all heads together.
    """
    marks = _Marks(layout)
    known = noted if noted is not None else marks.ray if head == RAY else ()
    found: set[Identity] = set()
    for seen in processes.scan():
        environment = seen.environment()
        part = environment.get(PART_VARIABLE, "")
        named = part == head or (head == RAY and part.startswith(f"{RAY}-"))
        ours = environment.get(CLUSTER_VARIABLE) == str(layout.dir) and named
        if ours or seen.identity in known or marks.is_ray_leftover(seen, head):
            found.add(seen.identity)
    return found


def running_guests(layout: Layout) -> set[Identity]:
    """VMMs that are alive."""
    return {identity for identity in guest_processes(layout) if processes.is_alive(identity)}


def kill(identities: Collection[Identity], timeout_s: float = _PATIENCE_S) -> set[Identity]:
    """SIGKILL each and wait; what is still there after `timeout_s`."""
    for identity in identities:
        processes.send(identity, signal.SIGKILL)
    return processes.wait_gone(identities, timeout_s)


def kill_host(layout: Layout, host: str) -> None:
    """End everything on one host, as a loss of power does: at once and without a word."""
    _kill_until_none(lambda: find_host(layout, host))


def kill_ray(layout: Layout, head: str = RAY, noted: Collection[Identity] | None = None) -> None:
    """End everything of a Ray head (see `find_ray`)."""
    _kill_until_none(lambda: find_ray(layout, head, noted))


def end_processes(layout: Layout, supervisor: Identity | None = None) -> None:
    """End every process of the cluster; the collector last, so that it can note the end of each console.

    `supervisor` is spared: it is the one that calls this, or it is dealt with by the caller.
    """
    collectors = _collectors(layout)

    def others() -> set[Identity]:
        return set(find(layout)) - collectors - {supervisor}

    _kill_until_none(others)
    for collector in collectors:
        processes.send(collector, signal.SIGTERM)
    processes.wait_gone(collectors, _COLLECTOR_GRACE_S)
    _kill_until_none(lambda: set(find(layout)) - {supervisor})


def _collectors(layout: Layout) -> set[Identity]:
    record = state.read(layout.cluster_json)
    parts = record.parts if record else ()
    return {part.process for part in parts if part.kind == _COLLECTOR and part.process}


def _kill_until_none(look: Callable[[], Collection[Identity]]) -> None:
    """Look again after each kill: a process may start another at the moment it dies."""
    deadline = time.monotonic() + _PATIENCE_S
    while (found := look()) and time.monotonic() < deadline:
        kill(found, max(0.1, deadline - time.monotonic()))


def remove_sockets(layout: Layout) -> None:
    """Sockets that a dead process left lie."""
    for path in layout.dir.glob("*.sock"):
        path.unlink(missing_ok=True)
    for path in layout.console.glob("*.sock"):
        path.unlink(missing_ok=True)


def remove_files(layout: Layout, keep: Collection[str] = ()) -> None:
    """Empty the directory and remove it, except the entries named in `keep`. Only a directory that we made is touched.

    The caller holds the lock; its file is what marks the directory as ours, so it goes last.
    """
    if not layout.lock.exists():
        return
    for path in layout.dir.iterdir():
        if path == layout.lock or path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if not any(path != layout.lock for path in layout.dir.iterdir()):
        layout.lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            layout.dir.rmdir()


def leftovers(layout: Layout, keep: Collection[str] = ()) -> list[str]:
    """What of the cluster is still on the machine, one line each: processes, namespaces, mounts, files."""
    found = [f"process {identity.pid}: {_name(identity.pid)} ({why})" for identity, why in find(layout).items()]
    found += [f"namespace {name}" for name in network.existing(layout)]
    found += [f"mount {point}" for point in _mounts(layout)]
    if layout.lock.exists():  # else the directory is not ours
        kept = {*keep, layout.lock.name} if keep else set[str]()
        found += [f"file {path}" for path in sorted(layout.dir.iterdir()) if path.name not in kept]
    return found


def _name(pid: int) -> str:
    seen = processes.look(pid)
    return (" ".join(seen.arguments())[:120] or seen.name) if seen else "gone meanwhile"


def _mounts(layout: Layout) -> list[str]:
    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4] for line in file]
    prefix = str(network.NAMESPACES / layout.namespace_prefix)
    return [point for point in points if point.startswith(prefix) or Path(point).is_relative_to(layout.dir)]
