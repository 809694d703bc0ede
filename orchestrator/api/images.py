"""Images in the pools of hosts: which there are, and how one is brought in. The agents have them; this keeps none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

import structlog

from orchestrator import wire_hardware
from orchestrator.api.calls import Caller, Tools
from orchestrator.api.reads import not_found
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.images import CHUNK_BYTES, DIGEST_BYTES, ImageImport, import_errors
from orchestrator.core.placement import HostInput
from orchestrator.core.records import PoolKind
from orchestrator.core.text import clip, handful, quoted
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.rpc.agent_client import CALL_S
from protos.drover.v1 import agent_pb2, types_pb2
from protos.drover.v1 import orchestrator_pb2 as pb

log = structlog.get_logger(__name__)

DEFAULT_PAGE, MAX_PAGE = 100, 1_000
AT_ONCE = 16
"""Pools that are asked for at the same time."""
SHARE = 0.7
"""Of the caller's time that is spent on asking; what was not asked by then is on the next page."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One pool at one host: where images are asked for."""

    pool: str
    host: str


class Images:
    """The calls about images."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    # --- which there are ----------------------------------------------------------------------------------------------

    async def list(self, request: pb.ListImagesRequest, caller: Caller) -> pb.ListImagesResponse:
        """Raises INVALID_ARGUMENT, and NOT_FOUND for an unknown host; that an agent is silent is told in the answer."""
        at, after = check(request)
        snapshot = await self._tools.index.recent()
        asked = places(snapshot, request.host, request.pool)
        todo = [place for place in asked if at is None or place >= at]
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        users = users_of(snapshot)
        answer = pb.ListImagesResponse()
        stop_s = asyncio.get_running_loop().time() + SHARE * caller.remaining_s()
        for begin in range(0, len(todo), AT_ONCE):
            batch = todo[begin : begin + AT_ONCE]
            if begin and asyncio.get_running_loop().time() > stop_s:
                answer.next_page_token = f"{batch[0].pool}/{batch[0].host}/"
                return answer
            first = [after if place == at else "" for place in batch]
            room = size - len(answer.images)
            found = await asyncio.gather(
                *(self._ask(snapshot, place, since, room, caller) for place, since in zip(batch, first, strict=True))
            )
            for place, told in zip(batch, found, strict=True):
                if isinstance(told, DroverError):
                    answer.unreadable.add(name=f"{place.host}/{place.pool}", reason=clip(told.message))
                    continue
                images, more = told
                room = size - len(answer.images)
                for image in images[:room]:
                    image.guests.extend(sorted(users.get(_used_as(snapshot, place, image.name), ())))
                    answer.images.append(image)
                if more or len(images) > room:
                    answer.next_page_token = f"{place.pool}/{place.host}/{answer.images[-1].name if room else ''}"
                    return answer
        return answer

    async def _ask(
        self, snapshot: Snapshot, place: Place, after: str, size: int, caller: Caller
    ) -> tuple[list[types_pb2.Image], bool] | DroverError:
        record = snapshot.hosts[place.host].input.record
        if not snapshot.hosts[place.host].input.live:
            return DroverError(RefusalReason.HOST_NOT_LIVE, f"{place.host} is not live")
        try:
            agent = self._tools.agents.at(record.control_address, place.host)
            return await agent.list_pool_images(place.pool, after, max(size, 1), caller.remaining_s(CALL_S))
        except DroverError as error:
            return error

    # --- bringing one in ----------------------------------------------------------------------------------------------

    async def bring_in(self, requests: AsyncIterator[pb.ImportImageRequest], caller: Caller) -> types_pb2.Image:
        """Passes the data on to the agent as fast as that takes it in, and keeps none of it."""
        first = await anext(requests, None)
        if first is None or not first.HasField("image"):
            raise invalid([("image", "is missing: the first message says what the image is to be")])
        image = check_import(first)
        host = _host_for(await self._tools.index.recent(), image, first.image.host)
        agent = self._tools.agents.at(host.record.control_address, host.record.name)
        log.info("image comes", pool=image.pool, image=image.name, host=host.record.name, by=caller.by)
        wrong: list[DroverError] = []
        try:
            made = await agent.receive_image(_passed_on(first, requests, wrong), caller.remaining_s())
        except DroverError:
            if wrong:
                raise wrong[0] from None
            raise
        return made


def check(request: pb.ListImagesRequest) -> tuple[Place | None, str]:
    """Where the page begins: which pool at which host, after which name. Raises INVALID_ARGUMENT."""
    bad = [
        (field, said) for field in ("host", "pool") if (name := getattr(request, field)) and (said := name_error(name))
    ]
    if request.page_size < 0:
        bad.append(("page_size", f"must not be negative, not {request.page_size}"))
    parts = request.page_token.split("/") if request.page_token else ["", "", ""]
    if len(parts) != 3 or (request.page_token and any(map(name_error, parts[:2]))):
        said = f"must be the next_page_token of an earlier answer, not {quoted(request.page_token)}"
        bad.append(("page_token", said))
    if bad:
        raise invalid(bad)
    pool, host, after = parts
    return (Place(pool, host) if pool else None), after


def check_import(first: pb.ImportImageRequest) -> ImageImport:
    """What is to be brought in. Raises INVALID_ARGUMENT with everything that is wrong with it."""
    told = first.image
    image = wire_hardware.image_import_from_proto(
        told.name, told.pool, told.format, told.size_bytes, field="image.format"
    )
    bad = [(f"image.{field}", said) for field, said in import_errors(image)]
    if told.host and (said := name_error(told.host)):
        bad.append(("image.host", said))
    if said := chunk_error(first):
        bad.append(said)
    if bad:
        raise invalid(bad)
    return image


def chunk_error(request: pb.ImportImageRequest) -> tuple[str, str] | None:
    """What is wrong with one message's data."""
    if len(request.data) > CHUNK_BYTES:
        return "data", f"at most {CHUNK_BYTES} bytes at a time, not {len(request.data)}"
    if request.sha256 and len(request.sha256) != DIGEST_BYTES:
        return "sha256", f"must be {DIGEST_BYTES} bytes, not {len(request.sha256)}"
    return None


