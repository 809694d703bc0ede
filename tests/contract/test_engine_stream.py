"""The stream that an engine sends a guest through: who opens it, what becomes of it, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import EngineError, EngineStatus, HoldStart, OutgoingOptions, RunState, Vmm, stream_of
from agents.engine.qemu import stream
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from orchestrator.core.endpoint import Endpoint
from tests.contract.test_engine import LINK, Pair, freeze, image, no_qemu, options, pair, until

__all__ = ["pair"]
_PIDFD_GETFD = 438
_NOTSENT_BYTES = 144
"""Where tcp_info (linux/tcp.h) has tcpi_notsent_bytes."""


@contextmanager
def closed_port() -> Iterator[Endpoint]:
    """An address that nobody listens at, and nobody else is given meanwhile."""
    with closing(socket.socket()) as bound:
        bound.bind(("127.0.0.1", 0))
        yield Endpoint("127.0.0.1", bound.getsockname()[1])


def descriptors(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/fd").iterdir())


def streams(pid: int, port: int) -> list[socket.socket]:
    """A process's own connections to a port: the sockets themselves, not what is said of them."""
    found: list[socket.socket] = []
    libc = ctypes.CDLL(None, use_errno=True)
    process = os.pidfd_open(pid)
    try:
        for path in descriptors(pid):
            if not re.fullmatch(r"socket:\[\d+\]", str(path.readlink())):
                continue
            taken = libc.syscall(_PIDFD_GETFD, process, int(path.name), 0)
            if taken < 0:
                pytest.skip(f"sockets of other processes cannot be looked at here: {os.strerror(ctypes.get_errno())}")
            one = socket.socket(fileno=taken)
            connected = one.family == socket.AF_INET and not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if connected and one.getpeername()[1] == port:
                found.append(one)
            else:
                one.close()
    finally:
        os.close(process)
    return found


@no_qemu
@pytest.mark.qemu
@pytest.mark.parametrize("channels", [0, 2])
async def test_no_stream_waits_for_the_acknowledgement_of_what_was_sent_before(tmp_path: Path, channels: int) -> None:
    """Nagle's algorithm is off in every connection that carries the end of a migration: 40 ms of a guest's blackout."""
    pair = Pair(QemuEngine(image()), tmp_path)
    try:
        source = await pair.source()
        destination = await pair.engine.prepare_incoming(replace(pair.spec("d"), multifd_channels=channels), "m", 1)
        pair.vmms.append(destination)
        where = stream_of(destination.metadata)
        await source.start_outgoing(OutgoingOptions(where, HoldStart.TRICKLE, 0, LINK, 300, channels))
        await until(source, lambda now: now.status is EngineStatus.ACTIVE)
        found: list[socket.socket] = []
        async with asyncio.timeout(20):
            while len(found) < (channels + 1 if channels else 1):
                await asyncio.sleep(0.01)
                found = streams(source.metadata.pid, where.port)
        without_delay = [bool(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) for one in found]
        for one in found:
            one.close()
        # Beside the others QEMU's first channel carries no memory: nothing unacknowledged comes before its end.
        assert without_delay.count(True) == max(1, channels), without_delay
    finally:
        for vmm in pair.vmms:
            await vmm.destroy()


@no_qemu
@pytest.mark.qemu
async def test_what_waits_in_the_kernel_when_the_guest_stops_is_little(tmp_path: Path) -> None:
    """QEMU takes it for sent, and the guest stands still until it is: no more than a link carries in a few ms.

    The destination is frozen, so that everything that the source's kernel takes stays where it can be counted.
    """
    pair = Pair(QemuEngine(image()), tmp_path)
    link_bytes_per_s = 125_000_000
    try:
        source, destination = await pair.source(memory_mib=256, static_mib=160), await pair.destination(memory_mib=256)
        where = stream_of(destination.metadata)
        await asyncio.sleep(1.0)
        freeze(pair, destination)
        await source.start_outgoing(OutgoingOptions(where, HoldStart.OPEN, 0, link_bytes_per_s, 300))
        await asyncio.sleep(1.0)
        (found,) = streams(source.metadata.pid, where.port)
        with closing(found):
            info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        (not_sent_bytes,) = struct.unpack_from("=I", info, _NOTSENT_BYTES)
        print(f"{not_sent_bytes} bytes wait")
        assert 0 < not_sent_bytes <= 512 << 10
        assert (await source.abort()).run_state is RunState.RUNNING
    finally:
        for vmm in pair.vmms:
            await vmm.destroy()


