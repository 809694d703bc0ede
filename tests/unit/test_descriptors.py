"""Processes at their limit of descriptors: strangers never get all of them, and a few are kept back for ourselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import descriptors
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.descriptors import RESERVE, SPARE, Reserve, connections_of
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.fakes.cluster import short_directory

LIMIT = 256


@pytest.mark.parametrize("limit", [64, 256, 1024, 20_000, 1 << 20])
@pytest.mark.parametrize("addresses", [0, 1, 2, 3])
def test_all_connections_together_leave_half_of_what_there_is(limit: int, addresses: int) -> None:
    taken = connections_of(limit, addresses) * addresses
    assert taken <= max(limit // 2, 16 * addresses)
    assert connections_of(limit, addresses) <= descriptors.MAX_CONNECTIONS


_AT_THE_LIMIT = f"""
import errno, os, resource, subprocess
from orchestrator import proc
from orchestrator.descriptors import Reserve
child = subprocess.Popen(["sleep", "60"])
start_time = proc.start_time_of(child.pid)
resource.setrlimit(resource.RLIMIT_NOFILE, ({LIMIT}, {LIMIT}))
reserve, held = Reserve(), []
reserve.look()
def fill():
    try:
        while True:
            held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        assert error.errno == errno.EMFILE
def alive():
    try:
        found = proc.open_process(child.pid, start_time)
    except Exception as error:
        return type(error).__name__
    os.close(found)
    return "alive"
fill()
print(reserve.released, alive())
reserve.look()
print(reserve.released, alive())
reserve.look()
print(reserve.released, alive())  # it is not taken back while there is nothing to take
for each in held:
    os.close(each)
held.clear()
reserve.look()
fill()
print(reserve.released, alive(), len(held))
reserve.look()
print(reserve.released, alive())
child.kill()
"""


def test_a_process_without_a_free_descriptor_has_its_reserve() -> None:
    run = subprocess.run([sys.executable, "-c", _AT_THE_LIMIT], capture_output=True, text=True, timeout=60, check=True)
    said = [line for line in run.stdout.splitlines() if line.startswith(("True", "False"))]  # the others are the log
    first, second, third, fourth, fifth = said
    assert first == "False LivenessUnknown"
    assert second == third == fifth == "True alive"
    released, unknown, held = fourth.split()
    assert (released, unknown) == ("False", "LivenessUnknown")
    assert 0 < int(held) < LIMIT - RESERVE


def _open(pid: int | str = "self") -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def test_the_reserve_is_given_back_at_the_end() -> None:
    before = _open()
    reserve = Reserve()
    reserve.look()
    assert _open() == before + RESERVE
    reserve.look()
    assert _open() == before + RESERVE, f"the {SPARE} that it looks with are closed again"
    reserve.close()
    assert _open() == before


@pytest.fixture
def api(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, int]]:
    """A real process of the API with few descriptors; its unix socket and its port. There is no ledger behind it."""
    directory = short_directory()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    listen = [f"unix:{directory}/api.sock", f"127.0.0.1:{port}"]
    (tmp_path / "api.json").write_text(json.dumps({"listen": listen, "zookeeper": "127.0.0.1:1"}))
    command = [sys.executable, "-m", "orchestrator.api", "--config", str(tmp_path / "api.json")]
    process = subprocess.Popen(["prlimit", f"--nofile={LIMIT}:{LIMIT}", *command])
    try:
        yield process, listen[0], port
    finally:
        process.kill()
        process.wait()


def _answers(address: str) -> bool:
    client = OrchestratorClient(address)
    try:
        client.list_hosts()
    except DroverError as error:
        return error.reason is RefusalReason.LEDGER_UNREACHABLE
    finally:
        client.close()
    return True


async def test_idle_connections_do_not_shut_the_api(api: tuple[subprocess.Popen[bytes], str, int]) -> None:
    """Some thousand of them had all the descriptors that there were: nobody was served, at the unix socket neither."""
    process, unix, port = api
    deadline = time.monotonic() + 60
    while not await asyncio.to_thread(_answers, unix):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # no TLS, empty SETTINGS: a sound start
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    for _ in range(2 * LIMIT):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello)
        idle.append((reader, writer))
    await asyncio.sleep(1)
    used = _open(process.pid)
    assert connections_of(LIMIT, 2) <= used < LIMIT - SPARE
    assert await asyncio.to_thread(_answers, unix)
    for _, writer in idle:
        with contextlib.suppress(ConnectionError):
            writer.close()


def test_a_process_takes_as_many_as_it_may_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
        assert descriptors.raise_limit() == hard == descriptors.limit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
