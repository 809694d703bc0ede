"""The ledger as a file: JSON lines that carry their own checksums (docs/operations.md, docs/adr/0061).

The first line says what the file is, each line after it is one node, the last one says how many there are and has the
digest of everything before it. What belongs to a session, such as who leads or which agent is there, is left out.

ZooKeeper shows a client one node at a time. A tree that was read twice with nothing moved between is a picture of one
instant: so it is read until that is the case, or a few times. Where the tree never rests the file says so, and holds
every node as it was at some time during the export. That is enough for `restore`, which takes from the file what guests
are, and from the hosts where they are.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import (
    Attempts,
    Certificate,
    Cordon,
    EvacuationGuests,
    EvacuationSpec,
    EvacuationState,
    GuestSpec,
    HostDeath,
    HostRecord,
    HostSpace,
    Incarnation,
    MigrationSpec,
    MigrationState,
    RequestRecord,
    Requests,
    Reservation,
    WantRun,
)
from orchestrator.ledger import layout, paths
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.store import Store, Versioned

FORMAT = 1
LOOKS = 5
"""The tree is read at most so often until it is seen at rest."""
MAX_LINE_BYTES = 4 << 20
MAX_NODES = 5_000_000
SHOWN = 20
"""Of what is wrong with a file, so much is told one by one."""
_SUM = 16


class BadBackup(Exception):
    """The file is no backup of a ledger, or not a whole one. `problems` has a sentence for each thing that is wrong."""

    def __init__(self, problems: list[str]) -> None:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        super().__init__("; ".join(problems[:SHOWN]) + more)
        self.problems = problems


@dataclass(frozen=True, slots=True)
class Backup:
    """A tree as it stands in a file."""

    nodes: Mapping[str, Versioned]
    layout: int
    incarnation: str = ""
    """Of the ledger that was exported; empty: of a version that gave it none."""
    snapshot: bool = True
    """It is the tree at one instant; False: it moved all the time, and each node is as it was some time during the
    export."""
    time_s: float = 0.0
    """Wall clock, for people only."""
    digest: str = ""
    """Of the whole file."""

    def of(self, root: str) -> Iterator[tuple[str, Versioned]]:
        """What lies below `root`."""
        return ((path, node) for path, node in self.nodes.items() if path.startswith(f"{root}/"))


def kept(path: str) -> bool:
    """Whether the node belongs into a backup: nothing that goes with a session, or with a process, does."""
    first, _, rest = path[1:].partition("/")
    if f"/{first}" == paths.BARRIER or path == paths.SEATS or path.startswith(f"{paths.SEATS}/"):
        return False
    if f"/{first}" == paths.COORDINATORS and rest.endswith("/leader"):
        return False
    return not (f"/{first}" == paths.HOSTS and rest.endswith("/live") and rest.count("/") == 1)


def tops() -> tuple[str, ...]:
    """The nodes right below the chroot that there can be."""
    known = (*paths.ROOTS, paths.LAYOUT, paths.LEDGER_CLOCK, paths.SHARDS, paths.INCARNATION)
    return tuple(sorted({f"/{path.split('/')[1]}" for path in known}))


async def look(store: Store) -> dict[str, Versioned]:
    """Every node that belongs into a backup, each as it was at some time during the call. Raises StoreUnavailable."""
    found: dict[str, Versioned] = {}
    level = [path for path in tops() if kept(path)]
    while level:
        nodes = await each(level, store.read)
        there = [path for path, node in zip(level, nodes, strict=True) if node is not None]
        found.update({path: node for path, node in zip(level, nodes, strict=True) if node is not None})
        below = await each(there, store.children)
        level = [
            child for path, names in zip(there, below, strict=True) for name in names if kept(child := f"{path}/{name}")
        ]
        if len(found) + len(level) > MAX_NODES:
            raise BadBackup([f"the ledger has more than {MAX_NODES} nodes"])
    return found


async def take(store: Store, *, time_s: float, looks: int = LOOKS) -> Backup:
    """The tree as it is now. Raises StoreUnavailable, and WrongLayout for a tree of another layout."""
    await store.barrier()
    await layout.must_be_ours(store)
    nodes, snapshot = await look(store), False
    for _ in range(looks - 1):
        before, nodes = nodes, await look(store)
        snapshot = _at_rest(before, nodes)
        if snapshot:
            break
    found = nodes.get(paths.INCARNATION)
    incarnation = decode(Incarnation, found.data, path=paths.INCARNATION).id if found and found.data else ""
    return Backup(nodes, layout.OURS, incarnation, snapshot, time_s)


def _at_rest(before: Mapping[str, Versioned], after: Mapping[str, Versioned]) -> bool:
    """Nothing moved between two looks: by zxid, which no two writes share. What counts time moves by itself."""
    moving = {paths.LEDGER_CLOCK}
    if before.keys() - moving != after.keys() - moving:
        return False
    return all(before[path].mzxid == node.mzxid for path, node in after.items() if path not in moving)


# --- the file ---------------------------------------------------------------------------------------------------------


def lines(backup: Backup) -> Iterator[bytes]:
    """The file, line by line."""
    digest = hashlib.sha256()
    head = {
        "drover_ledger": FORMAT,
        "layout": backup.layout,
        "incarnation": backup.incarnation,
        "snapshot": backup.snapshot,
        "time_s": backup.time_s,
    }
    for line in (_line(head), *(_line(_node(path, backup.nodes[path])) for path in sorted(backup.nodes))):
        digest.update(line)
        yield line
    yield _line({"end": True, "nodes": len(backup.nodes), "sha256": digest.hexdigest()})


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"


def _node(path: str, node: Versioned) -> dict[str, Any]:
    held: dict[str, Any] = {"path": path}
    try:
        held["text"] = node.data.decode()
    except UnicodeDecodeError:
        held["base64"] = base64.b64encode(node.data).decode()
    return held | {"version": node.version, "mzxid": node.mzxid, "sum": _sum(path, node.data)}


def _sum(path: str, data: bytes) -> str:
    return hashlib.sha256(path.encode() + b"\0" + data).hexdigest()[:_SUM]


def write(backup: Backup, path: Path) -> None:
    """Whole or not at all, durable, and for its owner's eyes alone. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.writelines(lines(backup))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read(path: Path) -> Backup:
    """Raises OSError, and BadBackup with everything that is wrong: a line that was changed, an end that is missing, a
    file of another kind. Says nothing about what the nodes hold: see `problems`."""
    with path.open("rb") as file:
        return parse(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""))


