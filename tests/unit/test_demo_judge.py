"""The judge of the demo: on a run that keeps every promise it is silent, and each broken one it tells, by its name.

The evidence is made by hand: guests that move from host-1 to host-2, and what can be wrong with them, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from deploy.lab.cluster.evidence import ConsoleLog, NoiseFloor, Vmm, Window, parse_log
from deploy.lab.demo import judge
from deploy.lab.demo.incidents import Sight
from deploy.lab.demo.judge import (
    Answer,
    Attempt,
    GuestReport,
    OperatorPause,
    Role,
    RoleError,
    Run,
    Sightings,
    broken_promises,
    guest_document,
    report_on,
    role_of,
)
from deploy.lab.linux_guest.image import Verdict
from deploy.lab.peer.outage import Outage
from orchestrator.core.records import DeviceSpec, DiskSpec, GuestSpec, ShimKind
from protos.drover.v1 import types_pb2

MS = 1_000_000
PERIOD = 20 * MS
HERE, THERE = "host-1", "host-2"
COMMITTED = Attempt(1, "COMMITTED", destination=THERE, zxid=77, sent_bytes=1000)
LATE = Attempt(1, "ABORTED", "LATE_SWITCHOVER_ACK", ("vgpu",), THERE, zxid=60)
RUN = Run(HERE, "SUCCEEDED", True, NoiseFloor(100, 0.0, 2.0, 5.0))


def line(ms: float, number: int, *, page_errors: int = 0, rings: int = 0, device_errors: int = 0) -> str:
    return f"{round(ms * MS)} H {number:08x} 00000001 {page_errors:08x} {rings:08x} {device_errors:08x} 00000000"


def beats(start_ms: float, first: int, count: int, **totals: int) -> list[str]:
    """Beats of a guest with devices have one more answer each."""
    return [line(start_ms + 20 * i, first + i, rings=first + i, **totals) for i in range(count)]


ROLE = Role("web", 64, ("vgpu",))
ANSWER = Answer(
    "m1", "SUCCEEDED", attempts=(COMMITTED,), owner=THERE, state_on_arrival="RUNNING", state_at_end="RUNNING"
)
SEEN = Sightings(consoles=(THERE,))


def arrival(start_ms: float = 1010, *, word: str = "V ok 00001000", **totals: int) -> list[str]:
    """Half a second of beats, the answer to a full check, half a second of beats."""
    verify = f"{round((start_ms + 490) * MS)} {word}"
    return [*beats(start_ms, 51, 25, **totals), verify, *beats(start_ms + 500, 76, 25, **totals)]


@dataclass
class Story:
    """A guest that beats 50 times at the source and 50 times at the destination, and checks itself in between."""

    role: Role = ROLE
    answer: Answer = ANSWER
    seen: Sightings = SEEN
    source: list[str] = field(default_factory=lambda: beats(0, 1, 50))
    destination: list[str] = field(default_factory=arrival)
    others: list[ConsoleLog] = field(default_factory=list[ConsoleLog])
    images: tuple[Verdict | None, ...] = ()

    def answered(self, **changes: object) -> Story:
        return replace(self, answer=replace(self.answer, **changes))

    def report(self) -> GuestReport:
        logs = [
            parse_log(Vmm(HERE, self.role.name, "a1"), self.source),
            parse_log(Vmm(THERE, self.role.name, "b2"), self.destination),
            *self.others,
        ]
        return replace(report_on(self.role, HERE, self.answer, self.seen, logs, PERIOD), images=self.images)


def late() -> Story:
    """Two late ACKs, then the move; the aborts are seen at 300 and 600 ms."""
    story = Story(role=Role("late", 64, ("vgpu",), late_acks=2))
    attempts = (LATE, replace(LATE, number=2), replace(COMMITTED, number=3))
    return replace(story.answered(attempts=attempts), seen=Sightings((300 * MS, 600 * MS), consoles=(THERE,)))


def paused() -> Story:
    """Paused at 980 ms, resumed at 4000 ms at its destination."""
    attempt = replace(COMMITTED, pending_when_stopped=("vgpu",))
    pause = OperatorPause(("vgpu",), 970 * MS, 985 * MS, 4000 * MS)
    return Story(
        role=Role("paused", 64, ("vgpu",), stopped_by="operator"),
        answer=replace(ANSWER, attempts=(attempt,), state_on_arrival="PAUSED"),
        seen=Sightings(pause=pause, consoles=(THERE,)),
        destination=arrival(4010),
    )


def suspended() -> Story:
    attempt = replace(COMMITTED, pending_when_stopped=("vgpu",), suspended=True)
    return replace(Story(), role=Role("busy", 96, ("vgpu",), stopped_by="policy")).answered(attempts=(attempt,))


def linux(outage: Outage | None = Outage(31.0, 204.0)) -> Story:  # noqa: B008 - frozen
    """Its promised records stand where others have their devices' answers."""
    role = Role("linux", 128, disks=(DiskSpec("data", "fast", "linux.qcow2"),), linux=True)
    return Story(role=role, seen=Sightings(consoles=(THERE,), outage=outage), images=(Verdict(100, (), 100),))


