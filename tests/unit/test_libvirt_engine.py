"""What the relays between libvirt's client and its daemons let pass, and the domains that are made of guests."""

from __future__ import annotations

import asyncio
import json
import struct
import threading
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from agents.engine import base
from agents.engine.base import DiskFile, EngineError, Nic, Tap, VmmSpec
from agents.engine.image_locks import must_be_lockable
from agents.engine.libvirt.binding import Daemon
from agents.engine.libvirt.domain import Places, domain_xml, moved, places_of
from agents.engine.libvirt.engine import LibvirtEngine, LibvirtVmm, NoCopies
from agents.engine.libvirt.incoming import Incoming, Stage, greet
from agents.engine.libvirt.packets import (
    Packet,
    PacketError,
    Procedure,
    Verdict,
    at_destination,
    at_source,
    length_of,
    packet_of,
)
from agents.engine.libvirt.relay import Relay
from orchestrator.core.compatibility import other_engine
from orchestrator.core.records import (
    DiskCache,
    DiskFormat,
    DiskSpec,
    GuestSpec,
    LiveDevice,
    LiveMachine,
    NicSpec,
    PoolKind,
)

REMOTE, KEEPALIVE = 0x20008086, 0x6B656570
OPEN, PREPARE, PERFORM, FINISH, CONFIRM = (
    Procedure.OPEN,
    Procedure.PREPARE,
    Procedure.PERFORM,
    Procedure.FINISH,
    Procedure.CONFIRM,
)


def message(procedure: int, kind: int = 0, *, status: int = 0, program: int = REMOTE, last: int = 0) -> bytes:
    body = struct.pack(">IIIIIII", program, 1, procedure, kind, 7, status, last)
    return struct.pack(">I", len(body) + 4) + body


def call(procedure: int, last: int = 0) -> Packet:
    return packet_of(message(procedure, last=last))


def test_what_decides_the_guest_waits_for_the_ledger() -> None:
    assert at_source(call(CONFIRM)) is Verdict.KEEP
    assert at_source(call(CONFIRM, last=1)) is Verdict.KEEP
    assert at_source(call(PERFORM)) is Verdict.KEEP
    assert at_destination(call(FINISH)) is Verdict.KEEP
    assert at_destination(call(FINISH, last=1)) is Verdict.REFUSE


@pytest.mark.parametrize("judge", [at_source, at_destination])
def test_a_call_that_is_not_known_never_passes(judge: object) -> None:
    assert callable(judge)
    harmless = {Procedure.BEGIN, PREPARE, PERFORM, FINISH, CONFIRM}
    asked = set(Procedure) - harmless
    for number in range(1, 600):
        verdict = judge(call(number))
        assert verdict is not Verdict.PASS or number in asked | {Procedure.BEGIN, PREPARE}, number
    for number in (
        8,
        9,
        10,
        12,
        17,
        301,
        304,
        308,
        450,
    ):  # create, destroy, resume, other ways to migrate, those to come
        assert judge(call(number)) is Verdict.REFUSE


def test_a_sign_of_life_passes() -> None:
    assert at_source(packet_of(message(1, 2, program=KEEPALIVE))) is Verdict.PASS
    assert at_destination(packet_of(message(2, 2, program=KEEPALIVE))) is Verdict.PASS


@pytest.mark.parametrize("length", [0, 4, 27, 37 << 20, 0xFFFFFFFF])
def test_a_packet_of_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(PacketError):
        length_of(struct.pack(">I", length))


def test_another_program_has_no_part_in_it() -> None:
    with pytest.raises(PacketError, match="no part"):
        packet_of(message(1, program=0x20008087))


class Ends:
    """Two sockets pairs with a relay between them."""

    def __init__(self, tmp_path: Path) -> None:
        self.path = tmp_path
        self.kept: list[int] = []
        self.replied: list[int] = []
        self.relay = Relay(
            at_destination,
            lambda packet: self.kept.append(packet.procedure),
            lambda packet: self.replied.append(packet.procedure),
        )

    async def begin(self) -> None:
        streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            streams.put_nowait((reader, writer))

        self.server = await asyncio.start_unix_server(take, self.path / "s")
        self.client = await asyncio.open_unix_connection(self.path / "s")
        client = await streams.get()
        self.daemon = await asyncio.open_unix_connection(self.path / "s")
        daemon = await streams.get()
        self.running = asyncio.create_task(self.relay.run(client, daemon))

    async def end(self) -> None:
        self.relay.cut()
        await self.running
        for _, writer in (self.client, self.daemon):
            writer.close()
        self.server.close()


