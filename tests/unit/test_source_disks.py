"""The local disks of a guest at its source: what becomes of the others when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, cast

import pytest

from agents.engine.base import DiskCopies, DiskTarget, EngineError
from agents.shims.block import DiskTrouble, SourceDisks
from orchestrator.core.disks import DestinationSide, ImageThere, SourceSide
from orchestrator.core.endpoint import Endpoint

THERE = Endpoint("127.0.0.1", 1)


class Copies:
    """Of two disks: `bad` cannot be copied, `good` takes its time."""

    def __init__(self) -> None:
        self.connecting = asyncio.Event()
        self.begun: list[str] = []

    async def known(self) -> Mapping[str, SourceSide]:
        return {"bad": SourceSide(), "good": SourceSide("", "point")}

    async def sizes(self) -> Mapping[str, int]:
        return {"bad": 1, "good": 1}

    async def connect_disk(self, target: DiskTarget) -> None:
        if target.disk == "bad":
            raise EngineError("refused")
        await self.connecting.wait()

    async def increment(self, disk: str, _since: str) -> None:
        self.begun.append(disk)


async def test_a_disk_that_fails_ends_what_is_done_for_the_others() -> None:
    """The next attempt may have connected them to another host by then."""
    copies = Copies()
    disks = SourceDisks(cast(DiskCopies, cast(Any, copies)), "inc")
    there = [ImageThere(disk, DestinationSide(f"i-{disk}", "point"), 1, THERE) for disk in ("bad", "good")]
    with pytest.raises(DiskTrouble, match="bad"):
        await disks.sync(there)
    copies.connecting.set()
    for _ in range(5):
        await asyncio.sleep(0)
    assert copies.begun == []
