"""Calls and watches of the ZooKeeper store end when they are cancelled, at whatever instant that comes.

A session cancels what it still waits for when it is over. A cancel that is swallowed because the answer came at that
very moment leaves a task that waits for its next command for ever, and the session's end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from orchestrator.ledger.zookeeper import ZooKeeperStore

STEPS = range(8)
"""Turns of the event loop between the answer and the cancel: more than there are until the caller has the answer."""


class Pending:
    """What kazoo returns for a call under way."""

    def __init__(self) -> None:
        self._tell: Callable[[object], None] = lambda _: None

    def rawlink(self, callback: Callable[[object], None]) -> None:
        self._tell = callback

    def arrive(self) -> None:
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
