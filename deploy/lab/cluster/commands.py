"""What the operator does to a local cluster: up, down, status, and the power of its hosts.

Called by the command line, the demo and tests. Whatever needs pydantic or more is imported by the one function that
needs it, so that `status` and `down` start at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from deploy.lab.cluster import lock as locking
from deploy.lab.cluster import network, processes, state, teardown
from deploy.lab.cluster.layout import CLUSTER_VARIABLE, PRIVATE_UMASK, Layout, LocalClusterError, StopReason
from deploy.lab.cluster.processes import Identity
from deploy.lab.cluster.state import ClusterRecord, ClusterState, PartState

if TYPE_CHECKING:
    from deploy.lab.cluster.config import LocalConfig

STOP_TIMEOUT_S = 20.0
"""How long the supervisor may take to end everything itself; then it is killed and `down` does it."""
BUILD_TIMEOUT_S = 60.0
READY_GRACE_S = 60.0
"""Beyond the time that the supervisor gives itself for the start."""
_POLL_S = 0.05
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATUS_TIMEOUT_S = 6.0
_POWER_TIMEOUT_S = 45.0
"""Both longer than the supervisor gives itself for the answer."""


@dataclass(frozen=True, slots=True)
class PartStatus:
    """One line of `drover status`."""

    name: str
    kind: str
    host: str | None
    pid: int | None
    up_since: float | None
    """Wall clock, seconds since 1970."""
    restarts: int
    state: str
    health: str
    """`ok`, or what is wrong."""


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """`drover status` as a whole."""

    dir: Path
    running: bool
    state: str
    """not running, crashed, or a ClusterState."""
    parts: tuple[PartStatus, ...] = ()
    notes: tuple[str, ...] = ()
    ready_after_s: float | None = None
    failure: str = ""
    """In state failed, and in state crashed when its supervisor gave up: why."""

    @property
    def healthy(self) -> bool:
        """The cluster is up and each of its parts answers as it should."""
        return self.state == ClusterState.READY and all(part.health == "ok" for part in self.parts)


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came while the cluster was starting; nothing is left of it."""


# --- up --------------------------------------------------------------------------------------------------------------


def up(config: LocalConfig, *, foreground: bool = False, out: TextIO = sys.stderr) -> ClusterStatus:
    """Start a cluster and return when every part serves; with `foreground` return when it was stopped.

    If one runs there already, say so and return its status. Raises LocalClusterError (nothing is left running) or
    Interrupted (nothing is left at all).
    """
    layout = config.layout
    layout.check()
    with _Signals() as signals:
        # Not at the first refusal: a `status` that looks at the lock holds it for a moment.
        lock = locking.acquire(layout, create=True, wait_s=0.2)
        if lock is None:
            return _already(layout, out)
        try:
            _require(config)
            _refuse_over_guests(layout)
        except LocalClusterError:
            _leave_as_found(layout, lock)
            raise
        child: subprocess.Popen[bytes] | None = None
        try:
            _clear_remains(layout, out)
            _check_interrupt(signals)
            _build_images(config, layout, out)
            _check_interrupt(signals)
            state.write_atomically(layout.config_json, config.model_dump_json(indent=1) + "\n")
            child = _start_supervisor(layout, lock, foreground=foreground)
            late_at = time.monotonic() + config.start_timeout_s + READY_GRACE_S
            lock.sign(child.pid)
            lock.release()  # the supervisor has it now
            progress = _Progress(out)
            record = _await_ready(layout, child, signals, progress, late_at)
            now = status(layout.dir)
            _check_interrupt(signals)
            # Whoever reads this may rely on it: from here on the cluster stays, unless it runs in the foreground.
            progress.done(f"cluster {record.id} ready after {record.ready_after_s} s in {layout.dir}", _notes(record))
        except BaseException:
            lock.release()
            if child:
                _stop_child(child)
            _remove_everything(layout)
            raise
        if foreground:
            _stay(layout, child, signals, out)
            return status(layout.dir)
        return now


