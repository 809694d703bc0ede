"""The host's place over a ledger in memory: taken, refused, lost, and taken again; and what its identity is made of."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from agents.config import FirmwareConfig, NetworkConfig, PoolConfig
from agents.engine.base import MigrationEngine
from agents.host import identity as host_identity
from agents.host import pools, registration
from agents.host.identity import Installation, KernelIdentity, OneAgent, PowerCycle, SimulatedIdentity
from agents.host.registration import Registration
from orchestrator import proc
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.identity import AgentIdentity, Doubt
from orchestrator.core.ids import HostRef
from orchestrator.core.records import Cordon, HostRecord, HostSpace, Network, Pool, PoolKind
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode, encode
from orchestrator.ledger.store import Create, SetData
from tests.fakes.config import agent_config, agent_identity
from tests.fakes.coordination import MemoryStore, Tree
from tests.fakes.engine import FakeEngine

HOST = "h2"
FIRST = agent_identity(HostRef(HOST, "boot-1"), agent="a1", lock="1:1")
THIS = replace(
    host_identity.identity_of(PowerCycle("boot-1", "m"), lock="1:1", volatile_dir=Path("/tmp")), machine=FIRST.machine
)
"""Of the process that runs the test."""
STRANGER = agent_identity(HostRef(HOST, "boot-9"), agent="b", machine="x", lock="2:2")


class Claimant:
    """One agent's registration, with a directory and a session of its own."""

    def __init__(self, directory: Path, tree: Tree, me: AgentIdentity) -> None:
        directory.mkdir(exist_ok=True)
        self.config = agent_config(directory, HOST)
        self.store = MemoryStore(tree)
        self.installation = Installation(self.config.dir)
        engine = cast(MigrationEngine, FakeEngine())
        self.place = Registration(self.config, me, self.installation, engine, self.store)

    async def take(self) -> None:
        async with asyncio.timeout(10):
            await self.place.take()

    async def refused(self) -> Doubt:
        with pytest.raises(DroverError) as caught:
            await self.take()
        assert caught.value.reason is RefusalReason.HOST_NAME_TAKEN
        return Doubt(caught.value.details["doubt"])


@pytest.fixture
def tree(monkeypatch: pytest.MonkeyPatch) -> Tree:
    monkeypatch.setattr(registration, "PATIENCE_S", 0.5)
    monkeypatch.setattr(registration, "RETRY_S", 0.01)
    return Tree()


@pytest.fixture
async def first(tree: Tree, tmp_path: Path) -> AsyncIterator[Claimant]:
    """Registered and holding."""
    claimant = Claimant(tmp_path / "first", tree, FIRST)
    await claimant.take()
    claimant.place.hold()
    yield claimant
    await claimant.place.close()


def record_of(tree: Tree) -> HostRecord:
    return decode(HostRecord, tree.nodes[paths.host(HOST)].data)


def live_of(tree: Tree) -> AgentIdentity | None:
    node = tree.nodes.get(paths.live(HOST))
    return decode(AgentIdentity, node.data) if node else None


def certified(tree: Tree) -> tuple[str, ...]:
    return tree.children(paths.fences(HOST))


