"""Blows at random instants of random migrations. DROVER_SEED repeats a run as far as the machine allows; DROVER_ROUNDS
makes it longer."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable

from deploy.lab.cluster import commands, console_client
from orchestrator import wire
from orchestrator.core.handover import Ownership
from orchestrator.core.records import DeviceSpec
from tests.integration.handover.judge import judge, nothing_is_left
from tests.integration.handover.scene import Born, Scene, device

ROUNDS = int(os.environ.get("DROVER_ROUNDS") or 6)
WITHIN_S = 0.8
"""A migration of such a guest takes about so long on a quiet machine."""
END_S = 90.0
SCENARIOS = (
    "",
    "",
    "asks: [{at: freeze, times: 2, bytes: 4096}]",
    "asks: [{at: gate_open, bytes: 65536}]",
    "asks: [{at: final_query}]",
    "delays: [{call: stop_copy, ms: 200}, {call: validate, ms: 200}, {call: activate, ms: 200}]",
)

Blow = Callable[[Scene, Born, str, random.Random], None]


def kill_source_agent(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.kill_agent(scene.here)


def kill_destination_agent(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.kill_agent(scene.there)


def kill_incoming(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    for vmm in scene.vmms(guest):
        if vmm.role == "incoming":
            guest.may_crash = True
            scene.kill_if_alive(vmm)


def stop_for_a_while(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    part = chance.choice([f"agent-{scene.here}", f"agent-{scene.there}", "zookeeper", "api"])
    print(f"  ({part})")
    with scene.frozen(scene.part(part)):
        scene.hold_on(chance.uniform(0.05, 3))


def restart_zookeeper(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.restart_zookeeper()


def kill_api(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    api = scene.part("api")
    scene.kill(api)
    scene.cluster.came_back("api", api.pid, 30)


def kill_ray(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.kill_ray()


def power_off(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    """By the guest itself. One that stands still, or is on its way just then, may not hear of it."""
    guest.may_end = True
    with contextlib.suppress(console_client.ConsoleError):
        console_client.send_sync(scene.layout.dir, guest.name, "p")


def lose_power(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    """Of either host, for a moment: its guests are gone, and it comes back as another power cycle."""
    host = chance.choice([scene.here, scene.there])
    print(f"  ({host})")
    guest.may_crash = True
    agent = scene.agent(host)
    commands.power_cycle(scene.cluster.dir, host)
    scene.cluster.came_back(f"agent-{host}", agent.pid, 30)


def cancel(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    print(f"  ({scene.answer(lambda: scene.client.cancel_migration(migration)) or 'cancelled'})")


def pause(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.answer(lambda: scene.client.pause_guest(guest.name))


def pause_and_resume(scene: Scene, guest: Born, migration: str, chance: random.Random) -> None:
    scene.answer(lambda: scene.client.pause_guest(guest.name))
    scene.hold_on(chance.uniform(0, 0.3))
    scene.answer(lambda: scene.client.resume_guest(guest.name))


BLOWS: tuple[Blow, ...] = (
    kill_source_agent,
    kill_source_agent,
    kill_destination_agent,
    kill_destination_agent,
    kill_incoming,
    stop_for_a_while,
    stop_for_a_while,
    restart_zookeeper,
    kill_api,
    kill_ray,
    lose_power,
    power_off,
    cancel,
    pause,
    pause_and_resume,
)


def drawn() -> random.Random:
    seed = int(os.environ.get("DROVER_SEED") or random.randrange(10**6))
    print(f"DROVER_SEED={seed}")
    return random.Random(seed)


def companions(chance: random.Random) -> list[DeviceSpec]:
    return [device(f"dev{n}", chance.choice(SCENARIOS)) for n in range(chance.choice([0, 1, 1, 2]))]


def some_rounds(
    scene: Scene,
    rounds: int,
    draw: Callable[[random.Random], list[DeviceSpec]],
    *,
    born: Callable[..., Born] = Scene.guest,
    also: Callable[[Scene, Born], object] | None = None,
    within_s: float = WITHIN_S,
) -> None:
    """Each with a guest of its own (`born` makes it), whose devices are drawn. Whatever comes of a migration, it comes
    to an end, and the judge is content, and so is `also`."""
    chance = drawn()
    for number in range(rounds):
        begun = time.monotonic()
        guest = born(scene, *draw(chance))
        if chance.random() < 0.15:
            scene.client.pause_guest(guest.name)
        after_s = [chance.uniform(0, within_s) for _ in range(chance.choice([1, 1, 2]))]
        blows = [chance.choice(BLOWS) for _ in after_s]
        said = [f"{blow.__name__} after {s:.3f} s" for blow, s in zip(blows, after_s, strict=True)]
        devices = [f"{each.shim}: {each.options}" for each in guest.spec.devices]
        print(f"round {number}: {devices} {said}")
        migration = scene.migrate(guest, scene.there)
        for blow, seconds in zip(blows, after_s, strict=True):
            scene.hold_on(seconds)
            blow(scene, guest, migration, chance)
        scene.agents_are_back()
        scene.ledger_is_back()
        scene.coordinator_is_back()
        over = scene.ended(migration, END_S)
        record = scene.record(guest)
        guest.may_crash = guest.may_crash and record.phase is Ownership.CRASHED
        print(f"round {number}: {wire.word(over, 'phase')} {over.failure} on {record.owner.host}")
        for verdict in judge(scene, [guest]):
            print(f"stopped for {list(verdict.stops_ms)} ms, {time.monotonic() - begun:.1f} s")
        if also is not None:
            print(f"round {number}: {also(scene, guest)}")
        scene.end_guests([guest])
        nothing_is_left(scene, [guest])
        scene.guests.remove(guest)