async def _passed_on(
    first: pb.ImportImageRequest, requests: AsyncIterator[pb.ImportImageRequest], wrong: list[DroverError]
) -> AsyncIterator[agent_pb2.ReceiveImageRequest]:
    """What the agent is sent. A message that is wrong ends it, and the import with it; why is told in `wrong`."""
    image = first.image
    yield agent_pb2.ReceiveImageRequest(
        pool=image.pool,
        name=image.name,
        format=image.format,
        size_bytes=image.size_bytes,
        data=first.data,
        sha256=first.sha256,
    )
    async for each in requests:
        said = ("image", "stands in the first message only") if each.HasField("image") else chunk_error(each)
        if said is not None:
            wrong.append(invalid([said]))
            return
        yield agent_pb2.ReceiveImageRequest(data=each.data, sha256=each.sha256)


def places(snapshot: Snapshot, host: str, pool: str) -> Sequence[Place]:
    """Where to ask, in order. Hosts that share a pool have the same images: only the first live one is asked.

    Raises NOT_FOUND for an unknown host, or a pool that no such host has.
    """
    if host and host not in snapshot.hosts:
        raise not_found("host", host, field="host")
    found: list[Place] = []
    shared: dict[str, tuple[bool, str]] = {}
    for name, entry in snapshot.hosts.items():
        if host and name != host:
            continue
        for each in entry.input.record.pools:
            if (pool and each.name != pool) or each.kind is PoolKind.BLOCK:
                continue
            if each.kind is PoolKind.LOCAL:
                found.append(Place(each.name, name))
            else:
                shared[each.name] = min(shared.get(each.name, (True, "~")), (not entry.input.live, name))
    if pool and not found and not shared:
        raise not_found("pool", pool, field="pool")
    return sorted([*found, *(Place(name, where) for name, (_, where) in shared.items())])


Used = tuple[str, str, str]
"""Pool, host (empty: it is shared), name."""


def users_of(snapshot: Snapshot) -> Mapping[Used, set[str]]:
    """Names of guests by what image they have a disk with."""
    found: dict[Used, set[str]] = {}
    for guest in snapshot.guests.values():
        for disk in guest.spec.disks:
            used = _used_as(snapshot, Place(disk.pool, guest.record.owner.host), disk.image)
            found.setdefault(used, set()).add(guest.record.name)
    return found


def _used_as(snapshot: Snapshot, place: Place, name: str) -> Used:
    return place.pool, place.host if _is_local(snapshot, place.pool, place.host) else "", name


def _is_local(snapshot: Snapshot, pool: str, host: str) -> bool:
    entry = snapshot.hosts.get(host)
    pools = entry.input.record.pools if entry is not None else ()
    return any(each.name == pool and each.kind is PoolKind.LOCAL for each in pools)


def _host_for(snapshot: Snapshot, image: ImageImport, wanted: str) -> HostInput:
    """Raises NOT_FOUND, HOST_NOT_LIVE, POOL_NOT_FOUND, and INVALID_ARGUMENT when the host has to be said."""
    if wanted:
        entry = snapshot.hosts.get(wanted)
        if entry is None:
            raise not_found("host", wanted, field="image.host")
        if not entry.input.live:
            raise DroverError(RefusalReason.HOST_NOT_LIVE, f"{wanted} is not live", field="image.host")
        if not _has(entry.input, image.pool):
            raise DroverError(RefusalReason.POOL_NOT_FOUND, f"{wanted} has no pool {image.pool}", field="image.pool")
        return entry.input
    having = [entry.input for entry in snapshot.hosts.values() if _has(entry.input, image.pool)]
    if not having:
        raise DroverError(RefusalReason.POOL_NOT_FOUND, f"no host has a pool {image.pool}", field="image.pool")
    if any(_is_local(snapshot, image.pool, each.record.name) for each in having) and len(having) > 1:
        names = handful(sorted(each.record.name for each in having))
        raise invalid([("image.host", f"is missing: pool {image.pool} is another one on each host ({names})")])
    live = next((each for each in having if each.live), None)
    if live is None:
        raise DroverError(RefusalReason.HOST_NOT_LIVE, f"no host that has pool {image.pool} is live")
    return live


def _has(host: HostInput, pool: str) -> bool:
    return any(each.name == pool for each in host.record.pools)
