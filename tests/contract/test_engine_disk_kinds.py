"""Disks whose image lies on another one that stays where it is.

Real QEMU and a real storage daemon, as in `test_engine_disks`: each is aborted before the drain, aborted behind it, and
moved, and both images are compared with all that lies below them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agents.engine.base import DiskFailed, DiskFile, RunState
from agents.engine.qemu.vmm import QemuVmm
from orchestrator.core.disks import Copying, copying
from orchestrator.core.disks import DestinationSide as There
from orchestrator.core.records import DiskFormat
from tests.contract.test_engine_disks import SIZE, Lab, process_of, run

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="no qemu-storage-daemon"),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU"),
]
BASE_MIB = 24


class Overlaid(Lab):
    """Its image lies on one that both ends have, and of which nothing is to be sent."""

    base_format = DiskFormat.QCOW2

    def disk(self, where: Path) -> DiskFile:
        base = where / f"base.{self.base_format}"
        return replace(super().disk(where), base=base, base_format=self.base_format)

    async def source(self) -> QemuVmm:
        for where in (self.here, self.there):
            base = self.disk(where).base
            assert base is not None
            run("qemu-img", "create", "-q", "-f", self.base_format, base, str(SIZE))
            line = f"write -P 9 0 {BASE_MIB}M"
            assert run("qemu-io", "-f", self.base_format, "-c", line, base) == 0
        return await super().source()


class OnRaw(Overlaid):
    base_format = DiskFormat.RAW


@pytest.fixture(params=[Overlaid, OnRaw], ids=["on-qcow2", "on-raw"])
async def lab(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Lab]:
    made = request.param(tmp_path)
    yield made
    await made.close()


def allocated(path: Path) -> int:
    """Bytes that the image itself has."""
    return sum(each["length"] for each in mapped(path) if each["depth"] == 0 and each["data"])


def mapped(path: Path) -> list[dict[str, Any]]:
    told = subprocess.run(["qemu-img", "map", "-U", "--output=json", path], capture_output=True, check=True)
    return json.loads(told.stdout)


async def test_it_is_aborted_before_and_behind_the_drain_and_moved(lab: Lab) -> None:
    source, daemon, target = await lab.mirrored()
    first = await lab.parked(source)
    assert (await source.abort()).run_state is RunState.RUNNING
    await first.destroy()
    await lab.write(source, 40, 1, 2)

    second = await lab.parked(source, "e")
    await source.disks.drain(5.0)
    await source.disks.mark("one")
    await daemon.release("root", target.image)
    assert (await source.abort()).run_state is RunState.RUNNING
    await second.destroy()
    await lab.write(source, 20, 1, 3)
    known = (await source.disks.known())["root"]
    assert copying(known, There(target.image, "one")) is Copying.INCREMENT

    await daemon.export(lab.disk(lab.there), target.image)
    await source.disks.connect_disk(target)
    await source.disks.increment("root", "one")
    await lab.write(source, 41, 1, 4)
    third = await lab.parked(source, "f")
    await source.disks.drain(5.0)
    await source.disks.mark("two")
    await lab.sealed(source)
    await daemon.release("root", target.image)
    assert lab.identical()
    await third.resume()
    assert (await third.state()).run_state is RunState.RUNNING
    await lab.write(third, 50, 1, 5)


async def test_a_target_that_is_frozen_at_the_freeze_is_cut_off_and_the_guest_runs_on(lab: Lab) -> None:
    source, daemon, _ = await lab.mirrored()
    os.kill(process_of(daemon), signal.SIGSTOP)
    try:
        await lab.write(source, 10, 1, 6)
        destination = await lab.started(source)
        assert isinstance(await lab.until(DiskFailed), DiskFailed)
        assert (await source.abort()).run_state is RunState.RUNNING
        await lab.write(source, 11, 1, 7)
        await destination.destroy()
    finally:
        os.kill(process_of(daemon), signal.SIGCONT)


@pytest.mark.parametrize("lab", [Overlaid], indirect=True)
async def test_nothing_of_what_an_image_lies_on_is_sent(lab: Lab) -> None:
    source, daemon, target = await lab.mirrored()
    await lab.parked(source)
    await source.disks.drain(5.0)
    await lab.sealed(source)
    await daemon.release("root", target.image)
    there = lab.disk(lab.there).path
    assert lab.identical()
    assert allocated(there) <= 8 << 20, "what the guest wrote, and nothing of the 24 MiB below it"
    assert any(each["depth"] == 1 and each["data"] for each in mapped(there))
