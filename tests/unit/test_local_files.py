"""The files of a local cluster: its options, its record, the configuration of its parts."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from agents.engine.base import VmmMetadata
from agents.engine.qemu import process as engine
from deploy.lab.cluster import config, lock, network, parts, ray_head, state, supervisor, teardown
from deploy.lab.cluster.layout import Layout, LocalClusterError, Server, StopReason
from deploy.lab.cluster.processes import Identity
from orchestrator.coordinator import wiring


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 10**9), ("2.5Gbit", 2_500_000_000), ("100mbit", 10**8), ("64 kbit", 64_000)]
)
def test_bandwidth(text: str, bits: int) -> None:
    assert config.rate_bps(text) == bits


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bandwidth": "fast"}, "bandwidth: not a bandwidth: 'fast'; write for example 1gbit"),
        ({"bandwidth": "0gbit"}, "bandwidth: not a bandwidth"),
        ({"hosts": 0}, "hosts: Input should be greater than or equal to 1"),
        ({"host": 3}, "host: Extra inputs are not permitted"),
        ({"accelerator": "hvf"}, "accelerator: Input should be 'tcg' or 'kvm'"),
    ],
)
def test_bad_options_are_named_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(LocalClusterError) as caught:
        config.make(**options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_a_long_directory_is_refused_before_a_socket_is() -> None:
    with pytest.raises(LocalClusterError, match=r"too long \(46 bytes, at most 36\)"):
        Layout.of("/tmp/" + "x" * 41).check()
    longest = Layout.of("/tmp/" + "x" * 31)
    longest.check()
    ray = (
        longest.ray(Server("coordinator-2", 2, "", None))
        / "session_2026-11-24_03-03-28_906439_4194304"
        / "sockets"
        / "plasma_store"
    )
    assert len(str(ray)) <= 107


def test_the_directory_names_the_cluster_however_it_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert {Layout.of(name).id for name in ("a", "./b/../a", "link", tmp_path / "a")} == {Layout.of("a").id}
    assert Layout.of("b").id != Layout.of("a").id


def a_record() -> state.ClusterRecord:
    places = network._loopback(2, "a test")
    part = state.PartRecord("api", "api", None, state.PartState.RUNNING, Identity(11, 110), 1.5, 2, "signal 9")
    waiting = state.PartRecord("agent-host-1", "agent", "host-1", state.PartState.WAITING, None, None, 0)
    return state.ClusterRecord(
        id="abc",
        state=state.ClusterState.READY,
        supervisor=Identity(10, 100),
        started_at=1.0,
        parts=(part, waiting),
        places=places,
        config={"hosts": 2},
        stop=state.StopRecord("api does not come up", StopReason.PART_FAILED, "api", "its log"),
        ray_processes=(Identity(12, 120),),
    )


def test_the_record_reads_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    state.write(path, a_record())
    assert state.read(path) == a_record()
    assert a_record().processes() == [Identity(10, 100), Identity(11, 110), Identity(12, 120)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cluster.json"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "state": "ready"}', "\xff"])
def test_an_unreadable_record_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(content, encoding="latin-1")
    assert state.read(path) is None
    assert state.read(tmp_path / "absent") is None


def test_what_parts_are_told(tmp_path: Path) -> None:
    (tmp_path / "guest.elf").touch()
    options = config.make(
        dir=tmp_path / "d",
        guest_image=tmp_path / "guest.elf",
        hosts=2,
        bandwidth="250mbit",
        chaos=True,
        log_level="warning",
    )
    layout = options.layout
    layout.dir.mkdir()
    places = network._loopback(2, "a test")
    parts.write_files(options, layout, places)
    boot = layout.power_cycle("host-2").read_text()
    parts.write_files(options, layout, places)
    assert layout.power_cycle("host-2").read_text() == boot

    agent = json.loads(layout.agent_json("host-2").read_text())
    assert (agent["host"], agent["address"], agent["bandwidth_mbps"], agent["instructions"]) == (
        "host-2",
        "127.0.0.12",
        250,
        True,
    )
    assert Path(agent["volatile_dir"]).is_dir()
    coordinator = wiring.load(layout.coordinator_json)
    assert coordinator.ray_token_file == str(layout.ray_token)
    assert coordinator.limits.starts_per_s == 125
    assert coordinator.chroot == agent["chroot"]
    assert coordinator.log_level == agent["log_level"] == "warning"
    assert layout.ray_token.stat().st_mode & 0o777 == 0o600
    assert ray_head.token(layout) == ray_head.token(layout) == layout.ray_token.read_text()

    specs = {spec.name: spec for spec in parts.build(options, layout, places)}
    assert list(specs) == ["zookeeper", "ray", "api", "collector", "agent-host-1", "agent-host-2", "coordinator"]
    assert specs["agent-host-2"].environment["DROVER_HOST"] == "host-2"
    assert all(spec.environment["DROVER_CLUSTER"] == str(layout.dir) for spec in specs.values())
    assert not any("RAY_AUTH_TOKEN" in spec.environment for spec in specs.values() if spec.kind in {"agent", "api"})


def test_processes_are_found_by_the_notes_that_agents_keep(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path)
    guest = layout.host("host-2") / "guests" / "0123456789abcdef"
    guest.mkdir(parents=True)
    engine.write_metadata(guest / "i1.json", VmmMetadata("0123", "i1", 11, 110, "owner"))
    (guest / "i1.devices.json").write_text('{"pid": 12, "start_time": 120}')
    (guest / "guest.json").write_text('{"uuid": "0123", "spec": {}}')
    (guest / "i2.json").write_text('{"pid": 1')
    assert teardown.guest_processes(layout) == {Identity(11, 110): "host-2"}
    assert teardown.noted_processes(layout) == {Identity(11, 110): "host-2", Identity(12, 120): "host-2"}


def test_an_error_is_one_sentence_and_what_the_log_says() -> None:
    error = LocalClusterError("no luck", reason=StopReason.PART_FAILED, part="api", detail="  line 1\n  line 2")
    assert str(error) == "no luck\n  line 1\n  line 2"
    again = state.StopRecord.of(error).error()
    assert (again.sentence, again.reason, again.part, again.detail) == (
        "no luck", StopReason.PART_FAILED, "api", "  line 1\n  line 2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], ""),
        (["Traceback (most recent call last):", '  File "x.py"', "ModuleNotFoundError: No module named 'grpc'"],
         "ModuleNotFoundError: No module named 'grpc'"),
        (["92 [main] ERROR - Unexpected exception", "java.net.BindException: Address already in use",
          "\tat java.base/sun.nio.ch.Net.bind0(Native Method)", "94 [main] ERROR - Exiting JVM with code 1", ""],
         "java.net.BindException: Address already in use"),
        (["Error: cannot start the coordinator: no such file"], "Error: cannot start the coordinator: no such file"),
        (["starting", "no room"], "no room"),
    ],
)  # fmt: skip
def test_the_line_of_a_log_that_says_why(lines: list[str], said: str) -> None:
    assert supervisor.last_words(lines) == said


async def test_a_taken_port_is_named_with_its_owner() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        spec = parts.PartSpec(
            "api", "api", (), {}, Path(), Path(), parts.always, parts.always, listens=(("127.0.0.1", port),)
        )
        said = await parts.taken(spec)
        assert said
        assert said.startswith(f"port {port} on 127.0.0.1 is in use by ")
        assert f"(pid {os.getpid()})" in said
    assert await parts.taken(spec) is None


def test_a_missing_guest_image_is_named(tmp_path: Path) -> None:
    options = config.make(dir=tmp_path, guest_image=tmp_path / "none.elf")
    with pytest.raises(LocalClusterError, match=r"guest image .*none.elf does not exist"):
        parts.guest_image(options, options.layout)


def test_only_our_own_directory_is_emptied(tmp_path: Path) -> None:
    foreign = Layout.of(tmp_path / "foreign")
    foreign.dir.mkdir()
    (foreign.dir / "thesis").touch()
    teardown.remove_files(foreign)
    assert (foreign.dir / "thesis").exists()
    with pytest.raises(LocalClusterError, match="not Drover's"):
        lock.acquire(foreign, create=True)

    ours = Layout.of(tmp_path / "ours")
    held = lock.acquire(ours, create=True)
    assert held
    assert lock.is_held(ours)
    assert lock.acquire(ours, create=True) is None
    (ours.dir / "anything").touch()
    (ours.dir / "folder").mkdir()
    (ours.dir / "folder" / "file").touch()
    teardown.remove_files(ours, keep=["folder"])
    assert (ours.dir / "folder" / "file").exists()
    assert not (ours.dir / "anything").exists()
    teardown.remove_files(ours)
    assert not ours.dir.exists()
    held.release()
    assert lock.acquire(ours, create=False) is None
