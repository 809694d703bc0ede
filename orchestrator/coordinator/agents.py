"""The agents over gRPC, for the coordinator."""

from __future__ import annotations

from pathlib import Path

from orchestrator.rpc.agent_client import AgentClients
from orchestrator.rpc.credentials import credentials_of


class RpcAgents(AgentClients):
    """`AgentDirectory` of the coordinator, named by `wiring.CoordinatorConfig.agents_factory`."""

    def __init__(self, tls: Path | None = None) -> None:
        """Raises PkiError."""
        super().__init__(credentials_of(tls))
