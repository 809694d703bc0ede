"""The coordination store on ZooKeeper. With `kazoo_client.py` and `kazoo_connection.py` the only file that imports
kazoo.

kazoo runs a thread of its own; every completion is handed to the event loop (`_Post`). What it would
do by itself and we must not have: it queues writes while disconnected (we refuse to enqueue), it retries under a new
session (we never use `client.retry`), a transaction's result is a list that may hold exceptions (one wrapper reads it),
and a half-open connection with steady traffic goes unnoticed (an operation without an answer in time cuts the socket,
unless others were answered meanwhile: then the server is merely slow).
"""

# kazoo ships no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportMissingTypeStubs=false, reportAttributeAccessIssue=false

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import socket as sockets
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kazoo.client import KazooState
from kazoo.exceptions import (
    BadVersionError,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    RolledBackError,
)
from kazoo.exceptions import RuntimeInconsistency as Inconsistency
from kazoo.retry import KazooRetry
from kazoo.security import ACL, Id

from orchestrator.core.endpoint import zookeeper_servers
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.ledger import paths, rights
from orchestrator.ledger.kazoo_client import TreeClient
from orchestrator.ledger.store import (
    Check,
    Conflict,
    ConflictKind,
    Create,
    Delete,
    Done,
    Op,
    OutcomeUnknown,
    SessionState,
    SetData,
    Store,
    StoreUnavailable,
    Versioned,
    WriteResult,
)
from orchestrator.pki.files import identity_of, read_pem
from orchestrator.pki.names import Role, of_role
from orchestrator.tasks import Tasks

logging.getLogger("kazoo").setLevel(logging.ERROR)
log = logging.getLogger(__name__)

REREAD_S = 1_800.0
"""Watches are hints: everything watched is read again about this often, whatever was announced. A fleet of a thousand
hosts does nothing else while nothing moves, so this is what it costs at rest."""
_RETRY_S = 0.25
_AT_ONCE = 64
"""Reads under way at a time, and writes: more would only time out behind each other in kazoo's queue. Waiting
for a turn is no sign of a dead connection."""
_TURN_S = 20.0
_PATIENT_S = 2.0
_SILENT = 0.5
"""A connection is cut for an operation that timed out when nothing else was answered for so much of its time-out: one
that is merely slow would only get slower by being replaced."""
_OWN_S = 0.1
"""A time-out that ends this much after its time says more of this process than of the server."""
_JOIN_S = 0.02
"""A barrier waits so long for the one before it, and for others to join; no longer, should that one be lost."""
_DISARM_S = 5.0
"""A node's trigger is taken from kazoo so long after its last watch ended and its last read was over. kazoo arms a node
when the answer comes, which may be later than anybody waits for it."""
_STATES = {
    KazooState.CONNECTED: SessionState.CONNECTED,
    KazooState.SUSPENDED: SessionState.SUSPENDED,
    KazooState.LOST: SessionState.LOST,
}
_CONFLICTS: dict[type[Exception], ConflictKind] = {
    BadVersionError: ConflictKind.BAD_VERSION,
    NodeExistsError: ConflictKind.EXISTS,
    NoNodeError: ConflictKind.MISSING,
    NotEmptyError: ConflictKind.NOT_EMPTY,
}


class _Post:
    """Hands calls from kazoo's thread to an event loop, in their order. What comes together wakes the loop once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._calls = deque[tuple[Callable[..., object], tuple[Any, ...]]]()
        self._woken = False

    def __call__(self, call: Callable[..., object], *args: Any) -> None:
        """On any thread. A loop that is closed is told nothing any more."""
        self._calls.append((call, args))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._woken = False  # first: what is put from here on wakes the loop again
        while self._calls:
            call, args = self._calls.popleft()
            self._loop.call_soon(call, *args)


@dataclass(eq=False)
class _Watch:
    path: str
    of_children: bool
    callback: Callable[[Any], None]
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event | None = None


@dataclass(eq=False)
class _TreeWatch:
    roots: tuple[str, ...]
    callback: Callable[[str | None], None]
    connected: asyncio.Event = field(default_factory=asyncio.Event)
    """A connection was made that has not been asked yet."""
    task: asyncio.Task[None] | None = None


@dataclass(eq=False)
class _Trigger:
    """What kazoo calls when a node moved: one object per node, however often it is read and whoever watches it. kazoo
    keeps what it is given in a set until the node moves, and most nodes never do."""

    post: _Post
    watches: list[_Watch] = field(default_factory=list[_Watch])
    look: asyncio.Task[Any] | None = None
    """The read that is under way, if nothing has moved since it began: one read for all who watch the node."""
    looking: int = 0
    """How many reads are under way, older ones included."""

    def __call__(self, _event: Any) -> None:
        """On a thread of kazoo's."""
        self.post(self.fire)

    def fire(self) -> None:
        self.look = None
        for watch in self.watches:
            if watch.changed is not None:
                watch.changed.set()


