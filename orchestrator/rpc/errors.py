"""DroverError <-> gRPC status: a canonical code, `google.rpc.ErrorInfo` and `google.rpc.BadRequest` for bad fields.

A status travels in HTTP/2 trailers, of which gRPC takes 8 KiB: with more the caller gets "stream removed" in place of
the refusal. `to_status` is the one place that keeps every error within that, whatever is in it.
"""

# googleapis-common-protos ships stubs beside its modules, but does not say so; grpc_status leaves its messages untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import SHOWN, clip

log = structlog.get_logger(__name__)

DOMAIN = "drover"

_R, _C = RefusalReason, grpc.StatusCode
_CODES = {
    _R.INVALID_ARGUMENT: _C.INVALID_ARGUMENT,
    _R.DEADLINE_REQUIRED: _C.INVALID_ARGUMENT,
    _R.REQUEST_ID_REUSED: _C.INVALID_ARGUMENT,
    _R.NOT_FOUND: _C.NOT_FOUND,
    _R.ALREADY_EXISTS: _C.ALREADY_EXISTS,
    _R.NO_CAPACITY: _C.RESOURCE_EXHAUSTED,
    _R.HOST_DISK_FULL: _C.RESOURCE_EXHAUSTED,
    _R.POOL_FULL: _C.RESOURCE_EXHAUSTED,
    _R.TOO_MANY_WATCHES: _C.RESOURCE_EXHAUSTED,
    _R.SLOW_READER: _C.RESOURCE_EXHAUSTED,
    _R.INSTRUCTIONS_DISABLED: _C.PERMISSION_DENIED,
    _R.NOT_PERMITTED: _C.PERMISSION_DENIED,
    _R.UNAUTHENTICATED: _C.UNAUTHENTICATED,
    _R.OUTCOME_UNKNOWN: _C.UNKNOWN,
    _R.LEDGER_UNREACHABLE: _C.UNAVAILABLE,
    _R.AGENT_UNREACHABLE: _C.UNAVAILABLE,
    _R.API_UNREACHABLE: _C.UNAVAILABLE,
    _R.INTERNAL: _C.INTERNAL,
}
"""Everything else is FAILED_PRECONDITION: the state of the world forbids it, and repeating does not help by itself."""

_REASONS = {
    _C.INVALID_ARGUMENT: _R.INVALID_ARGUMENT,
    _C.OUT_OF_RANGE: _R.INVALID_ARGUMENT,
    _C.NOT_FOUND: _R.NOT_FOUND,
    _C.ALREADY_EXISTS: _R.ALREADY_EXISTS,
    _C.UNIMPLEMENTED: _R.INTERNAL,
    _C.PERMISSION_DENIED: _R.NOT_PERMITTED,
    _C.UNAUTHENTICATED: _R.UNAUTHENTICATED,
    _C.FAILED_PRECONDITION: _R.INTERNAL,
}
"""Of a status that carries no reason of ours. What is not here says nothing about the call's effect."""


def code_of(reason: RefusalReason) -> grpc.StatusCode:
    """The canonical code that a refusal travels under; FAILED_PRECONDITION unless there is a better one."""
    return _CODES.get(reason, _C.FAILED_PRECONDITION)


MAX_STATUS_BYTES = 7_168
"""What a status takes in the trailers at most, as `status_bytes` counts; gRPC's own entries need some of the 8 KiB."""
MAX_VIOLATIONS = 20
_MESSAGE_BYTES = 2_600
_METADATA_BYTES = 900
_VIOLATIONS_BYTES = 3_000
"""Shares of the parts, as they travel. What does not fit is cut off (texts) or left off (entries)."""
_MAX_ENTRIES = 16
_LEFT_OFF = "violations_left_off"
"""Key of ErrorInfo.metadata: how many violations were left off."""


def status_bytes(status: grpc.Status) -> int:
    """What the texts of a status take in the trailers: the message percent-encoded, the details in base 64."""
    metadata = cast(Any, status.trailing_metadata) or ()
    details = sum(len(key) + _base64(len(value)) for key, value in metadata)
    return _encoded(status.details) + details


