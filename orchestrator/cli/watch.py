"""Live views of migrations: a table that is written over on a terminal, one line per change on a pipe.

The upper half is pure: what is shown follows from a `Board` and the time. The lower half subscribes, keeps going while
the API restarts, and ends on Ctrl-C with the work left running.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.cli import units
from orchestrator.cli.exits import CliError, Ended, Exit, code_of
from orchestrator.cli.output import Cell, Column, Printer, note, styled, table, tame
from orchestrator.core.errors import DroverError
from orchestrator.core.text import visible

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

    from orchestrator.rpc.messages import AttemptReport, EvacuationGuest, Migration, Progress

M = TypeVar("M")

PATIENCE_S = 30.0
"""How long a watch goes on without an answer from the API, which may be restarting."""
RETRY_S = 0.5
REFRESH_HZ = 4
WIDE = 100
"""From this width on a bar is longer and has its percentage."""

ACTIVE = frozenset({"PREPARING", "PRECOPY", "SWITCHOVER", "COMMITTED", "FINALIZING", "ABORTING", "RETRY_WAIT"})
TERMINAL = frozenset({"SUCCEEDED", "CANCELLED", "FAILED"})
_ORDER = {
    phase: place
    for place, phases in enumerate(
        (
            "PENDING",
            "PREPARING",
            "PRECOPY",
            "SWITCHOVER",
            "ABORTING COMMITTED",
            "FINALIZING RETRY_WAIT",
            "SUCCEEDED CANCELLED FAILED",
        )
    )
    for phase in phases.split()
}
_ARRIVED = frozenset({"COMMITTED", "FINALIZING", "SUCCEEDED"})
_HELD = ACTIVE - {"RETRY_WAIT"} | {"PENDING"}
"""What the API says of them is what holds them up."""
_STUMBLED = frozenset({"ABORTING", "RETRY_WAIT", "CANCELLED", "FAILED"})
_SENDING = frozenset({"PRECOPY", "SWITCHOVER"})


@dataclass(frozen=True, slots=True)
class Copied:
    """How far a local disk has come; `remaining_bytes` is never 0."""

    name: str
    copied_bytes: int
    remaining_bytes: int

    @property
    def tenths(self) -> int:
        """Of it that are at the destination, 0..9."""
        return self.copied_bytes * 10 // (self.copied_bytes + self.remaining_bytes)


@dataclass(frozen=True, slots=True)
class Line:
    """One guest on its way."""

    guest: str
    migration: str = ""
    destination: str = ""
    phase: str = "PENDING"
    attempt: int = 0
    memory_mib: int = 0
    fraction: float = 0.0
    """The share of its local disks and its memory that no longer has to be sent, 0..1."""
    rate_mbps: float = 0.0
    eta_s: float = 0.0
    """0: not known."""
    reason: str = ""
    """Why the last attempt was aborted, or why the migration failed, with the devices concerned."""
    waits_for: tuple[str, ...] = ()
    """Devices whose ACK is pending."""
    copying: tuple[Copied, ...] = ()
    """Local disks that are not at the destination yet: its memory goes after them."""
    remark: str = ""
    """What holds it up, in the words of the API."""

    @property
    def waits(self) -> str:
        """What the guest waits for, in words; empty: for nothing."""
        acks = f"waits for ACK: {', '.join(self.waits_for)}" if self.waits_for else ""
        return "; ".join(filter(None, (self.remark, acks)))

    @property
    def note(self) -> str:
        """The last column: why its last attempt ended, and what it waits for."""
        left = ", ".join(f"disk {disk.name}, {units.size(disk.remaining_bytes)} left" for disk in self.copying)
        return "; ".join(filter(None, (self.reason, f"copies {left}" if left else "", self.waits)))

    @property
    def copied(self) -> str:
        """The local disks on their way, in steps of a tenth; empty: there are none."""
        each = ", ".join(f"disk {disk.name} ({disk.tenths * 10} %)" for disk in self.copying)
        return f"copies {each}" if each else ""


def reason_of(report: AttemptReport) -> str:
    """Why an attempt was aborted: "LATE_SWITCHOVER_ACK (flows)"; empty for one that was not."""
    devices = f" ({', '.join(report.devices)})" if report.devices else ""
    return f"{report.reason}{devices}" if report.reason else ""


def last_abort(attempts: Sequence[AttemptReport]) -> str:
    """Why the newest of the aborted attempts was aborted, in words; empty: none was."""
    aborted = [report for report in attempts if report.reason]
    return reason_of(aborted[-1]) if aborted else ""


def line_of_migration(migration: Migration) -> Line:
    """A line of a migration that is watched by itself; its failure stands for the reason once it has failed."""
    from orchestrator import wire

    phase = wire.word(migration, "phase")
    failure = migration.failure if phase == "FAILED" else ""
    return _line(
        Line(
            guest=migration.guest,
            migration=migration.name,
            destination=migration.destination,
            phase=phase,
            attempt=migration.attempt,
            reason=failure or last_abort(migration.attempts),
            remark=migration.message if phase in _HELD or migration.waiting_for else "",
        ),
        migration.progress,
    )


def line_of_guest(guest: EvacuationGuest, last_reason: str) -> Line:
    """A line of an evacuation; `last_reason` is the last abort of the guest's migration."""
    from orchestrator import wire

    phase = wire.word(guest, "phase") or "PENDING"  # no migration of it exists yet
    return _line(
        Line(
            guest=guest.guest,
            migration=guest.migration,
            destination=guest.destination,
            phase=phase,
            attempt=guest.attempts,
            memory_mib=guest.memory_mib,
            reason=guest.failure if phase == "FAILED" else last_reason,
            remark=guest.message if phase in _HELD else "",
        ),
        guest.progress,
    )


