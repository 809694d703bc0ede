"""What an agent refuses before it makes anything for a guest's hardware, and with which reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.config import AgentConfig, PoolConfig
from agents.engine.libvirt.engine import LibvirtEngine
from agents.guest import hardware, tpm
from agents.guest.files import GuestFiles
from agents.handover import preflight
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import (
    Boot,
    Cpu,
    DiskCache,
    DiskSpec,
    Firmware,
    GuestSpec,
    LiveMachine,
    PoolFence,
    PoolKind,
    Tpm,
)
from tests.fakes.config import agent_config

R = RefusalReason
ROOT = DiskSpec("root", "shared", "root.qcow2")
SOUND = GuestSpec("g", disks=(ROOT,), cpu=Cpu("Nehalem"), extra_args=("-device virtio-rng-pci",))
MODELS = ("Nehalem", "qemu64")


def host(directory: Path, **changes: Any) -> AgentConfig:
    pools = {
        "shared": PoolConfig(path=directory, kind=PoolKind.SHARED_FILE),
        "fast": PoolConfig(path=directory, kind=PoolKind.LOCAL),
        "vg": PoolConfig(path=directory, kind=PoolKind.BLOCK),
        "fenced": PoolConfig(path=directory, kind=PoolKind.BLOCK, fence=PoolFence.PR),
        "trusted": PoolConfig(path=directory, kind=PoolKind.BLOCK, locks="none"),
    }
    allowed = {"pools": pools, "extra_args_allowed": ("-device virtio-rng-pci",)}
    return agent_config(directory, "h1").model_copy(update=allowed | changes)


def refused(config: AgentConfig, spec: GuestSpec, models: tuple[str, ...] = MODELS) -> RefusalReason | None:
    try:
        hardware.must_be_possible(config, spec, models)
    except DroverError as error:
        return error.reason
    return None


def in_pool(pool: str, **changes: Any) -> GuestSpec:
    return replace(SOUND, disks=(replace(ROOT, pool=pool, **changes),))


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (SOUND, None),
        (in_pool("fast", cache=DiskCache.WRITEBACK), None),
        (in_pool("fenced"), None),
        (in_pool("trusted"), None),
        (in_pool("vg", read_only=True), None),
        (in_pool("other"), R.POOL_NOT_FOUND),
        (in_pool("vg"), R.POOL_NOT_FENCED),
        (in_pool("shared", cache=DiskCache.WRITEBACK), R.INVALID_ARGUMENT),
        (in_pool("shared", image="../secret"), R.INVALID_ARGUMENT),
        (replace(SOUND, cpu=Cpu("EPYC")), R.CPU_NOT_AVAILABLE),
        (replace(SOUND, boot=Boot(firmware=Firmware.UEFI)), R.FIRMWARE_NOT_AVAILABLE),
        (replace(SOUND, extra_args=("-device virtio-rng-pci,max-bytes=1",)), R.EXTRA_ARGS_NOT_ALLOWED),
        (replace(SOUND, tpm=Tpm()), R.TPM_NOT_AVAILABLE),
    ],
)
def test_each_obstacle_has_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: GuestSpec, reason: RefusalReason | None
) -> None:
    monkeypatch.setattr(tpm, "PROGRAM", "no-such-program")
    assert refused(host(tmp_path), spec) is reason


def test_an_engine_that_does_not_say_its_models_lets_each_be_tried(tmp_path: Path) -> None:
    assert refused(host(tmp_path), SOUND, ()) is None


async def test_a_tpm_that_cannot_be_had_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpm, "PROGRAM", "no-such-program")
    with pytest.raises(DroverError) as caught:
        await tpm.Tpm.launch(tmp_path, "i")
    assert caught.value.reason is R.TPM_NOT_AVAILABLE
    assert list(tmp_path.iterdir()) == []


def test_firmware_that_is_missing_at_the_other_end_is_named(tmp_path: Path) -> None:
    machine = LiveMachine("pc-q35-10.0", "qemu64", 64, 1, Firmware.BIOS, {"bios": "a" * 64})
    with pytest.raises(DroverError, match="h1 has none") as caught:
        hardware.must_agree(host(tmp_path), SOUND, machine)
    assert caught.value.reason is R.FIRMWARE_NOT_AVAILABLE


async def test_variables_that_are_somebody_elses_are_copied_and_stay_where_they_are(tmp_path: Path) -> None:
    theirs, kept = tmp_path / "theirs.fd", hardware.Kept(tmp_path)
    theirs.write_bytes(b"variables")
    adopted = hardware.Hardware(None, theirs=theirs)
    await adopted.remove()
    assert not kept.nvram.exists()
    await adopted.remove(kept)
    assert (kept.nvram.read_bytes(), theirs.read_bytes()) == (b"variables", b"variables")
    theirs.unlink()
    await adopted.remove(kept)  # what was kept stays
    assert kept.nvram.read_bytes() == b"variables"


async def test_a_host_that_runs_libvirt_names_what_it_does_not_give_before_anything_is_made(tmp_path: Path) -> None:
    config = host(tmp_path, engine="libvirt")
    engine = LibvirtEngine(None, tmp_path / "no-daemon")
    files = GuestFiles(config, "5f1c0000-0000-4000-8000-000000000001", replace(SOUND, tpm=Tpm()))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DroverError, match=r"a TPM, CPU model Nehalem, extra_args") as raised:
        await preflight.must_suit(engine, config, files)
    assert raised.value.reason is R.FEATURE_NOT_AVAILABLE
    assert sorted(tmp_path.rglob("*")) == before
