"""AgentService between protos and the core: what agents are ordered, what they say of guests, copies, attempts."""

from __future__ import annotations

from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    AttemptSeen,
    AttemptStatus,
    ConductOrder,
    CopyStatus,
    DisplayAddress,
    GuestStatus,
    GuestTrouble,
    PrepareOrder,
    Trouble,
    WishApplied,
)
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.ids import AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.restore import Held, HeldGuestCopy, HostHeld
from orchestrator.wire import policy_from_proto, policy_to_proto
from orchestrator.wire_attempts import progress_from_proto, progress_to_proto, report_from_proto, report_to_proto
from orchestrator.wire_words import phase_from_proto, phase_to_proto, run_state_from_proto, run_state_to_proto, wrong
from protos.drover.v1 import agent_pb2, types_pb2


def held_to_proto(held: HostHeld) -> agent_pb2.ListCopiesResponse:
    """What one host has, for whoever restores the ledger."""
    return agent_pb2.ListCopiesResponse(
        host=held.host.host,
        boot_id=held.host.boot_id,
        complete=held.complete,
        incarnation=held.incarnation,
        epochs=held.epochs,
        copies=map(_held_copy_to_proto, held.copies),
    )


def _held_copy_to_proto(copy: HeldGuestCopy) -> agent_pb2.HeldCopy:
    held = copy.held
    return agent_pb2.HeldCopy(
        guest_uuid=copy.guest,
        name=copy.name,
        inc=held.inc,
        incoming=held.incoming,
        running=held.running,
        sealed=held.sealed,
        ended=held.ended,
        known=held.known,
    )


def held_from_proto(message: agent_pb2.ListCopiesResponse) -> HostHeld:
    """What one host has, for whoever restores the ledger."""
    host = HostRef(message.host, message.boot_id)

    def copy(each: agent_pb2.HeldCopy) -> HeldGuestCopy:
        held = Held(host, each.inc, each.incoming, each.running, each.sealed, each.ended, each.known)
        return HeldGuestCopy(each.guest_uuid, each.name, held)

    copies = tuple(map(copy, message.copies))
    return HostHeld(host, message.complete, message.incarnation, dict(message.epochs), copies)


def guest_status_to_proto(status: GuestStatus) -> agent_pb2.GuestStatus:
    """A guest as its agent sees it."""
    return agent_pb2.GuestStatus(
        guest_uuid=status.guest,
        name=status.name,
        inc=status.inc,
        run_state=run_state_to_proto(status.run_state),
        pid=status.pid,
    )


def guest_status_from_proto(message: agent_pb2.GuestStatus) -> GuestStatus:
    """A guest as its agent sees it; a run state of a newer version is UNKNOWN."""
    return GuestStatus(
        message.guest_uuid, message.name, message.inc, run_state_from_proto(message.run_state), message.pid
    )


def attempt_status_to_proto(status: AttemptStatus) -> agent_pb2.AttemptStatus:
    """An attempt that is under way at its source, with its last sample if there is one."""
    return agent_pb2.AttemptStatus(
        guest_uuid=status.ref.guest,
        migration=status.ref.migration,
        attempt=status.ref.attempt,
        phase=phase_to_proto(status.phase) if status.phase else types_pb2.MIGRATION_PHASE_UNSPECIFIED,
        progress=progress_to_proto(status.progress) if status.progress else None,
        ended=status.ended,
        elapsed_ms=round(status.elapsed_ms),
    )


def attempt_status_from_proto(message: agent_pb2.AttemptStatus) -> AttemptStatus:
    """An attempt that is under way at its source; a phase of a newer version is None."""
    return AttemptStatus(
        ref=AttemptRef(message.guest_uuid, message.migration, message.attempt),
        phase=phase_from_proto(message.phase),
        progress=progress_from_proto(message.progress) if message.HasField("progress") else None,
        ended=message.ended,
        elapsed_ms=float(message.elapsed_ms),
    )


def agent_sample_to_proto(sample: AgentSample) -> agent_pb2.WatchAgentResponse:
    """What a watcher of an agent is told: guests and attempts that changed."""
    return agent_pb2.WatchAgentResponse(
        attempts=map(attempt_status_to_proto, sample.attempts), guests=map(guest_status_to_proto, sample.guests)
    )


