"""Taps in a bridge of a real Open vSwitch (userspace datapath), in a network namespace of the test's own."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.nets import taps
from agents.nets.ports import Port, tap_name
from agents.nets.taps import Taps
from deploy.lab.cluster.network import command_in
from tests.contract.test_taps import MAC, ROOT, Held, inside, ip, namespace, owner, seen

__all__ = ["inside", "namespace"]

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "deploy" / "lab" / "openvswitch.sh"
TREE = REPOSITORY / "build" / "openvswitch"
PROGRAMS = ("ovs-vsctl", "ovs-vswitchd", "ovsdb-server", "ovsdb-tool")
BRIDGE = "ovs0"


@pytest.fixture(scope="module")
def programs() -> Path | None:
    """Where they are; None: they are installed."""
    if all(map(shutil.which, PROGRAMS)):
        return None
    made = subprocess.run([SCRIPT, str(TREE)], capture_output=True, text=True, timeout=150, check=False)
    if made.returncode == 69:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    return TREE / "bin"


@pytest.fixture(scope="module")
def switch(namespace: str, programs: Path | None) -> Iterator[None]:
    """Its database, its daemon and a bridge; `ovs-vsctl` finds them by itself."""
    directory = Path(tempfile.mkdtemp(prefix="ovs-"))
    before = dict(os.environ)
    if programs is not None:
        os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    os.environ |= dict.fromkeys(("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR"), str(directory))

    def run(*command: str) -> None:
        subprocess.run(
            command_in(namespace, command), check=True, timeout=30, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    try:
        schemas = [TREE / "root", Path("/")]
        schema = next(path for root in schemas if (path := root / "usr/share/openvswitch/vswitch.ovsschema").is_file())
        run("ovsdb-tool", "create", str(directory / "conf.db"), str(schema))
        database = [f"--remote=punix:{directory}/db.sock", "--pidfile", "--detach", "--log-file"]
        run("ovsdb-server", str(directory / "conf.db"), *database)
        run("ovs-vsctl", "--no-wait", "init")
        run("ovs-vswitchd", f"unix:{directory}/db.sock", "--pidfile", "--detach", "--log-file")
        run("ovs-vsctl", "-t", "20", "add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
        yield
    finally:
        for pidfile in directory.glob("*.pid"):
            os.kill(int(pidfile.read_text()), signal.SIGKILL)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(directory, ignore_errors=True)


def plugged(inc: str) -> tuple[str, Taps]:
    name = tap_name(inc, 0)
    return name, Taps(owner(inc), [Port("eth0", name, BRIDGE, MAC, 1500, ovs=True, network="vpc")])


async def ids_of(name: str) -> str:
    return await taps._run("ovs-vsctl", "-t", "4", "get", "Interface", name, "external_ids")


async def ports() -> list[str]:
    return (await taps._run("ovs-vsctl", "-t", "4", "list-ports", BRIDGE)).split()


async def test_a_port_is_bound_where_the_guest_runs_and_not_before(namespace: str, switch: None) -> None:
    name, made = plugged("00112233445566aa")
    await made.make()
    assert name in await ports()
    assert "iface-id" not in await ids_of(name)
    await made.bind()
    await made.bind()
    assert f'iface-id="{owner("").guest}.eth0"' in await ids_of(name)
    assert f'attached-mac="{MAC}"' in await ids_of(name)
    await made.remove()
    await made.remove()
    assert name not in await ports()
    assert seen(namespace, name) is None


async def test_frames_pass_from_one_guest_to_another(namespace: str, switch: None) -> None:
    (one, source), (other, destination) = plugged("00112233445566aa"), plugged("f0112233445566aa")
    await source.make()
    await destination.make()
    sends, hears = Held(namespace, one), Held(namespace, other)
    try:
        frame = b"\xff" * 6 + bytes.fromhex(MAC.replace(":", "")) + b"\x88\xb5" + b"drover".ljust(46, b"\0")
        end = time.monotonic() + 20
        heard: list[bytes] = []
        while frame not in heard:
            assert time.monotonic() < end, "no frame came through the bridge"
            os.write(sends.device, frame)
            if select.select([hears.device], [], [], 0.2)[0]:
                heard.append(os.read(hears.device, 2048))
    finally:
        sends.close()
        hears.close()
        await source.remove()
        await destination.remove()


async def test_what_a_killed_agent_left_in_the_switch_is_taken_out(namespace: str, switch: None) -> None:
    (dead, left), (known, kept), (gone, half) = map(plugged, ("0" * 16, "1" * 16, "2" * 16))
    for each in (left, kept, half):
        await each.make()
    ip(namespace, "link", "del", gone)  # the tap is gone already, its port is not
    assert await taps.sweep(ROOT, {"1" * 16}, ovs=True) == [dead]
    assert set(await ports()) & {dead, known, gone} == {known}
    await kept.remove()
