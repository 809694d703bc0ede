"""Memory and disks between two QEMUs by TLS: who is taken for whom, and that a stranger at the port is nobody."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from agents.engine.base import (
    DiskReady,
    EngineError,
    EngineStatus,
    HoldStart,
    OutgoingOptions,
    RunState,
    Vmm,
    stream_of,
)
from agents.engine.qemu.engine import QemuEngine
from agents.engine.qemu.vmm import QemuVmm
from agents.host.streams import Streams, agreed
from orchestrator.core.errors import DroverError
from tests.contract.test_engine import LINK, Pair, image, no_qemu, until
from tests.contract.test_engine_disks import Lab
from tests.fakes.certificates import Certificates

pytestmark = [no_qemu, pytest.mark.qemu]


class Secure(Pair):
    """Two hosts with a certificate each, and a third that has one as well."""

    def __init__(self, directory: Path) -> None:
        super().__init__(QemuEngine(image()), directory)
        certificates = Certificates(directory / "pki")
        names = ("host-1", "host-2", "host-3")
        self.streams = {name: Streams(certificates.host(name), directory / f"tls-{name}") for name in names}

    async def waiting(self, inc: str, *, sender: str = "host-1", channels: int = 0) -> QemuVmm:
        tls = self.streams["host-2"].from_host(sender)
        made = await self.engine.prepare_incoming(
            replace(self.spec(inc), multifd_channels=channels, tls=tls), "m", len(self.vmms) + 1
        )
        self.vmms.append(made)
        assert isinstance(made, QemuVmm)
        return made

    def options(self, to: QemuVmm, *, name: str = "host-2", channels: int = 0) -> OutgoingOptions:
        tls = self.streams["host-1"].to_host(name)
        return OutgoingOptions(
            stream_of(to.metadata), HoldStart.OPEN, 0, LINK, 300, channels, tls=tls, copy=to.metadata.inc
        )


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Secure]:
    pair = Secure(tmp_path)
    yield pair
    for vmm in pair.vmms:
        await vmm.destroy()


async def moved(source: Vmm, destination: Vmm) -> None:
    await until(source, lambda now: now.status is EngineStatus.PARKED)
    await source.proceed()
    await until(source, lambda now: now.status is EngineStatus.COMPLETED)
    await until(destination, lambda now: now.status is EngineStatus.COMPLETED)


def stranger(port: int, says: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), 5)
    with contextlib.suppress(OSError):
        made.sendall(says)
    return made


async def test_a_guest_goes_by_tls_past_strangers_that_were_first_at_the_port(hosts: Secure) -> None:
    """Some that say nothing, what a source without TLS would, garbage: the stream still comes in."""
    source = await hosts.source()
    destination = await hosts.waiting("d")
    port = stream_of(destination.metadata).port
    noise = random.Random(1).randbytes(200_000)
    met = [
        stranger(port, says) for says in (b"", b"QEVM\0\0\0\3" + bytes(4096), noise, b"\x16\x03\x01\x02\0" + noise, b"")
    ]
    try:
        await source.start_outgoing(hosts.options(destination))
        await moved(source, destination)
    finally:
        for one in met:
            one.close()
    # And on: the guest that came by TLS leaves by TLS, and without.
    await destination.resume()
    back = await hosts.waiting("e")
    await destination.start_outgoing(hosts.options(back))
    await moved(destination, back)
    await back.resume()
    plain = await hosts.engine.prepare_incoming(hosts.spec("f"), "m", 9)
    hosts.vmms.append(plain)
    await back.start_outgoing(OutgoingOptions(stream_of(plain.metadata), HoldStart.OPEN, 0, LINK, 300))
    await moved(back, plain)


async def test_several_channels_go_by_tls(hosts: Secure) -> None:
    source = await hosts.source()
    destination = await hosts.waiting("d", channels=2)
    await source.start_outgoing(hosts.options(destination, channels=2))
    await moved(source, destination)


@pytest.mark.parametrize("wrong", ["another source", "another destination", "no TLS at the source"])
async def test_another_host_of_the_cluster_is_refused_and_the_guest_runs_on(hosts: Secure, wrong: str) -> None:
    source = await hosts.source()
    destination = await hosts.waiting("d", sender="host-3" if wrong == "another source" else "host-1")
    chosen = hosts.options(destination, name="host-3" if wrong == "another destination" else "host-2")
    if wrong == "no TLS at the source":
        chosen = replace(chosen, tls=None)
    with contextlib.suppress(EngineError):
        await source.start_outgoing(chosen)
        if wrong != "no TLS at the source":  # there QEMU goes on waiting for an answer; the attempt's own bound ends it
            await until(source, lambda now: now.status is EngineStatus.FAILED)
    assert (await destination.state()).status is not EngineStatus.COMPLETED
    assert (await source.abort()).run_state is RunState.RUNNING
    right = await hosts.waiting("e")
    await source.start_outgoing(hosts.options(right))
    await moved(source, right)


async def test_a_renewed_certificate_holds_for_the_next_stream(hosts: Secure, tmp_path: Path) -> None:
    """QEMU reads it at the beginning of a stream: one that is no good any more costs an attempt and no restart."""
    source = await hosts.source()
    key = tmp_path / "pki" / "host" / "host-1" / "key.pem"
    whole = key.read_bytes()
    key.write_bytes(b"nothing\n")
    destination = await hosts.waiting("d")
    with pytest.raises(EngineError):
        await source.start_outgoing(hosts.options(destination))
    assert (await source.abort()).run_state is RunState.RUNNING
    key.write_bytes(whole)
    await source.start_outgoing(hosts.options(destination))
    await moved(source, destination)


async def test_a_disk_goes_by_tls_and_only_from_its_host(tmp_path: Path) -> None:
    disks = Lab(tmp_path)
    certificates = Certificates(tmp_path / "pki")
    names = ("host-1", "host-2", "host-3")
    streams = {name: Streams(certificates.host(name), tmp_path / f"tls-{name}") for name in names}
    try:
        source, (daemon, target) = await disks.source(), await disks.target(tls=streams["host-2"].from_host("host-1"))
        met = [stranger(target.endpoint.port, says) for says in (b"", b"\0" * 5000, b"NBDMAGIC")]
        with pytest.raises(EngineError):
            await source.disks.connect_disk(replace(target, tls=streams["host-3"].to_host("host-2")))
        await source.disks.connect_disk(replace(target, tls=streams["host-1"].to_host("host-2")))
        await source.disks.start_mirror("root")
        await disks.until(DiskReady)
        await source.pause()
        await source.disks.drain(20)
        for one in met:
            one.close()
        await daemon.release("root", target.image)
        assert disks.identical()
    finally:
        await disks.close()


def test_nothing_goes_unprotected_because_one_of_two_says_so(tmp_path: Path) -> None:
    streams = Streams(Certificates(tmp_path).host("h1"), tmp_path / "tls")
    assert agreed(None, "h2", offered=False) is None
    secure = agreed(streams, "h2", offered=True)
    assert secure is not None
    assert secure.peer == "h2.host.lab.drover"
    for mine, offered in ((streams, False), (None, True)):
        with pytest.raises(DroverError, match="TLS"):
            agreed(mine, "h2", offered=offered)
