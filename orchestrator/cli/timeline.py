"""PURE: what happened in one attempt, drawn from the time line of its report.

Source and destination each count from their own start on their own clock. What the destination noted is put into the
source's time by cause and effect: it loaded before the source submitted, it took over after that, it ran before the
source knew of it. The middle of what these allow is taken, and half of its width is how far the placing can be off.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.core.records import AttemptReport, TimelineEntry

_ZXID = re.compile(r"zxid (\d+)")
STOPPED, RUNS = "vcpus stopped", "vcpus run"

_PHASES = {
    "bound": "PRECOPY",
    "frozen": "SWITCHOVER",
    "check_passed": "SWITCHOVER",
    "committed": "COMMITTED",
    "done": "FINALIZING",
    "abort": "ABORTING",
    "refused": "ABORTING",
}

_TEXTS = {
    "bound": "bound to the destination's VMM {detail}, pre-copy begins",
    "request": "a device asks for an ACK: {detail}",
    "given_up": "not waited for any longer, so that the guest can run again: {detail}",
    "claimed late": "nobody has sent anything yet, but the attempt is under way: waiting on",
    "unclaimed": "nobody conducts the attempt: ending it",
    "request_too_late": "a device asks after the check, too late for this attempt: {detail}",
    "ack": "the destination acknowledges {detail}",
    "gate_open": "gate open: every request is durable and acknowledged",
    "gate_closed": "gate closed, the guest is held in pre-copy: {detail} is pending",
    "gate_wait": "the engine stopped the guest under a closed gate: waiting for {detail}, as policy says",
    "suspend": "pre-copy timeout: policy stops the guest",
    STOPPED: "the guest stops",
    RUNS: "the guest runs",
    "frozen": "freeze: devices go quiet and are asked for the last time",
    "check_passed": "check: no request is late, the last data goes",
    "submit": "the destination has loaded everything: commit submitted",
    "committed": "committed: the guest is the destination's",
    "runs there": "the destination says that the guest runs there",
    "done": "recorded as the destination's: the source's copy is discarded",
    "abort": "abort: {detail}",
    "abort_recorded": "abort recorded, {detail}",
    "ended": "the attempt is over, the guest is the source's",
    "refused": "the ledger refuses the commit: {detail}",
    "guest": "the engine is done with the attempt, the guest is {detail}",
    "loaded": "everything is loaded, validated and parked",
    "take_over": "takes the guest over",
    "running": "the guest runs here",
    "give_up": "this copy is useless now",
    "crashed": "the VMM died after it had taken over",
    "give_back": "the VMM died unused: the guest goes back",
    "vmm_died": "the VMM died",
    "resume_failed": "the guest could not be let run again",
    "pause_failed": "the guest could not be stopped",
    "marker_not_written": "this copy is not used: {detail}",
    "take_over_failed": "libvirt has given up the copy, which never ran",
    "marker_failed": "no marker could be written, so this copy is not used",
    "marker_unknown": "whether this copy had an effect could not be looked up; it is asked again",
    "activation_failed": "the devices could not be activated, tried again",
    "bind_failed": "whoever controls the host's bridges could not be told of it; it runs all the same",
    "disks_ready": "every local disk is copied, but for what is being written: pre-copy may begin",
    "disk_copied": "a local disk is at the destination",
    "disk_sent": "so much of a local disk was sent in this attempt by now",
    "disk_failed": "a local disk cannot be copied",
    "drained": "the last writes of the local disks are at the destination",
    "disks_released": "the images of the local disks are closed, for its VMM",
    "release_failed": "the images of the local disks could not be closed for its VMM",
    "images_unknown": "whether an image of a local disk is there already cannot be told",
    "images_not_finished": "the images of the local disks could not be put in order, the next agent does it",
    "images_not_retired": "the images of the disks that have left could not be put aside, the next agent does it",
    "device_gone": "the guest let go of a device that is being taken away: {detail}",
    "disk_locked": "DISK_LOCKED: somebody else has the image of a disk open, tried again",
    "start_failed": "the guest could not be started, tried again",
    "roll_back_failed": "a device lost its state on the way back",
    "devices_lost": "devices inside the VMM were reset, what they held is lost: {detail}",
    "shim_failed": "a device failed",
    "engine_found_late": "the engine itself found late requests of devices inside the VMM: {detail}",
    "engine_failed": "the engine failed",
    "guest_ended": "the guest ended by itself",
    "restarted": "the agent was restarted and ends the attempt it finds",
}
_DESTINATION_TEXTS = {"done": "recorded as the guest's host", RUNS: "its vCPUs run", "running": "it has taken over"}


@dataclass(frozen=True, slots=True)
class Moment:
    """One line: `at_ms` from the attempt's start on the source's clock."""

    at_ms: float
    where: str
    event: str
    detail: str
    text: str
    """The event as a sentence; an event that is not known here is shown as it is."""
    phase: str = ""
    """The phase that begins with it, or empty."""
    placed: bool = False
    """Noted on another clock and put here by cause and effect."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stretch of a stop of the guest."""

    name: str
    ms: float


