"""What all guests of an agent share."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from agents.config import AgentConfig
from agents.disks.locks import PoolLocks
from agents.engine.base import MigrationEngine
from agents.handover.peer import GrpcDestinationPeer, GrpcSourcePeer
from agents.host.incarnation import Believed
from agents.host.journal import Journal
from agents.host.metrics import Metrics
from agents.host.streams import Streams
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.ledger.store import Store


class PeerChannels(Protocol):
    """Connections to the other agents' PeerService, kept warm."""

    def destination(self, address: str, ref: AttemptRef, inc: str, host: str = "") -> GrpcDestinationPeer:
        """To the destination's agent at `address`, for one attempt and the process `inc`. `host`: whose certificate it
        must have, where there are certificates."""
        ...

    def source(self, address: str, ref: AttemptRef, inc: str, host: str = "") -> GrpcSourcePeer:
        """To the source's agent at `address`, for one attempt and the process `inc`. `host`: whose certificate it
        must have, where there are certificates."""
        ...


@dataclass(frozen=True, slots=True)
class AgentShared:
    """What all guests of an agent share."""

    config: AgentConfig
    here: HostRef
    writer: str
    """Names this agent process in every record it writes."""
    engine: MigrationEngine
    store: Store
    commits: Store
    """A session of its own for attempts: nothing may queue before a COMMIT."""
    journal: Journal
    believed: Believed
    """Whether what the ledger says is to be believed."""
    peers: PeerChannels
    metrics: Metrics
    departures: Callable[[], int]
    """Attempts that this host is the source of: they share its link."""
    link_shared: Callable[[], None]
    """Their number changed."""
    must_have_memory: Callable[[str, int], Awaitable[None]]
    """For one more copy of this guest, of so many MiB, beside what is on this host. Raises NO_CAPACITY."""
    changed: Callable[[], None]
    """Something that watchers of this agent want to know."""
    must_be_nobodys: Callable[[int], None]
    """The process of that pid is no guest's here. Raises ALREADY_EXISTS."""
    adopting: asyncio.Lock
    """Held while a process that somebody else started becomes a guest's: never two guests'."""
    pool_locks: PoolLocks
    streams: Streams | None = None
    """None: this host has no identity, and memory and disks go unprotected."""
