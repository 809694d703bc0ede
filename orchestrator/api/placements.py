"""Where a guest could go: the choice that a create call would make now, and the verdict on every host.

A refused create call names a handful of hosts and counts the others, so that the refusal fits into the trailers of a
call however many hosts there are. Here the verdicts are a field of the answer, by pages.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator import wire
from orchestrator.api.calls import Caller, Tools
from orchestrator.api.checks import obstacles as obstacles_of
from orchestrator.api.guests import checked
from orchestrator.api.reads import guest_uuid, not_found, read_guest
from orchestrator.core.errors import RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.placement import GuestInput, HostView, Need, Verdict, choose, need_for, need_of, obstacles
from orchestrator.core.text import clip, quoted
from protos.drover.v1 import orchestrator_pb2 as pb

MAX_LISTED = 1_000
MAX_MESSAGE = 500
"""Characters of one verdict: a full page fits into one message of gRPC's default size."""


class Placements:
    """The call that only asks where a guest could go."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def check(self, request: pb.CheckPlacementRequest, caller: Caller) -> pb.CheckPlacementResponse:
        """Raises INVALID_ARGUMENT, and NOT_FOUND for an unknown guest or host; that a guest has no
        place is an answer like any other."""
        need = check(request)
        if need is None:
            uuid = await guest_uuid(self._tools.ledger, request.guest, field="guest")
            read = await read_guest(self._tools.ledger, uuid)
            need = need_of(GuestInput(read.uuid, read.record, read.spec))
        snapshot = await self._tools.index.recent()
        found = answer(request, snapshot.views(), need)
        if need.source and not request.page_token:
            known = await obstacles_of(self._tools, need.source, [need.guest], caller)
            found.obstacles.extend(map(wire.obstacle_to_proto, known[need.guest]))
        return found


def check(request: pb.CheckPlacementRequest) -> Need | None:
    """What the guest to be created asks; None: the request is about one that there is.

    Raises INVALID_ARGUMENT with everything that is wrong with the request by itself.
    """
    bad: list[tuple[str, str]] = []
    if bool(request.guest) == request.HasField("spec"):
        bad.append(("guest", "one of the two: the name of a guest that is to move, or the spec of one to be created"))
    if request.guest and (said := name_error(request.guest)):
        bad.append(("guest", said))
    if request.host and (said := name_error(request.host)):
        bad.append(("host", said))
    if request.page_token and name_error(request.page_token):
        bad.append(
            ("page_token", f"must be the next_page_token of an earlier answer, not {quoted(request.page_token)}")
        )
    if bad:
        raise invalid(bad)
    return None if request.guest else need_for(checked(pb.CreateGuestRequest(spec=request.spec)))


def answer(request: pb.CheckPlacementRequest, hosts: Sequence[HostView], need: Need) -> pb.CheckPlacementResponse:
    """The choice over all hosts, and one page of the verdicts."""
    choice = choose(hosts, need, wanted=request.host, every=True)
    if choice.reason is RefusalReason.NOT_FOUND:
        raise not_found("host", request.host, field="host")
    others = [verdict for verdict in choice.verdicts if request.host or verdict.host != need.source]
    rest = [verdict for verdict in others if verdict.host > request.page_token]
    size = request.page_size if 0 < request.page_size <= MAX_LISTED else MAX_LISTED
    page = rest[:size]
    return pb.CheckPlacementResponse(
        destination=choice.destination.host if choice.destination is not None else "",
        reason=choice.reason or "",
        message=choice.message,
        reasons={reason.value: count for reason, count in obstacles(choice.verdicts).items()},
        verdicts=[_line(verdict) for verdict in page],
        next_page_token=page[-1].host if len(rest) > size else "",
    )


def _line(verdict: Verdict) -> pb.HostVerdict:
    return pb.HostVerdict(
        host=verdict.host,
        eligible=verdict.eligible,
        memory_free_mib=max(0, verdict.free_mib),
        reason=verdict.reason or "",
        message=clip(verdict.message, MAX_MESSAGE),
        passing=verdict.passing,
    )
