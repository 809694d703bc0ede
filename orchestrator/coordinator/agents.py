"""The agents over gRPC, for the coordinator: one channel per agent, kept."""

from __future__ import annotations

import asyncio

from orchestrator.rpc.agent_client import AgentClient


class RpcAgents:
    """`AgentDirectory` of the coordinator, named by `wiring.CoordinatorConfig.agents_factory`."""

    def __init__(self) -> None:
        self._clients: dict[str, AgentClient] = {}

    def at(self, control_address: str) -> AgentClient:
        """The agent that serves there; connects when it is first called."""
        client = self._clients.get(control_address)
        if client is None:
            client = self._clients[control_address] = AgentClient(control_address)
        return client

    async def close(self) -> None:
        """End every channel; calls under way end as cancelled."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients), return_exceptions=True)
