"""Calls and watches of the ZooKeeper store end when they are cancelled, at whatever instant that comes; barriers share
writes.

A session cancels what it still waits for when it is over. A cancel that is swallowed because the answer came at that
very moment leaves a task that waits for its next command for ever, and the session's end with it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence

import pytest

from orchestrator.ledger.store import Done, Op, OutcomeUnknown, SessionState, StoreUnavailable, WriteResult
from orchestrator.ledger.zookeeper import ZooKeeperStore

STEPS = range(8)
"""Turns of the event loop between the answer and the cancel: more than there are until the caller has the answer."""


class Pending:
    """What kazoo returns for a call under way."""

    def __init__(self) -> None:
        self._tell: Callable[[object], None] = lambda _: None
        self._ready = False

    def ready(self) -> bool:
        return self._ready

    def rawlink(self, callback: Callable[[object], None]) -> None:
        self._tell = callback

    def arrive(self) -> None:
        self._ready = True
        self._tell(self)

    def get(self, *, block: bool) -> str:
        return "answer"


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


@pytest.mark.parametrize("steps", STEPS)
async def test_a_cancel_is_not_lost_when_the_answer_comes_at_that_moment(steps: int) -> None:
    store, result = ZooKeeperStore("nowhere:1"), Pending()
    answered = asyncio.Event()

    async def worker() -> None:
        """Like the lanes of a session: one call, then the next command, which never comes."""
        await store._answer(result, 5.0)
        answered.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(worker())
    await turns(2)
    result.arrive()
    await turns(steps)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=1.0)
    assert done, f"the cancel was swallowed {steps} turns after the answer (answered: {answered.is_set()})"
    assert task.cancelled()


class Cut(ZooKeeperStore):
    """Counts the connections that it gives up."""

    def __init__(self) -> None:
        super().__init__("nowhere:1")
        self.cuts = 0

    def _cut(self) -> None:
        self.cuts += 1


async def test_an_answer_that_came_while_the_process_stood_still_is_no_time_out() -> None:
    """A process without a core for seconds is not to take every connection of its own for dead."""
    store, result = Cut(), Pending()
    asked = asyncio.create_task(store._answer(result, 0.2))
    await turns(2)
    answering = threading.Timer(0.05, result.arrive)
    answering.start()
    time.sleep(0.6)  # noqa: ASYNC251  # the loop itself stands still
    answering.join()
    assert await asked == "answer"
    assert store.cuts == 0


async def test_a_late_process_waits_again_once_and_a_silent_server_is_still_noticed() -> None:
    store, coming, never = Cut(), Pending(), Pending()
    asked = [asyncio.create_task(store._answer(one, 0.3)) for one in (coming, never)]
    await turns(2)
    time.sleep(1.0)  # noqa: ASYNC251
    await turns(4)
    assert not any(one.done() for one in asked)
    coming.arrive()
    assert await asked[0] == "answer"
    with pytest.raises(TimeoutError):
        await asked[1]


async def test_a_server_that_answers_nothing_costs_the_connection() -> None:
    store = Cut()
    with pytest.raises(TimeoutError):
        await store._answer(Pending(), 0.2)
    assert store.cuts == 1


@pytest.mark.parametrize("steps", STEPS)
async def test_a_watch_ends_also_when_its_node_changes_at_that_moment(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ZooKeeperStore("nowhere:1")

    async def look(*_: object) -> None:
        return None

    monkeypatch.setattr(store, "_look", look)
    end = store.watch("/guests/g", lambda _: None)
    (watch,) = store._watches
    assert watch.task is not None
    assert watch.changed is not None
    await turns(3)
    watch.changed.set()
    await turns(steps)
    end()
    done, _ = await asyncio.wait({watch.task}, timeout=1.0)
    assert done, f"the watch goes on {steps} turns after a change"


async def test_a_watch_goes_on_whatever_a_look_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who watches a guest's record would hear nothing of it for ever, and nobody would know."""
    store, looks = ZooKeeperStore("nowhere:1"), 0
    told: asyncio.Queue[object] = asyncio.Queue()

    async def look(*_: object) -> str:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ValueError("an answer that nobody thought of")
        return "content"

    monkeypatch.setattr(store, "_look", look)
    end = store.watch("/guests/g", told.put_nowait)
    async with asyncio.timeout(30):
        assert await told.get() == "content"
    end()


