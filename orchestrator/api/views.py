"""Resources as the API shows them: what was read, with what the agents say added. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator import wire, wire_attempts, wire_hardware, wire_words
from orchestrator.api.ages import Ages
from orchestrator.api.decisions import (
    cancel_is_wished,
    is_safe_to_power_off,
    migration_phase,
    present_migration,
    run_state,
)
from orchestrator.api.reads import EvacuationRead, GuestRead, MigrationRead
from orchestrator.core.agent import AgentStatus, AttemptStatus, CopyStatus, GuestStatus
from orchestrator.core.death import standing
from orchestrator.core.errors import DroverError
from orchestrator.core.handover import Ownership
from orchestrator.core.placement import GuestInput, HostInput, HostView, PlannedGuest
from orchestrator.core.records import AttemptReport, EvacuationGuest, MigrationPhase
from orchestrator.core.text import clip
from orchestrator.fleet import Fleet
from orchestrator.ledger.snapshot import Snapshot
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

TROUBLE_SHOWN = 1000
"""Characters of an agent's sentence about a guest."""


def host(known: HostInput, view: HostView, guests: int) -> types_pb2.Host:
    """What is known of a host, with what a placement counts on it. `guests`: how many there are."""
    record = known.record
    silent = types_pb2.HOST_STATE_DEAD if known.certified_dead else types_pb2.HOST_STATE_SILENT
    return types_pb2.Host(
        name=record.name,
        state=types_pb2.HOST_STATE_LIVE if known.live else silent,
        boot_id=record.boot_id,
        control_address=record.control_address,
        peer_address=record.peer_address,
        memory_mib=record.memory_mib,
        memory_used_mib=view.used_mib,
        memory_reserved_mib=view.reserved_mib,
        bandwidth_mbps=record.bandwidth_mbps,
        guests=guests,
        cordoned=view.cordoned,
        cordon_reason=view.cordon_reason,
        engine=record.engine,
        machine_types=record.machine_types,
        accelerator=record.accelerator,
        switchover_ack=record.switchover_ack,
        pools=[wire_hardware.pool_to_proto(pool, known.space) for pool in record.pools],
        networks=map(wire_hardware.network_to_proto, record.networks),
        cpu_models=record.cpu_models,
        firmware=record.firmware,
        extra_args=record.extra_args,
        features=record.features,
        engine_limits=record.engine_limits,
    )


def guests_by_host(snapshot: Snapshot) -> dict[str, int]:
    """How many guests each host owns, those apart that died with it."""
    count: dict[str, int] = {}
    for guest in snapshot.guests.values():
        if guest.record.phase is not Ownership.CRASHED:
            count[guest.record.owner.host] = count.get(guest.record.owner.host, 0) + 1
    return count


def host_agent(status: AgentStatus | DroverError, owners: Mapping[str, str]) -> types_pb2.HostAgent:
    """`owners`: the host that owns each guest whose life is not over, by uuid."""
    if isinstance(status, DroverError):
        return types_pb2.HostAgent(message=clip(status.message))

    def copy(each: CopyStatus) -> types_pb2.HostCopy:
        return types_pb2.HostCopy(
            guest=each.name,
            guest_uuid=each.guest,
            memory_mib=each.memory_mib,
            pid=each.pid,
            devices_pid=each.devices_pid,
            incoming=each.incoming,
            owner=owners.get(each.guest, ""),
        )

    return types_pb2.HostAgent(
        answered=True,
        complete=status.complete,
        copies=[copy(each) for each in sorted(status.copies, key=lambda each: (each.name, each.guest, each.inc))],
        troubles=[
            types_pb2.HostTrouble(
                guest=each.name, guest_uuid=each.guest, trouble=each.trouble, message=clip(each.message, TROUBLE_SHOWN)
            )
            for each in sorted(status.troubles, key=lambda each: (each.name, each.guest))
        ],
    )


