"""A read of an agent's needs no barrier where nothing is decided by it, or where a compare-and-set proves it (H13)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from agents.engine.base import RunState as Vcpus
from orchestrator.core import handover
from orchestrator.core.agent import ConductOrder, PrepareOrder
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason, DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AttemptRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec, HostRecord, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Check, Delete, Done, SetData
from tests.fakes.coordination import MemoryStore
from tests.unit.test_lost_ledger import HERE, THERE, G, House, until

pytestmark = [pytest.mark.rule("H13"), pytest.mark.timeout(30)]
REF = AttemptRef(G, "abcdef012345", 1)
PEER = Endpoint("127.0.0.1", 7702)
LEAVING = handover.open_attempt(GuestRecord("web", Ownership.IDLE, HERE), REF.migration, 1, THERE, epoch=0, writer="c")
LEFT = GuestRecord("web", Ownership.IDLE, THERE)
ARRIVING = handover.open_attempt(LEFT, REF.migration, 1, HERE, epoch=0, writer="c")
PREPARE = PrepareOrder(REF, 0, PEER, 60_000)
CONDUCT = ConductOrder(REF, 0, Prepared("i1", Endpoint("127.0.0.1", 1), PEER), THERE, MigrationPolicy())


@pytest.fixture
async def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    house.world.put(paths.host(THERE.host), HostRecord(THERE.host, THERE.boot_id, "127.0.0.1:1", str(PEER), 1, 1))
    house.world.put(paths.epoch(), WantRun())  # its version is the epoch: 0
    await house.agent.start()
    await house.agent._epochs.heed(0)
    return house


async def others_write(house: House, record: GuestRecord) -> None:
    """Through another server of the ledger."""
    other = MemoryStore(house.world.store.tree)
    node = house.world.store.tree.nodes[paths.guest(G)]
    assert isinstance(await other.multi([SetData(paths.guest(G), encode(record), node.version)]), Done)


def arrives(house: House, record: GuestRecord = ARRIVING) -> None:
    house.world.put(paths.guest(G), record)
    house.world.put(paths.guest_spec(G), GuestSpec("web"))
    house.world.put(paths.want_run(G), WantRun())
    house.world.put(paths.host_guest(HERE.host, G), "")


async def test_a_guest_that_is_about_to_leave_costs_its_keeper_nothing(house: House) -> None:
    await house.born()
    store = house.world.store
    barriers, writes = store.barriers, len(store.writes)
    await others_write(house, LEAVING)
    await until(lambda: house.agent._known(G).record == LEAVING)
    await asyncio.sleep(0.05)
    assert not house.agent._known(G).woken.is_set(), "it has looked"
    assert (store.barriers, len(store.writes)) == (barriers, writes)
    known = house.agent._journal.known_record(G)
    assert known is not None
    assert known.record == LEAVING, "remembered as any other"
    await house.agent.stop()


async def test_a_destination_is_prepared_without_a_barrier(house: House) -> None:
    arrives(house)
    barriers = house.world.store.barriers
    await house.agent.prepare_destination(PREPARE)
    assert house.world.store.barriers == barriers
    await house.agent.stop()


async def test_no_destination_is_refused_for_what_its_server_has_not_heard_yet(house: House) -> None:
    arrives(house, LEFT)
    house.world.store.lag()
    await others_write(house, ARRIVING)
    prepared = await house.agent.prepare_destination(PREPARE)
    assert list(house.agent._known(G).copies) == [prepared.inc]
    await house.agent.stop()


async def test_a_destination_that_was_prepared_on_an_old_record_is_given_up_once_that_is_seen(house: House) -> None:
    arrives(house)
    house.world.store.lag()
    await others_write(house, handover.abort(ARRIVING, REF.migration, 1, AbortReason.CANCELLED, writer="a"))
    await house.agent.prepare_destination(PREPARE)
    assert len(house.mover.processes) == 1
    house.world.store.catch_up()
    await until(lambda: not house.mover.processes)
    await house.agent.stop()


async def test_an_attempt_is_accepted_without_a_barrier_and_bound_without_a_read(house: House) -> None:
    await house.born()
    await others_write(house, LEAVING)
    await until(lambda: house.agent._known(G).record == LEAVING)
    barriers = house.world.store.barriers
    await house.agent.conduct_attempt(CONDUCT)
    await until(lambda: bool(house.world.record(G).inc) or house.world.record(G).phase is not Ownership.OPEN)
    assert house.world.record(G).inc == "i1"
    assert house.world.store.barriers == barriers
    await house.agent.stop()


async def test_no_attempt_is_refused_for_what_its_server_has_not_heard_yet(house: House) -> None:
    await house.born()
    house.world.store.lag()
    await others_write(house, LEAVING)
    await house.agent.conduct_attempt(CONDUCT)
    await until(lambda: bool(house.world.record(G).inc))
    await house.agent.stop()


@pytest.mark.rule("H7")
async def test_what_was_bound_by_an_agent_that_died_is_not_conducted_again(house: House) -> None:
    """The record that the order was judged by does not show it yet; the bind, which is written over it, fails."""
    await house.born()
    await others_write(house, LEAVING)
    await until(lambda: house.agent._known(G).record == LEAVING)
    (vmm,) = house.mover.processes.values()
    house.world.store.lag()
    await others_write(house, handover.bind(LEAVING, REF.migration, 1, "i1", writer="agent that died"))
    await house.agent.conduct_attempt(CONDUCT)
    await until(lambda: house.world.record(G).phase is Ownership.ABORTED)
    assert "start_outgoing" not in vmm.calls
    assert vmm.run is Vcpus.RUNNING
    await house.agent.stop()


async def test_who_has_an_order_that_stays_wrong_is_refused(house: House) -> None:
    await house.born()
    with pytest.raises(DroverError) as refused:
        await house.agent.conduct_attempt(CONDUCT)
    assert refused.value.reason is RefusalReason.STALE_ATTEMPT
    await house.agent.stop()


async def test_what_left_is_forgotten_in_the_transaction_that_takes_it_off_the_list(house: House) -> None:
    await house.born()
    (vmm,) = house.mover.processes.values()
    vmm.run = Vcpus.SEALED
    keeper = house.agent._known(G)
    await others_write(house, LEFT)
    await until(lambda: keeper.forgotten)
    guest = house.world.store.tree.nodes[paths.guest(G)]
    (struck,) = [ops for ops in house.world.store.writes if any(isinstance(op, Delete) for op in ops)]
    assert struck == (Check(paths.guest(G), guest.version), Delete(paths.host_guest(HERE.host, G), 0))
    known = house.agent._journal.known_record(G)
    assert known is not None
    assert known.record == LEFT
    assert not house.mover.processes
    await house.agent.stop()


@pytest.mark.rule("H10")
async def test_nothing_is_forgotten_on_the_strength_of_an_old_record(house: House) -> None:
    """With the guest's files goes the marker that says whether it ran here; and it may be on its way back."""
    arrives(house, LEFT)
    keeper = await house.agent._host(G)
    async with keeper._turn:
        await until(lambda: keeper.told is not None)
        house.world.store.lag()
        await others_write(house, ARRIVING)
        keeper.wake()
    await until(lambda: keeper.record == ARRIVING)
    await asyncio.sleep(0.05)
    assert not keeper.forgotten
    assert house.world.store.tree.children(paths.host_guests(HERE.host)) == (G,)
    await house.agent.stop()


async def test_whoever_says_that_a_record_moved_is_believed_before_any_watch(house: House) -> None:
    await house.born()
    house.world.store.lag()
    await others_write(house, LEAVING)
    house.agent.nudge(G)
    await until(lambda: house.agent._known(G).record == LEAVING)
    await house.agent.stop()