@dataclass
class _Reading:
    head: dict[str, Any] | None = None
    end: dict[str, Any] | None = None
    nodes: dict[str, Versioned] = field(default_factory=dict[str, Versioned])
    wrong: list[str] = field(default_factory=list[str])


def parse(content: Iterable[bytes]) -> Backup:
    """As `read`."""
    seen, digest, over = _Reading(), hashlib.sha256(), hashlib.sha256()
    for number, line in enumerate(content, 1):
        if len(line) > MAX_LINE_BYTES:
            raise BadBackup([f"line {number} is longer than {MAX_LINE_BYTES} bytes: this is no backup of a ledger"])
        over.update(line)
        if seen.end is not None:
            seen.wrong.append(f"line {number} follows the line that ends the file")
            break
        _take_line(seen, number, line)
        if seen.end is None:
            digest.update(line)
        if len(seen.nodes) > MAX_NODES:
            raise BadBackup([f"the file has more than {MAX_NODES} nodes"])
    if seen.head is None:
        raise BadBackup(seen.wrong or ["the file is empty"])
    if seen.end is None:
        seen.wrong.append("the file has no last line: it was cut off, or is still being written")
    elif seen.end.get("sha256") != digest.hexdigest() or seen.end.get("nodes") != len(seen.nodes):
        seen.wrong.append("the digest in the last line is not that of the lines before it: something was changed")
    if seen.wrong:
        raise BadBackup(seen.wrong)
    head = seen.head
    return Backup(
        seen.nodes, head["layout"], head["incarnation"], head["snapshot"], head["time_s"], digest=over.hexdigest()
    )


def _take_line(seen: _Reading, number: int, line: bytes) -> None:
    try:
        found: Any = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        found = None
    if not isinstance(found, dict):
        seen.wrong.append(f"line {number} is not a whole line of JSON")
        return
    content = cast("dict[str, Any]", found)
    if number == 1:
        _take_head(seen, content)
    elif "end" in content:
        seen.end = content
    else:
        _take_node(seen, number, content)


