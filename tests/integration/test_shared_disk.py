"""A Linux guest whose disk is in a pool that all hosts share moves through a whole cluster, and no promise is lost."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.lab.linux_guest.image import Verdict, check, seed_of
from deploy.lab.workload import LinuxWorkload, linux_boot_of
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import DiskFormat, DiskSpec, GuestSpec, NicSpec
from orchestrator.rpc.messages import Migration
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import Cluster, make_config, missing, running_cluster, short_directory

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "deploy/lab/linux_guest/build.sh"
BOOT_S = 180.0
"""On a machine that does much else."""
DISK = "data.raw"

if lacking := [tool for tool in ("qemu-system-x86_64", "qemu-img") if not shutil.which(tool)]:
    pytest.skip(f"not installed: {', '.join(lacking)} (make system)", allow_module_level=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if said := missing():
        pytest.skip(said)
    made = subprocess.run([BUILD, ROOT / "build/linux"], capture_output=True, text=True, timeout=600, check=False)
    if made.returncode == 69:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    directory = short_directory()
    try:
        with running_cluster(make_config(directory, hosts=2)) as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Linux:
    """A Linux guest of the cluster with one shared disk and one card; with `room` it can be given memory and vCPUs. A
    kernel that may see memory above 4 GiB takes 64 MiB for bounce buffers at once."""

    def __init__(self, cluster: Cluster, client: OrchestratorClient, name: str, *, room: bool = False) -> None:
        self.cluster, self.client, self.name = cluster, client, name
        self.image = cluster.layout.shared_pool / f"{name}.raw"
        spec = GuestSpec(
            name,
            memory_mib=256 if room else 128,
            max_memory_mib=512 if room else 0,
            max_vcpus=2 if room else 0,
            machine="q35",
            boot=linux_boot_of(LinuxWorkload(records_per_s=50, mem_mib=4), disks=1),
            disks=(DiskSpec("data", "shared", f"{name}.raw", DiskFormat.RAW, size_bytes=24 << 20),),
            nics=(NicSpec("eth0", "lab"),),
        )
        self.uuid = client.create_guest(spec, "host-1").uuid
        until("it has promised something", lambda: self.promised() > 20, BOOT_S)

    def promised(self) -> int:
        """The newest promise that anybody heard of, from whatever host."""
        beats = r"^\d+ H [0-9a-f]{8} [0-9a-f]{8} [0-9a-f]{8} ([0-9a-f]{8})"
        logs = self.cluster.layout.serial.glob(f"*.{self.name}.*.log")
        told = (number for log in logs for number in re.findall(beats, log.read_text(errors="replace"), re.MULTILINE))
        return max((int(number, 16) for number in told), default=0)

    def outside(self) -> tuple[Verdict, int]:
        """What the image holds of everything that was promised before it was looked at."""
        promised = self.promised()
        with self.image.open("rb") as file:

            def read(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            return check(read, seed_of(self.uuid), promised), promised

    def migrate(self, host: str) -> str:
        return self.client.create_migration(self.name, host).name

    def over(self, migration: str) -> Migration:
        def ended() -> bool:
            return wire.word(self.client.get_migration(migration), "phase") in ("SUCCEEDED", "FAILED", "CANCELLED")

        until(f"{migration} is over", ended, 60)
        return self.client.get_migration(migration)


def until(what: str, question: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not question():
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[OrchestratorClient]:
    with OrchestratorClient(cluster.api) as made:
        yield made


def command_line(client: OrchestratorClient, name: str) -> str:
    """Of its VMM, wherever that is."""
    each = client.get_guest(name)
    agent = client.get_host(each.host, ask_agent=True).agent
    (pid,) = (copy.pid for copy in agent.copies if copy.guest_uuid == each.uuid and copy.pid and not copy.incoming)
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def given_more(client: OrchestratorClient, name: str) -> None:
    """A disk in a local pool, a card and a vCPU, while it runs. Memory is refused: these hosts have no KVM."""
    client.attach_to_guest(name, disk=DiskSpec("more", "fast", f"{name}-more.qcow2", size_bytes=8 << 20))
    client.attach_to_guest(name, nic=NicSpec("eth1", "lab"))
    with pytest.raises(DroverError, match="under tcg") as refused:
        client.attach_to_guest(name, memory_mib=384)
    assert refused.value.reason is RefusalReason.FEATURE_NOT_AVAILABLE
    spec = client.attach_to_guest(name, vcpus=2).spec
    assert [disk.name for disk in spec.disks] == ["data", "more"]
    assert ([nic.name for nic in spec.nics], spec.memory_mib, spec.vcpus) == (["eth0", "eth1"], 256, 2)


def taken_away(client: OrchestratorClient, name: str, **what: str) -> None:
    """Its system lets go of it, in its own time: a command that was too early is given again."""

    def let_go() -> bool:
        try:
            client.detach_from_guest(name, **what)
        except DroverError as error:
            if error.reason is not RefusalReason.DEVICE_NOT_RELEASED:
                raise
            return False
        return True

    until(f"it lets go of {what}", let_go, 120)


MORE = ("virtio-blk-pci,id=disk-more,", "virtio-net-pci,id=nic-eth1,", "-x86_64-cpu,id=vcpu1,")


def test_every_promise_is_kept_there_and_back(cluster: Cluster, client: OrchestratorClient) -> None:
    """Also with what it is given before its first move, which goes along, and is taken away before the last."""
    guest = Linux(cluster, client, "there-and-back", room=True)
    assert not any(word in command_line(client, guest.name) for word in MORE)
    given_more(client, guest.name)
    for host in ("host-2", "host-1", "host-2"):
        if host == "host-1":
            assert all(word in command_line(client, guest.name) for word in MORE)
            taken_away(client, guest.name, disk="more")
            taken_away(client, guest.name, nic="eth1")
        before = guest.promised()
        over = guest.over(guest.migrate(host))
        assert wire.word(over, "phase") == "SUCCEEDED", over.message
        until("it promises more", lambda before=before: guest.promised() > before + 20)
        assert client.get_guest(guest.name).host == host
    there = command_line(client, guest.name)
    assert [word in there for word in MORE] == [False, False, True]
    verdict, promised = guest.outside()
    assert verdict.kept, verdict.missing
    assert verdict.checked == min(promised, 1023) or verdict.checked >= 100
    client.stop_guest(guest.name)
    assert guest.image.is_file()  # the guest is gone, its disk is its operator's


def test_an_image_has_one_writer(cluster: Cluster, client: OrchestratorClient) -> None:
    guest = Linux(cluster, client, "one-writer")
    spec = GuestSpec("other", disks=(DiskSpec("data", "shared", guest.image.name, DiskFormat.RAW),))
    with pytest.raises(DroverError) as refused:
        client.create_guest(spec, "host-2")
    assert refused.value.reason is RefusalReason.DISK_LOCKED
    client.stop_guest(guest.name)


def test_a_lock_that_somebody_else_has_at_the_take_over_is_waited_for(
    cluster: Cluster, client: OrchestratorClient
) -> None:
    """Between the seal and the take-over nobody holds the image; whoever is quick can have it then."""
    guest = Linux(cluster, client, "locked")
    # QEMU's shared lock of byte 201: nobody else may write. It is no conflict for one who does not begin to write.
    descriptor = os.open(guest.image, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 201, 1, 0))
        migration = guest.migrate("host-2")

        def waits() -> bool:
            return client.get_guest(guest.name).host == "host-2"

        until("the guest is committed to its destination", waits, 60)
        before = guest.promised()
        time.sleep(1.0)
        assert guest.promised() == before  # it stands still, whole, at a destination that may not start it yet
        assert wire.word(client.get_migration(migration), "phase") not in ("FAILED", "CANCELLED")
    finally:
        os.close(descriptor)
    over = guest.over(migration)
    assert wire.word(over, "phase") == "SUCCEEDED", over.message
    assert any(entry.event == "disk_locked" for report in over.attempts for entry in report.timeline)
    until("it promises more", lambda: guest.promised() > before + 20)
    verdict, _ = guest.outside()
    assert verdict.kept, verdict.missing
    client.stop_guest(guest.name)
