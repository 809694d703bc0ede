"""The contract of OrchestratorService: images in pools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from orchestrator.core.images import ImageImport
from orchestrator.core.records import (
    DiskFormat,
    DiskSpec,
    GuestSpec,
    Pool,
    PoolKind,
)
from orchestrator.rpc.channels import channel
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.contract.orchestrator_subject import R, Subject

FAST, SHARED = Pool("fast", PoolKind.LOCAL), Pool("shared", PoolKind.SHARED_FILE)


def an_image(name: str, pool: str, host: str) -> types.Image:
    return types.Image(name=name, pool=pool, host=host, format=types.DISK_FORMAT_RAW, size_bytes=1024, used_bytes=512)


def places_of(images: Sequence[types.Image]) -> list[tuple[str, str, str]]:
    return [(each.pool, each.host, each.name) for each in images]


async def test_images_come_by_pool_host_and_name_and_those_of_a_shared_pool_once(
    api: Subject, client: OrchestratorClient
) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST, an_image("b", "fast", where), an_image("a", "fast", where))
        await api.pool(where, SHARED, an_image("base", "shared", where))
    found = await api.call(client.list_images)
    all_of_them = [("fast", "h1", "a"), ("fast", "h1", "b"), ("fast", "h2", "a"), ("fast", "h2", "b")]
    assert places_of(found) == [*all_of_them, ("shared", "h1", "base")]
    assert places_of(await api.call(client.list_images, "h2")) == [*all_of_them[2:], ("shared", "h2", "base")]
    assert places_of(await api.call(client.list_images, pool="shared")) == [("shared", "h1", "base")]
    assert places_of(await api.call(client.list_images, limit=3)) == all_of_them[:3]
    assert (await api.refused(client.list_images, "h9")).reason is R.NOT_FOUND
    assert (await api.refused(client.list_images, pool="other")).reason is R.NOT_FOUND
    assert (await api.refused(client.list_images, "H 1", "..")).reason is R.INVALID_ARGUMENT


async def test_pages_of_images_leave_nothing_out(api: Subject, client: OrchestratorClient, kind: str) -> None:
    for where in ("h1", "h2", "h3"):
        await api.pool(where, FAST, *(an_image(f"i{number}", "fast", where) for number in range(4)))
    stub = OrchestratorServiceStub(channel(client.address))
    request, seen = pb.ListImagesRequest(page_size=3), list[types.Image]()
    for _ in range(20):
        answer = await asyncio.to_thread(stub.ListImages, request, timeout=5)
        assert len(answer.images) <= 3
        seen += answer.images
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    assert places_of(seen) == [("fast", where, f"i{number}") for where in ("h1", "h2", "h3") for number in range(4)]


async def test_an_image_says_which_guests_have_disks_of_it(api: Subject, client: OrchestratorClient) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST, an_image("data", "fast", where))
        await api.pool(where, SHARED, an_image("data", "shared", where))
    for name, where in (("one", "h1"), ("two", "h2")):
        disks = tuple(DiskSpec(pool.name, pool.name, "data", DiskFormat.RAW) for pool in (FAST, SHARED))
        await api.call(client.create_guest, GuestSpec(name, disks=disks), where)
    found = {(each.pool, each.host): list(each.guests) for each in await api.call(client.list_images)}
    assert found == {("fast", "h1"): ["one"], ("fast", "h2"): ["two"], ("shared", "h1"): ["one", "two"]}


async def test_an_image_is_brought_in_whole_or_not_at_all(api: Subject, client: OrchestratorClient) -> None:
    for where in ("h1", "h2"):
        await api.pool(where, FAST)
        await api.pool(where, SHARED)
    content = bytes(range(256)) * 2048
    image = ImageImport("new.raw", "fast", DiskFormat.RAW, len(content))
    made = await api.call(client.import_image, image, [content[:9], content[9:]], "h2")
    assert (made.pool, made.host, made.name, made.size_bytes) == ("fast", "h2", "new.raw", len(content))
    assert places_of(await api.call(client.list_images)) == [("fast", "h2", "new.raw")]

    again = await api.refused(client.import_image, image, [content], "h2")
    assert again.reason is R.ALREADY_EXISTS
    nowhere = await api.refused(client.import_image, image, [content])
    assert (nowhere.reason, nowhere.field) == (R.INVALID_ARGUMENT, "image.host")
    short = await api.refused(client.import_image, replace(image, name="short"), [content[:512]], "h1")
    assert short.reason is R.INVALID_ARGUMENT
    other = await api.refused(
        client.import_image, replace(image, name="other", format=DiskFormat.QCOW2), [content], "h1"
    )
    assert other.reason is R.INVALID_ARGUMENT
    for wrong in (replace(image, name="../x"), replace(image, name="x.moved-00000000"), replace(image, size_bytes=0)):
        assert (await api.refused(client.import_image, wrong, [content], "h1")).reason is R.INVALID_ARGUMENT
    assert (
        await api.refused(client.import_image, replace(image, pool="no"), [content], "h1")
    ).reason is R.POOL_NOT_FOUND
    assert (await api.refused(client.import_image, image, [content], "h9")).reason is R.NOT_FOUND

    anywhere = await api.call(client.import_image, replace(image, pool="shared"), [content])
    assert anywhere.pool == "shared"
    assert len(await api.call(client.list_images)) == 2
