"""Hosts of which each is a real systemd in namespaces of its own, on one network: what packages are tried on."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BOOT_S = 90.0


class CommandFailed(AssertionError):
    """A command on a host ended with a status that was not expected."""


def run(*words: str, check: bool = True, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A command on this machine."""
    ran = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    if check and ran.returncode:
        raise CommandFailed(f"{' '.join(words)}: {ran.returncode}\n{ran.stdout}{ran.stderr}")
    return ran


@dataclass
class Host:
    """One systemd."""

    name: str
    address: str
    namespace: str
    directory: Path
    process: subprocess.Popen[bytes]
    init: int = 0

    @property
    def root(self) -> Path:
        """Its file system, as seen from here."""
        return Path(f"/proc/{self.init}/root")

    def sh(self, command: str, *, check: bool = True, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A shell's command on the host. Raises CommandFailed."""
        words = ["nsenter", f"--target={self.init}", "--all", "--root", "--wd=/", "env", "-i"]
        words += [
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG=C.UTF-8",
            "HOME=/root",
            "TERM=dumb",
            f"HOSTNAME={self.name}",
        ]
        ran = subprocess.run(
            [*words, "bash", "-c", command], capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check and ran.returncode:
            raise CommandFailed(f"{self.name}# {command}: {ran.returncode}\n{ran.stdout}{ran.stderr}")
        return ran

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """A file on the host."""
        target = self.root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)

    def wait(self, command: str, timeout_s: float = 120.0) -> str:
        """Until the command succeeds; what it says then. Raises CommandFailed with what it last said."""
        give_up_at = time.monotonic() + timeout_s
        while True:
            ran = self.sh(command, check=False)
            if ran.returncode == 0:
                return ran.stdout
            if time.monotonic() >= give_up_at:
                log = self.sh("journalctl --no-pager -n 60 -o cat", check=False).stdout
                raise CommandFailed(f"{self.name}# {command}: {ran.stdout}{ran.stderr}\n{log}")
            time.sleep(0.3)

    def main_pid(self, unit: str) -> int:
        """Of a service, in the host's own numbers; 0: it does not run."""
        return int(self.sh(f"systemctl show -P MainPID {unit}").stdout or 0)


@dataclass
class Hosts:
    """A network with its hosts."""

    hosts: list[Host]
    bridge: str

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number - 1]

    def every(self, command: str, timeout_s: float = 120.0) -> None:
        """On every host, side by side. Raises CommandFailed."""
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(len(self.hosts)) as pool:
            for _ in pool.map(lambda host: host.sh(command, timeout_s=timeout_s), self.hosts):
                pass


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, file.read_text().split())
    return found


def _init_of(process: subprocess.Popen[bytes], give_up_at: float) -> int:
    """The systemd below `unshare`."""
    while time.monotonic() < give_up_at:
        if process.poll() is not None:
            raise CommandFailed(f"a host did not boot: status {process.returncode}")
        for child in _children(process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return child
        time.sleep(0.1)
    raise CommandFailed("a host did not boot in time")


@contextlib.contextmanager
def booted(count: int, directory: Path, network: str = "192.0.2.1") -> Iterator[Hosts]:
    """Hosts host-1, host-2, ... at <network>1, <network>2, ...; nothing of them is left afterwards."""
    mark = f"dsd{os.getpid() % 100000}"
    bridge = f"{mark}-br"
    hosts: list[Host] = []
    run("ip", "netns", "add", bridge)
    try:
        run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", bridge, "link", "set", "br0", "up")
        for number in range(1, count + 1):
            hosts.append(_boot(number, mark, bridge, directory, network))
        give_up_at = time.monotonic() + BOOT_S
        for host in hosts:
            host.init = _init_of(host.process, give_up_at)
        for host in hosts:
            host.wait("systemctl is-active drover-test.target", BOOT_S)
        yield Hosts(hosts, bridge)
    finally:
        for host in hosts:
            host.process.send_signal(signal.SIGKILL)  # unshare takes PID 1 with it, and that everybody else
            host.process.wait()
        for host in hosts:
            run("ip", "netns", "del", host.namespace, check=False)
            shutil.rmtree(host.directory, ignore_errors=True)
        run("ip", "netns", "del", bridge, check=False)


def _boot(number: int, mark: str, bridge: str, directory: Path, network: str) -> Host:
    name, namespace, address = f"host-{number}", f"{mark}-{number}", f"{network}{number}"
    run("ip", "netns", "add", namespace)
    run("ip", "-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", f"h{number}", "netns", bridge)
    run("ip", "-n", bridge, "link", "set", f"h{number}", "master", "br0", "up")
    for words in (
        ["link", "set", "lo", "up"],
        ["addr", "add", f"{address}/24", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
    ):
        run("ip", "-n", namespace, *words)
    own = directory / name
    own.mkdir(parents=True)
    log = (directory / f"{name}.log").open("wb")
    command = ["ip", "netns", "exec", namespace, "unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "--uts"]
    command += ["--ipc", "bash", str(HERE / "boot.sh"), name, str(own)]
    with log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return Host(name, address, namespace, own, process)
