"""QEMUs that nobody of Drover's has started become guests, in a cluster of real agents: moved at once, hit, given back.

Each is started by hand in its host's network, with a disk in the host's own pool. Its console is where the collector of
consoles looks, so that it is judged like every other guest, from before it was anybody's.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from deploy.lab.cluster.network import command_in
from deploy.lab.workload import boot_of
from orchestrator import wire
from orchestrator.cli import main
from orchestrator.cli.exits import Exit
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from protos.drover.v1 import orchestrator_pb2 as pb
from tests.integration.handover.scene import QUIET, Born, Scene

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]
all_of_it = pytest.mark.skipif(not os.environ.get("DROVER_LONG"), reason="`make matrix` runs it: DROVER_LONG=1")

SIZE = 16 << 20
SLOW_MBPS = 16
"""So that a move can be hit while it is under way."""


@dataclass
class ByHand:
    """A QEMU that somebody started on the host where a scene's guests begin."""

    scene: Scene
    name: str
    directory: Path
    process: subprocess.Popen[bytes]
    append: str

    @property
    def qmp(self) -> str:
        return str(self.directory / "q")

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def beats(self, host: str = "") -> int:
        return self.scene.beats(Born(self.name, "", GuestSpec(self.name)), host)

    def adopt(self, *, slow: bool = False, validate_only: bool = False) -> pb.AdoptGuestResponse:
        """Adopt it, and have it moved to where its scene's guests go."""
        scene = self.scene
        policy = MigrationPolicy(max_bandwidth_mbps=SLOW_MBPS) if slow else MigrationPolicy()
        wished = GuestSpec(self.name, policy=policy, labels={"from": "hand"})
        return scene.client.adopt_guest(
            self.name, scene.here, self.process.pid, self.qmp, wished, scene.there, validate_only=validate_only
        )

    def judged(self, answer: pb.AdoptGuestResponse) -> Born:
        """From here on it is a guest of the scene."""
        spec = wire.guest_spec_from_proto(answer.guest.spec)
        born = Born(self.name, answer.guest.uuid, replace(spec, name=self.name))
        self.scene.guests.append(born)
        return born

    def monitor_greets(self) -> bool:
        """Its monitor serves whoever comes."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.settimeout(2.0)
            with contextlib.suppress(OSError):
                asked.connect(self.qmp)
                return asked.recv(64).startswith(b'{"QMP"')
        return False


@contextlib.contextmanager
def by_hand(scene: Scene, tmp_path: Path, *more: str) -> Iterator[ByHand]:
    name = f"hand-{secrets.token_hex(4)}"
    directory = Path(f"/tmp/d-{name}")
    directory.mkdir()
    pool = scene.layout.local_pool(scene.here)
    with (pool / f"{name}.raw").open("wb") as image:
        image.truncate(SIZE)
    configuration = json.loads((scene.layout.host(scene.here) / "agent.json").read_bytes())
    append = boot_of(QUIET, seed=1).append
    command = ["qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "64", "-nodefaults", "-display", "none"]
    command += ["-qmp", f"unix:{directory / 'q'},server=on,wait=off", "-uuid", "0d1b3c5e-0000-4000-8000-00000000abcd"]
    command += ["-chardev", f"socket,id=con,path={directory / 'c'},server=on,wait=off", "-serial", "chardev:con"]
    command += ["-device", "pcie-root-port,id=p1,chassis=1,port=0x10", "-device", "virtio-balloon-pci"]
    command += [
        "-drive",
        f"file={pool / name}.raw,format=raw,if=none,id=d0",
        "-device",
        "virtio-blk-pci,drive=d0,bus=p1",
    ]
    command += ["-kernel", configuration["guest_image"], "-append", append, *more]
    place = next(place for place in scene.cluster.places.hosts if place.name == scene.here)
    link = scene.layout.console / f"{scene.here}.{name}.{secrets.token_hex(8)}.sock"
    with (tmp_path / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            command_in(place.namespace, command), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    made = ByHand(scene, name, directory, process, append)
    try:
        scene.reach((directory / "c").exists, f"the console of {name}")
        link.symlink_to(directory / "c")
        scene.reach(lambda: made.beats() > 1, f"{name} beats")
        yield made
    finally:
        process.kill()
        process.wait()
        link.unlink(missing_ok=True)
        shutil.rmtree(directory)


def images(scene: Scene, guest: Born) -> set[str]:
    """Hosts that have the image of its disk."""
    name = guest.spec.disks[0].image
    return {path.relative_to(scene.layout.hosts).parts[0] for path in scene.layout.hosts.glob(f"*/pools/fast/{name}")}


def arrived(scene: Scene, hand: ByHand, guest: Born, migration: str) -> None:
    scene.agents_are_back()
    scene.succeeded(migration, 60.0)
    assert scene.record(guest).owner.host == scene.there
    scene.reach(lambda: not hand.runs, "the end of the process that it was adopted from")
    scene.reach(lambda: images(scene, guest) == {scene.there}, "one image, where the guest is")


def test_it_moves_at_once_and_is_a_guest_like_any_other(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with by_hand(scene, tmp_path) as hand:
        told = ["--host", scene.here, "--pid", str(hand.process.pid), "--qmp", hand.qmp]
        assert main.run(["--api", scene.cluster.api, "guest", "adopt", hand.name, *told, "--dry-run"]) == Exit.OK
        assert "could be adopted" in capsys.readouterr().out
        answer = hand.adopt()
        guest = hand.judged(answer)
        arrived(scene, hand, guest, answer.migration.name)
        assert guest.spec.labels == {"from": "hand"}
        scene.here, scene.there = scene.there, scene.here
        scene.succeeded(scene.migrate(guest, scene.there), 60.0)


def test_agent_dies_between_the_record_and_the_move(scene: Scene, tmp_path: Path) -> None:
    with by_hand(scene, tmp_path) as hand:
        with scene.frozen(scene.agent(scene.there)):
            answer = hand.adopt()
            guest = hand.judged(answer)
            assert scene.record(guest).owner.host == scene.here
            scene.kill_agent(scene.here)
        arrived(scene, hand, guest, answer.migration.name)


@all_of_it
def test_its_destination_dies(scene: Scene, tmp_path: Path) -> None:
    with by_hand(scene, tmp_path) as hand:
        answer = hand.adopt(slow=True)
        guest = hand.judged(answer)
        scene.kill(scene.incoming(guest))
        arrived(scene, hand, guest, answer.migration.name)
        assert len(scene.client.get_migration(answer.migration.name).attempts) > 1


@all_of_it
def test_source_agent_dies_while_it_moves(scene: Scene, tmp_path: Path) -> None:
    with by_hand(scene, tmp_path) as hand:
        answer = hand.adopt(slow=True)
        guest = hand.judged(answer)
        scene.incoming(guest)
        scene.kill_agent(scene.here)
        arrived(scene, hand, guest, answer.migration.name)


def test_given_back_it_runs_on_and_can_be_adopted_again(scene: Scene, tmp_path: Path) -> None:
    """Its move has been asked for and cannot go on: the destination's agent stands still."""
    with by_hand(scene, tmp_path) as hand:
        with scene.frozen(scene.agent(scene.there)):
            before = hand.adopt()
            assert not hand.monitor_greets()
            given_back = Born(hand.name, before.guest.uuid, GuestSpec(hand.name))
            scene.reach(lambda: scene.record(given_back).phase is Ownership.OPEN, "an attempt")
            gone = scene.client.release_guest(hand.name)
            assert (gone.uuid, wire.word(gone, "ownership")) == (before.guest.uuid, "GONE")
            record = scene.record(given_back)
            assert (record.phase, record.released) == (Ownership.GONE, True)
            scene.reach(hand.monitor_greets, "a monitor that is free")
            beats = hand.beats(scene.here)
            scene.reach(lambda: hand.beats(scene.here) > beats, "a guest that runs on")
            assert hand.runs
        scene.kill_agent(scene.here)  # its successor finds nothing of the guest that it would end or keep
        scene.agents_are_back()
        beats = hand.beats(scene.here)
        scene.reach(lambda: hand.beats(scene.here) > beats, "a guest that runs on")
        assert hand.runs
        answer = scene.reach(hand.adopt, "an adoption by the agent that is back")
        assert answer.guest.uuid != before.guest.uuid
        arrived(scene, hand, hand.judged(answer), answer.migration.name)
        assert scene.answer(lambda: scene.client.release_guest(hand.name)) == RefusalReason.NOT_ADOPTABLE


