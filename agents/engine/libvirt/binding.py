"""The one importer of libvirt's Python binding: a daemon's connection, and calls on it that have a deadline.

The binding is no dependency of Drover's: a host that runs its guests by libvirt has it (python3-libvirt).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import structlog

from agents.engine.base import EngineError, EngineTimeout

log = structlog.get_logger(__name__)

_SIGN_OF_LIFE_S, _SIGNS_MISSED = 5, 3
"""A daemon that says nothing for so long has its connection closed: no thread waits for it for ever."""
_THREADS = 16

LifecycleSink = Callable[[int, int], None]
"""Called on the event loop with event and detail (VIR_DOMAIN_EVENT_*)."""


class NoDomain(EngineError):
    """The daemon knows of no such domain."""


def library() -> Any:
    """The binding. Raises EngineError where it is not installed."""
    try:
        return importlib.import_module("libvirt")
    except ImportError as error:
        said = "install python3-libvirt, or libvirt-python in the agent's environment"
        raise EngineError(f"the engine is libvirt, and its Python binding is missing ({error}): {said}") from None


_loop_lock = threading.Lock()
_loops: list[threading.Thread] = []


def _run_events(libvirt: Any) -> None:
    while True:
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.virEventRunDefaultImpl()


def _said_nothing(*_words: Any) -> None:
    """Errors are raised; libvirt need not write them to our standard error as well."""


def _start_events(libvirt: Any) -> None:
    """Once a process: libvirt's own loop, in a thread of its own, before any connection is opened."""
    with _loop_lock:
        if not _loops:
            libvirt.registerErrorHandler(_said_nothing, None)
            libvirt.virEventRegisterDefaultImpl()
            _loops.append(threading.Thread(target=_run_events, args=(libvirt,), name="libvirt events", daemon=True))
            _loops[0].start()


class Daemon:
    """One libvirt daemon. Connects when it is asked something, and again when its connection is lost."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.libvirt: Any = None
        self._connection: Any = None
        self._connecting = threading.Lock()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="libvirt")
        self._sinks: dict[str, LifecycleSink] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def listen(self, uuid: str, sink: LifecycleSink) -> None:
        """From now on this domain's events go to `sink`, in place of an earlier one."""
        self._loop = asyncio.get_running_loop()
        self._sinks[uuid] = sink

    def unlisten(self, uuid: str, sink: LifecycleSink) -> None:
        """Idempotent."""
        if self._sinks.get(uuid) == sink:
            del self._sinks[uuid]

    async def call(self, what: str, work: Callable[[Any], Any], timeout_s: float = 5.0) -> Any:
        """`work(connection)` in a thread. Raises EngineError with libvirt's words, EngineTimeout, and NoDomain."""
        doing = asyncio.get_running_loop().run_in_executor(self._threads, self._done, what, work)
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(doing)
        except TimeoutError as error:
            doing.add_done_callback(_forgotten)
            raise EngineTimeout(f"{what}: libvirt has not answered in {timeout_s:g} s") from error

    async def domain(self, what: str, uuid: str, work: Callable[[Any], Any], timeout_s: float = 5.0) -> Any:
        """`work(domain)`, see `call`."""
        return await self.call(what, lambda connection: work(connection.lookupByUUIDString(uuid)), timeout_s)

    def in_thread(self, work: Callable[[], None]) -> asyncio.Future[None]:
        """For work that lasts as long as a migration: in a thread of its own, so that nothing else of the agent's waits
        for a place, and the agent can end meanwhile."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def tell(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def run() -> None:
            failed: Exception | None = None
            try:
                work()
            except Exception as error:
                failed = error
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(tell, failed)

        threading.Thread(target=run, name="libvirt migration", daemon=True).start()
        return done

    def _done(self, what: str, work: Callable[[Any], Any]) -> Any:
        libvirt = self._library()
        try:
            return work(self._connected(libvirt))
        except libvirt.libvirtError as error:
            said = f"{what}: {error}"
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                raise NoDomain(said) from None
            raise EngineError(said) from None

    def _library(self) -> Any:
        if self.libvirt is None:
            libvirt = library()
            _start_events(libvirt)
            self.libvirt = libvirt
        return self.libvirt

    def _connected(self, libvirt: Any) -> Any:
        with self._connecting:
            if self._connection is not None and self._connection.isAlive():
                return self._connection
            connection = libvirt.open(self.uri)
            connection.setKeepAlive(_SIGN_OF_LIFE_S, _SIGNS_MISSED)
            lifecycle = libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE
            connection.domainEventRegisterAny(None, lifecycle, self._heard, None)
            self._connection = connection
            return connection

    def _heard(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        """In libvirt's thread."""
        uuid, loop = str(domain.UUIDString()), self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._tell, uuid, event, detail)

    def _tell(self, uuid: str, event: int, detail: int) -> None:
        if (sink := self._sinks.get(uuid)) is not None:
            sink(event, detail)


def _forgotten(doing: asyncio.Future[Any]) -> None:
    """Its answer comes after its deadline."""
    if not doing.cancelled() and (error := doing.exception()) is not None:
        log.warning("a late answer of libvirt", error=str(error))