def to_status(error: DroverError) -> grpc.Status:
    """The status to abort a call with, details in its trailing metadata: never more than MAX_STATUS_BYTES.

    At most MAX_VIOLATIONS violations go along; ErrorInfo says under `violations_left_off` how many were left off.
    """
    violations = _violations(error)
    known = dict(error.details)
    if left_off := len(error.violations) - len(violations):
        known = {_LEFT_OFF: str(left_off), **known}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(known))
    details = [_packed(info)]
    if violations:
        details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    code: int = code_of(error.reason).value[0]
    message = _cut(error.message, _MESSAGE_BYTES, _in_message)
    return rpc_status.to_status(status_pb2.Status(code=code, message=message, details=details))


def _violations(error: DroverError) -> list[error_details_pb2.BadRequest.FieldViolation]:
    """As many as have room, each with its texts clipped; at least one when there is one."""
    kept: list[error_details_pb2.BadRequest.FieldViolation] = []
    room = _VIOLATIONS_BYTES
    for field, said in error.violations[:MAX_VIOLATIONS]:
        where, what = _cut(field, SHOWN, _in_details), _cut(said, 2 * SHOWN, _in_details)
        room -= _in_details(where) + _in_details(what) + 16
        if room < 0:
            break
        kept.append(error_details_pb2.BadRequest.FieldViolation(field=where, description=what))
    return kept


def _metadata(details: Mapping[str, str]) -> dict[str, str]:
    kept: dict[str, str] = {}
    room = _METADATA_BYTES
    for name, value in list(details.items())[:_MAX_ENTRIES]:
        key, text = _cut(name, 64, _in_details), _cut(value, SHOWN, _in_details)
        room -= _in_details(key) + _in_details(text) + 16
        if room < 0:
            break
        kept[key] = text
    return kept


def _cut(text: str, room: int, cost: Callable[[str], int]) -> str:
    """As much of the text as costs at most `room`; what cannot be written as UTF-8 is replaced."""
    start = text[: room + 1].encode("utf-8", "replace").decode()  # a character costs one at least
    if cost(start) <= room:
        return start
    low, high = 0, len(start)  # the longest beginning that fits together with the ellipsis
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(f"{start[:middle]}…") <= room else (low, middle - 1)
    return f"{start[:low]}…"


def _encoded(text: str) -> int:
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode("utf-8", "replace"))


def _base64(size: int) -> int:
    return (size + 2) // 3 * 4


def _in_message(text: str) -> int:
    """It travels twice: as grpc-message, and in the details."""
    return _encoded(text) + _in_details(text)


def _in_details(text: str) -> int:
    return _base64(len(text.encode("utf-8", "replace")))


