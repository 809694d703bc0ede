"""Which QEMU versions this machine has."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import orchestrator

NAME = "qemu-system-x86_64"
_NAMED = re.compile(rf"{NAME}(-\d+(\.\d+)*)?")
_SAID = re.compile(r"version (\d+(?:\.\d+)+)")
_TIMEOUT_S = 5.0
_PROJECT = Path(orchestrator.__file__ or "").resolve().parent.parent


def find() -> dict[str, str]:
    """Version by binary: of `qemu-system-x86_64`, or with `-VERSION`, on the PATH, in /opt/qemu-*/bin and in this
    project's build/qemu-*/bin (deploy/qemu-11.sh), in that order."""
    folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    folders += sorted(Path("/opt").glob("qemu-*/bin"))
    folders += sorted(_PROJECT.glob("build/qemu-*/bin"))
    found: dict[str, str] = {}
    seen: set[Path] = set()
    for folder in folders:
        for binary in sorted(folder.glob(f"{NAME}*")):
            real = binary.resolve()
            if real in seen or not _NAMED.fullmatch(binary.name) or not os.access(binary, os.X_OK):
                continue
            seen.add(real)
            if version := _version(binary):
                found[str(binary)] = version
    return found


def _version(binary: Path) -> str:
    """Empty when it does not say."""
    try:
        ran = subprocess.run(
            [str(binary), "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = _SAID.search(ran.stdout)
    return said[1] if said else ""
