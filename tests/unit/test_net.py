"""The net shim's decisions: addresses, segments, and what the VMM is told."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.engine.base import Segment, VmmSpec
from agents.engine.boot_images import Images
from agents.engine.qemu.process import Launch, command_line
from agents.shims.net import mac_address, nics, segment_of
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind

DEVICES = (DeviceSpec("dpu", ShimKind.COMPANION), DeviceSpec("lan", ShimKind.NET), DeviceSpec("wan", ShimKind.NET))


@given(st.uuids(), st.text(min_size=1, max_size=20))
def test_mac_addresses_are_locally_administered_and_of_one_card(guest: uuid.UUID, device: str) -> None:
    mac = mac_address(str(guest), device)
    assert len(mac) == 17
    assert int(mac[:2], 16) & 3 == 2
    assert mac == mac_address(str(guest), device)


def test_cards_of_thousands_of_guests_differ() -> None:
    macs = {mac_address(f"guest-{n}", device) for n in range(5000) for device in ("lan", "wan")}
    assert len(macs) == 10_000


def test_a_cluster_has_one_segment_and_another_cluster_another() -> None:
    ours = [segment_of("10.0.0.1:2181/drover", f"10.0.0.{n}") for n in (2, 3)]
    assert [segment.host_address for segment in ours if segment] == ["10.0.0.2", "10.0.0.3"]
    assert len({(segment.group, segment.port) for segment in ours if segment}) == 1
    other = segment_of("10.0.0.9:2181/drover", "10.0.0.2")
    assert other is not None
    assert ours[0] is not None
    assert (other.group, other.port) != (ours[0].group, ours[0].port)
    assert ours[0].group.startswith("239.192.")


@pytest.mark.parametrize("address", ["127.0.0.11", "localhost", "::1", "fd00::5"])
def test_there_is_no_segment_where_it_would_leave_the_cluster(address: str) -> None:
    assert segment_of("zk", address) is None


@pytest.mark.parametrize(
    ("segment", "backend"),
    [
        (Segment("239.192.1.2", 20_001, "10.0.0.2"), "socket,id=net{},mcast=239.192.1.2:20001,localaddr=10.0.0.2"),
        (None, "hubport,id=net{},hubid=0"),
    ],
)
def test_the_vmm_gets_each_card_once(segment: Segment | None, backend: str) -> None:
    cards = nics("guest-1", DEVICES)
    launch = Launch("q", Images(Path(__file__)), "tcg", True)
    spec = VmmSpec("guest-1", "s", GuestSpec("g", devices=DEVICES), Path("/x"), Path("/x/con"), None)
    assert "-netdev" not in command_line(launch, spec, incoming=False)
    with_cards = VmmSpec("guest-1", "s", spec.spec, Path("/x"), Path("/x/con"), None, nics=cards, segment=segment)
    line = command_line(launch, with_cards, incoming=True)
    told = [line[n + 1] for n, word in enumerate(line) if word in ("-netdev", "-device")]
    assert [card.device for card in cards] == ["lan", "wan"]
    assert told == [
        word
        for n, card in enumerate(cards)
        for word in (backend.format(n), f"virtio-net-pci,id=nic{n},netdev=net{n},mac={card.mac},romfile=")
    ]
