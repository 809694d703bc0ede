"""The verdicts of a placement as an answer: bounded however many hosts there are, and however much they say."""

from orchestrator.api import placements
from orchestrator.core.ids import HostRef
from orchestrator.core.placement import HostView, Need
from protos.drover.v1 import orchestrator_pb2 as pb

DEFAULT_MESSAGE_BYTES = 4 * 1024 * 1024
"""What a gRPC client takes unless it is told otherwise."""


def fleet(size: int) -> list[HostView]:
    return [
        HostView(
            HostRef(f"{'h' * 57}-{number:05}", "boot"),
            memory_mib=64,
            cordoned=bool(number % 2),
            cordon_reason="w" * 1_024,
            machine_types=tuple(f"pc-i440fx-{minor}.0" for minor in range(30)),
        )
        for number in range(size)
    ]


def test_every_host_has_its_verdict_in_one_answer_of_500() -> None:
    found = placements.answer(pb.CheckPlacementRequest(guest="g"), fleet(500), Need("u", "g" * 63, "h0", 128))
    assert len(found.verdicts) == 500
    assert found.next_page_token == ""
    assert dict(found.reasons) == {"HOST_CORDONED": 250, "NO_CAPACITY": 250}
    assert found.ByteSize() < DEFAULT_MESSAGE_BYTES / 8


def test_a_full_page_fits_into_a_message_whatever_hosts_say() -> None:
    need = Need("u", "g" * 63, "h0", 128, machine="m" * 4_000, drivers=("d" * 4_000,))
    request = pb.CheckPlacementRequest(guest="g", page_size=10**6)
    names: list[str] = []
    while True:
        found = placements.answer(request, fleet(2_500), need)
        assert found.ByteSize() < DEFAULT_MESSAGE_BYTES / 4
        names += [verdict.host for verdict in found.verdicts]
        if not found.next_page_token:
            break
        request.page_token = found.next_page_token
    assert names == sorted(set(names))
    assert len(names) == 2_500