def agent_sample_from_proto(message: agent_pb2.WatchAgentResponse) -> AgentSample:
    """What a watcher of an agent is told: guests and attempts that changed."""
    return AgentSample(
        guests=tuple(map(guest_status_from_proto, message.guests)),
        attempts=tuple(map(attempt_status_from_proto, message.attempts)),
    )


def agent_status_to_proto(status: AgentStatus) -> agent_pb2.GetAgentResponse:
    """Everything that an agent says of its host: guests, attempts, copies, troubles."""
    return agent_pb2.GetAgentResponse(
        host=status.host.host,
        boot_id=status.host.boot_id,
        epoch=status.epoch,
        guests=map(guest_status_to_proto, status.guests),
        attempts=map(attempt_status_to_proto, status.attempts),
        copies=map(_copy_status_to_proto, status.copies),
        complete=status.complete,
        troubles=map(_guest_trouble_to_proto, status.troubles),
    )


def _copy_status_to_proto(status: CopyStatus) -> agent_pb2.CopyStatus:
    return agent_pb2.CopyStatus(
        guest_uuid=status.guest,
        name=status.name,
        inc=status.inc,
        memory_mib=status.memory_mib,
        pid=status.pid,
        devices_pid=status.devices_pid,
        incoming=status.incoming,
    )


def _guest_trouble_to_proto(trouble: GuestTrouble) -> agent_pb2.GuestTrouble:
    return agent_pb2.GuestTrouble(
        guest_uuid=trouble.guest, name=trouble.name, trouble=trouble.trouble.value, message=trouble.message
    )


def _copy_status_from_proto(message: agent_pb2.CopyStatus) -> CopyStatus:
    return CopyStatus(
        guest=message.guest_uuid,
        name=message.name,
        inc=message.inc,
        memory_mib=message.memory_mib,
        pid=message.pid,
        devices_pid=message.devices_pid,
        incoming=message.incoming,
    )


def _guest_trouble_from_proto(message: agent_pb2.GuestTrouble) -> GuestTrouble:
    try:
        trouble = Trouble(message.trouble)
    except ValueError:  # a newer agent's word
        trouble = Trouble.NOT_KEPT
    return GuestTrouble(message.guest_uuid, message.name, trouble, message.message)


def agent_status_from_proto(message: agent_pb2.GetAgentResponse) -> AgentStatus:
    """Everything that an agent says of its host: guests, attempts, copies, troubles."""
    return AgentStatus(
        host=HostRef(message.host, message.boot_id),
        epoch=message.epoch,
        guests=tuple(map(guest_status_from_proto, message.guests)),
        attempts=tuple(map(attempt_status_from_proto, message.attempts)),
        copies=tuple(map(_copy_status_from_proto, message.copies)),
        complete=message.complete,
        troubles=tuple(map(_guest_trouble_from_proto, message.troubles)),
    )


def endpoint_to_proto(endpoint: Endpoint) -> agent_pb2.Endpoint:
    """An IP address and a port."""
    return agent_pb2.Endpoint(ip=endpoint.ip, port=endpoint.port)


def endpoint_from_proto(message: agent_pb2.Endpoint, *, field: str) -> Endpoint:
    """Raises INVALID_ARGUMENT for anything but an IP address and a port."""
    try:
        return Endpoint(message.ip, message.port)
    except ValueError as error:
        raise wrong(field, str(error)) from None


def prepare_order_to_proto(order: PrepareOrder) -> agent_pb2.PrepareDestinationRequest:
    """The coordinator's order to a destination."""
    return agent_pb2.PrepareDestinationRequest(
        guest_uuid=order.attempt.guest,
        migration=order.attempt.migration,
        attempt=order.attempt.attempt,
        epoch=order.epoch,
        source_peer=endpoint_to_proto(order.source_peer),
        timeout_ms=order.timeout_ms,
        multifd_channels=order.multifd_channels,
        shard=order.shard,
    )


def prepare_order_from_proto(message: agent_pb2.PrepareDestinationRequest) -> PrepareOrder:
    """The coordinator's order to a destination. Raises INVALID_ARGUMENT for what cannot be understood."""
    return PrepareOrder(
        attempt=AttemptRef(message.guest_uuid, message.migration, message.attempt),
        epoch=message.epoch,
        source_peer=endpoint_from_proto(message.source_peer, field="source_peer"),
        timeout_ms=message.timeout_ms,
        multifd_channels=message.multifd_channels,
        shard=message.shard,
    )


