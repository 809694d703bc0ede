"""How a guest comes into being: all of its nodes at once, on a host that has not changed since it was chosen."""

from __future__ import annotations

from orchestrator.core.death import hosts_of
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.snapshot import HostEntry
from orchestrator.ledger.store import Check, Create, Delete, Op, SetData, Store


def birth_ops(uuid: str, record: GuestRecord, spec: GuestSpec, wish: WantRun, entry: HostEntry) -> list[Op]:
    """The nodes of a life, for one transaction with the caller's own operations on its name.

    `entry` is what the choice of the host was made from.
    """
    host = record.owner.host
    return [
        op_create(paths.guest(uuid), record),
        Create(paths.guest_spec(uuid), encode(spec), writers=tuple(sorted(hosts_of(record)))),
        op_create(paths.want_run(uuid), wish),
        Check(paths.cordon(host), entry.cordon_version),
        room_taken(host, entry),
        Create(paths.host_guest(host, uuid), b""),
    ]


def room_taken(host: str, entry: HostEntry) -> Op:
    """Part of whatever takes room on a host, of which `entry` is what was seen: two who saw the same cannot both."""
    path = paths.reservations(host)
    return Create(path, b"") if entry.reservations_version < 0 else SetData(path, b"", entry.reservations_version)


def again_ops(uuid: str, record: GuestRecord, version: int, entry: HostEntry) -> list[Op]:
    """A life that starts again on the host of `entry`, from the record of that version, in the same way."""
    host = record.owner.host
    return [
        op_set(paths.guest(uuid), record, version),
        Check(paths.cordon(host), entry.cordon_version),
        room_taken(host, entry),
    ]


async def name_freed(store: Store, called: str) -> bool:
    """The name of a life that is over is anybody's: its host's agent cannot remove it where rights are kept. Whether it
    is free now. Raises StoreUnavailable, BadRecord."""
    path = paths.name(called)
    named = await store.read(path)
    if named is None:
        return True
    uuid = decode(str, named.data, path=path)
    record = await store.read(paths.guest(uuid))
    if record is None or decode(GuestRecord, record.data, path=paths.guest(uuid)).phase is not Ownership.GONE:
        return False
    await store.multi([Check(paths.guest(uuid), record.version), Delete(path, named.version)])
    return await store.read(path) is None
