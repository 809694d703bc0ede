"""The kill matrix: each part of a move is killed at each of its steps, for guests with local and with shared disks.

A Linux guest writes all the while; what it was promised is looked for on its images afterwards. `make matrix` runs
every cell and writes the table to build/matrix.json; without DROVER_LONG two cells stand for them (SHORT), and
DROVER_CELL names another one, or all of a step ("6b").

Steps as in docs/protocol.md: the attempt is held there by a device that takes its time, or by stopping the process that
would go on. Whatever a cell does, the guest exists once or is told CRASHED, which only the death of its own VMM or host
may bring about.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.cluster import commands, processes
from orchestrator import wire
from orchestrator.core.errors import DroverError
from orchestrator.core.handover import Ownership
from tests.integration.handover import disks
from tests.integration.handover.judge import judge
from tests.integration.handover.scene import Born, Scene, device

pytestmark = [pytest.mark.integration, pytest.mark.qemu, pytest.mark.zookeeper]

LONG = bool(os.environ.get("DROVER_LONG"))
REPORT = Path(__file__).resolve().parents[3] / "build" / "matrix.json"
STEPS = ("1", "2", "6b", "7", "8", "9", "11")
VICTIMS = (
    "daemon",
    "source agent",
    "destination agent",
    "source VMM",
    "destination VMM",
    "source host",
    "destination host",
)
SHORT = (("1", "destination VMM"), ("1", "destination host"))
END_S = 120.0
SLOW = (
    "delays: [{call: load, ms: 700}, {call: stop_copy, ms: 500}, {call: validate, ms: 700}, {call: activate, ms: 700}]"
)
"""A device that holds each attempt at its steps: 2 by its late ACK, 5, 8 and 11 by taking its time."""

Cell = tuple[str, str]


def cells(kind: str) -> list[Cell]:
    """Step and victim. A shared disk has no daemon and no drain."""
    steps = [step for step in STEPS if kind == "local" or step != "6b"]
    victims = [victim for victim in VICTIMS if kind == "local" or victim != "daemon"]
    return [(step, victim) for step in steps for victim in victims]


@contextlib.contextmanager
def held_at(scene: Scene, guest: Born, step: str) -> Iterator[None]:
    """The attempt is at the step and stays there, as long as nobody is killed."""
    with contextlib.ExitStack() as stack:
        if step == "1":
            scene.reach(lambda: any(vmm.role == "incoming" for vmm in scene.vmms(guest)), "a copy that waits")
        elif step == "2":
            scene.reach_device(guest, scene.here, "PRE_COPY")
        elif step == "11":
            scene.reach(lambda: scene.record(guest).phase is Ownership.COMMITTED, "the commit")
        else:
            if step in ("6b", "7"):
                scene.reach_device(guest, scene.here, "PRE_COPY_P2P")
                waits = disks.daemons(scene, guest)[scene.there] if step == "6b" else scene.incoming(guest).identity
                stack.enter_context(scene.frozen(waits))
            scene.reach_device(guest, scene.here, "STOP_COPY")
            if step == "9":  # whoever commits now waits for the ledger
                stack.enter_context(scene.frozen(scene.part("zookeeper")))
                scene.hold_on(0.8)
        yield


def excused(cell: Cell, owner: str) -> bool:
    """The guest may be CRASHED on that side: what was killed there was the guest. Before step 8 the destination cannot
    have become it; at 8 it is held for a time only."""
    step, victim = cell
    side, _, part = victim.partition(" ")
    return part in ("VMM", "host") and side == owner and (side == "source" or step in ("8", "9", "11"))


def strike(scene: Scene, guest: Born, victim: str) -> None:
    """Kill it; a host stays dark until `recover`."""
    side = scene.here if victim.startswith("source") else scene.there
    if victim == "daemon":
        for identity in disks.daemons(scene, guest).values():
            processes.send(identity, signal.SIGKILL)
    elif victim.endswith("agent"):
        scene.kill_agent(side)
    elif victim.endswith("VMM"):
        for vmm in scene.vmms(guest, side):
            scene.kill_if_alive(vmm)
    else:
        commands.power_cycle(scene.cluster.dir, side, off=True)


def recover(scene: Scene, victim: str) -> None:
    """Everything that was killed is back."""
    if victim.endswith("host"):
        commands.power_on(scene.cluster.dir, scene.here if victim.startswith("source") else scene.there)
    scene.agents_are_back()
    scene.ledger_is_back()


def one(scene: Scene, guest: Born, cell: Cell) -> dict[str, object]:
    """Move the guest, kill, and judge. Returns the line of the table."""
    step, victim = cell
    begun, before = time.monotonic(), disks.promised(scene, guest)
    migration = scene.migrate(guest, scene.there)
    with held_at(scene, guest, step):
        strike(scene, guest, victim)
    recover(scene, victim)
    over = scene.ended(migration, END_S)
    record = scene.record(guest)
    crashed, owner = record.phase is Ownership.CRASHED, "source" if record.owner.host == scene.here else "destination"
    assert not crashed or excused(cell, owner), f"{cell}: nothing that was the guest was killed, and it is CRASHED"
    guest.may_crash = crashed
    judge(scene, [guest])
    if not crashed:
        scene.reach(lambda: disks.promised(scene, guest) > before, f"{guest.name} promises more", 60.0)
    return {
        "step": step,
        "victim": victim,
        "migration": wire.word(over, "phase"),
        "attempts": len(over.attempts),
        "guest": "CRASHED"
        if crashed
        else f"on its {'source' if scene.record(guest).owner.host == scene.here else 'destination'}",
        "images": disks.judge_disks(scene, guest),
        "s": round(time.monotonic() - begun, 1),
    }


@pytest.mark.timeout(3_600 if LONG else 600)
@pytest.mark.parametrize("kind", ["local", "shared"] if LONG else ["local"])
def test_a_part_is_killed_at_a_step(scene: Scene, kind: str) -> None:
    disks.must_be_here(scene)
    every = cells(kind)
    todo = every if LONG else list(SHORT)
    chosen = os.environ.get("DROVER_CELL")
    if chosen:  # "6b destination VMM", or "6b" for a whole step
        todo = [cell for cell in every if " ".join(cell) == chosen or cell[0] == chosen]
    assert todo, f"there is no cell {chosen!r} for {kind} disks"
    table: list[dict[str, object]] = []
    guest: Born | None = None
    try:
        for cell in todo:
            guest = guest or disks.linux_guest(scene, device("dpu", SLOW), local=kind == "local")
            print(f"== {kind}: {' '.join(cell)}")
            line: dict[str, object] = {"kind": kind, "result": "FAILED", "step": cell[0], "victim": cell[1]}
            table.append(line)
            try:
                line |= one(scene, guest, cell) | {"result": "ok"}
            except (AssertionError, DroverError, TimeoutError) as error:
                line["said"] = str(error)[:500]  # the other cells are taken all the same, with another guest
            print(f"   {line}")
            if guest.may_crash or line["result"] != "ok":
                scene.end_guests([guest])
                scene.guests.remove(guest)
                guest = None
            elif scene.record(guest).owner.host != scene.here:
                scene.here, scene.there = scene.there, scene.here
    finally:
        _told(kind, table)
    assert [line for line in table if line["result"] != "ok"] == []


def _told(kind: str, table: list[dict[str, object]]) -> None:
    """Beside what the other kind has said."""
    said = json.loads(REPORT.read_text())["cells"] if LONG and REPORT.exists() else []
    taken = {(line["step"], line["victim"]) for line in table}
    kept = [line for line in said if line["kind"] != kind or (line["step"], line["victim"]) not in taken]
    if LONG:
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text(json.dumps({"cells": [*kept, *table]}, indent=1))
    for line in table:
        said = [str(line.get(key, "")) for key in ("result", "kind", "step", "victim", "migration", "guest", "s")]
        print("{:6} {:6} {:>3} {:18} {:10} {:20} {:>6}".format(*said))


def test_every_cell_is_in_the_matrix() -> None:
    assert len(cells("local")) == len(STEPS) * len(VICTIMS)
    assert len(cells("shared")) == (len(STEPS) - 1) * (len(VICTIMS) - 1)
    assert set(SHORT) <= set(cells("local"))


@pytest.mark.parametrize(
    ("cell", "owner", "may"),
    [
        (("1", "destination VMM"), "source", False),
        (("1", "destination host"), "destination", False),
        (("7", "destination VMM"), "destination", False),
        (("9", "destination host"), "source", False),
        (("9", "destination host"), "destination", True),
        (("11", "source VMM"), "destination", False),
        (("1", "source VMM"), "source", True),
        (("1", "source agent"), "source", False),
        (("6b", "daemon"), "source", False),
    ],
)
def test_only_the_death_of_what_was_the_guest_excuses_its_crash(cell: Cell, owner: str, may: bool) -> None:
    assert excused(cell, owner) is may
