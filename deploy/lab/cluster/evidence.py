"""PURE: what the guests' own heartbeats prove about a run: downtime, copies that ran twice, memory and device errors.

The input is the text of the collector's files, one per VMM (`<host>.<guest>.<inc>.log`), each line stamped on arrival
by one clock of one process: `<monotonic_ns> <text>`. What the guests send is in deploy/lab/guest_image/README.md; the
collector adds `CONNECTED`, `EOF` (the VMM closed its console), `DETACHED` (the collector ended), `TORN <text>` (end of
a connection within a line) and `LAG <ms>` (it stood still: the stamps of the last <ms> may be late).

The figures, and what each of them means exactly. All logs given together are of one guest in one life.

downtime       (first beat at the destination - last beat at the source) - (difference of their counters) x period. The
               guest's timer runs on virtual time, which stops with it, so the sum of the stops is what remains. The
               difference is 1 unless lines were lost before the collector was connected at the destination.
pause          the same between two following beats of one VMM: the stop of an aborted attempt, of an operator.
period         hb ticks of the guest's timer (`period_ns`), else the median of gap / counter difference.
noise floor    the pauses of a guest that nobody touches: p50, p95 and maximum of (gap - difference x period). They may
               be negative: after a late beat comes an early one. A downtime is known no better than this.
overlap        beats that prove a second copy or time travel: stamped strictly inside another VMM's [first beat, last
               beat], or with a counter seen before, or with a lower counter than one stamped earlier. Each beat counts
               once. Two stamps closer than the tolerance, or within one LAG of the collector, have no order: then the
               counters alone decide, and a copy that runs twice repeats them.
missing beats  counters between the lowest and the highest that no log has, less those that the guest says it never sent
               (`unsaid`: its console was full when it made up for time without a CPU). Lost lines, no sign of a second
               copy. A line that the move cut in two, the one half in each log, is not missing.
ran ahead      how far the guest's counters got before the collector's clock. A guest may fall behind, when it is
               stopped or gets no CPU, and may make up for the latter; only one whose clock is wrong gets ahead.
running        a VMM runs while its beats come; a pause of more than `SPLIT_PERIODS` periods ends one interval and the
               next beat begins another. A paused guest has no running interval while it is paused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

PIT_HZ = 1_193_182
"""The rate of the timer chip that the guests' tick is divided from."""

TOLERANCE_NS = 5_000_000
"""Two stamps closer than this are not put in order: the collector reads one console after the other."""

SPLIT_PERIODS = 10

SETTLED_NS = 1_000_000_000
"""So long after it ran again a guest has made up for what its first beats were late."""

_NAME = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_BEAT = re.compile(r"H" + r" ([0-9a-f]{8})" * 6 + r"(?: ([0-9a-f]{8}))?")
_VERIFY = re.compile(r"V (ok|bad) ([0-9a-f]{8})")


@dataclass(frozen=True, slots=True, order=True)
class Vmm:
    """One VMM process of a guest: the same guest on the same host again is another `inc`."""

    host: str
    guest: str
    inc: str

    @classmethod
    def of_file(cls, filename: str) -> Vmm | None:
        """Read `<host>.<guest>.<inc>.sock` or `.log` (a name, not a path); None when it is no such name."""
        stem, _, suffix = filename.rpartition(".")
        match = _NAME.fullmatch(stem) if suffix in ("sock", "log") else None
        return cls(*match.groups()) if match else None

    @property
    def name(self) -> str:
        """`<host>.<guest>.<inc>`, as its socket and its log are called."""
        return f"{self.host}.{self.guest}.{self.inc}"


