"""`drover`: tables, documents for programs, options, and units."""

from __future__ import annotations

import pytest
import yaml

from orchestrator.cli import units
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import Drover, runner


def test_tables_have_natural_order_and_are_whole_on_a_pipe(drover: Drover, service: FakeOrchestrator) -> None:
    service.hosts["host-2"].cordoned = True
    service.hosts["host-2"].cordon_reason = "a reason " * 30
    rows = drover("host", "list").rows()
    assert rows[0] == ["HOST", "STATE", "GUESTS", "FREE MiB", "OF MiB", "PROMISED", "Mbit/s", "ENGINE", "CORDONED"]
    assert [row[0] for row in rows[1:]] == ["host-1", "host-2", "host-10"]
    assert rows[1][1:] == ["LIVE", "0", "7424", "8192", "0", "1000", "QEMU 10.0.3 (tcg)", "no"]
    assert rows[2][-1] == ("yes: " + "a reason " * 30).rstrip()


def test_json_and_yaml_are_one_document_with_stable_names(drover: Drover) -> None:
    ran = drover("host", "list", "-o", "json")
    assert [each["name"] for each in ran.json["hosts"]] == ["host-1", "host-2", "host-10"]
    first = ran.json["hosts"][0]
    assert (first["state"], first["memory_mib"], first["cordoned"]) == ("LIVE", 8192, False)
    assert yaml.safe_load(drover("host", "list", "-o", "yaml").out) == ran.json
    shown = drover("host", "show", "host-1", "--output", "json").json
    agent = shown.pop("agent")
    assert (shown, agent["answered"], agent["copies"]) == (first, True, [])


def test_an_empty_list_says_so_beside_the_result(drover: Drover, service: FakeOrchestrator) -> None:
    service.guests.clear()
    ran = drover("guest", "list", "--host", "host-2")
    assert (ran.code, ran.out, ran.err) == (0, "", "there are no guests on host-2\n")
    assert drover("guest", "list", "-o", "json").json == {"guests": []}


def test_global_options_stand_before_or_behind_the_command(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DROVER_API", "127.0.0.1:1")
    drover = runner(capsys)
    assert drover("--api", address, "host", "list").code == 0
    assert drover("--api", "127.0.0.1:2", "host", "list", "--api", address).code == 0


def test_units() -> None:
    assert [units.size(n) for n in (0, 512, 65536, 67_000_000, 3 << 30)] == [
        *("0 B", "512 B", "64.0 KiB", "63.9 MiB", "3.0 GiB")
    ]
    assert [units.milliseconds(n) for n in (0, 6.25, 99.96, 840.4, 12_345)] == [
        *("0.0 ms", "6.2 ms", "100.0 ms", "840 ms", "12 s")
    ]
    assert [units.seconds(n) for n in (-1, 4.21, 41.4, 200, 7500)] == [
        *("0.0 s", "4.2 s", "41 s", "3 min 20 s", "2 h 5 min")
    ]
    assert [units.rate(n) for n in (0, 2.25, 940.2)] == ["0 Mbit/s", "2.2 Mbit/s", "940 Mbit/s"]
    long = [f"abcdefgh{number}{'0' * 23}" for number in (1, 2)]
    assert units.abbreviate(long) == {long[0]: "abcdefgh1", long[1]: "abcdefgh2"}
    assert units.abbreviate(["host-1-49d755bc", "host-1-49d755bd"])["host-1-49d755bc"] == "host-1-49d755bc"
    assert units.abbreviate(["a" * 32, "b" * 32, "a" * 32]) == {"a" * 32: "a" * 8, "b" * 32: "b" * 8}
    assert sorted(["host-10", "host-2", "db"], key=units.natural) == ["db", "host-2", "host-10"]
    assert [units.parse_ms(text) for text in ("500ms", "1.5s", "2m", "1h")] == [500, 1500, 120_000, 3_600_000]
    assert [units.parse_mbps(text) for text in ("0", "500mbit", "2.5gbit")] == [0, 500, 2500]