def _packed(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def from_rpc_error(
    error: grpc.RpcError, *, peer: str = "", unreachable: RefusalReason = RefusalReason.AGENT_UNREACHABLE
) -> DroverError:
    """What a failed call means. `peer` names the other side in the sentence.

    Without a reason of ours: UNAVAILABLE becomes `unreachable`; DEADLINE_EXCEEDED, CANCELLED and whatever else tells
    nothing about the call's effect becomes OUTCOME_UNKNOWN.
    """
    if (refusal := told(error)) is not None:
        return refusal
    call = cast(grpc.Call, error)
    code: grpc.StatusCode = call.code()
    said = (call.details() or "").strip() or code.name.lower().replace("_", " ")
    where = peer or "the other side"
    if code is _C.UNAVAILABLE:
        return DroverError(unreachable, f"{where} cannot be reached: {said}")
    if code is _C.DEADLINE_EXCEEDED:
        return DroverError(_R.OUTCOME_UNKNOWN, f"{where} did not answer in time: the call may have had its effect")
    if code is _C.RESOURCE_EXHAUSTED and _TRAILERS_BURST in said:
        # Nothing but a refusal was ever so long. An API of this version sends none, and we take much longer ones.
        return DroverError(_R.INTERNAL, f"{where} refused the call, with more words than fit into an answer")
    if code is _C.RESOURCE_EXHAUSTED and any(words in said for words in _NOT_TAKEN):
        return DroverError(_R.INVALID_ARGUMENT, f"the request is too large: {said}")
    if code is _C.UNIMPLEMENTED:
        return DroverError(_R.INTERNAL, f"{where} does not know this call: is it another version of Drover?")
    reason = _REASONS.get(code, _R.OUTCOME_UNKNOWN)
    return DroverError(reason, f"{where} answered {code.name}: {clip(said, 2 * SHOWN)}")


_TRAILERS_BURST = "metadata size exceeds"
"""In gRPC's own words for trailers that it does not take."""
_NOT_TAKEN = ("CLIENT: Sent message larger than max", "SERVER: Received message larger than max")
"""gRPC's own words for a request that never left, or was never taken in. The other way round it is the answer that was
too large, of a call that may have had its effect."""


def told(error: grpc.RpcError) -> DroverError | None:
    """The DroverError that the other side raised; None when the status does not carry one."""
    try:
        status = cast(status_pb2.Status | None, rpc_status.from_call(cast(grpc.Call, error)))
    except ValueError:
        return None  # details that contradict the status: not ours
    if status is None:
        return None
    reason: RefusalReason | None = None
    details: dict[str, str] = {}
    violations: list[tuple[str, str]] = []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = _R(info.reason) if info.reason in _R.__members__ else _R.INTERNAL
            details = dict(info.metadata)
        elif detail.Unpack(bad):
            violations += [(violation.field, violation.description) for violation in bad.field_violations]
    if reason is None:
        return None
    field = violations[0][0] if len(violations) == 1 else ""
    return DroverError(reason, status.message, field=field, violations=violations, details=details)


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """In place of a request: gRPC itself would end the call as UNKNOWN, with a traceback for every such request."""

    why: str


def _decoding(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception as error:
            return _Undecodable(clip(str(error)))

    return decode


def _decoded(request: Any) -> Any:
    """The request, or an iterator of requests. Raises INVALID_ARGUMENT where it could not be decoded."""
    if isinstance(request, _Undecodable):
        raise DroverError(_R.INVALID_ARGUMENT, f"the request is not a message of this call: {request.why}")
    return _each_decoded(cast(AsyncIterable[Any], request)) if isinstance(request, AsyncIterable) else request


async def _each_decoded(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    """The first one says what the call is about: without it a call only takes others' room. Later ones take their time:
    a person types them, or a guest has to be stopped for them."""
    each = aiter(requests)
    try:
        async with asyncio.timeout(FIRST_S):
            first = await anext(each, None)
    except TimeoutError:
        said = f"nothing was sent within {FIRST_S:g} s: the first message says what the call is about"
        raise DroverError(_R.INVALID_ARGUMENT, said) from None
    if first is None:
        return
    yield _decoded(first)
    async for request in each:
        yield _decoded(request)


FIRST_S = 10.0
"""For the first message of a call that takes a stream of them."""
_LAST_WORD_S = 1.0

Translate = Callable[[Exception], DroverError | None]
"""What an exception means that a handler let through; None: it was not foreseen."""


LookAgain = Callable[[Exception, str, float], Awaitable[bool]]
"""(error, name of the call, seconds that its caller still waits) -> ask the handler once more."""


async def _answer(behaviour: Callable[..., Any], request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
    answer = behaviour(request, context)
    return await answer if inspect.isawaitable(answer) else answer


class Errors(aio.ServerInterceptor):
    """Ends calls whose handler raised DroverError with its status; anything unforeseen with INTERNAL and a log line.

    With `require_deadline` calls that have none are refused before their handler runs: nobody waits for ever, and a
    server that is stuck is not buried under calls that nobody waits for any more. A request that is no message of its
    kind is refused with INVALID_ARGUMENT. The standard health service is left alone.
    """

    def __init__(
        self,
        *,
        require_deadline: bool,
        translate: Translate = lambda _error: None,
        check: Callable[[Message], None] = lambda _request: None,
        slow_reader_s: float = 0.0,
        answered: Callable[[str, str], None] = lambda _method, _code: None,
        look_again: LookAgain | None = None,
    ) -> None:
        """`check` judges each request of a call that takes one, before its handler sees it; raises DroverError.

        `answered` is told the method and the status code of every call that ends and was not cancelled.

        `look_again` says after an error whether the handler, which has answered nothing, is to be asked once more.

        `slow_reader_s` > 0: a stream whose reader takes in nothing for so long is ended with SLOW_READER.
        """
        self._slow_reader_s = slow_reader_s
        self._require_deadline = require_deadline
        self._translate = translate
        self._check = check
        self._answered = answered
        self._look_again = look_again

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every call but those of gRPC's own services (health, reflection)."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith("/grpc."):
            return handler
        return self._wrapped(cast(Any, handler), method)

    def _wrapped(self, handler: Any, method: str) -> Any:
        parts = {
            "request_deserializer": _decoding(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **parts)
        if handler.stream_unary:
            once = self._unary(handler.stream_unary, method, again=False)
            return grpc.stream_unary_rpc_method_handler(once, **parts)
        if handler.unary_stream:
            stream = self._stream(handler.unary_stream, method)
            return grpc.unary_stream_rpc_method_handler(
                self._to_reader(stream, method) if self._slow_reader_s else stream, **parts
            )
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, method, again=False), **parts)

    async def _ask(
        self,
        behaviour: Callable[..., Any],
        request: Any,
        context: aio.ServicerContext[Any, Any],
        method: str,
        again: bool,
    ) -> Any:
        try:
            return await _answer(behaviour, request, context)
        except Exception as error:
            if not again or not await self._is_to_look_again(error, context, method):
                raise
            return await _answer(behaviour, request, context)

    async def _is_to_look_again(self, error: Exception, context: aio.ServicerContext[Any, Any], method: str) -> bool:
        if self._look_again is None or isinstance(error, aio.AbortError):
            return False
        left_s = cast(float | None, context.time_remaining())
        return await self._look_again(error, method.rpartition("/")[2], left_s or 0.0)

    def _unary(self, behaviour: Callable[..., Any], method: str, *, again: bool = True) -> Any:
        """`again`: whether the request can be looked at once more, which a stream of them cannot."""

        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._check_deadline(context)
                answer = await self._ask(behaviour, self._checked(request), context, method, again)
                self._answered(method, "OK")
                return answer
            except Exception as error:
                await self._end(context, error, method)

        return call

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str, *, again: bool = True) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            answers: Any = None
            try:
                self._check_deadline(context)
                checked = self._checked(request)
                heard = False
                answers = behaviour(checked, context)
                try:
                    async for answer in answers:
                        heard = True
                        yield answer
                except Exception as error:
                    if heard or not again or not await self._is_to_look_again(error, context, method):
                        raise
                    answers = behaviour(checked, context)
                    async for answer in answers:
                        yield answer
                self._answered(method, "OK")
            except Exception as error:
                await self._end(context, error, method)
            finally:  # now, not when the garbage collector finds it: a watch holds things
                if isinstance(answers, AsyncGenerator):
                    await cast(AsyncGenerator[Any], answers).aclose()

        return call

    def _to_reader(self, stream: Callable[..., AsyncIterator[Any]], method: str) -> Any:
        """Writes what the stream yields, with a bound on each write: gRPC waits for a reader as long as it takes."""

        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
            answers = stream(request, context)
            try:
                async for answer in answers:
                    async with asyncio.timeout(self._slow_reader_s):
                        await context.write(answer)
                return
            except TimeoutError:
                pass
            finally:
                await cast(AsyncGenerator[Any], answers).aclose()
            said = (
                f"nothing was taken in for {self._slow_reader_s:g} s: begin anew, it starts with what is the case then"
            )
            with contextlib.suppress(TimeoutError):  # it is told when it reads again, if it ever does
                async with asyncio.timeout(_LAST_WORD_S):
                    await self._end(context, DroverError(_R.SLOW_READER, said), method)

        return call

    def _checked(self, request: Any) -> Any:
        decoded = _decoded(request)
        if isinstance(decoded, AsyncIterable):
            return self._each_checked(cast(AsyncIterable[Any], decoded))
        if isinstance(decoded, Message):
            self._check(decoded)
        return decoded

    async def _each_checked(self, requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, Message):
                self._check(request)
            yield request

    def _check_deadline(self, context: aio.ServicerContext[Any, Any]) -> None:
        remaining = cast(float | None, context.time_remaining())
        if self._require_deadline and remaining is None:
            raise DroverError(_R.DEADLINE_REQUIRED, "this call needs a deadline: set one, for example of 10 s")

    async def _end(self, context: aio.ServicerContext[Any, Any], error: Exception, method: str) -> None:
        """Raises AbortError, as `context.abort` does."""
        if isinstance(error, aio.AbortError):
            raise error
        told = error if isinstance(error, DroverError) else self._translate(error)
        if told is None:
            log.error("handler failed", method=method, exc_info=error)
            told = DroverError(_R.INTERNAL, f"unexpected: {type(error).__name__}; the log of the server has more")
        status = to_status(told)
        self._answered(method, status.code.name)
        await context.abort_with_status(cast(Any, status))
