"""What heartbeats prove, on logs made by hand: each test is one story that a run can tell."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.lab.cluster.evidence import (
    ConsoleLog,
    Ending,
    NoiseFloor,
    Verify,
    Vmm,
    Window,
    downtime_ms,
    estimate_period_ns,
    examine,
    hand_overs,
    holes,
    largest_pause,
    missing_beats,
    noise_floor,
    overlap,
    overlapping_copies,
    parse_log,
    period_ns,
    ran_ahead_ms,
    running_intervals,
    runs_at,
)

MS = 1_000_000
PERIOD = 20 * MS
SOURCE = Vmm("host-1", "web", "a1")
DESTINATION = Vmm("host-2", "web", "b2")
THIRD = Vmm("host-3", "web", "c3")


def beat(ms: float, number: int, *, page_errors: int = 0, rings: int = 0, device_errors: int = 0) -> str:
    return f"{round(ms * MS)} H {number:08x} 00000001 {page_errors:08x} {rings:08x} {device_errors:08x} 00000000"


def beats(start_ms: float, first: int, count: int, *, step_ms: float = 20) -> list[str]:
    return [beat(start_ms + i * step_ms, first + i) for i in range(count)]


def log(vmm: Vmm, *lines: str) -> ConsoleLog:
    return parse_log(vmm, lines)


def moved(gap_ms: float = 33) -> tuple[ConsoleLog, ConsoleLog]:
    """Beats 1-50 at the source until 980 ms, 51-100 at the destination after the gap."""
    return log(SOURCE, *beats(0, 1, 50)), log(DESTINATION, *beats(980 + gap_ms, 51, 50))


# --- reading


def test_a_file_name_tells_the_vmm():
    assert Vmm.of_file("host-1.web_2.a1.log") == Vmm("host-1", "web_2", "a1")
    assert Vmm.of_file("host-1.web.a1.sock") == SOURCE


@pytest.mark.parametrize(
    "name", ["web.log", "a.b.c.d.log", "host-1..a1.sock", "h.we b.i.log", "h.g.i.txt", "h.g/x.i.log", "h.g.i", ""]
)
def test_other_names_tell_nothing(name: str):
    assert Vmm.of_file(name) is None


def test_every_kind_of_line_is_read():
    read = log(
        SOURCE,
        "5 CONNECTED\n",
        "10 BOOT base=00000004\n",
        "20 H 0000000a 00000002 00000003 00000004 00000005 00000006\n",
        "30 V ok 00000c00\n",
        "40 V bad 00000002\n",
        "50 E c 00000001 00000002 00000003\n",
        "60 D 0 00000001 00000002 00000003\n",
        f"{100 * MS} LAG 60\n",
        "80 TORN H 0000\n",
        "90 EOF\n",
    )
    (one,) = read.beats
    assert (one.ns, one.number, one.sweeps, one.page_errors) == (20, 10, 2, 3)
    assert (one.device_rings, one.device_errors, one.device_retries) == (4, 5, 6)
    assert read.verifies == (Verify(30, True, 0xC00, 0), Verify(40, False, 0, 2))
    assert (read.booted_ns, read.ended_ns, read.unreadable) == (10, 90, 1)
    assert read.complaints == ("E c 00000001 00000002 00000003", "D 0 00000001 00000002 00000003")
    assert read.lags == (Window(40 * MS, 100 * MS),)


@pytest.mark.parametrize(
    "torn",
    [
        "20 H 0000000a 00000002",
        "20 0000000a 00000002 00000003 00000004 00000005 00000006",
        "20 H 0000000a 00000002 00000003 00000004 00000005 00000006 7",
        "20 H 0000000a 00000002 00000003 00000004 00000005 0000000",
        "20 H 0000000A 00000002 00000003 00000004 00000005 00000006",
        "20 V ok",
        "H 0000000a 00000002 00000003 00000004 00000005 00000006",
        "²0 EOF",
        "20 LAG x",
        "20",
        "",
    ],
)
def test_a_torn_line_is_counted_and_nothing_else(torn: str):
    read = log(SOURCE, torn)
    assert (read.beats, read.verifies, read.lags, read.unreadable) == ((), (), (), 1)


@given(st.lists(st.text()))
def test_no_text_is_an_error(lines: list[str]):
    read = parse_log(SOURCE, lines)
    assert read.unreadable <= len(lines)


def test_a_console_that_came_back_has_not_ended():
    assert log(SOURCE, "1 CONNECTED", "2 EOF").ended_ns == 2
    assert log(SOURCE, "1 CONNECTED", "2 EOF", "3 CONNECTED").ended_ns is None
    assert log(SOURCE, "1 CONNECTED", "2 DETACHED").ended_ns is None


# --- time


def test_the_period_is_the_timers_own():
    assert period_ns(100, 2) == pytest.approx(19_998_625.5, abs=1)
    assert period_ns(19, 1) == pytest.approx(1e9 / 19, rel=1e-4)


def test_the_period_is_estimated_over_lost_lines():
    lines = beats(0, 1, 30)
    del lines[10:13]
    assert estimate_period_ns([log(SOURCE, *lines)]) == PERIOD
    assert estimate_period_ns([log(SOURCE, beat(0, 1))]) is None


def test_downtime_is_the_gap_less_one_period():
    assert downtime_ms(*moved(gap_ms=33), PERIOD) == pytest.approx(13)


def test_downtime_counts_beats_that_were_lost_at_the_destination_as_running():
    source = log(SOURCE, *beats(0, 1, 50))
    destination = log(DESTINATION, *beats(980 + 33 + 3 * 20, 54, 50))  # 51-53 before the collector was connected
    (hand_over,) = hand_overs([source, destination], PERIOD)
    assert hand_over.downtime_ms == pytest.approx(13)
    assert hand_over.gap_ms == pytest.approx(93)
    assert hand_over.missing_beats == 3
    assert missing_beats([source, destination]) == 3
    assert overlapping_copies([source, destination]) == 0


def test_a_beat_that_the_move_cut_in_two_was_heard():
    """Stopped within a line, the guest says the rest of it at the destination."""
    whole = beat(1000, 51).partition(" ")[2]
    for cut in (1, 9, len(whole) - 1):
        source = log(SOURCE, *beats(0, 1, 50), f"{1100 * MS} TORN {whole[:cut]}")
        destination = log(DESTINATION, f"{1050 * MS} {whole[cut:]}", *beats(1060, 52, 50))
        assert missing_beats([source, destination]) == 0
        assert missing_beats([source, log(DESTINATION, *beats(1060, 52, 50))]) == 1
        assert missing_beats([log(SOURCE, *beats(0, 1, 50)), destination]) == 1


def test_no_hand_over_has_no_downtime():
    source, destination = moved()
    assert downtime_ms(destination, source, PERIOD) is None
    assert downtime_ms(source, log(DESTINATION), PERIOD) is None


def test_each_hand_over_of_a_guest_that_moves_twice():
    logs = [*reversed(moved(33)), log(THIRD, *beats(2013 + 7, 101, 50))]
    found = hand_overs(logs, PERIOD)
    assert [(each.source, each.destination) for each in found] == [(SOURCE, DESTINATION), (DESTINATION, THIRD)]
    assert [each.downtime_ms for each in found] == pytest.approx([13, 7])
    assert overlapping_copies(logs) == 0


def test_a_deliberate_pause_leaves_no_downtime():
    logs = moved(gap_ms=5000)
    (hand_over,) = hand_overs(logs, PERIOD, paused=[Window(1500 * MS, 5500 * MS)])
    assert (hand_over.downtime_ms, hand_over.gap_ms) == (None, 5000)
    (hand_over,) = hand_overs(logs, PERIOD, paused=[Window(0, 10 * MS)])
    assert hand_over.downtime_ms == pytest.approx(4980)


def test_an_aborted_attempt_is_a_pause_at_the_source_and_no_hand_over():
    source = log(SOURCE, *beats(0, 1, 50), *beats(980 + 20 + 8, 51, 50))
    stop = largest_pause(source, PERIOD)
    assert stop
    assert (stop.start_ns, stop.end_ns) == (980 * MS, 1008 * MS)
    assert stop.pause_ms == pytest.approx(8)
    elsewhere = largest_pause(source, PERIOD, window=Window(1100 * MS, 2000 * MS))
    assert elsewhere
    assert elsewhere.pause_ms == pytest.approx(0)
    judged = examine([source, log(DESTINATION, "5 CONNECTED", "9 EOF")], period=PERIOD)
    assert (judged.hand_overs, judged.overlap.copies, len(judged.running)) == ((), 0, 1)


def test_lost_lines_are_no_pause():
    lines = beats(0, 1, 100)
    del lines[30:60]
    stop = largest_pause(log(SOURCE, *lines), PERIOD)
    assert stop
    assert stop.pause_ms == pytest.approx(0)
    assert len(running_intervals(log(SOURCE, *lines), PERIOD)) == 1
    assert missing_beats([log(SOURCE, *lines)]) == 30


def said(ms: float, number: int, unsaid: int) -> str:
    """A beat of a guest that tells how many it left out before."""
    return f"{beat(ms, number)} {unsaid:08x}"


def starved(unsaid: int) -> list[str]:
    """20 ms each until beat 50; then, 2.4 s late, 60 beats at once and 60 that found the console full, of which it has
    counted `unsaid`; then as before."""
    late = [said(3400 + i / 10, 51 + i, 0) for i in range(60)]
    return [
        *(said(i * 20, 1 + i, 0) for i in range(50)),
        *late,
        *(said(3420 + i * 20, 171 + i, unsaid) for i in range(50)),
    ]


def test_beats_that_a_guest_left_out_itself_are_not_missing():
    assert missing_beats([log(SOURCE, *starved(60))]) == 0
    assert overlap([log(SOURCE, *starved(60))]).copies == 0


def test_a_loss_beside_beats_that_the_guest_left_out_is_found_to_the_line():
    lines = starved(60)
    del lines[55]
    (hole,) = holes([log(SOURCE, *lines)])
    assert (hole.before.number, hole.after.number, hole.missing) == (55, 57, 1)
    (hole,) = holes([log(SOURCE, *starved(50))])
    assert (hole.before.number, hole.after.number, hole.missing) == (110, 171, 10)


@given(st.integers(min_value=1, max_value=159), st.integers(min_value=1, max_value=40))
def test_no_line_that_was_sent_is_lost_unseen(first: int, count: int):
    """Between the first beat and the last. What the guest left out before excuses nothing after it."""
    lines = starved(60)
    gone = lines[first : min(first + count, len(lines) - 1)]
    del lines[first : first + len(gone)]
    assert missing_beats([log(SOURCE, *lines)]) == len(gone)


def test_a_count_that_came_late_or_went_back_excuses_nothing_elsewhere():
    lines = [said(0, 1, 0), said(20, 2, 9), said(200, 11, 9), said(220, 12, 0)]
    assert missing_beats([log(SOURCE, *lines)]) == 8


def test_a_beat_with_a_count_that_the_move_cut_in_two_is_not_missing():
    whole = said(0, 51, 0).partition(" ")[2]
    source = log(SOURCE, *(said(i * 20, 1 + i, 0) for i in range(50)), f"{990 * MS} TORN {whole[:60]}")
    rest = f"{1012 * MS} {whole[60:]}"
    destination = log(DESTINATION, rest, *(said(1040 + i * 20, 52 + i, 0) for i in range(50)))
    assert missing_beats([source, destination]) == 0


def test_a_guest_whose_clock_is_right_never_gets_ahead():
    assert ran_ahead_ms(moved(), PERIOD) == 0
    assert ran_ahead_ms([log(SOURCE, *starved(60))], PERIOD) == pytest.approx(0)
    stopped = log(SOURCE, *beats(0, 1, 50), *beats(19_000, 51, 200))
    assert ran_ahead_ms([stopped, log(DESTINATION, *beats(25_000, 251, 50))], PERIOD) == 0
    assert ran_ahead_ms([], PERIOD) == 0


def test_a_guest_whose_clock_is_too_fast_gets_ahead():
    """Also after a stop of which it has all the time to be behind; and whatever it says it left out."""
    fast = [said(20_000 + i * 5, 51 + 4 * i, 3 * i) for i in range(1000)]
    assert ran_ahead_ms([log(SOURCE, *beats(0, 1, 50), *fast)], PERIOD) == pytest.approx(60_000, rel=0.02)
    assert missing_beats([log(SOURCE, *beats(0, 1, 50), *fast)]) == 0


def test_a_clock_that_jumps_with_the_move_gets_ahead():
    source = log(SOURCE, *(said(i * 20, 1 + i, 0) for i in range(50)))
    destination = log(DESTINATION, *(said(1013 + i * 20, 1051 + i, 1000) for i in range(50)))
    assert ran_ahead_ms([source, destination], PERIOD) == pytest.approx(19_987)


def test_a_paused_guest_does_not_run():
    paused = log(SOURCE, *beats(0, 1, 50), *beats(6000, 51, 50))
    first, second = running_intervals(paused, PERIOD)
    assert (first.last.number, first.beats, second.first.number, second.beats) == (50, 50, 51, 50)
    assert runs_at(paused, 500 * MS, PERIOD)
    assert not runs_at(paused, 3000 * MS, PERIOD)
    assert runs_at(paused, 6500 * MS, PERIOD)
    assert not runs_at(log(SOURCE), 0, PERIOD)


# --- copies


def test_a_clean_hand_over_has_one_copy():
    found = overlap(moved())
    assert (found.copies, found.inside, found.repeated, found.backwards, found.unordered) == (0, 0, 0, 0, 0)


def test_split_brain_is_seen_by_stamp_and_by_counter():
    source = log(SOURCE, *beats(0, 1, 60))  # goes on after 50 to 1180 ms
    destination = log(DESTINATION, *beats(1013, 51, 50))
    found = overlap([source, destination])
    assert found.repeated == 10
    assert found.inside > 10  # beats of either copy within the other's life
    assert found.copies >= found.inside


def test_a_single_beat_of_the_source_after_the_hand_over_is_seen():
    source = log(SOURCE, *beats(0, 1, 50), beat(1500, 51))
    destination = log(DESTINATION, *beats(1013, 51, 50))
    assert overlap([source, destination]).repeated == 1
    assert overlapping_copies([source, destination]) > 0


def test_time_travel_without_overlap_is_seen():
    destination = log(DESTINATION, *beats(2000, 46, 50))  # begins with memory five beats old
    found = overlap([log(SOURCE, *beats(0, 1, 50)), destination])
    assert (found.inside, found.repeated, found.copies) == (0, 5, 5)


def test_a_lower_counter_that_nobody_saw_before_is_time_travel_too():
    lines = beats(0, 1, 50)
    del lines[30:40]
    destination = log(DESTINATION, *beats(2000, 35, 3), *beats(2060, 51, 20))
    found = overlap([log(SOURCE, *lines), destination])
    assert (found.backwards, found.repeated) == (3, 0)


def test_a_source_that_wakes_between_the_beats_of_the_destination_is_seen_without_any_repeat():
    source = log(SOURCE, *beats(0, 1, 50), beat(1495, 1000))
    found = overlap([source, log(DESTINATION, *beats(1013, 51, 50))])
    assert found.repeated == 0
    assert found.inside > 0


def test_a_counter_repeated_on_one_vmm_is_seen():
    assert overlapping_copies([log(SOURCE, *beats(0, 1, 50), *beats(1000, 50, 5))]) == 1


def test_consoles_read_in_the_wrong_order_are_no_second_copy():
    source = log(SOURCE, *beats(0, 1, 49), beat(1013.4, 50))  # stamped late, just after the destination's first
    found = overlap([source, log(DESTINATION, *beats(1013, 51, 50))])
    assert (found.copies, found.unordered) == (0, 2)


def test_a_lag_of_the_collector_hides_the_order_but_not_a_repeat():
    lag = f"{1060 * MS} LAG 70"
    source = log(SOURCE, *beats(0, 1, 49), beat(1040, 50), lag)
    destination = log(DESTINATION, *beats(1013, 51, 50), lag)
    assert overlapping_copies([source, destination]) == 0
    assert overlapping_copies([log(SOURCE, *beats(0, 1, 49), beat(1040, 50)), log(DESTINATION, *beats(1013, 51, 9))])
    twice = log(SOURCE, *beats(0, 1, 49), beat(1039, 50), beat(1040, 51), lag)
    assert overlap([twice, destination]).repeated == 1


@given(st.integers(min_value=1, max_value=60), st.integers(min_value=1, max_value=60))
def test_one_copy_never_looks_like_two(before: int, after: int):
    logs = [log(SOURCE, *beats(0, 1, before)), log(DESTINATION, *beats(before * 20 + 13, before + 1, after))]
    assert overlapping_copies(logs) == 0
    assert missing_beats(logs) == 0


@given(st.integers(min_value=0, max_value=40), st.floats(min_value=0, max_value=1500))
def test_a_copy_that_runs_twice_is_always_seen(extra: int, delay_ms: float):
    source = log(SOURCE, *beats(0, 1, 51 + extra))
    destination = log(DESTINATION, *beats(980 + delay_ms, 51, 50))
    assert overlapping_copies([source, destination]) > 0


# --- noise


def test_the_noise_floor_is_what_a_guest_that_nobody_touches_shows():
    lines = [beat(0, 1), beat(20, 2), beat(45, 3), beat(60, 4), beat(80, 5)]
    still = log(SOURCE, *lines)
    found = noise_floor([(still, Window(0, 80 * MS), PERIOD)])
    assert (found.samples, found.p50_ms, found.p95_ms, found.max_ms) == (4, 0, 5, 5)
    assert noise_floor([(still, Window(0, 30 * MS), PERIOD)]).max_ms == 0
    assert noise_floor([]) == NoiseFloor(0, None, None, None)


# --- one guest


def test_a_guest_judged_as_a_whole():
    source = log(SOURCE, "1 BOOT x", *beats(0, 1, 50), "981000000 TORN H 00", "990000000 EOF")
    end = [beat(2013, 101, rings=70), f"{2020 * MS} V ok 00000c00"]
    destination = log(DESTINATION, *beats(1013, 51, 50), *end)
    judged = examine([destination, source], period=PERIOD)
    assert judged.guest == "web"
    assert judged.vmms == (SOURCE.name, DESTINATION.name)
    assert (judged.page_errors, judged.device_rings, judged.device_errors) == (0, 70, 0)
    assert (judged.memory_verified, judged.last_host, judged.ending) == (True, "host-2", Ending.RUNNING)
    assert judged.unreadable == 1
    told = json.loads(json.dumps(judged.to_dict()))
    assert told["hand_overs"][0]["downtime_ms"] == 13
    assert told["hand_overs"][0]["destination"] == "host-2.web.b2"
    assert told["overlap"]["copies"] == 0
    assert told["memory_verified"] is True


def test_a_verify_before_the_last_hand_over_proves_nothing():
    source, destination = moved()
    early = log(SOURCE, *beats(0, 1, 50), f"{500 * MS} V ok 00000c00")
    assert not examine([early, destination], period=PERIOD).memory_verified
    assert not examine([source, destination], period=PERIOD).memory_verified


def test_errors_in_the_guest_are_kept():
    wrong = beat(2013, 101, page_errors=2, device_errors=1)
    destination = log(DESTINATION, *beats(1013, 51, 50), "2000 E c 1 2 3", wrong, f"{2020 * MS} V ok 00000c00")
    judged = examine([destination], period=PERIOD)
    assert (judged.page_errors, judged.device_errors, judged.complaints) == (2, 1, ("E c 1 2 3",))
    assert not judged.memory_verified


def test_a_guest_that_fell_silent():
    judged = examine(moved(), period=PERIOD, until_ns=5000 * MS)
    assert judged.ending is Ending.SILENT
    nothing = examine([log(SOURCE, "1 CONNECTED")])
    assert (nothing.ending, nothing.beats, nothing.period_ms, nothing.last_host) == (Ending.SILENT, 0, None, None)


def test_logs_of_several_guests_are_refused():
    with pytest.raises(ValueError, match="group them by guest"):
        examine([log(SOURCE), log(Vmm("host-1", "db", "x"))])
    with pytest.raises(ValueError, match="none"):
        examine([])