def _line(line: Line, progress: Progress) -> Line:
    if line.phase in _ARRIVED:
        return replace(line, fraction=1.0)
    if line.phase not in _SENDING or not progress.total_bytes:
        return line
    return replace(
        line,
        fraction=_fraction(progress),
        copying=_copying(progress),
        rate_mbps=progress.bandwidth_mbps,
        eta_s=progress.eta_s,
        waits_for=_waits_for(progress),
    )


def _copying(progress: Progress) -> tuple[Copied, ...]:
    under_way = (disk for disk in progress.disks if disk.remaining_bytes and not disk.ready)
    return tuple(Copied(disk.name, disk.copied_bytes, disk.remaining_bytes) for disk in under_way)


def _fraction(progress: Progress) -> float:
    """Of disks and memory together. A disk that has yet to be connected has nothing left, and is not counted."""
    total = progress.total_bytes + sum(disk.copied_bytes + disk.remaining_bytes for disk in progress.disks)
    memory = progress.remaining_bytes if progress.transferred_bytes else progress.total_bytes
    left = memory + sum(disk.remaining_bytes for disk in progress.disks)
    return 1.0 - min(1.0, left / total)


def _waits_for(progress: Progress) -> tuple[str, ...]:
    """Outside the VMM: as requests tell. Inside: a device that still has initial data has not agreed."""
    outside = [request.device for request in progress.pending_acks]
    inside = [device.name for device in progress.devices if device.initial_bytes]
    return tuple(dict.fromkeys([*outside, *inside]))


def forward(before: Line | None, after: Line) -> Line:
    """`after`, but within one attempt no phase comes back: samples and records reach the API by different ways."""
    if before is None or (before.migration, before.attempt) != (after.migration, after.attempt):
        return after
    backwards = _ORDER.get(after.phase, 0) < _ORDER.get(before.phase, 0)
    return replace(after, phase=before.phase, fraction=before.fraction) if backwards else after


# --- what is shown ----------------------------------------------------------------------------------------------------


@dataclass
class Board:
    """Everything that a watch shows."""

    title: str = ""
    phase: str = ""
    started_s: float | None = None
    """By the monotonic clock of the watching process, as is `ended_s`; None: not known."""
    ended_s: float | None = None
    lines: dict[str, Line] = field(default_factory=dict[str, Line])
    remark: str = ""
    """What went wrong with the watch itself."""

    def took(self, elapsed_ms: float, now_s: float, *, over: bool) -> None:
        """Take in how long the watched work has been under way, as just said by the API."""
        began_s = now_s - elapsed_ms / 1000
        self.started_s = began_s if self.started_s is None or over else min(self.started_s, began_s)
        self.ended_s = now_s if over else None

    def elapsed_s(self, now_s: float) -> float:
        """Seconds from when the watched work began until its end, or until `now_s`; 0: not known."""
        if self.started_s is None:
            return 0.0
        return max(0.0, (now_s if self.ended_s is None else self.ended_s) - self.started_s)


def bar(fraction: float, width: int, *, ascii_only: bool = False) -> str:
    """A bar of exactly `width` characters."""
    full, empty = ("#", "-") if ascii_only else ("█", "░")
    done = min(width, math.floor(fraction * width + 1e-9))
    return full * done + empty * (width - done)


def eta_s(board: Board, now_s: float) -> float | None:
    """Time left, from how much of all memory has gone since the start; None when that says nothing yet."""
    lines = board.lines.values()
    weights = [(line.memory_mib or 1, 1.0 if line.phase in TERMINAL else line.fraction) for line in lines]
    total = sum(weight for weight, _ in weights)
    done = sum(weight * fraction for weight, fraction in weights)
    elapsed = board.elapsed_s(now_s)
    if not total or not elapsed or done / total < 0.02:
        return None
    longest = max((line.eta_s for line in lines), default=0.0)
    return max(elapsed * (total - done) / done, longest)


