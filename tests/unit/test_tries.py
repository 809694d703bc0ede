"""Writes that lose races: what is tried again, how often, and how it ends."""

from __future__ import annotations

import pytest

from orchestrator.ledger.tries import TRIES, Tries


class _Lost(Exception):
    pass


class Race:
    """Others are faster `losses` times; the pause with the number `end` raises."""

    def __init__(self, losses: int, end: int = -1) -> None:
        self.losses = losses
        self.end = end
        self.did: list[str] = []

    async def run(self, at_most: int = TRIES) -> list[str]:
        tries = Tries(_Lost, pause=self._pause, at_most=at_most)
        while True:
            await tries.another()
            self.did.append("look")
            if self.did.count("look") > self.losses:
                return self.did

    async def _pause(self) -> None:
        self.did.append("pause")
        if self.did.count("pause") == self.end:
            raise TimeoutError


async def test_it_looks_again_after_a_pause_until_nobody_was_faster() -> None:
    assert await Race(losses=0).run() == ["look"]
    assert await Race(losses=2).run() == ["look", "pause", "look", "pause", "look"]


async def test_it_ends_after_so_many_tries() -> None:
    race = Race(losses=1_000)
    with pytest.raises(_Lost):
        await race.run()
    assert race.did.count("look") == TRIES
    assert (await Race(losses=2).run(at_most=3)).count("look") == 3
    with pytest.raises(_Lost):
        await Race(losses=3).run(at_most=3)


async def test_a_pause_may_end_it() -> None:
    race = Race(losses=5, end=2)
    with pytest.raises(TimeoutError):
        await race.run()
    assert race.did.count("look") == 2
