"""What a session writes and reads of the requests of its migration."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import cast

from agents.handover.ledger import AttemptLedger
from agents.handover.words import RequestsWritten, Seen
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.records import Requests
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import decode
from orchestrator.ledger.store import Done
from tests.fakes.coordination import MemoryStore, Tree

HERE, THERE = HostRef("h", "1"), HostRef("d", "1")


async def second_attempt(*stored: AckRequest) -> AttemptLedger:
    """`stored` were written by the attempt before."""
    store = MemoryStore(Tree())
    for path in (paths.guest("g"), paths.requests("m")):
        await store.ensure(path.rpartition("/")[0])
    record = GuestRecord("g", Ownership.OPEN, HERE, "m", 2, THERE, "i")
    made = [op_create(paths.guest("g"), record), op_create(paths.requests("m"), Requests(stored, 1))]
    assert isinstance(await store.multi(made), Done)
    return AttemptLedger(store, AttemptRef("g", "m", 2), HERE, "i", "w")


async def test_what_a_device_asked_in_an_earlier_attempt_is_not_asked_in_this_one() -> None:
    """It ended with its session there; a device that still needs an ACK asks again."""
    ledger = await second_attempt(AckRequest("a", 1), AckRequest("b", 1))
    asked = (AckRequest("a", 2),)
    assert await ledger.write_requests(asked) == RequestsWritten(asked, asked, 1)
    assert await ledger.write_requests(asked) == RequestsWritten(asked, asked, 1), "written once"


async def test_only_requests_of_this_attempt_are_seen_and_every_version() -> None:
    ledger = await second_attempt(AckRequest("a", 1))
    seen: list[tuple[tuple[AckRequest, ...], int]] = []
    ledger.watch_requests(lambda entries, version: seen.append((entries, version)))
    await ledger.write_requests((AckRequest("b", 1),))
    await asyncio.sleep(0)  # the last call back is on its way
    assert seen[0] == ((), 0)
    assert seen[-1] == ((AckRequest("b", 1),), 1)


async def test_a_session_whose_attempt_is_over_asks_for_nothing_in_the_next_one() -> None:
    """The next attempt may be open while the session before it is still on its way back, and its devices may ask."""
    ledger = await second_attempt()
    before = AttemptLedger(ledger.store, AttemptRef("g", "m", 1), HERE, "i1", "w1")
    assert await before.write_requests((AckRequest("a", 1),)) is None
    node = await ledger.store.read(paths.requests("m"))
    assert node is not None
    assert node.version == 0, "a COMMIT of the next attempt would be refused for it"


async def test_a_request_is_written_without_a_barrier_and_repeated_behind_one() -> None:
    """The write checks what was read before it; where there is nothing to write, nothing else would prove it."""
    ledger = await second_attempt()
    store = cast(MemoryStore, ledger.store)
    asked = (AckRequest("a", 1),)
    await ledger.write_requests(asked)
    assert store.barriers == 0
    store.lag()
    other = AttemptLedger(MemoryStore(store.tree), ledger.ref, HERE, "i", "w")
    both = (AckRequest("a", 1), AckRequest("b", 1))
    assert await other.write_requests((AckRequest("b", 1),)) == RequestsWritten((AckRequest("b", 1),), both, 2)
    assert await ledger.write_requests(asked) == RequestsWritten(asked, both, 2), "with what others asked meanwhile"
    assert store.barriers == 1


async def test_a_request_that_is_written_over_an_old_record_conflicts() -> None:
    ledger = await second_attempt()
    store = cast(MemoryStore, ledger.store)
    store.lag()
    other = AttemptLedger(MemoryStore(store.tree), ledger.ref, HERE, "i", "w")
    assert await other.abort(AbortReason.CANCELLED, ()) is Seen.ABORT_RECORDED
    assert await ledger.write_requests((AckRequest("a", 1),)) is None
    node = await ledger.store.read(paths.requests("m"))
    assert node is not None
    assert node.version == 0


async def test_a_bind_goes_over_the_very_record_that_was_judged() -> None:
    ledger = await second_attempt()
    node = await ledger.store.read(paths.guest("g"))
    assert node is not None
    opened = replace(decode(GuestRecord, node.data), inc="")
    assert isinstance(await ledger.store.multi([op_set(paths.guest("g"), opened, 0)]), Done)
    judged = AttemptLedger(ledger.store, ledger.ref, HERE, "i", "w", judged=(opened, 1))
    twin = AttemptLedger(ledger.store, ledger.ref, HERE, "i", "w", judged=(opened, 1))
    assert await judged.bind() is Seen.BOUND
    assert await twin.bind() is Seen.LEDGER_REFUSED, "bound once, by whoever conducts it"