def guest(read: GuestRead, fleet: Fleet) -> types_pb2.Guest:
    """One life, with the run state that its agent last gave."""
    record = read.record
    told = fleet.guest(record.owner.host, read.uuid)
    return types_pb2.Guest(
        name=record.name,
        uuid=read.uuid,
        spec=wire.guest_spec_to_proto(read.spec),
        host=record.owner.host,
        ownership=types_pb2.OWNERSHIP_PHASE_STOPPED if record.stopped else wire_words.ownership_to_proto(record.phase),
        run_state=wire_words.run_state_to_proto(run_state(record, told)),
        want_run=read.want_run is None or read.want_run.run,
        migration=present_migration(record),
        etag=read.etag,
        message=standing(record, read.spec) if record.phase is Ownership.CRASHED else _as_found(read, told),
    )


def _as_found(read: GuestRead, told: GuestStatus | None) -> str:
    """That it still is the process that somebody else started; empty: it is none, or not for all that is known."""
    taken = read.spec.adopted
    if taken is None or told is None or told.pid != taken.pid:
        return ""
    return f"still runs in process {taken.pid}, which it was adopted from: move it, or release it"


def without_texts(guest: types_pb2.Guest) -> types_pb2.Guest:
    """As lists show it: a page of guests with all their cloud-init files would be larger than a message may be."""
    if guest.spec.HasField("cloud_init"):
        guest.spec.cloud_init.Clear()
    return guest


def _sample(migration: str, attempt: int, hosts: Sequence[str], fleet: Fleet) -> AttemptStatus | None:
    found = (fleet.attempt(name, migration, attempt) for name in hosts if name)
    return next((status for status in found if status is not None), None)


_MOVING = frozenset(
    {
        MigrationPhase.PREPARING,
        MigrationPhase.PRECOPY,
        MigrationPhase.SWITCHOVER,
        MigrationPhase.COMMITTED,
        MigrationPhase.FINALIZING,
    }
)
"""While an attempt is under way; afterwards its last sample says nothing any more."""


def migration(read: MigrationRead, fleet: Fleet, *, timelines: bool = True) -> types_pb2.Migration:
    """`timelines` False leaves out what only `explain` needs."""
    spec, standing = read.spec, read.standing
    state, record = standing.state, standing.record
    over = state.phase.terminal
    sample = None if over else _sample(spec.id, state.attempt, (state.source, state.destination), fleet)
    phase = migration_phase(spec.id, standing, sample.phase if sample else None)
    progress = sample.progress if sample is not None and phase in _MOVING else None
    source = state.source or (record.owner.host if record is not None and not over else "")
    return types_pb2.Migration(
        name=spec.id,
        guest=spec.guest_name,
        guest_uuid=spec.guest,
        source=source,
        destination=state.destination or spec.destination,
        phase=wire_words.phase_to_proto(phase),
        attempt=state.attempt,
        progress=wire_attempts.progress_to_proto(progress) if progress is not None else None,
        attempts=[
            wire_attempts.report_to_proto(report if timelines else _short(report)) for report in standing.reports
        ],
        failure=state.failure or "",
        message=state.message or _silence(phase, (source, state.destination), fleet),
        waiting_for=state.waiting_for or "",
        cancel_requested=cancel_is_wished(spec.id, standing),
        policy=wire.policy_to_proto(spec.policy),
        evacuation=spec.evacuation,
        create_time=wire.timestamp(spec.create_time_s),
        end_time=wire.timestamp(state.end_time_s),
    )


def _with_newer(message: str, fields: Sequence[str]) -> str:
    """What is said of a job whose policy has fields that this version does not know."""
    said = f"set by a newer version, not shown here: {', '.join(sorted(fields))}" if fields else ""
    return "; ".join(filter(None, (message, said)))


