"""The typed ledger turns records into operations that read back as the same records."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.core.records import AttemptReport, Attempts, Boot, Cordon, GuestSpec, TimelineEntry
from orchestrator.ledger.ledger import Ledger, op_create, op_set
from orchestrator.ledger.records import BadRecord, decode, encode, encode_attempts
from orchestrator.ledger.store import Conflict, Done
from tests.fakes.coordination import MemoryStore


def test_operations_carry_a_record_that_reads_back_the_same() -> None:
    record = Cordon(True, "disk", "ann")
    created = op_create("/hosts/a/cordon", record)
    changed = op_set("/hosts/a/cordon", record, 3)
    assert decode(Cordon, created.data) == record
    assert decode(Cordon, changed.data) == record
    assert changed.version == 3


def test_an_old_version_never_overwrites_and_listings_cross_shards() -> None:
    async def story() -> None:
        ledger = Ledger(MemoryStore())
        await ledger.init_tree()
        await ledger.store.ensure("/hosts/a")
        await ledger.store.ensure("/migs/bb/bb1")
        await ledger.store.ensure("/migs/aa/aa1")
        assert isinstance(await ledger.store.multi([op_create("/hosts/a/cordon", Cordon())]), Done)
        assert isinstance(await ledger.cas("/hosts/a/cordon", Cordon(True), 0), Done)
        assert isinstance(await ledger.cas("/hosts/a/cordon", Cordon(), 0), Conflict)
        assert await ledger.settle(lambda: ledger.read(Cordon, "/hosts/a/cordon")) == (Cordon(True), 1)
        assert await ledger.list_migrations() == ("aa1", "bb1")
        assert await ledger.list_hosts() == ("a",)
        assert await ledger.read_guest("none") is None

    asyncio.run(story())


def test_a_hundred_attempts_with_long_time_lines_fit_into_a_node() -> None:
    entry = TimelineEntry(1.0, "host-1", "device", "nic: asks again with 4096 bytes of new initial data")
    reports = [AttemptReport(number, "ABORTED", timeline=(entry,) * 200) for number in range(1, 101)]
    with pytest.raises(BadRecord):
        encode(Attempts(tuple(reports)))
    kept = decode(Attempts, encode_attempts(reports)).reports
    assert [report.attempt for report in kept] == list(range(1, 101))
    told = [bool(report.timeline) for report in kept]
    assert told == sorted(told), "the oldest lose theirs first"
    assert told[-1]
    assert decode(Attempts, encode_attempts(reports[:3])).reports == tuple(reports[:3])


def test_a_guest_from_before_boot_took_the_place_of_workload_is_still_read() -> None:
    old = (
        b'{"name":"web-1","memory_mib":128,"vcpus":2,"machine":"pc","workload":{"dirty_mib":8,"dirty_pages_per_s":400,'
        b'"static_mib":8,"heartbeat_hz":50,"doorbell_hz":10},"devices":[],"labels":{"a":"b"},"policy":{"max_attempts":3}}'
    )
    spec = decode(GuestSpec, old)
    assert (spec.name, spec.memory_mib, spec.labels, spec.policy.max_attempts) == ("web-1", 128, {"a": "b"}, 3)
    assert spec.boot == Boot()
