"""What stands against a guest on each host, for commands that only check."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

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
        RefusalReason.BLOCK_JOB_RUNNING,
        RefusalReason.POOL_NOT_FOUND,
        RefusalReason.POOL_NOT_FENCED,
        RefusalReason.POOL_FULL,
        RefusalReason.DISK_NOT_MIGRATABLE,
        RefusalReason.NETWORK_NOT_FOUND,
        RefusalReason.CPU_NOT_AVAILABLE,
        RefusalReason.BASE_NOT_AVAILABLE,
        RefusalReason.FIRMWARE_NOT_AVAILABLE,
        RefusalReason.TPM_NOT_AVAILABLE,
        RefusalReason.FEATURE_NOT_AVAILABLE,
        RefusalReason.EXTRA_ARGS_NOT_ALLOWED,
    }
)
"""Refusals that a placement gives. They name a handful of hosts; the verdict on each is asked for on its own."""


def show_check(printer: Printer, found: CheckPlacementResponse) -> bool:
    """What stands against moving a guest, at its own host and on each other one, with what can be done about it: a
    table, or one document. Whether it could move now."""
    from orchestrator import wire
    from orchestrator.core.obstacles import certain, remedy

    stands = any(certain(wire.obstacle_from_proto(each)) for each in found.obstacles)
    if printer.machine:
        printer.document(wire.to_json(found))
        return bool(found.destination) and not stands
    rows = [Stands("its own", each.reason, each.message, remedy(each.reason)) for each in found.obstacles]
    for verdict in sorted(found.verdicts, key=lambda verdict: units.natural(verdict.host)):
        rows.append(Stands(verdict.host, verdict.reason, verdict.message, remedy(verdict.reason)))
    printer.table(_check_columns(), rows, empty="there is no other host")
    if found.destination and not stands:
        printer.show(f"it could move to {found.destination} now")
    return bool(found.destination) and not stands


class Stands(NamedTuple):
    """One line of a check."""

    host: str
    reason: str
    message: str
    remedy: str


def _check_columns() -> list[Column[Stands]]:
    return [
        Column("HOST", lambda row: row.host),
        Column("REASON", lambda row: (row.reason, "red") if row.reason else ("ok", "green")),
        Column("MESSAGE", lambda row: row.message, elastic=True, optional=True, least=30),
        Column("WHAT CAN BE DONE", lambda row: row.remedy, elastic=True, optional=True, least=20),
    ]


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