async def until(true: Any) -> None:
    async with asyncio.timeout(30):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_pool_that_does_not_answer_keeps_no_agent_from_its_guests(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()

    def hang(*_: object) -> tuple[int, int]:
        answered.wait(30)
        return 1, 1

    monkeypatch.setattr(pools, "room", hang)
    monkeypatch.setattr(registration, "OFFERED_S", 0.05)
    claimant = Claimant(tmp_path / "first", tree, FIRST)
    pool = PoolConfig(path=tmp_path, kind=PoolKind.SHARED_FILE)
    claimant.place._config = claimant.config.model_copy(update={"pools": {"nfs": pool}})
    try:
        async with asyncio.timeout(5):
            await claimant.take()
        assert record_of(tree).pools == (Pool("nfs", PoolKind.SHARED_FILE),)
    finally:
        answered.set()
        await claimant.place.close()


async def test_a_new_host_is_registered_with_its_identity(first: Claimant, tree: Tree) -> None:
    said = record_of(tree).identity
    assert said is not None
    assert (said.installation, said.agent) == (first.installation.id, "a1")
    assert said.claim in first.installation.claims
    assert live_of(tree) == said
    assert certified(tree) == ()


async def test_a_copied_configuration_is_refused_while_the_first_lives_and_when_it_is_silent(
    first: Claimant, tree: Tree, tmp_path: Path
) -> None:
    """It used to fence the first: running guests became CRASHED, and the same guest was started elsewhere."""
    before = dict(tree.nodes)
    copy = Claimant(tmp_path / "copy", tree, STRANGER)
    assert await copy.refused() is Doubt.OTHER_INSTALLATION
    del tree.nodes[paths.live(HOST)]  # silent for a moment: it does not hear of it
    before.pop(paths.live(HOST))
    assert await copy.refused() is Doubt.OTHER_INSTALLATION
    assert certified(tree) == ()
    first.place.wake()
    await until(lambda: live_of(tree) == record_of(tree).identity)
    assert {path: node.data for path, node in tree.nodes.items() if path in before} == {
        path: node.data for path, node in before.items()
    }


@pytest.mark.parametrize(
    ("machine", "lock", "boot", "stale", "doubt"),
    [
        ("other", "2:2", "boot-9", False, Doubt.OTHER_MACHINE),
        ("", "2:2", "boot-9", False, Doubt.MACHINE_UNKNOWN),
        ("same", "2:2", "boot-9", True, Doubt.OLD_COPY),
        ("same", "2:2", "boot-1", False, Doubt.OTHER_DIRECTORY),
    ],
)
async def test_a_cloned_disk_is_refused_while_the_first_is_silent(
    first: Claimant, tree: Tree, tmp_path: Path, machine: str, lock: str, boot: str, stale: bool, doubt: Doubt
) -> None:
    known = {"same": FIRST.machine, "other": "another"}
    me = AgentIdentity("", known.get(machine, machine), boot, "b", lock)
    clone = Claimant(tmp_path / "clone", tree, me)
    note = json.loads((first.config.dir / "installation.json").read_text())
    (clone.config.dir / "installation.json").write_text(json.dumps(note | ({"claims": ["0"]} if stale else {})))
    await first.place.close()
    del tree.nodes[paths.live(HOST)]
    assert await clone.refused() is doubt
    assert certified(tree) == ()
    assert record_of(tree).identity == replace(FIRST, installation=first.installation.id, claim=note["claims"][-1])


async def test_a_host_that_lost_power_certifies_it_once_its_old_session_has_lapsed(
    first: Claimant, tree: Tree, tmp_path: Path
) -> None:
    await first.place.close()
    back = Claimant(tmp_path / "first", tree, replace(FIRST, boot_id="boot-2", agent="a2", lock="1:7"))
    assert await back.refused() is Doubt.SESSION_LIVES  # somebody keeps it alive
    assert certified(tree) == ()
    taking = asyncio.create_task(back.take())
    await asyncio.sleep(0.1)
    first.store.expire()
    await taking
    assert certified(tree) == ("boot-1",)
    assert record_of(tree).boot_id == "boot-2"
    assert live_of(tree) == record_of(tree).identity


async def test_a_restarted_agent_does_not_wait_for_its_predecessors_session(
    first: Claimant, tree: Tree, tmp_path: Path
) -> None:
    await first.place.close()
    successor = Claimant(tmp_path / "first", tree, replace(FIRST, agent="a2"))
    await successor.take()
    assert live_of(tree) == record_of(tree).identity
    assert live_of(tree) != FIRST
    first.store.expire()
    assert live_of(tree) is not None, "the node is of the successor's session"


@pytest.fixture
async def served(tree: Tree, tmp_path: Path) -> AsyncIterator[tuple[Claimant, subprocess.Popen[bytes]]]:
    """Registered by a process of its own; and that process."""
    process = await asyncio.to_thread(lambda: subprocess.Popen(["sleep", "60"]))
    try:
        said = replace(
            THIS, agent="served", pid=process.pid, start_time=proc.start_time_of(process.pid) or 0, lock="1:1"
        )
        claimant = Claimant(tmp_path / "first", tree, said)
        await claimant.take()
        yield claimant, process
    finally:
        process.kill()
        await asyncio.to_thread(process.wait)


async def test_an_installation_whose_directory_moved_goes_on_once_its_agent_is_gone(
    served: tuple[Claimant, subprocess.Popen[bytes]], tree: Tree, tmp_path: Path
) -> None:
    """It was refused until the host restarted: the lock file is another one on another file system."""
    first, process = served
    shutil.copytree(tmp_path / "first", tmp_path / "moved")
    moved = Claimant(tmp_path / "moved", tree, replace(THIS, lock="9:9"))
    first.store.expire()  # cut off, and alive
    assert await moved.refused() is Doubt.OTHER_DIRECTORY
    process.kill()
    await asyncio.to_thread(process.wait)
    elsewhere = Claimant(tmp_path / "moved", tree, replace(THIS, lock="9:9", markers="8:8"))
    assert await elsewhere.refused() is Doubt.OTHER_DIRECTORY, "the markers of this power cycle are not there"
    inside = Claimant(tmp_path / "moved", tree, replace(THIS, lock="9:9", pids="8:8"))
    assert await inside.refused() is Doubt.OTHER_DIRECTORY, "in another pid namespace the number says nothing"
    await moved.take()
    assert certified(tree) == ()
    assert live_of(tree) == record_of(tree).identity
    back = Claimant(tmp_path / "first", tree, replace(THIS, agent="back"))
    moved.store.expire()
    assert await back.refused() is Doubt.OTHER_DIRECTORY, "it is the older copy now, and the other agent lives"


async def test_a_moved_installation_waits_for_the_session_of_its_agent_that_is_gone(
    served: tuple[Claimant, subprocess.Popen[bytes]], tree: Tree, tmp_path: Path
) -> None:
    first, process = served
    process.kill()
    await asyncio.to_thread(process.wait)
    moved = Claimant(tmp_path / "first", tree, replace(THIS, lock="9:9"))
    assert await moved.refused() is Doubt.SESSION_LIVES
    first.store.expire()
    await moved.take()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENOMEM, errno.EPERM])
