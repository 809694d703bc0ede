"""What `make bench-guests` says of guests with local disks: nothing is met that was not measured."""

from __future__ import annotations

import asyncio

import pytest

from tests.bench.guests import disks
from tests.bench.guests.disks import Seen
from tests.bench.guests.registry import Asked, Figure


async def _figures(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> dict[str, Figure]:
    monkeypatch.setattr(disks, "_take_moves", lambda *_: seen)
    async with asyncio.timeout(30):
        return {figure.name: figure for figure in await disks.disk_moves(Asked())}


async def test_what_did_not_happen_is_said_and_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    found = await _figures(monkeypatch, Seen(moves=1))
    targets = [
        figure for name, figure in found.items() if "of the disk" in name or "compared" in name or "copies" in name
    ]
    assert len(targets) == 3
    for figure in targets:
        assert figure.value is None
        assert not figure.met
        assert figure.note.startswith("not taken: ")


async def test_what_happened_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(moves=3, compared=2, differing=1)
    seen.again = {"late ACK": [0.25], "destination died behind the drain": [0.05, 0.06, 0.2]}
    seen.copied_anew["late ACK"] = 1
    found = await _figures(monkeypatch, seen)
    assert {name: figure.met for name, figure in found.items() if figure.met is not None} == {
        "blocks, pages and records that were wrong or lost": True,
        "images that differed, of those that were compared": False,
        "copies from the start after a late ACK": False,
        "sent in the attempt after an abort behind the drain, of the disk": True,
    }
