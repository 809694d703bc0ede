"""The cluster process: starts every part, starts again whichever ends, and ends them all when it is told to.

It holds nothing that cluster.json and /proc do not tell, so it may be killed at any moment; `drover down` or the next
`drover up` then cleans up without it. Agents' guests are nobody's children here: they outlive agent and supervisor.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from typing import Any, cast

from deploy.lab.cluster import logs, network, parts, processes, state, teardown
from deploy.lab.cluster.config import LocalConfig
from deploy.lab.cluster.layout import LocalClusterError, Places, StopReason
from deploy.lab.cluster.parts import PartSpec
from deploy.lab.cluster.processes import Identity
from deploy.lab.cluster.state import ClusterRecord, ClusterState, PartRecord, PartState, StopRecord
from orchestrator.core.liveness import LivenessUnknown

log = logging.getLogger("drover.local")

FIRST_DELAY_S = 0.1
MAX_DELAY_S = 5.0
"""A part that ended is started again after these; doubled from the first to the longest while it keeps ending."""
STEADY_S = 10.0
"""A part that has lived this long is not crash-looping."""
FALSE_STARTS = 4
"""A part that ended so often before the cluster was ever ready will not come up at all."""
PROBE_S, PROBE_MOST_S = 0.03, 0.3
"""Pauses between asking a part that starts whether it serves, each a fifth longer: asking costs CPU that it needs."""
SILENT_PROBES = 3
SILENT_PROBE_S = 0.4
"""A watched part that fails so many probes in a row has died behind its process's back."""
HEALTH_TIMEOUT_S = 3.0
RAY_NOTE_S = 3.0
RAY_SETTLED_S = 15.0
EXIT_RAY_GONE = 3
"""The coordinator's word (its exit status) for: Ray no longer answers."""
PORT_WAIT_S = 1.0
"""A port may be busy for a moment after its owner was killed."""
POWER_ON_TIMEOUT_S = 20.0
LOG_TAIL_LINES = 15
REWRITE_S = 1.0
BOUND_LOGS_ROUNDS = 10


class Part:
    """One part and the process that it is at the moment."""

    def __init__(self, spec: PartSpec) -> None:
        self.spec = spec
        self.state = PartState.WAITING
        self.process: Identity | None = None
        self.since: float | None = None
        self.starts = 0
        self.last_exit = ""
        """How it ended, or why it could not be started."""
        self.port_taken = False
        self.born = 0.0
        self.serving = asyncio.Event()
        self.ended = asyncio.Event()
        self.ended.set()
        self.powered = asyncio.Event()
        self.powered.set()

    def record(self) -> PartRecord:
        """The part as cluster.json tells of it."""
        return PartRecord(
            name=self.spec.name,
            kind=self.spec.kind,
            host=self.spec.host,
            state=self.state,
            process=self.process,
            since=self.since,
            restarts=max(0, self.starts - 1),
            last_exit=self.last_exit,
        )


