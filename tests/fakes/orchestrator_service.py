"""A small OrchestratorService in memory, behind a real gRPC server: what a client of the API sees, without a cluster.

`serve` runs it in a thread of its own, with the interceptor that the real API has, so that deadlines and errors cross
the wire as they do there. It judges requests with the product's own pure parts and passes the contract suite of the API
(tests/contract/test_orchestrator_*.py). Nothing happens by itself: a test sets the resources, watches tell them,
and `frames`, where given, is told by the watches of migrations and evacuations instead.
"""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from grpc import aio

from orchestrator.api import limits
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.rpc.channels import MAX_REQUEST_BYTES, aio_server, listen
from orchestrator.rpc.errors import Errors
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import add_OrchestratorServiceServicer_to_server
from tests.fakes.orchestrator_parts.adoption import Adoption
from tests.fakes.orchestrator_parts.evacuations import Evacuations
from tests.fakes.orchestrator_parts.guest_access import GuestAccess
from tests.fakes.orchestrator_parts.guest_changes import GuestChanges
from tests.fakes.orchestrator_parts.hosts import Hosts
from tests.fakes.orchestrator_parts.images import Images
from tests.fakes.orchestrator_parts.kept_guests import KeptGuests
from tests.fakes.orchestrator_parts.repairs import Repairs

R = RefusalReason


class FakeOrchestrator(Hosts, Images, KeptGuests, GuestChanges, GuestAccess, Repairs, Adoption, Evacuations):
    """All of the service: resources by name, and every request that came."""

    async def GetClusterHealth(self, request: pb.GetClusterHealthRequest, context: object) -> pb.ClusterHealth:
        await self._called("GetClusterHealth", request)
        return self.health

    async def ExportHistory(self, request: pb.ExportHistoryRequest, context: object) -> AsyncIterator[pb.HistoryEntry]:
        await self._called("ExportHistory", request)
        if request.kind not in ("", "migrations", "evacuations", "guests"):
            raise DroverError(R.INVALID_ARGUMENT, f"there is no kind {request.kind!r}", field="kind")
        if self.history is None:
            raise DroverError(R.NO_HISTORY, "no history is kept")
        for one in self.history:
            if request.kind in ("", one.kind) and one.name.startswith(request.name_prefix):
                yield one


@contextlib.contextmanager
def serve(service: FakeOrchestrator, address: str) -> Iterator[str]:
    """The service behind a server at `address` (`unix:PATH` or `127.0.0.1:0`) while the context lasts."""
    loop = service.loop = asyncio.new_event_loop()
    worker = threading.Thread(target=loop.run_forever, name="fake-api", daemon=True)
    worker.start()

    async def start() -> tuple[aio.Server, str]:
        server = aio_server(
            [Errors(require_deadline=True, check=limits.check, slow_reader_s=30.0)], max_request_bytes=MAX_REQUEST_BYTES
        )
        add_OrchestratorServiceServicer_to_server(service, server)
        port = listen(server, address)
        await server.start()
        return server, address if address.startswith("unix:") else f"127.0.0.1:{port}"

    server, listening = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield listening
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        worker.join(10)


def host(name: str, **values: Any) -> types.Host:
    """A live host of 8 GiB."""
    given: dict[str, Any] = {
        "state": types.HOST_STATE_LIVE,
        "boot_id": f"boot-{name}",
        "memory_mib": 8192,
        "memory_used_mib": 768,
        "bandwidth_mbps": 1000,
        "engine": "QEMU 10.0.3",
        "accelerator": "tcg",
        **values,
    }
    return types.Host(name=name, **given)


def unix_address(folder: Path) -> str:
    return f"unix:{folder / 'api.sock'}"
