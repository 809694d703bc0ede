"""Why a guest cannot move: what QEMU would refuse, and what it would lose without a word."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from agents.engine.qemu.block import own_job
from orchestrator.core.errors import RefusalReason
from orchestrator.core.offers import Obstacle

Execute = Callable[..., Awaitable[Any]]
_SILENT_LOSSES = {"vfio-user-pci": "QEMU neither moves the state of a vfio-user device nor refuses to move the guest"}
"""Device types that a migration leaves behind without a word."""


async def found(execute: Execute, strangers: Callable[[], Awaitable[list[str]]]) -> tuple[Obstacle, ...]:
    """See `base.Vmm.unmigratable`. `strangers`: what of the machine is not as it was noted down."""
    lost: list[str] = []
    for place in ("/machine/peripheral", "/machine/peripheral-anon"):
        for entry in await execute("qom-list", {"path": place}):
            kind = str(entry["type"]).removeprefix("child<").removesuffix(">")
            if kind in _SILENT_LOSSES:
                lost.append(f"device {entry['name']} is a {kind}: {_SILENT_LOSSES[kind]}")
    lost += await strangers()
    lost += (await execute("query-migrate")).get("blocked-reasons", [])
    jobs = [job for job in await execute("query-block-jobs") if not own_job(str(job["device"]))]
    said = [
        f"job {job['device']} ({job['type']}) works on one of its disks, and would end with the move" for job in jobs
    ]
    return (
        *((RefusalReason.DEVICE_NOT_MIGRATABLE, each) for each in lost),
        *((RefusalReason.BLOCK_JOB_RUNNING, each) for each in said),
    )
