"""What is adopted: an engine that says of a process what a QEMU without disks, cards and other devices says, and one.

The process is real, for an agent asks the kernel as well: it is called like a QEMU that was started without options.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agents.engine import base as engine
from tests.fakes.engine import FakeEngine, FakeVmm

_RECORDED = Path(__file__).parents[1] / "unit" / "adopted" / "by_hand.json"


def _bare() -> dict[str, Any]:
    answers = copy.deepcopy(json.loads(_RECORDED.read_text())["answers"])
    answers |= {"query-block": [], "devices": {}, "accelerator": "none"}
    answers["machine"]["type"] = "pc-machine"
    return answers


@dataclass(slots=True)
class AdoptingFake(FakeEngine):
    """See `AdoptingEngine`."""

    answers: dict[str, Any] = field(default_factory=_bare)
    built: dict[str, Any] = field(default_factory=_bare)
    """What the machine says that is tried out."""
    started: list[str] = field(default_factory=list[str])
    let_go_of: list[int] = field(default_factory=list[int])
    fails: str = ""
    is_busy: bool = False
    """Somebody is connected to the monitor."""

    async def look_at(self, pid: int, monitor: Path) -> Mapping[str, Any]:
        if self.is_busy:
            raise engine.MonitorBusy(f"{monitor} does not greet")
        return self.answers

    async def try_out(self, spec: engine.VmmSpec) -> Mapping[str, Any]:
        return self.built

    async def take_over(self, metadata: engine.VmmMetadata, spec: engine.VmmSpec) -> FakeVmm:
        if self.fails:
            raise engine.EngineError(self.fails)
        vmm = FakeVmm(self, metadata, spec, engine.RunState.RUNNING)
        self.processes[metadata.pid] = vmm
        (spec.directory / f"{spec.inc}.json").write_text(json.dumps(_as_note(metadata)))
        return vmm

    async def let_go(self, vmm: engine.Vmm) -> None:
        self.let_go_of.append(vmm.metadata.pid)
        self.processes.pop(vmm.metadata.pid, None)

    async def start(self, spec: engine.VmmSpec) -> FakeVmm:
        self.started.append(spec.inc)
        return await FakeEngine.start(self, spec)


def _as_note(metadata: engine.VmmMetadata) -> dict[str, Any]:
    return {name: getattr(metadata, name) for name in metadata.__dataclass_fields__}


@contextlib.contextmanager
def started_by_hand() -> Iterator[subprocess.Popen[bytes]]:
    """Until it is ended."""
    cat = shutil.which("cat")
    assert cat
    made = subprocess.Popen(["qemu-system-x86_64"], executable=cat, stdin=subprocess.PIPE)
    try:
        yield made
    finally:
        made.kill()
        made.wait()
        if made.stdin is not None:
            made.stdin.close()
