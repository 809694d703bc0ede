"""The real Linux guest under real QEMU: what it says of itself, and its disk from outside after a loss of power."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster.evidence import ConsoleLog, Vmm, holes, parse_beat, parse_log, parse_verify
from deploy.lab.linux_guest.image import check, seed_of
from deploy.lab.workload import LinuxWorkload, linux_boot_of
from orchestrator.core.guest import command_line_of

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "deploy/lab/linux_guest/build.sh"
IMAGES = ROOT / "build/linux"
UUID = "1f2e3d4c-0000-4000-8000-000000000000"
BOOT_S = 180.0
"""On a machine that does much else."""
WRONG_TSC = "tsc_early_khz=131000"
"""What a kernel may measure that gets no CPU in the middle of it: a sixteenth of what is so."""
UNREAD_S = 4.0
"""As many beats are due in it as three of the console's buffers hold."""

if not shutil.which("qemu-system-x86_64"):
    pytest.skip("qemu-system-x86_64 is not installed (make system)", allow_module_level=True)


class Linux:
    """One boot of the guest with a disk of its own."""

    def __init__(self, directory: Path, disk: Path, workload: LinuxWorkload, words: str = "") -> None:
        boot = linux_boot_of(workload, disks=1)
        self.words = directory / f"console-{time.monotonic_ns()}.log"
        self._socket = directory / "con"
        console = f"socket,id=con,path={self._socket},server=on,wait=off,logfile={self.words}"
        options = {
            "-accel": "tcg",
            "-M": "q35",
            "-m": "128",
            "-display": "none",
            "-chardev": console,
            "-serial": "chardev:con",
            "-drive": f"file={disk},format=raw,if=virtio",
            "-kernel": str(IMAGES / boot.kernel),
            "-initrd": str(IMAGES / boot.initrd),
            "-append": f"{command_line_of(boot, name='g', uuid=UUID)} {words}",
        }
        flat = [word for option in options.items() for word in option]
        self._process = subprocess.Popen(["qemu-system-x86_64", "-nodefaults", "-no-user-config", *flat])
        self._boots()

    def _boots(self) -> None:
        self.until("it beats", lambda: self.beats() > 5, BOOT_S)

    def lines(self) -> list[str]:
        return self.words.read_text(errors="replace").splitlines() if self.words.exists() else []

    def beats(self) -> int:
        return sum(parse_beat(0, line) is not None for line in self.lines())

    def newest_beat(self) -> int:
        return max(beat.number for line in self.lines() if (beat := parse_beat(0, line)))

    def promised(self) -> int:
        return max((beat.device_rings for line in self.lines() if (beat := parse_beat(0, line))), default=0)

    def until(self, what: str, question: Callable[[], bool], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not question():
            assert self._process.poll() is None, self.lines()[-5:]
            assert time.monotonic() < end, f"not within {seconds} s: {what}; {self.lines()[-5:]}"
            time.sleep(0.05)

    def ask(self, letter: str) -> None:
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(5)
            line.connect(str(self._socket))
            line.sendall(letter.encode())
            time.sleep(0.2)  # QEMU drops what it has not given to the guest when the line is closed

    def heard_late(self, seconds: float) -> ConsoleLog:
        """What one hears who is connected, and takes nothing in until all that is in between is full; to a beat after
        it. Not as the log has it: QEMU writes a byte there each time that it tries to send it."""
        said = b""
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(10)
            line.connect(str(self._socket))
            time.sleep(seconds)
            while True:
                said += line.recv(4096)
                whole = said.decode(errors="replace").split("\n")[1:-1]  # it came in the middle of one
                heard = parse_log(Vmm("host-1", "g", "a1"), [f"0 {line}" for line in whole])
                if heard.beats and heard.beats[-1].unsaid and heard.beats[-1].number > heard.beats[0].number + 200:
                    return heard

    def verified(self) -> bool:
        found = [verify for line in self.lines() if (verify := parse_verify(0, line))]
        return bool(found) and found[-1].ok

    def cut_power(self) -> None:
        self._process.kill()
        self._process.wait(10)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    made = subprocess.run([BUILD, str(IMAGES)], capture_output=True, text=True, timeout=600, check=False)
    if made.returncode == 69:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(24 << 20)
    return path


@pytest.fixture
def boots(disk: Path, tmp_path: Path) -> Iterator[Callable[..., Linux]]:
    started: list[Linux] = []

    def boot(words: str = "") -> Linux:
        workload = LinuxWorkload(records_per_s=50, load_mib=8, load_kib_per_s=500, mem_mib=4)
        started.append(Linux(tmp_path, disk, workload, words))
        return started[-1]

    yield boot
    for guest in started:
        guest.cut_power()


def test_it_keeps_its_promises_over_a_loss_of_power(disk: Path, boots: Callable[..., Linux]) -> None:
    guest = boots()
    words = r"BOOT linux period_us=20000 address=10\.78\.\d+\.\d+ disks=1 promised=0"
    assert any(re.fullmatch(words, line) for line in guest.lines())
    guest.until("20 records are promised", lambda: guest.promised() >= 20)
    heard = guest.heard_late(UNREAD_S)
    assert heard.beats[-1].unsaid > 0
    assert holes([heard]) == (), heard.rest
    guest.ask("v")
    guest.until("it has checked itself", guest.verified)
    guest.cut_power()

    promised = guest.promised()

    def read(at: int, size: int) -> bytes:
        with disk.open("rb") as file:
            file.seek(at)
            return file.read(size)

    verdict = check(read, seed_of(UUID), promised)
    assert verdict.kept, verdict
    assert verdict.newest >= promised >= 20
    assert not [line for line in guest.lines() if line.startswith(("E ", "D ", "FATAL"))]

    # Another life goes on where this one ended.
    again = boots(WRONG_TSC)
    (booted,) = [line for line in again.lines() if line.startswith("BOOT")]
    assert int(booted.rpartition("=")[2]) == verdict.newest
    first_s, first = time.monotonic(), again.newest_beat()
    again.until("it goes on", lambda: again.newest_beat() >= first + 250)
    ahead_s = (again.newest_beat() - first) / 50 - (time.monotonic() - first_s)
    assert ahead_s < 3.5, "its clock is the one that the CPU's counter was measured with"
