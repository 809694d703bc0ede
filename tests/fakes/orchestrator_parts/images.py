"""Images in pools."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from orchestrator import wire_hardware
from orchestrator.api import images
from orchestrator.api.reads import not_found
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.images import HEADER_BYTES, content_error, header_of
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State

R = RefusalReason


class Images(State):
    def _pools(self, name: str, kind: types.PoolKind.ValueType | None = None) -> list[str]:
        return [
            host.name
            for host in self.hosts.values()
            for pool in host.pools
            if pool.name == name and kind in (None, pool.kind)
        ]

    def _used(self, image: types.Image) -> list[str]:
        local = image.host in self._pools(image.pool, types.POOL_KIND_LOCAL)
        return sorted(
            guest.name
            for guest in self.guests.values()
            for disk in guest.spec.disks
            if (disk.pool, disk.image) == (image.pool, image.name) and (not local or guest.host == image.host)
        )

    async def ListImages(self, request: pb.ListImagesRequest, context: object) -> pb.ListImagesResponse:
        await self._called("ListImages", request)
        at, after = images.check(request)
        if request.host:
            self._host(request.host)
        if request.pool and not self._pools(request.pool):
            raise not_found("pool", request.pool, field="pool")
        found: list[types.Image] = []
        for key in sorted(self.images):
            pool, host, _ = key
            first = request.host or min(self._pools(pool))
            if host == first or (host in self._pools(pool, types.POOL_KIND_LOCAL) and not request.host):
                found.append(self.images[key])
        found = [each for each in found if request.pool in ("", each.pool)]
        if at is not None:
            found = [each for each in found if (each.pool, each.host, each.name) > (at.pool, at.host, after)]
        size = request.page_size or 100
        answer = pb.ListImagesResponse(images=found[:size])
        for each in answer.images:
            each.guests.extend(self._used(each))
        if len(found) > size:
            last = answer.images[-1]
            answer.next_page_token = f"{last.pool}/{last.host}/{last.name}"
        return answer

    async def ImportImage(self, request_iterator: AsyncIterator[pb.ImportImageRequest], context: object) -> types.Image:
        first = await anext(request_iterator)
        await self._called("ImportImage", first.image)
        image = images.check_import(first)
        if first.image.host:
            self._known(self.hosts, first.image.host, "host", "image.host")
        having = [name for name in self._pools(image.pool) if first.image.host in ("", name)]
        if not having:
            raise DroverError(R.POOL_NOT_FOUND, f"no host has a pool {image.pool}", field="image.pool")
        if len(having) > 1 and self._pools(image.pool, types.POOL_KIND_LOCAL):
            raise invalid([("image.host", "is missing")])
        host, data, told = having[0], first.data, first.sha256
        async for each in request_iterator:
            data, told = data + each.data, each.sha256
        if (image.pool, host, image.name) in self.images:
            raise DroverError(R.ALREADY_EXISTS, f"there is an image {image.name}", field="image.name")
        if wrong := content_error(image, data[:HEADER_BYTES]):
            raise DroverError(R.INVALID_ARGUMENT, wrong, field="image.format")
        if len(data) != image.size_bytes or told != hashlib.sha256(data).digest():
            raise DroverError(R.INVALID_ARGUMENT, "what came is not what was to come", field="data")
        header = header_of(data[:HEADER_BYTES], len(data))
        made = types.Image(
            name=image.name,
            pool=image.pool,
            host=host,
            format=wire_hardware.disk_format_to_proto(header.format),
            size_bytes=header.size_bytes,
            used_bytes=len(data),
        )
        self.images[image.pool, host, image.name] = made
        return made
