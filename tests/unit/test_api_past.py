"""What the ledger has forgotten is told from the history file, by the API and the command line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.cli.main import run
from orchestrator.coordinator.retention import Keeping
from orchestrator.core.errors import RefusalReason as R
from orchestrator.core.records import AttemptReport, Attempts, MigrationPhase, MigrationState
from orchestrator.core.retention import Kept, Retention
from orchestrator.history import HistoryConfig, HistoryFile, entry
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.store import Versioned
from tests.fakes.api import ApiCluster, api_cluster
from tests.fakes.coordination import MemoryStore, World


@pytest.fixture
def store() -> MemoryStore:
    made = MemoryStore()
    made.tree.nodes[paths.epoch()] = Versioned(b"", 0, 0)
    return made


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        cluster.server.tools.history = HistoryFile(HistoryConfig(str(tmp_path / "history.jsonl")))
        yield cluster


async def forget(api: ApiCluster, store: MemoryStore, name: str) -> None:
    """As the leader does."""
    keeping = Keeping(store, Index(store), 0, Retention(removals_per_s=1e6), api.server.tools.history)
    doomed = await keeping._migration(name)
    assert doomed is not None
    await keeping._remove(Kept.MIGRATIONS, [doomed])
    await keeping.close()


async def test_a_forgotten_migration_is_shown_and_explained(
    api: ApiCluster, store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    world = World(store)
    name = "abcdef012345"
    await store.ensure(paths.shard(paths.migration(name)))
    world.guest("11111111-aaaa-4aaa-8aaa-aaaaaaaaaaaa", "h1")
    world.migration(name, "11111111-aaaa-4aaa-8aaa-aaaaaaaaaaaa")
    world.put(paths.migration_state(name), MigrationState(MigrationPhase.SUCCEEDED, 1, "h1", "h2", end_time_s=5.0))
    world.put(paths.attempts(name), Attempts((AttemptReport(1, "COMMITTED", source="h1", destination="h2"),)))
    store.tree.nodes.pop(paths.active_migration(name), None)
    before = await api.call(api.client.get_migration, name)
    await forget(api, store, name)
    assert paths.migration(name) not in store.tree.nodes
    after = await api.call(api.client.get_migration, name)
    before.elapsed_ms = after.elapsed_ms
    assert after == before
    assert (await api.refused(api.client.get_migration, "abcdef012346")).reason is R.NOT_FOUND
    for wanted in (name, "abcd"):
        code = await api.call(run, ["explain", wanted, "--api", api.client.address])
        out = capsys.readouterr()
        assert (code, name in out.out) == (0, True), out.err
    assert await api.call(run, ["history", "export", "--kind", "migrations", "--api", api.client.address]) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["kind"], line["name"], line["nodes"]["state"]["phase"]) == ("migrations", name, "SUCCEEDED")
    assert await api.call(run, ["history", "export", "--name", "zz", "--api", api.client.address]) == 0
    assert capsys.readouterr().out == ""
    assert await api.call(run, ["explain", "zz", "--api", api.client.address]) == 3


async def test_a_history_that_cannot_be_read_hides_nothing_else(api: ApiCluster, tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").mkdir()
    assert (await api.refused(api.client.get_migration, "abcdef012345")).reason is R.NOT_FOUND
    assert (await api.refused(lambda: list(api.client.export_history()))).reason is R.INTERNAL


async def test_a_thousand_forgotten_ones_come_as_a_stream(api: ApiCluster) -> None:
    history = api.server.tools.history
    assert history is not None
    history.append([entry("guests", f"g{n}", {"": b'{"name":"x"}'}, n) for n in range(1_000)])
    found = await api.call(lambda: list(api.client.export_history()))
    assert [each.name for each in found] == [f"g{n}" for n in range(1_000)]
    assert not await api.call(lambda: list(api.client.export_history("migrations")))
    only = await api.call(lambda: list(api.client.export_history("guests", "g99")))
    assert [each.name for each in only] == ["g99", *(f"g{n}" for n in range(990, 1_000))]
