"""PURE. Where something listens: an IP address and a port, and nothing else that a program could be made to open.

IPv6 addresses stand in brackets wherever a port follows (`[2001:db8::7]:7701`) and may stand so where none does.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

_ZOOKEEPER_PORT = 2181


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An IP address in its canonical form and a TCP port. Raises ValueError for anything else: names are not looked up,
    and what an engine would take for a command (`exec:`) or a file cannot be said."""

    ip: str
    port: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "ip", str(parse_ip(self.ip)))
        if isinstance(self.port, bool) or not 1 <= self.port <= 65535:
            raise ValueError(f"a port is a number from 1 to 65535, not {self.port}")

    def __str__(self) -> str:
        return join_address(self.ip, self.port)

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Of `192.0.2.7:7701` or `[2001:db8::7]:7701`. Raises ValueError."""
        host, port = split_address(text)
        return cls(host, port)


def parse_ip(text: str) -> IPv4Address | IPv6Address:
    """With or without brackets; an IPv4 address that is mapped into IPv6 is that IPv4 address. Raises ValueError."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        found = ip_address(bare)
    except ValueError:
        raise ValueError(f"{text!r} is no IP address") from None
    if isinstance(found, IPv6Address) and found.scope_id:
        raise ValueError(f"{text!r} is an address on one link of one host (%{found.scope_id})")
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return mapped or found


def is_ip(text: str) -> bool:
    """Whether `parse_ip` takes it: a literal address, never a name."""
    try:
        parse_ip(text)
    except ValueError:
        return False
    return True


def is_loopback(text: str) -> bool:
    """Nobody outside this network namespace could connect to it. False for what is no address."""
    return is_ip(text) and parse_ip(text).is_loopback


def join_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets. The host may be a name."""
    bare = host.strip("[]")
    return f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Host (a name or an address without brackets) and port of `host:port`. Raises ValueError with what to write."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ValueError(f"{text!r} is no address with a port, such as 192.0.2.7:7701 or [2001:db8::7]:7701")
    if host.startswith("[") and host.endswith("]"):
        if not is_ip(host):
            raise ValueError(f"{host!r} is no IPv6 address in brackets")
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"{text!r} can be read in two ways: write [{host}]:{port}, or [{text}]:PORT")
    if not host or any(character in host for character in " /\\[]"):
        raise ValueError(f"{host!r} is no host name and no IP address")
    return host, int(port)


def unreachable_by_others(ip: str, *, loopback: bool = False, name: str = "") -> str:
    """Why other hosts cannot reach an agent at this address; empty when nothing says so.

    `loopback`: the whole cluster is on this machine. `name`: what was given, where the address was looked up.
    """
    address = parse_ip(ip)
    given = f"{name} (here {ip})" if name else ip
    if address.is_unspecified:
        return (
            f"{given} means every address of a host, so none that another host could connect to: name the one that "
            "others reach (what is listened at may be another: `listen`)"
        )
    if address.is_loopback and not loopback:
        return (
            f"{given} leads every host to itself: name the address that other hosts reach (`allow_loopback`, when the "
            "whole cluster is on one machine)"
        )
    if address.is_multicast or str(address) == "255.255.255.255":
        return f"{given} is the address of a group, not of a host"
    if address.is_link_local and isinstance(address, IPv6Address):
        return f"{given} is an address on one link only: name one that other hosts reach"
    return ""


def zookeeper_servers(text: str) -> str:
    """`host[:port],...` in the form that ZooKeeper's client takes, IPv6 with or without brackets.

    Raises ValueError for what cannot be read, or in two ways.
    """
    return ",".join(_zookeeper_server(each.strip()) for each in text.split(","))


def _zookeeper_server(text: str) -> str:
    server = _with_port(text)
    if server.endswith(":0"):
        raise ValueError(f"{text!r}: nothing listens at port 0")
    return server


def _with_port(text: str) -> str:
    if not text:
        raise ValueError("a ZooKeeper server is missing: host:port[,host:port...]")
    if ":" not in text or (text.startswith("[") and text.endswith("]")):
        return join_address(str(parse_ip(text)) if text.startswith("[") else text, _ZOOKEEPER_PORT)
    if text.count(":") > 1 and not text.startswith("["):
        last = text.rpartition(":")[2]
        if not is_ip(text) or (last.isdigit() and len(last) == 4):
            raise ValueError(f"{text!r} can be read in two ways: write [{text.rpartition(':')[0]}]:{last}")
        return join_address(text, _ZOOKEEPER_PORT)
    return join_address(*split_address(text))