def _stop_child(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class _Signals:
    """Ctrl-C, SIGTERM and the end of the terminal as a flag, so that no step of a start is cut in two.

    Only the main thread can be told. `nohup` is respected.
    """

    def __init__(self) -> None:
        self.set = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.set = True


def _check_interrupt(signals: _Signals) -> None:
    if signals.set:
        raise Interrupted


def _already(layout: Layout, out: TextIO) -> ClusterStatus:
    now = status(layout.dir)
    out.write(
        f"a cluster already runs in {layout.dir} ({now.state}); `drover status` shows it, `drover down` ends it\n"
    )
    return now


def _require(config: LocalConfig) -> None:
    from deploy.lab.cluster import zookeeper

    if "zookeeper" not in config.commands:
        zookeeper.require()
    if "agent" not in config.commands and shutil.which(config.qemu) is None:
        raise LocalClusterError(
            f"QEMU ({config.qemu}), which runs the guests, is missing; deploy/install-system.sh installs it",
            reason=StopReason.MISSING_SOFTWARE,
            part="agent",
        )


def _refuse_over_guests(layout: Layout) -> None:
    """Guests that outlived their cluster are not to be killed without a word."""
    if guests := teardown.running_guests(layout):
        run = "runs" if len(guests) == 1 else "run"
        raise LocalClusterError(
            f"the supervisor of the cluster in {layout.dir} is gone, and {len(guests)} of its guests still {run}: "
            "`drover down` ends them and cleans up"
        )


def _leave_as_found(layout: Layout, lock: locking.Lock) -> None:
    """Take back the lock's file and the directory if nothing else is there."""
    if all(path == layout.lock for path in layout.dir.iterdir()):
        teardown.remove_files(layout)
    lock.release()


def _clear_remains(layout: Layout, out: TextIO) -> None:
    """Of a cluster that crashed, or was stopped without `down`."""
    if layout.cluster_json.exists() or network.existing(layout):
        out.write(f"cleaning up what an earlier cluster left in {layout.dir}\n")
    _end_remains(layout)
    for path in layout.dir.iterdir():
        if path != layout.lock:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _build_images(config: LocalConfig, layout: Layout, out: TextIO) -> None:
    from deploy.lab.cluster.parts import guest_image, vfio_preload

    if "agent" in config.commands:
        return
    image, script = guest_image(config, layout)
    if script is not None:
        _build("the guest image", image, script, layout, out)
    _build("what gives QEMU its devices", *vfio_preload(layout), layout, out)


def _build(what: str, made: Path, script: Path, layout: Layout, out: TextIO) -> None:
    if not made.exists():
        out.write(f"building {what}\n")
    try:
        # A session of its own: Ctrl-C is ours to handle.
        built = subprocess.run(
            [str(script), str(made)],
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
            start_new_session=True,
            env=_marked(layout),  # so that the next `down` finds it if we are killed meanwhile
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LocalClusterError(f"cannot build {what}: {error}") from error
    if built.returncode:
        raise LocalClusterError(f"cannot build {what}: {built.stderr.strip()}")


def _marked(layout: Layout) -> dict[str, str]:
    """The environment, with what tells that a process is this cluster's."""
    return {**os.environ, CLUSTER_VARIABLE: str(layout.dir)}


def _start_supervisor(layout: Layout, lock: locking.Lock, *, foreground: bool) -> subprocess.Popen[bytes]:
    layout.logs.mkdir(mode=0o700, exist_ok=True)
    command = [sys.executable, "-m", "deploy.lab.cluster", "--dir", str(layout.dir), "--lock-fd", str(lock.descriptor)]
    if foreground:
        command += ["--die-with", str(os.getpid())]
    root = Path(__file__).resolve().parents[3]
    path = ":".join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    with open(layout.supervisor_log, "ab", opener=state.private) as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=layout.logs,
            env={**_marked(layout), "PYTHONPATH": path},
            pass_fds=(lock.descriptor,),
            start_new_session=True,
            umask=PRIVATE_UMASK,
        )


def _await_ready(
    layout: Layout, child: subprocess.Popen[bytes], signals: _Signals, progress: _Progress, late_at: float
) -> ClusterRecord:
    """The record, once it says ready. The supervisor bounds its own start, but it may be unable to write that down."""
    while True:
        record = state.read(layout.cluster_json)
        progress.show(record)
        if record and record.state is ClusterState.READY:
            return record
        if signals.set:
            progress.done("interrupted: stopping", ())
            raise Interrupted
        if child.poll() is not None:
            progress.done("", ())
            raise _why_ended(layout, child.returncode)
        if time.monotonic() > late_at:
            progress.done("", ())
            raise LocalClusterError(f"the cluster does not say that it is ready: {layout.cluster_json} is not written")
        time.sleep(_POLL_S)


def _why_ended(layout: Layout, code: int) -> LocalClusterError:
    record = state.read(layout.cluster_json)
    if record and record.stop:
        what = "did not come up" if record.ready_after_s is None else "ended"
        return replace(record.stop, sentence=f"the cluster {what}: {record.stop.sentence}").error()
    how = f"signal {-code}" if code < 0 else f"exit status {code}"
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = layout.supervisor_log.read_text(errors="replace").strip().splitlines()[-5:]
    return LocalClusterError(
        f"the cluster process ended: {how}",
        reason=StopReason.SUPERVISOR_FAILED,
        detail="\n".join(f"  {line}" for line in lines),
    )


class _Progress:
    """One line that is written over on a terminal; elsewhere only its last state."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._live = out.isatty()
        self._begun = time.monotonic()

    def show(self, record: ClusterRecord | None) -> None:
        if not self._live:
            return
        parts = record.parts if record else ()
        serving = sum(part.state is PartState.RUNNING for part in parts)
        missing = [part.name for part in parts if part.state is not PartState.RUNNING]
        line = f"starting {time.monotonic() - self._begun:4.1f} s  {serving}/{len(parts)}  {' '.join(missing)}"
        self._out.write(f"\r\x1b[K{line[: shutil.get_terminal_size().columns - 1]}")
        self._out.flush()

    def done(self, line: str, notes: Collection[str]) -> None:
        if self._live:
            self._out.write("\r\x1b[K")
        for text in (*notes, line):
            if text:
                self._out.write(f"{text}\n")
        self._out.flush()


def _notes(record: ClusterRecord) -> tuple[str, ...]:
    return record.places.notes if record.places else ()


def _stay(layout: Layout, child: subprocess.Popen[bytes], signals: _Signals, out: TextIO) -> None:
    """Until Ctrl-C, SIGTERM or the supervisor's end; then nothing is left."""
    out.write("Ctrl-C stops it\n")
    out.flush()
    while not signals.set and child.poll() is None:
        time.sleep(0.2)
    ended_alone = child.poll() is not None and not signals.set
    why = _why_ended(layout, child.returncode) if ended_alone and child.returncode else None
    if why and (guests := teardown.running_guests(layout)):
        said = f"{why.sentence}; {len(guests)} of its guests go on: `drover down` ends them and cleans up"
        raise LocalClusterError(said, reason=why.reason, detail=why.detail)
    _remove_everything(layout)
    if why:
        raise why


# --- down ------------------------------------------------------------------------------------------------------------


def down(directory: Path | str, *, keep: Collection[str] = ()) -> list[str]:
    """End the cluster, its guests included, and remove all that it made, whatever state it is in.

    `keep` names entries of the directory to leave there (`serial`, `logs`); the next `up` removes them. Returns what
    could not be removed (see `leftovers`), which is an empty list unless something is very wrong. Safe to repeat.
    """
    layout = Layout.of(directory)
    _remove_everything(layout, keep)
    return teardown.leftovers(layout, keep)


def leftovers(directory: Path | str, *, keep: Collection[str] = ()) -> list[str]:
    """What of the cluster is on the machine, one line each: processes, namespaces, mounts, files."""
    return teardown.leftovers(Layout.of(directory), keep)


def _remove_everything(layout: Layout, keep: Collection[str] = ()) -> None:
    with _unstoppable():
        _stop_holder(layout)
        lock = locking.acquire(layout, create=False, wait_s=STOP_TIMEOUT_S, clearing=True)
        _end_remains(layout)
        if lock:
            teardown.remove_files(layout, keep)
            lock.release()


def _stop_holder(layout: Layout) -> None:
    """Ask a supervisor, or an `up` that starts one, to end, and insist.

    Another `down`, or an `up` that is clearing up after itself, holds the lock as well. It ends by itself and is only
    waited for: it may be part of a larger program, and is never signalled.
    """
    deadline = time.monotonic() + STOP_TIMEOUT_S
    asked: set[Identity] = set()
    while locking.is_held(layout):
        holder = locking.holder(layout)
        late = time.monotonic() >= deadline
        if holder and holder.pid != os.getpid() and locking.may_be_stopped(layout):
            if late:
                teardown.kill([holder])
            elif holder not in asked:
                processes.send(holder, signal.SIGTERM)
                asked.add(holder)
        if late:
            return
        time.sleep(0.02)


def _end_remains(layout: Layout) -> None:
    teardown.end_processes(layout)
    network.remove(layout)
    teardown.remove_sockets(layout)


@contextlib.contextmanager
def _unstoppable() -> Generator[None]:
    """A second Ctrl-C while things are being removed would leave half of them; it is over in a second or two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --- status and power ------------------------------------------------------------------------------------------------


def status(directory: Path | str) -> ClusterStatus:
    """Each part and its health. Answers also when nothing runs, or when the supervisor has crashed."""
    layout = Layout.of(directory)
    record = state.read(layout.cluster_json)
    if record is None:
        starting = locking.is_held(layout)
        return ClusterStatus(layout.dir, running=starting, state="starting" if starting else "not running")
    running = processes.is_alive(record.supervisor)
    health: dict[str, str] = {}
    notes = _notes(record)
    with contextlib.suppress(LocalClusterError):
        if running:
            # What it knows, not what it wrote: on a full disk the file is older.
            told = _request(layout, _STATUS_TIMEOUT_S, op="status")
            record = state.parse(told["record"]) or record
            health, notes = told["health"], (*_notes(record), *told["notes"])
    ended = record.state in {ClusterState.STOPPED, ClusterState.FAILED}
    cluster_state = str(record.state) if running or ended else "crashed"
    unknown = "unknown" if running else "unwatched: the supervisor is gone"
    return ClusterStatus(
        layout.dir,
        running=running,
        state=cluster_state,
        parts=tuple(
            PartStatus(
                name=part.name,
                kind=part.kind,
                host=part.host,
                pid=part.process.pid if part.process and processes.is_alive(part.process) else None,
                up_since=part.since if part.process else None,
                restarts=part.restarts,
                state=str(part.state),
                health=health.get(part.name, unknown),
            )
            for part in (() if ended else record.parts)
        ),
        notes=notes,
        ready_after_s=record.ready_after_s,
        failure=str(record.stop.error()) if record.stop else "",
    )


def power_cycle(directory: Path | str, host: str, *, off: bool = False) -> bool:
    """Simulate a loss of power: everything on the host dies at once, silently; its volatile directory is lost.

    Then it boots with a new boot_id (with `off` it stays dark until `power_on`). True: its agent serves again.
    Raises LocalClusterError for an unknown host or a cluster that does not run.
    """
    answer = _request(Layout.of(directory), _POWER_TIMEOUT_S, op="power_off" if off else "power_cycle", host=host)
    return bool(answer.get("serving"))


def power_on(directory: Path | str, host: str) -> bool:
    """Boot a host that is off. True: its agent serves. Raises LocalClusterError if it is on."""
    return bool(_request(Layout.of(directory), _POWER_TIMEOUT_S, op="power_on", host=host).get("serving"))


def _request(layout: Layout, timeout_s: float, **question: Any) -> dict[str, Any]:
    try:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(timeout_s)
            link.connect(str(layout.supervisor_socket))
            link.sendall(json.dumps(question).encode() + b"\n")
            with link.makefile("rb") as answers:
                answer: dict[str, Any] = json.loads(answers.readline())
    except (OSError, ValueError) as error:
        raise LocalClusterError(f"no cluster answers in {layout.dir}: {error}; start one with `drover up`") from error
    if "error" in answer:
        raise LocalClusterError(answer["error"])
    return answer
