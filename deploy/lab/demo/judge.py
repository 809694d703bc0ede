"""PURE: was everything kept that an evacuation promises? Judged by what the guests wrote on their consoles.

What the API said (`Answer`) is a claim to be tested against that, and decides alone only where a guest cannot know:
why an attempt ended, who owns the guest, whether the host may be powered off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from deploy.lab.cluster.evidence import ConsoleLog, GuestEvidence, NoiseFloor, Window, examine, largest_pause
from deploy.lab.linux_guest.image import Verdict
from deploy.lab.peer.outage import Outage
from deploy.lab.workload import is_linux
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import DiskSpec, GuestSpec, ShimKind

OPERATOR, POLICY = "operator", "policy"
_LATE_ACKS, _STOPPED_BY = "late-acks", "stopped-by"
_NEVER_NS = (1 << 63) - 1
SETTLE_NS = 100_000_000
"""How long the last lines of a guest that was paused may still be on their way to the collector's stamp."""


class RoleError(Exception):
    """A label of the guest file that says what the demo expects of a guest makes no sense."""


_ASKING = (ShimKind.COMPANION, ShimKind.VFIO)
"""Devices with a say in the switchover, and with answers that the guest checks."""


@dataclass(frozen=True, slots=True)
class Role:
    """A guest and what the script of the demo has in store for it, by its labels `late-acks` and `stopped-by`."""

    name: str
    memory_mib: int
    devices: tuple[str, ...] = ()
    late_acks: int = 0
    """So many attempts are to end with LATE_SWITCHOVER_ACK."""
    stopped_by: str = ""
    """`operator`: paused in pre-copy; `policy`: suspended at the pre-copy timeout; both while an ACK is pending."""
    disks: tuple[DiskSpec, ...] = ()
    """That it writes to."""
    linux: bool = False
    """It boots the lab's Linux, and has a card in the lab's network: a peer outside talks with it."""


def role_of(spec: GuestSpec) -> Role:
    """Raises RoleError."""
    late, stopped_by = spec.labels.get(_LATE_ACKS, "0"), spec.labels.get(_STOPPED_BY, "")
    if not late.isdecimal():
        raise RoleError(f"{spec.name}: the label {_LATE_ACKS} must be a number, not {late!r}")
    if stopped_by not in ("", OPERATOR, POLICY):
        raise RoleError(f"{spec.name}: the label {_STOPPED_BY} must be {OPERATOR} or {POLICY}, not {stopped_by!r}")
    devices = tuple(device.name for device in spec.devices if device.shim in _ASKING)
    if (late != "0" or stopped_by) and not devices:
        raise RoleError(f"{spec.name}: without a device nobody asks for an ACK")
    disks = tuple(disk for disk in spec.disks if not disk.read_only)
    linux = is_linux(spec.boot) and bool(spec.nics)
    return Role(spec.name, spec.memory_mib, devices, int(late), stopped_by, disks, linux)


# --- what is known of a guest -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt as the API reports it."""

    number: int
    outcome: str
    reason: str = ""
    devices: tuple[str, ...] = ()
    destination: str = ""
    zxid: int = 0
    sent_bytes: int = 0
    disk_bytes: dict[str, int] = field(default_factory=dict[str, int])
    """Of each local disk, sent in this attempt."""
    pending_when_stopped: tuple[str, ...] = ()
    """Devices whose ACK was pending when the guest was stopped on purpose."""
    suspended: bool = False
    """Policy stopped the guest."""
    blackout_ms: float = 0.0
    """How long its vCPUs stood still, by the VMMs' own stamps; 0: not known."""

    @property
    def is_late(self) -> bool:
        """It was aborted because a device asked for an ACK after the decision to switch over."""
        return self.outcome == "ABORTED" and self.reason == AbortReason.LATE_SWITCHOVER_ACK