class Answering(ZooKeeperStore):
    """Its transactions are answered one by one, when the test says so."""

    def __init__(self) -> None:
        super().__init__("nowhere:1")
        self.sent: list[asyncio.Future[WriteResult]] = []

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        self.sent.append(asyncio.get_running_loop().create_future())
        return await self.sent[-1]

    async def left(self, number: int) -> None:
        async with asyncio.timeout(5):
            while len(self.sent) < number:  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    def asked(self, number: int = 1) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.barrier()) for _ in range(number)]


async def test_barriers_that_are_asked_for_at_a_time_are_one_write() -> None:
    store = Answering()
    many = store.asked(50)
    await store.left(1)
    store.sent[0].set_result(Done(1, ()))
    await asyncio.gather(*many)
    assert len(store.sent) == 1
    await store.close()


async def test_a_barrier_never_joins_one_that_has_left() -> None:
    """That one may stand before what its caller has to see."""
    store = Answering()
    first = store.asked()
    await store.left(1)
    later = store.asked(10)
    await turns(10)
    store.sent[0].set_result(Done(1, ()))
    await asyncio.gather(*first)
    await store.left(2)
    assert not any(task.done() for task in later)
    store.sent[1].set_result(Done(2, ()))
    await asyncio.gather(*later)
    assert len(store.sent) == 2
    await store.close()


async def test_a_barrier_that_is_not_answered_holds_up_no_other() -> None:
    store = Answering()
    (lost,) = store.asked()
    await store.left(1)
    (next_one,) = store.asked()
    await store.left(2)
    store.sent[1].set_result(Done(2, ()))
    await next_one
    assert not lost.done()
    store.sent[0].set_result(OutcomeUnknown())
    with pytest.raises(StoreUnavailable):
        await lost
    await store.close()


async def test_who_joined_a_barrier_does_not_end_with_who_asked_for_it() -> None:
    store = Answering()
    first, second = store.asked(2)
    await turns(1)
    first.cancel()
    await store.left(1)
    store.sent[0].set_result(Done(1, ()))
    await second
    await store.close()
    with pytest.raises(StoreUnavailable):
        await store.barrier()


async def test_a_barrier_that_a_closed_store_never_begins_is_refused() -> None:
    """A task that is cancelled before its first step runs none of its own clean-up."""
    store = Answering()
    (asked,) = store.asked()
    await turns(1)
    await store.close()
    done, _ = await asyncio.wait({asked}, timeout=1.0)
    assert done, "its caller waits for ever"
    with pytest.raises(StoreUnavailable):
        await asked


class _Client:
    """As far as a watch of trees uses one."""

    chroot = ""

    def on_tree(self, _root: str, _listener: object) -> Callable[[], None]:
        return lambda: None


async def test_a_connection_that_is_lost_as_its_last_watch_is_set_is_not_taken_for_a_certain_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is read over the next connection, before it is asked for its events, would be remembered for ever."""
    store = ZooKeeperStore("nowhere:1")
    store._client = _Client()
    told: list[str | None] = []
    fails = True

    async def read(*_: object) -> str:
        if fails:
            store._session_changed(SessionState.SUSPENDED)
        return "answer"

    monkeypatch.setattr(store, "_read", read)
    store._session_changed(SessionState.CONNECTED)
    end = store.watch_tree(["/guests"], told.append)
    await turns(5)
    assert told == []
    fails = False
    store._session_changed(SessionState.CONNECTED)
    await turns(5)
    assert told == [None]
    end()
