"""The same judge after every test: each guest exists once, runs where the ledger says, and lost nothing.

Evidence is what the guests themselves said, as the collector stamped it (deploy/lab/cluster/evidence.py), the living
processes, and the ledger. Our own logs and reports are not heard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deploy.lab.cluster import console_client, evidence, processes
from deploy.lab.cluster.layout import CLUSTER_VARIABLE
from deploy.lab.workload import checked_pages, is_linux
from orchestrator import wire
from orchestrator.core.handover import Ownership
from orchestrator.core.records import ShimKind
from tests.integration.handover.scene import Born, Scene, consoles, noted

SETTLE_S = 40.0
"""So long after the test everything may take to be at rest: agents restart, records are read again, copies end."""
SILENT_S = 0.4
"""A guest that beats 50 times a second and is not heard for so long does not run."""
VERIFY_S = 60.0
AHEAD_MS = 5_000.0
"""On a busy machine a guest's beats may be late by so much, and then catch up."""
TOLD_HOLES = 10


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the guest itself says of its life, for the tests' figures."""

    guest: str
    stops_ms: tuple[float, ...]
    """Its long stops, hand-overs included."""
    evidence: evidence.GuestEvidence


def judge(scene: Scene, guests: Sequence[Born]) -> list[Verdict]:
    """Fails with what is wrong. Guests that are paused as wished are resumed here, so that they can speak."""
    for guest in guests:
        if guest.may_crash:
            _crashed(scene, guest)
    alive = [guest for guest in guests if not guest.may_crash]
    for guest in alive:
        _settled(lambda guest=guest: _at_rest(scene, guest), guest.name)
    alive = [guest for guest in alive if not (guest.may_end and _has_ended(scene, guest))]
    for guest in alive:
        if not scene.want_run(guest):
            _settled(lambda guest=guest: _speaks(scene, guest), guest.name)
            scene.client.resume_guest(guest.name)
        _runs(scene, guest)
    verdicts = [_spoke(scene, guest) for guest in alive]
    _settled(lambda: _strays(scene, guests), "the cluster")
    _settled(lambda: _promised(scene), "reservations")
    return verdicts


def _settled(wrong: Callable[[], str], who: str) -> None:
    """Until nothing is wrong."""
    deadline = time.monotonic() + SETTLE_S
    while said := wrong():
        assert time.monotonic() < deadline, f"{who}: {said}"
        time.sleep(0.05)


def _at_rest(scene: Scene, guest: Born) -> str:
    """What keeps the guest from being one copy, on its owner, with nothing under way; empty: nothing."""
    record = scene.record(guest)
    if record.phase is not Ownership.IDLE:
        return f"its record is {record.phase}, attempt {record.attempt}, owner {record.owner.host} {record.reason}"
    copies, owner = scene.vmms(guest), record.owner.host
    if [copy.host for copy in copies] != [owner]:
        return f"the record says {owner}, its VMMs are {copies}"
    copy = copies[0]
    if copy.role != "owner":
        return f"its VMM on {owner} still counts as a copy on its way: {copy}"
    if any(device.shim is ShimKind.COMPANION for device in guest.spec.devices):
        devices = noted(scene.layout, guest.uuid, devices=True)
        if [(each.host, each.inc) for each in devices] != [(owner, copy.inc)]:
            return f"its VMM is {copy.inc} on {owner}, its device processes are {devices}"
        states = scene.device_states(guest, owner)
        if set(states.values()) != {"RUNNING"}:
            return f"its devices are {states}"
    moving = [each.name for each in scene.client.list_migrations(guest.name, active_only=True)]
    return f"migrations {moving} are not over" if moving else ""


def _has_ended(scene: Scene, guest: Born) -> bool:
    """What a paused guest was told it hears when it runs again."""
    scene.answer(lambda: scene.client.resume_guest(guest.name))
    deadline = time.monotonic() + 2 * SILENT_S
    ended = False
    while not ended and time.monotonic() < deadline:
        ended = wire.word(scene.client.get_guest(guest.name), "run_state") == "ENDED"
        time.sleep(0.05)
    print(f"{guest.name} was told to power itself off, and {'did' if ended else 'did not hear it'}")
    return ended


def _speaks(scene: Scene, guest: Born) -> str:
    before = scene.beats(guest)
    time.sleep(SILENT_S)
    return "it is paused and beats" if scene.beats(guest) != before else ""


def _runs(scene: Scene, guest: Born) -> None:
    """Its heart beats, and each device answers, at the owner's."""
    owner = scene.record(guest).owner.host
    first = scene.beats(guest)

    def later() -> str:
        last = [log.beats[-1] for log in consoles(scene.layout, guest.name) if log.beats and log.vmm.host == owner]
        if not last or max(beat.number for beat in last) < first + 10:
            return f"it should run on {owner} and is not heard there"
        return ""

    _settled(later, guest.name)


