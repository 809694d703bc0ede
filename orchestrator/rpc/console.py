"""A session with a guest's console, for programs that want bytes, not coroutines."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from orchestrator.core.errors import DroverError, RefusalReason
from protos.drover.v1 import orchestrator_pb2 as pb

SESSION_S = 24 * 3600.0
TYPED = 256
"""Pieces that were typed and are not sent yet."""
PIECE_BYTES = 4096
AWAY_S = 30.0
"""An API that is away is waited for so long."""
_AGAIN_S = 0.25
_AWAY = frozenset({RefusalReason.API_UNREACHABLE, RefusalReason.OUTCOME_UNKNOWN, RefusalReason.LEDGER_UNREACHABLE})


class ConsoleSession:
    """Iterate it for what the guest says and where it is; `type` from any thread; `close` it, or use it as a context
    manager. An API that goes away is called again for AWAY_S; what the guest says meanwhile is lost."""

    def __init__(self, call: Callable[..., Any], guest: str, failed: Callable[[grpc.RpcError], DroverError]) -> None:
        self._call = call
        self._guest = guest
        self._failed = failed
        self._typed: queue.Queue[bytes | None] = queue.Queue(TYPED)
        self._stream: Any = None
        self._closed = threading.Event()

    def __enter__(self) -> ConsoleSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Whoever iterates comes to an end."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()

    def type(self, data: bytes) -> None:
        """Waits while what was typed before is not sent yet."""
        for at in range(0, len(data), PIECE_BYTES):
            while not self._closed.is_set():
                try:
                    self._typed.put(data[at : at + PIECE_BYTES], timeout=_AGAIN_S)
                    break
                except queue.Full:
                    continue

    def _requests(self, over: threading.Event) -> Iterator[pb.AttachConsoleRequest]:
        yield pb.AttachConsoleRequest(guest=self._guest)
        while not over.is_set() and not self._closed.is_set():
            try:
                data = self._typed.get(timeout=_AGAIN_S)
            except queue.Empty:
                continue
            if data is not None:
                yield pb.AttachConsoleRequest(data=data)

    def __iter__(self) -> Iterator[pb.AttachConsoleResponse]:
        """Raises DroverError."""
        away_s = time.monotonic() + AWAY_S
        while not self._closed.is_set():
            over = threading.Event()
            try:
                self._stream = self._call(self._requests(over), timeout=SESSION_S)
                for said in self._stream:
                    away_s = time.monotonic() + AWAY_S
                    yield said
                return
            except ValueError:  # the client was closed: gRPC says it so
                return
            except grpc.RpcError as error:
                if self._closed.is_set():
                    return
                told = self._failed(error)
                if told.reason not in _AWAY or time.monotonic() > away_s:
                    raise told from error
                time.sleep(_AGAIN_S)
            finally:
                over.set()