async def test_a_stream_that_nobody_takes_is_refused_at_once_and_another_destination_takes_it(pair: Pair) -> None:
    source = await pair.source()
    with closed_port() as nobody, pytest.raises(EngineError, match=f"does not take the stream at {nobody}"):
        await source.start_outgoing(OutgoingOptions(nobody, HoldStart.OPEN, 0, LINK, 300))
    now = await source.state()
    assert (now.run_state, now.status) == (RunState.RUNNING, EngineStatus.NONE)
    assert (await source.abort()).run_state is RunState.RUNNING, "as an attempt does that failed"
    destination = await pair.destination()
    await source.start_outgoing(options(destination))
    await until(source, lambda now: now.status is EngineStatus.PARKED)
    await source.proceed()
    await until(source, lambda now: now.status is EngineStatus.COMPLETED)


async def test_a_destination_that_never_answers_is_given_up_in_time() -> None:
    """The queue of what nobody accepts is full, so that the kernel answers no more."""
    with closing(socket.socket()) as silent, closing(socket.socket()) as first, closing(socket.socket()) as second:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for queued in (first, second):
            queued.setblocking(False)
            queued.connect_ex(silent.getsockname())
        with pytest.raises(EngineError, match=r"no answer in 0\.3 s"):
            await stream.opened(Endpoint("127.0.0.1", silent.getsockname()[1]), LINK, 0.3)


@no_qemu
@pytest.mark.qemu
async def test_attempts_that_end_early_leave_no_descriptor_behind(tmp_path: Path) -> None:
    pair = Pair(QemuEngine(image()), tmp_path)
    try:
        source = await pair.source()
        assert isinstance(source, QemuVmm)

        async def attempts() -> tuple[int, int]:
            for number in range(5):
                with closed_port() as nobody, pytest.raises(EngineError):
                    await source.start_outgoing(OutgoingOptions(nobody, HoldStart.OPEN, 0, LINK, 300))
                destination = await pair.destination(f"d{number}")
                await source.start_outgoing(options(destination, HoldStart.TRICKLE))
                with pytest.raises(EngineError, match="migrat"):  # refused by QEMU itself, after it was given a stream
                    await source._migrate(stream_of(destination.metadata), options(destination))
                await source.abort()
                await destination.destroy()
            return len(descriptors(os.getpid())), len(descriptors(source.metadata.pid))

        assert await attempts() == await attempts()
        assert (await source.state()).run_state is RunState.RUNNING
    finally:
        for vmm in pair.vmms:
            await vmm.destroy()


async def adopted(pair: Pair, vmm: Vmm) -> Vmm:
    """By the agent's successor; the agent that held it is gone."""
    metadata = vmm.metadata
    await vmm.detach()
    pair.vmms.remove(vmm)
    found = await pair.engine.adopt(metadata, pair.spec(metadata.inc))
    assert found is not None
    pair.vmms.append(found)
    return found


async def test_a_stream_outlives_the_agent_that_opened_it_and_its_successor_ends_it(pair: Pair) -> None:
    source, destination = await pair.source(), await pair.destination()
    await source.start_outgoing(options(destination, HoldStart.TRICKLE))
    await until(source, lambda now: now.status is EngineStatus.ACTIVE)
    source = await adopted(pair, source)
    assert (await source.state()).status is EngineStatus.ACTIVE
    after = await source.abort()
    assert (after.run_state, after.status) == (RunState.RUNNING, EngineStatus.CANCELLED)
    another = await pair.destination("another")
    await source.start_outgoing(options(another))
    await until(source, lambda now: now.status is EngineStatus.PARKED)


@pytest.mark.parametrize("held", [HoldStart.TRICKLE, HoldStart.OPEN])
async def test_a_frozen_destination_never_holds_an_abort_up(pair: Pair, held: HoldStart) -> None:
    """While memory is sent (the stream is full), and after the last pass has begun: freed by an out-of-band yank."""
    source, destination = await pair.source(memory_mib=256, static_mib=160), await pair.destination(memory_mib=256)
    if held is HoldStart.TRICKLE:
        freeze(pair, destination)
        await source.start_outgoing(options(destination, held))
        await source.release()
    else:
        await source.start_outgoing(options(destination))
        await until(source, lambda now: now.status is EngineStatus.PARKED)
        freeze(pair, destination)
        await source.proceed()
    await asyncio.sleep(0.2)
    after = await source.abort()
    assert (after.run_state, after.status) == (RunState.RUNNING, EngineStatus.CANCELLED)
