"""PURE. Who may take a host's place in the ledger, and what proves that a former power cycle of it is over.

A host's name is only a word in a configuration file: it is copied with the file, and with the disk that the file is
on. So is everything else on that disk. What tells an agent from its copies:

* `machine` belongs to the hardware; `boot_id` to the kernel that runs there now;
* `lock` is the lock file that the agent holds for life: on one kernel, who holds it now has no living predecessor.
  A directory that was moved to another file system has another one: there, the kernel is asked whether the process that
  was registered (`pid`, `start_time`, in the pid namespace `pids`) has ended;
* `claim` is drawn anew at each registration: an older copy of the disk does not have the last one.

Silence proves nothing (H11). What is not proved is refused, and an operator decides: docs/operations.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.record import Record


@dataclass(frozen=True, slots=True)
class AgentIdentity(Record):
    """One agent process. Stands in the host record, and in the `live` node while the agent's session lives."""

    installation: str
    """Drawn when the agent's directory was made; a copy of the directory has it too."""
    machine: str
    """Of the hardware; empty when nothing there tells it from other hardware."""
    boot_id: str
    agent: str
    """Drawn when the process started."""
    lock: str = ""
    """`device:inode` of the lock file."""
    claim: str = ""
    """Drawn at this registration, and noted in the agent's directory before it."""
    pid: int = 0
    """Of the process; 0: an agent that did not say."""
    start_time: int = 0
    """Of the process, in clock ticks since the machine's start."""
    pids: str = ""
    """The pid namespace in which `pid` is its number, as `device:inode`."""
    markers: str = ""
    """`device:inode` of the volatile directory."""


class Place(StrEnum):
    """What a claimant may do."""

    TAKE = "TAKE"
    CERTIFY = "CERTIFY"
    """Take it, and write with the same transaction that the power cycle before is over."""
    WAIT = "WAIT"
    """A session stands in the way; one that nobody keeps alive lapses within seconds."""
    REFUSED = "REFUSED"


class Doubt(StrEnum):
    """Why a claimant may not have the place (now)."""

    NONE = ""
    SESSION_LIVES = "SESSION_LIVES"
    NO_IDENTITY = "NO_IDENTITY"
    OTHER_INSTALLATION = "OTHER_INSTALLATION"
    OTHER_DIRECTORY = "OTHER_DIRECTORY"
    OLD_COPY = "OLD_COPY"
    MACHINE_UNKNOWN = "MACHINE_UNKNOWN"
    OTHER_MACHINE = "OTHER_MACHINE"
    DECLARED_DEAD = "DECLARED_DEAD"


@dataclass(frozen=True, slots=True)
class PlaceSeen:
    """What the ledger says of the host's place, read behind a barrier."""

    boot_id: str = ""
    """Of the power cycle that was registered last; empty: the host has no record."""
    holder: AgentIdentity | None = None
    """Whose registration that was; None: an agent's that did not say."""
    live: bool = False
    """There is a `live` node."""
    live_holder: AgentIdentity | None = None
    """Whose; None when it does not say."""
    certified: bool = False
    """The registered power cycle is certified to be over."""
    declared_dead: bool = False
    """The claimant's own power cycle is."""
    holder_gone: bool = False
    """The claimant's own kernel says that the holder's process has ended. That it cannot tell does not count."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Whether the claimant may take the host's place, and what is in doubt where it may not yet."""

    place: Place
    doubt: Doubt = Doubt.NONE


def may_take(me: AgentIdentity, claims: Sequence[str], seen: PlaceSeen) -> Answer:
    """`claims`: those that this installation has noted and that may have been registered."""
    if seen.declared_dead:
        return Answer(Place.REFUSED, Doubt.DECLARED_DEAD)
    answer = _without_session(me, claims, seen)
    if answer.place is Place.REFUSED or session_is_over(me, seen):
        return answer
    return Answer(Place.WAIT, Doubt.SESSION_LIVES)


def session_is_over(me: AgentIdentity, seen: PlaceSeen) -> bool:
    """No session holds the place, or it is that of a predecessor which the lock proves to be dead."""
    return not seen.live or (seen.live_holder is not None and is_successor(me, seen.live_holder))


def _without_session(me: AgentIdentity, claims: Sequence[str], seen: PlaceSeen) -> Answer:
    """As if no session stood in the way."""
    if not seen.boot_id:
        return Answer(Place.TAKE)
    if seen.boot_id == me.boot_id:
        if seen.holder is None or is_successor(me, seen.holder) or is_moved(me, claims, seen.holder, seen):
            return Answer(Place.TAKE)
        same = seen.holder.installation == me.installation
        return Answer(Place.REFUSED, Doubt.OTHER_DIRECTORY if same else Doubt.OTHER_INSTALLATION)
    if seen.certified:
        return Answer(Place.TAKE)
    doubt = Doubt.NO_IDENTITY if seen.holder is None else former_cycle_doubt(me, claims, seen.holder)
    return Answer(Place.REFUSED if doubt else Place.CERTIFY, doubt)


def is_successor(me: AgentIdentity, holder: AgentIdentity) -> bool:
    """The same process, or one that holds the lock which the holder held until it died."""
    if me.agent == holder.agent:
        return True
    return bool(me.lock) and (me.installation, me.machine, me.boot_id, me.lock) == (
        holder.installation,
        holder.machine,
        holder.boot_id,
        holder.lock,
    )


def is_moved(me: AgentIdentity, claims: Sequence[str], holder: AgentIdentity, seen: PlaceSeen) -> bool:
    """The same installation in the same power cycle, whose directory lies on another file system now.

    It proves less than the lock does, so it also waits for the session to lapse.
    """
    same = (me.installation, me.machine, me.boot_id) == (holder.installation, holder.machine, holder.boot_id)
    return same and has_ended(seen) and has_last_claim(claims, holder) and has_markers(me, holder)


def has_ended(seen: PlaceSeen) -> bool:
    """A copy of the directory that is used beside the original is refused while that one's agent lives."""
    return seen.holder_gone


def has_markers(me: AgentIdentity, holder: AgentIdentity) -> bool:
    """With another volatile directory, a missing marker would prove what is not so (H10)."""
    return bool(me.markers) and me.markers == holder.markers


def former_cycle_doubt(me: AgentIdentity, claims: Sequence[str], holder: AgentIdentity) -> Doubt:
    """Why it is not proved that the holder's power cycle is over; NONE: it is, this is the same machine."""
    if not is_same_installation(me, holder):
        return Doubt.OTHER_INSTALLATION
    if not has_last_claim(claims, holder):
        return Doubt.OLD_COPY
    return machine_doubt(me, holder)


def is_same_installation(me: AgentIdentity, holder: AgentIdentity) -> bool:
    """Both come from one directory, or from copies of it: not yet a proof that they are one agent."""
    return me.installation == holder.installation


def has_last_claim(claims: Sequence[str], holder: AgentIdentity) -> bool:
    """A directory that was copied, or restored, before the last registration does not know its claim."""
    return bool(holder.claim) and holder.claim in claims


def machine_doubt(me: AgentIdentity, holder: AgentIdentity) -> Doubt:
    """One machine runs one kernel at a time: with another boot_id, the one before has ended."""
    if not me.machine or not holder.machine:
        return Doubt.MACHINE_UNKNOWN
    return Doubt.NONE if me.machine == holder.machine else Doubt.OTHER_MACHINE
