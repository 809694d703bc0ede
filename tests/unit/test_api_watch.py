"""Watches through the real API: the present state first, then every change, merged for who is slow, and their ends."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Generic, TypeVar

import pytest

from orchestrator import wire
from orchestrator.core import handover
from orchestrator.core.agent import AgentSample, AttemptStatus, GuestStatus, Progress, RunState
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.records import EvacuationPhase, GuestSpec, MigrationPhase, Quarantined, QuarantineList
from orchestrator.ledger import paths
from orchestrator.ledger.gather import members
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Done, SetData, Versioned
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2
from tests.fakes.api import ApiCluster, api_cluster, until
from tests.fakes.coordination import MemoryStore, World

R = RefusalReason
P = MigrationPhase
T = TypeVar("T")
D = HostRef("h2", "boot-h2")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def world(store: MemoryStore) -> World:
    return World(store)


@pytest.fixture
async def api(store: MemoryStore, tmp_path: Path) -> AsyncIterator[ApiCluster]:
    async with api_cluster(store, tmp_path) as cluster:
        await cluster.call(cluster.client.create_guest, GuestSpec("web"), "h1")
        await cluster.hearing("h1", "h2", "h3")
        yield cluster


class Watch(Generic[T]):
    """A client's watch, read in a thread."""

    def __init__(self, stream: Iterator[T]) -> None:
        self._told: queue.Queue[T | Exception | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._thread.start()

    def _read(self, stream: Iterator[T]) -> None:
        try:
            for message in stream:
                self._told.put(message)
            self._told.put(None)
        except Exception as error:
            self._told.put(error)

    async def next(self) -> T:
        got = await asyncio.to_thread(self._told.get, True, 5)
        assert got is not None, "the stream has ended"
        if isinstance(got, Exception):
            raise got
        return got

    async def until(self, condition: Callable[[T], bool]) -> T:
        while not condition(message := await self.next()):
            pass
        return message

    async def end(self) -> None:
        assert await asyncio.to_thread(self._told.get, True, 5) is None

    def is_silent(self) -> bool:
        return self._told.empty()


@contextmanager
def watching(api: ApiCluster, method: Callable[[OrchestratorClient], Iterator[T]]) -> Iterator[Watch[T]]:
    """With a client of its own, so that leaving ends the stream."""
    with OrchestratorClient(api.address, timeout_s=5) as client:
        yield Watch(method(client))


async def put(world: World, path: str, record: object) -> None:
    """A write that watches see."""
    node = world.store.tree.nodes[path]
    assert isinstance(await world.store.multi([SetData(path, encode(record), node.version)]), Done)


def phase(migration: types_pb2.Migration) -> str:
    return wire.word(migration, "phase")


async def test_a_guest_is_told_as_it_is_and_again_when_it_changes(api: ApiCluster, world: World) -> None:
    with watching(api, lambda client: client.watch_guests(["web"])) as watch:
        first = await watch.next()
        assert (first.name, first.host, first.want_run) == ("web", "h1", True)
        await api.call(api.client.pause_guest, "web")
        await watch.until(lambda guest: not guest.want_run and wire.word(guest, "run_state") == "PAUSED")
        told = GuestStatus(first.uuid, "web", "inc", RunState.STOPPED)
        api.agents["h1"].say(AgentSample(guests=(told,)))
        await watch.until(lambda guest: wire.word(guest, "run_state") == "STOPPED")
        await api.call(api.client.stop_guest, "web")
        gone = await watch.until(lambda guest: wire.word(guest, "ownership") == "GONE")
        assert wire.word(gone, "run_state") == "ENDED"
        await watch.end()


async def test_all_guests_and_those_to_come(api: ApiCluster) -> None:
    with watching(api, lambda client: client.watch_guests()) as watch:
        assert (await watch.next()).name == "web"
        await api.call(api.client.create_guest, GuestSpec("db"), "h2")
        await watch.until(lambda guest: (guest.name, wire.word(guest, "run_state")) == ("db", "RUNNING"))
        await api.call(api.client.stop_guest, "web")
        await watch.until(lambda guest: (guest.name, wire.word(guest, "ownership")) == ("web", "GONE"))
    with watching(api, lambda client: client.watch_guests()) as later:
        assert (await later.next()).name == "db"
        await asyncio.sleep(0.3)
        assert later.is_silent(), "guests that were gone before are no news"


async def test_a_migration_from_its_creation_to_its_end(api: ApiCluster, world: World) -> None:
    created = await api.call(api.client.create_migration, "web")
    name, web = created.name, created.guest_uuid
    with watching(api, lambda client: client.watch_migrations([name])) as watch:
        assert phase(await watch.next()) == "PENDING"
        record = handover.open_attempt(world.record(web), name, 1, D, epoch=0, writer="c")
        await put(world, paths.guest(web), record)
        world.edit_state(
            name, lambda state: replace(state, phase=P.PREPARING, attempt=1, source="h1", destination="h2")
        )
        assert (await watch.until(lambda each: phase(each) == "PREPARING")).attempt == 1
        record = handover.bind(record, name, 1, "inc", writer="a")
        await put(world, paths.guest(web), record)
        await watch.until(lambda each: phase(each) == "PRECOPY")
        for transferred in range(1, 200):
            sample = AttemptStatus(AttemptRef(web, name, 1), P.PRECOPY, Progress(transferred_bytes=transferred))
            api.agents["h1"].say(AgentSample(attempts=(sample,)))
        seen = 0
        while (await watch.next()).progress.transferred_bytes < 199:
            seen += 1
        assert seen < 100, "samples are merged, the newest is told"
        world.edit_state(name, lambda state: replace(state, phase=P.SUCCEEDED, end_time_s=2.0))
        assert (await watch.until(lambda each: phase(each) == "SUCCEEDED")).end_time.seconds == 2
        await watch.end()


async def test_an_agent_that_falls_silent_is_named_while_its_migration_waits_for_it(
    api: ApiCluster, world: World
) -> None:
    """Nothing else moves: unreachable is not dead, so nobody ends the attempt in its place."""
    created = await api.call(api.client.create_migration, "web")
    name, web = created.name, created.guest_uuid
    opened = handover.open_attempt(world.record(web), name, 1, D, epoch=0, writer="c")
    world.edit_state(name, lambda state: replace(state, phase=P.PREPARING, attempt=1, source="h1", destination="h2"))
    await put(world, paths.guest(web), handover.bind(opened, name, 1, "inc", writer="a"))
    sample = AttemptStatus(AttemptRef(web, name, 1), P.PRECOPY, Progress(transferred_bytes=5))
    api.agents["h1"].say(AgentSample(attempts=(sample,)))
    with watching(api, lambda client: client.watch_migrations([name])) as watch:
        assert (await watch.until(lambda each: phase(each) == "PRECOPY")).message == ""
        await api.agents["h1"].stop()
        silent = await watch.until(lambda each: bool(each.message))
        assert silent.message == "waiting for the agent of h1, which does not answer"


async def test_all_migrations_that_are_not_over_and_those_to_come(api: ApiCluster, world: World) -> None:
    over = await api.call(api.client.create_migration, "web")
    await api.call(api.client.cancel_migration, over.name)
    first = await api.call(api.client.create_migration, "web")
    with watching(api, lambda client: client.watch_migrations()) as watch:
        assert (await watch.next()).name == first.name
        await api.call(api.client.create_guest, GuestSpec("db"), "h1")
        second = await api.call(api.client.create_migration, "db")
        assert (await watch.next()).name == second.name
        await api.call(api.client.cancel_migration, first.name)
        ended = await watch.next()
        assert (ended.name, phase(ended)) == (first.name, "CANCELLED")
        await api.call(api.client.cancel_migration, second.name)
        assert (await watch.next()).name == second.name
        await asyncio.sleep(0.3)
        assert watch.is_silent()


async def test_a_migration_that_is_over_is_told_once_to_who_names_it(api: ApiCluster) -> None:
    made = await api.call(api.client.create_migration, "web")
    await api.call(api.client.cancel_migration, made.name)
    with watching(api, lambda client: client.watch_migrations([made.name])) as watch:
        assert phase(await watch.next()) == "CANCELLED"
        await watch.end()


async def test_an_evacuation(api: ApiCluster, world: World) -> None:
    job = (await api.call(api.client.create_evacuation, "h1")).evacuation.name
    with watching(api, lambda client: client.watch_evacuations([job])) as watch:
        assert wire.word(await watch.next(), "phase") == "PENDING"
        await put(world, paths.evacuation_state(job), replace(world.job(job), safe_to_power_off=True, safe_at=1))
        assert (await watch.next()).safe_to_power_off
        await api.call(api.client.uncordon_host, "h1")
        assert not (await watch.next()).safe_to_power_off
        await put(world, paths.evacuation_state(job), replace(world.job(job), phase=EvacuationPhase.FAILED))
        await watch.until(lambda each: wire.word(each, "phase") == "FAILED")
        await watch.end()


@pytest.mark.parametrize("names", [["nobody"], ["web", "nobody"]])
async def test_names_that_there_are_not(api: ApiCluster, names: list[str]) -> None:
    with watching(api, lambda client: client.watch_guests(names)) as guests, pytest.raises(DroverError) as caught:
        await guests.next()
    assert (caught.value.reason, caught.value.field) == (R.NOT_FOUND, "names")
    with watching(api, lambda client: client.watch_migrations(names)) as watch, pytest.raises(DroverError) as caught:
        await watch.next()
    assert (caught.value.reason, caught.value.field) == (R.NOT_FOUND, "names")


async def test_a_watch_outlives_the_ledgers_absence(api: ApiCluster, world: World) -> None:
    with watching(api, lambda client: client.watch_guests()) as watch:
        await watch.next()
        uuid = (await world_guest(world))[0]
        world.store.down = True
        api.agents["h1"].say(AgentSample(guests=(GuestStatus(uuid, "web", "inc", RunState.STOPPED),)))
        await watch.until(lambda guest: wire.word(guest, "run_state") == "STOPPED")
        node = world.store.tree.nodes[paths.guest(uuid)]
        crashed = handover.crashed(world.record(uuid), writer="a")
        world.store.tree.nodes[paths.guest(uuid)] = Versioned(encode(crashed), node.version + 1, 9)
        world.store.tree.notify(paths.guest(uuid))
        await asyncio.sleep(0.4)
        world.store.down = False
        await watch.until(lambda guest: wire.word(guest, "ownership") == "CRASHED")


async def world_guest(world: World) -> list[str]:
    await asyncio.sleep(0)
    return list(await members(world.store, paths.GUESTS))


async def test_an_unreadable_record_does_not_end_the_watch_of_the_others(api: ApiCluster, world: World) -> None:
    await api.call(api.client.create_guest, GuestSpec("db"), "h2")
    (bad,) = [uuid for uuid in await world_guest(world) if world.record(uuid).name == "web"]
    world.put(paths.guest(bad), {"name": 7})
    with watching(api, lambda client: client.watch_guests()) as watch:
        assert (await watch.next()).name == "db"
        await api.call(api.client.pause_guest, "db")
        await watch.until(lambda guest: not guest.want_run)


async def test_a_client_is_told_on_after_the_api_was_restarted(
    api: ApiCluster, store: MemoryStore, tmp_path: Path
) -> None:
    with watching(api, lambda client: client.watch_guests()) as watch:
        await watch.next()
        await api.server.stop()
        again = ApiCluster(MemoryStore(store.tree), tmp_path)
        await again.start(hosts=0)
        await watch.next()
        await again.call(again.client.cordon_host, "h3")
        await again.call(again.client.create_guest, GuestSpec("db"), "h2")
        await watch.until(lambda guest: guest.name == "db")
        await again.stop()


async def test_a_client_whose_api_never_answered_is_told_so_at_once(tmp_path: Path) -> None:
    with OrchestratorClient(f"unix:{tmp_path}/nobody.sock") as client:
        with pytest.raises(DroverError) as caught:
            await asyncio.to_thread(next, client.watch_guests())
        assert caught.value.reason is R.API_UNREACHABLE


async def test_what_leaders_set_aside_is_told_of_the_resource_and_of_no_other(api: ApiCluster, world: World) -> None:
    await api.call(api.client.create_guest, GuestSpec("db"), "h2")
    stuck = (await api.call(api.client.create_migration, "web")).name
    other = (await api.call(api.client.create_migration, "db")).name
    job = (await api.call(api.client.create_evacuation, "h3")).evacuation.name
    await world.store.ensure(paths.quarantine())
    with (
        watching(api, lambda client: client.watch_migrations()) as everything,
        watching(api, lambda client: client.watch_migrations([stuck])) as one,
        watching(api, lambda client: client.watch_evacuations([job])) as of_job,
    ):
        assert {(await everything.next()).name for _ in range(2)} == {stuck, other}
        assert ((await one.next()).message, (await of_job.next()).message) == ("", "")
        entries = tuple(Quarantined(name, "7 is no host") for name in (f"migrations/{stuck}", f"evacuations/{job}"))
        await put(world, paths.quarantine(), QuarantineList(entries))
        for watch in (everything, one, of_job):
            assert (await watch.next()).message == "quarantined: 7 is no host"
        await put(world, paths.quarantine(), QuarantineList())
        for watch in (everything, one, of_job):
            assert (await watch.next()).message == ""
        assert everything.is_silent(), "the other one is no news"
        await put(world, paths.quarantine(), QuarantineList(entries))
        with watching(api, lambda client: client.watch_migrations([stuck])) as late:
            said = (await api.call(api.client.get_migration, stuck)).message
            assert (await late.until(lambda each: bool(each.message))).message == said


async def test_who_leaves_leaves_nothing_behind(api: ApiCluster, store: MemoryStore) -> None:
    await api.call(api.client.list_guests)  # the index has a watch of its own
    before = len(store.tree.watches), len(store.tree.nodes.trees)
    for _ in range(3):
        with watching(api, lambda client: client.watch_guests()) as watch:
            await watch.next()
            assert len(store.tree.nodes.trees) > before[1]
    with watching(api, lambda client: client.watch_guests(["web"])) as named:
        await named.next()
    await until(lambda: (len(store.tree.watches), len(store.tree.nodes.trees)) == before)


async def test_many_streams_of_many_guests_share_one_watch(api: ApiCluster, store: MemoryStore) -> None:
    await api.call(api.client.list_guests)
    before = len(store.tree.watches), len(store.tree.nodes.trees)
    await api.call(api.client.create_guest, GuestSpec("db"), "h2")
    with watching(api, lambda client: client.watch_guests()) as first:
        assert {(await first.next()).name for _ in range(2)} == {"web", "db"}
        with watching(api, lambda client: client.watch_guests()) as second:
            await second.next()
            assert (len(store.tree.watches), len(store.tree.nodes.trees)) == (before[0], before[1] + 1)
        await api.call(api.client.pause_guest, "web")
        await first.until(lambda guest: not guest.want_run)
