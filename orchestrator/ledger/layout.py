"""Which layout the tree of znodes has. Nobody touches a guest in a tree whose layout is not his own.

`/layout` says it. A tree without that node is empty, and whoever comes first writes it down; or it is of layout 1, in
which guests, evacuations and requests lay directly below their roots, without an active set or the guests of a host;
or of layout 2, in which all that a host had promised was the content of one node. The leading coordinator turns either
into layout 3 (`coordinator/upgrade.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.core.record import Record
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.ledger.store import Create, Op, SetData, Store

OURS = 3


@dataclass(frozen=True, slots=True)
class Layout(Record):
    """`/layout`."""

    version: int = OURS


class WrongLayout(Exception):
    """The tree has another layout: nothing of it was touched. `newer`: waiting does not help."""

    def __init__(self, message: str, *, newer: bool) -> None:
        super().__init__(message)
        self.newer = newer


def written() -> Create:
    """What makes a tree one of our layout."""
    return Create(paths.LAYOUT, encode(Layout()))


async def put(store: Store) -> Op:
    """What makes a tree of an older layout one of ours, unless it moves meanwhile. Raises StoreUnavailable."""
    node = await store.read(paths.LAYOUT)
    return written() if node is None else SetData(paths.LAYOUT, encode(Layout()), node.version)


async def of_tree(store: Store) -> int:
    """The tree's layout; an empty tree gets ours. Raises StoreUnavailable, and BadRecord for a node that cannot be
    read."""
    while True:
        guests = await store.read(paths.GUESTS)  # first: whoever makes an empty tree writes the layout before this
        node = await store.read(paths.LAYOUT)
        if node is not None:
            return decode(Layout, node.data, path=paths.LAYOUT).version
        if guests is not None:
            return 1
        await store.multi([written()])
        await store.barrier()


async def must_be_ours(store: Store) -> None:
    """Raises WrongLayout, StoreUnavailable."""
    try:
        found = await of_tree(store)
    except BadRecord as error:
        raise WrongLayout(f"the layout of the ledger cannot be read: {error}", newer=True) from error
    if found < OURS:
        said = f"the ledger has layout {found}; waiting for a coordinator to upgrade it to {OURS}"
        raise WrongLayout(said, newer=False)
    if found > OURS:
        said = f"the ledger has layout {found}, this version knows {OURS}: use the version that upgraded it, or later"
        raise WrongLayout(said, newer=True)
