"""Where each guest is after the ledger was restored from a backup: decided by what the hosts hold, never by the backup.

A backup is older than the guests: they have moved, ended and been started since. What it says about *where* a guest is
therefore decides nothing. A guest that runs somewhere is there; one that was never sealed was never given away, so it
is where it stands; of everything else it is said that it is not known, and nobody starts it. Every decision here holds
whatever attempt was under way when the ledger was lost (tests/property/test_restore.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.text import handful


@dataclass(frozen=True, slots=True)
class Held:
    """One process of a guest that is there, or may be, as its host's agent found it when it was asked."""

    host: HostRef
    inc: str
    incoming: bool = False
    """Made to receive the guest, and not known to be the guest yet."""
    running: bool = False
    """The vCPUs run."""
    sealed: bool = False
    """Everything was sent from it: the guest may have been given away."""
    ended: bool = False
    """The guest shut down by itself."""
    known: bool = True
    """False: the agent could not find out what the process does."""


@dataclass(frozen=True, slots=True)
class HeldGuestCopy:
    """A process, and whose."""

    guest: str
    """Uuid."""
    name: str
    held: Held


@dataclass(frozen=True, slots=True)
class HostHeld:
    """What the agent of one host says when an import asks it."""

    host: HostRef
    complete: bool
    """`copies` is everything that is there."""
    incarnation: str = ""
    """Of the ledger that the agent believes; empty: it has met none that says."""
    epochs: dict[int, int] = field(default_factory=dict[int, int])
    """Of the coordinators that it has obeyed, by shard."""
    copies: tuple[HeldGuestCopy, ...] = ()


class Fate(StrEnum):
    """What an import makes of one guest."""

    OWNED = "OWNED"
    """It is on exactly one host, which owns it from now on."""
    CRASHED = "CRASHED"
    """It is nowhere: every host said so. An operator may start it again."""
    GONE = "GONE"
    """Its life is over, and its name is free or another's."""
    UNKNOWN = "UNKNOWN"
    """What is left of it does not say where it is. It gets no record: agents leave what they hold as it is, its name
    stays taken, and `drover repair` tells what can be done."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The decision about one guest, and why."""

    fate: Fate
    record: GuestRecord | None
    """To be written; None: none is."""
    runs: bool | None = None
    """What the operator's wish has to say, so that a guest goes on as it is; None: what the backup says."""
    why: str = ""
    """A sentence for whoever looks after an UNKNOWN one, or did not expect the change."""


def settle(
    record: GuestRecord,
    held: Sequence[Held],
    *,
    unheard: Sequence[str] = (),
    dead: Sequence[str] = (),
    succeeded: bool = False,
    writer: str,
) -> Settled:
    """Where the guest of that record is.

    `held`: its processes on all hosts that answered. `unheard`: hosts that did not say, or not completely, what they
    hold. `dead`: hosts of which the operator vouches that their power cycle is over. `succeeded`: another life bears
    its name by now.
    """
    if any(not each.known for each in held):
        where = handful(sorted({each.host.host for each in held if not each.known}))
        return _unknown(f"a process of it on {where} could not be asked what it does")
    running = [each for each in held if each.running]
    standing = [each for each in held if not (each.running or each.incoming or each.sealed)]
    if len(running) + len(standing) > 1:
        where = handful(sorted({each.host.host for each in (*running, *standing)}))
        return _unknown(f"more than one process may be the guest: on {where}")
    if running or standing:
        return _owned(record, (running or standing)[0], writer)
    if held:
        return _unknown(_between(held))
    if record.phase is Ownership.GONE:
        return Settled(Fate.GONE, record)
    if unheard:
        return _unknown(f"it may be on {handful(sorted(unheard))}, which did not say what is there")
    return _nowhere(record, dead=record.owner.host in dead, succeeded=succeeded, writer=writer)


def _unknown(why: str) -> Settled:
    return Settled(Fate.UNKNOWN, None, why=why)


def _between(held: Sequence[Held]) -> str:
    """Only copies that were sent, or that were to receive it: whether it was given away stood in the lost ledger."""
    where = ", ".join(f"{each.host.host} ({'arriving' if each.incoming else 'sent'})" for each in held)
    return f"it was being handed over when the ledger was lost, and only that said to whom: {where}"


def _at_rest(record: GuestRecord, *, phase: Ownership, owner: HostRef, inc: str, writer: str) -> GuestRecord:
    """No attempt of the lost ledger goes on: its migrations are over, and their ids are not used again."""
    return replace(
        record,
        phase=phase,
        owner=owner,
        inc=inc,
        migration="",
        attempt=0,
        destination=None,
        source=None,
        reason=None,
        devices=(),
        coord_epoch=0,
        writer=writer,
        host_died=False,
        stopped=False,
        never_ran=False,
        released=False,
    )


def _owned(record: GuestRecord, where: Held, writer: str) -> Settled:
    if record.phase is Ownership.GONE:
        return _unknown(f"the backup says that its life was over, and a process of it is on {where.host.host}")
    owned = _at_rest(record, phase=Ownership.IDLE, owner=where.host, inc=where.inc, writer=writer)
    moved = record.owner.host != where.host.host
    why = f"it was on {record.owner.host} when the backup was made" if moved else ""
    return Settled(Fate.OWNED, owned, None if where.ended else where.running, why)


def _nowhere(record: GuestRecord, *, dead: bool, succeeded: bool, writer: str) -> Settled:
    if succeeded:
        over = _at_rest(record, phase=Ownership.GONE, owner=record.owner, inc="", writer=writer)
        return Settled(Fate.GONE, over, why="it ended after the backup was made: another guest bears its name")
    if record.phase is Ownership.CRASHED:
        return Settled(Fate.CRASHED, replace(record, host_died=record.host_died or dead, writer=writer))
    over = _at_rest(record, phase=Ownership.CRASHED, owner=record.owner, inc="", writer=writer)
    why = f"it is on no host; when the backup was made it was {record.phase} on {record.owner.host}"
    return Settled(Fate.CRASHED, replace(over, host_died=dead), why=why)
