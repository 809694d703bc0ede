"""The preload and the device process behind it, against the endpoint that both stand for: same calls, same answers.

The program under the preload is no QEMU here but a Python that calls itself so.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agents.engine.qemu import vfio
from agents.shims.companion import DeviceProcess, DevicesSpec
from deploy.lab.devices import PROGRAM
from deploy.lab.devices.device import DeviceState
from deploy.lab.devices.scenario_text import options_of
from deploy.lab.devices.vfio import layout
from deploy.lab.devices.vfio.layout import Register
from deploy.lab.devices.vfio.uapi import FeatureNumber, Ioctl, Operation
from orchestrator.core.records import DeviceSpec, ShimKind
from tests.fakes.vfio_rig import preload
from tests.unit.test_vfio_endpoint import Qemu

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc to build the preload"),
]
FD = 401

PRELUDE = """
import errno, fcntl, json, os, struct, sys
VFIO = ord(";") << 8
def ioctl(fd, number, payload=b""):
    buffer = bytearray(payload)
    try:
        fcntl.ioctl(fd, VFIO | number, buffer, True) if payload else fcntl.ioctl(fd, VFIO | number)
    except OSError as error:
        return -error.errno
    return bytes(buffer)
def attempt(call, *arguments):
    try:
        return call(*arguments)
    except OSError as error:
        return -error.errno
def feature(number, operation, body=bytes(8)):
    return ioctl(401, 117, struct.pack("=II", 8 + len(body), number | operation) + body)
def set_state(state):
    return feature(2, 1 << 17, struct.pack("=Ii", state, -1))
def info(fd):
    return ioctl(fd, 121, struct.pack("=IIQQ", 24, 0, 0, 0))
def drain(fd, limit):
    pieces = []
    while isinstance(piece := attempt(os.read, fd, limit), bytes) and piece:
        pieces.append(piece)
    return b"".join(pieces)
def tell(**found):
    print(json.dumps({k: v.hex() if isinstance(v, bytes) else v for k, v in found.items()}))
"""


class Lab:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.process: DeviceProcess | None = None

    async def start(self, *names: str, incoming: bool = False, scenario: str = "") -> DeviceProcess:
        devices = tuple(
            DeviceSpec(name, ShimKind.VFIO, "none", 20_000, 5_000, 0, options_of(scenario)) for name in names
        )
        self.process = await DeviceProcess.start(
            DevicesSpec("guest", "s", self.directory, devices, 7, PROGRAM), incoming=incoming
        )
        return self.process

    def program(self, code: str, count: int = 1, *, name: str = "qemu-system-x86_64", socket: str = "") -> list[str]:
        """Command line and environment in one: run with `run`."""
        path = socket or str(self.directory / "s.vfio")
        environment = vfio.environment(str(preload()), path, count)
        words = [f"{key}={value}" for key, value in environment.items()]
        return ["env", f"PYTHONHOME={sys.base_prefix}", *words, "bash", "-c", f'exec -a {name} "$0" -c "$1"',
                os.path.realpath(sys.executable), PRELUDE + code]  # fmt: skip

    def refused(self, command: list[str]) -> str:
        """What it said when it did not start."""
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 1
        return ran.stderr.strip()

    def run(self, code: str, count: int = 1, **more: str) -> dict[str, Any]:
        ran = subprocess.run(self.program(code, count, **more), capture_output=True, text=True, timeout=30, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    made = Lab(Path(tempfile.mkdtemp(prefix="dq-")))
    try:
        yield made
    finally:
        if made.process is not None:
            await made.process.destroy()
        shutil.rmtree(made.directory)


async def in_thread(lab: Lab, code: str, count: int = 1, **more: str) -> dict[str, Any]:
    return await asyncio.to_thread(lab.run, code, count, **more)


async def test_the_same_calls_have_the_same_answers(lab: Lab) -> None:
    await lab.start("nic")
    found = await in_thread(
        lab,
        """
