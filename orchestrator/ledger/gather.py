"""Many reads, a bounded number at a time: a client that queues thousands of them times out with all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from orchestrator.ledger.store import Store

AT_ONCE = 32

I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


async def each(items: Iterable[I], read: Callable[[I], Awaitable[T]], *, at_once: int = AT_ONCE) -> list[T]:
    """`read` of every item, in their order, at most `at_once` under way. The first failure ends the others, and is
    raised."""
    todo = list(items)
    if len(todo) == 1:  # as often as not, and no task is needed for it
        return [await read(todo[0])]
    found: dict[int, T] = {}
    rest = iter(enumerate(todo))

    async def worker() -> None:
        for index, item in rest:
            found[index] = await read(item)

    workers = [asyncio.ensure_future(worker()) for _ in range(min(at_once, len(todo)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for each_worker in workers:
            each_worker.cancel()
    return [found[index] for index in range(len(todo))]


async def members(store: Store, root: str) -> tuple[str, ...]:
    """Names of everything in the shards of `root`, one of `paths.SHARDED`; sorted. Raises StoreUnavailable."""
    shards = await store.children(root)
    found = await each(shards, lambda shard: store.children(f"{root}/{shard}"))
    return tuple(sorted(name for names in found for name in names))