CLEAN: dict[str, Callable[[], Story]] = {
    "plain": Story,
    "late": late,
    "paused": paused,
    "suspended": suspended,
    "linux": linux,
}


@pytest.mark.parametrize("story", CLEAN.values(), ids=CLEAN)
def test_nothing_is_told_of_a_guest_that_kept_everything(story: Callable[[], Story]):
    assert broken_promises(RUN, [story().report()]) == []


def with_pause(story: Story, **changes: object) -> Story:
    assert story.seen.pause
    pause = replace(story.seen.pause, **changes)
    return replace(story, seen=replace(story.seen, pause=pause))


BROKEN: dict[str, tuple[Callable[[], Story], str]] = {
    "no answer after the move": (
        lambda: linux(Outage(31.0, None)),
        "linux: it did not answer its peer outside again after its move",
    ),
    "nobody talked with it": (lambda: linux(None), "linux: it did not answer its peer outside again after its move"),
    "connection broke": (
        lambda: linux(Outage(31.0, 204.0, breaks=1)),
        "linux: its TCP connection to its peer outside broke, 1 in all",
    ),
    "wrong answer": (
        lambda: linux(Outage(31.0, 204.0, wrong=2)),
        "linux: 2 of its answers to its peer outside were not what had been sent",
    ),
    "record not on the image": (
        lambda: replace(linux(), images=(Verdict(100, (98, 99), 97),)),
        "linux: 2 of 100 promised records are not on the image of its disk data in the pool fast",
    ),
    "image that cannot be read": (
        lambda: replace(linux(), images=(None,)),
        "linux: the image of its disk data could not be read afterwards",
    ),
    "wrong record": (
        lambda: replace(linux(), destination=arrival(device_errors=3)),
        "linux: 3 pieces of its disks were wrong or could not be written",
    ),
    "migration failed": (
        lambda: Story().answered(phase="FAILED", why="ATTEMPTS_EXHAUSTED"),
        "web: its migration ended FAILED (ATTEMPTS_EXHAUSTED)",
    ),
    "still there": (lambda: Story().answered(owner=HERE), "web: it is still on host-1"),
    "runs where nobody says": (
        lambda: Story().answered(owner="host-3"),
        "web: ZooKeeper says that host-3 owns it, its heartbeat comes from host-2",
    ),
    "copy left at the source": (
        lambda: replace(Story(), seen=Sightings(consoles=(HERE, THERE))),
        "web: it should have a VMM on host-2 only, its consoles are open on host-1, host-2",
    ),
    "went by way of another host": (
        lambda: replace(
            Story(source=beats(0, 1, 25)), others=[parse_log(Vmm("host-3", "web", "c3"), beats(505, 26, 25))]
        ),
        "web: its heartbeat changed its VMM 2 times instead of once",
    ),
    "late ACK that did not abort": (
        lambda: replace(late().answered(attempts=(COMMITTED,)), seen=Sightings(consoles=(THERE,))),
        "late: LATE_SWITCHOVER_ACK ended 0 of its attempts, the script asks for 2",
    ),
    "abort without its device": (
        lambda: late().answered(attempts=(LATE, replace(LATE, number=2, devices=()), replace(COMMITTED, number=3))),
        "late: attempt 2 was aborted for a late ACK and names none of its devices",
    ),
    "no zxid": (
        lambda: Story().answered(attempts=(replace(COMMITTED, zxid=0),)),
        "web: attempt 1 (COMMITTED) has no zxid: where was it written?",
    ),
    "two commits": (
        lambda: Story().answered(attempts=(COMMITTED, replace(COMMITTED, number=2))),
        "web: not exactly one of its attempts is reported as committed",
    ),
    "silent between two attempts": (
        lambda: replace(
            late(), source=[text for text in beats(0, 1, 50) if not 300 <= int(text.split()[0]) / MS < 605]
        ),
        "late: no heartbeat came from host-1 after attempt 1 was aborted",
    ),
    "silent after the last abort": (
        lambda: replace(late(), source=beats(0, 1, 30)),
        "late: no heartbeat came from host-1 after attempt 2 was aborted",
    ),
    "abort not seen": (
        lambda: replace(late(), seen=Sightings((300 * MS,), consoles=(THERE,))),
        "late: 2 attempts were aborted and 1 of them seen, so what it did is not proven",
    ),
    "never paused": (
        lambda: replace(paused(), seen=Sightings(consoles=(THERE,))),
        "paused: the operator never saw it wait for an ACK in pre-copy, so it was not paused",
    ),
    "paused without an ACK pending": (
        lambda: with_pause(paused(), pending=()),
        "paused: no ACK of its devices was pending when the operator paused it",
    ),
    "paused too late": (
        lambda: with_pause(paused(), effective_ns=None),
        "paused: the operator's pause was not applied in pre-copy",
    ),
    "beat while paused": (
        lambda: replace(paused(), source=[*beats(0, 1, 49), line(2000, 50, rings=50)]),
        "paused: its heart beat while it was paused",
    ),
    "arrived running": (
        lambda: paused().answered(state_on_arrival="RUNNING"),
        "paused: it arrived RUNNING, not paused",
    ),
    "ran before it was resumed": (
        lambda: with_pause(paused(), resumed_ns=4050 * MS),
        "paused: it ran at its destination before the operator resumed it",
    ),
    "pending ACK not reported": (
        lambda: paused().answered(attempts=(COMMITTED,)),
        "paused: the report names no ACK that was pending when it was stopped on purpose",
    ),
    "converged": (
        lambda: suspended().answered(attempts=(replace(COMMITTED, pending_when_stopped=("vgpu",)),)),
        "busy: policy never suspended it: it converged, which it should not",
    ),
    "suspended and left so": (
        lambda: suspended().answered(state_on_arrival="STOPPED"),
        "busy: it arrived STOPPED, not running",
    ),
    "suspended without an ACK pending": (
        lambda: suspended().answered(attempts=(replace(COMMITTED, suspended=True),)),
        "busy: the report names no ACK that was pending when it was stopped on purpose",
    ),
    "ran twice": (
        lambda: replace(Story(), source=beats(0, 1, 55)),
        "web: 9 of its heartbeats prove a second running copy",
    ),
    "wrong page on the way": (
        lambda: replace(
            Story(),
            destination=arrival(page_errors=3),
        ),
        "web: it found 3 of its pages wrong while it ran",
    ),
    "wrong page at the end": (
        lambda: replace(Story(), destination=arrival(word="V bad 00000002")),
        "web: its check of all memory found 2 wrong pages",
    ),
    "memory not checked": (
        lambda: replace(Story(), destination=beats(1010, 51, 50)),
        "web: it did not check all of its memory after its arrival",
    ),
    "memory checked before it moved": (
        lambda: replace(
            Story(),
            source=[*beats(0, 1, 49), f"{970 * MS} V ok 00001000", *beats(980, 50, 1)],
            destination=beats(1010, 51, 50),
        ),
        "web: it did not check all of its memory after its arrival",
    ),
    "complaint": (
        lambda: replace(Story(), destination=[*arrival(), f"{2100 * MS} E t 00000001 00000002 00000003"]),
        "web: it complained: E t 00000001 00000002 00000003",
    ),
    "stale device": (
        lambda: replace(
            Story(),
            destination=arrival(device_errors=4),
        ),
        "web: 4 answers of its devices were wrong",
    ),
    "dead device": (
        lambda: replace(
            Story(), destination=[line(1010, 51, rings=50), f"{1500 * MS} V ok 00001000", line(1510, 76, rings=50)]
        ),
        "web: its devices answered nothing after its arrival",
    ),
    "stopped in the end": (
        lambda: replace(Story(), destination=[*beats(1010, 51, 25), f"{1500 * MS} V ok 00001000"]),
        "web: at the end its heart does not beat",
    ),
    "stopped in the end, says the API": (
        lambda: Story().answered(state_at_end="UNKNOWN"),
        "web: at the end the API says that it is UNKNOWN",
    ),
    "nobody knows its downtime": (
        lambda: replace(Story(), seen=replace(paused().seen, consoles=(THERE,))),
        "web: its downtime cannot be told from its heartbeats",
    ),
}


