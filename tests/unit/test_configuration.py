"""Configuration files: `drover config`, what is said of a wrong key, and the page that explains them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from agents.config import FILE as AGENT
from orchestrator import config as configuration
from orchestrator.api.config import FILE as API
from orchestrator.cli import main
from orchestrator.cli.exits import Exit
from orchestrator.config import ConfigError, ConfigFile
from orchestrator.coordinator.wiring import FILE as COORDINATOR

ROOT = Path(__file__).resolve().parents[2]
FILES: list[ConfigFile[Any]] = [AGENT, API, COORDINATOR]
SOUND = """\
host: host-1
address: 192.0.2.7
zookeeper: 192.0.2.1:2181
dir: /var/lib/drover
console_dir: /run/drover/console
volatile_dir: /run/drover/volatile
memory_mib: 65536
"""


def said_of(tmp_path: Path, text: str, kind: ConfigFile[Any] = AGENT) -> str:
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        kind.load(file)
    return str(caught.value).removeprefix(f"{file}: ")


def test_yaml_is_read_and_so_is_json(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(SOUND)
    loaded = AGENT.load(file)
    file.write_text(json.dumps(yaml.safe_load(SOUND)))
    assert AGENT.load(file) == loaded
    assert loaded.memory_mib == 65536


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("memroy_mib: 1", "memroy_mib: there is no such key; did you mean memory_mib?"),
        ("memory_gib: 64", "memory_gib: there is no such key; it is given in MiB: write memory_mib: 65536"),
        ("bandwidth_gbps: 25", "it is given in Mbit/s: write bandwidth_mbps: 25000"),
        ("memory: 1", "memory: there is no such key; did you mean memory_mib?"),
        ("networks: {lan: {brige: br0}}", "networks.lan.brige: there is no such key; did you mean bridge?"),
        (
            "bandwidth_mbps: 10 Gbit/s",
            "bandwidth_mbps: is a number of Mbit/s, without a unit: for 10 Gbit/s write 10000",
        ),
        ("bandwidth_mbps: 10 s", "bandwidth_mbps: is a number of Mbit/s, which 's' is no unit of"),
        ("pools: {p: {path: /p, kind: local, grace_s: 2 h}}", "pools.p.grace_s: is a number of seconds"),
        ("pools: {p: {path: /p, kind: local, locks: no}}", "(yes, no, on and off without quotes are true and false"),
        ("log_level: loud", "log_level: Input should be 'debug'"),
        ("host: host-2", "line 8: host is there twice"),
        ("1: host-2", "line 8: 1 is no name of a key"),
        ("a: &x [1]\nb: *x", "line 9: aliases (*name) are not understood here"),
        ("a: [", "line 9: "),
        ("a: !!python/name:os.system", "could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(tmp_path: Path, more: str, said: str) -> None:
    assert said in said_of(tmp_path, f"{SOUND}{more}\n")


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = said_of(tmp_path, "host: Host\nmemory_mib: 64GiB\nportt: 1\n")
    assert "host: " in said
    assert "for 64GiB write 65536" in said
    assert "portt: there is no such key" in said
    assert "address: Field required" in said


@pytest.mark.parametrize("text", ["", "- a", "just words"])
def test_a_file_without_keys_says_so(tmp_path: Path, text: str) -> None:
    assert said_of(tmp_path, text) == "it holds no keys: write one `key: value` a line"


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    assert "more than" in said_of(tmp_path, "# " + "x" * configuration.MAX_BYTES)


def test_keys_that_only_disagree_with_each_other(tmp_path: Path) -> None:
    text = "zookeeper: z:1\nray_address: r:1\nshards: 0\nmetrics_listen: nowhere\n"
    said = said_of(tmp_path, text, COORDINATOR)
    assert "shards: must be from 1" in said
    assert "metrics_listen: " in said


# --- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.program)
def test_every_key_says_what_it_means(file: ConfigFile[Any]) -> None:
    assert [each.key for each in file.settings() if not each.meaning] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.program)
def test_the_defaults_that_are_shown_are_those_that_are_taken(file: ConfigFile[Any], tmp_path: Path) -> None:
    must = {"zookeeper": "z:2181", "ray_address": "r:1", "listen": ["unix:/a"]} | yaml.safe_load(SOUND)
    needed = {each.key: must[each.key] for each in file.settings() if each.required and each.key in must}
    path = tmp_path / "with.yaml"
    path.write_text(configuration.as_yaml(file) + yaml.safe_dump(needed))
    without = tmp_path / "without.yaml"
    without.write_text(yaml.safe_dump(needed))
    assert file.load(path) == file.load(without)


def test_the_page_explains_what_the_code_knows() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    again = "`make docs` writes the tables anew"
    for file in FILES:
        assert configuration.as_markdown(file) in page, again


# --- the command ------------------------------------------------------------------------------------------------------


def test_check_says_that_a_file_is_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(SOUND)
    assert main.run(["config", "check", str(file)]) == Exit.OK
    assert capsys.readouterr().out == f"{file}: fit for drover agent\n"
    file = file.rename(tmp_path / "mine.yaml")
    assert main.run(["config", "check", str(file)]) == Exit.USAGE
    assert "--for agent, api or coordinator" in capsys.readouterr().err
    assert main.run(["config", "check", str(file), "--for", "agent"]) == Exit.OK


def test_check_says_what_is_wrong_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "api.yaml"
    file.write_text("listen: [unix:/a]\nzookeper: z\n")
    assert main.run(["config", "check", str(file)]) == Exit.USAGE
    assert capsys.readouterr().err.splitlines() == [
        f"drover: {file} cannot be used by drover api:",
        "  zookeper: there is no such key; did you mean zookeeper?",
        "  zookeeper: Field required",
        "  `drover config show --defaults --for api` explains every key",
    ]


def test_show_fills_in_the_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(SOUND)
    assert main.run(["config", "show", str(file)]) == Exit.OK
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["host"], shown["control_port"]) == ("host-1", 7701)
    assert main.run(["config", "show", "--defaults", "-o", "json", "--for", "agent"]) == Exit.OK
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["control_port"]["default"] == 7701
    assert rows["host"]["required"]
    assert main.run(["config", "show"]) == Exit.USAGE


# --- the programs behind the one command line -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["config", "show", "--defaults", "--for", "agent"]])
def test_the_command_line_loads_no_server(words: list[str]) -> None:
    program = (
        "import sys; from orchestrator.cli import main; main.run(sys.argv[1:]); "
        "print(sorted({'kazoo', 'ray', 'grpc', 'qemu'} & sys.modules.keys()), file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert ran.stderr == "[]\n"


@pytest.mark.parametrize("program", ["agent", "api", "coordinator"])
def test_each_program_is_a_command(program: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.run([program, "--help"]) == Exit.OK
    assert f"/etc/drover/{program}.yaml" in capsys.readouterr().out
    words = [sys.executable, "-m", "orchestrator.cli.main", program, "--config", str(tmp_path / "none.yaml")]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    assert ran.returncode == Exit.USAGE
    assert "none.yaml: No such file or directory" in ran.stderr
