"""How many descriptors this process may have, how many of them strangers may take, and a few that are kept back.

A process without a free descriptor can begin nothing: no VMM, no note, no connection to a peer, no look at a process.
So connections from outside are bounded to a part of what there is, and a reserve is held: when descriptors run out all
the same, it is let go of, so that guests are looked after and the ledger is reached, and taken back when there is room.
"""

from __future__ import annotations

import contextlib
import os
import resource

import structlog

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 1024
"""Of one server: more than a cluster has agents, coordinators and API replicas."""
FEW = 4096
"""With fewer than this, a host of some hundred guests runs out of them."""
RESERVE = 32
"""Enough to look at processes, write notes, and reach the ledger and some peers again."""
SPARE = 8
"""The reserve is let go of when fewer than this are free."""
LOOK_S = 0.5


def limit() -> int:
    """How many descriptors this process may have now."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_limit() -> int:
    """Set the soft limit to the hard one, for this process and what it starts; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError) as error:
        log.warning("the limit of descriptors cannot be raised", limit=soft, error=str(error))
    if soft < FEW:
        log.warning("few descriptors: raise the hard limit of open files (LimitNOFILE)", limit=soft, wanted=FEW)
    return soft


def connections_of(limit: int, addresses: int = 2) -> int:
    """How many connections each address that is listened at takes, so that all of them leave half of `limit` for what
    the process needs itself."""
    return max(16, min(MAX_CONNECTIONS, limit // 2 // max(1, addresses)))


class Reserve:
    """Descriptors of one process that nobody uses until there are no others. `look` has to be called now and then."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self.released = False
        """Descriptors have run out, and the reserve is in use: nothing new should be begun."""

    def look(self) -> None:
        """Take the reserve, let go of it, or take it back, as there are descriptors."""
        if not self._held:
            self._take()
        elif len(free := _taken(SPARE)) < SPARE:
            self._close(self._held + free)
            self._held, self.released = [], True
            log.error("descriptors have run out: the reserve is in use, nothing new is begun", limit=limit())
        else:
            self._close(free)

    def _take(self) -> None:
        """Only where more stay free than would make it let go again at once."""
        wanted = RESERVE + 2 * SPARE
        taken = _taken(wanted)
        enough = len(taken) == wanted
        self._close(taken[RESERVE:] if enough else taken)
        self._held = taken[:RESERVE] if enough else []
        if enough and self.released:
            log.warning("there are descriptors again: the reserve is held")
        self.released = not enough

    def close(self) -> None:
        """Let go of it for good."""
        self._close(self._held)
        self._held = []

    def _close(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            os.close(descriptor)


def _taken(number: int) -> list[int]:
    """So many new descriptors of nothing, or fewer when there are no more."""
    taken: list[int] = []
    with contextlib.suppress(OSError):
        while len(taken) < number:
            taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    return taken


reserve = Reserve()
"""Of this process. Empty until somebody looks after it."""


async def look() -> None:
    """For the owner of a process's background tasks, every LOOK_S."""
    reserve.look()