def prepared_to_proto(prepared: Prepared) -> agent_pb2.PrepareDestinationResponse:
    """A destination's answer: its process, and where memory and calls are to go."""
    return agent_pb2.PrepareDestinationResponse(
        inc=prepared.inc,
        stream=endpoint_to_proto(prepared.stream),
        peer=endpoint_to_proto(prepared.peer),
        machine=prepared.machine,
        switchover_ack=prepared.switchover_ack,
        tls=prepared.tls,
    )


def prepared_from_proto(message: agent_pb2.PrepareDestinationResponse | agent_pb2.ConductAttemptRequest) -> Prepared:
    """A destination's answer: its process, and where memory and calls are to go."""
    return Prepared(
        message.inc,
        endpoint_from_proto(message.stream, field="stream"),
        endpoint_from_proto(message.peer, field="peer"),
        message.machine,
        message.switchover_ack,
        message.tls,
    )


def conduct_order_to_proto(order: ConductOrder) -> agent_pb2.ConductAttemptRequest:
    """The coordinator's order to a source."""
    return agent_pb2.ConductAttemptRequest(
        guest_uuid=order.attempt.guest,
        migration=order.attempt.migration,
        attempt=order.attempt.attempt,
        epoch=order.epoch,
        inc=order.prepared.inc,
        destination=order.destination.host,
        destination_boot_id=order.destination.boot_id,
        stream=endpoint_to_proto(order.prepared.stream),
        peer=endpoint_to_proto(order.prepared.peer),
        policy=policy_to_proto(order.policy),
        previous_reason=order.previous_reason,
        machine=order.prepared.machine,
        switchover_ack=order.prepared.switchover_ack,
        tls=order.prepared.tls,
        shard=order.shard,
    )


def conduct_order_from_proto(message: agent_pb2.ConductAttemptRequest) -> ConductOrder:
    """The coordinator's order to a source. Raises INVALID_ARGUMENT for what cannot be understood."""
    return ConductOrder(
        attempt=AttemptRef(message.guest_uuid, message.migration, message.attempt),
        epoch=message.epoch,
        prepared=prepared_from_proto(message),
        destination=HostRef(message.destination, message.destination_boot_id),
        policy=policy_from_proto(message.policy),
        previous_reason=message.previous_reason,
        shard=message.shard,
    )


def attempt_seen_to_proto(seen: AttemptSeen) -> agent_pb2.GetAttemptResponse:
    """What an agent knows of one attempt, with its report once there is one."""
    report = report_to_proto(seen.report) if seen.report else None
    return agent_pb2.GetAttemptResponse(known=seen.known, ended=seen.ended, report=report)


def attempt_seen_from_proto(message: agent_pb2.GetAttemptResponse) -> AttemptSeen:
    """What an agent knows of one attempt, with its report once there is one."""
    report = report_from_proto(message.report) if message.HasField("report") else None
    return AttemptSeen(message.known, message.ended, report)


def wish_applied_to_proto(wish: WishApplied) -> agent_pb2.ApplyWantRunResponse:
    """Whether a pause or a resume has taken effect, and how the guest is now."""
    return agent_pb2.ApplyWantRunResponse(applied=wish.applied, run_state=run_state_to_proto(wish.run_state))


def wish_applied_from_proto(message: agent_pb2.ApplyWantRunResponse) -> WishApplied:
    """Whether a pause or a resume has taken effect, and how the guest is now."""
    return WishApplied(message.applied, run_state_from_proto(message.run_state))


def display_to_proto(found: DisplayAddress) -> types_pb2.DisplayAddress:
    """Where a guest's screen is served."""
    return types_pb2.DisplayAddress(
        host=found.host,
        socket=found.socket,
        address=found.address,
        password=found.password,
        password_valid_s=found.password_valid_s,
    )


def display_from_proto(message: types_pb2.DisplayAddress) -> DisplayAddress:
    """See `display_to_proto`."""
    return DisplayAddress(message.host, message.socket, message.address, message.password, message.password_valid_s)
