"""`drover doctor`: what of this host stands against its agent's configuration, and what to do about it.

It looks and changes nothing; the agent may run meanwhile, or not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from agents.config import FILE, AgentConfig, ConfigError
from orchestrator.config import DIRECTORY
from orchestrator.core.endpoint import zookeeper_servers

OLDEST_QEMU: tuple[int, int] = (8, 2)
OLDEST_ZOOKEEPER: tuple[int, int] = (3, 6)
LEAST_DESCRIPTORS = 16_384
_WAIT_S = 3.0
_MOST_BYTES = 16_384
_TMPFS = "tmpfs"


@dataclass(frozen=True, slots=True)
class Finding:
    """One look."""

    check: str
    """What was looked at: a word, or a key of the configuration."""
    ok: bool
    found: str
    do: str = ""
    """What to do when it is not as it should be."""


Check = Callable[[AgentConfig], Iterator[Finding]]


def _qemu(config: AgentConfig) -> Iterator[Finding]:
    for program in (config.qemu, "qemu-img", "qemu-storage-daemon"):
        path = shutil.which(program)
        if path is None:
            yield Finding("qemu", False, f"there is no program {program}", "install qemu-system-x86 and qemu-utils")
            continue
        said = ""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
        number = re.search(r"version (\d+)\.(\d+)", said)
        version: tuple[int, int] = (int(number[1]), int(number[2])) if number else (0, 0)
        shown = f"{path} is of version {version[0]}.{version[1]}" if number else f"{path} does not say its version"
        yield Finding("qemu", version >= OLDEST_QEMU, shown, "install QEMU 8.2 or later (Debian 12: from backports)")


def _accelerator(config: AgentConfig) -> Iterator[Finding]:
    if config.accelerator == "tcg":
        yield Finding("accelerator", True, "tcg: guests run without virtualization in hardware, slowly")
        return
    there = os.access("/dev/kvm", os.R_OK | os.W_OK)
    do = "switch virtualization on in the firmware and load kvm_intel or kvm_amd, or configure `accelerator: tcg`"
    yield Finding("accelerator", there, f"/dev/kvm {'can' if there else 'cannot'} be used", do)


def _memory(config: AgentConfig) -> Iterator[Finding]:
    known = dict(re.findall(r"^(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total_mib = int(known["MemTotal"]) // 1024
    do = f"configure memory_mib below {total_mib}, and leave room for the host itself"
    yield Finding(
        "memory_mib", config.memory_mib < total_mib, f"{config.memory_mib} of {total_mib} MiB are for guests", do
    )
    pages, size_kib = int(known.get("HugePages_Total", 0)), int(known.get("Hugepagesize", 0))
    yield Finding("huge pages", True, f"{pages} of {size_kib} KiB")


def _directories(config: AgentConfig) -> Iterator[Finding]:
    kinds = _mounts()
    for key, path in (("dir", config.dir), ("console_dir", config.console_dir), ("volatile_dir", config.volatile_dir)):
        there = path.is_dir() and os.access(path, os.W_OK)
        yield Finding(key, there, f"{path} {'can' if there else 'cannot'} be written to", f"mkdir -p {path}")
    kind = _kind_of(config.volatile_dir, kinds)
    yield Finding(
        "volatile_dir", kind == _TMPFS, f"{config.volatile_dir} is in a {kind}", "name a directory below /run"
    )
    if config.images is not None:
        there = config.images.is_dir()
        yield Finding("images", there, f"{config.images} is {'' if there else 'no '}directory", "put the images there")


def _mounts() -> list[tuple[str, str]]:
    """Place and kind of each file system, the longest place first."""
    rows = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted(((row[1], row[2]) for row in rows), key=lambda row: -len(row[0]))


def _kind_of(path: Path, mounts: list[tuple[str, str]]) -> str:
    real = path.resolve()
    return next((kind for place, kind in mounts if real.is_relative_to(place)), "unknown")


def _pools(config: AgentConfig) -> Iterator[Finding]:
    for name, pool in config.pools.items():
        there = pool.path.is_dir()
        found = f"{pool.path} is {'' if there else 'no '}directory"
        yield Finding(f"pools.{name}", there, found, f"mount the pool at {pool.path}, or mend its path")


def _networks(config: AgentConfig) -> Iterator[Finding]:
    for name, network in config.networks.items():
        device = Path("/sys/class/net") / network.bridge
        if network.kind.value == "bridge" and not (device / "bridge").is_dir():
            yield Finding(
                f"networks.{name}", False, f"{network.bridge} is no bridge of this host", "make it, or mend it"
            )
            continue
        with contextlib.suppress(OSError):
            mtu = int((device / "mtu").read_text())
            do = f"ip link set {network.bridge} mtu {network.mtu}, or configure mtu: {mtu}"
            yield Finding(f"networks.{name}", mtu == network.mtu, f"{network.bridge} has an MTU of {mtu}", do)


def _zookeeper(config: AgentConfig) -> Iterator[Finding]:
    """That each server listens, and that together they are one ensemble with a leader."""
    modes: dict[str, str] = {}
    for server in zookeeper_servers(config.zookeeper).split(","):
        host, _, port = server.rpartition(":")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_WAIT_S) as connection:
                said = _srvr(connection)
        except OSError as error:
            do = "start it, let the firewall pass it, or mend `zookeeper`"
            yield Finding("zookeeper", False, f"{server}: {error.strerror or error}", do)
            continue
        modes[server] = mode_of(said)
        version, old = version_of(said)
        shown = f"{server} listens" + (f", ZooKeeper {version}" if version else "")
        yield Finding("zookeeper", not old, shown, "install ZooKeeper 3.6 or later")
    if modes:
        yield quorum(modes)


def _srvr(connection: socket.socket) -> str:
    """What the server says of itself: nothing, where it speaks TLS or its operator does not let it."""
    connection.settimeout(_WAIT_S)
    said = b""
    with contextlib.suppress(OSError):
        connection.sendall(b"srvr")
        while len(said) < _MOST_BYTES and (more := connection.recv(4096)):
            said += more
    return said.decode(errors="replace")


def mode_of(said: str) -> str:
    """leader, follower, observer or standalone; "" where it was not said, `unready` where it belongs to no quorum."""
    if "not currently serving requests" in said:
        return "unready"
    found = re.search(r"^Mode: (\w+)", said, re.MULTILINE)
    return found[1] if found else ""


def version_of(said: str) -> tuple[str, bool]:
    """Its version, and whether that is too old for Drover."""
    found = re.search(r"^Zookeeper version: ((\d+)\.(\d+)[.\d]*)", said, re.MULTILINE)
    return (found[1], (int(found[2]), int(found[3])) < OLDEST_ZOOKEEPER) if found else ("", False)


def quorum(modes: Mapping[str, str]) -> Finding:
    """Whether the servers that listen are one ensemble. A server that says nothing of itself is not held against it."""
    named = {mode: sorted(server for server, one in modes.items() if one == mode) for mode in set(modes.values())}
    if named.get("unready"):
        do = "start the other servers: more than half of those that zoo.cfg names must run"
        return Finding("quorum", False, f"{', '.join(named['unready'])}: in no quorum", do)
    alone, leaders = named.get("standalone", []), named.get("leader", [])
    if alone and len(modes) > 1:
        do = "name all servers in each zoo.cfg (`server.1=...`) and in `zookeeper` those of one ensemble alone"
        return Finding("quorum", False, f"{', '.join(alone)}: an ensemble of its own each", do)
    if len(leaders) > 1:
        do = "name the servers of one ensemble alone in `zookeeper`"
        return Finding("quorum", False, f"{', '.join(leaders)} lead: they are of several ensembles", do)
    if alone:
        return Finding("quorum", True, f"{alone[0]} stands alone: nothing goes on while it is down")
    if leaders:
        return Finding("quorum", True, f"{leaders[0]} leads")
    return Finding("quorum", True, "no server that answers says that it leads")


def _descriptors(_: AgentConfig) -> Iterator[Finding]:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    many = hard == resource.RLIM_INFINITY or hard >= LEAST_DESCRIPTORS
    do = "the packages' unit has LimitNOFILE=65536; elsewhere raise the hard limit of whoever starts the agent"
    yield Finding("descriptors", many, f"at most {hard} files may be open here", do)


def _clock(_: AgentConfig) -> Iterator[Finding]:
    said = ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["timedatectl", "show", "-p", "NTPSynchronized", "--value"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    if said:
        do = "run systemd-timesyncd or chrony: certificates and logs need clocks that agree"
        yield Finding("clock", said == "yes", f"synchronized: {said}", do)


CHECKS: tuple[Check, ...] = (
    _qemu,
    _accelerator,
    _memory,
    _directories,
    _pools,
    _networks,
    _zookeeper,
    _descriptors,
    _clock,
)


def examine(config: AgentConfig) -> list[Finding]:
    """Everything that was looked at, in order. A look that fails is a finding."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(config)
        except (OSError, ValueError, KeyError) as error:
            found.append(Finding(check.__name__.strip("_"), False, f"cannot be told: {error}", "look by hand"))
    return found


@click.command()
@click.option(
    "--host-config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DIRECTORY / "agent.yaml",
    show_default=True,
    help="The agent's configuration file on this host.",
)
@click.option("-o", "--output", "form", type=click.Choice(["table", "json"]), default="table", show_default=True)
def main(path: Path, form: str) -> None:
    """Say what of this host stands against running its agent, and what to do.

    Exit code 0: nothing, 1: something, 2: the file cannot be used.
    """
    try:
        findings = examine(FILE.load(path))
    except ConfigError as error:
        click.echo(f"drover: {error}", err=True)
        sys.exit(2)
    if form == "json":
        click.echo(json.dumps([asdict(each) for each in findings], indent=2))
    else:
        for each in findings:
            click.echo(f"{'ok  ' if each.ok else 'BAD '} {each.check}: {each.found}")
            if not each.ok:
                click.echo(f"     {each.do}")
    sys.exit(any(not each.ok for each in findings))


if __name__ == "__main__":
    main()
