"""Health of the control plane as the ledger has it: who leads, and what is quarantined."""

from __future__ import annotations

from orchestrator import wire
from orchestrator.api.reads import fleet_shards
from orchestrator.core.records import Leader, QuarantineList
from orchestrator.core.text import clip
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import BadRecord, decode
from protos.drover.v1 import orchestrator_pb2 as pb

MAX_REASON = 500
UNREADABLE = "unreadable"
"""In place of the name of a leader whose record this version cannot read. It leads all the same."""


async def cluster_health(ledger: Ledger) -> pb.ClusterHealth:
    """Raises StoreUnavailable, and BadRecord for a list that this version cannot read: that is no good health."""
    leaders: list[str] = []
    health = pb.ClusterHealth()
    for shard in range(await fleet_shards(ledger)):
        seat = await ledger.store.read(paths.leader(shard))
        leader, wrong = _name(seat.data) if seat is not None else ("", "")
        leaders.append(leader)
        if wrong:
            health.quarantined.add(resource="leader", reason=wrong)
        found = await ledger.read(QuarantineList, paths.quarantine(shard))
        if found is not None:
            for entry in found[0].entries:
                since = wire.timestamp(entry.since_s)
                health.quarantined.add(resource=entry.resource, reason=entry.reason, since=since)
            health.quarantined_left_out += found[0].left_out
    health.leader = _shown(leaders)
    return health


def _shown(leaders: list[str]) -> str:
    """Who leads; of a fleet that is shared out which shards, and empty only when nobody leads any."""
    if len(leaders) == 1 or not any(leaders):
        return leaders[0]
    led = {name: [str(shard) for shard, one in enumerate(leaders) if one == name] for name in leaders}
    return ", ".join(
        f"{name or 'nobody'} (shard{'s' if len(shards) > 1 else ''} {' '.join(shards)})" for name, shards in led.items()
    )


def _name(data: bytes) -> tuple[str, str]:
    """Who leads, and what is wrong with the seat; empty: nothing."""
    try:
        leader = decode(Leader, data, path=paths.leader())
    except BadRecord as error:
        said = f"the leader's seat cannot be read by this version; coordinators of this version wait: {error}"
        return UNREADABLE, clip(said, MAX_REASON)
    return leader.name or UNREADABLE, ""
