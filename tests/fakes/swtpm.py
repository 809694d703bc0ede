"""A TPM that somebody else has, emulated by swtpm and asked directly."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from agents.guest.tpm import PROGRAM

_STARTUP = struct.pack(">HIIH", 0x8001, 12, 0x144, 0)


def _create_primary() -> bytes:
    """TPM2_CreatePrimary of a storage key under the owner: what comes back follows from the TPM's own seed."""
    session = struct.pack(">IHBH", 0x40000009, 0, 0, 0)
    curve = struct.pack(">HHHHHH", 6, 128, 0x43, 0x10, 3, 0x10)  # AES-128-CFB; no scheme; P-256; no derivation
    public = struct.pack(">HHIH", 0x23, 0x0B, 0x00030072, 0) + curve + struct.pack(">HH", 0, 0)
    body = struct.pack(">II", 0x40000001, len(session)) + session + struct.pack(">HHH", 4, 0, 0)
    body += struct.pack(">H", len(public)) + public + struct.pack(">HI", 0, 0)
    return struct.pack(">HII", 0x8002, 10 + len(body), 0x131) + body


@contextlib.contextmanager
def tpm(where: str, directory: Path, *more: str) -> Iterator[socket.socket]:
    """A TPM that is powered, and takes commands."""
    at, control = directory / "tpm.sock", directory / "control.sock"
    command = [PROGRAM, "socket", "--tpm2", "--tpmstate", where, "--server", f"type=unixio,path={at}", *more]
    command += ["--ctrl", f"type=unixio,path={control}", "--flags", "not-need-init"]
    child = subprocess.Popen(command)
    try:
        with socket.socket(socket.AF_UNIX) as asked:
            end = time.monotonic() + 20
            while True:
                try:
                    asked.connect(str(at))
                    break
                except OSError:
                    assert child.poll() is None
                    assert time.monotonic() < end
                    time.sleep(0.01)
            asked.settimeout(60)
            asked.sendall(_STARTUP)
            asked.recv(4096)
            yield asked
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(20)
            asked.connect(str(control))
            asked.sendall(struct.pack(">I", 3))  # so that all is written
            asked.recv(4)
        child.wait(20)
    finally:
        child.kill()
        child.wait()
        for path in (at, control):
            path.unlink(missing_ok=True)


def key_of(asked: socket.socket) -> bytes:
    asked.sendall(_create_primary())
    answer = asked.recv(4096)
    _, _, result, _, _, size = struct.unpack(">HIIIIH", answer[:20])
    assert result == 0, hex(result)
    return answer[20 : 20 + size]


def tpm_of_theirs(directory: Path) -> tuple[Path, bytes]:
    """The file of a TPM as libvirt keeps it, and its key."""
    (theirs := directory / "theirs").mkdir()
    with tpm(f"dir={theirs}", directory) as asked:
        key = key_of(asked)
    return theirs / "tpm2-00.permall", key
