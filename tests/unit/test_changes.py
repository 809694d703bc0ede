"""What is added to a guest that runs, and taken away: told to its VMM, noted down and recorded, or none of it.

The agent is the real one, over a fake engine and a ledger in memory, and is killed at every step of a change.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import PoolConfig
from agents.engine.base import EngineError
from agents.guest import plugging
from agents.guest.changes import Change, outcome
from agents.guest.files import GuestFiles
from agents.guest.keeper import HostedGuest
from orchestrator.core import handover
from orchestrator.core.changes import MachineChange, changed
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.records import DiskFormat, DiskSpec, GuestSpec, LiveMachine, NicSpec, PoolKind
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from tests.fakes.config import agent_config
from tests.unit.test_lost_ledger import HERE, THERE, G, House, until

R = RefusalReason
ROOT = DiskSpec("root", "fast", "root.img", DiskFormat.RAW)
DATA = DiskSpec("data", "fast", "data.img", DiskFormat.RAW)
SPEC = GuestSpec("web", memory_mib=64, max_memory_mib=1024, vcpus=1, max_vcpus=4, disks=(ROOT,))
CHANGES = {
    "disk": MachineChange(disk=DATA),
    "memory": MachineChange(memory_mib=64 + 256),
    "vcpus": MachineChange(vcpus=3),
}


class Changing(House):
    """A guest with a disk and room for more."""

    def __init__(self, directory: Path) -> None:
        self.pool = directory / "fast"
        self.pool.mkdir()
        for name in ("root.img", "data.img"):
            (self.pool / name).touch()
        super().__init__(directory)
        pools = {"fast": PoolConfig(path=self.pool, kind=PoolKind.LOCAL)}
        self.config = self.config.model_copy(update={"pools": pools, "memory_mib": 2048})
        self.agent = self.made()

    async def born(self, spec: GuestSpec = SPEC) -> None:
        put = self.world.put

        def instead(path: str, record: object) -> None:
            put(path, spec if isinstance(record, GuestSpec) else record)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(self.world, "put", instead)
            await super().born()

    @property
    def guest(self) -> HostedGuest:
        return self.agent._known(G)

    async def change(self, change: MachineChange) -> GuestSpec:
        return await self.agent.change_machine(G, change, self.promised)

    @property
    def promised(self) -> int:
        """Version of what the host has promised."""
        node = self.world.store.tree.nodes.get(paths.reservations(HERE.host))
        return node.version if node is not None else -1

    @property
    def recorded(self) -> GuestSpec:
        return decode(GuestSpec, self.world.store.tree.nodes[paths.guest_spec(G)].data)

    async def agrees(self) -> LiveMachine:
        """VMM, notes and ledger say the same; what that is."""
        await until(lambda: not self.guest.changes.pending)
        own = self.guest.own()
        assert own is not None
        assert own.hardware is not None
        machine = own.hardware.machine
        assert machine is not None
        assert {device.id for device in machine.devices} == set(await own.vmm.devices())
        assert plugging.memory_mib(machine) == self.recorded.memory_mib
        assert plugging.vcpus(machine) == self.recorded.vcpus
        assert self.recorded == self.guest.files.spec
        assert {disk.name for disk in own.hardware.disks} == {disk.name for disk in self.recorded.disks}
        note = own.files.directory / f"{own.inc}.machine.json"
        assert decode(LiveMachine, note.read_bytes()) == machine
        assert await self.agent.machine(G) == (machine, self.recorded)
        return machine


@pytest.fixture
async def house(tmp_path: Path):
    made = Changing(tmp_path)
    await made.agent.start()
    await made.born()
    yield made
    await made.agent.stop()


@pytest.mark.parametrize("what", CHANGES)
async def test_what_is_added_is_there_noted_and_recorded(house: Changing, what: str) -> None:
    before = house.world.store.tree.nodes[paths.guest(G)].version
    wanted = changed(SPEC, CHANGES[what])
    assert await house.change(CHANGES[what]) == wanted == house.recorded
    listed = await house.agrees()
    # Whoever placed the guest by its old needs looks again.
    assert house.world.store.tree.nodes[paths.guest(G)].version > before
    assert await house.change(CHANGES[what]) == wanted  # repeated: it was done
    assert await house.agrees() == listed
    await house.restarted()
    assert await house.agrees() == listed


async def test_a_disk_is_taken_away_and_its_image_stays(house: Changing) -> None:
    await house.change(CHANGES["disk"])
    await house.change(MachineChange(detach_disk="root"))
    listed = await house.agrees()
    assert [disk.name for disk in house.recorded.disks] == ["data"]
    assert "disk-root" not in {device.id for device in listed.devices}
    assert (house.pool / "root.img").exists()
    with pytest.raises(DroverError, match="no disk 'root'"):
        await house.change(MachineChange(detach_disk="root"))


async def test_a_guest_that_does_not_let_go_keeps_the_disk_until_it_does(house: Changing) -> None:
    house.mover.script.holds_on = True
    with pytest.raises(DroverError, match="has not let go of disk-root") as refused:
        await house.change(MachineChange(detach_disk="root"))
    assert refused.value.reason is R.DEVICE_NOT_RELEASED
    listed = await house.agrees()
    assert house.recorded == SPEC
    assert [device.id for device in listed.devices if device.leaving] == ["disk-root"]
    await house.change(CHANGES["disk"])  # other changes go on
    await house.restarted()
    await house.agrees()
    (vmm,) = house.mover.processes.values()
    vmm.lets_go("disk-root")
    await until(lambda: [disk.name for disk in house.recorded.disks] == ["data"])
    assert "disk-root" not in {device.id for device in (await house.agrees()).devices}


async def test_a_device_that_has_left_while_no_agent_looked_is_found_gone(house: Changing) -> None:
    house.mover.script.holds_on = True
    with pytest.raises(DroverError):
        await house.change(MachineChange(detach_disk="root"))
    await house.agent.stop()
    (vmm,) = house.mover.processes.values()
    vmm.lets_go("disk-root")
    house.agent = house.made()
    await house.agent.start()
    await until(lambda: house.recorded.disks == ())
    await house.agrees()


@pytest.mark.parametrize("what", CHANGES)
async def test_what_the_vmm_refuses_leaves_nothing(house: Changing, what: str) -> None:
    house.mover.script.fail_attach = "out of everything"
    with pytest.raises(DroverError, match="out of everything"):
        await house.change(CHANGES[what])
    await house.agrees()
    assert house.recorded == SPEC
    assert await house.change(CHANGES[what]) == changed(SPEC, CHANGES[what])
    await house.agrees()


@pytest.mark.parametrize("step", ["device_add", "attached", "noting", "recording"])
@pytest.mark.parametrize("what", CHANGES)
async def test_an_agent_that_dies_while_it_adds_something_finds_the_truth_again(
    house: Changing, monkeypatch: pytest.MonkeyPatch, what: str, step: str
) -> None:
    await _dies(house, monkeypatch, CHANGES[what], step)
    await house.agrees()
    assert house.recorded == (SPEC if step == "device_add" else _half(what, step))
    assert await house.change(CHANGES[what]) == changed(SPEC, CHANGES[what])
    await house.agrees()


def _half(what: str, step: str) -> GuestSpec:
    """Of several vCPUs the first one was there."""
    if (what, step) == ("vcpus", "attached"):
        return replace(SPEC, vcpus=2)
    return changed(SPEC, CHANGES[what])


@pytest.mark.parametrize("step", ["device_del", "noting", "recording"])
async def test_an_agent_that_dies_while_it_takes_something_away_finds_the_truth_again(
    house: Changing, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    await _dies(house, monkeypatch, MachineChange(detach_disk="root"), step)
    await house.agrees()
    assert house.recorded.disks == ((ROOT,) if step == "device_del" else ())


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
@pytest.mark.parametrize("died", [True, False])
async def test_no_failed_start_removes_an_image_that_the_guest_could_write_to(
    house: Changing, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    """It was made for a disk that was added; the agent died before it could say that the guest has it, and the VMM
    died with it, or does not answer the next agent."""
    (vmm,) = house.mover.processes.values()

    async def silent() -> dict[str, str]:
        raise EngineError("no answer")

    if not died:
        monkeypatch.setattr(vmm, "devices", silent)
    added = MachineChange(disk=replace(DATA, image="new.img", size_bytes=1 << 20))
    await _dies(house, monkeypatch, added, "attached", with_it=vmm.die if died else None)
    image = house.pool / "new.img"
    image.write_bytes(b"written by the guest")
    await house.agent.keep_guest(G, only_ended=died)
    house.world.put(paths.guest(G), handover.start_again(house.world.record(G), HERE, writer="api"))
    house.mover.script.fail_start = "no such CPU"
    with pytest.raises(DroverError, match="no such CPU"):
        await house.agent.start_guest(G)
    assert image.read_bytes() == b"written by the guest"


async def _dies(
    house: Changing,
    monkeypatch: pytest.MonkeyPatch,
    change: MachineChange,
    step: str,
    with_it: Callable[[], None] | None = None,
) -> None:
    """The agent, at that step; another one follows."""

    def killed(at: str) -> None:
        if at == step:
            raise asyncio.CancelledError

    async def nothing(_: HostedGuest) -> None:
        pass

    house.guest.changes.now = killed
    with monkeypatch.context() as patched:
        patched.setattr(HostedGuest, "_keep_once", nothing)
        with pytest.raises(asyncio.CancelledError):
            await house.guest.change(change, house.promised)
        await house.agent.stop()
    if with_it is not None:
        with_it()
    assert (house.guest.files.directory / "change.json").exists()
    house.agent = house.made()
    await house.agent.start()


# --- what stands against it -------------------------------------------------------------------------------------------


async def test_nothing_changes_while_the_guest_may_be_on_its_way(house: Changing) -> None:
    idle = house.world.record(G)
    opened = handover.open_attempt(idle, "abcdef012345", 1, THERE, epoch=0, writer="c")
    house.world.put(paths.guest(G), opened)
    with pytest.raises(DroverError) as refused:
        await house.change(CHANGES["disk"])
    assert refused.value.reason is R.GUEST_IS_MIGRATING
    house.world.put(paths.guest(G), replace(opened, phase=Ownership.ABORTED))
    with pytest.raises(DroverError) as refused:
        await house.change(CHANGES["disk"])
    assert refused.value.reason is R.GUEST_IS_MIGRATING
    assert house.recorded == SPEC


async def test_another_host_waits_for_a_change_that_is_under_way_or_is_told_so(
    house: Changing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agents.guest.keeper.DESCRIBED_S", 0.05)
    async with house.guest._turn:
        with pytest.raises(DroverError) as refused:
            await house.agent.machine(G)
    assert refused.value.reason is R.BUSY
    await house.agrees()


async def test_memory_that_the_host_has_promised_meanwhile_is_not_given_away(house: Changing) -> None:
    with pytest.raises(DroverError, match="has changed: look again") as refused:
        await house.agent.change_machine(G, CHANGES["memory"], house.promised + 7)
    assert (refused.value.reason, refused.value.details) == (R.OUTCOME_UNKNOWN, {"moved": "reservations"})
    assert house.recorded == SPEC
    seen = house.promised
    await house.change(CHANGES["memory"])
    assert house.promised > seen  # who placed by it looks again
    await house.agrees()


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        (MachineChange(disk=replace(DATA, pool="none")), R.POOL_NOT_FOUND, "has no pool none"),
        (MachineChange(disk=replace(DATA, image="gone.img")), R.DISK_NOT_FOUND, "there is no image gone.img"),
        (MachineChange(disk=replace(DATA, name="root")), R.ALREADY_EXISTS, "another disk"),
        (MachineChange(disk=replace(DATA, image="root.img")), R.INVALID_ARGUMENT, "an image has one writer"),
        (MachineChange(nic=NicSpec("n", "none")), R.NETWORK_NOT_FOUND, "network none"),
        (MachineChange(memory_mib=100), R.INVALID_ARGUMENT, "multiple of 128 MiB"),
        (MachineChange(memory_mib=64 + 1024), R.INVALID_ARGUMENT, "max_memory"),
        (MachineChange(vcpus=5), R.INVALID_ARGUMENT, "max_vcpus"),
        (MachineChange(vcpus=1), None, ""),
    ],
)
async def test_what_cannot_be_is_refused_with_its_reason_and_nothing_changes(
    house: Changing, change: MachineChange, reason: RefusalReason | None, says: str
) -> None:
    if reason is None:
        assert await house.change(change) == SPEC
    else:
        with pytest.raises(DroverError) as refused:
            await house.change(change)
        assert refused.value.reason is reason
        assert says in str(refused.value)
    await house.agrees()
    assert house.recorded == SPEC
    (vmm,) = house.mover.processes.values()
    assert "attach" not in vmm.calls


async def test_no_memory_is_added_where_the_engine_would_lose_what_is_written_to_it(house: Changing) -> None:
    house.mover.against_memory = "its dirty pages are not noticed"
    with pytest.raises(DroverError, match=r"dirty pages are not noticed; start it anew with more `memory`") as refused:
        await house.change(CHANGES["memory"])
    assert refused.value.reason is R.FEATURE_NOT_AVAILABLE
    (vmm,) = house.mover.processes.values()
    assert "attach" not in vmm.calls
    assert house.recorded == SPEC
    await house.change(CHANGES["vcpus"])
    await house.change(CHANGES["disk"])
    await house.agrees()


@pytest.mark.parametrize("what", CHANGES)
async def test_a_guest_that_libvirt_runs_is_not_changed_and_keeps_all_it_has(tmp_path: Path, what: str) -> None:
    house = Changing(tmp_path)
    house.config = house.config.model_copy(update={"engine": "libvirt"})
    house.agent = house.made()
    await house.agent.start()
    await house.born(GuestSpec("web"))
    with pytest.raises(DroverError, match="libvirt runs is not changed") as refused:
        await house.change(CHANGES[what])
    assert refused.value.reason is R.FEATURE_NOT_AVAILABLE
    assert house.recorded == GuestSpec("web")
    await house.agent.stop()


async def test_a_guest_without_a_list_of_devices_says_what_to_do(tmp_path: Path) -> None:
    house = Changing(tmp_path)
    await house.agent.start()
    await house.born(GuestSpec("web"))
    with pytest.raises(DroverError, match="start it anew") as refused:
        await house.change(CHANGES["disk"])
    assert refused.value.reason is R.FEATURE_NOT_AVAILABLE
    await house.agent.stop()


def test_the_outcome_follows_from_what_the_vmm_has_however_often_it_is_asked() -> None:
    machine = LiveMachine("pc", "qemu64", 64, 1, max_vcpus=4)
    devices = plugging.sockets(machine, 3)
    change = Change(replace(SPEC, vcpus=3), SPEC, devices)
    assert outcome(change, machine, {}) == (machine, SPEC)
    half, spec = outcome(change, machine, {"vcpu1": "x"})
    assert (plugging.vcpus(half), spec.vcpus) == (2, 2)
    whole = outcome(change, machine, {"vcpu1": "x", "vcpu2": "x"})
    assert whole == outcome(change, whole[0], {"vcpu1": "x", "vcpu2": "x"})
    assert (plugging.vcpus(whole[0]), whole[1].vcpus) == (3, 3)


def test_a_card_that_is_taken_away_changes_no_other_cards_tap(tmp_path: Path) -> None:
    nics = (NicSpec("a", "n"), NicSpec("b", "n"))
    files = GuestFiles(agent_config(tmp_path), G, GuestSpec("web", nics=nics))
    files.make()
    before = {tap.nic: tap.ifname for tap in files.vmm_spec("0123456789abcdef").taps}
    files.note_cards("0123456789abcdef")
    left = replace(files, spec=GuestSpec("web", nics=nics[1:]))
    assert {tap.nic: tap.ifname for tap in left.vmm_spec("0123456789abcdef").taps} == {"b": before["b"]}
    fresh = replace(files, spec=GuestSpec("web", nics=nics[1:]))
    (tap,) = fresh.vmm_spec("fedcba9876543210").taps  # another copy begins anew
    assert tap.ifname.endswith("-0")
