"""One channel to several servers that answer alike, for synchronous callers: when one is silent, another is asked.

A server is asked whether it is there before it is asked for anything, so a call that finds none has certainly had no
effect and goes to the next. What was sent and not answered is repeated elsewhere only where that is safe: reads, and
creates with their request id. Everything else is the caller's to judge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2

from orchestrator.rpc.channels import channel
from orchestrator.rpc.credentials import Credentials

CONNECT_S = 1.5
"""For one server to say that it is there, while there are others to try."""
_LEAST_S = 0.05
_READS = ("Get", "List", "Watch")
"""How the names of calls begin that change nothing."""

Call = Callable[..., Any]


def addresses(text: str) -> list[str]:
    """`host:port,unix:PATH,...`; a comma in a path stays in it."""
    found: list[str] = []
    for piece in text.split(","):
        if "/" in piece and not piece.strip().startswith("unix:") and found and found[-1].startswith("unix:"):
            found[-1] += f",{piece}"
        elif piece.strip():
            found.append(piece.strip())
    return found or [text]


class SeveralChannel(grpc.Channel):
    """Stays with the server that answered last. Raises INVALID_ARGUMENT for what is no address."""

    def __init__(self, servers: Sequence[str], credentials: Credentials | None = None) -> None:
        self._channels = [channel(server, credentials) for server in servers]
        self._at = 0

    # --- what a stub asks for -----------------------------------------------------------------------------------------

    def unary_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """A callable that asks the servers in turn, as the module says. Raises grpc.RpcError, also when none is
        there."""
        calls = [one.unary_unary(method, *args, **options) for one in self._channels]

        def call(request: Any, timeout: float | None = None, **how: Any) -> Any:
            return self._ask(calls, request, timeout, _is_repeatable(method, request), how)

        return call

    def unary_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """The stream of one server; whoever reads it asks again when it breaks off."""
        calls = [one.unary_stream(method, *args, **options) for one in self._channels]

        def call(request: Any, timeout: float | None = None, **how: Any) -> Any:
            index = self._first_there()
            return _Heard(calls[index](request, timeout=timeout, **how), lambda: self._silent(index))

        return call

    def stream_unary(self, method: str, *args: Any, **options: Any) -> Any:
        """A callable that sends a stream to one server that is there: it is never sent twice."""
        calls = [one.stream_unary(method, *args, **options) for one in self._channels]

        def call(requests: Any, timeout: float | None = None, **how: Any) -> Any:
            index = self._first_there()
            try:
                answer = calls[index](requests, timeout=timeout, **how)
            except grpc.RpcError as error:
                if _says_nothing(error):
                    self._silent(index)
                raise
            self._at = index
            return answer

        return call

    def stream_stream(self, method: str, *args: Any, **options: Any) -> Any:
        """As `unary_stream`: the two streams of one server."""
        calls = [one.stream_stream(method, *args, **options) for one in self._channels]

        def call(requests: Any, timeout: float | None = None, **how: Any) -> Any:
            index = self._first_there()
            return _Heard(calls[index](requests, timeout=timeout, **how), lambda: self._silent(index))

        return call

    def _first_there(self) -> int:
        """Raises grpc.RpcError when none is."""
        index, _ = next(self._there(time.monotonic() + CONNECT_S * len(self._channels)), (-1, 0))
        if index < 0:
            raise _Nobody
        return index

    def subscribe(self, callback: Any, try_to_connect: bool | None = False) -> None:
        """To the connection that is used now; a change to another server is not told."""
        self._channels[self._at].subscribe(callback, bool(try_to_connect))

    def unsubscribe(self, callback: Any) -> None:
        """From whichever connection it was."""
        for one in self._channels:
            one.unsubscribe(callback)

    def close(self) -> None:
        """End the connections to all servers."""
        for one in self._channels:
            one.close()

    def __enter__(self) -> SeveralChannel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one call -----------------------------------------------------------------------------------------------------

    def _ask(
        self, calls: Sequence[Call], request: Any, timeout: float | None, repeatable: bool, how: dict[str, Any]
    ) -> Any:
        until = None if timeout is None else time.monotonic() + timeout
        failed: grpc.RpcError | None = None
        for index, others in self._there(until):
            left_s = None if until is None else max(_LEAST_S, until - time.monotonic())
            if left_s is not None and repeatable:
                left_s /= others + 1  # one that says nothing must leave time for the others
            try:
                answer = calls[index](request, timeout=left_s, **how)
            except grpc.RpcError as error:
                if not repeatable or not _says_nothing(error):
                    self._at = index
                    raise
                failed = error
                continue
            self._at = index
            return answer
        if failed is not None:
            raise failed
        raise _Nobody

    def _there(self, until: float | None) -> Iterator[tuple[int, int]]:
        """The servers that are there, the last one that answered first, and how many others could be tried after each;
        each is asked when its turn comes."""
        first, count = self._at, len(self._channels)
        for step in range(count):
            index = (first + step) % count
            left_s = CONNECT_S if until is None else min(CONNECT_S, until - time.monotonic())
            if left_s > 0 and _answers(self._channels[index], left_s):
                yield index, count - step - 1

    def _silent(self, index: int) -> None:
        """A stream of this server broke off: the next call begins elsewhere."""
        if self._at == index:
            self._at = (index + 1) % len(self._channels)


class _Heard:
    """A stream that tells when it breaks off."""

    def __init__(self, stream: Any, broken: Callable[[], None]) -> None:
        self._stream = stream
        self._broken = broken

    def cancel(self) -> None:
        """Whoever reads it comes to an end."""
        self._stream.cancel()

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._stream
        except grpc.RpcError as error:
            if _says_nothing(error):
                self._broken()
            raise


class _Nobody(grpc.RpcError):
    """As gRPC's own error of a call that found no connection."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "none of them answers"

    def trailing_metadata(self) -> tuple[()]:
        return ()


def _answers(one: grpc.Channel, within_s: float) -> bool:
    """Whether a server answers there: the health service's question is the cheapest. A process that was stopped says
    nothing, though its kernel takes the connection."""
    ask = one.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    try:
        ask(health_pb2.HealthCheckRequest(), timeout=within_s)
    except grpc.RpcError as error:
        return not _says_nothing(error)  # an answer is an answer
    return True


def _is_repeatable(method: str, request: Any) -> bool:
    """Whether the call has no effect, or the same one however often it is made."""
    return method.rpartition("/")[2].startswith(_READS) or bool(getattr(request, "request_id", ""))


def _says_nothing(error: grpc.RpcError) -> bool:
    """Of the call's effect: the connection broke, or no answer came in time."""
    return cast(grpc.Call, error).code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
