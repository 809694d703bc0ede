"""What a fleet bench could not take stands in its report, and what it took is not lost with the rest."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench.fleet import __main__ as bench
from tests.bench.fleet import moves, scenes
from tests.bench.fleet.figures import Figure, beside


async def test_what_the_minutes_did_not_suffice_for_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    async def quick() -> list[Figure]:
        return [beside("quick", 1.0, "s")]

    async def scene(_scale: float, take: scenes.Take) -> None:
        await take("at_rest", quick)
        await asyncio.Event().wait()

    monkeypatch.setattr(scenes, "SCENES", {scene: ("at_rest", "start"), scenes.clean: ("clean",)})
    run = bench.Run(1.0, frozenset({"at_rest", "start"}))
    await bench._bench(run, 0.01)
    assert [(one.name, one.value, one.met) for one in run.found] == [("quick", 1.0, None), ("start", None, False)]
    assert "minutes were over" in run.found[1].note


async def test_sizes_that_were_taken_stand_when_a_larger_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plane:
        async def go(self) -> None: ...

    async def nothing(*_: object) -> float:
        return 0.0

    async def cost(_plane: object, count: int, _rest: float) -> list[Figure]:
        if count > 20:
            raise TimeoutError("too many")
        return [beside(what, float(count), "") for what in ("cpu", "memory", "writes")]

    monkeypatch.setattr(scenes, "_moved", nothing)
    monkeypatch.setattr(scenes, "_cpu_at_rest", nothing)
    monkeypatch.setattr(scenes, "_cost_of", cost)
    monkeypatch.setattr(scenes.asyncio, "sleep", nothing)
    found = await scenes.flat(Plane(), [10, 20, 30])  # type: ignore[arg-type]
    assert [one.value for one in found if one.name == "cpu"] == [10.0, 20.0]
    assert next(one for one in found if one.name == "30 in flight").value is None
    ratios = [one for one in found if one.unit == "x"]
    assert [(one.value, one.met, one.note) for one in ratios] == [(2.0, False, "only up to 20")] * 2


async def test_an_end_that_takes_too_long_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    async def until(*_: object) -> moves.Followed:
        raise TimeoutError("7 are left")

    monkeypatch.setattr(moves, "until", until)
    assert await scenes._ended(object(), []) == "not all were over afterwards: 7 are left"  # type: ignore[arg-type]
