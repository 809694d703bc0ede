"""How a guest comes into being: all of its nodes at once, on a host that has not changed since it was chosen."""

from __future__ import annotations

from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import GuestSpec, Reservations, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.snapshot import HostEntry
from orchestrator.ledger.store import Check, Create, Op


def birth_ops(uuid: str, record: GuestRecord, spec: GuestSpec, wish: WantRun, entry: HostEntry) -> list[Op]:
    """The nodes of a life, for one transaction with the caller's own operations on its name.

    `entry` is what the choice of the host was made from: its reservations are written as they are, so that their
    version moves and two who saw the same free memory cannot both take it.
    """
    host = record.owner.host
    path = paths.reservations(host)
    taken = op_set(path, entry.reservations, entry.reservations_version)
    if entry.reservations_version < 0:
        taken = op_create(path, Reservations())
    return [
        op_create(paths.guest(uuid), record),
        op_create(paths.guest_spec(uuid), spec),
        op_create(paths.want_run(uuid), wish),
        Check(paths.cordon(host), entry.cordon_version),
        taken,
        Create(paths.host_guest(host, uuid), b""),
    ]
