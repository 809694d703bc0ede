"""What a guest leaves on its host for its next start: UEFI variables, the state of its TPM, and its images."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.config import AgentConfig, FirmwareConfig, PoolConfig
from agents.engine.base import FirmwareFiles
from agents.guest import hardware
from agents.guest.files import GuestFiles
from agents.guest.hardware import Hardware, Kept
from agents.guest.tpm import Tpm
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import DiskFormat, DiskSpec, Firmware, GuestSpec, LiveMachine, PoolKind
from tests.fakes.config import agent_config

MACHINE = LiveMachine("q35", "qemu64", 64, 1, Firmware.UEFI)
DISK = DiskSpec("data", "fast", "data.raw", DiskFormat.RAW, size_bytes=1 << 20)


@pytest.fixture
def config(tmp_path: Path) -> AgentConfig:
    for name in ("code", "vars"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "fast").mkdir()
    update = {
        "firmware": FirmwareConfig(uefi_code=tmp_path / "code", uefi_vars=tmp_path / "vars"),
        "pools": {"fast": PoolConfig(path=tmp_path / "fast", kind=PoolKind.LOCAL)},
    }
    return agent_config(tmp_path).model_copy(update=update)


async def test_variables_and_tpm_state_of_the_last_copy_are_what_the_next_one_begins_with(
    tmp_path: Path, config: AgentConfig
) -> None:
    kept = Kept(tmp_path)
    first = hardware.firmware_of(config, MACHINE, tmp_path / "a.nvram")
    assert first.nvram is not None
    assert first.nvram.read_bytes() == b"vars", "blank: nothing was kept yet"
    first.nvram.write_bytes(b"written by the guest")
    (tmp_path / "a.tpmstate").write_bytes(b"sealed")
    own = Hardware(MACHINE, firmware=first, tpm=Tpm(tmp_path, "a", None), files=(first.nvram,))
    await own.remove(kept=kept)
    await own.remove(kept=kept)
    assert not list(tmp_path.glob("a.*"))
    assert kept.tpm.read_bytes() == b"sealed"
    again = hardware.firmware_of(config, MACHINE, tmp_path / "b.nvram", kept.nvram)
    assert again.nvram is not None
    assert again.nvram.read_bytes() == b"written by the guest"


async def test_what_is_removed_for_good_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.nvram").write_bytes(b"x")
    (tmp_path / "a.tpmstate").write_bytes(b"x")
    nvram = tmp_path / "a.nvram"
    own = Hardware(MACHINE, firmware=FirmwareFiles(nvram=nvram), tpm=Tpm(tmp_path, "a", None), files=(nvram,))
    await own.remove()
    assert not list(tmp_path.iterdir())


async def test_no_empty_image_takes_the_place_of_one_that_a_guest_has_run_on(
    tmp_path: Path, config: AgentConfig
) -> None:
    files = GuestFiles(config, "0f0e0d0c-0b0a-4987-8654-321001234567", GuestSpec("g", disks=(DISK,)))
    with pytest.raises(DroverError) as refused:
        await hardware.image(files, "i", DISK, again=True)
    assert refused.value.reason is RefusalReason.DISK_NOT_FOUND
    assert not list((tmp_path / "fast").iterdir())
    (tmp_path / "fast/data.raw").write_bytes(b"its own")
    assert await hardware.image(files, "i", DISK, again=True) is None