def _spoke(scene: Scene, guest: Born) -> Verdict:
    """All of its memory is right, and its consoles prove one life."""
    owner = scene.record(guest).owner.host
    answer = console_client.verify_sync(scene.cluster.dir, guest.name, owner, timeout_s=VERIFY_S)
    rings = _rings(scene, guest)
    if guest.spec.devices:
        _settled(lambda: "" if _rings(scene, guest) > rings else "its devices do not answer", guest.name)
    logs = consoles(scene.layout, guest.name)
    said = evidence.examine(logs)
    wrong = {
        "bad pages": answer.bad,
        "page errors": said.page_errors,
        "device errors": said.device_errors,
        "overlapping copies": said.overlap.copies,
        "heartbeats missing": said.missing_beats,
        "ms before our clock": _ahead_ms(guest, logs),
        "boots beyond the first": sum(log.booted_ns is not None for log in logs) - 1,
    }
    assert answer.ok, answer
    if not is_linux(guest.spec.boot):
        pages = checked_pages(guest.spec.boot)
        assert answer.pages == pages, f"{guest.name} checked {answer.pages} pages of {pages}"
    assert not any(wrong.values()), f"{guest.name}: {wrong}, {said.overlap}\n{_told(logs)}"
    assert said.complaints == (), f"{guest.name}: {said.complaints}"
    return Verdict(guest.name, _stops(said, logs), said)


def _ahead_ms(guest: Born, logs: Sequence[evidence.ConsoleLog]) -> float:
    """How far a Linux guest's clock got before ours, beyond what the lateness of single beats explains."""
    if not is_linux(guest.spec.boot):
        return 0.0  # its beats come from a timer that runs on virtual time, and the machine has no other clock
    words = dict(word.split("=", 1) for word in guest.spec.boot.append.split() if "=" in word)
    ahead = evidence.ran_ahead_ms(logs, 1e9 / int(words["probe.heartbeat_hz"]))
    return round(ahead, 1) if ahead > AHEAD_MS else 0.0


def _told(logs: Sequence[evidence.ConsoleLog]) -> str:
    """For people: which beats are missing, where and when, and what could not be read."""
    hosts = {beat.number: log.vmm.host for log in logs for beat in log.beats}

    def told(beat: evidence.Beat) -> str:
        return f"{beat.number} ({hosts.get(beat.number, 'cut in two')}, {beat.ns / 1e9:.3f} s, unsaid {beat.unsaid})"

    lines = [
        f"{hole.missing} between {told(hole.before)} and {told(hole.after)}"
        for hole in evidence.holes(logs)[:TOLD_HOLES]
    ]
    for log in logs:
        if log.beats:
            first, last = log.beats[0], log.beats[-1]
            said = (
                f"beats {first.number}-{last.number}, {first.ns / 1e9:.3f}-{last.ns / 1e9:.3f} s, unsaid {last.unsaid}"
            )
            lines.append(f"{log.vmm.name}: {said}, unreadable {[*log.begun, *log.rest][-3:]}")
    return "\n".join(lines)


def _rings(scene: Scene, guest: Born) -> int:
    return max(log.beats[-1].device_rings for log in consoles(scene.layout, guest.name) if log.beats)


def _stops(said: evidence.GuestEvidence, logs: Sequence[evidence.ConsoleLog]) -> tuple[float, ...]:
    period = (said.period_ms or 0.0) * 1e6
    within = [stop.pause_ms for log in logs for stop in evidence.pauses(log, period)]
    between = [over.downtime_ms for over in said.hand_overs if over.downtime_ms is not None]
    return tuple(sorted((round(ms, 1) for ms in [*within, *between] if ms > 20), reverse=True))


def _crashed(scene: Scene, guest: Born) -> None:
    """The process that was the guest was killed: said as that, and nothing of it runs anywhere."""

    def wrong() -> str:
        record = scene.record(guest)
        if record.phase is not Ownership.CRASHED:
            return f"its record is {record.phase}, owner {record.owner.host}"
        copies = [*scene.vmms(guest), *noted(scene.layout, guest.uuid, devices=True)]
        return f"it crashed, and there still are {copies}" if copies else ""

    _settled(wrong, guest.name)


def _strays(scene: Scene, guests: Sequence[Born]) -> str:
    """A VMM or a device process that is nobody's."""
    known = {guest.uuid for guest in guests}
    written = [*noted(scene.layout), *noted(scene.layout, devices=True)]
    strays = [str(each) for each in written if each.uuid not in known]
    pids = {each.pid for each in written}
    for seen in processes.scan():
        if seen.pid in pids or seen.environment().get(CLUSTER_VARIABLE) != str(scene.layout.dir):
            continue
        words = " ".join(seen.arguments()[:3])
        if ("qemu-system" in words and "-M none" not in words) or "deploy.lab.devices.device_process" in words:
            strays.append(f"{seen.pid} {words} is in no note")
    return ", ".join(strays)


def _promised(scene: Scene) -> str:
    held = {host.name: host.memory_reserved_mib for host in scene.client.list_hosts() if host.memory_reserved_mib}
    return f"memory is still promised: {held}" if held else ""


def nothing_is_left(scene: Scene, guests: Sequence[Born]) -> None:
    """After the guests were ended: no process, directory, marker or console of any of them."""

    def left() -> str:
        found = [*noted(scene.layout), *noted(scene.layout, devices=True)]
        files = [*scene.layout.hosts.glob("*/guests/*"), *scene.layout.hosts.glob("*/volatile/*")]
        files += scene.layout.console.glob("*.sock")
        return f"{found} {[str(path) for path in files]}" if found or files else ""

    _settled(left, f"{', '.join(guest.name for guest in guests)} ended, and something of them is left")
