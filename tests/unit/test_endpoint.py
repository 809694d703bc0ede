"""Addresses: what is one, how IPv6 is written, what others cannot reach, and what ZooKeeper's client is given."""

from __future__ import annotations

import pytest

from orchestrator.core.endpoint import (
    Endpoint,
    join_address,
    split_address,
    unreachable_by_others,
    zookeeper_servers,
)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("192.0.2.7:7701", Endpoint("192.0.2.7", 7701)),
        ("[2001:db8::7]:7701", Endpoint("2001:db8::7", 7701)),
        ("[2001:DB8:0:0::7]:7701", Endpoint("2001:db8::7", 7701)),
        ("[::ffff:192.0.2.7]:7701", Endpoint("192.0.2.7", 7701)),
    ],
)
def test_endpoints_are_read_and_written(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "exec:id:1", "tcp:192.0.2.7:1", "file:/etc/passwd", "unix:/run/q", "host-1:7701", "192.0.2.7", "192.0.2.7:0",
        "192.0.2.7:65536", "192.0.2.7:x", "192.0.2.7:-1", "2001:db8::7:7701", "[2001:db8::7]", "[fe80::1%eth0]:7701",
        "[host-1]:7701", "192.0.2.7:\u0661", "", ":1", "1.2.3:4",
    ],
)  # fmt: skip
def test_everything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"address|port|two ways|name"):
        Endpoint.parse(text)


def test_what_can_be_read_in_two_ways_says_what_to_write() -> None:
    with pytest.raises(ValueError, match=r"write \[::1\]:7701, or \[::1:7701\]:PORT"):
        split_address("::1:7701")
    assert split_address("host-1:0") == ("host-1", 0)
    assert join_address("::1", 7701) == join_address("[::1]", 7701) == "[::1]:7701"
    assert join_address("host-1", 7701) == "host-1:7701"


@pytest.mark.parametrize(
    "ip", ["0.0.0.0", "::", "127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1", "224.0.0.1", "ff02::1", "fe80::1"]
)
def test_addresses_that_no_other_host_reaches(ip: str) -> None:
    """They were registered, were chosen by placement, and ended in PREPARE_TIMEOUT."""
    assert unreachable_by_others(ip)


def test_addresses_that_others_reach() -> None:
    for ip in ("192.0.2.7", "10.0.0.1", "2001:db8::7", "fd00::1"):
        assert unreachable_by_others(ip) == ""
    assert unreachable_by_others("127.0.0.3", loopback=True) == unreachable_by_others("::1", loopback=True) == ""
    assert unreachable_by_others("0.0.0.0", loopback=True)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("zk1:2181", "zk1:2181"),
        ("zk1, zk2:2182", "zk1:2181,zk2:2182"),
        ("[::1]:2181", "[::1]:2181"),
        ("[fd00::1],[fd00::2]:2182", "[fd00::1]:2181,[fd00::2]:2182"),
        ("fd00::1,fd00::2", "[fd00::1]:2181,[fd00::2]:2181"),
    ],
)
def test_zookeeper_servers(given: str, taken: str) -> None:
    assert zookeeper_servers(given) == taken


@pytest.mark.parametrize("given", ["", "zk1:2181,", "::1:2181", "fd00::1:2182", "zk1:x", "[zk1]:2181", "zk1:2181/path"])
def test_zookeeper_servers_that_cannot_be_read(given: str) -> None:
    with pytest.raises(ValueError, match=r"missing|two ways|port|brackets|no IP"):
        zookeeper_servers(given)
