"""The stream between the VMMs breaks, at any instant: both sessions, real QEMU, real ZooKeeper, and a middle that cuts.

Whenever it happens, the guest runs in one place afterwards, the one that the ledger names; before the commit that is
the source, with a guest that nothing else was done to, and the next attempt brings it away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from enum import StrEnum

import pytest

from agents.engine.base import EngineStatus, HoldStart, OutgoingOptions, RunState, stream_of
from agents.handover.destination import DestinationStage
from agents.handover.source import SourceStage
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.handover import Ownership
from orchestrator.core.liveness import Liveness
from orchestrator.core.policy import MigrationPolicy
from tests.contract.test_engine import LINK, no_qemu, until
from tests.fakes.attempt import Coming, D, Leaving, S
from tests.fakes.zookeeper import missing
from tests.integration.test_attempt import Lab, lab, server

__all__ = ["lab", "server"]
pytestmark = [
    pytest.mark.qemu,
    pytest.mark.zookeeper,
    pytest.mark.integration,
    pytest.mark.timeout(240),
    no_qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
]
MOST_S = 0.25
"""Longer than a whole attempt of this guest takes on a quiet machine."""
POLICY = replace(MigrationPolicy(), switchover_timeout_ms=1_500, precopy_timeout_ms=4_000)


class Cut(StrEnum):
    RESET = "reset"
    STALL = "stall"
    """Nothing comes through any more, and nobody says so: a frozen peer, a cable pulled."""


@dataclass
class Middle:
    """Carries one stream, until it does not."""

    to: Endpoint
    server: asyncio.Server = field(init=False)
    writers: list[asyncio.StreamWriter] = field(default_factory=list[asyncio.StreamWriter])
    pumps: list[asyncio.Task[None]] = field(default_factory=list[asyncio.Task[None]])
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self) -> Endpoint:
        self._open.set()
        self.server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return Endpoint("127.0.0.1", self.server.sockets[0].getsockname()[1])

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, onward = await asyncio.open_connection(self.to.ip, self.to.port)
        self.writers += [writer, onward]
        self.pumps += [asyncio.create_task(self._pump(*way)) for way in ((reader, onward), (there, writer))]
        self.opened.set()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
            writer.close()

    def cut(self, how: Cut) -> None:
        if how is Cut.STALL:
            self._open.clear()
            return
        for writer in self.writers:
            writer.transport.abort()

    async def end(self) -> None:
        self.server.close()
        for task in self.pumps:
            task.cancel()
        await asyncio.gather(*self.pumps, return_exceptions=True)
        for writer in self.writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def middle(to: Endpoint) -> AsyncIterator[Middle]:
    made = Middle(to)
    try:
        yield made
    finally:
        await made.end()


async def attempt(lab: Lab, how: Cut | None, after_s: float = 0.0) -> None:
    ref = await lab.opened()
    inc = f"i{ref.attempt}"
    copy = await lab.engine.prepare_incoming(lab.spec(inc), lab.migration, ref.attempt)
    lab.vmms.append(copy)
    async with middle(stream_of(copy.metadata)) as between:
        options = OutgoingOptions(await between.listen(), HoldStart.OPEN, 0, LINK, 300)

        async def cutting() -> None:
            await between.opened.wait()
            await asyncio.sleep(after_s)
            if how is not None:
                between.cut(how)

        await lab.conducted(ref, Leaving(lab.vmm), Coming(inc, copy), POLICY, options, lab.directory, during=cutting)


async def in_one_place(lab: Lab) -> bool:
    """Whether it has moved. Raises AssertionError where the guest is not just where the ledger says."""
    record = await lab.record()
    there = lab.destination.vmm
    if record.owner == D:
        assert record.phase is Ownership.IDLE
        assert lab.destination.state.stage is DestinationStage.ENDED_DONE
        assert (await there.state()).run_state is RunState.RUNNING
        assert lab.vmm.liveness() is Liveness.GONE
        return True
    assert (record.owner, record.phase) == (S, Ownership.ABORTED)
    assert lab.source.state.stage is SourceStage.ENDED_ABORTED
    assert (await lab.vmm.state()).run_state is RunState.RUNNING
    assert there.liveness() is Liveness.GONE
    return False


@pytest.mark.parametrize("how", list(Cut))
async def test_a_stream_cut_at_any_instant_leaves_one_guest_and_the_next_attempt_moves_it(lab: Lab, how: Cut) -> None:
    seed = int(os.environ.get("DROVER_SEED", random.randrange(1 << 32)))
    print(f"DROVER_SEED={seed}")
    draw = random.Random(seed)
    times = sorted(draw.uniform(0, MOST_S) for _ in range(6 if how is Cut.RESET else 3))
    for after_s in times:
        await attempt(lab, how, after_s)
        if await in_one_place(lab):
            print(f"moved before the cut, after {after_s * 1000:.0f} ms")
            return
        print(f"cut after {after_s * 1000:.0f} ms: {(await lab.record()).reason}")
    await attempt(lab, None)
    assert await in_one_place(lab)


async def test_a_stream_that_stalls_while_the_guest_stands_still_sets_it_going_in_time(lab: Lab) -> None:
    """Cut at the worst instant: after the last pass has begun. QEMU is blocked, and freed out of band."""
    ref = await lab.opened()
    copy = await lab.engine.prepare_incoming(lab.spec("i1"), lab.migration, ref.attempt)
    lab.vmms.append(copy)
    async with middle(stream_of(copy.metadata)) as between:
        options = OutgoingOptions(await between.listen(), HoldStart.OPEN, 0, LINK, 300)
        lab.vmm.subscribe(
            lambda event: between.cut(Cut.STALL) if getattr(event, "status", None) is EngineStatus.PARKED else None
        )
        await lab.conducted(ref, Leaving(lab.vmm), Coming("i1", copy), POLICY, options, lab.directory)
    assert not await in_one_place(lab)
    stopped, ran = (
        next(e.at_ms for e in lab.source.timeline if e.event == f"vcpus {what}") for what in ("stopped", "run")
    )
    assert ran - stopped < POLICY.switchover_timeout_ms + 5_000
    await until(lab.vmm, lambda now: now.run_state is RunState.RUNNING)
    await attempt(lab, None)
    assert await in_one_place(lab)
