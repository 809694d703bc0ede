"""The control plane of a bench: real ZooKeeper, Ray, coordinator and API, light agents; each a process of this machine.

Everything lies in one directory of the memory file system, so that the disk of the machine is no part of a figure, and
goes with it. Processes are known by pid and start time; Ray's by the mark that the lab gives them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from deploy.lab.cluster import ray_head, teardown
from deploy.lab.cluster.layout import CLUSTER_VARIABLE, PART_VARIABLE, RAY, RAY_ADDRESS, Layout, Server, numbered
from orchestrator.core.records import Leader
from orchestrator.ledger import paths
from orchestrator.ledger.records import decode
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.rpc import channels
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.bench.fleet import fill, txnlog
from tests.bench.fleet.agents import Share
from tests.bench.guard import guarded
from tests.fakes.zookeeper import ZooKeeperServer

MEMORY = Path("/dev/shm")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PER_PROCESS = 250
"""Light agents: beyond that one process's event loop is what is measured."""
START_S = 90.0
_LOOK_S = 0.05
_NEW_NETWORK = 0x40000000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the coordinator; see `orchestrator.coordinator.supervisor.Limits`."""

    starts_per_s: float = 125.0
    burst: int = 10
    max_concurrent: int = 1_000
    max_per_source: int = 8


@dataclass(frozen=True, slots=True)
class Counted:
    """ZooKeeper's own counters, and the pings of the agents, at one moment."""

    at_s: float
    requests: int
    """Reads and writes that were answered, pings among them."""
    writes: int
    """Transactions that went through the quorum, by their numbers (zxid): sessions, barriers, refused ones as well."""
    pings: int

    def since(self, before: Counted) -> Rates:
        requests, writes = self.requests - before.requests, self.writes - before.writes
        reads = max(0, requests - writes - (self.pings - before.pings))
        return Rates(self.at_s - before.at_s, reads, writes)


@dataclass(frozen=True, slots=True)
class Rates:
    """What ZooKeeper was asked in some time."""

    seconds: float
    reads: int
    writes: int

    @property
    def per_s(self) -> float:
        return (self.reads + self.writes) / self.seconds


