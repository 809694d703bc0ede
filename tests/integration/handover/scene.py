"""What a test of the hand-over does to a running cluster: make guests, move them, reach an instant, and hit a process.

Guests are made and moved through the public API. To be at an exact instant a device's scenario holds the attempt there,
or a process that is known by pid is stopped; that the instant is reached is read from the API, the ledger, the devices'
control sockets and the notes of processes on disk, never from a log and never by sleeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import signal
import struct
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploy.lab.cluster import evidence, processes, state, teardown
from deploy.lab.cluster.layout import Layout
from deploy.lab.cluster.processes import Identity
from deploy.lab.devices.scenario_text import options_of
from deploy.lab.workload import Workload, boot_of
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import GuestRecord
from orchestrator.core.records import Boot, DeviceSpec, DiskSpec, GuestSpec, HostRecord, NicSpec, ShimKind, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc import channels
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import shim_pb2, types_pb2
from protos.drover.v1.shim_pb2_grpc import ShimServiceStub
from tests.fakes.cluster import Cluster

T = TypeVar("T")

REACH_S = 40.0
"""Bound of every wait for an instant; a loaded machine is slow, and a test that waits so long has failed."""
BOOT_S = 180.0
"""Of a guest with a whole operating system, on a machine that does much else."""
RAY_S = 60.0
"""Ray starts anew, and its processes are many."""
POLL_S = 0.004
CALL_S = 15.0
QUIET = Workload(dirty_mib=2, dirty_pages_per_s=200)
_TERMINAL = ("SUCCEEDED", "CANCELLED", "FAILED")


def reach(true: Callable[[], T | None], what: str, timeout_s: float = REACH_S) -> T:
    """The first true answer. While the ledger or an agent is away there is none."""
    begun = time.monotonic()
    while not (answer := _unless_away(true)):
        assert time.monotonic() - begun < timeout_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return answer


def _unless_away(call: Callable[[], T]) -> T | None:
    try:
        return call()
    except StoreUnavailable:
        return None
    except DroverError as error:
        if error.reason in (RefusalReason.LEDGER_UNREACHABLE, RefusalReason.AGENT_UNREACHABLE):
            return None
        raise


def device(name: str = "dpu", scenario: str = "", initial_bytes: int = 65_536) -> DeviceSpec:
    """A companion device. `scenario` as in docs/scenario.md."""
    return DeviceSpec(name, ShimKind.COMPANION, initial_bytes=initial_bytes, options=options_of(scenario))


class Observer:
    """Reads the cluster's ledger from inside its management network, on a loop of its own."""

    def __init__(self, cluster: Cluster) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = cluster.inside(self._start)
        self.store = ZooKeeperStore(cluster.zookeeper)
        self.ledger = Ledger(self.store)
        self.run(self.store.start())

    def _start(self) -> threading.Thread:
        """A thread lives in the network of the thread that starts it."""
        thread = threading.Thread(target=self._loop.run_forever, name="observer", daemon=True)
        thread.start()
        return thread

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = CALL_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def read(self, kind: type[T], path: str) -> T | None:
        found = self.run(self.ledger.read(kind, path))
        return found[0] if found else None

    def close(self) -> None:
        self.run(self.store.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()


@dataclass(frozen=True, slots=True)
class Process:
    """A VMM or a device process of a guest, as its agent noted it down."""

    host: str
    uuid: str
    inc: str
    identity: Identity
    role: str = ""
    """Of a VMM: `owner` or `incoming`."""
    attempt: int = 0
    endpoint: str = ""
    """Where an incoming VMM listens."""

    @property
    def pid(self) -> int:
        return self.identity.pid


@dataclass
class Born:
    """A guest that the scene made."""

    name: str
    uuid: str
    spec: GuestSpec
    may_crash: bool = False
    """The test kills the process that the ledger names as the guest: its end is CRASHED, and nothing runs."""
    may_end: bool = False
    """The guest was told to power itself off, which it may not have heard."""


def noted(layout: Layout, uuid: str = "", *, devices: bool = False) -> list[Process]:
    """Living processes that agents noted down, of one guest or of all."""
    found: list[Process] = []
    for path in layout.hosts.glob(f"*/guests/{uuid[:16] or '*'}/*.json"):
        if path.name.endswith(".devices.json") is not devices or path.name == "guest.json":
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            raw = json.loads(path.read_bytes())
            identity = Identity(int(raw["pid"]), int(raw["start_time"]))
            if processes.is_alive(identity):
                host = path.relative_to(layout.hosts).parts[0]
                more = {name: raw[name] for name in ("role", "attempt", "endpoint") if name in raw}
                found.append(Process(host, raw["guest"], raw["inc"], identity, **more))
    return found


def consoles(layout: Layout, guest: str) -> list[evidence.ConsoleLog]:
    """What every VMM of the guest has said so far."""
    found: list[evidence.ConsoleLog] = []
    for path in sorted(layout.serial.glob(f"*.{guest}.*.log")):
        vmm = evidence.Vmm.of_file(path.name)
        if vmm is not None and vmm.guest == guest:
            found.append(evidence.parse_log(vmm, path.read_text(errors="replace").splitlines()))
    return found


class Scene:
    """One test's view of the cluster. Everything that it stopped goes on when the test ends."""

    def __init__(
        self,
        cluster: Cluster,
        client: OrchestratorClient,
        observer: Observer,
        prefix: str,
        hosts: Sequence[str] = ("host-1", "host-2", "host-3"),
    ) -> None:
        self.cluster = cluster
        self.layout = cluster.layout
        self.client = client
        self.observer = observer
        self.guests: list[Born] = []
        self.here, self.there, self.third = hosts
        """Where its guests begin, where they are to go, and one more."""
        self._prefix = prefix
        self._made = 0
        self._frozen: dict[Identity, float] = {}
        self._epoch: int | None = None
        self._killed: list[tuple[str, Identity, float]] = []
        self.away_ms = 0.0
        """So long the processes that the test killed or stopped were away, which nothing can shorten."""

    reach = staticmethod(reach)

    # --- guests -------------------------------------------------------------------------------------------------------

    def guest(
        self,
        *devices: DeviceSpec,
        host: str = "",
        memory_mib: int = 64,
        workload: Workload = QUIET,
        machine: str = "pc",
        disks: Sequence[DiskSpec] = (),
        nics: Sequence[NicSpec] = (),
        boot: Boot | None = None,
    ) -> Born:
        """A guest with a name of its own, running `here` or on `host`, its heartbeat seen. `boot`: in place of what
        `workload` makes."""
        spec = GuestSpec(
            f"{self._prefix}-{self._made}",
            memory_mib=memory_mib,
            machine=machine,
            boot=boot or boot_of(workload, devices),
            devices=tuple(devices),
            disks=tuple(disks),
            nics=tuple(nics),
        )
        request_id = f"birth-{secrets.token_hex(8)}"
        # The API may have to find an agent again that was away a moment ago.
        made = reach(
            lambda: self.client.create_guest(spec, host or self.here, request_id=request_id),
            f"the birth of {spec.name}",
        )
        self._made += 1
        born = Born(spec.name, made.uuid, spec)
        self.guests.append(born)
        reach(lambda: self.beats(born) > 1, f"{born.name} beats", REACH_S if boot is None else BOOT_S)
        return born

    def beats(self, guest: Born, host: str = "") -> int:
        """The number of the last heartbeat that anybody saw of it, or that came from `host`; 0: none."""
        logs = [log for log in consoles(self.layout, guest.name) if log.beats and host in ("", log.vmm.host)]
        return max((log.beats[-1].number for log in logs), default=0)

    def longest_stop_ms(self, guest: Born) -> float:
        """As far as its heartbeats tell by now, hand-overs and wished pauses included."""
        said = evidence.examine(consoles(self.layout, guest.name))
        within = said.largest_pause.pause_ms if said.largest_pause else 0.0
        return max([within, *(over.downtime_ms or 0.0 for over in said.hand_overs)])

    def record(self, guest: Born) -> GuestRecord:
        record = self.observer.read(GuestRecord, paths.guest(guest.uuid))
        assert record is not None
        return record

    def want_run(self, guest: Born) -> bool:
        wish = self.observer.read(WantRun, paths.want_run(guest.uuid))
        return wish is None or wish.run

    def vmms(self, guest: Born, host: str = "") -> list[Process]:
        """Its VMM processes that live, on one host or on all."""
        return [each for each in noted(self.layout, guest.uuid) if host in ("", each.host)]

    def incoming(self, guest: Born) -> Process:
        """The one copy that waits for the guest or has not been told that it is the guest."""
        found = reach(lambda: [v for v in self.vmms(guest) if v.role == "incoming"], f"a destination of {guest.name}")
        assert len(found) == 1, found
        return found[0]

    def device_states(self, guest: Born, host: str) -> dict[str, str]:
        """State of each companion device of the guest on this host, asked from the device process itself."""
        for process in noted(self.layout, guest.uuid, devices=True):
            if process.host == host:
                folder = self.layout.host(host) / "guests" / guest.uuid[:16]
                with contextlib.suppress(OSError, struct.error):
                    return _hello(folder / f"{process.inc}.ctl")
        return {}

    def reach_device(self, guest: Born, host: str, state: str, name: str = "") -> None:
        """Wait until a device (`name` empty: every device) of the guest on this host is in a state."""

        def there() -> bool:
            states = self.device_states(guest, host)
            wanted = states.values() if not name else [states.get(name)]
            return bool(states) and set(wanted) == {state}

        reach(there, f"devices of {guest.name} on {host} in {state}")

    # --- migrations ---------------------------------------------------------------------------------------------------

    def migrate(self, guest: Born, destination: str = "", **policy: object) -> str:
        """Ask for a migration; its name."""
        return self.client.create_migration(guest.name, destination, policy).name

    def phase(self, migration: str) -> str:
        return wire.word(self.client.get_migration(migration), "phase")

    def reach_phase(self, migration: str, *phases: str, attempt: int = 0) -> types_pb2.Migration:
        """Wait until the migration is in one of the phases, and in `attempt` if that is not 0. Fails if it ended."""

        def there() -> types_pb2.Migration | None:
            now = self.client.get_migration(migration)
            phase = wire.word(now, "phase")
            if phase in phases and attempt in (0, now.attempt):
                return now
            assert phase not in _TERMINAL, f"{phase} instead of {phases}: {now.failure} {now.message}"
            return None

        return reach(there, f"migration {migration} in {' or '.join(phases)}")

    def ended(self, migration: str, timeout_s: float = 40.0) -> types_pb2.Migration:
        """The migration when it is over, with its reports printed."""

        def over() -> types_pb2.Migration | None:
            now = self.client.get_migration(migration)
            return now if wire.word(now, "phase") in _TERMINAL else None

        now = reach(over, f"end of migration {migration}", timeout_s)
        for report in now.attempts:
            print(
                f"attempt {report.attempt}: {report.outcome} {report.reason} {','.join(report.devices)} "
                f"{report.source} -> {report.destination}, blackout {report.blackout_ms:.0f} ms, {report.message}"
            )
            for entry in report.timeline:
                print(f"    {entry.at_ms:8.1f} {entry.where} {entry.event} {entry.detail}")
        print(f"{wire.word(now, 'phase')} {now.failure} {now.message}")
        return now

    def succeeded(self, migration: str, timeout_s: float = 40.0) -> types_pb2.Migration:
        now = self.ended(migration, timeout_s)
        assert wire.word(now, "phase") == "SUCCEEDED", now
        return now

    @staticmethod
    def hold_on(seconds: float) -> None:
        """Let others act on something that cannot be seen from here; nothing may rest on how far they came."""
        time.sleep(seconds)

    # --- processes ----------------------------------------------------------------------------------------------------

    def part(self, name: str) -> Identity:
        """The process of a part as the supervisor recorded it."""

        def recorded() -> Identity | None:
            record = state.read(self.layout.cluster_json)
            parts = record.parts if record else ()
            return next((part.process for part in parts if part.name == name), None)

        return reach(recorded, f"a process of {name}")

    def agent(self, host: str) -> Identity:
        return self.part(f"agent-{host}")

    def kill(self, process: Identity | Process) -> None:
        identity = process.identity if isinstance(process, Process) else process
        assert processes.send(identity, signal.SIGKILL), f"{process} was gone already"

    def kill_if_alive(self, process: Process) -> None:
        processes.send(process.identity, signal.SIGKILL)

    def freeze(self, process: Identity | Process) -> None:
        """SIGSTOP, until `thaw`."""
        identity = process.identity if isinstance(process, Process) else process
        assert processes.send(identity, signal.SIGSTOP), f"{process} is gone"
        self._frozen[identity] = time.monotonic()

    def thaw(self, process: Identity | Process) -> None:
        identity = process.identity if isinstance(process, Process) else process
        processes.send(identity, signal.SIGCONT)
        self.away_ms += (time.monotonic() - self._frozen.pop(identity)) * 1000

    @contextlib.contextmanager
    def frozen(self, process: Identity | Process) -> Iterator[None]:
        self.freeze(process)
        try:
            yield
        finally:
            self.thaw(process)

    def kill_agent(self, host: str) -> None:
        """SIGKILL; the supervisor starts a successor (`agents_are_back`)."""
        agent = self.agent(host)
        self.kill(agent)
        self._killed.append((host, agent, time.monotonic()))

    def agents_are_back(self) -> None:
        """Wait until a successor of each killed agent serves."""
        for host, agent, at in self._killed:
            self.cluster.came_back(f"agent-{host}", agent.pid, REACH_S * 2)
            away_ms = (time.monotonic() - at) * 1000
            self.away_ms += away_ms
            print(f"the agent of {host} serves again, away for at most {away_ms:.0f} ms")
        self._killed.clear()

    def kill_ray(self) -> None:
        """Head, GCS, raylet, all actors, and the driver that waits for them, by the pids that the cluster recorded."""
        self._epoch = self.epoch()
        doomed = teardown.find_ray(self.layout) | {self.part("ray"), self.part("coordinator")}
        for process in doomed:
            processes.send(process, signal.SIGKILL)
        print(f"killed {len(doomed)} processes of Ray")

    def epoch(self) -> int:
        """Of the coordinator that leads, or led last."""
        node = self.observer.run(self.observer.store.read(paths.epoch()))
        return node.version if node else -1

    def coordinator_is_back(self) -> None:
        """After `kill_ray`: another one leads."""
        if self._epoch is not None:
            begun, killed = time.monotonic(), self._epoch
            reach(lambda: self.epoch() > killed, "another coordinator", RAY_S)
            print(f"a coordinator leads again, {time.monotonic() - begun:.1f} s later")
            self._epoch = None

    def thaw_all(self) -> None:
        for identity in list(self._frozen):
            self.thaw(identity)

    def restart_zookeeper(self) -> None:
        """SIGKILL; returns when the supervisor has it serving again, and everybody found it."""
        old = self.part("zookeeper")
        begun = time.monotonic()
        self.kill(old)
        self.cluster.came_back("zookeeper", old.pid, REACH_S)
        self.ledger_is_back()
        took_ms = (time.monotonic() - begun) * 1000
        print(f"ZooKeeper serves API and tests again after {took_ms:.0f} ms")
        self.away_ms += took_ms

    def ledger_is_back(self) -> None:
        """The API reads from it, every agent has a session, and so have we."""
        reach(lambda: all(wire.word(h, "state") == "LIVE" for h in self.client.list_hosts()), "live hosts")
        reach(lambda: self.epoch() >= 0, "an epoch")

    def is_live(self, host: str) -> bool:
        """The agent's session in the ledger."""
        return self.observer.run(self.observer.store.read(paths.live(host))) is not None

    @staticmethod
    def answer(call: Callable[[], object]) -> str:
        """The reason of a refusal; empty when there was none."""
        try:
            call()
        except DroverError as error:
            print(error)
            return error.reason
        return ""

    def host_record(self, host: str) -> HostRecord:
        record = self.observer.read(HostRecord, paths.host(host))
        assert record is not None
        return record

    # --- the end ------------------------------------------------------------------------------------------------------

    def uncordon(self) -> None:
        for host in self.client.list_hosts():
            if host.cordoned:
                self.client.uncordon_host(host.name)

    def cancel_all(self) -> None:
        for guest in self.guests:
            for migration in self.client.list_migrations(guest.name, active_only=True):
                with contextlib.suppress(DroverError):
                    self.client.cancel_migration(migration.name)

    def end_guests(self, guests: Sequence[Born]) -> None:
        for guest in guests:
            reach(lambda guest=guest: self._ended(guest), f"the end of {guest.name}")

    def _ended(self, guest: Born) -> bool:
        try:
            self.client.stop_guest(guest.name)
        except DroverError as error:
            if error.reason is not RefusalReason.NOT_FOUND:
                raise
        return True


def _hello(path: Path) -> dict[str, str]:
    """One question to a device process, which takes any number of connections."""
    with channels.channel(f"unix:{path}") as channel:
        told = ShimServiceStub(channel).Describe(shim_pb2.DescribeRequest(), timeout=2.0)
    return {each.tag.device: each.state for each in told.devices if each.tag.device}
