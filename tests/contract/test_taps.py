"""Taps on the real kernel, in a network namespace of the test's own; with Open vSwitch where that is to be had."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import secrets
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agents.config import NetworkConfig
from agents.engine.base import EngineError, Tap, VmmSpec
from agents.guest import copies
from agents.guest.files import GuestFiles
from agents.host import commands
from agents.nets import taps
from agents.nets.ports import Owner, Port, tap_name
from agents.nets.taps import NetsError, NetworkNotFound, Taps
from deploy.lab.cluster import network
from orchestrator.core.records import GuestSpec, NicSpec
from tests.fakes.config import agent_config
from tests.fakes.engine import FakeEngine, FakeVmm

GUEST = "1f2e3d4c-0000-4000-8000-000000000000"
ROOT = "0a1b2c3d4e5f"
MAC = "52:54:00:12:34:56"


def ip(namespace: str, *words: str) -> str:
    return subprocess.run(
        ["ip", "-n", namespace, *words], check=True, capture_output=True, text=True, timeout=10
    ).stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"drtap{secrets.token_hex(3)}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        ip(name, "link", "add", "br0", "type", "bridge")
        ip(name, "link", "set", "br0", "up")
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False, timeout=10)


@pytest.fixture(autouse=True)
def inside(namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The agent lives in its host's namespace; the test's programs are put there."""
    real = asyncio.create_subprocess_exec

    async def there(*command: str, **options: object) -> asyncio.subprocess.Process:
        return await real(*network.command_in(namespace, command), **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(commands.asyncio, "create_subprocess_exec", there)
    yield
    for link in json.loads(ip(namespace, "-json", "link", "show")):
        if link["ifname"].startswith("dv"):
            ip(namespace, "link", "del", link["ifname"])


def owner(inc: str) -> Owner:
    return Owner(ROOT, GUEST, inc)


def one(inc: str, *, bridge: str = "br0", mtu: int = 1500, queues: int = 1) -> Taps:
    return Taps(owner(inc), [Port("eth0", tap_name(inc, 0), bridge, MAC, mtu, queues)])


def seen(namespace: str, name: str) -> dict[str, object] | None:
    links = json.loads(ip(namespace, "-json", "-d", "link", "show"))
    return next((link for link in links if link["ifname"] == name), None)


class Held:
    """A process that has a tap open, as QEMU does."""

    def __init__(self, namespace: str, name: str, flags: int = 0) -> None:
        def take() -> int:
            network.enter(namespace)
            device = os.open("/dev/net/tun", os.O_RDWR)
            fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", name.encode(), 0x1002 | flags))  # TUNSETIFF
            return device

        with ThreadPoolExecutor(1) as thread:
            self.device = thread.submit(take).result()

    def close(self) -> None:
        os.close(self.device)


async def test_a_tap_is_in_its_bridge_from_the_start(namespace: str) -> None:
    made = one("00112233445566aa", mtu=1400, queues=2)
    await made.make()
    link = seen(namespace, tap_name("00112233445566aa", 0))
    assert link is not None
    assert (link["master"], link["mtu"], link["ifalias"]) == ("br0", 1400, owner("00112233445566aa").alias)
    assert link["address"] == "fe:54:00:12:34:56"
    assert "inet6" not in ip(namespace, "address", "show", "dev", tap_name("00112233445566aa", 0))
    held = Held(namespace, tap_name("00112233445566aa", 0), flags=0x0100)  # several queues
    held.close()
    await made.remove()
    await made.remove()
    assert seen(namespace, tap_name("00112233445566aa", 0)) is None


async def test_two_copies_of_a_guest_have_a_tap_each(namespace: str) -> None:
    source, destination = one("00112233445566aa"), one("f0112233445566aa")
    await source.make()
    await destination.make()
    await source.remove()
    assert seen(namespace, tap_name("f0112233445566aa", 0)) is not None
    await destination.remove()


@pytest.mark.parametrize(
    ("bridge", "mtu", "says"),
    [("br7", 1500, "there is none on this host"), ("br0", 9000, "needs an MTU of 9000")],
)
async def test_what_cannot_be_made_leaves_nothing(namespace: str, bridge: str, mtu: int, says: str) -> None:
    with pytest.raises(NetsError, match=says):
        await one("00112233445566aa", bridge=bridge, mtu=mtu).make()
    assert seen(namespace, tap_name("00112233445566aa", 0)) is None


async def test_half_of_the_taps_is_none_of_them(namespace: str) -> None:
    inc = "00112233445566aa"
    wanted = [Port(f"eth{n}", tap_name(inc, n), "br0", MAC, 1500) for n in range(2)]
    ip(namespace, "tuntap", "add", "dev", wanted[1].ifname, "mode", "tap")
    held = Held(namespace, wanted[1].ifname)  # so the second cannot be made
    try:
        with pytest.raises(NetsError):
            await Taps(owner(inc), wanted).make()
    finally:
        held.close()
    assert seen(namespace, wanted[0].ifname) is None


async def test_what_a_killed_agent_left_is_found_by_its_alias(namespace: str) -> None:
    for inc in ("00000000000000aa", "10000000000000bb", "20000000000000cc"):
        await one(inc).make()
    other = Taps(Owner("ffffffffffff", GUEST, "30000000000000dd"), [Port("eth0", "dvother-0", "br0", MAC, 1500)])
    await other.make()
    alive = Held(namespace, tap_name("20000000000000cc", 0))
    try:
        assert await taps.sweep(ROOT, {"10000000000000bb"}) == [tap_name("00000000000000aa", 0)]
        assert await taps.sweep(ROOT, set()) == [tap_name("10000000000000bb", 0)]
    finally:
        alive.close()
    assert await taps.sweep(ROOT, set()) == [tap_name("20000000000000cc", 0)]
    assert seen(namespace, "dvother-0") is not None


async def test_a_program_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "COMMAND_S", 0.2)
    with pytest.raises(NetsError, match=r"sleep did not end within 0\.2 s"):
        await taps._run("sleep", "60")


