"""Programs of the hosts hold a guest's device: it moves with the guest, asks late, and nothing of it is left behind."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.core.errors import DroverError
from orchestrator.core.errors import RefusalReason as R
from orchestrator.core.records import DeviceSpec, GuestSpec, ShimKind
from orchestrator.rpc import channels
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import shim_pb2 as pb
from protos.drover.v1.shim_pb2_grpc import ShimServiceStub
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory, until

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed"),
]

HOSTS = ("host-1", "host-2")
_TERMINAL = ("SUCCEEDED", "CANCELLED", "FAILED")


@dataclass
class Site:
    """A cluster, and a program for flow tables on each of its hosts."""

    cluster: Cluster
    client: OrchestratorClient
    sockets: Path

    def held(self, host: str) -> list[pb.DescribeResponse.Device]:
        with channels.channel(f"unix:{self.sockets / host}") as channel:
            return list(ShimServiceStub(channel).Describe(pb.DescribeRequest(), timeout=5).devices)

    def attach(self, host: str, tag: pb.DeviceTag) -> None:
        with channels.channel(f"unix:{self.sockets / host}") as channel:
            ShimServiceStub(channel).AttachDevice(pb.AttachDeviceRequest(tag=tag, call_id="by hand"), timeout=5)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    directory, sockets = short_directory(), short_directory()
    with ExitStack() as stack:
        for path in (directory, sockets):
            stack.callback(shutil.rmtree, path, ignore_errors=True)
        for host in HOSTS:
            command = [sys.executable, "-m", "deploy.lab.devices.flow_table", "--socket", str(sockets / host)]
            program = subprocess.Popen(command)
            stack.callback(program.wait)
            stack.callback(program.kill)
        until(lambda: all((sockets / host).exists() for host in HOSTS), 60)
        config = make_config(directory, hosts=len(HOSTS), shims={"flows": f"{sockets}/{{host}}"}, chaos=True)
        cluster = stack.enter_context(running_cluster(config))
        yield Site(cluster, stack.enter_context(OrchestratorClient(cluster.api)), sockets)


def guest(name: str, **options: object) -> GuestSpec:
    told = {option: str(value) for option, value in options.items()}
    device = DeviceSpec("table", ShimKind.EXTERNAL, driver="flows", options=told)
    return GuestSpec(name, memory_mib=32, devices=(device,))


def moved(site: Site, name: str, to: str) -> list[str]:
    """Outcome and reason of each attempt."""
    made = site.client.create_migration(name, to)
    until(lambda: wire.word(site.client.get_migration(made.name), "phase") in _TERMINAL, 60)
    return [f"{one.outcome} {one.reason}".strip() for one in site.client.get_migration(made.name).attempts]


def test_an_external_device_moves_with_its_guest_and_may_ask_late(site: Site) -> None:
    spec = guest("flows", flows=300, changes_per_s=200, asks_again_at="freeze", asks_again=2)
    site.client.create_guest(spec, "host-1")
    until(lambda: [one.live for one in site.held("host-1")] == [True], 60)
    assert moved(site, "flows", "host-2") == ["ABORTED LATE_SWITCHOVER_ACK"] * 2 + ["COMMITTED"]
    (there,) = site.held("host-2")
    assert (there.tag.device, there.state, there.live) == ("table", "RUNNING", True)
    until(lambda: site.held("host-1") == [], 60)
    assert moved(site, "flows", "host-1") == ["COMMITTED"]
    assert [one.live for one in site.held("host-1")] == [True]


def test_a_killed_agent_finds_its_devices_again_and_detaches_what_is_nobodys(site: Site) -> None:
    site.client.create_guest(guest("kept"), "host-1")
    stray = pb.DeviceTag(guest_uuid="00000000-0000-4000-8000-000000000000", inc="i1", device="table")
    site.attach("host-1", stray)
    before = {one.tag.guest_uuid for one in site.held("host-1")}
    assert stray.guest_uuid in before
    site.cluster.came_back("agent-host-1", site.cluster.kill("agent-host-1"), 40)
    assert {one.tag.guest_uuid for one in site.held("host-1")} == before - {stray.guest_uuid}
    assert moved(site, "kept", "host-2") == ["COMMITTED"]


def test_a_guest_whose_device_no_host_has_a_program_for_is_refused(site: Site) -> None:
    device = DeviceSpec("x", ShimKind.EXTERNAL, driver="nobody-has-it")
    with pytest.raises(DroverError) as caught:
        site.client.create_guest(GuestSpec("refused", memory_mib=32, devices=(device,)))
    assert "has no program for refused's devices of driver nobody-has-it" in str(caught.value)


def test_an_option_that_the_program_does_not_take_ends_the_creation_and_nothing_is_left(site: Site) -> None:
    held = site.held("host-1")
    with pytest.raises(DroverError) as caught:
        site.client.create_guest(guest("odd", flows="many", colour="red"), "host-1")
    assert (caught.value.reason, caught.value.field) == (R.INVALID_ARGUMENT, "spec.devices[0].options")
    assert "option flows must be a whole number from 0 to 1000000, not 'many'" in caught.value.message
    assert "there is no option 'colour'; there are flows, changes_per_s" in caught.value.message
    assert caught.value.message.startswith("device table: ")
    assert site.held("host-1") == held
    assert "odd" not in [one.spec.name for one in site.client.list_guests()]
    site.client.create_guest(guest("odd"), "host-1")  # the name is free again
    site.client.stop_guest("odd")


def test_a_device_does_as_it_is_instructed_in_its_programs_own_words(site: Site) -> None:
    site.client.create_guest(guest("told", flows=100), "host-1")
    assert site.client.instruct_device("told", "table", "add 20") == "120 flows"
    assert site.client.instruct_device("told", "table", "ask freeze 1") == "asks again at freeze, 1 times"
    assert moved(site, "told", "host-2") == ["ABORTED LATE_SWITCHOVER_ACK", "COMMITTED"]
    assert site.client.instruct_device("told", "table", "add 0") == "120 flows"
    with pytest.raises(DroverError) as caught:
        site.client.instruct_device("told", "table", "dance")
    assert (caught.value.reason, caught.value.field) == (R.INVALID_ARGUMENT, "instruction")
    assert "there is no instruction 'dance'; there are: add N, ask HOOK N" in caught.value.message
    assert site.client.instruct_device("told", "table", "add 1") == "121 flows"


def test_a_device_that_takes_no_instructions_says_so_and_stays_as_it_is(site: Site) -> None:
    site.client.create_guest(guest("deaf", takes_instructions="false"), "host-1")
    with pytest.raises(DroverError) as caught:
        site.client.instruct_device("deaf", "table", "ask freeze 1")
    assert caught.value.reason is R.INSTRUCTION_REFUSED
    assert "it takes no instructions: its option takes_instructions is false" in caught.value.message
    assert moved(site, "deaf", "host-2") == ["COMMITTED"]
