"""The net shim: a guest's network card keeps its address, and the segment learns where the guest lives now.

The card's state travels in the engine's own stream. What is left to do is to give it the same MAC address at both ends,
and to announce it once the guest runs at the destination (`Vmm.announce`: reverse ARP from each card, as
switches expect it). In the local cluster the segment is UDP multicast between the VMMs, so it crosses namespaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from ipaddress import IPv4Address

from agents.engine.base import Nic, Segment
from orchestrator.core.records import DeviceSpec, ShimKind

_FIRST_PORT, _PORTS = 20_000, 10_000


def mac_address(guest: str, device: str) -> str:
    """Of one device of one guest (uuid), at whatever host: locally administered, not multicast."""
    octets = bytearray(blake2b(f"{guest}/{device}".encode(), digest_size=6).digest())
    octets[0] = octets[0] & 0xFC | 0x02
    return ":".join(f"{octet:02x}" for octet in octets)


def nics(guest: str, devices: Sequence[DeviceSpec]) -> tuple[Nic, ...]:
    """A card for each `net` device, in the order of the specification, which is their order on the bus."""
    return tuple(Nic(one.name, mac_address(guest, one.name)) for one in devices if one.shim == ShimKind.NET)


def segment_of(cluster: str, host_address: str) -> Segment | None:
    """The segment of a cluster, as seen from one of its hosts. None where multicast would leave the cluster.

    `cluster` is anything that all of its hosts share and other clusters do not, such as the ledger's address. Hosts
    that are loopback addresses have no segment: the kernel would look for the group on the machine's real network. Nor
    have hosts that are names or IPv6 addresses, since the engine wants an IPv4 address to send from.
    """
    try:
        if IPv4Address(host_address).is_loopback:
            return None
    except ValueError:
        return None
    digest = blake2b(cluster.encode(), digest_size=4).digest()
    port = _FIRST_PORT + int.from_bytes(digest[2:], "big") % _PORTS
    return Segment(f"239.192.{digest[0]}.{digest[1]}", port, host_address)