tell(
    device=ioctl(401, 107, struct.pack("=IIIII", 20, 0, 0, 0, 0)),
    flags=feature(1, 1 << 16),
    opted=feature(12, 1 << 17),
    lacking=feature(3, 1 << 17),
    config=os.pread(401, 64, 1 << 20),
    rung=[os.pwrite(401, struct.pack("<I", 1), 8), os.pread(401, 4, 12).hex(), os.pread(401, 4, 16).hex()],
    began=(began := set_state(6)),
    fd=(fd := struct.unpack_from("=i", began, 12)[0]) > 2,
    info=info(fd),
    data=drain(fd, 7000),
    nothing=attempt(os.read, fd, 7000),
    p2p=set_state(7),
    stopped=set_state(3),
    refused=info(fd),
    rest=drain(fd, 3000),
    closed=attempt(os.close, fd),
    gone=attempt(os.read, fd, 10),
    iommu=ioctl(400, 0x81, struct.pack("=III", 12, 0, 0)),
)
""",
    )
    qemu = Qemu()
    assert found["device"] == qemu.ioctl(Ioctl.GET_INFO, (20).to_bytes(4, "little") + bytes(16)).payload.hex()
    assert found["flags"] == qemu.feature(FeatureNumber.MIGRATION, Operation.GET).payload.hex()
    assert qemu.opt_in().result == 0
    assert found["lacking"] == qemu.feature(3, Operation.SET).result == -errno.ENOTTY
    assert found["config"] == layout.configuration_space()[:64].hex()
    n, word = qemu.ring(1)
    assert found["rung"] == [4, n.to_bytes(4, "little").hex(), word.to_bytes(4, "little").hex()]
    assert qemu.set_state(DeviceState.PRE_COPY).opens_session
    assert found["fd"]
    assert found["data"] == qemu.drain().hex()
    assert found["nothing"] == -errno.ENOMSG
    qemu.set_state(DeviceState.PRE_COPY_P2P)
    qemu.set_state(DeviceState.STOP_COPY)
    assert found["refused"] == -errno.EINVAL
    assert found["rest"] == qemu.drain().hex()
    assert (found["closed"], found["gone"]) == (None, -errno.EBADF)
    assert found["iommu"].startswith("0c000000")
    assert Register.ANSWER == 0x10


async def test_a_doorbell_never_waits_for_a_slow_call(lab: Lab) -> None:
    await lab.start("nic", scenario="delays: [{call: size, ms: 1500}]")
    found = await in_thread(
        lab,
        """
import threading, time
slow = threading.Thread(target=lambda: feature(9, 1 << 16))
slow.start()
time.sleep(0.3)
began = time.monotonic()
os.pwrite(401, struct.pack("<I", 1), 8)
answered = struct.unpack("<I", os.pread(401, 4, 12))[0]
tell(answered=answered, s=time.monotonic() - began, slow=slow.is_alive())
slow.join()
""",
    )
    assert found["answered"] == 1
    assert found["slow"]
    assert found["s"] < 1.0


async def test_each_device_is_its_own(lab: Lab) -> None:
    await lab.start("a", "b")
    found = await in_thread(
        lab, "tell(indexes=[struct.unpack('<I', os.pread(401 + n, 4, 4))[0] for n in (0, 1)])", count=2
    )
    assert found["indexes"] == [layout.FIRST_INDEX, layout.FIRST_INDEX + 1]


async def test_other_descriptors_are_left_alone(lab: Lab) -> None:
    await lab.start("nic")
    found = await in_thread(
        lab,
        """
a, b = os.pipe()
os.write(b, b"x" * 1000)
path = sys.executable
fd = os.open(path, os.O_RDONLY)
tell(piped=len(os.read(a, 5000)), file=os.pread(fd, 4, 0), ioctl=attempt(fcntl.ioctl, a, 0x5401, bytes(64)))
""",
    )
    assert (found["piped"], found["file"], found["ioctl"]) == (1000, b"\x7fELF".hex(), -errno.ENOTTY)


async def test_a_process_that_is_gone_is_a_device_that_is_gone(lab: Lab) -> None:
    process = await lab.start("nic")
    found = await in_thread(
        lab,
        f"""
began = set_state(6)
fd = struct.unpack_from("=i", began, 12)[0]
os.kill({process.pid}, 9)
tell(
    state=set_state(2),
    read=attempt(os.read, fd, 10),
    bar=attempt(os.pread, 401, 4, 12),
    config=os.pread(401, 2, 1 << 20),
)
""",
    )
    gone = -errno.ENODEV
    assert (found["state"], found["read"], found["bar"]) == (gone, gone, gone)
    assert found["config"] == layout.VENDOR.to_bytes(2, "little").hex()


async def test_only_qemu_gets_devices_and_says_why_when_it_cannot(lab: Lab) -> None:
    other = await in_thread(lab, "tell(there=attempt(os.fstat, 401) == -errno.EBADF)", name="sh", socket="/nowhere")
    assert other["there"]
    said = await asyncio.to_thread(lab.refused, lab.program("", socket="/nowhere"))
    assert said == "drover-vfio: cannot connect to the device process at /nowhere: No such file or directory"
    for wanted in ("0", "9", "x", "1"):
        command = lab.program("")
        command = [word if not word.startswith("DROVER_VFIO=") else f"DROVER_VFIO={wanted}" for word in command]
        assert "must be COUNT:SOCKET" in await asyncio.to_thread(lab.refused, command)


async def test_a_device_serves_one_vmm(lab: Lab) -> None:
    await lab.start("nic")
    second = lab.program("tell()")
    code = f"""
import subprocess
environment = {{**os.environ}}
ran = subprocess.run({second!r}, capture_output=True, text=True, env=environment)
tell(code=ran.returncode, said=ran.stderr)
"""
    found = await in_thread(lab, code)
    assert found["code"] == 1
    assert "refuses a device" in found["said"]
