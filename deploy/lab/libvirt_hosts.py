"""libvirt daemons of the lab: the tree that they run from, the binding that speaks to them, and each as one process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

_HERE = Path(__file__).parent
_STARTS_S = 60.0


class NoLibvirt(Exception):
    """It cannot be had here; the text says why."""


def tree(directory: Path) -> Path:
    """The tree of libvirt in `directory`, made by the first who asks. Raises NoLibvirt."""
    if os.geteuid() != 0:
        raise NoLibvirt("libvirt's daemons of the lab need root")
    made = subprocess.run(
        ["bash", str(_HERE / "libvirt.sh"), str(directory)], capture_output=True, text=True, timeout=300, check=False
    )
    if made.returncode:
        raise NoLibvirt(made.stderr.strip())
    return directory


def environment(directory: Path) -> dict[str, str]:
    """What a process needs to import the binding of the tree."""
    root = directory / "root"
    libraries = f"{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu"
    return {"LD_LIBRARY_PATH": libraries, "PYTHONPATH": str(root / "usr/lib/python3/dist-packages")}


def load_binding(directory: Path) -> None:
    """The same in this process, which was started without it. Raises NoLibvirt."""
    root = directory / "root"
    left = sorted((root / "usr/lib/x86_64-linux-gnu").glob("*.so.*")) + sorted(root.glob("lib/x86_64-linux-gnu/*.so.*"))
    for _ in range(4):  # each round loads what those of the round before are needed for
        again: list[Path] = []
        for library in left:
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                again.append(library)
        left = again
    path = environment(directory)["PYTHONPATH"]
    if path not in sys.path:
        sys.path.append(path)
    try:
        __import__("libvirt")
    except ImportError as error:
        raise NoLibvirt(f"its binding does not load: {error}") from error


class Host:
    """One daemon. `stop` ends it and leaves its guests, as a restart of libvirt does."""

    def __init__(self, directory: Path, state: Path, number: int, netns: str = "") -> None:
        self._directory = directory
        self._state = state
        self._number = number
        self._netns = netns
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """Of the daemon."""
        return self._state / "run/libvirt/libvirt-sock"

    def start(self) -> None:
        """Raises NoLibvirt, with the daemon's last words, when it does not come up."""
        uuid = f"d0000000-0000-4000-8000-{self._number:012d}"
        command = ["bash", str(_HERE / "libvirt-host.sh"), str(self._directory), str(self._state), uuid]
        self.socket.unlink(missing_ok=True)
        self._state.mkdir(parents=True, exist_ok=True)
        with (self._state / "host.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, f"libvirt-{self._number}", *([self._netns] if self._netns else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until = time.monotonic() + _STARTS_S
        while not self.socket.exists():
            if self._process.poll() is not None or time.monotonic() > until:
                said = (self._state / "host.log").read_text(errors="replace").strip()[-400:]
                raise NoLibvirt(f"a daemon does not start: {said or 'no word'}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone. Idempotent."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()
            self._process = None