class ZooKeeperStore(Store):
    """A `Store` with one kazoo client and one session.

    `hosts` is `host:port,...`, IPv6 addresses in brackets. Raises DroverError INVALID_ARGUMENT when it cannot be read.
    `tls`: directory of the identity that it shows; then it trusts servers of its cluster only, and every node that it
    makes says who may write it. None: without TLS. Raises PkiError for a directory that holds no identity.
    """

    def __init__(
        self,
        hosts: str,
        *,
        chroot: str = paths.CHROOT,
        session_timeout_s: float = 6.0,
        tls: Path | None = None,
    ) -> None:
        try:
            self._hosts = zookeeper_servers(hosts)
        except ValueError as error:
            raise DroverError(RefusalReason.INVALID_ARGUMENT, str(error), field="zookeeper") from error
        self._chroot, self._session_timeout_s, self._tls = chroot, session_timeout_s, tls
        self._cluster = identity_of(read_pem(tls).cert).cluster if tls is not None else ""
        self._client: Any = None
        self._post: _Post | None = None
        self._state = SessionState.LOST
        self._listeners: list[Callable[[SessionState], None]] = []
        self._watches: list[_Watch] = []
        self._triggers: dict[tuple[str, bool], _Trigger] = {}
        """By path, and whether it is for the children."""
        self._trees: list[_TreeWatch] = []
        self._reads = asyncio.Semaphore(_AT_ONCE)
        self._writes = asyncio.Semaphore(_AT_ONCE)
        self._answered_at = -math.inf
        self._taken_at = -math.inf
        """When the answer that was handed on last had arrived: its caller may have been late."""
        self._barrier_path = f"{paths.BARRIER}/{uuid.uuid4().hex}"
        self._barrier_of: int | None = None
        """The session that has made the node: it goes with it."""
        self._making = asyncio.Lock()
        self._joinable: dict[float, asyncio.Future[WriteResult]] = {}
        """Barriers that were asked for and have not left yet, by their time-out."""
        self._barriers = 0
        """How many are under way."""
        self._none_under_way = asyncio.Event()
        self._tasks = Tasks("store")
        self._quorum_at = -math.inf

    # --- session ------------------------------------------------------------------------------------------------------

    async def start(self, timeout_s: float = 10.0) -> None:
        if self._client is not None and self._client.connected:
            return
        self._post = _Post(asyncio.get_running_loop())
        self._client = client = self._new_client(self._hosts + self._chroot)
        client.add_listener(self._on_kazoo_state)
        await self._connect(client, timeout_s)
        try:
            if self._chroot and await self._read(lambda: client.exists_async("/"), timeout_s) is None:
                await self._make_chroot(timeout_s)
        except StoreUnavailable:
            self._client = None
            await asyncio.to_thread(self._stop, client)
            raise

    def _new_client(self, hosts: str) -> Any:
        server = of_role(self._cluster, Role.ZOOKEEPER).server_name if self._cluster else ""
        retry = KazooRetry(max_tries=-1, delay=0.05, backoff=2, max_delay=0.5, ignore_expire=False)
        return TreeClient(
            hosts=hosts, timeout=self._session_timeout_s, connection_retry=retry, tls=self._tls, server_name=server
        )

    async def _connect(self, client: Any, timeout_s: float) -> None:
        started = client.start_async()
        if not await asyncio.to_thread(started.wait, timeout_s):
            why = f" ({client.why_not})" if client.why_not else ""
            await asyncio.to_thread(self._stop, client)
            raise StoreUnavailable(f"no ZooKeeper at {self._hosts} within {timeout_s:g} s{why}")

    async def _make_chroot(self, timeout_s: float) -> None:
        """A chroot must exist before a client can live in it, and only one without a chroot can make it."""
        client = self._new_client(self._hosts)
        await self._connect(client, timeout_s)
        try:
            acl = self._acl(rights.Rights())
            await self._answer(client.ensure_path_async(self._chroot, acl), timeout_s)
        except (KazooException, TimeoutError) as error:
            raise StoreUnavailable(f"cannot create {self._chroot}: {error!r}") from error
        finally:
            await asyncio.to_thread(self._stop, client)

    @staticmethod
    def _stop(client: Any) -> None:
        with contextlib.suppress(Exception):
            client.stop()
            client.close()

    async def close(self) -> None:
        for watch in self._watches:
            if watch.task is not None:
                watch.task.cancel()
        for tree in self._trees:
            if tree.task is not None:
                tree.task.cancel()
        self._watches.clear()
        self._trees.clear()
        self._triggers.clear()
        client, self._client = self._client, None
        await self._tasks.close()
        if client is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await asyncio.to_thread(self._stop, client)
        self._state = SessionState.LOST

    def _on_kazoo_state(self, state: str) -> None:
        """On kazoo's connection thread."""
        self._here()(self._session_changed, _STATES[state])

    def _here(self) -> _Post:
        """The way to the event loop that this store lives on: that of `start`."""
        if self._post is None:
            self._post = _Post(asyncio.get_running_loop())
        return self._post

    def _session_changed(self, state: SessionState) -> None:
        if self._client is None:
            return
        self._state = state
        if state is SessionState.CONNECTED:
            for trigger in self._triggers.values():
                trigger.fire()
            for tree in self._trees:
                tree.connected.set()
        for listener in list(self._listeners):
            listener(state)

    @property
    def session(self) -> SessionState:
        return self._state

    def on_session(self, callback: Callable[[SessionState], None]) -> None:
        self._listeners.append(callback)

    @property
    def quorum_age_s(self) -> float:
        return time.monotonic() - self._quorum_at

    # --- operations ---------------------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        return self._client is not None and self._client.state == KazooState.CONNECTED and self._client.connected

    async def _answer(self, result: Any, timeout_s: float, *, of_s: float = 0.0) -> Any:
        """Await a kazoo result on our loop. Raises its exception, or TimeoutError after cutting a connection on which
        nothing is answered. `of_s`: the whole time-out, of which some was spent waiting for a turn."""
        sent_at = time.monotonic()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        post = self._here()
        arrived_at = -math.inf

        def here() -> None:
            if not future.done():
                future.set_result(None)

        def arrived(_: Any) -> None:
            """On kazoo's thread: the server answers when it does, however late the loop hears of it."""
            nonlocal arrived_at
            arrived_at = self._answered_at = time.monotonic()
            post(here)

        result.rawlink(arrived)
        try:
            await _answered(future, result, timeout_s)
        except TimeoutError:
            silent_s = time.monotonic() - max(sent_at, self._answered_at)
            if silent_s > _SILENT * max(timeout_s, of_s):
                self._cut()
            raise
        self._taken_at = arrived_at
        return result.get(block=False)

    def _cut(self) -> None:
        """A half-open connection never ends by itself while there is traffic: end it, kazoo tries another server."""
        connection = getattr(self._client, "_connection", None)
        socket = getattr(connection, "_socket", None)
        if socket is not None:
            with contextlib.suppress(OSError):
                # Of the plain socket: a TLS socket would go on without TLS until it is shut.
                sockets.socket.shutdown(socket, sockets.SHUT_RDWR)

    async def _read(self, start: Callable[[], Any], timeout_s: float) -> Any:
        """`timeout_s` counts from its turn. In a burst of thousands the turn itself may take as long as _TURN_S, but
        not for a caller who is in a hurry."""
        try:
            await _turn(self._reads, _TURN_S if timeout_s >= _PATIENT_S else timeout_s)
        except TimeoutError as error:
            raise StoreUnavailable("too many other reads wait for ZooKeeper's answers") from error
        try:
            return await self._read_now(start, timeout_s)
        finally:
            self._reads.release()

    async def _read_now(self, start: Callable[[], Any], timeout_s: float) -> Any:
        if not self._ready():
            raise StoreUnavailable("not connected to ZooKeeper")
        try:
            return await self._answer(start(), timeout_s)
        except NoNodeError:
            return None
        except (KazooException, TimeoutError) as error:
            raise StoreUnavailable(f"ZooKeeper did not answer: {error!r}") from error

    async def _read_behind_a_write(self, start: Callable[[], Any], timeout_s: float) -> Any:
        """H13: a new session may be with a server that is behind the one before it. Its first read stands behind a
        write of its own, so that a store never shows less than it has shown."""
        await self._make_barrier(timeout_s)
        return await self._read(start, timeout_s)

    async def read(self, path: str, timeout_s: float = 2.0) -> Versioned | None:
        answer = await self._read_behind_a_write(lambda: self._client.get_async(path), timeout_s)
        return None if answer is None else Versioned(answer[0], answer[1].version, answer[1].mzxid)

    async def children(self, path: str, timeout_s: float = 2.0) -> tuple[str, ...]:
        answer = await self._read_behind_a_write(lambda: self._client.get_children_async(path), timeout_s)
        return tuple(sorted(answer or ()))

    async def ensure(self, path: str, timeout_s: float = 2.0) -> None:
        if not self._cluster:
            await self._read(lambda: self._client.ensure_path_async(path), timeout_s)
            return
        if await self._read(lambda: self._client.exists_async(path), timeout_s) is not None:
            return
        above = path.rpartition("/")[0]
        if above:
            await self.ensure(above, timeout_s)
        if not self._ready():
            raise StoreUnavailable("not connected to ZooKeeper")
        try:
            acl = self._acl(rights.of(path))
            await self._answer(self._client.create_async(path, b"", acl), timeout_s)
        except NodeExistsError:
            pass
        except (KazooException, TimeoutError) as error:
            raise StoreUnavailable(f"{path} cannot be made: {error!r}") from error

    def _acl(self, found: rights.Rights) -> list[Any] | None:
        """As kazoo wants it; None: everybody may do everything."""
        if not self._cluster:
            return None
        return [ACL(perms, Id(scheme, name)) for scheme, name, perms in rights.listed(self._cluster, found)]

    @property
    def keeps_rights(self) -> bool:
        return bool(self._cluster)

    async def grant(self, path: str, hosts: Collection[str], timeout_s: float = 2.0) -> None:
        if not self._cluster:
            return
        wanted = self._acl(rights.of(path, writers=hosts))
        found = await self._read(lambda: self._client.get_acls_async(path), timeout_s)
        if found is not None and sorted(found[0]) != sorted(wanted or ()):
            await self._read(lambda: self._client.set_acls_async(path, wanted), timeout_s)

    async def barrier(self, timeout_s: float = 2.0) -> None:
        """Barriers that are asked for while another is under way are one write: each joins one that has not left yet,
        never one that has, which might stand before something that its caller has to see."""
        answer = self._joinable.get(timeout_s)
        if answer is None:
            answer = self._joinable[timeout_s] = asyncio.get_running_loop().create_future()
            sending = self._tasks.spawn(self._send_barrier(timeout_s, answer), "barrier")
            if sending is None:
                del self._joinable[timeout_s]
                raise StoreUnavailable("the store is closed")
            sending.add_done_callback(lambda _: self._barrier_ended(timeout_s, answer))
        result = await asyncio.shield(answer)
        if not isinstance(result, Done):
            raise StoreUnavailable(f"no quorum answered: {result}")

    def _barrier_ended(self, timeout_s: float, answer: asyncio.Future[WriteResult]) -> None:
        """Also one that was cancelled before its first step, which answers nobody."""
        if self._joinable.get(timeout_s) is answer:
            del self._joinable[timeout_s]
        if not answer.done():
            answer.set_result(OutcomeUnknown(sent=False, why="the store was closed"))

    async def _send_barrier(self, timeout_s: float, answer: asyncio.Future[WriteResult]) -> None:
        result: WriteResult = OutcomeUnknown(sent=False, why="the store was closed")
        try:
            if self._barriers:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_JOIN_S):
                        await self._none_under_way.wait()
            del self._joinable[timeout_s]  # it leaves: nobody may join any more
            self._barriers += 1
            self._none_under_way.clear()
            try:
                result = await self.multi([], timeout_s)
            finally:
                self._barriers -= 1
                if not self._barriers:
                    self._none_under_way.set()
        finally:
            if self._joinable.get(timeout_s) is answer:
                del self._joinable[timeout_s]
            answer.set_result(result)

    async def multi(self, ops: Sequence[Op], timeout_s: float = 2.0) -> WriteResult:
        """Every transaction also sets a node of this client's own: it tells the zxid, and a barrier is just that."""
        try:
            await self._make_barrier(timeout_s)
        except StoreUnavailable as error:
            return OutcomeUnknown(sent=False, why=str(error))
        began = time.monotonic()
        try:
            await _turn(self._writes, timeout_s)
        except TimeoutError:
            return OutcomeUnknown(sent=False, why="too many other writes wait for ZooKeeper's answers")
        try:
            return await self._commit(ops, max(0.05, timeout_s - (time.monotonic() - began)), timeout_s)
        finally:
            self._writes.release()

    async def _commit(self, ops: Sequence[Op], rest_s: float, timeout_s: float) -> WriteResult:
        if not self._ready():
            return OutcomeUnknown(sent=False, why="not connected to ZooKeeper")
        transaction = self._client.transaction()
        for op in ops:
            self._add(transaction, op)
        transaction.set_data(self._barrier_path, b"")
        try:
            results = await self._answer(transaction.commit_async(), rest_s, of_s=timeout_s)
        except (KazooException, TimeoutError) as error:
            return OutcomeUnknown(why=repr(error))
        return self._outcome(ops, results)

    def _add(self, transaction: Any, op: Op) -> None:
        match op:
            case Create(path, data, ephemeral, writers):
                acl = self._acl(rights.of(path, data, writers))
                transaction.create(path, data, acl=acl, ephemeral=ephemeral)
            case SetData(path, data, version):
                transaction.set_data(path, data, version)
            case Check(path, version):
                transaction.check(path, version)
            case Delete(path, version):
                transaction.delete(path, version)

    def _outcome(self, ops: Sequence[Op], results: Sequence[Any]) -> WriteResult:
        for index, result in enumerate(results[: len(ops)]):
            if isinstance(result, (RolledBackError, Inconsistency)) or not isinstance(result, Exception):
                continue
            kind = _CONFLICTS.get(type(result))
            if isinstance(result, NoAuthError):
                return OutcomeUnknown(sent=False, why=f"this identity may not do that at {ops[index].path}")
            if kind is None:
                return OutcomeUnknown(why=repr(result))
            self._quorum_at = self._taken_at
            return Conflict(index, kind)
        if isinstance(results[-1], Exception):
            self._barrier_of = None
            return OutcomeUnknown(sent=False, why=f"rolled back: {results[-1]!r}")
        self._quorum_at = self._taken_at
        return Done(results[-1].mzxid, tuple(_version(op, result) for op, result in zip(ops, results, strict=False)))

    async def _make_barrier(self, timeout_s: float) -> None:
        """Once per session, whoever is first. Raises StoreUnavailable."""
        if self._has_barrier():
            return
        try:
            async with asyncio.timeout(timeout_s):
                await self._making.acquire()
        except TimeoutError as error:
            raise StoreUnavailable("ZooKeeper has not answered to the first write of this session") from error
        try:
            if not self._has_barrier():
                await self._make_barrier_now(timeout_s)
        finally:
            self._making.release()

    def _has_barrier(self) -> bool:
        return self._barrier_of is not None and self._barrier_of == self._session_id()

    def _session_id(self) -> int | None:
        return None if self._client is None else self._client._session_id

    async def _make_barrier_now(self, timeout_s: float) -> None:
        await self.ensure(paths.BARRIER, timeout_s)
        if not self._ready():
            raise StoreUnavailable("not connected to ZooKeeper")
        session = self._session_id()
        try:
            own = [ACL(rights.Right.ALL, Id("auth", ""))] if self._cluster else None
            await self._answer(self._client.create_async(self._barrier_path, b"", own, ephemeral=True), timeout_s)
        except NodeExistsError:
            pass
        except (KazooException, TimeoutError) as error:
            raise StoreUnavailable(f"ZooKeeper did not answer: {error!r}") from error
        self._barrier_of = session

    # --- watches ------------------------------------------------------------------------------------------------------

    def watch(self, path: str, callback: Callable[[Versioned | None], None]) -> Callable[[], None]:
        return self._add_watch(_Watch(path, False, callback))

    def watch_children(self, path: str, callback: Callable[[tuple[str, ...]], None]) -> Callable[[], None]:
        return self._add_watch(_Watch(path, True, callback))

    def _add_watch(self, watch: _Watch) -> Callable[[], None]:
        watch.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        key = (watch.path, watch.of_children)
        trigger = self._triggers.setdefault(key, _Trigger(self._here()))
        trigger.watches.append(watch)
        watch.task = loop.create_task(self._run_watch(watch, trigger))
        self._watches.append(watch)

        def end() -> None:
            if watch not in self._watches:
                return
            self._watches.remove(watch)
            trigger.watches.remove(watch)
            if watch.task is not None:
                watch.task.cancel()
            if not trigger.watches:
                self._disarm_later(key, trigger)

        return end

    def _disarm_later(self, key: tuple[str, bool], trigger: _Trigger) -> None:
        asyncio.get_running_loop().call_later(_DISARM_S, self._disarm, key, trigger)

    def _disarm(self, key: tuple[str, bool], trigger: _Trigger) -> None:
        """Take the trigger of a node that nobody watches any more out of kazoo's sets, which has no call for that. The
        server still tells once that the node moved; nobody listens then. A read that is still under way would arm it
        again: then it is tried again later."""
        if trigger.watches or self._triggers.get(key) is not trigger:
            return
        if trigger.looking:
            self._disarm_later(key, trigger)
            return
        del self._triggers[key]
        client, path = self._client, key[0]
        if client is None:
            return
        for armed in (client._data_watchers, client._child_watchers):
            callbacks = armed.get(client.chroot + path, None)
            if callbacks is not None:
                callbacks.discard(trigger)
                if not callbacks and (path, not key[1]) not in self._triggers:
                    armed.pop(client.chroot + path, None)

    async def _run_watch(self, watch: _Watch, trigger: _Trigger) -> None:
        """Read, tell if it is news, wait for the next hint. One task per watch, so callbacks come in order."""
        assert watch.changed is not None
        last: object = watch
        while True:
            watch.changed.clear()
            pause_s = REREAD_S * random.uniform(0.5, 1.5)
            try:
                seen = await self._look(watch, trigger)
                if seen != last:
                    last = seen
                    self._tell(watch, seen)
            except StoreUnavailable:
                pause_s = _RETRY_S
            except Exception as error:  # whoever watches would hear nothing for ever
                log.error("%s cannot be read: trying again: %r", watch.path, error)
                pause_s = _RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await watch.changed.wait()

    @staticmethod
    def _tell(watch: _Watch, seen: Any) -> None:
        """A callback that cannot read today's content must hear of the one that mends it."""
        try:
            watch.callback(seen)
        except Exception as error:
            log.error("what was seen at %s is not taken in: %s", watch.path, error)

    async def _look(self, watch: _Watch, trigger: _Trigger) -> Any:
        """Read and arm, for every watch of the node that would."""
        if trigger.look is None or trigger.look.done():
            trigger.looking += 1
            trigger.look = asyncio.ensure_future(self._look_at(watch.path, watch.of_children, trigger))
            trigger.look.add_done_callback(lambda done: self._looked(trigger, done))
        return await asyncio.shield(trigger.look)

    @staticmethod
    def _looked(trigger: _Trigger, done: asyncio.Task[Any]) -> None:
        trigger.looking -= 1
        if not done.cancelled():
            done.exception()  # heard here: every watch that waited for it may have ended

    async def _look_at(self, path: str, of_children: bool, trigger: _Trigger) -> Any:
        """A missing node is watched for its creation."""
        if of_children:
            names = await self._read_behind_a_write(lambda: self._client.get_children_async(path, watch=trigger), 2.0)
            if names is not None:
                return tuple(sorted(names))
        else:
            answer = await self._read_behind_a_write(lambda: self._client.get_async(path, watch=trigger), 2.0)
            if answer is not None:
                return Versioned(answer[0], answer[1].version, answer[1].mzxid)
        if await self._read(lambda: self._client.exists_async(path, watch=trigger), 2.0) is not None:
            trigger.fire()  # made between the two looks
        return () if of_children else None

    # --- watches of whole trees ---------------------------------------------------------------------------------------

    def watch_tree(self, roots: Sequence[str], callback: Callable[[str | None], None]) -> Callable[[], None]:
        """As the port says. ZooKeeper keeps these watches with a connection: each new one is asked again."""
        tree = _TreeWatch(tuple(roots), callback)
        tree.connected.set()
        tree.task = asyncio.get_running_loop().create_task(self._run_tree(tree))
        self._trees.append(tree)

        def end() -> None:
            if tree in self._trees:
                self._trees.remove(tree)
                if tree.task is not None:
                    tree.task.cancel()

        return end

    async def _run_tree(self, tree: _TreeWatch) -> None:
        """Ask each new connection for the events, and say when they are certain to come."""
        post = self._here()
        client, ends = None, list[Callable[[], None]]()

        def moved(path: str) -> None:
            """On kazoo's connection thread."""
            post(self._tell_tree, tree, path)

        try:
            while True:
                await tree.connected.wait()
                tree.connected.clear()
                if self._client is not client:
                    client, old = self._client, ends
                    ends = [self._client.on_tree(root, moved) for root in tree.roots]
                    for end in old:
                        end()
                try:
                    for root in tree.roots:
                        await self._read(lambda root=root: self._client.add_tree_watch_async(root), 2.0)
                except Exception as error:
                    if not isinstance(error, StoreUnavailable):
                        log.error("%s cannot be watched: trying again: %r", tree.roots, error)
                    await asyncio.sleep(_RETRY_S)
                    tree.connected.set()
                    continue
                # A connection that was lost just now tells nothing any more; the next one is asked again.
                if self._state is SessionState.CONNECTED and not tree.connected.is_set():
                    self._tell_tree(tree, None)
        finally:
            for end in ends:
                end()

    def _tell_tree(self, tree: _TreeWatch, path: str | None) -> None:
        if tree not in self._trees:
            return
        try:
            tree.callback(path)
        except Exception as error:
            log.error("what moved at %s is not taken in: %s", path or tree.roots, error)


