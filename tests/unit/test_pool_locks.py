"""That locks on a shared pool are seen across hosts, with real locks on real files.

Hosts of a test share one kernel. A pool whose locks are not seen is made as operators make it: by copying it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import AgentConfig, PoolConfig
from agents.disks import locks, pools
from agents.disks.locks import PoolLocks
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import HostRef
from orchestrator.core.records import DiskFormat, DiskSpec, GuestSpec, PoolKind
from tests.fakes.config import agent_config

SOURCE = HostRef("h1", "b1")
DATA = DiskSpec("data", "shared", "data.raw", DiskFormat.RAW)
SPEC = GuestSpec("g", disks=(DATA,))


def config_of(directory: Path, host: str, pool: Path, **changes: object) -> AgentConfig:
    made = PoolConfig.model_validate({"path": pool, "kind": PoolKind.SHARED_FILE, **changes})
    return agent_config(directory, host).model_copy(update={"pools": {"shared": made}})


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    made = tmp_path / "pool"
    made.mkdir()
    return made


async def test_a_lock_that_the_source_holds_is_seen_and_believed_for_a_while(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = (PoolLocks(config_of(tmp_path, host, pool)) for host in ("h1", "h2"))
    assert destination.unproven(SPEC, SOURCE)
    assert await source.held(SPEC) == ("shared",)
    await destination.must_be_seen(SPEC, SOURCE, ["shared"])
    assert not destination.unproven(SPEC, SOURCE)
    assert destination.unproven(SPEC, replace(SOURCE, boot_id="b2")), "its next power cycle may have mounted another"
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3_700)
    assert destination.unproven(SPEC, SOURCE)


async def test_a_pool_that_hangs_when_its_lock_is_given_back_stops_no_agent(
    tmp_path: Path, pool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To close a file of a network's file system waits for its server."""
    begun, goes_on, close = threading.Event(), threading.Event(), os.close
    loop_thread = threading.get_ident()
    closed_by: list[int] = []

    def slow(descriptor: int) -> None:
        closed_by.append(threading.get_ident())
        begun.set()
        if threading.get_ident() != loop_thread:
            goes_on.wait(30)
        close(descriptor)

    monkeypatch.setattr(locks, "_HELD_S", 0.0)
    assert await PoolLocks(config_of(tmp_path, "h1", pool)).held(SPEC) == ("shared",)
    with monkeypatch.context() as patched:
        patched.setattr(locks.os, "close", slow)
        async with asyncio.timeout(30):
            while not begun.is_set():  # noqa: ASYNC110 - the loop is what must go on
                await asyncio.sleep(0.01)
    goes_on.set()
    assert loop_thread not in closed_by


async def test_two_guests_at_once_do_not_take_each_other_s_lock_away(tmp_path: Path, pool: Path) -> None:
    source, destination = (PoolLocks(config_of(tmp_path, host, pool)) for host in ("h1", "h2"))
    assert await source.held(SPEC) == await source.held(SPEC) == ("shared",)
    await destination.must_be_seen(SPEC, SOURCE, ["shared"])


async def test_a_copy_of_the_pool_has_the_same_word_and_none_of_its_locks(tmp_path: Path, pool: Path) -> None:
    """A restored snapshot of the volume, or a replica, mounted under the same name at the other host."""
    one = config_of(tmp_path, "h1", pool)
    source = PoolLocks(one)
    word = pools.tokens(one, SPEC)
    await source.held(SPEC)
    copy = tmp_path / "copy"
    shutil.copytree(pool, copy)
    two = config_of(tmp_path, "h2", copy)
    pools.must_be_the_same(two, SPEC, word)  # it came along
    destination = PoolLocks(two)
    with pytest.raises(DroverError, match="h2 does not see the locks that h1 holds in pool shared") as refused:
        await destination.must_be_seen(SPEC, SOURCE, ["shared"])
    assert refused.value.reason is RefusalReason.POOL_NOT_FENCED
    assert destination.unproven(SPEC, SOURCE), "what was not seen is looked for again"


async def test_a_lock_that_is_not_held_is_not_seen(tmp_path: Path, pool: Path) -> None:
    probe = locks.probe_of(pool, "h1")
    assert not locks.is_locked(probe)
    os.close(locks.hold(probe))
    assert probe.exists()
    assert not locks.is_locked(probe)


async def test_nothing_is_asked_for_where_no_lock_is_to_keep_anybody_off(tmp_path: Path, pool: Path) -> None:
    accepts = PoolLocks(config_of(tmp_path, "h1", pool, locks="none"))
    assert not accepts.unproven(SPEC, SOURCE)
    assert await accepts.held(SPEC) == ()
    required = PoolLocks(config_of(tmp_path, "h1", pool))
    only_reads = replace(SPEC, disks=(replace(DATA, read_only=True),))
    assert not required.unproven(only_reads, SOURCE)
    await required.must_be_seen(SPEC, SOURCE, [])  # of an agent that knows nothing of it


async def test_what_was_seen_is_bounded(tmp_path: Path, pool: Path) -> None:
    source, destination = (PoolLocks(config_of(tmp_path, host, pool)) for host in ("h1", "h2"))
    await source.held(SPEC)
    for number in range(300):
        await destination.must_be_seen(SPEC, HostRef("h1", f"b{number}"), ["shared"])
    assert len(destination._seen) <= 256
