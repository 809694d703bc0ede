"""Ledgers of any size within a minute: guests on their hosts, and migrations that ended long ago.

What is written is what coordinator and agents would have left, by the same records; many nodes in one transaction.
Guests are known by number, so that every process of the bench knows them without asking.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path

from agents.config import AgentConfig
from agents.engine.base import VmmMetadata
from agents.engine.qemu.process import metadata_path, write_metadata
from agents.guest.files import GuestFiles
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.records import (
    AttemptReport,
    Attempts,
    GuestSpec,
    MigrationPhase,
    MigrationSpec,
    MigrationState,
    Requests,
    TimelineEntry,
    WantRun,
)
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Create, Done, Store, StoreUnavailable
from tests.bench.fleet.engine import FILLED, start_time_of

NODES = 200
"""In one transaction."""
TRIES = 5
SIDE_BY_SIDE = 4
MEMORY_MIB = 64
_TIMEOUT_S = 30.0


def host_name(number: int) -> str:
    return f"host-{number}"


def host_ref(number: int) -> HostRef:
    return HostRef(host_name(number), f"boot-{number}")


def guest_uuid(number: int) -> str:
    return _uuid(f"guest {number}")


def guest_name(number: int) -> str:
    return f"g{number}"


def migration_id(number: int) -> str:
    """Of a migration that ended."""
    return _uuid(f"ended {number}")


def _uuid(of: str) -> str:
    return str(uuid.UUID(bytes=blake2b(of.encode(), digest_size=16).digest()))


def guest_spec(number: int) -> GuestSpec:
    return GuestSpec(guest_name(number), memory_mib=MEMORY_MIB)


def guests_of(host: int, hosts: int, guests: int) -> range:
    """Numbers of the guests that are born on a host: they go round."""
    return range(host, guests, hosts)


def on_disk(config: AgentConfig, guest: int) -> None:
    """What a host's disk has of a guest that runs there."""
    files = GuestFiles(config, guest_uuid(guest), guest_spec(guest))
    files.make()
    inc = blake2b(f"inc {guest}".encode(), digest_size=8).hexdigest()
    pid = FILLED + guest
    metadata = VmmMetadata(files.uuid, inc, pid, start_time_of(pid), "owner", machine=files.spec.machine)
    write_metadata(metadata_path(files.vmm_spec(inc)), metadata)


async def fill_guests(store: Store, hosts: int, guests: int) -> None:
    """Every guest runs at rest on its host, and had no migration yet."""
    await make_tree(store)
    await _write(store, (_guest(number, hosts) for number in range(guests)))


async def make_tree(store: Store) -> None:
    """As it is in a ledger that is not new: else the first migrations seem to cost more than the others."""
    await Ledger(store).init_tree()
    ids = [_uuid(f"shard {number}") for number in range(4_000)]
    parents = {path.rpartition("/")[0] for one in ids for path in (paths.migration(one), paths.request_id(one))}
    for parent in sorted(parents):
        await store.ensure(parent, _TIMEOUT_S)


def _guest(number: int, hosts: int) -> list[Create]:
    guest, name = guest_uuid(number), guest_name(number)
    record = GuestRecord(name, Ownership.IDLE, host_ref(number % hosts), writer="bench")
    return [
        Create(paths.guest(guest), encode(record)),
        Create(paths.guest_spec(guest), encode(guest_spec(number))),
        Create(paths.want_run(guest), encode(WantRun())),
        Create(paths.name(name), encode(guest)),
        Create(f"{paths.host_guests(record.owner.host)}/{guest}", b""),
    ]


async def fill_ended(store: Store, numbers: Iterable[int], guests: int) -> None:
    """Migrations that succeeded: number n was of guest n mod `guests`. No guest's newest migration is among them."""
    make = _ended(guests)
    await _write(store, (make(number) for number in numbers))


def _ended(guests: int) -> Callable[[int], list[Create]]:
    """By a template: encoding each anew would take longer than writing it."""
    now = time.time()
    timeline = tuple(TimelineEntry(at * 7.5, host_name(at % 2), f"event {at}", "detail") for at in range(24))
    report = AttemptReport(
        1, "COMMITTED", source="host-0", destination="host-1", inc="0" * 16, zxid=1, blackout_ms=40.0,
        transferred_bytes=MEMORY_MIB << 20, duration_ms=900.0, ledger_writes=3, timeline=timeline,
    )  # fmt: skip
    spec = MigrationSpec("@migration", "@guest", "@name", "host-1", create_time_s=now - 86_400)
    state = MigrationState(MigrationPhase.SUCCEEDED, 1, "host-0", "host-1", end_time_s=now - 86_390)
    texts = [encode(each) for each in (spec, state, Attempts((report,)), Requests(attempt=1), Requests(attempt=1))]

    def make(number: int) -> list[Create]:
        migration, guest = migration_id(number), number % guests
        nodes = (
            paths.migration(migration),
            paths.migration_state(migration),
            paths.attempts(migration),
            paths.requests(migration),
            paths.acks(migration),
        )
        words = (
            (b"@migration", migration.encode()),
            (b"@guest", guest_uuid(guest).encode()),
            (b"@name", guest_name(guest).encode()),
        )
        first = texts[0]
        for word, value in words:
            first = first.replace(word, value)
        return [Create(path, text) for path, text in zip(nodes, (first, *texts[1:]), strict=True)]

    return make


async def _written(store: Store, batch: list[Create]) -> None:
    """All of it or nothing; what a busy machine left open is looked up. Raises RuntimeError."""
    result: object = None
    for _ in range(TRIES):
        try:
            result = await store.multi(batch, _TIMEOUT_S)
            if isinstance(result, Done) or await store.read(batch[0].path, _TIMEOUT_S) is not None:
                return
        except StoreUnavailable as error:
            result = error
        await asyncio.sleep(1.0)
    raise RuntimeError(f"cannot fill the ledger: {result}")


async def _write(store: Store, groups: Iterator[list[Create]]) -> None:
    """In transactions of about NODES nodes. Raises RuntimeError when one is not carried out."""
    made: set[str] = set(paths.ROOTS)

    async def worker() -> None:
        while batch := list(_batch(groups)):
            inside = {op.path for op in batch}
            for parent in {op.path.rpartition("/")[0] for op in batch} - inside - made:
                await store.ensure(parent, _TIMEOUT_S)
                made.add(parent)
            await _written(store, batch)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(SIDE_BY_SIDE):
            tasks.create_task(worker())


def _batch(groups: Iterator[list[Create]]) -> Iterator[Create]:
    count = 0
    for group in groups:
        yield from group
        count += len(group)
        if count >= NODES:
            return


def agent_config(directory: Path, host: int, zookeeper: str, program: tuple[str, ...], memory_mib: int) -> AgentConfig:
    """Each host has a loopback address of its own, below one that other benches on this machine hardly have."""
    home = directory / host_name(host)
    (home / "volatile").mkdir(parents=True, exist_ok=True)
    bench = 16 + int(zookeeper.rpartition(":")[2]) % 224
    address = f"127.{bench}.{host // 250}.{1 + host % 250}"
    return AgentConfig(
        host=host_name(host),
        address=address,
        allow_loopback=True,
        metrics_port=0,
        zookeeper=zookeeper,
        dir=home,
        console_dir=home,
        volatile_dir=home / "volatile",
        memory_mib=memory_mib,
        device_program=program,
        log_level="warning",
    )