async def test_what_cannot_be_told_of_the_registered_process_proves_nothing(
    served: tuple[Claimant, subprocess.Popen[bytes]],
    tree: Tree,
    tmp_path: Path,
    error: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, process = served
    process.kill()
    await asyncio.to_thread(process.wait)
    first.store.expire()
    moved = Claimant(tmp_path / "first", tree, replace(THIS, lock="9:9"))
    monkeypatch.setattr(os, "pidfd_open", _failing(error))
    assert await moved.refused() is Doubt.OTHER_DIRECTORY


def _failing(number: int) -> Callable[[int], int]:
    def fail(_: int) -> int:
        raise OSError(number, os.strerror(number))

    return fail


async def test_one_of_a_kind_that_never_said_who_it_is(tree: Tree, tmp_path: Path) -> None:
    """Of an agent before this version: taken over in its power cycle, and never certified by silence."""
    old = HostRecord(HOST, "boot-1", "c:1", "p:1", 1, 1)
    claimant = Claimant(tmp_path / "first", tree, replace(FIRST, boot_id="boot-2"))
    await claimant.store.ensure(paths.HOSTS)
    await claimant.store.multi([Create(paths.host(HOST), b"")])
    tree.nodes[paths.host(HOST)] = replace(tree.nodes[paths.host(HOST)], data=encode(old))
    assert await claimant.refused() is Doubt.NO_IDENTITY
    same = Claimant(tmp_path / "first", tree, FIRST)
    await same.take()
    assert certified(tree) == ()


async def test_after_a_certificate_the_name_is_free_and_the_dead_stays_dead(
    first: Claimant, tree: Tree, tmp_path: Path
) -> None:
    await first.place.close()
    first.store.expire()
    await first.store.ensure(paths.fence(HOST, "boot-1"))  # an operator declared it dead
    other = Claimant(tmp_path / "other", tree, STRANGER)
    await other.take()
    assert record_of(tree).boot_id == "boot-9"
    zombie = Claimant(tmp_path / "first", tree, replace(FIRST, agent="a2"))
    assert await zombie.refused() is Doubt.DECLARED_DEAD


async def test_an_agent_notices_that_its_place_was_taken(first: Claimant, tree: Tree) -> None:
    told: list[str] = []
    first.place.on_change = lambda: told.append(first.place.lost)
    first.place.must_hold()
    record = record_of(tree)
    other = replace(record, identity=replace(FIRST, agent="b", installation="other"))
    await _write(first.store, other)
    await until(lambda: first.place.lost)
    with pytest.raises(DroverError, match="another agent has registered as h2"):
        first.place.must_hold()
    await _write(first.store, record)
    await until(lambda: not first.place.lost)
    assert [bool(each) for each in told] == [True, False]


async def _write(store: MemoryStore, record: HostRecord) -> None:
    node = store.tree.nodes[paths.host(HOST)]
    await store.multi([SetData(paths.host(HOST), encode(record), node.version)])


async def test_a_foreign_session_is_not_taken_for_ones_own(first: Claimant, tree: Tree) -> None:
    """A `live` node of another session vanishes with that; the host turned SILENT then, until the next event."""
    foreign = MemoryStore(tree)
    first.store.expire()
    await foreign.multi([Create(paths.live(HOST), b"", ephemeral=True)])
    await until(lambda: first.place.lost)
    foreign.expire()
    await until(lambda: live_of(tree) == record_of(tree).identity)
    await until(lambda: not first.place.lost)


async def test_a_host_whose_record_vanished_is_registered_again(first: Claimant, tree: Tree) -> None:
    for path in (paths.live(HOST), paths.cordon(HOST), paths.reservations(HOST), paths.host(HOST), paths.HOSTS):
        tree.nodes.pop(path)
    first.place.wake()
    await until(lambda: live_of(tree) is not None)
    assert record_of(tree).identity == live_of(tree)
    assert decode(Cordon, tree.nodes[paths.cordon(HOST)].data) == Cordon()


async def test_a_lost_answer_and_a_silent_ledger_are_waited_out(tree: Tree, tmp_path: Path) -> None:
    claimant = Claimant(tmp_path / "first", tree, FIRST)
    claimant.store.fail_next = [True]  # applied, and nobody heard
    await claimant.take()
    assert live_of(tree) == record_of(tree).identity
    claimant.store.expire()
    claimant.store.down = True
    again = asyncio.create_task(claimant.take())
    await asyncio.sleep(0.1)
    assert not again.done()
    claimant.store.down = False
    await again


async def test_a_full_disk_keeps_no_agent_from_its_guests(
    first: Claimant, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await first.place.close()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Installation, "_write", full)
    successor = Claimant(tmp_path / "first", tree, replace(FIRST, agent="a2"))
    claim = first.installation.claims[-1]
    await successor.take()
    said = record_of(tree).identity
    assert said is not None
    assert (said.agent, said.claim) == ("a2", claim)


# --- what the identity is made of -------------------------------------------------------------------------------------


def test_an_installation_is_made_once_and_read_again(tmp_path: Path) -> None:
    made = Installation(tmp_path / "new")
    made.open()
    for number in range(Installation.KEPT + 2):
        made.claim(str(number))
    read = Installation(tmp_path / "new")
    read.open()
    assert (read.id, read.claims) == (made.id, tuple(map(str, range(2, Installation.KEPT + 2))))
    (tmp_path / "new" / "installation.json").write_text("{")
    with pytest.raises(DroverError, match=r"installation\.json cannot be read"):
        Installation(tmp_path / "new").open()


@pytest.mark.parametrize(
    ("said", "known"),
    [
        ("4C4C4544-0051-3510-8052-B4C04F4E3732\n", True),
        ("03000200-0400-0500-0006-000700080009", False),
        ("00000000-0000-0000-0000-000000000000", False),
        ("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF", False),
        ("Not Settable\n", False),
        ("", False),
        (None, False),
    ],
)
def test_hardware_that_says_what_all_say_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str | None, known: bool
) -> None:
    file = tmp_path / "product_uuid"
    if said is not None:
        file.write_text(said)
    monkeypatch.setattr(host_identity, "_HARDWARE", (file,))
    found = KernelIdentity().read()
    assert bool(found.machine) is known
    assert said is None or not said.strip() or said.strip().lower() not in found.machine
    assert found.boot_id