async def test_a_kept_call_waits_and_what_follows_does_not(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    await ends.begin()
    try:
        async with asyncio.timeout(30):
            alive = message(2, 2, program=KEEPALIVE)
            ends.client[1].write(message(OPEN) + message(FINISH) + alive)
            assert await ends.daemon[0].readexactly(len(message(OPEN))) == message(OPEN)
            assert await ends.daemon[0].readexactly(len(alive)) == alive
            assert ends.kept == [FINISH]
            ends.relay.let_go(FINISH)
            assert await ends.daemon[0].readexactly(len(message(FINISH))) == message(FINISH)
            assert ends.relay.under_way(FINISH)
            answer = message(FINISH, 1)
            ends.daemon[1].write(answer)
            assert await ends.client[0].readexactly(len(answer)) == answer
            assert ends.replied == [FINISH]
    finally:
        await ends.end()


async def test_a_call_that_is_refused_ends_the_connection_and_is_never_sent(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    await ends.begin()
    async with asyncio.timeout(30):
        ends.client[1].write(message(FINISH, last=1) + message(OPEN))
        await ends.relay.closed.wait()
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await ends.daemon[0].readexactly(1)
    assert "no place in a migration" in ends.relay.why
    await ends.end()


async def test_only_its_own_source_is_told_what_a_copy_needs(tmp_path: Path) -> None:
    stages: list[Stage] = []

    async def daemon(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(daemon, tmp_path / "daemon")
    places = places_of(spec(tmp_path))
    incoming = Incoming("c0ffee", places, lambda stage, _why: stages.append(stage))
    port = await incoming.listen("127.0.0.1", tmp_path / "daemon")
    async with asyncio.timeout(30):
        stranger = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(EngineError, match="another copy"):
            await greet(*stranger, "5eed")
        source = await asyncio.open_connection("127.0.0.1", port)
        assert await greet(*source, "c0ffee") == places
        second = await asyncio.open_connection("127.0.0.1", port)
        with pytest.raises(EngineError, match="its source already"):
            await greet(*second, "c0ffee")
        with pytest.raises(EngineError, match="not loaded yet"):
            await incoming.finish()
        for _, writer in (stranger, source, second):
            writer.close()
        while incoming.stage is not Stage.BROKEN:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="it never ran"):
            await incoming.finish()
    await incoming.end()
    server.close()
    assert stages == [Stage.BROKEN]


def spec(directory: Path, inc: str = "a1") -> VmmSpec:
    return VmmSpec(
        "5f1c0000-0000-4000-8000-000000000001",
        inc,
        GuestSpec("web", memory_mib=64),
        directory,
        directory / "con",
        directory / f"{inc}.dev",
        "127.0.0.1",
    )


def test_a_domain_names_its_copy_and_moves_to_another_host_s_places(tmp_path: Path) -> None:
    here, there = spec(tmp_path / "here"), spec(tmp_path / "there", "b2")
    text = domain_xml(here, "tcg", "/usr/bin/qemu")
    made = ET.fromstring(text)
    assert made.findtext("name") == "web.a1"
    assert made.findtext("os/kernel") == str(tmp_path / "here" / "a1.kernel")
    gone = ET.fromstring(moved(text, places_of(there)))
    assert gone.findtext("name") == "web.a1", "libvirt changes the name by itself, and refuses ours"
    assert gone.findtext("os/kernel") == str(tmp_path / "there" / "b2.kernel")
    paths = [source.get("path") for source in gone.findall("devices/serial/source")]
    assert paths == [str(tmp_path / "there" / "b2.com1"), str(tmp_path / "there" / "b2.dev")]
    assert str(tmp_path / "here") not in ET.tostring(gone, encoding="unicode")


def with_hardware(directory: Path, inc: str, ifname: str) -> VmmSpec:
    mac = "52:54:00:00:00:0a"
    card = LiveDevice("nic-lan", "virtio-net-pci", properties={"mac": mac}, backend="nic:lan")
    disks = (DiskSpec("root", "nfs", "r.qcow2"), DiskSpec("data", "nfs", "d.raw", DiskFormat.RAW, read_only=True))
    guest = GuestSpec("web", memory_mib=64, disks=disks, nics=(NicSpec("lan", "prod", mtu=1400),))
    files = [
        DiskFile(each.name, directory / each.image, each.format, each.cache, each.read_only, PoolKind.SHARED_FILE)
        for each in disks
    ]
    machine = LiveMachine("pc-i440fx-10.0", "qemu64", 64, 1, devices=(card,))
    made = replace(spec(directory, inc), spec=guest, disks=tuple(files), machine=machine)
    return replace(made, taps=(Tap("lan", ifname),))


def test_disks_and_cards_are_those_of_the_host_that_a_domain_moves_to(tmp_path: Path) -> None:
    here, there = with_hardware(tmp_path / "here", "a1", "t-a1"), with_hardware(tmp_path / "there", "b2", "t-b2")
    text = domain_xml(here, "tcg", "/usr/bin/qemu")
    made = ET.fromstring(text)
    assert [kind.get("machine") for kind in made.findall("os/type")] == ["pc-i440fx-10.0"]
    assert [disk.find("readonly") is not None for disk in made.findall("devices/disk")] == [False, True]
    labels = [label.get("relabel") for label in made.findall("devices/disk/source/seclabel")]
    assert labels == ["no", "no"], "an image is the pool's: libvirt gives it to nobody"
    places = Places(**json.loads(json.dumps(places_of(there).told())))
    gone = ET.fromstring(moved(text, places))
    images = [source.get("file") for source in gone.findall("devices/disk/source")]
    assert images == [str(tmp_path / "there" / name) for name in ("r.qcow2", "d.raw")]
    assert [target.get("dev") for target in gone.findall("devices/interface/target")] == ["t-b2"]
    assert str(tmp_path / "here") not in ET.tostring(gone, encoding="unicode")
    bare = places_of(spec(tmp_path / "there", "b2"))
    assert not {"disks", "cards"} & set(bare.told()), "a source of an earlier version knows no such words"
    with pytest.raises(EngineError, match="a disk that is none of the guest's"):
        moved(text, bare)
    with pytest.raises(EngineError, match="a card that is none of the guest's"):
        moved(text, replace(bare, disks=places.disks))


def test_an_image_must_be_one_that_can_be_locked(tmp_path: Path) -> None:
    image = tmp_path / "r.raw"
    image.write_bytes(b"")
    must_be_lockable(image)
    with pytest.raises(EngineError, match=r"gone.raw cannot be locked: No such file"):
        must_be_lockable(tmp_path / "gone.raw")


def test_a_guest_that_the_engine_cannot_make_is_refused_with_what_of_it(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="network cards"):
        domain_xml(replace(spec(tmp_path), nics=(Nic("eth0", "52:54:00:00:00:01"),)), "tcg", "/usr/bin/qemu")
    disk = DiskFile("root", tmp_path / "r", DiskFormat.RAW, DiskCache.NONE, False, PoolKind.LOCAL)
    guest = GuestSpec("web", memory_mib=64, disks=(DiskSpec("root", "fast", "r"),))
    with pytest.raises(EngineError, match="disk root in the local pool fast"):
        domain_xml(replace(spec(tmp_path), spec=guest, disks=(disk,)), "tcg", "/usr/bin/qemu")
    with pytest.raises(EngineError, match="knows nothing of"):
        domain_xml(replace(spec(tmp_path), spec=guest), "tcg", "/usr/bin/qemu")
    with pytest.raises(EngineError, match="devices inside the VMM"):
        domain_xml(replace(spec(tmp_path), vfio_path=tmp_path / "v"), "tcg", "/usr/bin/qemu")


def test_guests_move_between_hosts_of_one_engine_only() -> None:
    assert "libvirt" in other_engine("qemu 10.0.2", "libvirt 11.3.0")
    assert other_engine("qemu 10.0.2", "qemu 11.1.3") == ""
    assert other_engine("", "libvirt 11.3.0") == "", "a host of a version that did not say"


@pytest.mark.parametrize(
    ("port", "made"), [(base.Vmm, LibvirtVmm), (base.MigrationEngine, LibvirtEngine), (base.DiskCopies, NoCopies)]
)
def test_nothing_of_the_port_is_left_to_its_empty_body(port: type, made: type) -> None:
    """A call that the port gets later would answer None here, without a word from the type checker."""
    assert [name for name in vars(port) if not name.startswith("_") and name not in vars(made)] == []


async def test_migrations_under_way_keep_no_thread_from_anybody_else() -> None:
    """Each waits in libvirt's client until its outcome is known, while its commit may need a thread."""
    daemon, over = Daemon("test:///default"), threading.Event()
    waiting = [daemon.in_thread(lambda: (over.wait(30), None)[1]) for _ in range(40)]
    try:
        async with asyncio.timeout(10):
            assert await asyncio.to_thread(lambda: "done") == "done"
    finally:
        over.set()
    await asyncio.gather(*waiting)


async def test_what_libvirt_s_client_says_at_its_end_arrives() -> None:
    def fails() -> None:
        raise EngineError("libvirt: no")

    with pytest.raises(EngineError, match="libvirt: no"):
        await Daemon("test:///default").in_thread(fails)
