"""DroverError <-> gRPC status: a canonical code, `google.rpc.ErrorInfo` and `google.rpc.BadRequest` for bad fields."""

# googleapis-common-protos ships stubs beside its modules, but does not say so; grpc_status leaves its messages untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_status import rpc_status

from orchestrator.core.errors import DroverError, RefusalReason

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
    _R.CHAOS_DISABLED: _C.PERMISSION_DENIED,
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
    _C.PERMISSION_DENIED: _R.INTERNAL,
    _C.UNAUTHENTICATED: _R.INTERNAL,
    _C.FAILED_PRECONDITION: _R.INTERNAL,
}
"""Of a status that carries no reason of ours. What is not here says nothing about the call's effect."""


def code_of(reason: RefusalReason) -> grpc.StatusCode:
    return _CODES.get(reason, _C.FAILED_PRECONDITION)


def to_status(error: DroverError) -> grpc.Status:
    """The status to abort a call with, details in its trailing metadata."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.details)
    details = [_packed(info)]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=field, description=said)
            for field, said in error.violations
        ]
        details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    code: int = code_of(error.reason).value[0]
    return rpc_status.to_status(status_pb2.Status(code=code, message=error.message, details=details))


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
    call = cast(grpc.Call, error)
    told = _told(call)
    if told is not None:
        return told
    code: grpc.StatusCode = call.code()
    said = (call.details() or "").strip() or code.name.lower().replace("_", " ")
    where = peer or "the other side"
    if code is _C.UNAVAILABLE:
        return DroverError(unreachable, f"{where} cannot be reached: {said}")
    if code is _C.DEADLINE_EXCEEDED:
        return DroverError(_R.OUTCOME_UNKNOWN, f"{where} did not answer in time: the call may have had its effect")
    if code is _C.UNIMPLEMENTED:
        return DroverError(_R.INTERNAL, f"{where} does not know this call: is it another version of Drover?")
    reason = _REASONS.get(code, _R.OUTCOME_UNKNOWN)
    return DroverError(reason, f"{where} answered {code.name}: {said}")


def _told(call: grpc.Call) -> DroverError | None:
    """The DroverError that the other side raised; None when the status does not carry one."""
    try:
        status = cast(status_pb2.Status | None, rpc_status.from_call(call))
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


Translate = Callable[[Exception], DroverError | None]
"""What an exception means that a handler let through; None: it was not foreseen."""


class Errors(aio.ServerInterceptor):
    """Ends calls whose handler raised DroverError with its status; anything unforeseen with INTERNAL and a log line.

    With `require_deadline` calls that have none are refused before their handler runs: nobody waits for ever, and a
    server that is stuck is not buried under calls that nobody waits for any more. The standard health service is left
    alone.
    """

    def __init__(self, *, require_deadline: bool, translate: Translate = lambda _error: None) -> None:
        self._require_deadline = require_deadline
        self._translate = translate

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.startswith("/grpc."):
            return handler
        return self._wrapped(cast(Any, handler), method)

    def _wrapped(self, handler: Any, method: str) -> Any:
        parts = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary, method), **parts)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._unary(handler.stream_unary, method), **parts)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method), **parts)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, method), **parts)

    def _unary(self, behaviour: Callable[..., Any], method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._check_deadline(context)
                answer = behaviour(request, context)
                return await answer if inspect.isawaitable(answer) else answer
            except Exception as error:
                await self._end(context, error, method)

        return call

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            answers = behaviour(request, context)
            try:
                self._check_deadline(context)
                async for answer in answers:
                    yield answer
            except Exception as error:
                await self._end(context, error, method)
            finally:  # now, not when the garbage collector finds it: a watch holds things
                if isinstance(answers, AsyncGenerator):
                    await cast(AsyncGenerator[Any], answers).aclose()

        return call

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
        await context.abort_with_status(cast(Any, to_status(told)))