@dataclass(frozen=True, slots=True)
class Answer:
    """What the API said about a guest after the evacuation."""

    migration: str = ""
    phase: str = ""
    why: str = ""
    """Of a migration that did not succeed."""
    attempts: tuple[Attempt, ...] = ()
    took_s: float = 0.0
    owner: str = ""
    """By the guest's record in ZooKeeper."""
    uuid: str = ""
    state_on_arrival: str = ""
    state_at_end: str = ""


@dataclass(frozen=True, slots=True)
class OperatorPause:
    """The operator's pause and resume, on the collector's clock."""

    pending: tuple[str, ...]
    """Devices whose ACK was pending in the very sample that made the operator act."""
    asked_ns: int
    effective_ns: int | None = None
    """When the API had said that the guest is paused; None: it had not, before the guest was stopped to move."""
    resumed_ns: int = _NEVER_NS
    """When the resume was asked for."""

    @property
    def window(self) -> Window:
        """From the wish to pause to the wish to resume: silence in it is intended."""
        return Window(self.asked_ns, self.resumed_ns)


@dataclass(frozen=True, slots=True)
class Sightings:
    """What was seen from outside, and when, on the collector's clock; never earlier than it happened."""

    aborts_ns: tuple[int, ...] = ()
    """First sight of the end of each attempt but the last."""
    pause: OperatorPause | None = None
    consoles: tuple[str, ...] = ()
    """Hosts where at the end a VMM of the guest has its console open."""
    outage: Outage | None = None
    """By the peer outside, from before its migration until it had answered again; None: nobody talked with it."""


@dataclass(frozen=True, slots=True)
class GuestReport:
    """Everything about one guest."""

    role: Role
    source: str
    answer: Answer
    seen: Sightings
    evidence: GuestEvidence
    logs: tuple[ConsoleLog, ...] = field(repr=False)
    images: tuple[Verdict | None, ...] = ()
    """Of each of its disks, read from outside when the guest was gone; None: it could not be read."""

    @property
    def downtime_ms(self) -> float | None:
        """By the guest's own heartbeats; None for a guest that was paused on purpose, or did not move."""
        return self.evidence.hand_overs[-1].downtime_ms if self.evidence.hand_overs else None

    @property
    def longest_stop_at_source_ms(self) -> float | None:
        """What an aborted attempt cost it, or just the noise; None where its heart beat less than twice."""
        period_ns = (self.evidence.period_ms or 0.0) * 1e6
        stops = [largest_pause(log, period_ns) for log in self.logs if log.vmm.host == self.source]
        return max((stop.pause_ms for stop in stops if stop), default=None)

    @property
    def late_acks(self) -> int:
        """How many of its attempts were aborted for a late ACK."""
        return sum(attempt.is_late for attempt in self.answer.attempts)

    @property
    def sent_bytes(self) -> int:
        """What all of its attempts sent, those that were aborted as well."""
        return sum(attempt.sent_bytes for attempt in self.answer.attempts)

    @property
    def beats_after_verify(self) -> bool:
        """Its heart was heard after its last check of memory and devices: the guest that passed it still runs."""
        verify = self.evidence.last_verify
        return verify is not None and any(beat.ns > verify.ns for log in self.logs for beat in log.beats)

    @property
    def final_run_state(self) -> str:
        """By its heartbeats: it went on beating after its last answer, or it did not."""
        return "RUNNING" if self.beats_after_verify else "SILENT"


def report_on(
    role: Role, source: str, answer: Answer, seen: Sightings, logs: Sequence[ConsoleLog], period_ns: float | None = None
) -> GuestReport:
    """Examine all logs of one guest; there must be one at least (ValueError)."""
    paused = (seen.pause.window,) if seen.pause else ()
    evidence = examine(logs, period=period_ns, paused=paused)
    return GuestReport(role, source, answer, seen, evidence, tuple(logs))


@dataclass(frozen=True, slots=True)
class Run:
    """What concerns the evacuation as a whole."""

    source: str
    evacuation_phase: str
    safe_to_power_off: bool
    noise: NoiseFloor
    leftovers: tuple[str, ...] = ()
    mishaps: tuple[str, ...] = ()
    """What the demo itself could not do, one sentence each: then something is not proven."""