class LocalSupervisor:
    """Runs one cluster in this process. `run` is called once."""

    def __init__(self, config: LocalConfig) -> None:
        self._config = config
        self._layout = config.layout
        self._me = processes.identify(os.getpid()) or Identity(os.getpid(), 0)
        self._state = ClusterState.STARTING
        self._started_at = time.time()
        self._begun = time.monotonic()
        self._ready_after_s: float | None = None
        self._stop: StopRecord | None = None
        self._places: Places | None = None
        self._parts: dict[str, Part] = {}
        self._ray_processes: dict[str, set[Identity]] = {}
        """Descendants of each head."""
        self._power = asyncio.Lock()
        self._unwritten = ""
        """Why cluster.json is older than what we know; empty: it is not."""

    # --- from start to end -------------------------------------------------------------------------------------------

    async def run(self) -> bool:
        """Until SIGTERM or SIGINT, or until it is clear that the cluster does not come up (False).

        Afterwards no process and no namespace of the cluster is left; its files are, for whoever started it. A fault of
        this process itself is no reason to end guests: once the cluster was ready, all is left as it is then (False).
        """
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        keeping = asyncio.create_task(self._keep_cluster())
        stopped = asyncio.create_task(stopping.wait())
        try:
            await asyncio.wait({keeping, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stop = _failure(keeping)
            for task in (keeping, stopped):
                task.cancel()
            await asyncio.gather(keeping, stopped, return_exceptions=True)
            if self._stop and self._stop.reason is StopReason.SUPERVISOR_FAILED and self._ready_after_s is not None:
                self._abandon()
            else:
                self._end()
        return self._stop is None

    async def _keep_cluster(self) -> None:
        self._write()
        config, layout = self._config, self._layout
        rate = config.bandwidth_bps if config.shape else None
        self._places = places = network.create(layout, config.hosts, rate, config.servers)
        for note in places.notes:
            log.warning(note)
        if places.management_namespace:
            # From here every part can be reached, and children need not be followed into the root namespace.
            network.enter(places.management_namespace)
        parts.write_files(config, layout, places)
        self._parts = {spec.name: Part(spec) for spec in parts.build(config, layout, places)}
        self._write()
        layout.supervisor_socket.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._answer, layout.supervisor_socket)
        async with server, asyncio.TaskGroup() as group:
            for part in self._parts.values():
                group.create_task(self._keep(part))
            group.create_task(self._announce())
            group.create_task(self._note_ray())
            group.create_task(self._tidy())

    async def _announce(self) -> None:
        """Say so once all parts serve; raise LocalClusterError if that takes too long."""
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                for part in self._parts.values():
                    await part.serving.wait()
        except TimeoutError:
            late = [part for part in self._parts.values() if not part.serving.is_set()]
            raise _not_ready(late, self._config.start_timeout_s) from None
        self._ready_after_s = round(time.monotonic() - self._begun, 2)
        self._state = ClusterState.READY
        log.info("ready after %.2f s", self._ready_after_s)
        self._write()

    def _end(self) -> None:
        """Synchronous, so that nothing interrupts it; a second signal changes nothing."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        log.info("stopping%s", f": {self._stop.error()}" if self._stop else "")
        self._note_state(ClusterState.STOPPING)
        teardown.end_processes(self._layout, supervisor=self._me)
        network.remove(self._layout)
        teardown.remove_sockets(self._layout)
        self._note_state(ClusterState.FAILED if self._stop else ClusterState.STOPPED)

    def _abandon(self) -> None:
        """Parts and guests go on without us, as after a crash; `drover down` ends them."""
        log.error("gives up and leaves everything as it is: `drover down` ends it")
        self._write()

    def _note_state(self, to: ClusterState) -> None:
        self._state = to
        self._write()

    # --- one part ----------------------------------------------------------------------------------------------------

    async def _keep(self, part: Part) -> None:
        """Start the part whenever it does not run and may. In a cluster that was ready nothing stops that."""
        delay_s = FIRST_DELAY_S
        while True:
            try:
                await self._live_once(part)
            except LocalClusterError:
                raise
            except Exception as error:
                if self._ready_after_s is None:
                    raise
                part.last_exit = f"{type(error).__name__}: {error}"
                log.exception("cannot look after %s; it is tried again", part.spec.name)
            if not part.powered.is_set():
                self._move(part, PartState.OFF)
                delay_s = FIRST_DELAY_S
                continue
            if time.monotonic() - part.born > STEADY_S:
                delay_s = FIRST_DELAY_S
            elif self._ready_after_s is None and (part.port_taken or part.starts >= FALSE_STARTS):
                raise _does_not_come_up(part)
            self._move(part, PartState.DOWN)
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, MAX_DELAY_S)

    async def _live_once(self, part: Part) -> None:
        """Start it when it may be started, and return when it has ended; at once when its host has no power by then."""
        await part.powered.wait()
        self._move(part, PartState.WAITING)
        for names in part.spec.after:
            await _any_of([self._parts[name].serving for name in names])
        if part.powered.is_set():
            await self._clean_up_after(part, await self._live(part))

    async def _live(self, part: Part) -> int:
        """From its start to its end; its exit status (a signal's number is negative)."""
        part.born = time.monotonic()
        part.starts += 1
        taken = await _taken(part.spec)
        part.port_taken = taken is not None
        if taken:
            part.last_exit = taken
            log.error("%s cannot be started: %s", part.spec.name, taken)
            return 127
        try:
            child = _spawn(part.spec)
        except OSError as error:
            part.last_exit = f"cannot be started: {error}"
            log.error("%s %s", part.spec.name, part.last_exit)
            return 127
        part.ended.clear()
        waiting: asyncio.Task[None] | None = None
        try:
            part.process = processes.identify(child.pid)
            part.since = time.time()
            self._move(part, PartState.STARTING)
            waiting = asyncio.create_task(self._until_serving(part))
            code = await _ended(child)
        except Exception:
            child.kill()  # else it would be in the way of its successor, and nobody would know of it
            await asyncio.to_thread(child.wait)
            part.process = None
            part.ended.set()
            raise
        finally:
            if waiting:
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            part.serving.clear()
        part.process = None
        part.ended.set()
        part.last_exit = f"signal {-code}" if code < 0 else f"exit status {code}"
        log.warning("%s ended: %s", part.spec.name, part.last_exit)
        return code

    async def _until_serving(self, part: Part) -> None:
        """Note when it serves; to be cancelled when its process ends."""
        pause_s = PROBE_S
        while await part.spec.probe():
            await asyncio.sleep(pause_s)
            pause_s = min(1.2 * pause_s, PROBE_MOST_S)
        log.info("%s serves after %.2f s", part.spec.name, time.monotonic() - part.born)
        part.serving.set()
        self._move(part, PartState.RUNNING)
        if part.spec.watched:
            await self._until_silent(part)

    async def _until_silent(self, part: Part) -> None:
        """Kill a part whose process lives on after what it served has died."""
        failures = 0
        while failures < SILENT_PROBES:
            await asyncio.sleep(SILENT_PROBE_S)
            failures = failures + 1 if await part.spec.probe() else 0
        if part.process and processes.send(part.process, signal.SIGKILL):
            log.warning("%s no longer serves: killed", part.spec.name)

    async def _clean_up_after(self, part: Part, code: int) -> None:
        """Ray's parts hang together: a dead head takes its driver along, a driver without Ray asks for a new head."""
        partner = self._parts.get(part.spec.partner)
        if part.spec.kind == "ray":
            if partner and partner.process:
                processes.send(partner.process, signal.SIGKILL)
            noted = self._ray_processes.pop(part.spec.name, set())
            await asyncio.to_thread(teardown.kill_ray, self._layout, part.spec.name, noted)
        elif part.spec.kind == "coordinator" and code == EXIT_RAY_GONE and partner and partner.process:
            # Not right after its start: a driver that cannot get in for another reason must not keep the head from
            # ever coming up.
            settled = time.monotonic() - partner.born > RAY_SETTLED_S
            if settled and processes.send(partner.process, signal.SIGKILL):
                log.warning("the coordinator says that Ray is gone: restarting the head")

    async def _note_ray(self) -> None:
        """Keep a list of each head's descendants, for whoever has to clean up after it."""
        heads = [part for part in self._parts.values() if part.spec.kind == "ray"]
        while heads:
            await asyncio.sleep(RAY_NOTE_S)
            for head in heads:
                with contextlib.suppress(OSError, LivenessUnknown):  # no descriptor left: what is noted stays
                    self._note_descendants(head)

    def _note_descendants(self, head: Part) -> None:
        noted = self._ray_processes.get(head.spec.name, set[Identity]())
        if head.process and (found := processes.descendants([head.process.pid])) != noted:
            self._ray_processes[head.spec.name] = {old for old in noted if processes.is_alive(old)} | found
            self._write()

    async def _tidy(self) -> None:
        """Write cluster.json as soon as that can be done again, and keep the logs from filling the disk."""
        rounds = 0
        while True:
            await asyncio.sleep(REWRITE_S)
            if self._unwritten:
                self._write()
            rounds += 1
            if rounds % BOUND_LOGS_ROUNDS == 0:
                await asyncio.to_thread(self._bound_logs)

    def _bound_logs(self) -> None:
        guests = self._layout.hosts.glob("*/guests/*/*.log")
        for path in (self._layout.supervisor_log, *(part.spec.log for part in self._parts.values()), *guests):
            if logs.bound(path):
                log.info("%s was too long and begins anew", path)

    def _move(self, part: Part, to: PartState) -> None:
        if part.state is not to:
            part.state = to
            self._write()

    def _write(self) -> None:
        """Write cluster.json. On a full disk it keeps what it was, `_tidy` tries again, and everything else goes on."""
        try:
            state.write(self._layout.cluster_json, self._record())
        except OSError as error:
            if not self._unwritten:
                log.error("cannot write %s: %s; it is tried again", self._layout.cluster_json, error)
            self._unwritten = f"{self._layout.cluster_json.name} cannot be written: {error.strerror}"
        else:
            if self._unwritten:
                log.info("%s is written again", self._layout.cluster_json)
            self._unwritten = ""

    def _record(self) -> ClusterRecord:
        return ClusterRecord(
            id=self._layout.id,
            state=self._state,
            supervisor=self._me,
            started_at=self._started_at,
            parts=tuple(part.record() for part in self._parts.values()),
            places=self._places,
            config=self._config.model_dump(mode="json"),
            ready_after_s=self._ready_after_s,
            stop=self._stop,
            ray_processes=tuple(set[Identity]().union(*self._ray_processes.values())),
        )

    # --- what `drover status` and chaos ask --------------------------------------------------------------------------

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question in one line of JSON, one answer in another."""
        try:
            async with asyncio.timeout(POWER_ON_TIMEOUT_S + 20):
                answer = await self._reply(json.loads(await reader.readline()))
        except (ValueError, KeyError, TypeError) as error:
            answer = {"error": f"bad request: {error}"}
        except LocalClusterError as error:
            answer = {"error": str(error)}
        except TimeoutError:
            answer = {"error": "took too long"}
        except Exception as error:
            log.exception("cannot do what was asked")
            answer = {"error": f"the cluster could not do it: {error}"}
        with contextlib.suppress(OSError):
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        writer.close()

    async def _reply(self, question: dict[str, Any]) -> dict[str, Any]:
        match question["op"]:
            case "status":
                names = list(self._parts)
                healths = await asyncio.gather(*(self._health(part) for part in self._parts.values()))
                notes = [self._unwritten] if self._unwritten else []
                health = dict(zip(names, healths, strict=True))
                return {"health": health, "notes": notes, "record": state.text_of(self._record())}
            case "power_off":
                async with self._power:
                    await self._power_off(self._agent(question["host"]))
                return {}
            case "power_on":
                async with self._power:
                    return await self._power_on(self._agent(question["host"]))
            case "power_cycle":
                async with self._power:
                    agent = self._agent(question["host"])
                    await self._power_off(agent)
                    return await self._power_on(agent)
            case other:
                raise LocalClusterError(f"unknown request {other!r}")

    async def _health(self, part: Part) -> str:
        if part.process is None:
            return f"{part.state}" + (f" ({part.last_exit})" if part.last_exit else "")
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                return await part.spec.health() or "ok"
        except TimeoutError:
            return "does not answer"

    def _agent(self, host: str) -> Part:
        for part in self._parts.values():
            if part.spec.host == host:
                return part
        hosts = ", ".join(part.spec.host for part in self._parts.values() if part.spec.host)
        raise LocalClusterError(f"no host {host!r} in this cluster; there are {hosts}")

    async def _power_off(self, agent: Part) -> None:
        """The cable first: a host without power sends nothing more, not even the kernel's farewell to its peers."""
        agent.powered.clear()
        host = agent.spec.host or ""
        self._plug(host, up=False)
        await asyncio.to_thread(teardown.kill_host, self._layout, host)
        await agent.ended.wait()
        self._move(agent, PartState.OFF)
        log.warning("%s has lost its power", host)

    async def _power_on(self, agent: Part) -> dict[str, Any]:
        """A fresh boot: new boot_id, empty volatile directory; what is on the host's disk stays."""
        host = agent.spec.host or ""
        if agent.powered.is_set():
            raise LocalClusterError(f"{host} has power")
        shutil.rmtree(self._layout.volatile(host), ignore_errors=True)
        self._layout.volatile(host).mkdir(parents=True)
        for path in self._layout.console.glob(f"{host}.*.sock"):
            path.unlink(missing_ok=True)
        parts.new_power_cycle(self._layout, host)
        self._plug(host, up=True)
        agent.powered.set()
        serving = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POWER_ON_TIMEOUT_S):
                serving = await agent.serving.wait()
        return {"serving": serving}

    def _plug(self, host: str, *, up: bool) -> None:
        places = self._places.hosts if self._places else ()
        for place in places:
            if place.name == host and place.namespace:
                with contextlib.suppress(OSError):
                    network.set_link(place.namespace, up=up)


# --- processes -------------------------------------------------------------------------------------------------------


def _spawn(spec: PartSpec) -> subprocess.Popen[bytes]:
    """In a session of its own: a signal to the supervisor's group or terminal is not for it."""
    if spec.prepare:
        spec.prepare()
    with spec.log.open("ab") as output:
        return subprocess.Popen(
            spec.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=spec.directory,
            env=spec.environment,
            start_new_session=True,
        )


async def _ended(child: subprocess.Popen[bytes]) -> int:
    """Its exit status. A pidfd becomes readable at the moment of death: nothing polls, no thread waits."""
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    descriptor = os.pidfd_open(child.pid)
    loop.add_reader(descriptor, over.set)
    try:
        await over.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
    return child.wait()


async def _any_of(events: list[asyncio.Event]) -> None:
    """Until one of them is set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _taken(spec: PartSpec) -> str | None:
    """Who has its ports; None once they are free, at the latest after PORT_WAIT_S."""
    until = time.monotonic() + PORT_WAIT_S
    while (taken := await parts.taken(spec)) and time.monotonic() < until:  # noqa: ASYNC110 - another process
        await asyncio.sleep(PROBE_S)
    return taken


# --- why a cluster does not come up ----------------------------------------------------------------------------------


def _failure(keeping: asyncio.Task[None]) -> StopRecord | None:
    """Why the cluster could not be kept, if it ended by itself."""
    if not keeping.done() or keeping.cancelled() or (error := keeping.exception()) is None:
        return None
    while isinstance(error, BaseExceptionGroup):
        group = cast(BaseExceptionGroup[BaseException], error)
        error = group.exceptions[0]
    if not isinstance(error, LocalClusterError):
        log.error("the supervisor failed", exc_info=error)
        return StopRecord(f"the supervisor failed: {type(error).__name__}: {error}", StopReason.SUPERVISOR_FAILED)
    return StopRecord.of(error)


def _not_ready(late: list[Part], timeout_s: float) -> LocalClusterError:
    names = ", ".join(part.spec.name for part in late)
    return LocalClusterError(
        f"not ready after {timeout_s:.0f} s: {names}",
        reason=StopReason.NOT_READY,
        part=late[0].spec.name if late else "",
        detail=_tail(late[0].spec) if late else "",
    )


def _does_not_come_up(part: Part) -> LocalClusterError:
    name = part.spec.name
    if part.port_taken:
        return LocalClusterError(f"{name}: {part.last_exit}", reason=StopReason.PORT_IN_USE, part=name)
    words = last_words(_log_lines(part.spec))
    return LocalClusterError(
        f"{name} does not come up: it ended {part.starts} times, {part.last_exit}{f': {words}' if words else ''}",
        reason=StopReason.PORT_IN_USE if "address already in use" in words.lower() else StopReason.PART_FAILED,
        part=name,
        detail=_tail(part.spec),
    )


_COMPLAINT = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b:? ?")


def last_words(lines: list[str]) -> str:
    """The line of a log that says best why the process ended: its last exception or error, else its last line.

    Lines of a trace are indented, in Python as in Java.
    """
    whole = [line.strip() for line in lines if line.strip() and not line[0].isspace()]
    complaints = [line for line in whole if _COMPLAINT.match(line)]
    return (complaints or whole or [""])[-1]


def _log_lines(spec: PartSpec) -> list[str]:
    try:
        return spec.log.read_text(errors="replace").splitlines()
    except OSError:
        return []


def _tail(spec: PartSpec) -> str:
    """The end of its log: the file itself goes with the cluster."""
    lines = _log_lines(spec)[-LOG_TAIL_LINES:]
    return "\n".join([f"the end of its log ({spec.log.name}):", *(f"  {line}" for line in lines)])
