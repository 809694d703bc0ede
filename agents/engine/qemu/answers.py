"""What the words in QEMU's answers mean to us."""

from __future__ import annotations

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
