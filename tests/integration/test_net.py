"""A guest moves between two hosts, and the segment learns from its card where it is now."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agents.engine.base import EngineStatus, HoldStart, OutgoingOptions, RunState, Segment, Vmm, VmmSpec, stream_of
from agents.engine.qemu.engine import QemuEngine
from agents.shims.net import mac_address, nics, segment_of
from deploy.lab.cluster.network import enter
from deploy.lab.workload import Workload, boot_of
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from tests.contract.test_engine import image, no_qemu, until

DEVICES = (DeviceSpec("lan", ShimKind.NET),)
GUEST = "guest-1"
LISTENER = """
import socket, sys
group, port, address = sys.argv[1:]
heard = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
heard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
heard.bind((group, int(port)))
heard.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, socket.inet_aton(group) + socket.inet_aton(address))
print("ready", flush=True)
while True:
    frame, sender = heard.recvfrom(2048)
    print(sender[0], frame.hex(), flush=True)
"""


def obstacle() -> str:
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return "needs root, iproute2 and util-linux: namespaces of its own"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False, timeout=10)
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.decode().strip()}"


pytestmark = [pytest.mark.qemu, no_qemu]
needs_namespaces = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


@dataclass
class Host:
    """A namespace with one address on the bridge. It lives as long as its process."""

    keeper: subprocess.Popen[bytes]
    address: str

    def enter(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.keeper.pid}/ns/net", "--", *command]

    def run(self, command: str) -> None:
        subprocess.run(self.enter(*command.split()), check=True, capture_output=True, timeout=10)


@dataclass
class Lab:
    """Two hosts on a bridge in a third namespace; nothing of it has a name outside, so nothing can be left behind."""

    directory: Path
    hosts: list[Host] = field(default_factory=list[Host])
    vmms: list[Vmm] = field(default_factory=list[Vmm])
    listeners: list[asyncio.subprocess.Process] = field(default_factory=list[asyncio.subprocess.Process])

    def add_host(self, address: str) -> Host:
        keeper = subprocess.Popen(["unshare", "--net", "sleep", "120"])
        host = Host(keeper, address)
        self.hosts.append(host)
        own = Path("/proc/self/ns/net").readlink()
        end = time.monotonic() + 5
        while Path(f"/proc/{keeper.pid}/ns/net").readlink() == own:
            assert time.monotonic() < end, "the namespace was not made"
            time.sleep(0.01)
        host.run("ip link set lo up")
        return host

    def plug(self, switch: Host, host: Host) -> None:
        number = host.address.rpartition(".")[2]
        switch.run(f"ip link add p{number} type veth peer name eth0 netns {host.keeper.pid}")
        switch.run(f"ip link set p{number} master br0 up")
        host.run(f"ip addr add {host.address}/24 dev eth0")
        host.run("ip link set eth0 up")

    def engine(self, host: Host) -> QemuEngine:
        """QEMU inside the host's namespace; nsenter executes it in its own place, so the pid is QEMU's."""
        wrapper = self.directory / f"qemu-{host.address}"
        wrapper.write_text(f'#!/bin/sh\nexec {" ".join(host.enter("qemu-system-x86_64"))} "$@"\n')
        wrapper.chmod(0o755)
        return QemuEngine(image(), binary=str(wrapper))

    def spec(self, inc: str, address: str) -> VmmSpec:
        boot = boot_of(Workload(dirty_mib=1, dirty_pages_per_s=100), seed=0)
        guest = GuestSpec("g", memory_mib=32, boot=boot, devices=DEVICES)
        return VmmSpec(
            GUEST,
            inc,
            guest,
            self.directory,
            self.directory / f"{inc}.con",
            None,
            address,
            nics=nics(GUEST, DEVICES),
            segment=segment_of("test", address),
        )

    async def listen(self, host: Host, segment: Segment) -> asyncio.StreamReader:
        command = host.enter(sys.executable, "-c", LISTENER, segment.group, str(segment.port), host.address)
        listener = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        self.listeners.append(listener)
        assert listener.stdout is not None
        async with asyncio.timeout(10):
            assert await listener.stdout.readline() == b"ready\n"
        return listener.stdout

    async def end(self) -> None:
        for vmm in self.vmms:
            await vmm.destroy()
        for listener in self.listeners:
            listener.kill()
            await listener.wait()
        for host in self.hosts:
            host.keeper.kill()
            host.keeper.wait(5)
        shutil.rmtree(self.directory)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    made = Lab(Path(tempfile.mkdtemp(prefix="dn-")))
    try:
        yield made
    finally:
        await made.end()


async def announced(heard: asyncio.StreamReader, mac: str, timeout_s: float = 5.0) -> str:
    """Address of the host from which a reverse ARP of this card came."""
    octets = mac.replace(":", "")
    async with asyncio.timeout(timeout_s):
        while True:
            sender, frame = (await heard.readline()).decode().split()
            reverse_arp = frame[24:28] == "8035"
            if frame[:12] == "f" * 12 and frame[12:24] == octets and reverse_arp and frame[44:56] == octets:
                return sender


@contextmanager
def agent_on(host: Host) -> Iterator[None]:
    """This thread is where the agent of that host would be, beside its VMMs: the stream is opened from there."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        enter(f"/proc/{host.keeper.pid}/ns/net")
        yield
    finally:
        enter(f"/proc/self/fd/{own}")
        os.close(own)


async def moved(source: Vmm, destination: Vmm, host: Host | None = None) -> None:
    with agent_on(host) if host is not None else nullcontext():
        await source.start_outgoing(OutgoingOptions(stream_of(destination.metadata), HoldStart.OPEN, 0, 1 << 30, 300))
    await until(source, lambda now: now.status is EngineStatus.PARKED)
    await source.proceed()
    await until(source, lambda now: now.run_state is RunState.SEALED)
    await until(destination, lambda now: now.run_state is RunState.PAUSED)
    await source.destroy()
    await destination.resume()
    await destination.announce()


@needs_namespaces
async def test_the_segment_hears_of_the_guest_from_its_new_host(lab: Lab) -> None:
    switch = lab.add_host("")
    switch.run("ip link add br0 type bridge")
    switch.run("ip link set br0 up")
    first, second = lab.add_host("10.78.0.11"), lab.add_host("10.78.0.12")
    for host in (first, second):
        lab.plug(switch, host)
    segment = segment_of("test", first.address)
    assert segment is not None
    mac = mac_address(GUEST, "lan")
    at_first, at_second = await lab.listen(first, segment), await lab.listen(second, segment)

    source = await lab.engine(first).start(lab.spec("s", first.address))
    lab.vmms.append(source)
    await source.announce()
    assert [await announced(heard, mac) for heard in (at_first, at_second)] == [first.address] * 2

    destination = await lab.engine(second).prepare_incoming(lab.spec("d", second.address), "m", 1)
    lab.vmms.append(destination)
    await moved(source, destination, first)
    async with asyncio.timeout(20):
        while await announced(at_first, mac) != second.address:  # those from before may still be queued
            pass


async def test_without_a_segment_the_card_is_there_and_the_guest_moves(lab: Lab) -> None:
    engine = QemuEngine(image())
    assert lab.spec("s", "127.0.0.1").segment is None
    source = await engine.start(lab.spec("s", "127.0.0.1"))
    lab.vmms.append(source)
    destination = await engine.prepare_incoming(lab.spec("d", "127.0.0.1"), "m", 1)
    lab.vmms.append(destination)
    await moved(source, destination)
    assert (await destination.state()).run_state is RunState.RUNNING
