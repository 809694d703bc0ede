"""What the coordinator needs of the agents; `orchestrator.rpc.agent_client` provides it, tests bring a fake."""

from __future__ import annotations

from typing import Protocol

from orchestrator.core.agent import AgentStatus, AttemptSeen, ConductOrder, GuestStatus
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AttemptRef
from orchestrator.core.migration import Prepared


class AgentPort(Protocol):
    """One agent. Every call is bounded and idempotent; it raises DroverError, with AGENT_UNREACHABLE or OUTCOME_UNKNOWN
    when nothing is known of the call's effect, and STALE_EPOCH when another coordinator was here."""

    async def prepare_destination(
        self,
        attempt: AttemptRef,
        *,
        epoch: int,
        source_peer: Endpoint,
        timeout_ms: int,
        multifd_channels: int,
        shard: int = 0,
    ) -> Prepared:
        """Make a VMM that waits for the attempt's stream, or find the one that was made for it. The agent ends it
        unless the attempt is bound to it within `timeout_ms`."""
        ...

    async def conduct_attempt(self, order: ConductOrder) -> None:
        """Have the guest's owner conduct the attempt. Returns when it has begun; what comes of it is for the ledger
        to say."""
        ...

    async def get_attempt(self, migration: str, attempt: int) -> AttemptSeen:
        """What this agent knows of an attempt: under way, its report, or nothing."""
        ...

    async def get_agent(self) -> AgentStatus:
        """Everything the agent has now."""
        ...

    async def start_guest(self, guest: str) -> GuestStatus:
        """Execute a guest whose record is STARTING there. Once the agent refuses, the record is GONE."""
        ...

    async def nudge(self, guest: str) -> None:
        """Have the agent look again at what it owes this guest: something in the ledger has changed. Starts nothing
        that it would not do by itself."""
        ...


class AgentDirectory(Protocol):
    """All agents, by where they serve."""

    def at(self, control_address: str, host: str = "") -> AgentPort:
        """The agent that serves there; connects when it is first called. `host`: whose certificate it must have, where
        there are certificates."""
        ...

    async def close(self) -> None:
        """End the connections to all of them."""
        ...
