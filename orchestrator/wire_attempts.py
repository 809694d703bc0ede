"""How a migration's attempt goes and what it came to, between protos and the core: samples, time lines, reports."""

from __future__ import annotations

from orchestrator.core.agent import DiskProgress, Progress
from orchestrator.core.errors import AbortReason
from orchestrator.core.ids import AckRequest
from orchestrator.core.records import AttemptReport, DeviceProgress, TimelineEntry
from protos.drover.v1 import types_pb2


def ack_to_proto(entry: AckRequest) -> types_pb2.AckRequest:
    """One request for a switchover ACK: device and generation."""
    return types_pb2.AckRequest(device=entry.device, generation=entry.generation)


def ack_from_proto(message: types_pb2.AckRequest) -> AckRequest:
    """One request for a switchover ACK: device and generation."""
    return AckRequest(message.device, message.generation)


def device_progress_to_proto(device: DeviceProgress) -> types_pb2.DeviceProgress:
    """What one device has sent in its attempt, in bytes."""
    return types_pb2.DeviceProgress(
        name=device.name,
        initial_bytes=device.initial_bytes,
        stop_copy_bytes=device.stop_copy_bytes,
        precopy_sent_bytes=device.precopy_sent_bytes,
        stop_copy_sent_bytes=device.stop_copy_sent_bytes,
        reinits=device.reinits,
        late=device.late,
        lost=device.lost,
    )


def device_progress_from_proto(message: types_pb2.DeviceProgress) -> DeviceProgress:
    """What one device has sent in its attempt, in bytes."""
    return DeviceProgress(
        name=message.name,
        initial_bytes=message.initial_bytes,
        stop_copy_bytes=message.stop_copy_bytes,
        precopy_sent_bytes=message.precopy_sent_bytes,
        stop_copy_sent_bytes=message.stop_copy_sent_bytes,
        reinits=message.reinits,
        late=message.late,
        lost=message.lost,
    )


def disk_progress_to_proto(disk: DiskProgress) -> types_pb2.DiskProgress:
    """How far a local disk has come, in bytes."""
    return types_pb2.DiskProgress(
        name=disk.name,
        way=disk.way,
        copied_bytes=disk.copied_bytes,
        remaining_bytes=disk.remaining_bytes,
        ready=disk.ready,
    )


def disk_progress_from_proto(message: types_pb2.DiskProgress) -> DiskProgress:
    """How far a local disk has come, in bytes."""
    return DiskProgress(
        name=message.name,
        way=message.way,
        copied_bytes=message.copied_bytes,
        remaining_bytes=message.remaining_bytes,
        ready=message.ready,
    )


def progress_to_proto(progress: Progress) -> types_pb2.Progress:
    """A sample of an attempt. An expected downtime that does not fit its field is capped."""
    return types_pb2.Progress(
        transferred_bytes=progress.transferred_bytes,
        remaining_bytes=progress.remaining_bytes,
        total_bytes=progress.total_bytes,
        bandwidth_mbps=progress.bandwidth_mbps,
        dirty_rate_mbps=progress.dirty_rate_mbps,
        iteration=progress.iteration,
        expected_downtime_ms=min(progress.expected_downtime_ms, (1 << 31) - 1),
        engine_status=progress.engine_status,
        gate_open=progress.gate_open,
        pending_acks=map(ack_to_proto, progress.pending_acks),
        eta_s=progress.eta_s,
        devices=map(device_progress_to_proto, progress.devices),
        disks=map(disk_progress_to_proto, progress.disks),
    )


def progress_from_proto(message: types_pb2.Progress) -> Progress:
    """A sample of an attempt: sizes in bytes, rates in Mbit/s, times in ms, the ETA in seconds."""
    return Progress(
        transferred_bytes=message.transferred_bytes,
        remaining_bytes=message.remaining_bytes,
        total_bytes=message.total_bytes,
        bandwidth_mbps=message.bandwidth_mbps,
        dirty_rate_mbps=message.dirty_rate_mbps,
        iteration=message.iteration,
        expected_downtime_ms=message.expected_downtime_ms,
        engine_status=message.engine_status,
        gate_open=message.gate_open,
        pending_acks=tuple(map(ack_from_proto, message.pending_acks)),
        eta_s=message.eta_s,
        devices=tuple(map(device_progress_from_proto, message.devices)),
        disks=tuple(map(disk_progress_from_proto, message.disks)),
    )


def timeline_to_proto(entry: TimelineEntry) -> types_pb2.TimelineEntry:
    """One line of an attempt's time line."""
    return types_pb2.TimelineEntry(at_ms=entry.at_ms, where=entry.where, event=entry.event, detail=entry.detail)


def timeline_from_proto(message: types_pb2.TimelineEntry) -> TimelineEntry:
    """One line of an attempt's time line."""
    return TimelineEntry(message.at_ms, message.where, message.event, message.detail)


def report_to_proto(report: AttemptReport) -> types_pb2.AttemptReport:
    """What an attempt came to, with its time line and its devices."""
    return types_pb2.AttemptReport(
        attempt=report.attempt,
        outcome=report.outcome,
        reason=report.reason or "",
        devices=report.devices,
        message=report.message,
        source=report.source,
        destination=report.destination,
        inc=report.inc,
        zxid=report.zxid,
        requests=map(ack_to_proto, report.requests),
        acks=map(ack_to_proto, report.acks),
        requested_while_stopped=map(ack_to_proto, report.requested_while_stopped),
        blackout_ms=report.blackout_ms,
        transferred_bytes=report.transferred_bytes,
        duration_ms=report.duration_ms,
        ledger_writes=report.ledger_writes,
        timeline=map(timeline_to_proto, report.timeline),
        device_progress=map(device_progress_to_proto, report.device_progress),
        needs_operator=report.needs_operator,
    )


def report_from_proto(message: types_pb2.AttemptReport) -> AttemptReport:
    """A reason of a newer version is kept; what can be no reason at all is kept in the message."""
    try:
        reason = AbortReason(message.reason) if message.reason else None
    except ValueError:
        reason = None
    unknown = f"{message.reason}: " if message.reason and reason is None else ""
    return AttemptReport(
        attempt=message.attempt,
        outcome=message.outcome,
        reason=reason,
        devices=tuple(message.devices),
        message=unknown + message.message,
        source=message.source,
        destination=message.destination,
        inc=message.inc,
        zxid=message.zxid,
        requests=tuple(map(ack_from_proto, message.requests)),
        acks=tuple(map(ack_from_proto, message.acks)),
        requested_while_stopped=tuple(map(ack_from_proto, message.requested_while_stopped)),
        blackout_ms=message.blackout_ms,
        transferred_bytes=message.transferred_bytes,
        duration_ms=message.duration_ms,
        ledger_writes=message.ledger_writes,
        timeline=tuple(map(timeline_from_proto, message.timeline)),
        device_progress=tuple(map(device_progress_from_proto, message.device_progress)),
        needs_operator=message.needs_operator,
    )
