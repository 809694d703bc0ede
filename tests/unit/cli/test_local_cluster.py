"""The lab commands of `drover`: the local cluster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deploy.lab.cluster import commands, qemu_versions
from deploy.lab.cluster.commands import ClusterStatus, PartStatus
from deploy.lab.cluster.config import LocalConfig
from tests.unit.cli.ran import Drover


def test_status_of_nothing_is_5(local: Drover, tmp_path: Path) -> None:
    ran = local("status")
    assert (ran.code, ran.out) == (5, f"cluster in {tmp_path}: not running\n")
    assert local("status", "-o", "json").json["running"] is False


@pytest.mark.parametrize(("health", "code"), [("ok", 0), ("does not answer", 1)])
def test_status_shows_each_part(
    local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, health: str, code: int
) -> None:
    part = PartStatus("agent-host-1", "agent", "host-1", 4711, time.time() - 90, 2, "running", health)
    cluster = ClusterStatus(tmp_path, True, "ready", (part,), ("no namespaces: no bandwidth limit",), 7.5)
    monkeypatch.setattr(commands, "status", lambda _: cluster)
    ran = local("status")
    assert ran.code == code
    assert ran.out.splitlines()[:2] == [
        f"cluster in {tmp_path}: ready, ready after 7.5 s",
        "no namespaces: no bandwidth limit",
    ]
    assert (
        ran.rows()[3] == ["agent-host-1", "running", "4711", "1 min 30 s", "2", health] or ran.rows()[3][-1] == health
    )
    document = local("status", "-o", "json").json
    assert (document["healthy"], document["parts"][0]["pid"]) == (code == 0, 4711)


def test_up_passes_the_options_on(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[LocalConfig, bool]] = []

    def up(config: LocalConfig, *, foreground: bool) -> None:
        seen.append((config, foreground))

    monkeypatch.setattr(commands, "up", up)
    options = ["--hosts", "3", "--bandwidth", "100mbit", "--no-shape", "--memory", "2GiB", "--chaos", "--foreground"]
    assert local("up", *options, "--max-concurrent", "5", "--qemu", "bin/qemu").code == 0
    assert local("up").code == 0
    (given, foreground), (default, _) = seen
    assert foreground
    assert given.model_dump(exclude_defaults=True) == {
        "hosts": 3,
        "bandwidth": "100mbit",
        "shape": False,
        "memory_mib": 2048,
        "chaos": True,
        "max_concurrent_migrations": 5,
        "qemu": str(Path("bin/qemu").resolve()),
    }
    assert given.dir == tmp_path
    assert default == LocalConfig(dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hosts", "99"], "hosts: "),
        (["--bandwidth", "fast"], "not a bandwidth: 'fast'"),
        (["--qemu", "11.1"], "there is no QEMU 11.1 here; found: 10.0.2 (/x/qemu-system-x86_64)"),
    ],
)
def test_up_with_wrong_options_is_2(
    local: Drover, monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setattr(qemu_versions, "find", lambda: {"/x/qemu-system-x86_64": "10.0.2"})
    ran = local("up", *options)
    assert ran.code == 2
    assert told in ran.err


def test_qemu_is_found_by_its_version(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, version in (("qemu-system-x86_64", "10.0.2 (Debian)"), ("qemu-system-x86_64-11.1", "11.1.3")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho 'QEMU emulator version {version}'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "qemu-system-x86_64-microvm").write_text("#!/bin/sh\nexit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = qemu_versions.find()
    assert list(found.values())[:2] == ["10.0.2", "11.1.3"]
    seen: list[LocalConfig] = []

    def up(config: LocalConfig, *, foreground: bool) -> None:
        seen.append(config)

    monkeypatch.setattr(commands, "up", up)
    assert local("up", "--qemu", "11.1").code == 0
    assert seen[0].qemu == str(tmp_path / "qemu-system-x86_64-11.1")
    assert local("up", "--qemu", "11.10").code == 2


def test_down_says_what_is_left(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = local("down", "--dir", str(tmp_path / "none"))
    assert (ran.code, ran.err) == (0, f"no cluster ran in {tmp_path / 'none'}, nothing of it is left\n")
    monkeypatch.setattr(commands, "down", lambda _, keep: ["process 7: qemu", f"kept {keep}"])
    ran = local("down", "--keep", "serial")
    assert ran.code == 1
    assert ran.err.splitlines()[:3] == [
        "drover: not everything could be removed",
        "  process 7: qemu",
        "  kept ('serial',)",
    ]


def test_down_names_no_files_of_a_directory_that_is_not_a_cluster(local: Drover, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    ran = local("down")
    assert (ran.code, ran.err) == (0, f"no cluster ran in {tmp_path}, nothing of it is left\n")
    assert (tmp_path / "mine.txt").exists()


def test_power_needs_a_cluster_and_a_host_of_it(local: Drover, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert local("host", "power-cycle", "host-1").code == 5
    part = PartStatus("agent-host-1", "agent", "host-1", 1, None, 0, "running", "ok")
    monkeypatch.setattr(commands, "status", lambda _: ClusterStatus(tmp_path, True, "ready", (part,)))
    ran = local("host", "power-cycle", "host-7")
    assert ran.code == 3
    assert "the local cluster has no host 'host-7'; there are host-1" in ran.err
    monkeypatch.setattr(commands, "power_cycle", lambda _, host, *, off: not off)
    assert local("host", "power-cycle", "host-1").out == "host-1 has booted and its agent serves\n"
    assert local("host", "power-cycle", "host-1", "--off", "-o", "json").json == {
        "host": "host-1",
        "powered": False,
        "serving": False,
    }
    monkeypatch.setattr(commands, "power_on", lambda _, host: False)
    assert local("host", "power-on", "host-1").code == 1
