"""Who calls, and whether he may: what every server with credentials asks before a handler is reached.

Connections by a unix socket are let through: the modes of the socket's directory say who may connect there.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import structlog
from grpc import aio

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import clip
from orchestrator.pki.files import DENY, PkiError
from orchestrator.rpc.credentials import Credentials, caller
from orchestrator.rpc.roles import may_call

log = structlog.get_logger(__name__)


class Guard(aio.ServerInterceptor):
    """Refuses calls with UNAUTHENTICATED and NOT_PERMITTED, as DroverError: it stands behind `errors.Errors`.

    The deny list is read again when its file changes; one that cannot be read leaves the last in force. The standard
    health service is left to everybody who has a certificate.
    """

    def __init__(self, credentials: Credentials, directory: Path) -> None:
        """`directory`: of the identity. Raises PkiError when its deny list cannot be read."""
        self._credentials = credentials
        self._cluster = credentials.identity.cluster
        self._file = directory / DENY
        self._stamp = self._look()
        self._denied = credentials.denied()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wrap the handler of every call but those of gRPC's own services."""
        handler = cast(Any, await continuation(handler_call_details))
        method = str(handler_call_details.method)
        if handler is None or method.startswith("/grpc."):
            return handler
        parts = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._once(handler.unary_unary, method), **parts)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._once(handler.stream_unary, method), **parts)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream, method), **parts)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, method), **parts)

    def _once(self, behaviour: Callable[..., Any], method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            self.must_be_allowed(method, context)
            answer = behaviour(request, context)
            return await answer if inspect.isawaitable(answer) else answer

        return call

    def _stream(self, behaviour: Callable[..., AsyncIterator[Any]], method: str) -> Any:
        async def call(request: Any, context: aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            self.must_be_allowed(method, context)
            answers = behaviour(request, context)
            try:
                async for answer in answers:
                    yield answer
            finally:
                if isinstance(answers, AsyncGenerator):
                    await cast(AsyncGenerator[Any], answers).aclose()

        return call

    def must_be_allowed(self, method: str, context: Any) -> None:
        """Raises UNAUTHENTICATED, NOT_PERMITTED."""
        if str(context.peer()).startswith("unix:"):
            return
        try:
            identity, serial = caller(context)
        except PkiError as error:
            raise DroverError(RefusalReason.UNAUTHENTICATED, clip(str(error))) from error
        if identity.cluster != self._cluster:
            said = f"{identity} is of cluster {identity.cluster}, and this is {self._cluster}"
            raise DroverError(RefusalReason.UNAUTHENTICATED, said)
        self._look_again()
        if serial in self._denied:
            raise DroverError(RefusalReason.UNAUTHENTICATED, f"the certificate {serial} of {identity} is revoked")
        if not may_call(identity, method):
            log.warning("refused", caller=str(identity), method=method, serial=serial)
            said = f"{identity} may not call {method.rpartition('/')[2]}"
            raise DroverError(RefusalReason.NOT_PERMITTED, said)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _look_again(self) -> None:
        if (now := self._look()) == self._stamp:
            return
        self._stamp = now
        try:
            self._denied = self._credentials.denied()
        except PkiError as error:
            log.error("the deny list cannot be read: the last one stays in force", error=str(error))
