"""`drover doctor` on a host."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from agents.config import AgentConfig
from agents.host import doctor


def config_of(tmp_path: Path, **more: Any) -> dict[str, Any]:
    for name in ("dir", "console", "volatile"):
        (tmp_path / name).mkdir(exist_ok=True)
    sound: dict[str, Any] = {
        "host": "host-1",
        "address": "192.0.2.11",
        "zookeeper": "127.0.0.1:1",
        "memory_mib": 1,
        "dir": str(tmp_path / "dir"),
        "console_dir": str(tmp_path / "console"),
        "volatile_dir": str(tmp_path / "volatile"),
        "accelerator": "tcg",
    }
    return sound | more


def found(tmp_path: Path, **more: Any) -> dict[str, list[doctor.Finding]]:
    findings = doctor.examine(AgentConfig.model_validate(config_of(tmp_path, **more)))
    return {each.check: [one for one in findings if one.check == each.check] for each in findings}


def test_what_is_wrong_is_found_with_what_to_do(tmp_path: Path) -> None:
    pools = {"fast": {"path": str(tmp_path / "none"), "kind": "local"}}
    networks = {"lan": {"bridge": "no-such-br"}}
    said = found(tmp_path, qemu="no-such-qemu", memory_mib=1 << 40, pools=pools, networks=networks)
    for check in ("memory_mib", "pools.fast", "networks.lan", "zookeeper"):
        (one,) = said[check]
        assert not one.ok, one
        assert one.do, one
    assert said["qemu"][0].found == "there is no program no-such-qemu"
    assert "127.0.0.1:1: Connection refused" in said["zookeeper"][0].found


def test_a_server_that_listens_and_a_pool_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_WAIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:  # it says nothing of itself
        zookeeper = f"127.0.0.1:{server.getsockname()[1]}"
        said = found(tmp_path, zookeeper=zookeeper, pools={"fast": {"path": str(tmp_path), "kind": "local"}})
    assert said["zookeeper"][0].ok
    assert said["pools.fast"][0].ok
    assert said["memory_mib"][0].ok
    assert said["dir"][0].ok


def test_a_volatile_directory_on_a_disk_is_no_volatile_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_mounts", lambda: [("/", "ext4")])
    assert [each.ok for each in found(tmp_path)["volatile_dir"]] == [True, False]
    monkeypatch.setattr(doctor, "_mounts", lambda: [(str(tmp_path), "tmpfs"), ("/", "ext4")])
    assert [each.ok for each in found(tmp_path)["volatile_dir"]] == [True, True]


def test_the_exit_code_and_json(tmp_path: Path) -> None:
    file = tmp_path / "agent.yaml"
    file.write_text(json.dumps(config_of(tmp_path)))
    ran = CliRunner().invoke(doctor.main, ["--host-config", str(file), "-o", "json"])
    rows = json.loads(ran.output)
    assert ran.exit_code == 1
    assert {"check", "ok", "found", "do"} == rows[0].keys()
    assert CliRunner().invoke(doctor.main, ["--host-config", str(tmp_path / "none.yaml")]).exit_code == 2


SRVR = "Zookeeper version: {0}-deadbeef, built on 2021-01-01\nLatency min/avg/max: 0/0.0/0\nMode: {1}\nNode count: 5\n"
UNREADY = "This ZooKeeper instance is not currently serving requests\n"


def test_what_a_server_says_of_itself() -> None:
    said = SRVR.format("3.8.0", "follower")
    assert doctor.mode_of(said) == "follower"
    assert doctor.version_of(said) == ("3.8.0", False)
    assert doctor.version_of(SRVR.format("3.4.13", "leader")) == ("3.4.13", True)
    assert doctor.mode_of(UNREADY) == "unready"
    assert (doctor.mode_of(""), doctor.version_of("")) == ("", ("", False))


@pytest.mark.parametrize(
    ("modes", "ok", "found"),
    [
        (("leader", "follower", "follower"), True, "a:1 leads"),
        (("standalone",), True, "a:1 stands alone: nothing goes on while it is down"),
        (("follower", ""), True, "no server that answers says that it leads"),
        (("standalone", "standalone"), False, "a:1, b:1: an ensemble of its own each"),
        (("leader", "leader"), False, "a:1, b:1 lead: they are of several ensembles"),
        (("unready",), False, "a:1: in no quorum"),
    ],
)
def test_servers_are_one_ensemble_or_said_not_to_be(modes: tuple[str, ...], ok: bool, found: str) -> None:
    said = doctor.quorum({f"{name}:1": mode for name, mode in zip("abc", modes, strict=False)})
    assert (said.ok, said.found) == (ok, found)
    assert ok or said.do