def summary(board: Board, now_s: float) -> str:
    """ "7 of 12 moved, 4 moving, 1 waiting; 512 Mbit/s; 23 s elapsed, about 41 s left"."""
    lines = board.lines.values()
    moved = sum(line.phase == "SUCCEEDED" for line in lines)
    counts = [
        (sum(line.phase in ACTIVE for line in lines), "moving"),
        (sum(line.phase == "PENDING" for line in lines), "waiting"),
        (sum(line.phase == "FAILED" for line in lines), "failed"),
        (sum(line.phase == "CANCELLED" for line in lines), "cancelled"),
    ]
    parts = [", ".join([f"{moved} of {len(lines)} moved", *(f"{number} {word}" for number, word in counts if number)])]
    if rate := sum(line.rate_mbps for line in lines):
        parts.append(units.rate(rate))
    if board.started_s is not None:
        left = None if board.ended_s is not None or board.phase in TERMINAL else eta_s(board, now_s)
        about = f", about {units.seconds(left)} left" if left is not None else ""
        parts.append(f"{units.seconds(board.elapsed_s(now_s))} elapsed{about}")
    return "; ".join(parts)


def columns(width: int | None, *, ascii_only: bool = False) -> list[Column[Line]]:
    """Of the table of a watch."""
    wide = width is None or width >= WIDE

    def progress(line: Line) -> Cell:
        if line.phase == "PENDING" or (line.phase in TERMINAL and line.phase != "SUCCEEDED"):
            return ""
        percent = f" {line.fraction:4.0%}" if wide else ""
        style = "green" if line.fraction >= 1 else "cyan"
        return bar(line.fraction, 20 if wide else 10, ascii_only=ascii_only) + percent, style

    def note_cell(line: Line) -> Cell:
        return line.note, "red" if line.phase == "FAILED" else "yellow"

    return [
        Column("GUEST", lambda line: line.guest),
        Column("TO", lambda line: line.destination),
        Column("PHASE", lambda line: styled(line.phase)),
        Column("TRY", lambda line: str(line.attempt or ""), right=True),
        Column("PROGRESS", progress),
        Column("Mbit/s", lambda line: f"{line.rate_mbps:.0f}" if line.rate_mbps else "", right=True, rank=2),
        Column("ETA", lambda line: units.seconds(line.eta_s) if line.eta_s else "", right=True, rank=1),
        Column("LAST ABORT", note_cell, elastic=True, least=20),
    ]


def render(board: Board, now_s: float, *, width: int, height: int, ascii_only: bool = False) -> Text:
    """The whole view, in at most `height` lines: guests on their way come before those that wait or have arrived."""
    from rich.text import Text

    shown, hidden = _choose(list(board.lines.values()), max(1, height - 5))
    parts: list[Text] = []
    if board.title:
        title = Text(board.title, style="bold", no_wrap=True)
        phase = styled(board.phase)
        parts.append(title.append("  ").append(phase[0], style=phase[1] or "bold") if board.phase else title)
    if shown:
        parts.append(table(columns(width, ascii_only=ascii_only), shown, width))
    if hidden:
        phases = Counter(line.phase for line in hidden)
        said = ", ".join(f"{number} {phase}" for phase, number in sorted(phases.items()))
        parts.append(Text(f"... and {len(hidden)} more: {said}", style="dim"))
    parts.append(Text(summary(board, now_s), no_wrap=True, overflow="ellipsis"))
    if board.remark:
        parts.append(Text(board.remark, style="bold yellow", no_wrap=True, overflow="ellipsis"))
    return tame(Text("\n").join(parts))


def _choose(lines: list[Line], room: int) -> tuple[list[Line], list[Line]]:
    """Which lines are shown and which are not, each in the order of the guests' names."""

    def importance(line: Line) -> int:
        if line.phase in ACTIVE:
            return 0
        return {"FAILED": 1, "PENDING": 2}.get(line.phase, 3)

    ordered = sorted(lines, key=lambda line: units.natural(line.guest))
    if len(ordered) <= room:
        return ordered, []
    kept = {id(line) for line in sorted(ordered, key=importance)[: max(1, room - 1)]}
    return [line for line in ordered if id(line) in kept], [line for line in ordered if id(line) not in kept]


def change(before: Line | None, after: Line) -> str:
    """What happened to a guest, on one line; empty when it is not worth one: progress alone is not."""
    told = _told(after)
    return "" if before and _told(before) == told else told


