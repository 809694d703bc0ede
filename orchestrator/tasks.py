"""One owner for background tasks: it keeps them referenced, ends them, and never lets an exception be mute.

    tasks = Tasks("keeper of web-1")
    tasks.spawn(self._sample(), "sampler")                 # an exception is logged and counted
    tasks.spawn(self._serve(), "server", failed=self._end)  # an exception ends its owner, which decides
    tasks.keep(self._scan, "scan", again_s=1.0)             # for ever: an exception is logged, counted, tried again
    await tasks.close()

A bare `asyncio.create_task` loses the exception of a task that nobody awaits: the work just stops. Here that cannot
happen, whatever raises.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger(__name__)

Failed = Callable[[BaseException], None]
"""Told of the exception that ended a task; may not raise."""

CLOSE_S = 5.0
SLOWEST_RETRY_S = 30.0
"""A loop that goes on failing is tried again ever more slowly, down to this."""

failures: Counter[str] = Counter()
"""Of this process, by the name of the task: metrics read it."""


class Tasks:
    """Owns tasks of one event loop. Not for use from other threads."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def closed(self) -> bool:
        """`close` was called: nothing is begun any more."""
        return self._closed

    def spawn(
        self, work: Coroutine[Any, Any, Any], name: str, *, failed: Failed | None = None
    ) -> asyncio.Task[Any] | None:
        """Run it beside everything else. None: the owner is closed, and the work was not begun.

        An exception goes to `failed`, or, without that, is logged with its traceback; it is counted either way.
        """
        if self._closed:
            work.close()
            return None
        task = asyncio.get_running_loop().create_task(work, name=f"{self._owner}: {name}")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._over(done, name, failed))
        return task

    def keep(
        self, work: Callable[[], Awaitable[Any]], name: str, *, again_s: float, every_s: float | None = None
    ) -> asyncio.Task[Any] | None:
        """Call `work` over and over until `close`, whatever it raises.

        After an exception it waits `again_s`, doubled at each failure in a row up to SLOWEST_RETRY_S; after a good
        end it waits `every_s` (default: `again_s`).
        """

        async def forever() -> None:
            wait_s = again_s
            while True:
                try:
                    await work()
                except Exception as error:
                    self._count(name, error)
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, max(SLOWEST_RETRY_S, again_s))
                else:
                    wait_s = again_s
                    await asyncio.sleep(again_s if every_s is None else every_s)

        return self.spawn(forever(), name)

    async def close(self, within_s: float = CLOSE_S) -> None:
        """Cancel all and wait for their ends, at most `within_s`; what has not ended by then is logged by name."""
        self._closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        _, left = await asyncio.wait(tasks, timeout=within_s)
        for task in left:
            log.error("a task does not end", owner=self._owner, task=task.get_name(), waited_s=within_s)

    def _over(self, task: asyncio.Task[Any], name: str, failed: Failed | None) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        if failed is None:
            self._count(name, error)
            return
        failures[name] += 1
        failed(error)

    def _count(self, name: str, error: BaseException) -> None:
        failures[name] += 1
        log.error("a task failed", owner=self._owner, task=name, exc_info=error)
