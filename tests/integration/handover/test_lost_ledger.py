"""The ledger loses everything while guests run, as after a restore that failed: they run on, and can be had back."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest

from orchestrator.core.agent import Trouble
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.repair import Action
from orchestrator.ledger import paths
from orchestrator.ledger.store import Delete
from tests.integration.handover.scene import Born, Scene

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]


def _lose(scene: Scene, guest: Born) -> None:
    """All nodes of the guest, its name and its record included."""
    store = scene.observer.store

    async def away() -> None:
        children = [f"{paths.guest(guest.uuid)}/{name}" for name in await store.children(paths.guest(guest.uuid))]
        for path in (*children, paths.guest(guest.uuid), paths.name(guest.name)):
            node = await store.read(path)
            if node is not None:
                await store.multi([Delete(path, node.version)])

    scene.observer.run(away())


_ASK = """
import asyncio, sys
from orchestrator.rpc.agent_client import AgentClient

async def main(address, call, guest):
    client = AgentClient(address)
    match call:
        case "troubles":
            print(*(each.trouble for each in (await client.get_agent()).troubles if each.guest == guest))
        case "nudge":
            await client.nudge(guest)
    await client.close()

asyncio.run(main(*sys.argv[1:]))
"""


def _asked(scene: Scene, host: str, call: str, guest: Born) -> str:
    """One call to the host's agent, from a process in the cluster's network: gRPC's own threads are in ours."""
    command = [sys.executable, "-c", _ASK, scene.host_record(host).control_address, call, guest.uuid]
    run = functools.partial(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
    done = scene.cluster.inside(run)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_guest_whose_record_was_lost_runs_on_and_is_had_back(scene: Scene) -> None:
    guest = scene.guest()
    (vmm,) = scene.vmms(guest)
    _lose(scene, guest)

    def told() -> bool:
        return _asked(scene, scene.here, "troubles", guest) == Trouble.NO_RECORD

    _asked(scene, scene.here, "nudge", guest)
    scene.reach(told, "the agent tells that the record is lost")
    scene.kill_agent(scene.here)  # nor does its successor do anything to it
    scene.agents_are_back()
    scene.reach(told, "its successor tells the same")
    assert scene.vmms(guest) == [vmm]

    def offered() -> list[str]:
        try:
            return [offer.action for offer in scene.client.repair_guest(guest.name).offers]
        except DroverError as error:  # the API has not reached the new agent yet, and says so
            if error.reason is not RefusalReason.NOT_FOUND or "did not say what is there" not in error.message:
                raise
            return []

    scene.reach(offered, "repair finds the guest and has an offer")
    shown = scene.client.get_host(scene.here, ask_agent=True).agent
    assert [(each.guest, each.owner, each.pid) for each in shown.copies if each.guest_uuid == guest.uuid] == [
        (guest.name, "", vmm.pid)
    ]
    assert offered() == [Action.RESTORE_RECORD]
    scene.client.repair_guest(guest.name, Action.RESTORE_RECORD)
    assert scene.vmms(guest) == [vmm]
    record = scene.record(guest)
    assert (record.phase, record.owner.host) == (Ownership.IDLE, scene.here)
    scene.succeeded(scene.migrate(guest, scene.there))
