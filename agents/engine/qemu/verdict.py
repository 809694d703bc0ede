"""PURE. What QEMU's own words mean to us about a guest and its migration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from agents.engine.base import EngineStatus, Progress, RunState

OVER = (EngineStatus.NONE, EngineStatus.COMPLETED, EngineStatus.FAILED, EngineStatus.CANCELLED)
"""Nothing goes out any more, or nothing ever did."""
RUN_STATES = {
    "running": RunState.RUNNING,
    "inmigrate": RunState.INCOMING,
    "finish-migrate": RunState.FINISHING,
    "postmigrate": RunState.SEALED,
    "shutdown": RunState.ENDED,
    "guest-panicked": RunState.ENDED,
    "internal-error": RunState.ENDED,
}
STATUSES = {str(status): status for status in EngineStatus}
_LATE = re.compile(r"Switchover ACK was requested by (\d+) devices during switchover")


def late_devices(error: str) -> int | None:
    """How many devices asked for another ACK between QEMU's decision to stop the guest and its last look.

    `error` is the `error-desc` of a migration whose status is `failed`; one that was cancelled before QEMU looked never
    has this text. None: it failed for another reason.
    """
    found = _LATE.fullmatch(error.strip())
    return int(found[1]) if found else None


def status(info: Mapping[str, Any]) -> EngineStatus:
    """Of an answer to query-migrate."""
    return STATUSES.get(info.get("status", "none"), EngineStatus.ACTIVE)


def progress(info: Mapping[str, Any]) -> Progress:
    """Of an answer to query-migrate."""
    ram: dict[str, Any] = info.get("ram", {})
    dirty_bytes_per_s = ram.get("dirty-pages-rate", 0) * ram.get("page-size", 4096)
    return Progress(
        transferred_bytes=ram.get("transferred", 0),
        remaining_bytes=info.get("remaining", ram.get("remaining", 0)),
        total_bytes=ram.get("total", 0),
        bandwidth_mbps=ram.get("mbps", 0.0),
        dirty_rate_mbps=dirty_bytes_per_s * 8 / 1e6,
        iteration=ram.get("dirty-sync-count", 0),
        expected_downtime_ms=info.get("expected-downtime", 0),
        status=status(info),
    )
