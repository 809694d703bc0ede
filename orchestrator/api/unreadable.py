"""Lists in spite of records that cannot be read: the others are listed, and these are named with what is wrong.

A record may be damaged, written by a newer version, or hold what does not fit into an answer. Whatever it is, it is the
trouble of that one resource. Only a ledger that does not answer ends a list as a whole.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TypeVar

import structlog

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import clip
from orchestrator.ledger.gather import each
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from protos.drover.v1 import orchestrator_pb2 as pb

T = TypeVar("T")

log = structlog.get_logger(__name__)

MAX_NAMED = 1_000
_REASON = 300
"""Characters."""


class Unreadable:
    """What one list has to leave out, by name."""

    def __init__(self) -> None:
        self._why: dict[str, str] = {}

    def add(self, name: str, why: str) -> None:
        """The first reason stays."""
        self._why.setdefault(name, clip(why, _REASON))

    def add_nodes(self, nodes: Mapping[str, str], root: str) -> None:
        """Those of an inventory's unreadable nodes that lie in `root`."""
        for path, why in nodes.items():
            if path.startswith(f"{root}/"):
                self.add(path.rpartition("/")[2] if path.count("/") > 2 else path.removeprefix(f"{root}/"), why)

    def message(self) -> list[pb.Unreadable]:
        """By name, at most MAX_NAMED."""
        return [pb.Unreadable(name=name, reason=why) for name, why in sorted(self._why.items())[:MAX_NAMED]]

    @contextmanager
    def of(self, name: str) -> Generator[None]:
        """What does not fit into an answer is the record's trouble, and ours to look into."""
        try:
            yield
        except Exception as error:
            log.exception("left out of a list", name=name)
            self.add(name, repr(error))

    async def others(self, names: Iterable[str], view: Callable[[str], Awaitable[T | None]]) -> list[T]:
        """`view` of each, in their order, without those that there are not and those that cannot be read, which are
        added here. Raises StoreUnavailable."""

        async def one(name: str) -> T | None:
            try:
                return await view(name)
            except StoreUnavailable:
                raise
            except BadRecord as error:
                self.add(name, str(error))
            except DroverError as error:
                if error.reason is not RefusalReason.NOT_FOUND:
                    self.add(name, error.message)
            except Exception as error:  # what does not fit into an answer: the record's trouble, and ours to look into
                log.exception("left out of a list", name=name)
                self.add(name, repr(error))
            return None

        return [found for found in await each(names, one) if found is not None]
