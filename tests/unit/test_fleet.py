"""What agents say of their guests, as API and coordinator hear it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

from orchestrator.core.agent import AgentSample, GuestStatus, RunState
from orchestrator.core.records import HostRecord, WantRun
from orchestrator.fleet import Fleet
from orchestrator.ledger import paths
from orchestrator.rpc.agent_client import AgentClients
from tests.fakes.coordination import MemoryStore, World

SAMPLE = AgentSample(guests=(GuestStatus("u1", "web", "inc", RunState.RUNNING, 4711),))


class Speaking:
    """An agent whose watch ends at once, and may be begun anew."""

    def __init__(self) -> None:
        self.watches = 0

    def at(self, address: str, host: str = "") -> Speaking:
        return self

    async def watch_agent(self) -> AsyncIterator[AgentSample]:
        self.watches += 1
        yield SAMPLE
        await asyncio.Event().wait()


async def test_an_agent_is_heard_whatever_befalls_who_listens() -> None:
    world = World(MemoryStore())
    world.put(paths.HOSTS, WantRun())
    world.put(paths.host("h1"), HostRecord("h1", "b1", "127.0.0.1:1", "127.0.0.1:2", 1, 1))
    world.put(paths.live("h1"), "")
    agents = Speaking()
    fleet = Fleet(world.store, cast(AgentClients, agents))
    broken = True

    def listener(_: str) -> None:
        if broken:
            raise ValueError("a listener's fault")

    fleet.listen(listener)
    fleet.start()
    async with asyncio.timeout(30):
        while agents.watches < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        broken = False
        while not fleet.hears("h1") or fleet.guest("h1", "u1") is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await fleet.close()