# --- promises ---------------------------------------------------------------------------------------------------------


def broken_promises(run: Run, guests: Sequence[GuestReport]) -> list[str]:
    """One sentence for each promise that was not kept; empty when all were."""
    told = [f"{report.role.name}: {said}" for report in guests for promise in _PROMISES for said in promise(report)]
    return [*run.mishaps, *_of_the_run(run), *told]


def _of_the_run(run: Run) -> list[str]:
    told: list[str] = []
    if run.evacuation_phase != "SUCCEEDED":
        told.append(f"the evacuation of {run.source} ended {run.evacuation_phase or 'unknown'}")
    if not run.safe_to_power_off:
        told.append(f"{run.source} is not said to be safe to power off")
    if not run.noise.samples:
        told.append("no guest was ever left alone, so there is no noise floor and no downtime is known")
    told += [f"left behind on the machine: {left}" for left in run.leftovers]
    return told


def _moved(guest: GuestReport) -> list[str]:
    answer, evidence = guest.answer, guest.evidence
    if answer.phase != "SUCCEEDED":
        return [f"its migration ended {answer.phase or 'unknown'}{f' ({answer.why})' if answer.why else ''}"]
    if answer.owner == guest.source:
        return [f"it is still on {guest.source}"]
    told: list[str] = []
    if evidence.last_host != answer.owner:
        told.append(f"ZooKeeper says that {answer.owner} owns it, its heartbeat comes from {evidence.last_host}")
    if guest.seen.consoles != (answer.owner,):
        where = ", ".join(guest.seen.consoles) or "no host"
        told.append(f"it should have a VMM on {answer.owner} only, its consoles are open on {where}")
    if len(evidence.hand_overs) != 1:
        told.append(f"its heartbeat changed its VMM {len(evidence.hand_overs)} times instead of once")
    return told


def _attempts(guest: GuestReport) -> list[str]:
    role, attempts = guest.role, guest.answer.attempts
    told: list[str] = []
    if guest.late_acks != role.late_acks:
        counted = f"{guest.late_acks} of its attempts, the script asks for {role.late_acks}"
        told.append(f"LATE_SWITCHOVER_ACK ended {counted}")
    for attempt in attempts:
        if attempt.is_late and not set(attempt.devices) & set(role.devices):
            told.append(f"attempt {attempt.number} was aborted for a late ACK and names none of its devices")
        if not attempt.zxid:
            told.append(f"attempt {attempt.number} ({attempt.outcome}) has no zxid: where was it written?")
    if sum(attempt.outcome == "COMMITTED" for attempt in attempts) != 1:
        told.append("not exactly one of its attempts is reported as committed")
    return told


def _went_on_between_attempts(guest: GuestReport) -> list[str]:
    """After each abort the guest ran on at the source: beats between what was seen of one abort and of the next."""
    aborted = [attempt for attempt in guest.answer.attempts if attempt.outcome == "ABORTED"]
    seen_ns = guest.seen.aborts_ns
    if len(seen_ns) != len(aborted):
        return [f"{len(aborted)} attempts were aborted and {len(seen_ns)} of them seen, so what it did is not proven"]
    if not aborted:
        return []
    at_source = [beat.ns for log in guest.logs if log.vmm.host == guest.source for beat in log.beats]
    ends = [*seen_ns[1:], max(at_source, default=0) + 1]
    return [
        f"no heartbeat came from {guest.source} after attempt {attempt.number} was aborted"
        for attempt, start, end in zip(aborted, seen_ns, ends, strict=True)
        if not any(start < ns < end for ns in at_source)
    ]


