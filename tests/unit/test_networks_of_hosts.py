"""A guest's network cards find at its destination what they had at its source, or it is not moved there."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.config import NetworkConfig
from agents.guest.files import GuestFiles
from agents.handover.preflight import must_have_networks
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import GuestSpec, HostRecord, Network, NicSpec
from tests.fakes.config import agent_config


def files_at(directory: Path, **networks: NetworkConfig) -> GuestFiles:
    config = agent_config(directory).model_copy(update={"networks": networks})
    return GuestFiles(config, "g", GuestSpec("web", nics=(NicSpec("eth0", "prod"),)))


def source(*networks: Network) -> HostRecord:
    return HostRecord("s", "1", "127.0.0.1:1", "127.0.0.1:2", 1024, 1000, "10.0", networks=networks)


@pytest.mark.parametrize(
    ("mtu", "there", "says"),
    [
        (1500, (Network("prod", mtu=9000),), "an MTU of 1500 here and 9000 at its source: they must be equal"),
        (0, (Network("prod"),), "is in the network prod, which this host does not have"),
    ],
)
def test_what_would_hang_connections_is_refused_by_name(
    tmp_path: Path, mtu: int, there: tuple[Network, ...], says: str
) -> None:
    here = {"prod": NetworkConfig(bridge="br0", mtu=mtu)} if mtu else {}
    with pytest.raises(DroverError) as refused:
        must_have_networks(files_at(tmp_path, **here), source(*there))
    assert refused.value.reason is RefusalReason.NETWORK_NOT_FOUND
    assert says in str(refused.value)
    assert "eth0" in str(refused.value)


def test_equal_networks_are_fine_and_so_is_a_source_that_tells_none(tmp_path: Path) -> None:
    files = files_at(tmp_path, prod=NetworkConfig(bridge="br0", mtu=9000))
    must_have_networks(files, source(Network("prod", mtu=9000)))
    must_have_networks(files, source())
