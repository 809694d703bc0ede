"""Health of the control plane as the ledger has it: who leads, and what is quarantined."""

from __future__ import annotations

from orchestrator import wire
from orchestrator.core.records import Leader, QuarantineList
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode
from protos.drover.v1 import orchestrator_pb2 as pb

UNREADABLE = "unreadable"
"""In place of the name of a leader whose record this version cannot read. It leads all the same."""


async def cluster_health(ledger: Ledger) -> pb.ClusterHealth:
    """Raises StoreUnavailable, and BadRecord for a list that this version cannot read: that is no good health."""
    seat = await ledger.store.read(paths.leader())
    found = await ledger.read(QuarantineList, paths.quarantine())
    health = pb.ClusterHealth(leader=_name(seat.data) if seat is not None else "")
    if found is not None:
        for entry in found[0].entries:
            since = wire.timestamp(entry.since_s)
            health.quarantined.add(resource=entry.resource, reason=entry.reason, since=since)
        health.quarantined_left_out = found[0].left_out
    return health


def _name(data: bytes) -> str:
    try:
        return decode(Leader, data, path=paths.leader()).name or UNREADABLE
    except BadRecord:
        return UNREADABLE