def _paused_by_operator(guest: GuestReport) -> list[str]:
    if guest.role.stopped_by != OPERATOR:
        return []
    pause = guest.seen.pause
    if pause is None:
        return ["the operator never saw it wait for an ACK in pre-copy, so it was not paused"]
    told: list[str] = []
    if not set(pause.pending) & set(guest.role.devices):
        told.append("no ACK of its devices was pending when the operator paused it")
    if pause.effective_ns is None:
        told.append("the operator's pause was not applied in pre-copy")
    elif any(pause.effective_ns + SETTLE_NS < beat.ns < pause.resumed_ns for log in guest.logs for beat in log.beats):
        told.append("its heart beat while it was paused")
    if guest.answer.state_on_arrival != "PAUSED":
        told.append(f"it arrived {guest.answer.state_on_arrival or 'in an unknown state'}, not paused")
    if any(hand_over.first_destination.ns <= pause.resumed_ns for hand_over in guest.evidence.hand_overs):
        told.append("it ran at its destination before the operator resumed it")
    return told + _was_pending(guest)


def _suspended_by_policy(guest: GuestReport) -> list[str]:
    if guest.role.stopped_by != POLICY:
        return []
    told: list[str] = []
    if not any(attempt.suspended for attempt in guest.answer.attempts):
        told.append("policy never suspended it: it converged, which it should not")
    if guest.answer.state_on_arrival != "RUNNING":
        told.append(f"it arrived {guest.answer.state_on_arrival or 'in an unknown state'}, not running")
    return told + _was_pending(guest)


def _was_pending(guest: GuestReport) -> list[str]:
    pending = {device for attempt in guest.answer.attempts for device in attempt.pending_when_stopped}
    if pending & set(guest.role.devices):
        return []
    return ["the report names no ACK that was pending when it was stopped on purpose"]


def _never_twice(guest: GuestReport) -> list[str]:
    overlap = guest.evidence.overlap
    return [f"{overlap.copies} of its heartbeats prove a second running copy"] if overlap.copies else []


def _memory(guest: GuestReport) -> list[str]:
    evidence = guest.evidence
    told: list[str] = []
    if evidence.page_errors:
        told.append(f"it found {evidence.page_errors} of its pages wrong while it ran")
    if evidence.last_verify and not evidence.last_verify.ok:
        told.append(f"its check of all memory found {evidence.last_verify.bad} wrong pages")
    elif not evidence.memory_verified and not evidence.page_errors:
        told.append("it did not check all of its memory after its arrival")
    if evidence.complaints:
        told.append(f"it complained: {evidence.complaints[0]}")
    return told


def _devices(guest: GuestReport) -> list[str]:
    evidence = guest.evidence
    if guest.role.disks and not evidence.device_errors and evidence.hand_overs:
        at_arrival = evidence.hand_overs[-1].first_destination.device_rings
        if evidence.device_rings <= at_arrival:
            return ["nothing was promised on its disks after its arrival"]
    if evidence.device_errors and guest.role.linux:
        return [f"{evidence.device_errors} pieces of its disks were wrong or could not be written"]
    if evidence.device_errors:
        return [f"{evidence.device_errors} answers of its devices were wrong"]
    if not guest.role.devices or not evidence.hand_overs:
        return []
    at_arrival = evidence.hand_overs[-1].first_destination.device_rings
    return [] if evidence.device_rings > at_arrival else ["its devices answered nothing after its arrival"]


def _images(guest: GuestReport) -> list[str]:
    told: list[str] = []
    for disk, verdict in zip(guest.role.disks, guest.images, strict=False):
        if verdict is None:
            told.append(f"the image of its disk {disk.name} could not be read afterwards")
        elif not verdict.kept:
            of = f"{len(verdict.missing)} of {verdict.checked} promised records"
            told.append(f"{of} are not on the image of its disk {disk.name} in the pool {disk.pool}")
    return told


def _network(guest: GuestReport) -> list[str]:
    if not guest.role.linux:
        return []
    outage = guest.seen.outage
    if outage is None or outage.udp_ms is None or outage.tcp_ms is None:
        return ["it did not answer its peer outside again after its move"]
    told: list[str] = []
    if outage.wrong:
        told.append(f"{outage.wrong} of its answers to its peer outside were not what had been sent")
    if outage.breaks:
        told.append(f"its TCP connection to its peer outside broke, {outage.breaks} in all")
    return told