async def _answered(future: asyncio.Future[None], result: Any, timeout_s: float) -> None:
    """Wait for the answer. Raises TimeoutError.

    A process that was stopped, or is short of a core, is late itself: what it finds answered was in time, and what it
    does not find gets as long again as the process was late, once.
    """
    loop = asyncio.get_running_loop()
    patient = True
    timer: asyncio.TimerHandle

    def late() -> None:
        nonlocal patient, timer
        own_s = loop.time() - timer.when()
        if future.done():
            return
        if result.ready():
            future.set_result(None)
        elif patient and own_s > _OWN_S:
            patient = False
            timer = loop.call_later(min(own_s, timeout_s), late)
        else:
            future.set_exception(TimeoutError(f"no answer within {timeout_s:g} s"))

    timer = loop.call_later(timeout_s, late)
    try:
        await future
    finally:
        timer.cancel()


async def _turn(turns: asyncio.Semaphore, timeout_s: float) -> None:
    """Nearly always at once, and then without a timer. Raises TimeoutError."""
    if not turns.locked():
        await turns.acquire()
        return
    async with asyncio.timeout(timeout_s):
        await turns.acquire()


def _version(op: Op, result: Any) -> int:
    if isinstance(op, SetData):
        return int(result.version)
    return 0 if isinstance(op, Create) else -1
