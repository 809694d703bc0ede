"""What the console collector costs and how true its stamps are. Prints figures; asserts nothing.

    python -m tests.bench.collector [--guests 12] [--hz 50] [--seconds 10] [--program OTHER_VERSION.py]

Real guests: CPU of the collector (from the scheduler's own count), its wake-ups, the noise floor of the heartbeats.
Then a talker in their place that writes the time into each line as its first byte leaves, byte by byte as QEMU does:
the difference to the collector's stamp is the collector's own error.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click

from deploy.lab.cluster import evidence

ROOT = Path(__file__).resolve().parents[2]
TICK_HZ = 100
BYTE_GAP_S = 10e-6


@contextlib.contextmanager
def collecting(directory: Path, program: str) -> Iterator[int]:
    """A collector; its pid."""
    words = [program] if program else ["-m", "deploy.lab.cluster.collector"]
    process = subprocess.Popen([sys.executable, *words, "--dir", str(directory)], cwd=ROOT)
    try:
        while not (directory / "collector.sock").exists():
            time.sleep(0.02)
        yield process.pid
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def guests(directory: Path, count: int, hz: int) -> Iterator[None]:
    image = directory / "guest.elf"
    subprocess.run([ROOT / "deploy/lab/guest_image/build.sh", image], check=True)
    started: list[subprocess.Popen[bytes]] = []
    for number in range(count):
        console = f"socket,id=c,path={directory}/console/host-1.g{number}.a.sock,server=on,wait=off"
        command = "qemu-system-x86_64 -accel tcg -M pc -m 64 -nodefaults -no-user-config -display none".split()
        command += ["-chardev", console, "-serial", "chardev:c", "-kernel", str(image)]
        command += ["-append", f"hz={TICK_HZ} hb={TICK_HZ // hz} rate=16 pages=1024"]
        started.append(subprocess.Popen(command, stdin=subprocess.DEVNULL))
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def spent(pid: int) -> tuple[float, int]:
    """Seconds on a CPU and times that it waited for something, over all threads."""
    cpu_ns = switches = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu_ns += int((task / "schedstat").read_text().split()[0])
        status = (task / "status").read_text()
        switches += int(status.rpartition("\nvoluntary_ctxt_switches:")[2].split()[0])
    return cpu_ns / 1e9, switches


def watch(pid: int, seconds: float) -> str:
    begun, (cpu_s, switches) = time.monotonic(), spent(pid)
    time.sleep(seconds)
    took_s, (cpu_later_s, switches_later) = time.monotonic() - begun, spent(pid)
    return (
        f"{100 * (cpu_later_s - cpu_s) / took_s:.2f} % of a core, {(switches_later - switches) / took_s:.0f} wake-ups/s"
    )


def of_real_guests(directory: Path, count: int, hz: int, seconds: float, program: str) -> None:
    with collecting(directory, program) as pid, guests(directory, count, hz):
        time.sleep(3)
        print(f"{count} real guests at {hz} Hz: collector {watch(pid, seconds)}")
    period = evidence.period_ns(TICK_HZ, TICK_HZ // hz)
    pauses: list[float] = []
    for path in sorted((directory / "serial").glob("*.log")):
        vmm = evidence.Vmm.of_file(path.name)
        assert vmm
        beats = evidence.parse_log(vmm, path.read_text().splitlines()).beats[hz:]
        pauses += [(b.ns - a.ns - (b.number - a.number) * period) / 1e6 for a, b in pairwise(beats)]
    print(f"noise floor: {spread([abs(pause) for pause in pauses], 'ms')} of {len(pauses)} gaps")


def talk(listeners: list[socket.socket], hz: int, ended: threading.Event) -> None:
    connections = [listener.accept()[0] for listener in listeners]
    step_s = 1 / hz / len(connections)
    due = time.monotonic()
    while not ended.is_set():
        for connection in connections:
            due += step_s
            time.sleep(max(0, due - time.monotonic()))
            # As long as a heartbeat.
            for byte in f"T {time.monotonic_ns():020d} {'':33}\n".encode():
                connection.send(bytes((byte,)))
                until = time.monotonic() + BYTE_GAP_S
                while time.monotonic() < until:
                    pass


def of_a_talker(directory: Path, count: int, hz: int, seconds: float, program: str) -> None:
    listeners: list[socket.socket] = []
    for number in range(count):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / "console" / f"host-1.t{number}.a.sock"))
        listener.listen()
        listeners.append(listener)
    ended = threading.Event()
    with collecting(directory, program) as pid:
        talking = threading.Thread(target=talk, args=(listeners, hz, ended))
        talking.start()
        time.sleep(1)
        print(f"{count} talkers at {hz} Hz: collector {watch(pid, seconds)}")
        ended.set()
        talking.join()
        time.sleep(0.2)
    errors: list[float] = []
    for path in (directory / "serial").glob("*.t*.log"):
        for line in path.read_text().splitlines():
            stamp, word, *rest = line.split()
            if word == "T":
                errors.append((int(stamp) - int(rest[0])) / 1e6)
    print(f"error of the stamps: {spread(errors, 'ms')} of {len(errors)} lines")


def spread(values: list[float], unit: str) -> str:
    cuts = statistics.quantiles(values, n=1000)
    return (
        f"p50 {cuts[499]:.3f}, p95 {cuts[949]:.3f}, p99 {cuts[989]:.3f}, p99.9 {cuts[998]:.3f}, "
        f"max {max(values):.3f} {unit}"
    )


@click.command(help=__doc__)
@click.option("--guests", "count", default=12)
@click.option("--hz", default=50)
@click.option("--seconds", default=10.0)
@click.option("--program", default="")
def main(count: int, hz: int, seconds: float, program: str) -> None:
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.2f}")
    for measure in (of_real_guests, of_a_talker):
        directory = Path(tempfile.mkdtemp(prefix="dl", dir="/tmp"))
        (directory / "console").mkdir()
        try:
            measure(directory, count, hz, seconds, program)
        finally:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
