"""A guest as a file, and read again the same guest; and `drover guest edit` around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import wire
from orchestrator.cli import guest_file, main
from orchestrator.cli.exits import Exit
from orchestrator.cli.guest_text import text_of
from orchestrator.core.policy import MigrationPolicy, OnTimeout
from orchestrator.core.records import (
    Boot,
    CloudInit,
    Cpu,
    DeviceSpec,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Display,
    Firmware,
    GuestSpec,
    NicSpec,
    OnHostDeath,
    ShimKind,
    Tpm,
)
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_service import FakeOrchestrator, host, serve, unix_address

FULL = GuestSpec(
    "full",
    memory_mib=256,
    vcpus=2,
    machine="pc-q35-10.0",
    boot=Boot(firmware=Firmware.UEFI, nvram="full_VARS.fd"),
    devices=(
        DeviceSpec("gpu", ShimKind.COMPANION, initial_bytes=1 << 20, options={"seed": "7", "on": "true"}),
        DeviceSpec("nic", ShimKind.EXTERNAL, driver="fabric"),
    ),
    labels={"team": "blue", "zone": "1"},
    policy=MigrationPolicy(max_attempts=3, on_timeout=OnTimeout.SUSPEND),
    cpu=Cpu("Nehalem"),
    disks=(
        DiskSpec("root", "shared", "root.qcow2", size_bytes=3 << 30, boot=True),
        DiskSpec("data", "fast", "d.raw", DiskFormat.RAW, 1 << 30, DiskCache.WRITEBACK),
        DiskSpec("iso", "fast", "d.iso", DiskFormat.RAW, read_only=True),
    ),
    nics=(NicSpec("eth0", "lab", "52:54:00:00:00:01", queues=2, mtu=1400),),
    tpm=Tpm(state="full.permall"),
    cloud_init=CloudInit("#cloud-config\nhostname: x\n", network_config="version: 2\nethernets: {}\n"),
    extra_args=("-device virtio-rng-pci",),
    display=Display(vnc=True),
    system_uuid="eeeeeeee-1111-4222-8333-abcdefabcdef",
)


@pytest.mark.parametrize(
    "spec",
    [
        GuestSpec("small"),
        FULL,
        GuestSpec("direct", boot=Boot(kernel="vmlinuz", initrd="initrd", append="quiet name=${name}")),
        GuestSpec("again", on_host_death=OnHostDeath.RESTART, max_memory_mib=512, max_vcpus=4, machine="q35"),
    ],
    ids=lambda spec: spec.name,
)
def test_what_is_written_is_read_as_the_same_guest(spec: GuestSpec) -> None:
    assert guest_file.load([("guest", text_of(spec))]) == [spec]


def test_what_is_as_ever_is_not_written() -> None:
    assert text_of(GuestSpec("small")) == "name: small\nmemory: 64MiB\nvcpus: 1\nmachine: pc\n"


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOrchestrator]:
    service = FakeOrchestrator(hosts={"h1": host("h1")})
    spec = wire.guest_spec_to_proto(replace(FULL, labels={"team": "blue"}))
    idle, runs = types.OWNERSHIP_PHASE_IDLE, types.RUN_STATE_RUNNING
    service.guests["full"] = types.Guest(
        name="full", uuid="u-1", spec=spec, host="h1", ownership=idle, run_state=runs, etag="u-1.0"
    )
    with serve(service, unix_address(tmp_path)) as address:
        monkeypatch.setenv("DROVER_API", address)
        yield service


def editor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    program = tmp_path / "editor"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(program))
    monkeypatch.setenv("EDITOR", str(program))


def test_the_editor_s_text_is_taken(
    service: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    editor(monkeypatch, tmp_path, 'sed -i s/blue/red/ "$1"')
    assert main.run(["guest", "edit", "full"]) == Exit.OK
    assert service.guests["full"].spec.labels["team"] == "red"
    (asked,) = service.requests("EditGuest")
    assert asked.etag == "u-1.0"
    editor(monkeypatch, tmp_path, "true")
    assert main.run(["guest", "edit", "full"]) == Exit.OK
    assert "left as it is" in capsys.readouterr().out
    assert len(service.requests("EditGuest")) == 1


def test_a_text_that_is_not_taken_is_kept(
    service: FakeOrchestrator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    editor(monkeypatch, tmp_path, 'sed -i "s/vcpus: 2/vcpus: 3/" "$1"')
    assert main.run(["guest", "edit", "full"]) == Exit.REFUSED
    said = capsys.readouterr().err
    (kept,) = tmp_path.glob("drover-full-*.yaml")
    assert "GUEST_IS_RUNNING" in said
    assert f"-f {kept}" in said
    service.guests["full"].ownership = types.OWNERSHIP_PHASE_STOPPED
    assert main.run(["guest", "edit", "full", "-f", str(kept)]) == Exit.OK
    assert "holds from its next start" in capsys.readouterr().out
    assert service.guests["full"].spec.vcpus == 3


def test_a_file_has_that_guest_and_no_other(
    service: FakeOrchestrator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "g.yaml").write_text("name: other\n")
    assert main.run(["guest", "edit", "full", "-f", str(tmp_path / "g.yaml")]) == Exit.USAGE
    assert "must describe one guest, full, not other" in capsys.readouterr().err
    assert not service.requests("EditGuest")
