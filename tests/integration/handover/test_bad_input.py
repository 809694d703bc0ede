"""Nonsense at every interface of a running cluster: a clear answer where there is one to give, and nothing is lost.

What each file format refuses stands in the unit tests beside its code (guest file, scenario, configurations, options).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from deploy.lab.cluster import network
from deploy.lab.devices.scenario_text import late_ack
from orchestrator import wire
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.policy import MigrationPolicy
from orchestrator.core.records import Boot, DeviceSpec, GuestSpec, Reservation, ShimKind, WantRun
from orchestrator.ledger import paths
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import Create, Delete, Done, SetData
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub
from tests.fakes.cluster import ROOT
from tests.integration.handover.scene import Scene, device, noted

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

WRONG = RefusalReason.INVALID_ARGUMENT
NOT_FOUND = RefusalReason.NOT_FOUND
GOOD = GuestSpec("never-born")

Call = Callable[[OrchestratorClient, str], object]
"""With a guest that exists."""

REFUSED: dict[str, tuple[Call, RefusalReason, str]] = {
    "no name": (lambda c, g: c.create_guest(replace(GOOD, name="")), WRONG, "spec.name"),
    "a name that is no label": (lambda c, g: c.create_guest(replace(GOOD, name="../x")), WRONG, "spec.name"),
    "a name that is taken": (lambda c, g: c.create_guest(replace(GOOD, name=g)), RefusalReason.ALREADY_EXISTS, ""),
    "more memory than there is": (
        lambda c, g: c.create_guest(replace(GOOD, memory_mib=1 << 21)),
        WRONG,
        "spec.memory_mib",
    ),
    "too much memory": (lambda c, g: c.create_guest(replace(GOOD, memory_mib=9000)), RefusalReason.NO_CAPACITY, ""),
    "fewer CPUs than none": (lambda c, g: c.create_guest(replace(GOOD, vcpus=-1)), WRONG, "spec.vcpus"),
    "no such machine": (
        lambda c, g: c.create_guest(replace(GOOD, machine="z80")),
        RefusalReason.MACHINE_TYPE_MISMATCH,
        "",
    ),
    "a file of the host as its kernel": (
        lambda c, g: c.create_guest(replace(GOOD, boot=Boot(kernel="../../etc/shadow"))),
        WRONG,
        "spec.boot.kernel",
    ),
    "a device that writes memory": (
        lambda c, g: c.create_guest(replace(GOOD, devices=(DeviceSpec("d", ShimKind.COMPANION, dma="full"),))),
        WRONG,
        "spec.devices[0].dma",
    ),
    "a scenario that is none": (
        lambda c, g: c.create_guest(replace(GOOD, devices=(device("d", "asks: [{at: never}]"),))),
        WRONG,
        "spec.devices[0].options.scenario.asks[0].at",
    ),
    "a policy without attempts": (
        lambda c, g: c.create_guest(replace(GOOD, policy=MigrationPolicy(max_attempts=0))),
        WRONG,
        "spec.policy.max_attempts",
    ),
    "on no host": (lambda c, g: c.create_guest(GOOD, "host-9"), NOT_FOUND, "host"),
    "a request id that is none": (lambda c, g: c.create_guest(GOOD, request_id="a b"), WRONG, "request_id"),
    "no guest": (lambda c, g: c.get_guest("nobody"), NOT_FOUND, "name"),
    "a path for a guest": (lambda c, g: c.get_guest("../hosts"), WRONG, "name"),
    "no guest to pause": (lambda c, g: c.pause_guest("nobody"), NOT_FOUND, "name"),
    "no guest to stop": (lambda c, g: c.stop_guest("nobody"), NOT_FOUND, "name"),
    "no guest to move": (lambda c, g: c.create_migration("nobody"), NOT_FOUND, "guest"),
    "to no host": (lambda c, g: c.create_migration(g, "host-9"), NOT_FOUND, "destination"),
    "to where it is": (lambda c, g: c.create_migration(g, c.get_guest(g).host), WRONG, "destination"),
    "a policy field that is none": (lambda c, g: c.create_migration(g, policy={"speed": 1}), WRONG, "policy.speed"),
    "a policy word that is none": (
        lambda c, g: c.create_migration(g, policy={"on_timeout": "panic"}),
        WRONG,
        "policy.on_timeout",
    ),
    "a time below zero": (
        lambda c, g: c.create_migration(g, policy={"precopy_timeout_ms": -1}),
        WRONG,
        "policy.precopy_timeout_ms",
    ),
    "no migration": (lambda c, g: c.get_migration("0123456789ab"), NOT_FOUND, "name"),
    "a path for a migration": (lambda c, g: c.cancel_migration("../../guests"), NOT_FOUND, "name"),
    "no host": (lambda c, g: c.get_host("host-9"), NOT_FOUND, "name"),
    "no host to cordon": (lambda c, g: c.cordon_host("host-9"), NOT_FOUND, "name"),
    "no host to empty": (lambda c, g: c.create_evacuation("host-9"), NOT_FOUND, "host"),
    "less than none at a time": (lambda c, g: c.create_evacuation("host-1", -1), WRONG, "max_concurrent"),
    "no evacuation": (lambda c, g: c.cancel_evacuation("0123456789ab"), NOT_FOUND, "name"),
    "an option that is none": (
        lambda c, g: c.create_guest(replace(GOOD, devices=(replace(device("d"), options={"colour": "red"}),))),
        WRONG,
        "spec.devices[0].options.colour",
    ),
    "an instruction to no device": (lambda c, g: c.instruct_device(g, "tpm", late_ack("freeze")), NOT_FOUND, "device"),
    "an instruction without words": (lambda c, g: c.instruct_device(g, "dpu", " "), WRONG, "instruction"),
    "an instruction at no hook": (lambda c, g: c.instruct_device(g, "dpu", late_ack("lunch")), WRONG, "instruction"),
    "an instruction too often": (
        lambda c, g: c.instruct_device(g, "dpu", late_ack("freeze", 10**6)),
        WRONG,
        "instruction",
    ),
    "an instruction of megabytes": (lambda c, g: c.instruct_device(g, "dpu", "x" * 200_000), WRONG, "instruction"),
}


def test_requests_are_refused_with_reason_and_field(scene: Scene) -> None:
    guest = scene.guest(device())
    wrong: list[str] = []
    for what, (call, reason, field) in REFUSED.items():
        try:
            answer = call(scene.client, guest.name)
            wrong.append(f"{what}: answered {answer}")
        except DroverError as error:
            print(f"{what}: {error}")
            fields = [each for each, _ in error.violations]
            if error.reason is not reason or (field and fields != [field]) or "\n" in error.message:
                wrong.append(f"{what}: {error.reason} {fields} {error.message}")
    assert not wrong, "\n".join(wrong)
    assert [each.name for each in scene.client.list_guests()] == [guest.name], "nothing was made on the way"


def test_a_request_id_means_one_request(scene: Scene) -> None:
    guest = scene.guest()
    once = f"once-{guest.uuid}"
    first = scene.client.create_migration(guest.name, scene.there, request_id=once).name
    assert scene.client.create_migration(guest.name, scene.there, request_id=once).name == first
    other = scene.answer(lambda: scene.client.create_migration(guest.name, scene.third, request_id=once))
    assert other == RefusalReason.REQUEST_ID_REUSED
    scene.succeeded(first)


def test_a_guest_that_is_on_its_way_is_not_moved_or_ended_beside_that(scene: Scene) -> None:
    guest = scene.guest(device("dpu", "delays: [{call: load, ms: 2500, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach_device(guest, scene.here, "PRE_COPY")
    second = scene.answer(lambda: scene.client.create_migration(guest.name, scene.third))
    assert second == RefusalReason.GUEST_IS_MIGRATING
    scene.succeeded(migration)


def test_calls_without_a_deadline_are_refused(scene: Scene) -> None:
    with grpc.insecure_channel(scene.cluster.api) as channel, pytest.raises(grpc.RpcError) as refused:
        OrchestratorServiceStub(channel).ListHosts(pb.ListHostsRequest())
    assert "deadline" in str(refused.value)


NOISE = [
    b"",
    b"\0" * 64,
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(200),
    b"\xff\xff\xff\xff\xff\xff\xff\xff" + b"x" * 100,
    b"\0\0\0\x06\0\0\0\x02[]",
    b'\0\0\0\x15\0\0\0\x11{"id":1,"call":2}',
    b"R 0 zzzz\nR ffffffffffff 1\nA\n" + b"R" * 100_000,
    b'{"op": "ask"}\n{"op": 7}\n[]\n{\n' + b"\xfe" * 300,
]


def shout(path: Path | tuple[str, int], noise: bytes) -> None:
    """Say it, hear what there is to hear for a moment, and go."""
    family = socket.AF_UNIX if isinstance(path, Path) else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(0.2)
        try:
            connection.connect(str(path) if isinstance(path, Path) else path)
            connection.sendall(noise)
            connection.recv(4096)
        except OSError:
            return


def test_noise_at_every_socket(scene: Scene) -> None:
    """Of the API, the collector, the cluster process, both services of the agents, and the devices of a guest."""
    guest = scene.guest(device())
    layout, places = scene.layout, scene.cluster.places
    sockets: list[Path | tuple[str, int]] = [layout.api_socket, layout.dir / "collector.sock", layout.supervisor_socket]
    folder = layout.host(scene.here) / "guests" / guest.uuid[:16]
    sockets += sorted(folder.glob("*.ctl"))
    sockets += [(places.management_address, places.api_port)]
    for host in places.hosts:
        sockets += [(host.address, places.control_port), (host.address, places.peer_port)]
    before = {part.name: part.pid for part in scene.cluster.status().parts}

    def all_of_it() -> None:
        for path in sockets:
            for noise in NOISE:
                shout(path, noise)

    scene.cluster.inside(all_of_it)
    now = scene.cluster.status()
    assert {part.name: part.pid for part in now.parts} == before, "nothing died of it"
    assert now.healthy, now
    scene.succeeded(scene.migrate(guest, scene.there))


PEER_CALLS = """
import asyncio, sys
import grpc
from orchestrator.rpc import channels
from protos.drover.v1 import agent_pb2 as pb, agent_pb2_grpc as rpc