# --- with a copy's VMM ------------------------------------------------------------------------------------------------


def files_of(directory: Path, network_name: str = "lab") -> GuestFiles:
    networks = {"lab": NetworkConfig(bridge="br0", mtu=1450)}
    spec = GuestSpec("g", nics=(NicSpec("eth0", network_name),))
    return GuestFiles(agent_config(directory).model_copy(update={"networks": networks}), GUEST, spec)


async def test_a_copy_has_its_tap_for_as_long_as_its_vmm(namespace: str, tmp_path: Path) -> None:
    engine, files = FakeEngine(), files_of(tmp_path)
    source = await copies.start(engine, files, "00112233445566aa")
    arriving = await copies.prepare(engine, files, "f0112233445566aa", "m", 1, 0)
    names = [tap_name(copy.inc, 0) for copy in (source, arriving)]
    links = [seen(namespace, name) for name in names]
    assert all(link is not None and (link["master"], link["mtu"]) == ("br0", 1450) for link in links)
    assert files.vmm_spec(source.inc).taps == (Tap("eth0", names[0]),)
    await source.destroy()
    await source.destroy()
    assert [seen(namespace, name) is None for name in names] == [True, False]
    await arriving.destroy()
    assert seen(namespace, names[1]) is None


async def test_a_vmm_that_does_not_start_leaves_no_tap(namespace: str, tmp_path: Path) -> None:
    class Broken(FakeEngine):
        async def start(self, spec: VmmSpec) -> FakeVmm:
            assert seen(namespace, spec.taps[0].ifname) is not None  # there before it
            raise EngineError("no such machine")

    with pytest.raises(EngineError):
        await copies.start(Broken(), files_of(tmp_path), "00112233445566aa")
    assert seen(namespace, tap_name("00112233445566aa", 0)) is None


async def test_a_network_that_the_host_does_not_have_is_said_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(NetworkNotFound, match="is in the network prod, which the configuration of this host"):
        await copies.start(FakeEngine(), files_of(tmp_path, "prod"), "00112233445566aa")


async def test_the_tap_of_a_vmm_that_died_between_two_agents_goes_with_it(namespace: str, tmp_path: Path) -> None:
    engine, files = FakeEngine(), files_of(tmp_path)
    copy = await copies.start(engine, files, "00112233445566aa")
    metadata = copy.vmm.metadata
    await copy.vmm.destroy()
    assert seen(namespace, tap_name(copy.inc, 0)) is not None
    assert await copies.adopt(engine, files, metadata) is None
    assert seen(namespace, tap_name(copy.inc, 0)) is None
