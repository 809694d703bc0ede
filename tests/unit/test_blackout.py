"""While a guest stands still its agent imports no module and waits for no disk. Tried in a process of its own: in this
one everything has been imported by other tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from agents.engine.base import HoldStart, OutgoingOptions, VmmSpec, stream_of
from agents.engine.qemu import engine as qemu
from agents.handover.source import SourceStage
from agents.shims import client
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import GuestSpec
from orchestrator.ledger import zookeeper
from tests.fakes.attempt import Coming, Leaving, Moves
from tests.fakes.coordination import MemoryStore
from tests.fakes.engine import FakeEngine
from tests.fakes.shims import FakeDestinationShim, FakeSourceShim

directory = Path(sys.argv[1])
stands, synced = {}, []
os.fsync = lambda descriptor: synced.append(descriptor)

class Shim(FakeSourceShim):
    async def hook(self, name):
        if name == "freeze":
            stands.update(sys.modules)
        await super().hook(name)

async def main():
    engine, store = FakeEngine(), MemoryStore()
    await store.start()
    moves = Moves(store=store)
    await moves.born()
    spec = lambda inc: VmmSpec("g", inc, GuestSpec("g"), directory, directory / inc, None)
    vmm = await engine.start(spec("s"))
    ref = await moves.opened()
    copy = await engine.prepare_incoming(spec("i1"), moves.migration, 1)
    options = OutgoingOptions(stream_of(copy.metadata), HoldStart.TRICKLE, 0, 1 << 30, 300)
    here, there = Leaving(vmm, [Shim("dpu")]), Coming("i1", copy, [FakeDestinationShim("dpu")])
    await moves.conducted(ref, here, there, MigrationPolicy(), options, directory)
    assert moves.source.state.stage is SourceStage.ENDED_COMMITTED, moves.source.state
    assert stands
    print("imported:", *sorted(set(sys.modules) - set(stands)))
    print("synced:", *synced)

asyncio.run(main())
"""


def test_nothing_is_imported_and_no_disk_is_waited_for_in_the_blackout(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        check=False,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-2:] == ["imported:", "synced:"]