@dataclass(frozen=True, slots=True)
class Story:
    """One attempt, in order."""

    moments: tuple[Moment, ...]
    off_by_ms: float | None
    """How far the destination's moments can be misplaced; None when there are none, or nothing bounds it."""
    requests: int
    """ACKs that devices asked for."""
    acks: int
    stops: tuple[Stretch, ...]
    """What the last stop of the guest consisted of; empty when it did not stop, or stopped on purpose."""


def tell(report: AttemptReport) -> Story:
    """The attempt in order."""
    here = [entry for entry in report.timeline if entry.where == report.source]
    there = [entry for entry in report.timeline if entry.where != report.source]
    offset, off_by = _offset(here, there)
    moments = [_moment(entry, there=False, offset_ms=0.0) for entry in here]
    moments += [_moment(entry, there=True, offset_ms=offset) for entry in there]
    ordered = sorted(moments, key=lambda moment: moment.at_ms)
    return Story(
        tuple(_phased(ordered)),
        off_by if there else None,
        max(len(report.requests), sum(entry.event == "request" for entry in here)),
        max(len(report.acks), sum(entry.event == "ack" for entry in here)),
        _stops(report, here, there, offset),
    )


def _offset(here: Sequence[TimelineEntry], there: Sequence[TimelineEntry]) -> tuple[float, float | None]:
    """What to add to the destination's times, and how far that can be wrong (None: nothing bounds it on one side)."""
    source, destination = _firsts(here), _firsts(there)

    def bound(before: str, after: str, first: dict[str, float], then: dict[str, float]) -> list[float]:
        return [then[after] - first[before]] if before in first and after in then else []

    most = bound("loaded", "submit", destination, source)
    for word in ("runs there", "done"):
        most += bound("running", word, destination, source)
    least = [-value for value in bound("submit", "take_over", source, destination)]
    if most and least and max(least) <= min(most):
        low, high = max(least), min(most)
        return (low + high) / 2, (high - low) / 2
    if most or least:
        return min(most, default=max(least, default=0.0)), None
    return 0.0, None


def _firsts(entries: Sequence[TimelineEntry]) -> dict[str, float]:
    found: dict[str, float] = {}
    for entry in entries:
        found.setdefault(entry.event, entry.at_ms)
    return found


def _runs(there: Sequence[TimelineEntry]) -> float | None:
    """When the guest ran at the destination, on its clock."""
    known = _firsts(there)
    return known.get(RUNS, known.get("running"))


def _moment(entry: TimelineEntry, *, there: bool, offset_ms: float) -> Moment:
    known = (_DESTINATION_TEXTS if there else {}).get(entry.event) or _TEXTS.get(entry.event)
    if known is None:
        text = f"{entry.event} {entry.detail}".strip()
    else:
        detail = _ZXID.sub(lambda found: f"zxid {int(found[1]):#x}", entry.detail)
        text = known.format(detail=detail) if "{detail}" in known else _with(known, detail)
    phase = "" if there else _PHASES.get(entry.event, "")
    at_ms = round(entry.at_ms + offset_ms, 2)
    return Moment(at_ms, entry.where, entry.event, entry.detail, text, phase, placed=there)


def _with(text: str, detail: str) -> str:
    return f"{text} ({detail})" if detail else text


def _phased(moments: Sequence[Moment]) -> list[Moment]:
    """A phase is named where it begins."""
    result: list[Moment] = []
    current = ""
    for moment in moments:
        begins = moment.phase if moment.phase != current else ""
        current = moment.phase or current
        result.append(replace(moment, phase=begins))
    return result


def _stops(
    report: AttemptReport, here: Sequence[TimelineEntry], there: Sequence[TimelineEntry], offset_ms: float
) -> tuple[Stretch, ...]:
    """The parts of the last stop. A guest that was stopped on purpose has no blackout to divide."""
    stops = [entry.at_ms for entry in here if entry.event == STOPPED]
    if not stops or not report.blackout_ms:
        return ()
    began = stops[-1]
    after = {entry.event: entry.at_ms for entry in reversed(here) if entry.at_ms >= began}
    if report.outcome == "COMMITTED":
        marks = [("quiesce and check", after.get("check_passed")), ("last pass", after.get("submit"))]
        runs, known = _runs(there), after.get("runs there", after.get("done"))
        if runs is None:
            marks += [("commit", after.get("committed")), ("take-over", known)]
        else:  # the destination may see the commit before the source has its answer
            marks += [("commit and take-over", runs + offset_ms), ("word of it", known)]
    else:
        abort, runs = after.get("abort", after.get("refused")), after.get(RUNS)
        by_itself = abort is not None and runs is not None and runs < abort
        marks = [
            ("until the check passed", after.get("check_passed")),
            ("until the abort", None if by_itself else abort),
            ("until the engine let it run" if by_itself else "roll-back", runs),
        ]
    parts: list[Stretch] = []
    for name, at in marks:
        if at is not None:
            parts.append(Stretch(name, round(max(0.0, at - began), 2)))
            began = max(began, at)
    return tuple(parts)
