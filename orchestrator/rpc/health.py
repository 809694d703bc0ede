"""The standard health service (grpc.health.v1) at both ends: serving it, and asking for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from orchestrator.pki.names import Identity
from orchestrator.rpc.channels import aio_channel, tls_channel
from orchestrator.rpc.credentials import Credentials

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthService:
    """Health of one server and of the services on it, all the same; not serving at first."""

    def __init__(self, services: Sequence[str] = ()) -> None:
        self._services = ("", *services)
        self._servicer = health_aio.HealthServicer()

    def add_to(self, server: aio.Server) -> None:
        """Before the server starts."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, serving: bool) -> None:
        """What is answered from now on, and told to everybody who watches."""
        for service in self._services:
            await self._servicer.set(service, _SERVING if serving else _NOT_SERVING)

    async def end(self) -> None:
        """Not serving from here on, whatever `set` says later: the process is about to leave."""
        await self._servicer.enter_graceful_shutdown()


async def check(address: str, timeout_s: float = 1.0, tls: tuple[Credentials, Identity] | None = None) -> str | None:
    """None: the server there serves. Otherwise what is wrong, in a few words. Never raises.

    `tls`: what the server is shown, and who it must be."""
    channel = aio_channel(address, alone=True) if tls is None else tls_channel(address, *tls)
    stub = cast(Any, health_pb2_grpc.HealthStub(channel))  # its type does not know the calls
    try:
        answer: health_pb2.HealthCheckResponse = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        return None if answer.status == _SERVING else "does not serve (its ledger is away, or it is stopping)"
    except aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return None  # it answers, and has no health service
        silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return "does not answer" if silent else f"cannot be asked: {error.details()}"
    finally:
        await channel.close()
