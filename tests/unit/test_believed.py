"""Another ledger than the host has known: nothing it says is believed until it is announced, or an operator says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import RunState as Vcpus
from orchestrator.core.agent import Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Incarnation
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import SessionState, Versioned
from tests.unit.test_lost_ledger import HERE, THERE, G, House, until

LIES = GuestRecord("web", Ownership.IDLE, THERE, inc="other")
"""Of a ledger in which the guest is elsewhere: an agent that believed it would be about to give its copy up."""


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


async def begun(house: House) -> None:
    house.world.put(paths.INCARNATION, Incarnation("one"))
    await house.agent.start()
    await house.born()


def put_in_its_place(house: House, ledger: Incarnation, record: GuestRecord) -> None:
    """Another ledger, whose zxids are lower, behind a session that was cut."""
    nodes = house.world.store.tree.nodes
    nodes[paths.INCARNATION] = Versioned(encode(ledger), 0, 1)
    nodes[paths.guest(G)] = Versioned(encode(record), 0, 1)
    house.world.store.tree.notify(paths.INCARNATION)
    for callback in list(house.world.store._callbacks):
        callback(SessionState.CONNECTED)


async def restarted(house: House) -> None:
    await house.agent._journal._write_all()
    await house.restarted()


@pytest.mark.parametrize("again", [False, True])
async def test_another_ledger_is_not_believed_and_guests_run_on(house: House, again: bool) -> None:
    await begun(house)
    put_in_its_place(house, Incarnation("two"), LIES)
    if again:
        await restarted(house)
    await house.looked()
    await until(lambda: house.trouble() is Trouble.FOREIGN_LEDGER)
    (vmm,) = house.mover.processes.values()
    assert vmm.run is Vcpus.RUNNING
    assert house.world.record(G) == LIES
    with pytest.raises(DroverError, match="drover host rejoin h2") as refused:
        await house.agent._epochs.heed(1)
    assert refused.value.reason is RefusalReason.OLD_RECORD
    with pytest.raises(DroverError):
        await house.agent.start_guest(G)
    await house.agent.stop()


@pytest.mark.parametrize(
    "announced",
    [
        Incarnation("two", follows=("zero",), hosts=(HERE.host,)),
        Incarnation("two", follows=("one",), hosts=("h9",)),
    ],
    ids=["of another ledger", "to other hosts"],
)
async def test_what_was_announced_to_others_is_not_believed(house: House, announced: Incarnation) -> None:
    await begun(house)
    put_in_its_place(house, announced, LIES)
    await until(lambda: house.trouble() is Trouble.FOREIGN_LEDGER)
    await house.agent.stop()


async def test_a_ledger_that_is_announced_is_believed_though_its_zxids_are_lower(house: House) -> None:
    await begun(house)
    held = await house.agent.held()
    (copy,) = held.copies
    assert (held.complete, held.incarnation, copy.held.running, copy.held.sealed) == (True, "one", True, False)
    owned = replace(house.world.record(G), owner=HERE, inc=copy.held.inc, writer="import")
    put_in_its_place(house, Incarnation("two", follows=("one",), hosts=(HERE.host,)), owned)
    await house.looked()
    await until(lambda: house.trouble() is None and house.agent._believed.id == "two")
    (vmm,) = house.mover.processes.values()
    assert vmm.run is Vcpus.RUNNING
    await restarted(house)
    assert house.agent._believed.id == "two"
    await until(lambda: house.trouble() is None)
    await house.agent.stop()


async def test_an_operators_word_counts_for_the_ledger_that_is_there(house: House) -> None:
    await begun(house)
    record = house.world.record(G)
    put_in_its_place(house, Incarnation("two"), record)
    await until(lambda: house.trouble() is Trouble.FOREIGN_LEDGER)
    with pytest.raises(DroverError) as refused:
        await house.agent.rejoin("three")
    assert refused.value.reason is RefusalReason.INVALID_ARGUMENT
    assert house.trouble() is Trouble.FOREIGN_LEDGER
    await house.agent.rejoin("two")
    await until(lambda: house.trouble() is None)
    await house.agent.rejoin("two")
    await house.agent.stop()


async def test_a_host_that_has_known_none_believes_the_first(house: House) -> None:
    await house.agent.start()
    await house.born()
    assert house.agent._believed.id == ""
    house.world.put(paths.INCARNATION, Incarnation("one"))
    house.world.store.tree.notify(paths.INCARNATION)
    await house.looked()
    await until(lambda: house.agent._believed.id == "one")
    assert house.trouble() is None
    assert (await house.agent.held()).host == HostRef(HERE.host, HERE.boot_id)
    await house.agent.stop()