@dataclass(frozen=True, slots=True)
class Window:
    """A span of the collector's clock, both ends included."""

    start_ns: int
    end_ns: int

    def holds(self, ns: int) -> bool:
        """That instant lies in the window."""
        return self.start_ns <= ns <= self.end_ns

    def meets(self, other: Window) -> bool:
        """The two have at least one instant in common."""
        return self.start_ns <= other.end_ns and other.start_ns <= self.end_ns


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat. All but the stamp are totals since the guest's boot, carried in its memory."""

    ns: int
    number: int
    sweeps: int
    page_errors: int
    device_rings: int
    """Doorbells that a device answered, rightly or wrongly."""
    device_errors: int
    device_retries: int
    unsaid: int = 0
    """Earlier beats that the guest left out because its console was full."""


@dataclass(frozen=True, slots=True)
class Verify:
    """The guest's answer to a full check of its memory. `bad` is the number of wrong pages, `pages` 0 if any is."""

    ns: int
    ok: bool
    pages: int
    bad: int


@dataclass(frozen=True, slots=True)
class ConsoleLog:
    """What one VMM's console said."""

    vmm: Vmm
    beats: tuple[Beat, ...] = ()
    verifies: tuple[Verify, ...] = ()
    booted_ns: int | None = None
    ended_ns: int | None = None
    """Stamp of EOF, unless the console came back after it."""
    complaints: tuple[str, ...] = ()
    """The guest's E, D and FATAL lines as they came."""
    lags: tuple[Window, ...] = ()
    unreadable: int = 0
    """Lines that are none of the known ones: torn at a migration, or cut by a crash of the collector."""
    begun: tuple[str, ...] = ()
    """Beginnings of lines that were cut by the end of a connection."""
    rest: tuple[str, ...] = ()
    """What could not be read, and may be the rest of a line that began elsewhere."""

    @property
    def extent(self) -> Window | None:
        """From the first to the last beat."""
        return Window(self.beats[0].ns, self.beats[-1].ns) if self.beats else None


def parse_beat(ns: int, text: str) -> Beat | None:
    """A whole heartbeat line, or None."""
    match = _BEAT.fullmatch(text)
    return Beat(ns, *(int(field, 16) for field in match.groups("0"))) if match else None


def parse_verify(ns: int, text: str) -> Verify | None:
    """A whole `V` line, or None."""
    match = _VERIFY.fullmatch(text)
    if not match:
        return None
    number = int(match[2], 16)
    return Verify(ns, ok=True, pages=number, bad=0) if match[1] == "ok" else Verify(ns, ok=False, pages=0, bad=number)


def parse_log(vmm: Vmm, lines: Iterable[str]) -> ConsoleLog:
    """Read one file of the collector. Nothing in it is an error: what cannot be read is counted in `unreadable`."""
    read = _Read()
    for line in lines:
        stamp, _, text = line.rstrip("\n").partition(" ")
        if stamp.isascii() and stamp.isdigit():
            read.take(int(stamp), text)
        else:
            read.unreadable += 1
    return read.log(vmm)


@dataclass(slots=True)
class _Read:
    """What has been read of a file so far; the fields are those of `ConsoleLog`."""

    beats: list[Beat] = field(default_factory=list[Beat])
    verifies: list[Verify] = field(default_factory=list[Verify])
    booted_ns: int | None = None
    ended_ns: int | None = None
    complaints: list[str] = field(default_factory=list[str])
    lags: list[Window] = field(default_factory=list[Window])
    unreadable: int = 0
    begun: list[str] = field(default_factory=list[str])
    rest: list[str] = field(default_factory=list[str])

    def take(self, ns: int, text: str) -> None:
        """A line that has a stamp."""
        word = text.partition(" ")[0]
        if beat := parse_beat(ns, text):
            self.beats.append(beat)
        elif verify := parse_verify(ns, text):
            self.verifies.append(verify)
        elif word == "BOOT":
            self.booted_ns = ns
        elif word in ("E", "D", "FATAL"):
            self.complaints.append(text)
        elif text == "EOF":
            self.ended_ns = ns
        elif text == "CONNECTED":
            self.ended_ns = None
        elif word == "LAG" and text[4:].isascii() and text[4:].isdigit():
            self.lags.append(Window(ns - int(text[4:]) * 1_000_000, ns))
        elif text != "DETACHED":
            self._not_whole(word, text)

    def _not_whole(self, word: str, text: str) -> None:
        self.unreadable += 1
        if word == "TORN":
            self.begun.append(text.removeprefix("TORN "))
        else:
            self.rest.append(text)

    def log(self, vmm: Vmm) -> ConsoleLog:
        """All of it, as the console of that VMM."""
        return ConsoleLog(
            vmm=vmm,
            beats=tuple(self.beats),
            verifies=tuple(self.verifies),
            booted_ns=self.booted_ns,
            ended_ns=self.ended_ns,
            complaints=tuple(self.complaints),
            lags=tuple(self.lags),
            unreadable=self.unreadable,
            begun=tuple(self.begun),
            rest=tuple(self.rest),
        )


