"""The real guest under real QEMU, the real collector, and what the evidence says of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from deploy.lab.cluster import console_client, evidence

pytestmark = [pytest.mark.qemu]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "deploy/lab/guest_image/build.sh"
QEMU = shutil.which("qemu-system-x86_64")
FAST = "hz=100 hb=2 rate=16 pages=1024"
PERIOD = evidence.period_ns(100, 2)
T = TypeVar("T")

if not QEMU:
    pytest.skip("qemu-system-x86_64 is not installed (make system)", allow_module_level=True)


def until(what: str, question: Callable[[], T], seconds: float = 40.0) -> T:
    """Ask until the answer is true."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < end, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return answer


def hash32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


class Devices:
    """The state of a guest's devices: what a shim would carry from host to host."""

    def __init__(self) -> None:
        self.state: dict[int, int] = {}
        self.last: dict[int, int] = {}

    def ring(self, device: int, n: int) -> int:
        if n != self.last.get(device, 0):
            self.state[device] = hash32(self.state.get(device, hash32(0xD0000000 + device)) ^ n)
            self.last[device] = n
        return self.state[device]


class DevicePort:
    """Answers one VMM's second serial port, in a thread."""

    def __init__(self, path: Path, devices: Devices) -> None:
        self.devices = devices
        self.mute = False
        self._path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._connection: socket.socket | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def say(self, line: str) -> None:
        assert self._connection
        self._connection.sendall(line.encode())

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def close(self) -> None:
        self._ended.set()
        self._thread.join(5)
        self._listener.close()
        if self._connection:
            self._connection.close()
        self._path.unlink(missing_ok=True)

    def _run(self) -> None:
        received = b""
        while not self._ended.is_set():
            sources = [self._connection or self._listener]
            if not select.select(sources, [], [], 0.02)[0]:
                continue
            if not self._connection:
                self._connection, received = self._listener.accept()[0], b""
                continue
            data = b""
            with contextlib.suppress(ConnectionResetError):
                data = self._connection.recv(4096)
            if not data:
                self._connection.close()
                self._connection = None
                continue
            *lines, received = (received + data).split(b"\n")
            for line in lines:
                if not self.mute and (match := re.fullmatch(rb"R ([0-7]) ([0-9a-f]{8})", line)):
                    device, n = int(match[1], 16), int(match[2], 16)
                    self.say(f"A {device:x} {n:08x} {self.devices.ring(device, n):08x}\n")


class Qmp:
    """Just enough QMP for a migration by hand."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        until(f"{path} answers", lambda: self._connect(path))
        self._reader = self._socket.makefile("r")
        self._reader.readline()
        self("qmp_capabilities")

    def _connect(self, path: Path) -> bool:
        with contextlib.suppress(OSError):
            self._socket.connect(str(path))
            return True
        return False

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            reply = json.loads(self._reader.readline())
            if "error" in reply:
                raise AssertionError(f"{command}: {reply['error']}")
            if "return" in reply:
                return reply["return"]

    def close(self) -> None:
        self._reader.close()
        self._socket.close()


class Lab:
    """A collector and guests, all ended at the end of the test."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.dir = directory
        self.image = image
        self._ends = contextlib.ExitStack()
        (directory / "console").mkdir()

    def collector(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "deploy.lab.cluster.collector", "--dir", str(self.dir)]
        with (self.dir / "collector.log").open("ab") as output:
            process = subprocess.Popen(command, cwd=ROOT, stderr=output)
        self._ends.callback(self._end, process)
        until("the collector listens", lambda: self._listed() is not None)
        return process

    def _listed(self) -> list[console_client.ConsoleInfo] | None:
        with contextlib.suppress(console_client.ConsoleError):
            return console_client.list_consoles_sync(self.dir)
        return None

    def devices(self, name: str, devices: Devices) -> DevicePort:
        port = DevicePort(self.dir / f"{name}.dev", devices)
        self._ends.callback(port.close)
        return port

    def guest(self, vmm: str, append: str = FAST, *extra: str, ported: str = "") -> subprocess.Popen[bytes]:
        """`vmm` is <host>.<guest>.<inc>; `ported` names the device port that it connects to."""
        where = f"socket,path={self.dir / ported}.dev,server=off,reconnect-ms=100" if ported else "null"
        console = f"socket,id=console,path={self.dir / 'console' / vmm}.sock,server=on,wait=off"
        command = [str(QEMU), *"-accel tcg -M pc -m 64 -nodefaults -no-user-config -display none".split()]
        command += ["-chardev", console, "-serial", "chardev:console"]
        command += ["-chardev", f"{where},id=devices", "-serial", "chardev:devices"]
        command += ["-qmp", f"unix:{self.dir / vmm}.qmp,server=on,wait=off"]
        command += ["-kernel", str(self.image), "-append", append, *extra]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._ends.callback(self._end, process)
        return process

    def qmp(self, vmm: str) -> Qmp:
        connection = Qmp(self.dir / f"{vmm}.qmp")
        self._ends.callback(connection.close)
        return connection

    def log(self, vmm: str) -> evidence.ConsoleLog:
        named = evidence.Vmm.of_file(f"{vmm}.log")
        assert named
        path = self.dir / "serial" / f"{vmm}.log"
        return evidence.parse_log(named, path.read_text().splitlines() if path.exists() else [])

    def last(self, vmm: str) -> evidence.Beat | None:
        beats = self.log(vmm).beats
        return beats[-1] if beats else None

    def beats(self, vmm: str, beyond: int = 0) -> evidence.Beat:
        """Wait for a heartbeat beyond this number."""

        def beaten() -> list[evidence.Beat]:
            last = self.last(vmm)
            return [last] if last and last.number > beyond else []

        return until(f"{vmm} beats beyond {beyond}", beaten)[0]

    def close(self) -> None:
        self._ends.close()

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            process.kill()
        process.wait(5)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("image") / "guest.elf"
    subprocess.run([BUILD, out], check=True)
    return out


