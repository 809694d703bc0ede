"""cluster.json: what runs. Written whole by the supervisor at each change, read by everybody else."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from deploy.lab.cluster.layout import HostPlace, LocalClusterError, Places, Server, StopReason
from deploy.lab.cluster.processes import Identity

VERSION = 1


class ClusterState(StrEnum):
    """How far the cluster has come."""

    STARTING = "starting"
    READY = "ready"
    FAILED = "failed"
    """It could not start, or not go on; `stop` says why. Nothing runs any more."""
    STOPPING = "stopping"
    STOPPED = "stopped"


class PartState(StrEnum):
    """How one part is."""

    WAITING = "waiting"
    """For a part that it needs."""
    STARTING = "starting"
    RUNNING = "running"
    DOWN = "down"
    """It ended and will be started again after a short delay."""
    OFF = "off"
    """Its host has no power."""


@dataclass(frozen=True, slots=True)
class PartRecord:
    """One part: a process that the supervisor keeps."""

    name: str
    kind: str
    host: str | None
    state: PartState
    process: Identity | None
    since: float | None
    """Wall clock, seconds since 1970: when this process was started."""
    restarts: int
    last_exit: str = ""


@dataclass(frozen=True, slots=True)
class StopRecord:
    """Why the cluster is in state `failed`, or why its supervisor gave up and left all as it was."""

    sentence: str
    reason: StopReason | None = None
    part: str = ""
    detail: str = ""

    @classmethod
    def of(cls, error: LocalClusterError) -> StopRecord:
        """As it is written into cluster.json, for whoever asks later why."""
        return cls(error.sentence, error.reason, error.part, error.detail)

    def error(self) -> LocalClusterError:
        """The error again, to be raised to an operator."""
        return LocalClusterError(self.sentence, reason=self.reason, part=self.part, detail=self.detail)


@dataclass(frozen=True, slots=True)
class ClusterRecord:
    """The whole file."""

    id: str
    state: ClusterState
    supervisor: Identity
    started_at: float
    parts: tuple[PartRecord, ...] = ()
    places: Places | None = None
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    ready_after_s: float | None = None
    stop: StopRecord | None = None
    ray_processes: tuple[Identity, ...] = ()
    """The head's descendants: two of them outlive it for half a minute and overwrite what they could be known by."""

    def processes(self) -> list[Identity]:
        """All that was recorded, the supervisor included; any may be dead by now."""
        parts = [part.process for part in self.parts if part.process]
        return [self.supervisor, *parts, *self.ray_processes]


def write(path: Path, record: ClusterRecord) -> None:
    """Atomically: a reader sees the old or the new file, never half of one."""
    write_atomically(path, text_of(record))


def private(path: str, flags: int) -> int:
    """`opener` of `open`: a new file is its owner's only."""
    return os.open(path, flags, 0o600)


def write_atomically(path: Path, text: str) -> None:
    """Raises OSError; the old file is whole then, and nothing lies beside it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", opener=private) as file:
            file.write(text)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> ClusterRecord | None:
    """None when there is none, or none that this version understands: then /proc alone must tell what is ours."""
    try:
        return parse(path.read_bytes())
    except OSError:
        return None


def text_of(record: ClusterRecord) -> str:
    """What `write` writes and `parse` reads."""
    return json.dumps({"version": VERSION, **asdict(record)}, indent=1, default=str) + "\n"


def parse(text: str | bytes) -> ClusterRecord | None:
    """None for anything that this version does not understand."""
    try:
        raw: dict[str, Any] = json.loads(text)
        if raw.pop("version") != VERSION:
            return None
        places, stop = raw.pop("places"), raw.pop("stop")
        return ClusterRecord(
            state=ClusterState(raw.pop("state")),
            supervisor=Identity(**raw.pop("supervisor")),
            parts=tuple(_part(part) for part in raw.pop("parts")),
            places=_places(places) if places else None,
            stop=_stop(stop) if stop else None,
            ray_processes=tuple(Identity(**one) for one in raw.pop("ray_processes")),
            **raw,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _part(raw: dict[str, Any]) -> PartRecord:
    process = raw.pop("process")
    return PartRecord(state=PartState(raw.pop("state")), process=Identity(**process) if process else None, **raw)


def _stop(raw: dict[str, Any]) -> StopRecord:
    reason = raw.pop("reason")
    return StopRecord(reason=StopReason(reason) if reason else None, **raw)


def _places(raw: dict[str, Any]) -> Places:
    hosts = tuple(HostPlace(**host) for host in raw.pop("hosts"))
    servers = {kind: tuple(Server(**one) for one in raw.pop(kind)) for kind in ("zookeepers", "apis", "seats")}
    return Places(hosts=hosts, notes=tuple(raw.pop("notes")), **servers, **raw)
