"""How long a peer outside is cut off from a Linux guest that moves, beside the guest's own blackout.

Two hosts of the local cluster, one guest with a card in their network, moved back and forth; a peer outside of both
talks with it over UDP and one TCP connection all the time, a message each 5 ms. The blackout is STOP at the source to
RESUME at the destination, by QEMU's own stamps.

Without KVM a guest's code is translated anew at its destination: its first answer needs 30 to 60 ms of CPU there, which
is in the outage and not in the blackout. What the network itself adds is seen on the bridge outside: from RESUME to the
first frame from the guest's address (QEMU's reverse ARP), by which the bridges learn where it is now.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import statistics
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from agents.shims.net import mac_address
from deploy.lab.cluster import network, parts
from deploy.lab.peer.client import Peer
from deploy.lab.peer.outage import Outage
from deploy.lab.workload import LINUX_INITRD, LinuxWorkload, linux_address, linux_boot_of
from orchestrator import wire, wire_attempts
from orchestrator.core.records import AttemptReport, GuestSpec, NicSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from tests.bench.guests.registry import Asked, Figure, NotHere, Scene, at_most, beside, spread
from tests.fakes.cluster import Cluster, make_config, running_cluster, short_directory

GUEST = "linux"
EVERY_MS = 5.0
_ALL_FRAMES = 3
MOVE_S = 120.0
BOOT_S = 180.0
QUIET_S = 1.5
"""Between two moves: what TCP lost is sent again in that time."""
_OVER = ("SUCCEEDED", "FAILED", "CANCELLED")


@dataclass
class Seen:
    """Over all moves."""

    blackouts: list[float] = field(default_factory=list[float])
    udp: list[float] = field(default_factory=list[float])
    tcp: list[float] = field(default_factory=list[float])
    still_udp: list[float] = field(default_factory=list[float])
    still_tcp: list[float] = field(default_factory=list[float])
    """The same measure where nothing moved: what the machine itself adds."""
    learned: list[float] = field(default_factory=list[float])
    """From RESUME until the bridge outside knew where the guest is."""
    wrong: int = 0
    breaks: int = 0

    def add(self, blackout_ms: float, moved: Outage, still: Outage) -> None:
        """One move. Raises RuntimeError when the guest did not answer both ways again."""
        if moved.udp_ms is None or moved.tcp_ms is None:
            raise RuntimeError("the guest did not answer its peer again after a move")
        self.blackouts.append(blackout_ms)
        self.udp.append(moved.udp_ms)
        self.tcp.append(moved.tcp_ms)
        self.still_udp.append(still.udp_ms or 0.0)
        self.still_tcp.append(still.tcp_ms or 0.0)
        self.wrong, self.breaks = moved.wrong, moved.breaks


class Bridge:
    """The bridge outside of all hosts: when frames of a card came by. Its thread ends with the process."""

    def __init__(self, namespace: str | None, mac: str) -> None:
        self._mac = bytes.fromhex(mac.replace(":", ""))
        self.frames_at_s: deque[float] = deque(maxlen=100_000)
        self._namespace = namespace
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        if self._namespace:
            network.enter(self._namespace)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(_ALL_FRAMES)) as frames:
            frames.bind((network.GUEST_BRIDGE, 0))
            while True:
                if frames.recv(64)[6:12] == self._mac:
                    self.frames_at_s.append(time.time())

    def first_after_ms(self, resumed_s: float) -> float:
        """From then on. Raises RuntimeError when none came."""
        for at_s in tuple(self.frames_at_s):
            if at_s >= resumed_s:
                return (at_s - resumed_s) * 1000
        raise RuntimeError("no frame of the guest was seen after it ran")


def _resumed_s(report: AttemptReport) -> float:
    """When the vCPUs ran at the destination, on the wall clock that all hosts share here."""
    ran = [float(e.detail) for e in report.timeline if e.event == "vcpus run" and e.where == report.destination]
    return ran[-1]


def _moved(client: OrchestratorClient) -> AttemptReport:
    """To the other host; the attempt that was committed."""
    name = client.create_migration(GUEST).name
    deadline = time.monotonic() + MOVE_S
    while time.monotonic() < deadline:
        now = client.get_migration(name)
        if wire.word(now, "phase") in _OVER:
            reports = [wire_attempts.report_from_proto(report) for report in now.attempts]
            committed = [report for report in reports if report.outcome == "COMMITTED"]
            if not committed:
                raise RuntimeError(f"a move ended {wire.word(now, 'phase')}: {now.message}")
            return committed[-1]
        time.sleep(0.02)
    raise TimeoutError(f"migration {name} did not end in {MOVE_S:.0f} s")


def _moves(cluster: Cluster, count: int) -> Seen:
    seen = Seen()
    spec = GuestSpec(GUEST, 128, machine="q35", boot=linux_boot_of(LinuxWorkload(), 0), nics=(NicSpec("eth0", "lab"),))
    place = cluster.places.management_namespace
    with OrchestratorClient(cluster.api, 30) as client, Peer(place) as peer:
        uuid = client.create_guest(spec, "host-1").uuid
        bridge = Bridge(place, mac_address(uuid, "eth0"))
        peer.watch(GUEST, linux_address(uuid), EVERY_MS)
        peer.await_answers(GUEST, BOOT_S)
        for _ in range(count):
            time.sleep(QUIET_S)
            began_ns = time.monotonic_ns()
            report = _moved(client)
            time.sleep(QUIET_S)
            ended_ns = time.monotonic_ns()
            still = peer.outage(GUEST, began_ns - int(QUIET_S * 1e9), began_ns)
            seen.learned.append(bridge.first_after_ms(_resumed_s(report)))
            seen.add(report.blackout_ms, peer.outage(GUEST, began_ns, ended_ns), still)
        client.stop_guest(GUEST)
    return seen


def _measured(count: int) -> Seen:
    directory = short_directory()
    config = make_config(directory, hosts=2)
    images, _ = parts.linux_guest(config.layout)
    if why := network.obstacle():
        raise NotHere(f"no network namespaces: {why}")
    if shutil.which(config.qemu) is None or not (images / LINUX_INITRD).is_file():
        raise NotHere("there is no QEMU, or no Linux guest (make linux-guest)")
    with running_cluster(config) as cluster:
        return _moves(cluster, count)


def _beyond(outages: list[float], blackouts: list[float]) -> float:
    return statistics.median(outage - blackout for outage, blackout in zip(outages, blackouts, strict=True))


async def outage(asked: Asked) -> list[Figure]:
    """40 moves."""
    seen = await asyncio.to_thread(_measured, asked.many(40, least=2))
    middle = statistics.median
    return [
        beside(
            "blackout of a Linux guest with a card on a bridge, median",
            middle(seen.blackouts),
            "ms",
            spread(seen.blackouts),
        ),
        beside("outage of its UDP peer, median", middle(seen.udp), "ms", spread(seen.udp)),
        beside("outage of its TCP peer, median", middle(seen.tcp), "ms", spread(seen.tcp)),
        beside(
            "longest silence over UDP while nothing moves, median", middle(seen.still_udp), "ms", spread(seen.still_udp)
        ),
        beside(
            "longest silence over TCP while nothing moves, median", middle(seen.still_tcp), "ms", spread(seen.still_tcp)
        ),
        beside(
            "from RESUME to the first frame of the guest at its new place, median",
            middle(seen.learned),
            "ms",
            spread(seen.learned),
        ),
        at_most("outage of a UDP peer minus blackout, median", _beyond(seen.udp, seen.blackouts), "ms", 30),
        at_most("outage of a TCP peer minus blackout, median", _beyond(seen.tcp, seen.blackouts), "ms", 250),
        at_most("answers that were wrong, and TCP connections that broke", seen.wrong + seen.breaks, "", 0),
    ]


FIGURES = {"outage": Scene(outage, timeout_s=900)}