@pytest.mark.parametrize(("story", "sentence"), BROKEN.values(), ids=BROKEN)
def test_a_broken_promise_of_a_guest_is_told(story: Callable[[], Story], sentence: str):
    assert sentence in broken_promises(RUN, [Story().report(), story().report()])


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        (replace(RUN, evacuation_phase="FAILED"), "the evacuation of host-1 ended FAILED"),
        (replace(RUN, evacuation_phase=""), "the evacuation of host-1 ended unknown"),
        (replace(RUN, safe_to_power_off=False), "host-1 is not said to be safe to power off"),
        (replace(RUN, leftovers=("process 7: qemu",)), "left behind on the machine: process 7: qemu"),
        (replace(RUN, mishaps=("the watch broke",)), "the watch broke"),
        (
            replace(RUN, noise=NoiseFloor(0, None, None, None)),
            "no guest was ever left alone, so there is no noise floor and no downtime is known",
        ),
    ],
)
def test_a_broken_promise_of_the_evacuation_is_told(run: Run, sentence: str):
    assert broken_promises(run, [Story().report()]) == [sentence]


def test_the_figures_are_the_guests_own():
    document = guest_document(late().report(), ["demo-serial/a.log"])
    assert document["downtime_ms"] == pytest.approx(10)
    assert document["longest_stop_at_source_ms"] == 0
    assert document["device_errors"] == document["overlapping_copies"] == 0
    assert document["memory_verified"] is True
    assert document["final_run_state"] == "RUNNING"
    assert [(a["outcome"], a["reason"], a["devices"], a["zxid"]) for a in document["attempts"]] == [
        ("ABORTED", "LATE_SWITCHOVER_ACK", ["vgpu"], 60),
        ("ABORTED", "LATE_SWITCHOVER_ACK", ["vgpu"], 60),
        ("COMMITTED", "", [], 77),
    ]
    assert guest_document(paused().report(), [])["downtime_ms"] is None


