"""Guests with local disks: moved under a write load and aborted in five ways, and what a disk costs beside none.

Two hosts of the local cluster, real agents, real storage daemons. The guest is the lab's Linux, which writes blocks and
synced records all the while. After each move it checks all of its blocks and pages by itself, its image is read from
outside for every promised record, and where it was paused on its way (so that nothing was written since) the image that
it left and the one that it came to are compared byte by byte.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from deploy.lab.cluster import console_client, parts
from deploy.lab.cluster import processes as lab_processes
from deploy.lab.linux_guest.image import check, seed_of
from deploy.lab.workload import LINUX_INITRD, LinuxWorkload, linux_boot_of
from orchestrator import wire
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import DiskFormat, DiskSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.bench.guests.registry import Asked, Figure, NotHere, Scene, at_most, beside, not_taken, spread
from tests.fakes.cluster import make_config, running_cluster, short_directory
from tests.integration.handover import disks as lab_disks
from tests.integration.handover import scene as lab
from tests.integration.handover.scene import Born, Observer

DISK_MIB = 64
MOVES, EVERY_PAUSED = 200, 10
MOVE_S = 120.0
MOVES_S = 2_400.0
"""For all moves; what is not done by then is left out, and the figures say how many were."""
SLOW = "delays: [{call: load, ms: 300}, {call: validate, ms: 400}]"
"""A device that holds each attempt in pre-copy and once everything was sent, so that it can be hit there."""
ABORTS = {1, 4, 7}
"""Of each ten moves, those in which an attempt is ended."""


@contextmanager
def hosts() -> Iterator[lab.Scene]:
    """Two of them, with a place for guests to be moved. Raises NotHere."""
    directory = short_directory()
    config = make_config(directory, hosts=2, chaos=True)
    images, _ = parts.linux_guest(config.layout)
    try:
        if shutil.which(config.qemu) is None or not (images / LINUX_INITRD).is_file():
            raise NotHere("there is no QEMU, or no Linux guest (make linux-guest)")
        with running_cluster(config) as cluster, OrchestratorClient(cluster.api, 30) as client:
            observer = Observer(cluster)
            try:
                yield lab.Scene(cluster, client, observer, "bench", ("host-1", "host-2", "host-2"))
            finally:
                observer.close()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _linux(scene: lab.Scene, workload: LinuxWorkload, disk_mib: int, *, device: bool = True) -> Born:
    image = f"b-{secrets.token_hex(4)}.raw"
    disks = [DiskSpec("root", "fast", image, DiskFormat.RAW, size_bytes=disk_mib << 20)] if disk_mib else []
    shims = [lab.device("dpu", SLOW)] if device else []
    boot = linux_boot_of(workload, disks=len(disks))
    return scene.guest(*shims, memory_mib=128, machine="q35", disks=disks, boot=boot)


@dataclass
class Seen:
    """Over all moves."""

    moves: int = 0
    aborts: Counter[str] = field(default_factory=Counter[str])
    wrong_blocks: int = 0
    lost_records: int = 0
    compared: int = 0
    differing: int = 0
    again: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    """Way of an abort -> share of the disk that the next attempt sent."""
    copied_anew: Counter[str] = field(default_factory=Counter[str])
    """Way of an abort -> how often the next attempt copied everything."""


Way = Callable[[lab.Scene, Born, str], None]


def _none(scene: lab.Scene, guest: Born, migration: str) -> None:
    return


def _destination_dies(scene: lab.Scene, guest: Born, migration: str) -> None:
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.hold_on(0.2)
    scene.kill_if_alive(scene.incoming(guest))


def _daemon_dies(scene: lab.Scene, guest: Born, migration: str) -> None:
    scene.reach_device(guest, scene.here, "PRE_COPY")
    for identity in lab_disks.daemons(scene, guest).values():
        lab_processes.send(identity, signal.SIGKILL)


def _cancelled(scene: lab.Scene, guest: Born, migration: str) -> None:
    scene.reach_device(guest, scene.here, "PRE_COPY")
    scene.client.cancel_migration(migration)


def _agent_dies(scene: lab.Scene, guest: Born, migration: str) -> None:
    scene.reach_device(guest, scene.here, "STOP_COPY")
    scene.kill_agent(scene.there)
    scene.agents_are_back()


WAYS: dict[str, tuple[str, Way]] = {
    "late ACK": ("asks: [{at: freeze, times: 1}]", _none),
    "destination's agent died once everything was sent": ("", _agent_dies),
    "destination died behind the drain": ("", _destination_dies),
    "daemon died in pre-copy": ("", _daemon_dies),
    "cancelled in pre-copy": ("", _cancelled),
}


def over(scene: lab.Scene, migration: str) -> types_pb2.Migration:
    def ended() -> types_pb2.Migration | None:
        now = scene.client.get_migration(migration)
        return now if wire.word(now, "phase") in ("SUCCEEDED", "FAILED", "CANCELLED") else None

    return lab.reach(ended, f"the end of {migration}", MOVE_S)


def _told(report: types_pb2.AttemptReport, event: str) -> str:
    """What stands last."""
    found = [entry.detail.partition(": ")[2] for entry in report.timeline if entry.event == event]
    return found[-1] if found else ""


def _note_again(seen: Seen, way: str, ended: types_pb2.Migration) -> None:
    for before, after in zip(ended.attempts, ended.attempts[1:], strict=False):
        if before.reason == AbortReason.CANCELLED or not (how := _told(after, "disk_copied")):
            continue
        sent = int((_told(after, "disk_sent") or "0").split()[0])
        seen.again.setdefault(way, []).append(sent / (DISK_MIB << 20))
        seen.copied_anew[way] += how == "full"


def _moved(scene: lab.Scene, guest: Born, seen: Seen, way: str) -> None:
    """To the other host, one attempt ended in this `way` (empty: none)."""
    instruction, act = WAYS.get(way, ("", _none))
    if instruction:
        scene.client.instruct_device(guest.name, "dpu", instruction)
    migration = scene.migrate(guest, scene.there)
    act(scene, guest, migration)
    ended = over(scene, migration)
    if wire.word(ended, "phase") == "CANCELLED":
        seen.aborts[way] += 1
        ended = over(scene, scene.migrate(guest, scene.there))
    elif way:
        seen.aborts[way] += len(ended.attempts) > 1
    if wire.word(ended, "phase") != "SUCCEEDED":
        raise RuntimeError(f"a move ended {wire.word(ended, 'phase')}: {ended.message}")
    if way:
        _note_again(seen, way, ended)
    seen.moves += 1


def _compared(scene: lab.Scene, guest: Born, seen: Seen) -> None:
    """The guest is paused: what it left, and what it came to."""
    image = guest.spec.disks[0].image
    (left,) = (scene.layout.host(scene.here) / "pools" / "fast").glob(f"{image}.moved-*")
    came = lab_disks.image_of(scene, guest.spec.disks[0], scene.there)
    command = ["qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", str(left), str(came)]
    ran = subprocess.run(command, capture_output=True, check=False, timeout=60)
    seen.compared += 1
    seen.differing += ran.returncode != 0


def _judged(scene: lab.Scene, guest: Born, seen: Seen) -> None:
    """By itself, and from outside."""
    answer = console_client.verify_sync(scene.cluster.dir, guest.name, scene.there, timeout_s=60)
    seen.wrong_blocks += answer.bad
    promised = lab_disks.promised(scene, guest)
    path = lab_disks.image_of(scene, guest.spec.disks[0], scene.there)
    with path.open("rb") as file:
        verdict = check(lambda at, size: os.pread(file.fileno(), size, at), seed_of(guest.uuid), promised)
    seen.lost_records += len(verdict.missing)


def _take_moves(count: int, within_s: float) -> Seen:
    """As many of them as there is time for."""
    seen, ways = Seen(), list(WAYS)
    until_s = time.monotonic() + within_s
    with hosts() as scene:
        load = LinuxWorkload(records_per_s=50, load_mib=16, load_kib_per_s=2000, mem_mib=4)
        guest = _linux(scene, load, DISK_MIB)
        lab.reach(lambda: lab_disks.promised(scene, guest) > 5, "a promise", lab.BOOT_S)
        for number in range(count):
            if time.monotonic() > until_s:
                break
            way = (
                ways[(number // 10 * len(ABORTS) + sorted(ABORTS).index(number % 10)) % len(ways)]
                if (number % 10 in ABORTS)
                else ""
            )
            paused = number % EVERY_PAUSED == EVERY_PAUSED - 1
            if paused:
                scene.client.pause_guest(guest.name)
            _moved(scene, guest, seen, way)
            lab.reach(lambda: not lab_disks.daemons(scene, guest), "the daemon's end", 30)
            if paused:
                _compared(scene, guest, seen)
                scene.client.resume_guest(guest.name)
            _judged(scene, guest, seen)
            for left in (scene.layout.host(scene.here) / "pools" / "fast").glob("*.moved-*"):
                left.unlink()
            scene.here, scene.there = scene.there, scene.here
        scene.end_guests([guest])
    return seen


async def disk_moves(asked: Asked) -> list[Figure]:
    """200 moves, 60 of them with an attempt that is ended."""
    wanted = asked.many(MOVES, least=10)
    seen = await asyncio.to_thread(_take_moves, wanted, MOVES_S * asked.scale)
    ended = sum(seen.aborts.values())
    by_way = ", ".join(f"{count} {way}" for way, count in seen.aborts.items())
    note = f"of {wanted}; {ended} ended: {by_way}"
    return [
        beside("moves of a guest with a local disk under write load", seen.moves, "", note),
        at_most("blocks, pages and records that were wrong or lost", seen.wrong_blocks + seen.lost_records, "", 0),
        *_compared_figures(seen),
        *_again_figures(seen),
    ]


def _compared_figures(seen: Seen) -> list[Figure]:
    name = "images that differed, of those that were compared"
    if not seen.compared:
        return [not_taken(name, "no image was compared")]
    return [at_most(name, seen.differing, "", 0, f"{seen.compared} compared")]


def _again_figures(seen: Seen) -> list[Figure]:
    """What the attempt after one that was ended sent, where it came to one."""
    anew, again = "copies from the start after a late ACK", "sent in the attempt after a late ACK, of the disk"
    behind = "sent in the attempt after an abort behind the drain, of the disk"
    found: list[Figure] = []
    if sent := seen.again.get("late ACK"):
        found.append(at_most(anew, seen.copied_anew["late ACK"], "", 0, f"of {len(sent)}"))
        found.append(beside(again, statistics.median(sent), "", spread(sent)))
    else:
        found.append(not_taken(anew, "no attempt came after a late ACK"))
    if sent := seen.again.get("destination died behind the drain"):
        found.append(at_most(behind, statistics.median(sent), "", 0.1, spread(sent)))
    else:
        found.append(not_taken(behind, "no attempt came after such an abort"))
    return found


def _take_blackouts(rounds: int) -> tuple[list[float], list[float]]:
    with_disk, without = [], []
    with hosts() as scene:
        quiet = LinuxWorkload(records_per_s=25, mem_mib=4)
        guests = [_linux(scene, quiet, DISK_MIB, device=False), _linux(scene, quiet, 0, device=False)]
        for _ in range(rounds):
            for guest, into in zip(guests, (with_disk, without), strict=True):
                ended = over(scene, scene.migrate(guest, scene.there))
                if wire.word(ended, "phase") != "SUCCEEDED":
                    raise RuntimeError(f"a move ended {wire.word(ended, 'phase')}: {ended.message}")
                if not (stood_ms := ended.attempts[-1].blackout_ms):
                    raise RuntimeError("the report of a move does not say how long the guest stood")
                into.append(stood_ms)
            for left in (scene.layout.host(scene.here) / "pools" / "fast").glob("*.moved-*"):
                left.unlink()
            scene.here, scene.there = scene.there, scene.here
        scene.end_guests(guests)
    return with_disk, without


async def disk_blackout(asked: Asked) -> list[Figure]:
    """50 pairs of moves, turn and turn about."""
    with_disk, without = await asyncio.to_thread(_take_blackouts, asked.many(50, least=2))
    here, there = statistics.median(with_disk), statistics.median(without)
    more = statistics.median(a - b for a, b in zip(with_disk, without, strict=True))
    return [
        beside("blackout of a Linux guest with a local disk, median", here, "ms", spread(with_disk)),
        beside("the same without a disk, median", there, "ms", spread(without)),
        at_most("with a local disk minus without, median of the pairs", more, "ms", 15),
    ]


FIGURES = {
    "disk_moves": Scene(disk_moves, timeout_s=MOVES_S * 2),
    "disk_blackout": Scene(disk_blackout, timeout_s=900),
}