def isolate() -> None:
    """Put this thread, and whatever it starts, into a network of its own that has nothing but loopback.

    Two Ray heads of one network have ports in common, also where all that can be chosen is chosen. Without the right to
    it everything stays where it is, and benches must not run side by side.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_NEW_NETWORK) == 0:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def isolated(work: Callable[[], T]) -> T:
    """Call it in a thread that is isolated; this one stays where it is."""

    def run() -> T:
        isolate()
        return work()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result()


def _seat(number: int) -> Server:
    ray_port, client_port = free_port(RAY_ADDRESS), free_port(RAY_ADDRESS)
    return Server(numbered("coordinator", number), number, "127.0.0.1", None, ray_port, client_port)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


class Agents:
    """One process of light agents."""

    def __init__(self, plane: Plane, name: str, share: Share) -> None:
        file = plane.layout.dir / f"{name}.json"
        file.write_text(json.dumps(asdict(share)))
        command = [sys.executable, "-m", "tests.bench.fleet.agents", str(file)]
        self.process = plane.spawn(name, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.hosts = [fill.host_name(number) for number in range(share.first, share.first + share.count)]
        self._turn = asyncio.Lock()

    async def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        async with asyncio.timeout(timeout_s):
            line = await asyncio.to_thread(self.process.stdout.readline)
        if not line:
            raise RuntimeError("a process of light agents has ended: see its log")
        return json.loads(line)

    async def ready(self, timeout_s: float) -> None:
        await self._line(timeout_s)

    async def tell(self, command: str, timeout_s: float = 30.0) -> dict[str, Any]:
        assert self.process.stdin is not None
        async with self._turn:
            self.process.stdin.write(f"{command}\n".encode())
            self.process.stdin.flush()
            answer = await self._line(timeout_s)
        if "error" in answer:
            raise RuntimeError(f"light agents: {command}: {answer['error']}")
        return answer


@dataclass
class Plane:
    """Start its parts in the order of the methods; `close` ends everything, in any state."""

    limits: Limits = field(default_factory=Limits)
    heap_mib: int = 256
    layout: Layout = field(init=False)
    agents: list[Agents] = field(default_factory=list[Agents])
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict[str, "subprocess.Popen[bytes]"])

    def __post_init__(self) -> None:
        self.layout = Layout.of(tempfile.mkdtemp(prefix="fb", dir=MEMORY if MEMORY.is_dir() else None))
        self.layout.check()
        self.layout.logs.mkdir()
        self.zookeeper = ZooKeeperServer(self.layout.dir / "zk", heap_mib=self.heap_mib)
        self.seats: list[Server] = []
        self.down: set[str] = set()
        """Heads of Ray that nobody starts again for the time being."""
        self.store = ZooKeeperStore(self.zookeeper.hosts)
        self.api_port = free_port("127.0.0.1")
        self._cpu_s: dict[tuple[str, int], float] = {}
        self._keeping: asyncio.Task[None] | None = None
        self._guard = contextlib.ExitStack()
        self._guard.enter_context(guarded(self.layout.dir))
        self._channel: grpc.aio.Channel | None = None

    # --- parts --------------------------------------------------------------------------------------------------------

    def spawn(
        self, name: str, command: list[str], environment: dict[str, str] | None = None, **more: Any
    ) -> subprocess.Popen[bytes]:
        """A part; its words go to `logs/<name>.log`."""
        part = name if name.startswith(f"{RAY}-") else name.partition("-")[0]
        marks = {CLUSTER_VARIABLE: str(self.layout.dir), PART_VARIABLE: part}
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": None, "cwd": None, **more}
        with (self.layout.logs / f"{name}.log").open("ab") as sink:
            process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=options["stdin"],
                stdout=options["stdout"] or sink,
                stderr=sink,
                cwd=options["cwd"],
                env={**os.environ, **marks, **(environment or {})},
                start_new_session=True,
            )
        self.running[name] = process
        return process

    async def start_ledger(self) -> None:
        os.environ[CLUSTER_VARIABLE] = str(self.layout.dir)
        try:
            await asyncio.to_thread(self.zookeeper.start)
        finally:
            del os.environ[CLUSTER_VARIABLE]
        await self.store.start()

    async def start_control(self, seats: int = 1) -> None:
        """API, and for each seat Ray and a coordinator; started again when they end, as the lab's supervisor does."""
        ray_head.token(self.layout)
        self.seats = [_seat(number) for number in (range(1, seats + 1) if seats > 1 else [0])]
        for seat in self.seats:
            self.layout.ray_work(seat.ray_head).mkdir(exist_ok=True)
            config = {
                "name": seat.name,
                "zookeeper": self.zookeeper.hosts,
                "ray_address": f"{RAY_ADDRESS}:{seat.ray_port}",
                "ray_token_file": str(self.layout.ray_token),
                "limits": asdict(self.limits),
            }
            self.layout.part_json(seat.name).write_text(json.dumps(config))
        listen = [f"unix:{self.layout.api_socket}", f"127.0.0.1:{self.api_port}"]
        api = {"listen": listen, "zookeeper": self.zookeeper.hosts}
        self.layout.api_json.write_text(json.dumps(api))
        self._keeping = asyncio.create_task(self._keep())
        await self.until(self.leads, START_S, "a coordinator that leads")
        await self.until(self._api_answers, START_S, "an API that answers")
        await self.all_seated()

    async def _keep(self) -> None:
        while True:
            self._start_missing()
            await asyncio.sleep(_LOOK_S)

    def _start_missing(self) -> None:
        if self._ended("api"):
            self.spawn("api", [sys.executable, "-m", "orchestrator.api", "--config", str(self.layout.api_json)])
        for seat in self.seats:
            head, work = seat.ray_head, self.layout.ray_work(seat.ray_head)
            if self._ended(head) and head not in self.down:
                teardown.kill_ray(self.layout, head)
                ray_head.prepare(self.layout, seat)
                command = ray_head.command(self.layout, seat, 2)
                # Actors give themselves titles: that they are of this bench is known by where the head was started.
                self.spawn(head, command, ray_head.environment(self.layout), cwd=work)
            if self._ended(seat.name) and self._ray_listens(seat):
                config = str(self.layout.part_json(seat.name))
                command = [sys.executable, "-m", "orchestrator.coordinator", "--config", config]
                self.spawn(seat.name, command, ray_head.client_environment(self.layout))

    def _ended(self, name: str) -> bool:
        return name not in self.running or self.running[name].poll() is not None

    @staticmethod
    def _ray_listens(seat: Server) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((RAY_ADDRESS, seat.ray_port), 0.2):
            return True
        return False

    async def all_seated(self) -> None:
        """Wait for a coordinator in each seat. Raises TimeoutError."""

        async def seated() -> bool:
            return set(await self.store.children(paths.SEATS)) >= {seat.name for seat in self.seats}

        await self.until(seated, START_S, "a coordinator in each seat")

    async def leading(self) -> Server:
        """The seat that leads. Raises RuntimeError when none does."""
        node = await self.store.read(paths.leader())
        name = decode(Leader, node.data, path=paths.leader()).name if node is not None else ""
        for seat in self.seats:
            if seat.name == name:
                return seat
        raise RuntimeError("no coordinator leads")

    async def leads(self) -> bool:
        return await self.store.read(paths.leader()) is not None

    async def _api_answers(self) -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.api.GetClusterHealth(pb.GetClusterHealthRequest(), timeout=2.0)
            return True
        return False

    @property
    def api(self) -> Any:
        """A stub of the API, asynchronous."""
        if self._channel is None:
            self._channel = channels.aio_channel(f"unix:{self.layout.api_socket}")
        return OrchestratorServiceStub(self._channel)

    async def start_agents(self, hosts: int, guests: int, **more: Any) -> None:
        """All of the fleet's light agents; their guests are in the ledger already."""
        directory = self.layout.dir / "h"
        each = min(PER_PROCESS, math.ceil(hosts / 2))
        for number, first in enumerate(range(0, hosts, each)):
            count = min(each, hosts - first)
            share = Share(self.zookeeper.hosts, str(directory), first, count, hosts, guests, **more)
            self.agents.append(Agents(self, f"agents-{number}", share))
        async with asyncio.timeout(START_S + hosts):
            await asyncio.gather(*(agents.ready(START_S + hosts) for agents in self.agents))

    async def tell_agents(self, command: str) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(agents.tell(command) for agents in self.agents)))

    async def go(self, per_s: float = 20.0) -> None:
        """Let the pre-copies end that are held, so many per second in all. More than two cores bring to their end would
        time out, and what was measured then were the repetitions."""
        await self.tell_agents(f"go {per_s / len(self.agents)}")

    async def kill_ray(self, seat: Server | None = None) -> None:
        """SIGKILL for all of it: head, coordinator, workers. None: of all seats."""
        await asyncio.to_thread(teardown.kill_ray, self.layout, seat.ray_head if seat else RAY)

    async def epoch(self) -> int:
        """Of whoever leads, or did; -1 before the first."""
        node = await self.store.read(paths.epoch())
        return node.version if node is not None else -1

    @contextlib.asynccontextmanager
    async def asking(self, seat: Server) -> AsyncGenerator[Asking]:
        """Whoever asks the workers of a seat, ready to connect."""
        command = [sys.executable, "-m", "tests.bench.fleet.asking", str(self.layout.part_json(seat.name))]
        process = self.spawn(
            "asking", command, ray_head.client_environment(self.layout), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            await asyncio.sleep(3.0)  # it imports Ray meanwhile
            yield Asking(process)
        finally:
            process.kill()
            process.wait()
            del self.running["asking"]

    @contextlib.asynccontextmanager
    async def callers(self, count: int) -> AsyncGenerator[list[Any]]:
        """Stubs of the API, each as a caller with an address of its own: the API bounds what one of them may open."""
        async with contextlib.AsyncExitStack() as ends:
            stubs: list[Any] = []
            for number in range(count):
                relay = await ends.enter_async_context(_relay(f"127.15.0.{1 + number}", self.api_port))
                channel = channels.aio_channel(f"127.0.0.1:{relay}", alone=True)
                ends.push_async_callback(channel.close)
                stubs.append(OrchestratorServiceStub(channel))
            yield stubs

    # --- measuring ----------------------------------------------------------------------------------------------------

    async def counted(self) -> Counted:
        pings = sum(told["pings"] for told in await self.tell_agents("told"))
        answer = await asyncio.to_thread(self.zookeeper.metrics)
        requests = int(float(answer["zk_cnt_readlatency"])) + int(float(answer["zk_cnt_updatelatency"]))
        return Counted(time.monotonic(), requests, await asyncio.to_thread(self.zookeeper.zxid), pings)

    def writes_since(self, before: Counted) -> Counter[str]:
        """What the quorum's writes since then were for."""
        return txnlog.kinds_since(self.zookeeper.directory / "data", before.writes)

    def cpu_s(self) -> dict[str, float]:
        """Of each part until now. The coordinator is its actors and the process outside; `ray` is Ray itself."""
        for role, pid in self.roles():
            self._cpu_s[role, pid] = max(cpu_of(pid), self._cpu_s.get((role, pid), 0.0))
        found: dict[str, float] = {}
        for (role, _), spent_s in self._cpu_s.items():  # also of processes that have ended since
            found[role] = found.get(role, 0.0) + spent_s
        return found

    def rss_mib(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for role, pid in self.roles():
            found[role] = found.get(role, 0.0) + rss_of(pid)
        return found

    def roles(self) -> Iterator[tuple[str, int]]:
        """Every process of the plane: what it belongs to, and its pid."""
        for name, process in self.running.items():
            if not name.startswith(RAY) and process.poll() is None:
                yield name.partition("-")[0], process.pid
        if self.zookeeper.process is not None:
            yield "zookeeper", self.zookeeper.process.pid
        for identity in teardown.find_ray(self.layout):
            yield ("coordinator" if is_actor(identity.pid) else "ray"), identity.pid

    async def until(self, done: Callable[[], Any], timeout_s: float, what: str) -> None:
        """Raises TimeoutError. What cannot be told just now is asked again."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(ConnectionError):
                if await done():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {timeout_s:g} s: see {self.layout.logs}")
            await asyncio.sleep(_LOOK_S)

    # --- the end ------------------------------------------------------------------------------------------------------

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
        for process in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.zookeeper.kill()
        if self._channel is not None:
            await self._channel.close()
        await self.store.close()
        if keep := os.environ.get("DROVER_KEEP_LOGS"):
            shutil.copytree(self.layout.logs, Path(keep) / self.layout.dir.name, dirs_exist_ok=True)
        await asyncio.to_thread(self._guard.close)  # ends what is left, as if this process had been killed


@contextlib.asynccontextmanager
async def _relay(source: str, port: int) -> AsyncGenerator[int]:
    """A port whose connections go on to `port` of this machine, and come from `source` there."""
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        for one in (pump(reader, back), pump(there, writer)):
            task = asyncio.create_task(one)
            pumps.add(task)
            task.add_done_callback(pumps.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for task in list(pumps):
            task.cancel()


class Asking:
    """See `asking.py`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def go(self) -> None:
        """Connect now: the Ray that runs from here on is the one to ask."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    async def until_driving(self, count: int, timeout_s: float) -> float:
        """When the workers drove so many, on the monotonic clock. Raises TimeoutError."""
        told: dict[str, Any] = {}
        try:
            async with asyncio.timeout(timeout_s):
                while told.get("driving", 0) < count:
                    told = await self._line()
                return float(told["at_s"])
        except TimeoutError as error:
            raise TimeoutError(f"{count} migrations are not driven within {timeout_s:g} s: {told}") from error

    async def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = await asyncio.to_thread(self._process.stdout.readline)
        if not line:
            raise RuntimeError("nobody asks the workers any more: see its log")
        return json.loads(line)


def is_actor(pid: int) -> bool:
    with contextlib.suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
        return b"ray::" in title
    return False


def cpu_of(pid: int) -> float:
    """Seconds of user and system time of the process; 0 when it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * TICK_S
    return 0.0


def rss_of(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return 0.0


@contextlib.asynccontextmanager
async def running(limits: Limits | None = None, heap_mib: int = 256) -> AsyncGenerator[Plane]:
    """A plane with its ledger and nothing else yet; ended in any case."""
    plane = Plane(limits or Limits(), heap_mib)
    try:
        await plane.start_ledger()
        yield plane
    finally:
        await plane.close()