# --- what a guest file says of its guests


def spec(**labels: str) -> GuestSpec:
    device = DeviceSpec("vgpu", ShimKind.COMPANION)
    return GuestSpec("web", 64, devices=(device,), labels={k.replace("_", "-"): v for k, v in labels.items()})


def test_labels_say_what_is_in_store():
    assert role_of(spec(late_acks="3")) == Role("web", 64, ("vgpu",), late_acks=3)
    assert role_of(spec(stopped_by="policy")) == Role("web", 64, ("vgpu",), stopped_by="policy")
    assert role_of(replace(spec(tier="web"), devices=())) == Role("web", 64)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (spec(late_acks="some"), "web: the label late-acks must be a number, not 'some'"),
        (spec(stopped_by="me"), "web: the label stopped-by must be operator or policy, not 'me'"),
        (replace(spec(late_acks="1"), devices=()), "web: without a device nobody asks for an ACK"),
    ],
)
def test_labels_that_make_no_sense_are_refused(wrong: GuestSpec, sentence: str):
    with pytest.raises(RoleError, match=sentence):
        role_of(wrong)


# --- what was seen of a migration


def message(attempt: int, phase: str) -> types_pb2.Migration:
    return types_pb2.Migration(
        name="m1", guest="web", attempt=attempt, phase=types_pb2.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
    )


def test_each_abort_is_stamped_when_it_is_first_seen():
    sight = Sight()
    phases = [(1, "PRECOPY"), (1, "ABORTING"), (1, "RETRY_WAIT"), (2, "PREPARING"), (3, "PRECOPY"), (3, "SUCCEEDED")]
    for ns, (attempt, phase) in enumerate(phases, start=1):
        sight.see(message(attempt, phase), ns)
    # Nothing was seen of the end of attempt 2 but that a third began.
    assert (sight.migration, sight.first_ns, sight.aborts_ns, sight.over_ns) == ("m1", 1, [2, 5], 6)


def test_the_last_attempt_of_a_failed_migration_was_aborted_too():
    sight = Sight()
    sight.see(message(1, "PRECOPY"), 1)
    sight.see(message(1, "FAILED"), 2)
    assert (sight.aborts_ns, sight.over_ns) == ([2], 2)


def test_a_guest_is_left_alone_before_it_moves_and_after():
    moved = Sight(first_ns=3000 * MS, over_ns=5000 * MS)
    assert moved.left_alone(1000 * MS, 9000 * MS) == (
        Window(1000 * MS, 3000 * MS),
        Window(5200 * MS, 9000 * MS),
    )
    assert Sight(first_ns=3000 * MS).left_alone(1000 * MS, 9000 * MS) == (Window(1000 * MS, 3000 * MS),)


def test_the_report_has_the_outage_beside_the_downtime() -> None:
    told = guest_document(linux().report(), [])
    assert told["outage_ms"] == {"udp": 31.0, "tcp": 204.0}
    assert (told["promised_records"], told["device_answers"]) == (100, 0)
    (disk,) = told["disks"]
    assert disk | {"sent_bytes": 0, "sent_again_bytes": 0} == disk
    assert disk["image"] == {"promised": 100, "missing": 0}
    assert guest_document(Story().report(), [])["outage_ms"] is None


def test_what_was_sent_of_a_disk_is_told_and_what_of_it_again() -> None:
    attempts = [Attempt(1, "ABORTED", disk_bytes={"data": 900}), Attempt(2, "COMMITTED", disk_bytes={"data": 40})]
    told = judge._disk(DiskSpec("data", "fast", "d"), None, attempts)
    assert (told["sent_bytes"], told["sent_again_bytes"]) == (940, 40)
    shared = judge._disk(DiskSpec("all", "shared", "d"), None, attempts)
    assert (shared["sent_bytes"], shared["sent_again_bytes"]) == (0, 0)
