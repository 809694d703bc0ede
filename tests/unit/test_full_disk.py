"""A disk that is full, for real (a small tmpfs): what a take-over needs was reserved; the rest waits, and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from agents.engine.base import VmmMetadata
from agents.engine.qemu import process
from agents.engine.qemu.features import Features
from agents.engine.qemu.vmm import QemuVmm
from agents.guest.files import GuestFiles, make_marker, there
from agents.handover import preflight
from agents.host.journal import Journal
from agents.host.processes import Watched
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import AttemptReport, GuestSpec
from tests.fakes.config import agent_config

G = "0f0e0d0c-0b0a-4987-8654-321001234567"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """1 MiB that nobody else writes to."""
    small = tmp_path / "small"
    small.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield small
    subprocess.run(["umount", "-l", small], check=True)


def fill(disk: Path) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    with pytest.raises(OSError, match="No space"):
        (disk / "another").write_bytes(b"x")
    (disk / "another").unlink()


def empty(disk: Path) -> None:
    (disk / "ballast").unlink()


def files_on(disk: Path) -> GuestFiles:
    return GuestFiles(agent_config(disk), G, GuestSpec("web"))


def test_the_marker_of_a_take_over_needs_no_room(disk: Path) -> None:
    files = files_on(disk)
    files.reserve_marker("i1")
    assert not files.has_marker("i1"), "what is reserved says nothing"
    fill(disk)
    marker = files.marker("i1")
    make_marker(marker)
    assert there(marker)
    make_marker(marker)  # again, by a successor of the agent
    assert files.has_marker("i1")
    files.drop_marker("i1")
    assert not files.has_marker("i1")
    assert list(disk.glob(f"{G}*")) == []


async def test_the_note_of_a_take_over_needs_no_room(disk: Path) -> None:
    files = files_on(disk)
    files.make()
    spec = files.vmm_spec("i1")
    child = await asyncio.to_thread(subprocess.Popen[bytes], ["sleep", "60"])
    watched, start_time = await Watched.adopt_child(child)
    metadata = VmmMetadata(G, "i1", child.pid, start_time, "incoming", "m", 1)
    process.write_metadata(process.metadata_path(spec), metadata)
    vmm = QemuVmm(metadata, spec, watched, cast(Features, None))  # it is asked for nothing
    vmm.reserve()
    assert files.processes() == [metadata], "what is reserved is no note"
    fill(disk)
    await vmm.promote()
    assert files.processes() == [replace(metadata, role="owner")]
    await vmm.promote()
    assert vmm.metadata.role == "owner"
    await vmm.destroy()
    assert files.processes() == []
    assert not there(process.reserved_path(spec))


def test_a_host_without_room_refuses_a_copy(disk: Path) -> None:
    files = files_on(disk)
    preflight.must_have_room(files)
    fill(disk)
    with pytest.raises(DroverError, match=r"h2 has \d+ KiB and room for \d+ files left in .*: make room") as refused:
        preflight.must_have_room(files)
    assert refused.value.reason is RefusalReason.HOST_DISK_FULL
    empty(disk)
    preflight.must_have_room(files)


def test_a_start_that_met_a_full_disk_is_told_as_one(tmp_path: Path) -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise ValueError("the VMM was ended") from error
    except ValueError as error:
        found = preflight.no_room(error, "h2", tmp_path)
    assert found is not None
    assert found.reason is RefusalReason.HOST_DISK_FULL
    assert preflight.no_room(OSError(errno.EIO, "I/O error"), "h2", tmp_path) is None


async def test_the_journal_goes_on_when_there_is_room_again(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.host.journal.RETRY_S", 0.05)
    journal = Journal(disk / "journal")
    journal.open()
    fill(disk)

    async def for_ever() -> None:
        while True:
            await journal.write_on()

    writing = asyncio.create_task(for_ever())
    report = AttemptReport(1, "COMMITTED")
    journal.keep("abcdef012345", report)
    await journal.see_epoch(7)
    await asyncio.sleep(0.3)
    assert (journal.report("abcdef012345", 1), journal.epoch()) == (report, 7)
    assert Journal(disk / "journal").report("abcdef012345", 1) is None
    empty(disk)
    async with asyncio.timeout(20):
        while (found := _opened(disk)).epoch() != 7 or found.report("abcdef012345", 1) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert not writing.done()
    writing.cancel()


def _opened(disk: Path) -> Journal:
    journal = Journal(disk / "journal")
    journal.open()
    return journal
