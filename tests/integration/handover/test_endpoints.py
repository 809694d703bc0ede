"""Orders that would send a guest's memory somewhere else, or have QEMU run a command: refused before anything happens.

`endpoint` of an order, or of a destination's answer, went to QEMU as it was given; `exec:` ran as root on the source.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.lab.cluster import network
from orchestrator.core import handover
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import AbortReason
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.ledger import paths
from orchestrator.ledger.store import Done
from tests.fakes.cluster import ROOT
from tests.integration.handover.scene import Born, Scene

pytestmark = [
    pytest.mark.integration,
    pytest.mark.zookeeper,
    pytest.mark.qemu,
]

CALLS = """
import asyncio, sys
import grpc
from orchestrator.rpc import channels
from protos.drover.v1 import agent_pb2 as pb, agent_pb2_grpc as rpc

address, ip, peer_port, guest, migration, attempt, epoch, host, boot_id, proof = sys.argv[1:]

def order(stream, peer, extra=b""):
    request = pb.ConductAttemptRequest(
        guest_uuid=guest, migration=migration, attempt=int(attempt), epoch=int(epoch), inc="e" * 16, destination=host,
        destination_boot_id=boot_id, stream=stream, peer=peer,
    )
    return pb.ConductAttemptRequest.FromString(request.SerializeToString() + extra)

def old(number, text):  # the fields that once were strings
    return bytes([number << 3 | 2, len(text)]) + text.encode()

E = pb.Endpoint
true_peer = E(ip=ip, port=int(peer_port))
exec_ = f"exec:id>{proof}"
orders = {
    "exec in the old field": order(None, None, old(8, exec_) + old(9, f"{ip}:{peer_port}")),
    "exec as an address": order(E(ip=exec_, port=1), true_peer),
    "file as an address": order(E(ip=f"file:{proof}", port=1), true_peer),
    "another host": order(E(ip="10.99.99.99", port=4444), true_peer),
    "loopback": order(E(ip="127.0.0.1", port=4444), true_peer),
    "another peer": order(E(ip=ip, port=4444), E(ip="10.99.99.99", port=int(peer_port))),
    "another port of the peer": order(E(ip=ip, port=4444), E(ip=ip, port=1)),
}

async def main():
    async with channels.aio_channel(address) as channel:
        stub = rpc.AgentServiceStub(channel)
        for name, request in orders.items():
            try:
                await stub.ConductAttempt(request, timeout=5)
                print(f"{name}: accepted")
            except grpc.RpcError as error:
                print(f"{name}: {error.code().name} {error.details()}")

asyncio.run(main())
"""


def test_memory_goes_only_to_the_registered_destination(scene: Scene, tmp_path: Path) -> None:
    guest = scene.guest()
    there = scene.host_record(scene.there)
    source = scene.host_record(scene.here)
    peer = Endpoint.parse(there.peer_address)
    proof = Path("/tmp") / f"proof-{guest.uuid[:8]}"
    migration = secrets.token_hex(6)
    opened = change(
        scene,
        guest,
        lambda record: handover.open_attempt(
            record, migration, 1, HostRef(scene.there, there.boot_id), epoch=scene.epoch(), writer="test"
        ),
    )
    try:
        about = [guest.uuid, migration, opened.attempt, scene.epoch(), scene.there, there.boot_id, proof]
        program = [sys.executable, "-c", CALLS, source.control_address, peer.ip, str(peer.port), *map(str, about)]
        command = network.command_in(scene.cluster.places.management_namespace, program)
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT, check=False)
        print(done.stdout, done.stderr)
        assert done.returncode == 0
        told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
        assert len(told) == 7
        assert {name: said.split()[0] for name, said in told.items()} == {
            "exec in the old field": "INVALID_ARGUMENT",
            "exec as an address": "INVALID_ARGUMENT",
            "file as an address": "INVALID_ARGUMENT",
            "another host": "FAILED_PRECONDITION",
            "loopback": "FAILED_PRECONDITION",
            "another peer": "FAILED_PRECONDITION",
            "another port of the peer": "FAILED_PRECONDITION",
        }
        assert "which has registered" in told["another host"]
        assert scene.record(guest).inc == "", "nothing was bound"
        assert not proof.exists()
        beats = scene.beats(guest)
        scene.reach(lambda: scene.beats(guest) > beats, "the guest runs on")
    finally:
        change(scene, guest, lambda record: handover.abort(record, migration, 1, AbortReason.CANCELLED, writer="test"))
        change(scene, guest, lambda record: handover.close(record, migration, writer="test"))
    scene.succeeded(scene.migrate(guest, scene.there))


def change(scene: Scene, guest: Born, how: Callable[[GuestRecord], GuestRecord]) -> GuestRecord:
    """What the coordinator would write: an attempt that nobody conducts yet."""
    found = scene.observer.run(scene.observer.ledger.read(GuestRecord, paths.guest(guest.uuid)))
    assert found is not None
    after = how(found[0])
    done = scene.observer.run(scene.observer.ledger.cas(paths.guest(guest.uuid), after, found[1]))
    assert isinstance(done, Done)
    return after


@pytest.mark.rule("H2")
def test_a_guest_that_was_never_given_away_is_kept(scene: Scene) -> None:
    """Whoever reached ZooKeeper gave a guest away, and its owner killed the only copy within a second."""
    guest = scene.guest()
    there = HostRef(scene.there, scene.host_record(scene.there).boot_id)
    true = scene.record(guest)
    forged = replace(true, owner=there, source=true.owner, inc="deadbeefdeadbeef")
    change(scene, guest, lambda _: replace(forged, phase=Ownership.IDLE))
    try:
        scene.hold_on(2.0)
        # A restarted agent knows as much.
        scene.kill_agent(scene.here)
        scene.agents_are_back()
        beats = scene.beats(guest, scene.here)
        scene.reach(lambda: scene.beats(guest, scene.here) > beats + 20, "the guest runs on")
        assert [vmm.host for vmm in scene.vmms(guest)] == [scene.here]
        log = scene.layout.host(scene.here) / "agent.log"
        scene.reach(lambda: "to whom it was never sent from here" in log.read_text(), "the agent says so")
    finally:
        change(scene, guest, lambda now: replace(true, writer="test"))
    scene.succeeded(scene.migrate(guest, scene.there))
