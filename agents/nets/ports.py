"""PURE. Where a guest's network cards meet the host: one tap per card and copy; what `ip` and `ovs-vsctl` are told.

A tap is in its host's bridge from the start, also at a destination that does not run yet: such a VMM sends no frame
before it runs, so it can steal no address, and nothing has to be plugged in the blackout (docs/networks.md).

Its name follows from the copy's `inc`, so two copies of one guest never share a tap. An alias says whose it is: what a
killed agent has left is found by it and removed by the next one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

MAX_NAME_BYTES = 15
"""What the kernel takes for the name of an interface."""
MAX_PORTS = 16
_PREFIX = "dv"
_INC_DIGITS = 11
_ALIAS = "drover"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose taps they are."""

    root: str
    """Names the agent's own directory: two agents may share a machine's interfaces."""
    guest: str
    """Uuid."""
    inc: str
    """Of the copy."""

    @property
    def alias(self) -> str:
        """As it is written on the interface."""
        return f"{_ALIAS} {self.root} {self.guest} {self.inc}"

    @classmethod
    def of_alias(cls, text: str) -> Owner | None:
        """None: it is none of ours."""
        words = text.split(" ")
        return cls(*words[1:]) if len(words) == 4 and words[0] == _ALIAS else None


@dataclass(frozen=True, slots=True)
class Port:
    """One card's place in a bridge of this host."""

    nic: str
    """In the guest's specification."""
    ifname: str
    bridge: str
    """Empty: this host has no such network."""
    mac: str
    """The guest's; the tap has another one."""
    mtu: int
    """Of the network on this host."""
    queues: int = 1
    ovs: bool = False
    """The bridge is one of Open vSwitch."""
    network: str = ""
    """As hosts call it."""
    card_mtu: int = 0
    """What the card tells the guest; 0: nothing."""


@dataclass(frozen=True, slots=True)
class Link:
    """An interface of this host."""

    name: str
    alias: str
    mtu: int
    is_down: bool
    """Nobody is at its other end: of a tap, no process has it open."""


def tap_name(inc: str, number: int) -> str:
    """Of a copy's card, counted from 0."""
    if not 0 <= number < MAX_PORTS:
        raise ValueError(f"a guest has at most {MAX_PORTS} network cards")
    return f"{_PREFIX}{inc[:_INC_DIGITS]}-{number:x}"


def tap_mac(mac: str) -> str:
    """The tap's own address: the highest there are, so that a bridge never takes it for its own."""
    return f"fe{mac[2:]}"


def make_lines(ports: Sequence[Port], owner: Owner) -> list[str]:
    """For `ip -batch`: taps that are up, silent, marked and, but for Open vSwitch, in their bridges."""
    lines: list[str] = []
    for port in ports:
        several = " multi_queue" if port.queues > 1 else ""
        lines.append(f"tuntap add dev {port.ifname} mode tap{several}")
        # Marked first: an agent that is killed here leaves a tap that its successor knows.
        lines.append(f'link set dev {port.ifname} alias "{owner.alias}"')
        # No address of its own, or the host would speak on the guest's network.
        lines.append(f"link set dev {port.ifname} addrgenmode none")
        lines.append(f"link set dev {port.ifname} address {tap_mac(port.mac)} mtu {port.mtu}")
        if not port.ovs:
            lines.append(f"link set dev {port.ifname} master {port.bridge}")
        lines.append(f"link set dev {port.ifname} up")
    return lines


def remove_lines(names: Collection[str]) -> list[str]:
    """For `ip -force -batch`: what is gone already is no error."""
    return [f"link del dev {name}" for name in sorted(names)]


def ovs_add(port: Port, owner: Owner) -> list[str]:
    """Arguments of `ovs-vsctl`: the port is there, marked, and bound to nobody."""
    marks = f"external_ids:{_ALIAS}={owner.root}"
    return ["--may-exist", "add-port", port.bridge, port.ifname, "--", "set", "Interface", port.ifname, marks]


def ovs_bind(port: Port, owner: Owner) -> list[str]:
    """Arguments of `ovs-vsctl`: whoever controls the bridge learns that the guest is behind this port now."""
    ids = {
        "iface-id": f"{owner.guest}.{port.nic}",
        "attached-mac": port.mac,
        "iface-status": "active",
        "vm-uuid": owner.guest,
    }
    return ["set", "Interface", port.ifname, *(f'external_ids:{key}="{value}"' for key, value in ids.items())]


def ovs_remove(names: Collection[str]) -> list[str]:
    """Arguments of `ovs-vsctl`; ports that are gone are no error."""
    return [word for name in sorted(names) for word in ("--", "--if-exists", "del-port", name)][1:]


def ovs_find(root: str) -> list[str]:
    """Arguments of `ovs-vsctl`: names of the ports of this agent, one a line."""
    return ["--bare", "--columns=name", "find", "Interface", f"external_ids:{_ALIAS}={root}"]


def links_of(told: Sequence[dict[str, Any]]) -> list[Link]:
    """What `ip -json link show` printed."""
    return [
        Link(
            str(each["ifname"]),
            str(each.get("ifalias", "")),
            int(each.get("mtu", 0)),
            "LOWER_UP" not in each.get("flags", []),
        )
        for each in told
        if "ifname" in each
    ]


def obstacle(ports: Sequence[Port], links: Sequence[Link]) -> str:
    """Why these ports cannot be made here, as a clause; empty: nothing is known to be in the way."""
    known = {link.name: link for link in links}
    for port in ports:
        card = f"network card {port.nic}"
        if not port.bridge:
            return f"{card} is in the network {port.network}, which the configuration of this host does not have"
        if port.card_mtu > port.mtu:
            said = f"{card} tells the guest an MTU of {port.card_mtu}"
            return f"{said}, and the network {port.network} has {port.mtu} on this host"
        if port.ovs:
            continue  # a bridge with a datapath of its own need not be an interface
        bridge = known.get(port.bridge)
        if bridge is None:
            return f"{card} is to be in the bridge {port.bridge}, and there is none on this host"
        if bridge.mtu < port.mtu:
            return f"{card} needs an MTU of {port.mtu}, and the bridge {port.bridge} of this host has {bridge.mtu}"
    return ""


def left_over(links: Sequence[Link], root: str, known: Collection[str]) -> list[str]:
    """Taps of this agent's that belong to no copy it knows (`inc`) and that no process has open."""
    owned = ((link, Owner.of_alias(link.alias)) for link in links)
    return [
        link.name
        for link, owner in owned
        if owner is not None and owner.root == root and owner.inc not in known and link.is_down
    ]
