"""What is said of taps to `ip` and `ovs-vsctl`, and which of them nobody owns."""

from __future__ import annotations

import pytest

from agents.nets.ports import (
    MAX_NAME_BYTES,
    MAX_PORTS,
    Link,
    Owner,
    Port,
    left_over,
    links_of,
    make_lines,
    obstacle,
    ovs_add,
    ovs_bind,
    ovs_remove,
    remove_lines,
    tap_name,
)

OWNER = Owner("0a1b2c3d4e5f", "1f2e3d4c-0000-4000-8000-000000000000", "00112233445566aa")
PORT = Port("eth0", tap_name(OWNER.inc, 0), "br0", "52:54:00:12:34:56", 1500)
OVS = Port("eth0", tap_name(OWNER.inc, 0), "br-int", "52:54:00:12:34:56", 1500, ovs=True)


def test_names_fit_the_kernel_and_differ_by_copy_and_card() -> None:
    names = {tap_name(inc, number) for inc in ("00112233445566aa", "f0112233445566aa") for number in range(MAX_PORTS)}
    assert len(names) == 2 * MAX_PORTS
    assert max(len(name) for name in names) <= MAX_NAME_BYTES
    with pytest.raises(ValueError, match="at most 16"):
        tap_name(OWNER.inc, MAX_PORTS)


def test_a_tap_is_marked_before_anything_else_and_up_at_the_end() -> None:
    lines = make_lines([PORT], OWNER)
    assert lines[0] == f"tuntap add dev {PORT.ifname} mode tap"
    assert lines[1] == f'link set dev {PORT.ifname} alias "{OWNER.alias}"'
    assert f"link set dev {PORT.ifname} master br0" in lines
    assert lines[-1] == f"link set dev {PORT.ifname} up"
    assert any("fe:54:00:12:34:56 mtu 1500" in line for line in lines)
    assert len(OWNER.alias) < 256


def test_several_queues_are_asked_for_when_the_tap_is_made() -> None:
    several = Port("eth0", "dv0-0", "br0", "52:54:00:00:00:01", 1500, queues=4)
    assert make_lines([several], OWNER)[0].endswith(" multi_queue")


def test_open_vswitch_gets_the_port_unbound_and_is_told_at_the_take_over() -> None:
    assert not any("master" in line for line in make_lines([OVS], OWNER))
    assert not any("iface-id" in word for word in ovs_add(OVS, OWNER))
    assert f'external_ids:iface-id="{OWNER.guest}.eth0"' in ovs_bind(OVS, OWNER)
    assert ovs_remove(["b", "a"]) == ["--if-exists", "del-port", "a", "--", "--if-exists", "del-port", "b"]


@pytest.mark.parametrize(
    ("links", "says"),
    [
        ([], "bridge br0, and there is none"),
        ([Link("br0", "", 1400, False)], "needs an MTU of 1500, and the bridge br0 of this host has 1400"),
        ([Link("br0", "", 9000, False)], ""),
    ],
)
def test_what_is_in_the_way(links: list[Link], says: str) -> None:
    found = obstacle([PORT], links)
    assert says in found
    assert bool(found) is bool(says)


def test_only_our_own_dead_taps_are_left_over() -> None:
    def link(name: str, alias: str, *, down: bool = True) -> Link:
        return Link(name, alias, 1500, down)

    other = Owner("ffffffffffff", OWNER.guest, OWNER.inc)
    kept = Owner(OWNER.root, OWNER.guest, "aaaaaaaaaaaaaaaa")
    links = [
        link("dv-left", OWNER.alias),
        link("dv-open", OWNER.alias, down=False),  # a process has it open, whoever that is
        link("dv-known", kept.alias),
        link("dv-others", other.alias),
        link("tap7", ""),
        link("tap8", "drover is not all of it"),
    ]
    assert left_over(links, OWNER.root, {kept.inc}) == ["dv-left"]
    assert remove_lines(["dv-left"]) == ["link del dev dv-left"]


def test_an_alias_says_whose_a_tap_is() -> None:
    assert Owner.of_alias(OWNER.alias) == OWNER
    assert Owner.of_alias("") is None
    assert Owner.of_alias("eth of the backup") is None


def test_what_ip_prints() -> None:
    told = [
        {"ifname": "lo", "mtu": 65536, "flags": ["LOOPBACK", "UP", "LOWER_UP"]},
        {},
        {"ifname": "x", "mtu": 9, "flags": ["NO-CARRIER", "UP"], "ifalias": "y"},
    ]
    assert links_of(told) == [Link("lo", "", 65536, False), Link("x", "y", 9, True)]