def _runs(guest: GuestReport) -> list[str]:
    told: list[str] = []
    if not guest.beats_after_verify:
        told.append("at the end its heart does not beat")
    if guest.answer.state_at_end != "RUNNING":
        told.append(f"at the end the API says that it is {guest.answer.state_at_end or 'unknown'}")
    return told


def _downtime_is_known(guest: GuestReport) -> list[str]:
    known = guest.downtime_ms is not None
    if known or guest.role.stopped_by == OPERATOR or not guest.evidence.hand_overs:
        return []  # a guest that did not move is complained of elsewhere
    return ["its downtime cannot be told from its heartbeats"]


_PROMISES: tuple[Callable[[GuestReport], list[str]], ...] = (
    _moved,
    _attempts,
    _went_on_between_attempts,
    _paused_by_operator,
    _suspended_by_policy,
    _never_twice,
    _memory,
    _devices,
    _images,
    _network,
    _runs,
    _downtime_is_known,
)


# --- for programs -----------------------------------------------------------------------------------------------------


def guest_document(guest: GuestReport, serial_logs: Sequence[str]) -> dict[str, Any]:
    """One entry of `guests` in the report file."""
    evidence = guest.evidence
    return {
        "name": guest.role.name,
        "memory_mib": guest.role.memory_mib,
        "source": guest.source,
        "destination": guest.answer.owner,
        "runs_on": evidence.last_host,
        "migration": guest.answer.migration,
        "attempts": [
            {
                "outcome": attempt.outcome,
                "reason": attempt.reason,
                "devices": list(attempt.devices),
                "zxid": attempt.zxid,
                "destination": attempt.destination,
                "sent_bytes": attempt.sent_bytes,
                "pending_when_stopped": list(attempt.pending_when_stopped),
                "blackout_ms": _rounded(attempt.blackout_ms),
            }
            for attempt in guest.answer.attempts
        ],
        "took_s": round(guest.answer.took_s, 3),
        "sent_bytes": guest.sent_bytes,
        "downtime_ms": _rounded(guest.downtime_ms),
        "outage_ms": _outage(guest.seen.outage),
        "memory_verified": evidence.memory_verified,
        "verified_pages": evidence.last_verify.pages if evidence.last_verify else 0,
        "page_errors": evidence.page_errors,
        "device_answers": 0 if guest.role.linux else evidence.device_rings,
        "promised_records": evidence.device_rings if guest.role.linux else 0,
        "disks": [_disk(*each, guest.answer.attempts) for each in zip_longest(guest.role.disks, guest.images)],
        "device_errors": evidence.device_errors,
        "overlapping_copies": evidence.overlap.copies,
        "stopped_by": guest.role.stopped_by,
        "run_state_on_arrival": guest.answer.state_on_arrival,
        "final_run_state": guest.final_run_state,
        "longest_stop_at_source_ms": _rounded(guest.longest_stop_at_source_ms),
        "heartbeat_period_ms": _rounded(evidence.period_ms),
        "heartbeats": evidence.beats,
        "heartbeats_missing": evidence.missing_beats,
        "complaints": list(evidence.complaints),
        "serial_logs": list(serial_logs),
    }


def _disk(disk: DiskSpec, image: Verdict | None, attempts: Sequence[Attempt]) -> dict[str, Any]:
    """What was sent of it, and how much of that by attempts after the first one that sent any of it."""
    found = {"promised": image.checked, "missing": len(image.missing)} if image else None
    sent = [attempt.disk_bytes[disk.name] for attempt in attempts if disk.name in attempt.disk_bytes]
    told = {"sent_bytes": sum(sent), "sent_again_bytes": sum(sent[1:])}
    return {"name": disk.name, "pool": disk.pool, "image": found, **told}


def _outage(outage: Outage | None) -> dict[str, float | None] | None:
    return None if outage is None else {"udp": _rounded(outage.udp_ms), "tcp": _rounded(outage.tcp_ms)}


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)