@pytest.fixture
def lab(image: Path) -> Iterator[Lab]:
    directory = Path(tempfile.mkdtemp(prefix="drover-", dir="/tmp"))  # short: sockets live below it
    lab = Lab(directory, image)
    yield lab
    lab.close()
    shutil.rmtree(directory)


# --- the image


def test_building_again_changes_nothing_and_leaves_nothing_else(image: Path):
    before = image.stat()
    subprocess.run([BUILD, image], check=True)
    assert image.stat().st_mtime_ns == before.st_mtime_ns
    assert [path.name for path in image.parent.iterdir()] == ["guest.elf"]
    assert image.stat().st_size < 64 << 10
    refused = subprocess.run([BUILD], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "usage: build.sh OUT" in refused.stderr


def test_a_guest_beats_checks_all_its_memory_and_does_not_need_a_listener(lab: Lab):
    lab.guest("host-1.web.a1", f"{FAST} res=8")
    time.sleep(0.7)
    lab.collector()  # late: what the guest said before is lost, and it did not wait for anybody
    first = lab.beats("host-1.web.a1")
    assert lab.log("host-1.web.a1").beats[0].number > 5
    result = console_client.verify_sync(lab.dir, "web")
    assert (result.ok, result.pages, result.bad) == (True, 1024 + 8 * 256, 0)
    assert result.console == evidence.Vmm("host-1", "web", "a1")
    last = lab.beats("host-1.web.a1", first.number + 50)
    judged = evidence.examine([lab.log("host-1.web.a1")], period=PERIOD)
    assert (judged.page_errors, judged.missing_beats, judged.overlap.copies) == (0, 0, 0)
    assert judged.memory_verified
    assert last.sweeps > 0
    estimate = evidence.estimate_period_ns([lab.log("host-1.web.a1")])
    assert estimate == pytest.approx(PERIOD, rel=0.25)


def test_a_reader_that_stands_still_stops_neither_the_guest_nor_a_line(lab: Lab):
    collector = lab.collector()
    lab.guest("host-1.web.a1", "hz=200 hb=1 rate=16 pages=256")
    before = lab.beats("host-1.web.a1")
    collector.send_signal(signal.SIGSTOP)
    time.sleep(2)  # 400 lines: more than socket and guest keep
    collector.send_signal(signal.SIGCONT)
    lab.beats("host-1.web.a1", before.number + 450)
    log = lab.log("host-1.web.a1")
    assert log.unreadable == 0
    assert evidence.overlapping_copies([log]) == 0
    assert log.lags
    assert evidence.missing_beats([log]) > 0


@pytest.mark.parametrize(
    ("append", "reason"),
    [
        ("hz=5000", "FATAL bad argument: hz=5000, allowed"),
        ("pages=12x", "FATAL bad argument: pages=12x"),
        ("colour=1", "FATAL bad argument: colour=1"),
        ("res=100", "FATAL base, pages and res need"),
        ("pci=2", "FATAL pci devices (hex): wanted 00000002, found 00000000"),
    ],
)
def test_a_guest_says_what_is_wrong_with_its_command_line(lab: Lab, append: str, reason: str):
    lab.collector()
    lab.guest("host-1.web.a1", append)
    complaint = until("a complaint", lambda: lab.log("host-1.web.a1").complaints)[0]
    assert complaint.startswith(reason)


# --- memory


def test_a_damaged_page_is_found(lab: Lab):
    memory = lab.dir / "ram"
    backend = f"memory-backend-file,id=ram,size=64M,share=on,mem-path={memory}"
    lab.collector()
    lab.guest("host-1.web.a1", f"{FAST} rate=0 res=4", "-object", backend, "-machine", "memory-backend=ram")
    lab.beats("host-1.web.a1")
    assert console_client.verify_sync(lab.dir, "web").ok

    def damage(page: int, word: int) -> None:
        with memory.open("r+b") as ram:
            ram.seek((4 << 20) + page * 4096 + word * 4)
            ram.write(b"\xde\xad\xbe\xef")

    damage(17, 500)  # contents of a visited page
    damage(1024 + 1000, 1023)  # the last word of a page that only a full verify looks at
    damage(40, 1)  # an address tag
    result = console_client.verify_sync(lab.dir, "web")
    assert (result.ok, result.bad) == (False, 3)
    complaints = until("complaints", lambda: lab.log("host-1.web.a1").complaints)
    assert [text.split()[1] for text in complaints] == ["h", "t", "h"]
    assert [int(text.split()[2], 16) for text in complaints] == [17, 40, 2024]

    assert (last := lab.last("host-1.web.a1"))
    assert last.page_errors == 0  # nothing was visited: rate=0
    for _ in range(7):
        console_client.send_sync(lab.dir, "web", "+")
    until("the visits find it", lambda: (last := lab.last("host-1.web.a1")) and last.page_errors == 1)
    damage(9, 0)  # a visit counter: a stale page looks like that
    until("the visits find it", lambda: (last := lab.last("host-1.web.a1")) and last.page_errors == 2)


# --- devices


def test_devices_answer_rightly_and_one_wrong_answer_counts_once(lab: Lab):
    devices = Devices()
    port = lab.devices("d1", devices)
    lab.collector()
    lab.guest("host-1.web.a1", f"{FAST} dev=3 devhz=5", ported="d1")
    until("doorbells", lambda: (last := lab.last("host-1.web.a1")) and last.device_rings > 60)
    assert set(devices.last) == {0, 1, 2}
    last = lab.beats("host-1.web.a1")
    assert (last.device_errors, last.device_retries) == (0, 0)

    devices.state[1] ^= 1  # state lost: every later answer follows from the wrong one
    until("the guest sees it", lambda: (last := lab.last("host-1.web.a1")) and last.device_errors)
    rings = lab.beats("host-1.web.a1").device_rings
    until("more", lambda: (last := lab.last("host-1.web.a1")) and last.device_rings > rings + 30)
    assert lab.beats("host-1.web.a1").device_errors == 1
    assert [text[:3] for text in lab.log("host-1.web.a1").complaints] == ["D 1"]

    port.say("A 2 00000001 12345678\n")  # a second device speaks
    until("the guest sees it", lambda: (last := lab.last("host-1.web.a1")) and last.device_errors == 2)
    port.say("rubbish\n0 00000001\nA 9 1 1\nA 0 0000")  # torn lines are nobody's answer
    rings = lab.beats("host-1.web.a1").device_rings
    until("more", lambda: (last := lab.last("host-1.web.a1")) and last.device_rings > rings + 30)
    assert lab.beats("host-1.web.a1").device_errors == 2


def test_lines_lost_on_the_way_are_rung_again_and_are_no_error(lab: Lab):
    devices = Devices()
    lab.collector()
    lab.guest("host-1.web.a1", f"{FAST} dev=2 devhz=5", ported="d1")
    lab.beats("host-1.web.a1", 20)  # nobody listens yet: the first doorbells go nowhere
    port = lab.devices("d1", devices)
    until("doorbells", lambda: (last := lab.last("host-1.web.a1")) and last.device_rings > 20)
    assert lab.beats("host-1.web.a1").device_retries >= 2

    port.close()  # the device's process restarts and keeps its state
    rings = lab.beats("host-1.web.a1").device_rings
    time.sleep(0.3)
    port = lab.devices("d1", devices)
    until("doorbells", lambda: (last := lab.last("host-1.web.a1")) and last.device_rings > rings + 20)

    port.mute = True
    time.sleep(0.3)
    port.mute = False
    for _ in range(3):  # an answer that was lost: the device is rung again and must not count twice
        rings = lab.beats("host-1.web.a1").device_rings
        until("doorbells", lambda rings=rings: (last := lab.last("host-1.web.a1")) and last.device_rings > rings + 10)
    assert lab.beats("host-1.web.a1").device_errors == 0


# --- a migration


def test_a_migration_as_the_evidence_sees_it(lab: Lab):
    devices = Devices()  # carried over at once, as a perfect shim would
    lab.devices("d1", devices)
    lab.devices("d2", devices)
    lab.collector()
    append = f"{FAST} dev=2 devhz=5 res=4"
    lab.guest("host-1.still.s1", FAST)
    lab.guest("host-1.web.a1", append, ported="d1")
    lab.guest("host-2.web.b2", append, "-incoming", "defer", ported="d2")
    lab.beats("host-1.web.a1", 100)
    source, destination = lab.qmp("host-1.web.a1"), lab.qmp("host-2.web.b2")
    channel = f"unix:{lab.dir}/channel"
    destination("migrate-incoming", uri=channel)
    source("migrate-set-parameters", **{"max-bandwidth": 1 << 33})
    source("migrate", uri=channel)
    until("completed", lambda: source("query-migrate")["status"] == "completed")
    arrived = lab.beats("host-2.web.b2")
    lab.beats("host-2.web.b2", arrived.number + 50)
    until(
        "devices at the destination",
        lambda: (last := lab.last("host-2.web.b2")) and last.device_rings > arrived.device_rings + 20,
    )
    assert console_client.verify_sync(lab.dir, "web").console.host == "host-2"

    logs = [lab.log("host-1.web.a1"), lab.log("host-2.web.b2")]
    judged = evidence.examine(logs, period=PERIOD)
    still = lab.log("host-1.still.s1")
    assert still.extent
    noise = evidence.noise_floor([(still, still.extent, PERIOD)])
    (hand_over,) = judged.hand_overs
    print(f"downtime {hand_over.downtime_ms:.1f} ms, noise {noise}")
    assert judged.overlap.copies == 0
    assert (judged.page_errors, judged.device_errors, judged.missing_beats) == (0, 0, 0)
    assert judged.memory_verified
    assert judged.device_rings > 40
    assert judged.last_host == "host-2"
    assert judged.ending is evidence.Ending.RUNNING
    assert hand_over.downtime_ms is not None
    assert -25 < hand_over.downtime_ms < 2000
    json.dumps(judged.to_dict())

    source("cont")  # what must never happen, done on purpose: the evidence sees it
    until("two copies", lambda: evidence.overlapping_copies([lab.log("host-1.web.a1"), lab.log("host-2.web.b2")]) > 5)


# --- the collector


def test_the_collector_survives_dead_sockets_odd_names_and_its_own_end(lab: Lab):
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(lab.dir / "console/host-1.dead.x.sock"))
    dead.close()
    (lab.dir / "console/odd name.sock").touch()
    first = lab.collector()
    guest = lab.guest("host-1.web.a1")
    lab.beats("host-1.web.a1", 10)
    second = subprocess.run(
        [sys.executable, "-m", "deploy.lab.cluster.collector", "--dir", str(lab.dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert second.returncode != 0
    assert "already runs" in second.stderr
    assert (lab.dir / "collector.log").read_text().count("'odd name.sock'") == 1

    first.send_signal(signal.SIGTERM)
    assert first.wait(5) == 0
    path = lab.dir / "serial/host-1.web.a1.log"
    written = path.read_text()
    assert written.endswith(" DETACHED\n")
    os.truncate(path, len(written) - 4)  # as if it had been killed within a write
    last_written = lab.beats("host-1.web.a1").number
    third = lab.collector()
    lab.beats("host-1.web.a1", last_written + 10)
    assert path.read_text().startswith(written[:-4] + "\n")
    third.kill()
    third.wait(5)
    lab.collector()
    after = lab.beats("host-1.web.a1", lab.beats("host-1.web.a1").number + 10)
    assert after.page_errors == 0
    guest.kill()
    until("the end is noted", lambda: lab.log("host-1.web.a1").ended_ns)
    (known,) = [c for c in console_client.list_consoles_sync(lab.dir) if c.vmm.guest == "web"]
    assert (known.connected, known.vmm.host) == (False, "host-1")


def test_requests_that_cannot_be_answered_say_why(lab: Lab):
    with pytest.raises(console_client.ConsoleError, match="is the cluster up"):
        console_client.list_consoles_sync(lab.dir)
    lab.collector()
    lab.guest("host-1.web.a1", FAST, "-S")  # stopped: it cannot answer
    until("the console is known", lambda: console_client.list_consoles_sync(lab.dir))
    with pytest.raises(console_client.ConsoleError, match="no console of guest db is connected"):
        console_client.verify_sync(lab.dir, "db")
    until("connected", lambda: console_client.list_consoles_sync(lab.dir)[0].connected)
    with pytest.raises(console_client.ConsoleError, match="is it paused"):
        console_client.verify_sync(lab.dir, "web", timeout_s=0.3)
    with pytest.raises(console_client.ConsoleError, match="timeout_s must be"):
        console_client.verify_sync(lab.dir, "web", timeout_s=-1)
    with pytest.raises(console_client.ConsoleError, match=r"host-1\.web\.a1"):
        console_client.send_sync(lab.dir, "web", "v", host="host-9")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(lab.dir / "collector.sock"))
        for request, reason in [(b"x\n", "not JSON"), (b"[]\n", "JSON object"), (b'{"op":"y"}\n', "unknown op")]:
            connection.sendall(request)
            assert reason in json.loads(connection.recv(4096))["error"]
