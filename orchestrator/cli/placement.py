"""What stands against a guest on each host, for commands that only check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.cli import units
from orchestrator.cli.output import Column, Printer
from orchestrator.core.errors import RefusalReason

if TYPE_CHECKING:
    from orchestrator.rpc.messages import CheckPlacementResponse, HostVerdict

NO_PLACE = frozenset(
    {
        RefusalReason.NO_CAPACITY,
        RefusalReason.HOST_CORDONED,
        RefusalReason.HOST_NOT_LIVE,
        RefusalReason.MACHINE_TYPE_MISMATCH,
        RefusalReason.DEVICE_NOT_MIGRATABLE,
        RefusalReason.POOL_NOT_FOUND,
        RefusalReason.POOL_NOT_FENCED,
        RefusalReason.POOL_FULL,
        RefusalReason.NETWORK_NOT_FOUND,
        RefusalReason.CPU_NOT_AVAILABLE,
        RefusalReason.FIRMWARE_NOT_AVAILABLE,
        RefusalReason.TPM_NOT_AVAILABLE,
        RefusalReason.FEATURE_NOT_AVAILABLE,
        RefusalReason.EXTRA_ARGS_NOT_ALLOWED,
    }
)
"""Refusals that a placement gives. They name a handful of hosts; the verdict on each is asked for on its own."""


def show_verdicts(printer: Printer, found: CheckPlacementResponse) -> None:
    """Every host with what stands against the guest there: a table, or one document."""
    from orchestrator import wire

    if printer.machine:
        printer.document(wire.to_json(found))
    elif found.verdicts:
        ordered = sorted(found.verdicts, key=lambda verdict: units.natural(verdict.host))
        printer.table(_columns(), ordered, empty="")


def _columns() -> list[Column[HostVerdict]]:
    return [
        Column("HOST", lambda verdict: verdict.host),
        Column("MiB FREE", lambda verdict: str(verdict.memory_free_mib), right=True),
        Column("REASON", lambda verdict: (verdict.reason, "red") if verdict.reason else ("ok", "green")),
        Column("MESSAGE", lambda verdict: verdict.message, elastic=True, optional=True),
    ]