async def main(address, peer, guest, migration, attempt, inc):
    told = []
    async def said(what, call):
        try:
            told.append(f"{what}: {await call}".replace(chr(10), " "))
        except grpc.RpcError as error:
            told.append(f"{what}: {error.code().name} {error.details()}")
    tags = {
        "nothing": pb.AttemptTag(),
        "no such attempt": pb.AttemptTag(guest_uuid=guest, migration=migration, attempt=attempt + 1, inc=inc),
        "another process": pb.AttemptTag(guest_uuid=guest, migration=migration, attempt=attempt, inc="f" * 16),
    }
    async with channels.aio_channel(peer) as channel:
        stub = rpc.PeerServiceStub(channel)
        for name, tag in tags.items():
            await said(f"loaded {name}", stub.ReportLoaded(pb.ReportLoadedRequest(tag=tag), timeout=3))
            await said(f"go {name}", stub.Go(pb.GoRequest(tag=tag), timeout=3))
            await said(f"done {name}", stub.ReportDone(pb.ReportDoneRequest(tag=tag), timeout=3))
            await said(f"failed {name}", stub.ReportFailed(pb.ReportFailedRequest(tag=tag), timeout=3))
            frames = iter([pb.TransferDevicesRequest(tag=tag, device="dpu", kind=3, data=b"x" * 999)])
            async def first(stream):
                return await stream.read()
            await said(f"frames {name}", first(stub.TransferDevices(frames, timeout=3)))
    async with channels.aio_channel(address) as channel:
        stub = rpc.AgentServiceStub(channel)
        await said("start nobody", stub.StartGuest(pb.StartGuestRequest(guest_uuid="nobody"), timeout=3))
        await said("end nobody", stub.EndGuest(pb.EndGuestRequest(guest_uuid="../../etc"), timeout=3))
        await said("end one that moves", stub.EndGuest(pb.EndGuestRequest(guest_uuid=guest), timeout=3))
        here = pb.Endpoint(ip="127.0.0.1", port=1)
        prepare = pb.PrepareDestinationRequest(
            guest_uuid=guest, migration=migration, attempt=attempt + 1, epoch=0, source_peer=here
        )
        await said("prepare under an old epoch", stub.PrepareDestination(prepare, timeout=3))
        conduct = pb.ConductAttemptRequest(guest_uuid=guest, migration=migration, attempt=attempt, epoch=0, inc=inc,
            stream=here, peer=here)
        await said("conduct under an old epoch", stub.ConductAttempt(conduct, timeout=3))
    print(chr(10).join(told))