def migration_elapsed_ms(read: MigrationRead, fleet: Fleet, ages: Ages) -> int:
    """How long it has taken; a change in this alone is not worth telling."""
    state, reports = read.standing.state, read.standing.reports
    spent_ms = max(state.spent_ms, sum(report.duration_ms for report in reports))  # older versions wrote no `spent_ms`
    if state.phase.terminal:
        return round(spent_ms)
    sample = _sample(read.spec.id, state.attempt, (state.source,), fleet)
    attempt_ms = sample.elapsed_ms if sample is not None and state.phase is not MigrationPhase.RETRY_WAIT else 0.0
    resource = f"migrations/{read.spec.id}"
    return round(ages.elapsed_ms(resource, read.standing.state_version, spent_ms, attempt_ms))


def evacuation_elapsed_ms(read: EvacuationRead, ages: Ages) -> int:
    """As of a migration."""
    spent_ms = read.head.spent_ms
    if read.head.phase.terminal:
        return round(spent_ms)
    return round(ages.elapsed_ms(f"evacuations/{read.spec.id}", read.version, spent_ms))


def quarantined(message: str, reason: str) -> str:
    """What is said of a migration or an evacuation that the leader has set aside for `reason`, and tries again."""
    return f"quarantined: {reason}" + (f" ({message})" if message else "") if reason else message


def _silence(phase: MigrationPhase, hosts: Sequence[str], fleet: Fleet) -> str:
    """What a migration is held up by when an agent is gone: its guest runs on, and nobody else may conduct it."""
    silent = " and ".join(host for host in hosts if host and not fleet.hears(host))
    return f"waiting for the agent of {silent}, which does not answer" if silent and phase in _MOVING else ""


def _short(report: AttemptReport) -> AttemptReport:
    return replace(report, timeline=())


def evacuation(read: EvacuationRead, fleet: Fleet) -> types_pb2.Evacuation:
    """An evacuation with its guests, each with its migration's progress. Times that go on are the caller's to add."""
    spec, state = read.spec, read.state
    policy, newer = wire.overrides_to_proto(spec.policy)
    return types_pb2.Evacuation(
        name=spec.id,
        host=spec.host,
        phase=wire_words.evacuation_phase_to_proto(state.phase),
        guests=[_evacuation_guest(one, spec.host, fleet) for one in state.guests],
        max_concurrent=spec.max_concurrent,
        policy=policy,
        safe_to_power_off=is_safe_to_power_off(state, read.cordon, read.cordon_version),
        failure=state.failure or "",
        message=_with_newer(state.message, newer),
        cancel_requested=state.cancel_requested,
        create_time=wire.timestamp(spec.create_time_s),
        end_time=wire.timestamp(state.end_time_s),
    )


def _evacuation_guest(one: EvacuationGuest, source: str, fleet: Fleet) -> types_pb2.EvacuationGuest:
    waiting = not one.migration or one.phase.terminal or one.phase is MigrationPhase.RETRY_WAIT
    sample = None if waiting else _sample(one.migration, one.attempts, (source, one.destination), fleet)
    phase = sample.phase if sample is not None and sample.phase is not None else one.phase
    return types_pb2.EvacuationGuest(
        guest=one.name,
        guest_uuid=one.guest,
        memory_mib=one.memory_mib,
        migration=one.migration,
        phase=wire_words.phase_to_proto(phase) if one.migration else types_pb2.MIGRATION_PHASE_UNSPECIFIED,
        destination=one.destination,
        failure=one.failure or "",
        message=one.message or ("" if waiting else _silence(phase, (source, one.destination), fleet)),
        attempts=one.attempts,
        progress=wire_attempts.progress_to_proto(sample.progress) if sample is not None and sample.progress else None,
    )


def verdict(known: GuestInput, planned: PlannedGuest | None) -> pb.PlacementVerdict:
    """One line of a plan; `planned` is None for a guest that is on its way already."""
    record = known.record
    line = pb.PlacementVerdict(guest=record.name, memory_mib=known.spec.memory_mib)
    if planned is None:
        line.destination = record.destination.host if record.destination else ""
        line.message = f"in migration {present_migration(record)} already"
    elif planned.choice.destination is not None:
        line.destination = planned.choice.destination.host
    else:
        line.reason = planned.choice.reason or ""
        line.message = planned.choice.message
    return line
