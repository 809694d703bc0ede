"""The agent's configuration file: what is refused, and how that is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agents.config import AgentConfig, ConfigError, load
from agents.host import addresses
from orchestrator.core.errors import DroverError, RefusalReason

SOUND = {
    "host": "h1",
    "address": "192.0.2.7",
    "zookeeper": "192.0.2.1:2181",
    "dir": "/d",
    "console_dir": "/c",
    "volatile_dir": "/v",
    "memory_mib": 1024,
    "guest_image": "/g",
}


def loaded(tmp_path: Path, **changes: object) -> str:
    """What is wrong; empty when it is sound."""
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(SOUND | {"device_program": ["x"]} | changes))
    try:
        load(file)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["h1", "node-1", "a" * 63])
def test_names_that_the_api_can_address(tmp_path: Path, name: str) -> None:
    assert loaded(tmp_path, host=name) == ""


@pytest.mark.parametrize("name", ["Node1", "a.b", "a/b", "хост", "", "-a", "a-", "a" * 64, "a_b"])
def test_other_names_are_refused_with_what_is_allowed(tmp_path: Path, name: str) -> None:
    """Placement filled such a host by itself, and nobody could cordon or evacuate it."""
    said = loaded(tmp_path, host=name)
    assert "host: " in said
    assert "must be lower-case letters, digits and hyphens, 1 to 63 of them" in said


# --- addresses --------------------------------------------------------------------------------------------------------


def settled_of(tmp_path: Path, **changes: object) -> AgentConfig:
    file = tmp_path / "agent.json"
    file.write_text(json.dumps(SOUND | {"device_program": ["x"]} | changes))
    return addresses.settled(load(file))


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "[::]", "localhost", "127.0.0.1", "::1", "[::1]", "224.0.0.1"])
def test_addresses_that_lead_others_nowhere_are_refused(tmp_path: Path, address: str) -> None:
    """They registered, were LIVE, were chosen, and ended in PREPARE_TIMEOUT without a word about the address."""
    with pytest.raises(DroverError) as caught:
        settled_of(tmp_path, address=address)
    assert (caught.value.reason, caught.value.field) == (RefusalReason.INVALID_ARGUMENT, "address")


@pytest.mark.parametrize("key", ["control_port", "peer_port"])
@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_nobody_could_find_is_refused(tmp_path: Path, key: str, port: int) -> None:
    """Port 0 listened anywhere, and was registered as 0."""
    assert f"{key}: Input should be" in loaded(tmp_path, **{key: port})


def test_ports_are_there_once(tmp_path: Path) -> None:
    assert "control_port, peer_port and metrics_port must differ" in loaded(tmp_path, peer_port=7701)
    assert loaded(tmp_path, metrics_port=0) == "", "metrics need not be served"


def test_the_refusal_of_a_name_says_what_it_stands_for(tmp_path: Path) -> None:
    with pytest.raises(DroverError) as caught:
        settled_of(tmp_path, address="localhost")
    assert caught.value.message.startswith("localhost (here ")
    assert ") leads every host to itself: name the address that other hosts reach" in caught.value.message


def test_a_name_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DroverError, match="no name that can be looked up here"):
        settled_of(tmp_path, address="no-such-host.invalid")


@pytest.mark.parametrize(
    ("given", "address", "listen"),
    [
        ({"address": "192.0.2.7"}, "192.0.2.7", "192.0.2.7"),
        ({"address": "192.0.2.7", "listen": "0.0.0.0"}, "192.0.2.7", "0.0.0.0"),
        ({"address": "[2001:DB8::7]", "listen": "[::]"}, "2001:db8::7", "::"),
        ({"address": "2001:db8::7"}, "2001:db8::7", "2001:db8::7"),
        ({"address": "127.0.0.3", "allow_loopback": True}, "127.0.0.3", "127.0.0.3"),
        ({"address": "[::1]", "allow_loopback": True}, "::1", "::1"),
    ],
)
def test_addresses_are_settled_once(tmp_path: Path, given: dict[str, object], address: str, listen: str) -> None:
    found = settled_of(tmp_path, **given)
    assert (found.address, found.listen) == (address, listen)


def test_zookeeper_is_read_in_one_way_only(tmp_path: Path) -> None:
    assert settled_of(tmp_path, zookeeper="[::1]:2181,zk2").zookeeper == "[::1]:2181,zk2:2181"
    assert "zookeeper: " in loaded(tmp_path, zookeeper="::1:2181")
    assert "nothing listens at port 0" in loaded(tmp_path, zookeeper="zk1,zk2:0")


POOL = {"path": "/p", "kind": "local"}
BRIDGE = {"bridge": "br0"}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"pools": {"Fast": POOL}}, "pools.Fast"),
        ({"pools": {"fast": POOL | {"kind": "nfs"}}}, "pools.fast.kind"),
        ({"pools": {"fast": POOL | {"size": 1}}}, "pools.fast.size"),
        ({"pools": {"fast": POOL | {"locks": "no"}}}, "pools.fast.locks"),
        ({"networks": {"prod": {"bridge": "br0;reboot"}}}, "networks.prod.bridge"),
        ({"networks": {"prod": {"bridge": "b" * 16}}}, "networks.prod.bridge"),
        ({"networks": {"prod": BRIDGE | {"mtu": 99}}}, "networks.prod.mtu"),
        ({"firmware": {"uefi_code": "/c"}}, "firmware"),
        ({"extra_args_allowed": ["-device a b"]}, "extra_args_allowed.0"),
    ],
)
def test_what_guests_may_have_is_refused_by_its_key(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    assert f"{field}" in loaded(tmp_path, **changes)


def test_what_guests_may_have(tmp_path: Path) -> None:
    changes: dict[str, object] = {
        "pools": {"fast": POOL, "vg0": {"path": "/dev/vg0", "kind": "block", "fence": "pr", "locks": "none"}},
        "networks": {"prod": BRIDGE, "dmz": BRIDGE | {"kind": "ovs", "mtu": 9000}},
        "firmware": {"uefi_code": "/c", "uefi_vars": "/v", "bios": "/b"},
        "extra_args_allowed": ["-device virtio-rng-pci"],
    }
    assert loaded(tmp_path, **changes) == ""