address, peer, guest, migration, attempt, inc = sys.argv[1:]
asyncio.run(main(address, peer, guest, migration, int(attempt), inc))
"""


def test_calls_between_agents_that_mean_no_attempt_of_theirs(scene: Scene) -> None:
    """In the middle of one: what is said of another attempt or process moves nothing."""
    guest = scene.guest(device("dpu", "delays: [{call: load, ms: 3000, times: 1}]"))
    migration = scene.migrate(guest, scene.there)
    scene.reach(lambda: scene.record(guest).inc, "an attempt that is bound")
    scene.reach_device(guest, scene.here, "PRE_COPY")
    record = scene.record(guest)
    about = [guest.uuid, migration, str(record.attempt), record.inc]
    for host in (scene.here, scene.there):
        known = scene.host_record(host)
        program = [sys.executable, "-c", PEER_CALLS, known.control_address, known.peer_address, *about]
        command = network.command_in(scene.cluster.places.management_namespace, program)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        print(done.stdout)
        assert done.returncode == 0, done.stderr
        told = [line.split(": ", 1)[1].split()[0] for line in done.stdout.splitlines()]
        assert set(told) <= {"FAILED_PRECONDITION", "NOT_FOUND", "INVALID_ARGUMENT"}
    over = scene.succeeded(migration)
    assert [report.outcome for report in over.attempts] == ["COMMITTED"]


def put(scene: Scene, path: str, content: bytes) -> None:
    """Whatever stands there by now."""

    def written() -> bool:
        now = scene.observer.run(scene.observer.store.read(path))
        assert now
        result = scene.observer.run(scene.observer.store.multi([SetData(path, content, now.version)]))
        return isinstance(result, Done)

    scene.reach(written, f"a write of {path}")


@pytest.mark.parametrize("node", ["record", "wish", "specification", "host", "promise"])
def test_a_node_that_cannot_be_read(scene: Scene, node: str) -> None:
    """Nothing is done to what it is about, and it is named; once it is mended everything goes on."""
    guest, other = scene.guest(device()), scene.guest()
    path = {
        "record": paths.guest(guest.uuid),
        "wish": paths.want_run(guest.uuid),
        "specification": paths.guest_spec(guest.uuid),
        "host": paths.host(scene.there),
        "promise": paths.reservation(scene.there, "somebody"),
    }[node]
    if node == "promise":
        made = scene.observer.run(scene.observer.store.multi([Create(path, encode(Reservation(1)))]))
        assert isinstance(made, Done)
    found = scene.observer.run(scene.observer.store.read(path))
    assert found
    for content in (b"", b"{", b'{"phase": "OPEN"}', os.urandom(50)):
        put(scene, path, content)
        said = scene.answer(lambda: scene.client.create_migration(guest.name, scene.there))
        # GUEST_IS_MIGRATING: the one before is cancelled, and settles once the promise to it can be taken back.
        known = (RefusalReason.INTERNAL, RefusalReason.NOT_FOUND, RefusalReason.HOST_NOT_LIVE)
        assert said in (*known, RefusalReason.GUEST_IS_MIGRATING, ""), said
        if not said:
            scene.cancel_all()
    scene.kill_agent(scene.here)  # its successor begins with what it finds
    scene.agents_are_back()
    beats = scene.beats(guest), scene.beats(other)
    scene.reach(lambda: scene.beats(guest) > beats[0] and scene.beats(other) > beats[1], "heartbeats of both")
    put(scene, path, found.data)
    scene.reach(lambda: scene.record(guest).phase is Ownership.IDLE, "a guest at rest")
    for each in (guest, other):
        scene.succeeded(scene.reach(lambda each=each: scene.migrate(each, scene.there), "a migration"))
    print(wire.word(scene.client.pause_guest(guest.name), "wish"))
    if node == "promise":
        there = scene.observer.run(scene.observer.store.read(path))
        assert there is not None
        assert isinstance(scene.observer.run(scene.observer.store.multi([Delete(path, there.version)])), Done)


def test_an_agent_sees_what_is_written_after_what_it_could_not_read(scene: Scene) -> None:
    """A wish that is only recorded, as while the API cannot reach the agent, is followed all the same."""
    guest = scene.guest()
    for content in (b"{", encode(WantRun(run=False, by="test", sequence=7))):
        scene.hold_on(0.5)  # for the agent to watch, and to see each of them
        put(scene, paths.want_run(guest.uuid), content)

    def silent() -> bool:
        before = scene.beats(guest)
        scene.hold_on(0.3)
        return scene.beats(guest) == before

    scene.reach(silent, "a paused guest")


def test_files_that_an_agent_cannot_read(scene: Scene) -> None:
    """Its journal, its lock and what it noted of devices are spoiled while it is away: its guests run on."""
    guest = scene.guest(device())
    scene.succeeded(scene.migrate(guest, scene.there))
    scene.succeeded(scene.migrate(guest, scene.here))
    folder = scene.layout.host(scene.here)
    spoiled = [*folder.glob("journal/*.json"), *folder.glob("journal/attempts/*.json"), folder / "agent.lock"]
    assert len(spoiled) >= 3
    for path in spoiled:
        path.write_bytes(b"\xff{")
    (folder / "guests" / "not-a-guest").mkdir()
    (folder / "guests" / "not-a-guest" / "guest.json").write_text("{}")
    (folder / "volatile" / "not-a-marker").touch()
    scene.kill_agent(scene.here)
    scene.agents_are_back()
    (folder / "guests" / "not-a-guest" / "guest.json").unlink()
    (folder / "guests" / "not-a-guest").rmdir()
    (folder / "volatile" / "not-a-marker").unlink()
    assert scene.longest_stop_ms(guest) < 1000
    scene.succeeded(scene.migrate(guest, scene.there))


@pytest.mark.parametrize("lost", ["guest.json", "note"])
def test_a_note_of_a_guest_that_cannot_be_read(scene: Scene, lost: str) -> None:
    """Its agent cannot know whether the guest runs, so it does nothing, and goes on when the note is mended."""
    guest = scene.guest(device())
    (vmm,) = scene.vmms(guest)
    folder = scene.layout.host(scene.here) / "guests" / guest.uuid[:16]
    note = folder / (lost if lost == "guest.json" else f"{vmm.inc}.json")
    whole = note.read_bytes()
    note.write_bytes(whole[:20])
    scene.kill_agent(scene.here)
    scene.agents_are_back()
    first = scene.beats(guest)
    scene.reach(lambda: scene.beats(guest) > first + 50, "heartbeats")
    assert scene.record(guest).phase is Ownership.IDLE
    note.write_bytes(whole)
    assert [each.pid for each in noted(scene.layout, guest.uuid)] == [vmm.pid]
    scene.succeeded(scene.migrate(guest, scene.there))


def test_the_command_line_says_what_is_wrong_and_how_it_ends(scene: Scene, tmp_path: Path) -> None:
    """The real thing once, against the real API; every file format's own errors have their unit tests."""
    guest = scene.guest()
    bad = tmp_path / "bad.yaml"
    bad.write_text("guests:\n  - {name: A, memory: 1 furlong}\n  - {name: b, devices: [{name: d, shim: gpu}]}\n")

    def drover(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "orchestrator.cli.main", "--api", scene.cluster.api, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        print(done.stderr)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, said = drover("guest", "run", str(bad))
    assert code == 2
    assert f"{bad}:2" in said.replace(str(bad.name), str(bad)) or "bad.yaml:2" in said
    assert drover("migrate", "nobody")[0] == 3
    assert drover("migrate", guest.name, "--to", scene.here)[0] in (2, 4)
    assert drover("migrate", guest.name, "--wings", "2")[0] == 2
    assert [each.name for each in scene.client.list_guests()] == [guest.name]
    shown = subprocess.run(
        [sys.executable, "-m", "orchestrator.cli.main", "--api", scene.cluster.api, "guest", "list", "-o", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=True,
    )
    assert guest.name in json.dumps(json.loads(shown.stdout))
