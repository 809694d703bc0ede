"""The agents over gRPC, for the coordinator."""

from __future__ import annotations

from orchestrator.rpc.agent_client import AgentClients


class RpcAgents(AgentClients):
    """`AgentDirectory` of the coordinator, named by `wiring.CoordinatorConfig.agents_factory`."""