# --- time -----------------------------------------------------------------------------------------------------------


def period_ns(hz: int, hb: int) -> float:
    """The true time between two beats of a guest with this `hz` and `hb`: the timer divides by a whole number."""
    return hb * (PIT_HZ // hz) / PIT_HZ * 1e9


def estimate_period_ns(logs: Iterable[ConsoleLog]) -> float | None:
    """Median gap per counter step; None without two beats of one VMM in a row."""
    steps = sorted(
        (after.ns - before.ns) / (after.number - before.number)
        for log in logs
        for before, after in pairwise(log.beats)
        if after.number > before.number
    )
    return steps[len(steps) // 2] if steps else None


def _stopped_ms(before: Beat, after: Beat, period: float) -> float:
    return (after.ns - before.ns - (after.number - before.number) * period) / 1e6


@dataclass(frozen=True, slots=True)
class Pause:
    """The time between two following beats of one VMM that is not running time."""

    vmm: Vmm
    start_ns: int
    """Stamp of the last beat before."""
    end_ns: int
    """Stamp of the first beat after."""
    pause_ms: float


def pauses(log: ConsoleLog, period: float, *, window: Window | None = None) -> tuple[Pause, ...]:
    """One entry for each two following beats whose span meets the window (all of them without one). `period` in ns."""
    return tuple(
        Pause(log.vmm, before.ns, after.ns, _stopped_ms(before, after, period))
        for before, after in pairwise(log.beats)
        if window is None or window.meets(Window(before.ns, after.ns))
    )


def largest_pause(log: ConsoleLog, period: float, *, window: Window | None = None) -> Pause | None:
    """The longest stop within one VMM: what an aborted attempt, or an operator's pause, cost. `period` in ns."""
    return max(pauses(log, period, window=window), key=lambda pause: pause.pause_ms, default=None)


@dataclass(frozen=True, slots=True)
class RunningInterval:
    """A span in which the beats of one VMM came without a long stop."""

    vmm: Vmm
    first: Beat
    last: Beat
    beats: int


def running_intervals(
    log: ConsoleLog, period: float, *, split_periods: float = SPLIT_PERIODS
) -> tuple[RunningInterval, ...]:
    """When this VMM ran. Lost lines do not end an interval, since the counters tell of them. `period` in ns."""
    if not log.beats:
        return ()
    found: list[RunningInterval] = []
    start = 0
    for index, (before, after) in enumerate(pairwise(log.beats), start=1):
        if _stopped_ms(before, after, period) * 1e6 > split_periods * period:
            found.append(RunningInterval(log.vmm, log.beats[start], before, index - start))
            start = index
    found.append(RunningInterval(log.vmm, log.beats[start], log.beats[-1], len(log.beats) - start))
    return tuple(found)


def runs_at(log: ConsoleLog, ns: int, period: float, *, split_periods: float = SPLIT_PERIODS) -> bool:
    """Did this VMM run at this time? At the end of the log: was its last beat less than `split_periods` ago."""
    slack = split_periods * period
    return any(
        interval.first.ns <= ns <= interval.last.ns + slack
        for interval in running_intervals(log, period, split_periods=split_periods)
    )


# --- hand-overs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HandOver:
    """One change of VMM as the guest saw it."""

    source: Vmm
    destination: Vmm
    last_source: Beat
    first_destination: Beat
    gap_ms: float
    downtime_ms: float | None
    """None when the guest was paused on purpose in between, or its period is unknown: then the gap says nothing."""
    missing_beats: int
    """Beats of the destination that came before the collector was connected."""


def hand_overs(logs: Sequence[ConsoleLog], period: float, *, paused: Sequence[Window] = ()) -> tuple[HandOver, ...]:
    """Every change of VMM, in order. `paused`: when an operator kept the guest stopped. `period` in ns."""
    alive = sorted((log for log in logs if log.beats), key=lambda log: log.beats[0].ns)
    found: list[HandOver] = []
    for index, log in enumerate(alive[1:], start=1):
        first = log.beats[0]
        before = [(beat, other.vmm) for other in alive[:index] for beat in _last_before(other, first)]
        if not before:
            continue
        last, source = max(before, key=lambda pair: pair[0].ns)
        gap = Window(last.ns, first.ns)
        stopped_on_purpose = any(window.meets(gap) for window in paused)
        found.append(
            HandOver(
                source=source,
                destination=log.vmm,
                last_source=last,
                first_destination=first,
                gap_ms=(first.ns - last.ns) / 1e6,
                downtime_ms=None if stopped_on_purpose or not period else _stopped_ms(last, first, period),
                missing_beats=max(0, first.number - last.number - 1),
            )
        )
    return tuple(found)


def downtime_ms(source: ConsoleLog, destination: ConsoleLog, period: float) -> float | None:
    """Downtime of the hand-over between these two VMMs; None when there was none to see. `period` in ns."""
    found = hand_overs((source, destination), period)
    matching = [each for each in found if each.source == source.vmm and each.destination == destination.vmm]
    return matching[0].downtime_ms if matching else None


def _last_before(log: ConsoleLog, first: Beat) -> list[Beat]:
    """The last beat stamped no later than `first`, or none."""
    for beat in reversed(log.beats):
        if beat.ns <= first.ns:
            return [beat]
    return []


# --- copies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Overlap:
    """Beats that no single running copy can have sent. The parts may name the same beat; `copies` counts it once."""

    copies: int
    inside: int
    """Stamped strictly inside another VMM's [first beat, last beat]."""
    repeated: int
    """With a counter that an earlier beat had."""
    backwards: int
    """With a lower counter than an earlier beat."""
    unordered: int
    """Stamped out of order within the tolerance or a LAG, with counters as they should be: not in `copies`."""


def _surely_before(a: int, b: int, lags: Sequence[Window], tolerance_ns: int) -> bool:
    return b - a > tolerance_ns and not any(lag.holds(a) and lag.holds(b) for lag in lags)


def overlap(logs: Sequence[ConsoleLog], *, tolerance_ns: int = TOLERANCE_NS) -> Overlap:
    """Look for a second running copy or time travel over all VMMs of one guest."""
    lags = sorted({lag for log in logs for lag in log.lags}, key=lambda lag: lag.start_ns)
    extents = [(log.vmm, log.extent) for log in logs if log.extent]
    beats = sorted(((beat, log.vmm) for log in logs for beat in log.beats), key=lambda pair: pair[0].ns)
    inside: set[int] = set()
    repeated: set[int] = set()
    backwards: set[int] = set()
    unordered: set[int] = set()
    seen: set[int] = set()
    highest: Beat | None = None
    for index, (beat, vmm) in enumerate(beats):
        for other, extent in extents:
            if other == vmm or not extent.start_ns < beat.ns < extent.end_ns:
                continue
            early, late = (extent.start_ns, beat.ns), (beat.ns, extent.end_ns)
            sure = all(_surely_before(*pair, lags, tolerance_ns) for pair in (early, late))
            (inside if sure else unordered).add(index)
        if beat.number in seen:
            repeated.add(index)
        elif highest and beat.number < highest.number:
            sure = _surely_before(highest.ns, beat.ns, lags, tolerance_ns)
            (backwards if sure else unordered).add(index)
        seen.add(beat.number)
        if not highest or beat.number > highest.number:
            highest = beat
    proof = inside | repeated | backwards
    return Overlap(len(proof), len(inside), len(repeated), len(backwards), len(unordered - proof))


def overlapping_copies(logs: Sequence[ConsoleLog], *, tolerance_ns: int = TOLERANCE_NS) -> int:
    """Number of beats that prove a second copy or time travel. 0 is the promise."""
    return overlap(logs, tolerance_ns=tolerance_ns).copies


@dataclass(frozen=True, slots=True)
class Hole:
    """Beats that were sent and that nobody saw, between two that follow each other by their counters."""

    before: Beat
    after: Beat
    missing: int


def holes(logs: Sequence[ConsoleLog]) -> tuple[Hole, ...]:
    """Where beats are missing, by counter; a beat that was seen in two pieces is not."""
    heard = {beat.number: beat for log in logs for beat in log.beats}
    if heard and max(heard) - min(heard) + 1 > len(heard):
        ends = {end for log in logs for end in log.rest}
        joined = (parse_beat(0, start + end) for log in logs for start in log.begun for end in ends)
        cut = {beat.number: beat for beat in joined if beat and min(heard) < beat.number < max(heard)}
        heard = cut | heard
    found: list[Hole] = []
    for before, after in pairwise(heard[number] for number in sorted(heard)):
        left_out = max(0, after.unsaid - before.unsaid)
        if (missing := after.number - before.number - 1 - left_out) > 0:
            found.append(Hole(before, after, missing))
    return tuple(found)


def missing_beats(logs: Sequence[ConsoleLog]) -> int:
    """Counters between the lowest and the highest that the guest has sent and nobody saw, in one piece or in two."""
    return sum(hole.missing for hole in holes(logs))


def ran_ahead_ms(logs: Sequence[ConsoleLog], period: float) -> float:
    """By how much the guest's clock got before ours, at most; 0 if it never did. `period`: as it was told, in ns.

    Our clock is laid through the soonest of the beats of the first SETTLED_NS: others were late, none was early. A stop
    leaves the guest behind for good, so this is asked of each running interval, and of the whole life because of what
    may have become of the clock while the guest was stopped.
    """
    life = sorted((beat for log in logs for beat in log.beats), key=lambda beat: beat.ns)
    spans = [life] if life else []
    for log in logs:
        at = 0
        for interval in running_intervals(log, period):
            spans.append(list(log.beats[at : at + interval.beats]))
            at += interval.beats
    return max((_gained_ns(span, period) for span in spans), default=0.0) / 1e6


def _gained_ns(beats: Sequence[Beat], period: float) -> float:
    settled = max(beat.number * period - beat.ns for beat in beats if beat.ns <= beats[0].ns + SETTLED_NS)
    return max(beat.number * period - beat.ns for beat in beats) - settled


# --- noise ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How well a downtime can be known in this run: what the same measure says where nothing happened."""

    samples: int
    p50_ms: float | None
    p95_ms: float | None
    max_ms: float | None


def noise_floor(still: Iterable[tuple[ConsoleLog, Window, float]]) -> NoiseFloor:
    """`still`: logs, each with a window in which nobody moved or paused the guest, and its period in ns."""
    samples = sorted(
        _stopped_ms(before, after, period)
        for log, window, period in still
        for before, after in pairwise(log.beats)
        if window.holds(before.ns) and window.holds(after.ns)
    )
    return NoiseFloor(len(samples), _percentile(samples, 50), _percentile(samples, 95), _percentile(samples, 100))


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    """Nearest rank: the smallest value that at least `percent` of the values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else None


# --- one guest ------------------------------------------------------------------------------------------------------


class Ending(StrEnum):
    """What a guest did at the end of the observation."""

    RUNNING = "running"
    SILENT = "silent"
    """No beats for more than `SPLIT_PERIODS` periods: paused, stopped or dead."""


@dataclass(frozen=True, slots=True)
class GuestEvidence:
    """All that the heartbeats say about one guest in one run."""

    guest: str
    period_ms: float | None
    beats: int
    vmms: tuple[str, ...]
    """`<host>.<guest>.<inc>` of each VMM that beat, in the order of their first beats."""
    running: tuple[RunningInterval, ...]
    hand_overs: tuple[HandOver, ...]
    largest_pause: Pause | None
    """Longest stop within one VMM."""
    overlap: Overlap
    missing_beats: int
    page_errors: int
    device_rings: int
    device_errors: int
    device_retries: int
    last_verify: Verify | None
    complaints: tuple[str, ...]
    unreadable: int
    ending: Ending
    last_host: str | None
    """Host of the VMM with the latest beat."""

    @property
    def memory_verified(self) -> bool:
        """No page was ever found wrong, and a full verify after the last hand-over said so of all of them."""
        moved_ns = self.hand_overs[-1].first_destination.ns if self.hand_overs else 0
        verify = self.last_verify
        return bool(verify and verify.ok and verify.ns >= moved_ns) and self.page_errors == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON report; times in ms are rounded to 1 us."""
        return {**to_plain(self), "memory_verified": self.memory_verified}


def examine(
    logs: Sequence[ConsoleLog],
    *,
    period: float | None = None,
    paused: Sequence[Window] = (),
    until_ns: int | None = None,
    tolerance_ns: int = TOLERANCE_NS,
) -> GuestEvidence:
    """Judge one guest by all logs of its present life (at least one; of one guest only, else ValueError).

    `period` in ns (`period_ns`), else it is estimated; `paused`: when an operator kept it stopped; `until_ns`: the end
    of the observation, which decides whether it was still running (default: its own last line).
    """
    guests = {log.vmm.guest for log in logs}
    if len(guests) != 1:
        raise ValueError(f"the logs of one guest are wanted, got {sorted(guests) or 'none'}: group them by guest first")
    alive = sorted((log for log in logs if log.beats), key=lambda log: log.beats[0].ns)
    beats = [beat for log in alive for beat in log.beats]
    step = period or estimate_period_ns(alive) or 0.0
    last = max(alive, key=lambda log: log.beats[-1].ns, default=None)
    stops = [stop for log in alive if (stop := largest_pause(log, step))]
    end_ns = until_ns or max((beat.ns for beat in beats), default=0)
    return GuestEvidence(
        guest=guests.pop(),
        period_ms=step / 1e6 if step else None,
        beats=len(beats),
        vmms=tuple(log.vmm.name for log in alive),
        running=tuple(interval for log in alive for interval in running_intervals(log, step)),
        hand_overs=hand_overs(alive, step, paused=paused),
        largest_pause=max(stops, key=lambda stop: stop.pause_ms, default=None),
        overlap=overlap(alive, tolerance_ns=tolerance_ns),
        missing_beats=missing_beats(alive),
        page_errors=max((beat.page_errors for beat in beats), default=0),
        device_rings=max((beat.device_rings for beat in beats), default=0),
        device_errors=max((beat.device_errors for beat in beats), default=0),
        device_retries=max((beat.device_retries for beat in beats), default=0),
        last_verify=max((each for log in logs for each in log.verifies), key=lambda each: each.ns, default=None),
        complaints=tuple(text for log in logs for text in log.complaints),
        unreadable=sum(log.unreadable for log in logs),
        ending=Ending.RUNNING if last and runs_at(last, end_ns, step) else Ending.SILENT,
        last_host=last.vmm.host if last else None,
    )


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and tuples as JSON values; a VMM as its name."""
    if isinstance(value, Vmm):
        return value.name
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, tuple | list):
        return [to_plain(each) for each in value]  # pyright: ignore[reportUnknownVariableType]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    return value
