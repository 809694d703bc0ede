"""What people see: the live view, tables on narrow terminals, and the time line of a migration."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.live import Live

from orchestrator.cli import timeline, watch
from orchestrator.cli.explain import explain_lines
from orchestrator.cli.output import Column, Printer, pairs, table
from orchestrator.cli.timeline import Stretch, tell
from orchestrator.cli.watch import Board, Line, bar, change, eta_s, forward, render, summary
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest
from orchestrator.core.records import AttemptReport, TimelineEntry

# --- tables -----------------------------------------------------------------------------------------------------------

IDS = [f"{digit}" * 32 for digit in "abc"]


WRAPS: list[Column[str]] = [
    Column("ID", lambda one: one[:4]),
    Column("TEXT", lambda _: "one two three four", elastic=True, wraps=True),
]


def columns() -> list[Column[str]]:
    return [
        Column("ID", lambda one: one),
        Column("N", lambda one: str(ord(one[0])), right=True),
        Column("EXTRA", lambda one: "extra", rank=1),
        Column("NOTE", lambda one: ("a long note " * 5).strip(), elastic=True),
        Column("NONE", lambda one: "", optional=True),
    ]


def test_a_table_is_as_wide_as_its_content_where_there_is_room() -> None:
    lines = table(columns(), IDS, None).plain.splitlines()
    assert re.split(r" {2,}", lines[0]) == ["ID", "N", "EXTRA", "NOTE"]
    assert lines[1] == f"{'a' * 32}  97  extra  {('a long note ' * 5).strip()}"


def test_a_narrow_table_cuts_notes_then_leaves_columns_out_and_never_cuts_an_id() -> None:
    at_80 = table(columns(), IDS, 80).plain.splitlines()
    assert at_80[1] == f"{'a' * 32}  97  extra  a long note a long note a long not…"
    assert max(map(len, at_80)) <= 80
    at_52 = table(columns(), IDS, 52).plain.splitlines()
    assert at_52[1] == f"{'a' * 32}  97  a long note…"
    at_20 = table(columns(), IDS, 20).plain.splitlines()
    assert at_20[1].startswith("a" * 32)


def test_a_column_that_wraps_goes_on_below_itself() -> None:
    assert table(WRAPS, IDS[:1], 18).plain.splitlines() == ["ID    TEXT", "aaaa  one two", "      three four"]


def test_wide_characters_count_as_what_they_take() -> None:
    lines = table([Column[str]("A", lambda one: one), Column[str]("B", lambda _: "x")], ["日本", "ab"], None)
    assert lines.plain.splitlines() == ["A     B", "日本  x", "ab    x"]


def test_pairs_leave_out_what_is_empty() -> None:
    assert pairs([("name", "web"), ("message", ""), ("mib", "64")]).plain.splitlines() == ["name  web", "mib   64"]


def test_sentences_break_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = f"evacuation {'e' * 32} of host-1: RUNNING, and so on for some time"
    pipe, terminal = io.StringIO(), io.StringIO()
    Printer("table", pipe).show(sentence)
    assert pipe.getvalue() == f"{sentence}\n"
    printer = Printer("table", terminal)
    printer._console = Console(file=terminal, width=40, force_terminal=True, color_system=None)
    printer.show(sentence)
    assert terminal.getvalue().splitlines() == [
        "evacuation",
        "e" * 32 + " of",
        "host-1: RUNNING, and so on for some time",
    ]


# --- the live view ----------------------------------------------------------------------------------------------------


def board(**values: object) -> Board:
    lines = [
        Line("web-1", "m1", "host-2", "SUCCEEDED", 1, 64, 1.0),
        Line("web-2", "m2", "host-3", "PRECOPY", 1, 64, 0.5, 231.4, 3.2),
        Line("gpu-1", "m3", "host-4", "RETRY_WAIT", 2, 128, reason="LATE_SWITCHOVER_ACK (flows)"),
        Line("gpu-2", "m4", "host-2", "PRECOPY", 1, 128, 0.25, 700, 8, waits_for=("flows", "vgpu")),
        Line("db", "m5", "host-3", "FAILED", 5, 256, reason="NOT_CONVERGING"),
        Line("web-10", memory_mib=64),
    ]
    made = Board("evacuation eeeeeeee of host-1", "RUNNING", 1000.0, lines={line.guest: line for line in lines})
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("width", [80, 120])
def test_the_live_view_fits_the_terminal(width: int) -> None:
    console = Console(record=True, width=width, height=30, force_terminal=True, file=io.StringIO())
    with Live(render(board(), 1020.0, width=width, height=30), console=console, refresh_per_second=1):
        pass
    lines = console.export_text().rpartition("evacuation")[2].splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0].rstrip() == " eeeeeeee of host-1  RUNNING"
    header, *rows = [re.split(r" {2,}", line.rstrip()) for line in lines[1:8]]
    assert header == ["GUEST", "TO", "PHASE", "TRY", "PROGRESS", "Mbit/s", "ETA", "LAST ABORT"]
    by_guest = {row[0]: row for row in rows}
    assert list(by_guest) == ["db", "gpu-1", "gpu-2", "web-1", "web-2", "web-10"]
    half = ["█████░░░░░"] if width == 80 else ["██████████░░░░░░░░░░", "50%"]
    assert by_guest["web-2"] == ["web-2", "host-3", "PRECOPY", "1", *half, "231", "3.2 s"]
    assert by_guest["gpu-1"][:4] == ["gpu-1", "host-4", "RETRY_WAIT", "2"]
    assert by_guest["gpu-1"][-1] == ("LATE_SWITCHOVER_ACK…" if width == 80 else "LATE_SWITCHOVER_ACK (flows)")
    assert by_guest["db"][-1] == "NOT_CONVERGING"
    assert by_guest["gpu-2"][-1] == ("waits for ACK: flow…" if width == 80 else "waits for ACK: flows, vgpu")
    assert by_guest["web-10"] == ["web-10", "PENDING"]
    assert lines[8].startswith("1 of 6 moved, 3 moving, 1 waiting, 1 failed; 931 Mbit/s; 20 s elapsed, about")


def test_a_low_terminal_shows_those_on_their_way_and_counts_the_others() -> None:
    lines = render(board(), 1020.0, width=80, height=9).plain.splitlines()
    assert len(lines) <= 9
    assert [line.split()[0] for line in lines[2:5]] == ["gpu-1", "gpu-2", "web-2"]
    assert lines[5] == "... and 3 more: 1 FAILED, 1 PENDING, 1 SUCCEEDED"


def test_a_remark_about_the_watch_itself_is_shown() -> None:
    lines = render(board(remark="lost the API, trying again"), 1020.0, width=80, height=30).plain.splitlines()
    assert lines[-1] == "lost the API, trying again"


def test_bars_are_exact_and_work_without_unicode() -> None:
    assert [bar(fraction, 4, ascii_only=True) for fraction in (0, 0.24, 0.25, 0.999, 1, 1.5)] == [
        *("----", "----", "#---", "###-", "####", "####")
    ]
    assert "█" not in render(board(), 1020.0, width=80, height=30, ascii_only=True).plain


def test_time_left_follows_from_the_memory_that_has_gone() -> None:
    gone = Line("a", phase="SUCCEEDED", memory_mib=64, fraction=1.0)
    half = Board(started_s=100.0, lines={"a": gone, "b": Line("b", memory_mib=64)})
    assert eta_s(half, 130.0) == pytest.approx(30.0)
    assert "30 s elapsed, about 30 s left" in summary(half, 130.0)
    half.lines["b"] = Line("b", phase="PRECOPY", memory_mib=64, fraction=0.9, eta_s=50.0)
    assert eta_s(half, 130.0) == 50.0  # never less than the slowest guest says itself
    assert eta_s(Board(started_s=100.0, lines={"a": Line("a", memory_mib=64)}), 130.0) is None
    ended = Board(phase="SUCCEEDED", started_s=100.0, ended_s=110.0, lines=half.lines)
    assert summary(ended, 500.0).endswith("10 s elapsed")


def test_no_phase_comes_back_within_an_attempt() -> None:
    switchover = Line("g", "m", phase="SWITCHOVER", attempt=1, fraction=0.9)
    late_news = Line("g", "m", phase="PREPARING", attempt=1)
    assert forward(switchover, late_news) == switchover
    for phase in ("ABORTING", "RETRY_WAIT", "COMMITTED", "SUCCEEDED", "FAILED"):
        assert forward(switchover, Line("g", "m", phase=phase, attempt=1)).phase == phase
    assert forward(switchover, Line("g", "m", phase="PREPARING", attempt=2)).phase == "PREPARING"
    assert forward(switchover, Line("g", "other", phase="PENDING")).phase == "PENDING"


def test_only_what_happened_is_told_on_a_pipe() -> None:
    line = Line("g", destination="host-2", phase="PRECOPY", attempt=1, fraction=0.1)
    assert change(None, line) == "g to host-2: PRECOPY (attempt 1)"
    assert change(line, Line("g", destination="host-2", phase="PRECOPY", attempt=1, fraction=0.9, rate_mbps=5)) == ""
    waiting = Line("g", destination="host-2", phase="PRECOPY", attempt=1, waits_for=("flows",))
    assert change(line, waiting) == "g to host-2: PRECOPY (attempt 1): waits for ACK: flows"
    held = Line("g", destination="host-2", phase="PRECOPY", attempt=1, remark="waiting for the agent of host-1")
    assert change(line, held) == "g to host-2: PRECOPY (attempt 1): waiting for the agent of host-1"


# --- the time line ----------------------------------------------------------------------------------------------------


def entries(*rows: tuple[float, str, str] | tuple[float, str, str, str]) -> tuple[TimelineEntry, ...]:
    return tuple(TimelineEntry(row[0], row[1], row[2], row[3] if len(row) == 4 else "") for row in rows)


SOURCE = entries(
    (2.0, "host-1", "bound", "77beef"),
    (3.0, "host-1", "request", "flows/1"),
    (100.0, "host-1", "ack", "flows/1"),
    (101.0, "host-1", "gate_open"),
    (640.0, "host-1", "vcpus stopped"),
    (640.3, "host-1", "frozen"),
    (642.0, "host-1", "check_passed"),
    (651.0, "host-1", "submit"),
    (654.0, "host-1", "committed"),
    (656.0, "host-1", "runs there"),
    (660.0, "host-1", "done"),
)
DESTINATION = entries(
    (1000.0, "host-2", "loaded"),
    (1003.0, "host-2", "take_over"),
    (1004.0, "host-2", "running"),
    (1007.0, "host-2", "done"),
)
COMMITTED = AttemptReport(
    attempt=2,
    outcome="COMMITTED",
    source="host-1",
    destination="host-2",
    zxid=0x1F8,
    requests=(AckRequest("flows", 1),),
    acks=(AckRequest("flows", 1),),
    blackout_ms=16.0,
    transferred_bytes=67_000_000,
    duration_ms=811,
    ledger_writes=6,
    timeline=SOURCE + DESTINATION,
)
LATE = AttemptReport(
    attempt=1,
    outcome="ABORTED",
    reason=AbortReason.LATE_SWITCHOVER_ACK,
    devices=("flows",),
    source="host-1",
    destination="host-2",
    zxid=0x1F0,
    blackout_ms=7.4,
    duration_ms=912,
    timeline=entries(
        (2.0, "host-1", "bound", "4c1f"),
        (700.1, "host-1", "vcpus stopped"),
        (700.6, "host-1", "frozen"),
        (703.3, "host-1", "abort", "LATE_SWITCHOVER_ACK flows"),
        (707.5, "host-1", "vcpus run"),
        (712.0, "host-1", "abort_recorded", "zxid 496"),
        (713.0, "host-1", "something_new", "with detail"),
    ),
)


def test_the_destination_is_placed_by_cause_and_effect() -> None:
    story = tell(COMMITTED)
    order = [moment.event for moment in story.moments]
    for before, after in (
        ("check_passed", "loaded"),
        ("loaded", "submit"),
        ("submit", "take_over"),
        ("running", "done"),
    ):
        assert order.index(before) < order.index(after)
    placed = {moment.event: moment.at_ms for moment in story.moments if moment.placed}
    # loaded <= submit: offset <= -349; running <= runs there: offset <= -348; submit <= take_over: offset >= -352.
    assert placed["take_over"] == pytest.approx(1003 - 350.5)
    assert story.off_by_ms == pytest.approx(1.5)


def test_clocks_that_contradict_cause_and_effect_are_not_believed() -> None:
    impossible = entries((1000.0, "host-2", "loaded"), (900.0, "host-2", "take_over"))
    report = AttemptReport(1, "COMMITTED", source="host-1", timeline=SOURCE + impossible)
    assert tell(report).off_by_ms is None


def test_parts_of_a_blackout_add_up() -> None:
    parts = tell(COMMITTED).stops
    assert parts == (
        Stretch("quiesce and check", 2.0),
        Stretch("last pass", 9.0),
        Stretch("commit and take-over", 2.5),
        Stretch("word of it", 2.5),
    )
    assert sum(part.ms for part in parts) == pytest.approx(COMMITTED.blackout_ms)
    assert tell(LATE).stops == (Stretch("until the abort", 3.2), Stretch("roll-back", 4.2))
    alone = AttemptReport(1, "COMMITTED", source="host-1", blackout_ms=16.0, timeline=SOURCE)
    assert [part.name for part in tell(alone).stops] == ["quiesce and check", "last pass", "commit", "take-over"]
    paused = AttemptReport(1, "COMMITTED", source="host-1", timeline=SOURCE)
    assert tell(paused).stops == ()


def test_phases_are_named_where_they_begin_and_unknown_events_are_kept() -> None:
    story = tell(LATE)
    assert [(moment.event, moment.phase) for moment in story.moments if moment.phase] == [
        ("bound", "PRECOPY"),
        ("frozen", "SWITCHOVER"),
        ("abort", "ABORTING"),
    ]
    texts = {moment.event: moment.text for moment in story.moments}
    assert texts["something_new"] == "something_new with detail"
    assert texts["abort_recorded"] == "abort recorded, zxid 0x1f0"


def test_every_note_of_the_sessions_has_a_sentence() -> None:
    """The machines' own notes are read from their sources: a new one wants a sentence here."""
    from pathlib import Path

    agents = Path(__file__).resolve().parents[2] / "agents" / "handover"
    notes: set[str] = set()
    for path in (*(agents / "source").glob("*.py"), agents / "destination.py"):
        notes |= set(re.findall(r'Note\("([\w ]+)"', path.read_text()))
    for name in ("source_shell.py", "destination_shell.py"):
        notes |= set(re.findall(r'_note\("([\w ]+)"', (agents / name).read_text()))
    assert len(notes) > 30
    notes -= {"engine", "abort_again"}  # told with the engine's own words
    assert notes - timeline._TEXTS.keys() == set()


