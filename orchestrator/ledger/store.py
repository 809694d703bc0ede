"""The port to the coordination store: what Drover needs of ZooKeeper and nothing more.

Every call is bounded, and a write has exactly one of three results: `Done`, `Conflict` (definitely not applied) or
`OutcomeUnknown` (applied, or not, or will be). Unknown is never taken for either of the others; callers read again
after `barrier`. Nothing is queued: while there is no connection, writes return `OutcomeUnknown(sent=False)` at once,
which *is* definite, and reads raise `StoreUnavailable`.

`tests/contract/test_store.py` is the contract; the fake and the real ZooKeeper pass the same suite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class StoreUnavailable(Exception):
    """No connection, or no answer within the bound. Nothing was changed by a read that raises this."""


@dataclass(frozen=True, slots=True)
class Versioned:
    """Content of a node at one instant."""

    data: bytes
    version: int
    mzxid: int


@dataclass(frozen=True, slots=True)
class Create:
    """Make a node. An `ephemeral` one goes with this session. Conflicts: EXISTS, MISSING (its parent)."""

    path: str
    data: bytes
    ephemeral: bool = False
    writers: tuple[str, ...] = ()
    """Hosts whose agents may write it besides those that its place says (`ledger.rights`)."""


@dataclass(frozen=True, slots=True)
class SetData:
    """Replace a node's content. Conflicts: BAD_VERSION, MISSING."""

    path: str
    data: bytes
    version: int
    """Must be the node's version; there is no unconditional set."""


@dataclass(frozen=True, slots=True)
class Check:
    """Change nothing, and let the transaction fail unless the node has this version. Conflicts: BAD_VERSION,
    MISSING."""

    path: str
    version: int


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a node that has this version. Conflicts: BAD_VERSION, MISSING, NOT_EMPTY."""

    path: str
    version: int


Op = Create | SetData | Check | Delete


@dataclass(frozen=True, slots=True)
class Done:
    """The whole transaction was applied. `versions` has the new version per op (0 for create, -1 for check, delete)."""

    zxid: int
    versions: tuple[int, ...]


class ConflictKind(StrEnum):
    """Why an operation could not be applied."""

    BAD_VERSION = "BAD_VERSION"
    EXISTS = "EXISTS"
    MISSING = "MISSING"
    NOT_EMPTY = "NOT_EMPTY"
    """A node with children is not deleted."""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Nothing was applied because of operation `index`. May also answer a repeated copy of a write that won (H5)."""

    index: int
    kind: ConflictKind


@dataclass(frozen=True, slots=True)
class OutcomeUnknown:
    """The write may have been applied, or may be later, or never. `sent=False`: it never left, so never applies."""

    sent: bool = True
    why: str = ""


WriteResult = Done | Conflict | OutcomeUnknown


class SessionState(StrEnum):
    """Of the connection to the store. SUSPENDED: it is gone, and the session may yet be found alive; LOST: the
    session is over, and its ephemeral nodes go."""

    CONNECTED = "CONNECTED"
    SUSPENDED = "SUSPENDED"
    LOST = "LOST"


class Store(Protocol):
    """One client with one session. It never shows less than it has shown before, also after its session was lost and
    another was begun. All callbacks run on the event loop that called `start`."""

    async def start(self, timeout_s: float = 10.0) -> None:
        """Connect. Raises StoreUnavailable when that takes longer; may be called again."""
        ...

    async def close(self) -> None:
        """End the session; ephemeral nodes go. Never raises."""
        ...

    @property
    def session(self) -> SessionState:
        """As the client last heard; the server may have ended it already."""
        ...

    def on_session(self, callback: Callable[[SessionState], None]) -> None:
        """Called at each change. After LOST -> CONNECTED watches are gone and ephemeral nodes must be made again."""
        ...

    @property
    def quorum_age_s(self) -> float:
        """Seconds since the last proof of a live quorum (a write or a barrier that was answered); inf at first."""
        ...

    async def barrier(self, timeout_s: float = 2.0) -> None:
        """A write of this session that a quorum answered: reads after it are not older than this call (H13). Calls that
        are made at a time may share one."""
        ...

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        """None: the node does not exist. Raises StoreUnavailable."""
        ...

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        """Sorted names; empty when the node has none or does not exist."""
        ...

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        """All or nothing, in order. Parents must exist (see `ensure`). Never raises for store trouble.

        `Done` and `Conflict` are answers of the quorum, and as good as a barrier: what is read, and what watches have
        told, once one was given is not older than it.
        """
        ...

    async def ensure(self, path: str, timeout_s: float = 2.0) -> None:
        """Create `path` and its parents with empty content where missing. Raises StoreUnavailable."""
        ...

    @property
    def keeps_rights(self) -> bool:
        """The ledger knows who asks, and not everybody may write everything."""
        ...

    async def grant(self, path: str, hosts: Collection[str], timeout_s: float = 2.0) -> None:
        """From now on these hosts' agents may write this node, and no others: see `ledger.rights`. Its version stays.

        Costs a write where rights are kept and these are other ones, and nothing where the ledger does not know who
        asks. A node that is missing is no trouble. Raises StoreUnavailable.
        """
        ...

    def watch(self, path: str, callback: Callable[[Versioned | None], None]) -> Callable[[], None]:
        """Call back with the present content soon, and after every change with the newest (changes may be merged).

        Survives reconnects and new sessions. Returns a function that ends the watch. Never raises.
        """
        ...

    def watch_children(self, path: str, callback: Callable[[tuple[str, ...]], None]) -> Callable[[], None]:
        """As `watch`, for the names of the children."""
        ...

    def watch_tree(self, roots: Sequence[str], callback: Callable[[str | None], None]) -> Callable[[], None]:
        """Call back with the path of every node that is created, changed or deleted below the roots, and of a root.

        Costs nothing per node. Says which node moved, not how: whoever wants to know reads it. A path is announced
        before any answer that may already show the change, so that a view which reads what was announced is never older
        than an answer it has seen. None: events may have been missed (the first call, and after each reconnect), look
        at everything; it comes once the events of all roots are certain to come. Returns a function that ends it.
        """
        ...
