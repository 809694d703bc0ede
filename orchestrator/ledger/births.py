"""How a guest comes into being: all of its nodes at once, on a host that has not changed since it was chosen."""

from __future__ import annotations

from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import GuestSpec, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.snapshot import HostEntry
from orchestrator.ledger.store import Check, Create, Op, SetData


def birth_ops(uuid: str, record: GuestRecord, spec: GuestSpec, wish: WantRun, entry: HostEntry) -> list[Op]:
    """The nodes of a life, for one transaction with the caller's own operations on its name.

    `entry` is what the choice of the host was made from.
    """
    host = record.owner.host
    return [
        op_create(paths.guest(uuid), record),
        op_create(paths.guest_spec(uuid), spec),
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