def _told(line: Line) -> str:
    where = f" to {line.destination}" if line.destination else ""
    repeated = line.attempt > 1 and line.reason and line.phase not in _STUMBLED | TERMINAL
    again = f" after {line.reason}" if repeated else ""
    attempt = f" (attempt {line.attempt}{again})" if line.attempt else ""
    why = "; ".join(filter(None, (line.reason if line.phase in _STUMBLED else "", line.copied, line.waits)))
    return f"{line.guest}{where}: {line.phase}{attempt}{': ' if why else ''}{why}"


# --- showing it -------------------------------------------------------------------------------------------------------


class _Reporter:
    """Tells of a board's changes, from `__enter__` to `__exit__`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exit: object) -> None:
        pass

    def taken(self, document: Callable[[], dict[str, Any]]) -> None:
        """The board has taken a message in."""
        raise NotImplementedError

    def remark(self, text: str) -> None:
        """Something about the watch itself; empty: it is over."""
        if text:
            note(text)


class _OnTerminal(_Reporter):
    """The board, written over."""

    def __init__(self, board: Board, printer: Printer) -> None:
        from rich.live import Live

        self._board, self._printer = board, printer
        self._whole = False
        """What stays on the terminal at the end is not bound to its height."""
        console = printer.console
        self._ascii_only = not (console.encoding or "").lower().startswith("utf")
        self._live: Live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESH_HZ,
            vertical_overflow="visible",
        )

    def _render(self) -> Text:
        size = self._printer.console.size
        height = len(self._board.lines) + size.height if self._whole else size.height - 1
        return render(self._board, time.monotonic(), width=size.width, height=height, ascii_only=self._ascii_only)

    def __enter__(self) -> None:
        self._live.start(refresh=True)

    def __exit__(self, *exit: object) -> None:
        self._whole = True
        self._live.stop()

    def taken(self, document: Callable[[], dict[str, Any]]) -> None:
        del document  # the next refresh shows it

    def remark(self, text: str) -> None:
        self._board.remark = text


class _OnPipe(_Reporter):
    """One line per change, with the time since the watch began."""

    def __init__(self, board: Board, printer: Printer) -> None:
        self._board, self._printer = board, printer
        self._told: dict[str, Line] = {}
        self._remark = ""

    def taken(self, document: Callable[[], dict[str, Any]]) -> None:
        del document
        for key, line in self._board.lines.items():
            if said := change(self._told.get(key), line):
                self._printer.out.write(f"{time.strftime('%H:%M:%S')} {visible(said)}\n")
            self._told[key] = line
        self._printer.out.flush()

    def remark(self, text: str) -> None:
        if text and text != self._remark:
            note(text)
        self._remark = text


class _ForPrograms(_Reporter):
    """Every change as one document."""

    def __init__(self, printer: Printer) -> None:
        self._printer = printer
        self._last: dict[str, Any] | None = None

    def taken(self, document: Callable[[], dict[str, Any]]) -> None:
        now = document()
        if now != self._last:
            self._printer.stream(now)
        self._last = now


def _reporter(board: Board, printer: Printer) -> _Reporter:
    if printer.machine:
        return _ForPrograms(printer)
    return _OnTerminal(board, printer) if printer.console.is_terminal else _OnPipe(board, printer)


def follow(
    printer: Printer,
    board: Board,
    subscribe: Callable[[], Iterator[M]],
    take: Callable[[M], bool],
    *,
    document: Callable[[M], dict[str, Any]],
    interrupted: Callable[[], str],
) -> None:
    """Show what comes in until `take` says that it was the last, or the stream ends.

    Raises Ended(INTERRUPTED) on Ctrl-C after saying what `interrupted` returns, CliError when the API stays away.
    """
    reporter = _reporter(board, printer)
    try:
        with reporter:
            for message in _patient(subscribe, reporter):
                last = take(message)
                reporter.taken(lambda message=message: document(message))
                if last:
                    return
    except KeyboardInterrupt:
        note(interrupted())
        raise Ended(Exit.INTERRUPTED) from None


def _patient(subscribe: Callable[[], Iterator[M]], reporter: _Reporter) -> Iterator[M]:
    """The subscription, made again while the API is away: each begins with the present state."""
    lost_s: float | None = None
    while True:
        try:
            for message in subscribe():
                if lost_s is not None:
                    lost_s = None
                    reporter.remark("")
                yield message
            return
        except DroverError as error:
            if code_of(error.reason) is not Exit.UNREACHABLE:
                raise
            lost_s = time.monotonic() if lost_s is None else lost_s
            if time.monotonic() - lost_s > PATIENCE_S:
                said = f"no answer for {PATIENCE_S:.0f} s, so the watch ends, but what it watched goes on: {error}"
                raise CliError(Exit.UNREACHABLE, said) from None
            reporter.remark(f"lost the API, trying again: {error.message}")
            time.sleep(RETRY_S)