@pytest.mark.parametrize("width", [80, 120])
def test_explain_tells_it_all_within_the_terminal(width: int) -> None:
    terminal = io.StringIO()
    printer = Printer("table", terminal)
    printer._console = Console(file=terminal, width=width, force_terminal=True, color_system=None)
    printer.show(*explain_lines([LATE, COMMITTED], [tell(LATE), tell(COMMITTED)], width))
    text = terminal.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "attempt 1  host-1 -> host-2  ABORTED LATE_SWITCHOVER_ACK (flows) at zxid 0x1f0" in text
    assert "attempt 2  host-1 -> host-2  COMMITTED at zxid 0x1f8" in text
    assert re.search(r"^ *3\.0  host-1 +a device asks for an ACK: flows/1$", text, re.MULTILINE)
    assert re.search(r"^~653\.5  host-2 +it has taken over$", text, re.MULTILINE)
    assert "the guest stood still for 7.4 ms: until the abort 3.2 ms + roll-back 4.2 ms" in text
    assert "at most 16.0 ms: quiesce and check 2.0 ms + last pass 9.0 ms" in " ".join(text.split())
    assert "63.9 MiB sent, 1 ACK request and 1 ACK, 6 ledger writes" in text
    assert "…" not in text


def test_the_watch_takes_progress_from_the_samples() -> None:
    from protos.drover.v1 import types_pb2 as types

    sample = types.Progress(total_bytes=100, remaining_bytes=25, transferred_bytes=90, bandwidth_mbps=940, eta_s=2)
    for phase, fraction, rate in (("PRECOPY", 0.75, 940), ("COMMITTED", 1.0, 0), ("RETRY_WAIT", 0.0, 0)):
        number = types.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
        line = watch.line_of_guest(types.EvacuationGuest(guest="g", phase=number, progress=sample), "")
        assert (line.fraction, line.rate_mbps) == (fraction, rate)
    root = types.DiskProgress(name="root", way="full", copied_bytes=300, remaining_bytes=100)
    data = types.DiskProgress(name="data", way="goes_on", copied_bytes=0, remaining_bytes=0, ready=True)
    sample = types.Progress(total_bytes=400, remaining_bytes=400, disks=[root, data])
    number = types.MigrationPhase.Value("MIGRATION_PHASE_PRECOPY")
    line = watch.line_of_guest(types.EvacuationGuest(guest="g", phase=number, progress=sample), "")
    assert line.fraction == 0.375, "of the disks and of the memory, which goes after them"
    assert line.note == "copies disk root, 100 B left"
    nothing = types.EvacuationGuest(guest="g")
    assert watch.line_of_guest(nothing, "").phase == "PENDING"
