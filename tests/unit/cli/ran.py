"""One call of `drover`, and what the service behind it holds."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from orchestrator.cli import main
from orchestrator.core.errors import RefusalReason
from protos.drover.v1 import types_pb2 as types

R = RefusalReason
ROOT = Path(__file__).resolve().parents[3]
DROVER = [sys.executable, "-m", "orchestrator.cli.main"]

Drover = Callable[..., "Ran"]


class Ran:
    """One call of `drover`."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def rows(self) -> list[list[str]]:
        """The table's lines, header included, as cells."""
        return [re.split(r" {2,}", line) for line in self.out.splitlines()]


def runner(capsys: pytest.CaptureFixture[str]) -> Drover:
    def run(*arguments: str) -> Ran:
        capsys.readouterr()
        code = main.run(arguments)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


def guest(name: str, **values: Any) -> types.Guest:
    device = types.DeviceSpec(name="flows", shim=types.SHIM_KIND_COMPANION, dma="none", initial_bytes=65536)
    given: dict[str, Any] = {
        "uuid": f"uuid-{name}",
        "host": "host-1",
        "ownership": types.OWNERSHIP_PHASE_IDLE,
        "run_state": types.RUN_STATE_RUNNING,
        "want_run": True,
        "spec": types.GuestSpec(name=name, memory_mib=64, vcpus=1, machine="pc", devices=[device], labels={"a": "b"}),
        **values,
    }
    return types.Guest(name=name, **given)


def migration(name: str, phase: str = "SUCCEEDED", **values: Any) -> types.Migration:
    begin = int(time.time()) - 100
    given: dict[str, Any] = {
        "guest": "web-2",
        "guest_uuid": f"uuid-{values.get('guest', 'web-2')}",
        "source": "host-1",
        "destination": "host-2",
        "attempt": 1,
        "create_time": Timestamp(seconds=begin),
        # Stamps of different clocks: nothing that took some time may be told from them.
        "end_time": Timestamp(seconds=begin - 700_000) if phase in ("SUCCEEDED", "FAILED", "CANCELLED") else None,
        "elapsed_ms": 4_000,
        **values,
    }
    return types.Migration(name=name, phase=types.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}"), **given)


def evacuation(phase: str, *guests: types.EvacuationGuest, **values: Any) -> types.Evacuation:
    begin = int(time.time()) - 10
    over = phase in ("SUCCEEDED", "FAILED", "CANCELLED")
    return types.Evacuation(
        name="e" * 32,
        host="host-1",
        phase=types.EvacuationPhase.Value(f"EVACUATION_PHASE_{phase}"),
        guests=guests,
        create_time=Timestamp(seconds=begin),
        end_time=Timestamp(seconds=begin + 700_000) if over else None,
        elapsed_ms=9_000,
        **values,
    )


def leaving(name: str, phase: str, **values: Any) -> types.EvacuationGuest:
    number = types.MigrationPhase.Value(f"MIGRATION_PHASE_{phase}")
    given: dict[str, Any] = {"destination": "host-2", "attempts": 1, "migration": f"m-{name}", **values}
    return types.EvacuationGuest(guest=name, guest_uuid=f"uuid-{name}", memory_mib=64, phase=number, **given)