def test_a_simulated_machine_is_the_second_line(tmp_path: Path) -> None:
    file = tmp_path / "cycle"
    file.write_text("boot-1\nmachine-1\n")
    one = SimulatedIdentity(file).read()
    file.write_text("boot-2\nmachine-1\n")
    two = SimulatedIdentity(file).read()
    file.write_text("boot-3\n")
    assert one.machine == two.machine != ""
    assert (one.boot_id, two.boot_id, SimulatedIdentity(file).read().machine) == ("boot-1", "boot-2", "")


def test_the_lock_names_its_file(tmp_path: Path) -> None:
    one, two = OneAgent(tmp_path / "a" / "agent.lock"), OneAgent(tmp_path / "b" / "agent.lock")
    assert one.take() != two.take()
    note = json.loads((tmp_path / "a" / "agent.lock").read_text())
    assert set(note) == {"pid", "start_time"}


# --- what the host offers -----------------------------------------------------------------------------------------


async def test_what_a_host_offers_is_published_and_its_room_told_when_it_has_moved(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code.fd"
    code.write_bytes(b"firmware")
    config = agent_config(tmp_path, HOST).model_copy(
        update={
            "pools": {"fast": PoolConfig(path=tmp_path, kind=PoolKind.LOCAL)},
            "networks": {"prod": NetworkConfig(bridge="br0", mtu=9000)},
            "firmware": FirmwareConfig(uefi_code=code, uefi_vars=code),
            "extra_args_allowed": ("-device virtio-rng-pci",),
        }
    )
    free = [500]
    monkeypatch.setattr(pools, "room", lambda _config: (10_000, free[0]))
    monkeypatch.setattr(registration, "SPACE_S", 0.01)
    store = MemoryStore(tree)
    engine = cast(MigrationEngine, FakeEngine())
    place = Registration(config, FIRST, Installation(config.dir), engine, store)
    await place.take()
    record = record_of(tree)
    assert record.pools == (Pool("fast", PoolKind.LOCAL, size_bytes=10_000, free_bytes=500),)
    assert record.networks == (Network("prod", mtu=9000),)
    assert record.firmware == dict.fromkeys(("uefi_code", "uefi_vars"), hashlib.sha256(b"firmware").hexdigest())
    assert record.extra_args == ("-device virtio-rng-pci",)
    assert "HARDWARE" in record.features

    def told() -> dict[str, int]:
        node = tree.nodes.get(paths.space(HOST))
        return decode(HostSpace, node.data).free_bytes if node else {}

    await store.multi([Create(paths.space(HOST), encode(HostSpace({"fast": 9_999})))])  # an earlier agent's
    place.hold()
    try:
        await until(lambda: told() == {"fast": 500})
        free[0] = 401
        before = tree.nodes[paths.space(HOST)].version
        await asyncio.sleep(0.1)
        assert tree.nodes[paths.space(HOST)].version == before  # a hundredth of the pool, and no more
        free[0] = 399
        await until(lambda: told() == {"fast": 399})
    finally:
        await place.close()
