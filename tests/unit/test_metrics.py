"""What the metrics count, from reports as agents make them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from agents.host.metrics import Metrics, ack_waits_s, initial_data_waits_s
from orchestrator.core.errors import AbortReason
from orchestrator.core.records import AttemptReport, DeviceSpec, ShimKind, TimelineEntry


def entry(at_ms: float, event: str, detail: str) -> TimelineEntry:
    return TimelineEntry(at_ms, "h", event, detail)


def test_only_answered_requests_have_a_wait() -> None:
    timeline = (entry(1, "request", "a/1"), entry(2, "request", "b/1"), entry(6, "ack", "a/1"), entry(7, "ack", "c/1"))
    assert ack_waits_s(timeline) == [0.005]


def test_a_device_inside_the_vmm_waits_until_its_initial_data_is_sent() -> None:
    said = [
        (1, "nic: asks for an ACK"),
        (2, "gpu: asks for an ACK"),
        (3, "nic: RUNNING"),
        (9, "nic: its initial data is sent"),
        (20, "nic: asks again with 4096 bytes of new initial data"),
        (24, "nic: its initial data is sent"),
        (30, "nic: asks again with 1 bytes of new initial data, after the guest was stopped"),
    ]
    timeline = tuple(entry(at_ms, "device", what) for at_ms, what in said)
    assert initial_data_waits_s(timeline) == [0.008, 0.004]


def test_an_attempt_is_counted_with_its_end_and_its_late_devices() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    late = AbortReason.LATE_SWITCHOVER_ACK
    metrics.attempt_over(AttemptReport(1, "ABORTED", late, ("a", "b"), blackout_ms=12.0), ())
    device = DeviceSpec("a", ShimKind.COMPANION, initial_bytes=10, stop_copy_bytes=3)
    metrics.attempt_over(AttemptReport(2, "COMMITTED", transferred_bytes=99, blackout_ms=40.0), (device,))
    value = registry.get_sample_value
    assert value("drover_attempts_total", {"outcome": "ABORTED", "reason": "LATE_SWITCHOVER_ACK"}) == 1
    assert value("drover_attempts_total", {"outcome": "COMMITTED", "reason": ""}) == 1
    assert value("drover_late_acks_total") == 2
    assert value("drover_blackout_seconds_sum", {"outcome": "ABORTED"}) == 0.012
    assert value("drover_sent_bytes_total") == 99
    assert value("drover_device_declared_bytes_total", {"kind": "stop_copy"}) == 3
