"""The typed ledger turns records into operations that read back as the same records."""

from __future__ import annotations

from orchestrator.core.records import Cordon
from orchestrator.ledger.ledger import op_create, op_set
from orchestrator.ledger.records import decode


def test_operations_carry_a_record_that_reads_back_the_same() -> None:
    record = Cordon(True, "disk", "ann")
    created = op_create("/hosts/a/cordon", record)
    changed = op_set("/hosts/a/cordon", record, 3)
    assert decode(Cordon, created.data) == record
    assert decode(Cordon, changed.data) == record
    assert changed.version == 3
