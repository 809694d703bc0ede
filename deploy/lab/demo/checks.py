"""After the evacuation: what the API says of each guest, and each guest's check of its own memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.lab.cluster import console_client
from deploy.lab.cluster.console_client import ConsoleError
from deploy.lab.cluster.evidence import Beat
from deploy.lab.demo.incidents import Incidents
from deploy.lab.demo.judge import Answer, Attempt, Role
from deploy.lab.demo.staging import beats, client_of
from deploy.lab.peer.client import Peer, PeerError
from deploy.lab.peer.outage import Outage
from orchestrator import wire
from orchestrator.cli.jobs import took_s
from orchestrator.core.agent import RunState

if TYPE_CHECKING:
    from orchestrator.rpc.messages import AttemptReport, Guest, Migration
    from orchestrator.rpc.orchestrator_client import OrchestratorClient

SILENCE_S = 0.5
"""How long a paused guest is listened to."""
VERIFY_S = 60.0
VERIFY_AT_A_TIME = 2
BEATS_S = 5.0
BEFORE_NS = 200_000_000
"""How long before its migration was heard of a guest may have been stopped already."""
_LOOK_S = 0.05


class Checks:
    """`run` asks for everything once; what it found is in the attributes."""

    def __init__(self, directory: Path, roles: Sequence[Role], incidents: Incidents, peer: Peer) -> None:
        self._directory = directory
        self.roles = roles
        self._incidents = incidents
        self._peer = peer
        self.answers: dict[str, Answer] = {}
        self.consoles: dict[str, tuple[str, ...]] = {}
        """Hosts where a VMM of the guest has its console open, by guest."""
        self.outages: dict[str, Outage] = {}
        """By the peer, of the guests that it talks with."""
        self.evacuation_phase = ""
        self.safe_to_power_off = False
        self.mishaps: list[str] = []

    def run(self, source: str) -> None:
        """Raises DroverError and ConsoleError when the API or the collector cannot be asked at all."""
        with client_of(self._directory) as client:
            for role in self.roles:
                self.answers[role.name] = self._arrived(client, role.name)
            self._resume_paused()
            self._ask_peer()
            self._verify()
            self._await_life()
            for role in self.roles:
                ended = self._known(client, role.name)
                self.answers[role.name] = replace(self.answers[role.name], state_at_end=_run_state(ended))
            if jobs := [job for job in client.list_evacuations() if job.host == source]:
                self.evacuation_phase = wire.word(jobs[0], "phase")
                self.safe_to_power_off = jobs[0].safe_to_power_off
        consoles = console_client.list_consoles_sync(self._directory)
        for role in self.roles:
            hosts = {each.vmm.host for each in consoles if each.connected and each.vmm.guest == role.name}
            self.consoles[role.name] = tuple(sorted(hosts))

    def _arrived(self, client: OrchestratorClient, name: str) -> Answer:
        guest = self._known(client, name)
        sight = self._incidents.sights.get(name)
        answer = Answer(owner=guest.host, uuid=guest.uuid, state_on_arrival=_run_state(guest))
        if sight is None:
            return answer
        migration = client.get_migration(sight.migration)
        return replace(
            answer,
            migration=migration.name,
            phase=wire.word(migration, "phase"),
            why=": ".join(filter(None, (migration.failure, migration.message))),
            attempts=tuple(_attempt(report) for report in migration.attempts),
            took_s=_took_s(migration),
        )

    def _known(self, client: OrchestratorClient, name: str) -> Guest:
        """UNKNOWN says that the owner's agent was not heard just then, not how the guest is: ask again."""
        found: list[Guest] = []

        def known() -> bool:
            found.append(client.get_guest(name))
            return _run_state(found[-1]) != RunState.UNKNOWN

        self._until(known)
        return found[-1]

    def _resume_paused(self) -> None:
        if self._incidents.pauses:
            time.sleep(SILENCE_S)  # no event tells of silence
        for name in tuple(self._incidents.pauses):
            self._incidents.resume(name)
        self._until(lambda: self._incidents.pauses.keys() <= beats(self._directory).keys())

    def _ask_peer(self) -> None:
        """Before anything else is asked of them: from the moment their migration was heard of until now."""
        for role in self.roles:
            sight = self._incidents.sights.get(role.name)
            if not role.linux or sight is None:
                continue
            try:
                began_ns = sight.first_ns - BEFORE_NS
                self.outages[role.name] = self._peer.outage(role.name, began_ns, time.monotonic_ns())
            except PeerError as error:
                self.mishaps.append(f"its peer outside could not be asked about {role.name}: {error}")

    def _verify(self) -> None:
        def verify(name: str) -> None:
            try:
                console_client.verify_sync(self._directory, name, timeout_s=VERIFY_S)
            except ConsoleError as error:
                if self._verified_over_network(name):
                    return
                self.mishaps.append(f"{name} could not be asked to check its memory: {error}")

        pool = ThreadPoolExecutor(VERIFY_AT_A_TIME)
        try:
            list(pool.map(verify, (role.name for role in self.roles)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _verified_over_network(self, name: str) -> bool:
        """Linux takes the same letter from its network, and answers on its console."""
        if not any(role.name == name and role.linux for role in self.roles):
            return False
        try:
            self._peer.ask(name, "v")
        except PeerError:
            return False
        return True

    def _await_life(self) -> None:
        """Until each has beaten after its check, and had an answer of a device. The judge finds out who did not.

        A doorbell that was lost when the guest moved is rung again after 2 s.
        """
        before: dict[str, Beat] = {}

        def all_alive() -> bool:
            now = beats(self._directory)
            for name, beat in now.items():
                before.setdefault(name, beat)
            return all(
                role.name in now and (not role.devices or now[role.name].device_rings > before[role.name].device_rings)
                for role in self.roles
            )

        self._until(all_alive)

    def _until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + BEATS_S
        while not happened() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)


def _run_state(guest: Guest) -> str:
    return wire.word(guest, "run_state")


def _took_s(migration: Migration) -> float:
    return took_s(migration) or 0.0


def _sent(detail: str) -> tuple[str, int]:
    """Disk and bytes, as `root: 1024 bytes` says; what stands last in a time line counts."""
    disk, _, count = detail.partition(": ")
    return disk, int(count.split()[0])


def _attempt(report: AttemptReport) -> Attempt:
    return Attempt(
        number=report.attempt,
        outcome=report.outcome,
        reason=report.reason,
        devices=tuple(report.devices),
        destination=report.destination,
        zxid=report.zxid,
        sent_bytes=report.transferred_bytes,
        pending_when_stopped=tuple(dict.fromkeys(ack.device for ack in report.requested_while_stopped)),
        blackout_ms=report.blackout_ms,
        suspended=any(entry.event == "suspend" for entry in report.timeline),
        disk_bytes=dict(_sent(entry.detail) for entry in report.timeline if entry.event == "disk_sent"),
    )