def refused(hand: ByHand) -> Sequence[str]:
    """Reasons that the answer of a dry run has; an adoption in earnest is refused, and changes nothing."""
    found = [each.reason for each in hand.adopt(validate_only=True).obstacles]
    with pytest.raises(DroverError) as error:
        hand.adopt()
    assert {reason for reason, _ in error.value.violations} == set(found)
    assert hand.runs
    assert not hand.scene.client.list_guests(filter=f'name = "{hand.name}"')
    return found


def test_everything_against_it_is_told_and_nothing_is_done(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ["-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r0", "-vga", "std"]
    odd += ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0", "-cpu", "max"]
    with by_hand(scene, tmp_path, *odd) as hand:
        reasons = refused(hand)
        wanted = {"NOT_ADOPTABLE", "DEVICE_NOT_MIGRATABLE", "NETWORK_NOT_FOUND", "CPU_NOT_AVAILABLE"}
        assert set(reasons) >= wanted | {"EXTRA_ARGS_NOT_ALLOWED"}
        told = ["--host", scene.here, "--pid", str(hand.process.pid), "--qmp", hand.qmp, "--dry-run"]
        assert main.run(["--api", scene.cluster.api, "guest", "adopt", hand.name, *told]) == Exit.REFUSED
        assert "NETWORK_NOT_FOUND" in capsys.readouterr().out


def test_machine_that_cannot_be_built_is_found_by_building_it(scene: Scene, tmp_path: Path) -> None:
    """`-usb` says nothing that could be refused, and what it adds is in no list of devices: only the trial shows it."""
    with by_hand(scene, tmp_path, "-usb") as hand:
        assert set(refused(hand)) == {"NOT_ADOPTABLE"}


def test_who_is_asked_must_be_free_and_the_one_that_is_meant(scene: Scene, tmp_path: Path) -> None:
    with by_hand(scene, tmp_path) as hand:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as somebody:
            somebody.connect(hand.qmp)
            assert somebody.recv(16)
            assert scene.answer(hand.adopt) == RefusalReason.MONITOR_BUSY
        scene.reach(hand.monitor_greets, "a monitor that is free again")
        client, here = scene.client, scene.here
        asked = [(1 << 22, RefusalReason.NOT_FOUND), (hand.scene.agent(here).pid, RefusalReason.NOT_ADOPTABLE)]
        for pid, reason in asked:
            assert scene.answer(lambda pid=pid: client.adopt_guest(hand.name, here, pid, hand.qmp)) == reason
        answer = hand.adopt(slow=True)
        guest = hand.judged(answer)
        again = scene.answer(lambda: client.adopt_guest(f"{hand.name}-2", here, hand.process.pid, hand.qmp))
        assert again in (RefusalReason.ALREADY_EXISTS, RefusalReason.NOT_FOUND)
        arrived(scene, hand, guest, answer.migration.name)


def test_process_that_dies_as_a_guest_is_said_to_be_dead(scene: Scene, tmp_path: Path) -> None:
    with by_hand(scene, tmp_path) as hand, scene.frozen(scene.agent(scene.there)):
        guest = hand.judged(hand.adopt())
        guest.may_crash = True
        hand.process.send_signal(signal.SIGKILL)
        scene.reach(lambda: scene.record(guest).phase is Ownership.CRASHED, "CRASHED")