_HEAD: Mapping[str, type | tuple[type, ...]] = {
    "layout": int,
    "incarnation": str,
    "snapshot": bool,
    "time_s": (int, float),
}


def _take_head(seen: _Reading, head: dict[str, Any]) -> None:
    if head.get("drover_ledger") != FORMAT:
        known = f"this version reads format {FORMAT}"
        raise BadBackup([f"the first line does not say that this is a backup of a ledger that can be read: {known}"])
    if wrong := [name for name, kind in _HEAD.items() if not isinstance(head.get(name), kind)]:
        raise BadBackup([f"the first line has no usable {', '.join(wrong)}"])
    seen.head = head


def _take_node(seen: _Reading, number: int, held: dict[str, Any]) -> None:
    path, version, mzxid = held.get("path"), held.get("version"), held.get("mzxid")
    if not isinstance(path, str) or not path.startswith("/") or not isinstance(version, int):
        seen.wrong.append(f"line {number} is no node")
        return
    text, packed = held.get("text"), held.get("base64")
    try:
        data = text.encode() if isinstance(text, str) else base64.b64decode(str(packed), validate=True)
    except ValueError:
        data = None
    if data is None or held.get("sum") != _sum(path, data) or not isinstance(mzxid, int):
        seen.wrong.append(f"line {number} ({path}) was changed: its checksum does not fit")
    elif path in seen.nodes:
        seen.wrong.append(f"line {number} ({path}) is there twice")
    else:
        seen.nodes[path] = Versioned(data, version, mzxid)


# --- what the nodes hold ----------------------------------------------------------------------------------------------


def kind_of(path: str) -> type[object] | None:
    """What a node with content holds; None: nothing that is looked at."""
    root, _, rest = path[1:].partition("/")
    parts = rest.split("/") if rest else []
    match f"/{root}", parts:
        case paths.NAMES, [_]:
            return str
        case paths.GUESTS, [_, _]:
            return GuestRecord
        case paths.GUESTS, [_, _, child]:
            return {"spec": GuestSpec, "want_run": WantRun, "migration": str}.get(child)
        case paths.MIGRATIONS, [_, _]:
            return MigrationSpec
        case paths.MIGRATIONS, [_, _, child]:
            return {"state": MigrationState, "attempts": Attempts, "req": Requests, "ack": Requests}.get(child)
        case paths.EVACUATIONS, [_, _]:
            return EvacuationSpec
        case paths.EVACUATIONS, [_, _, child]:
            return EvacuationGuests if paths.is_evacuation_guests(child) else EvacuationState
        case paths.REQUESTS, [_, _]:
            return RequestRecord
        case paths.HOSTS, [_]:
            return HostRecord
        case paths.HOSTS, [_, child]:
            return {"cordon": Cordon, "space": HostSpace}.get(child)
        case paths.HOSTS, [_, "resv", _]:
            return Reservation
        case paths.FENCE, [_, _]:
            return Certificate
        case paths.DEATHS, [_]:
            return HostDeath
        case _:
            return None


def problems(backup: Backup) -> list[str]:
    """What a file that is whole holds all the same that cannot be restored: a sentence each, none for a good one."""
    found: list[str] = []
    if backup.layout != layout.OURS:
        found.append(f"it is of layout {backup.layout} of the ledger, this version knows {layout.OURS}")
    held: dict[str, object] = {}
    for path, node in backup.nodes.items():
        kind = kind_of(path)
        if kind is None or not node.data:
            continue
        try:
            held[path] = decode(kind, node.data, path=path)
        except BadRecord as error:
            found.append(str(error))
    parents = {path.rpartition("/")[0] for path in backup.nodes} - {""}
    found += [f"{path} is missing, and something lies below it" for path in sorted(parents - backup.nodes.keys())]
    return found + _loose_ends(backup, held)


def _loose_ends(backup: Backup, held: Mapping[str, object]) -> list[str]:
    """What names something that is not there. While the tree moved that is no fault: it was made, or ended, just
    then."""
    if not backup.snapshot:
        return []
    found: list[str] = []
    for path, record in held.items():
        if path.startswith(f"{paths.NAMES}/") and paths.guest(str(record)) not in backup.nodes:
            found.append(f"{path} names guest {record}, of which there is no record")
        if isinstance(record, GuestRecord) and f"{path}/spec" not in backup.nodes:
            found.append(f"{path}: guest {record.name} has no specification")
    return found
