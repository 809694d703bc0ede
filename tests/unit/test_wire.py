"""Nothing is lost or changed between protos and the core, and messages read well for people and scripts."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import wire, wire_agent, wire_attempts, wire_words
from orchestrator.core.agent import (
    AgentSample,
    AgentStatus,
    AttemptSeen,
    AttemptStatus,
    ConductOrder,
    GuestStatus,
    PrepareOrder,
    Progress,
    RunState,
    WishApplied,
)
from orchestrator.core.endpoint import Endpoint, parse_ip
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.handover import Ownership
from orchestrator.core.ids import AckRequest, AttemptRef, HostRef
from orchestrator.core.migration import Prepared
from orchestrator.core.policy import MigrationPolicy, OnTimeout, override
from orchestrator.core.record import known_fields
from orchestrator.core.records import (
    AttemptReport,
    Boot,
    CloudInit,
    Cpu,
    DeviceSpec,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Display,
    EvacuationPhase,
    Firmware,
    GuestSpec,
    MigrationPhase,
    NicSpec,
    ShimKind,
    TimelineEntry,
    Tpm,
)
from protos.drover.v1 import agent_pb2, orchestrator_pb2, types_pb2

INT32 = st.integers(0, 2**31 - 1)
INT64 = st.integers(0, 2**63 - 1)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(max_size=20)


def records(kind: type[Any], **parts: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A record whose whole numbers fit 32 bits; Hypothesis chooses the other fields by their types."""
    by_name: dict[str, st.SearchStrategy[Any]] = {"int": INT32, "str": TEXT, "float": FLOAT, "bool": st.booleans()}
    chosen = {f.name: by_name[str(f.type)] for f in fields(kind) if str(f.type) in by_name}
    return st.builds(kind, **(chosen | parts))


ACKS = st.lists(records(AckRequest, generation=INT64), max_size=3).map(tuple)
POLICIES = records(MigrationPolicy, on_timeout=st.sampled_from(OnTimeout))
DEVICES = records(
    DeviceSpec,
    shim=st.sampled_from(ShimKind),
    dma=st.text(min_size=1, max_size=5),
    initial_bytes=INT64,
    stop_copy_bytes=INT64,
    dirty_bytes_per_s=INT64,
)
DISKS = records(DiskSpec, format=st.sampled_from(DiskFormat), size_bytes=INT64, cache=st.sampled_from(DiskCache))
NICS = records(NicSpec, queues=st.integers(1, 2**31 - 1))
GUESTS = records(
    GuestSpec,
    memory_mib=st.integers(1, 2**31 - 1),
    vcpus=st.integers(1, 2**31 - 1),
    machine=st.text(min_size=1, max_size=5),
    boot=records(Boot, firmware=st.sampled_from(Firmware)),
    cpu=records(Cpu),
    disks=st.lists(DISKS, max_size=3).map(tuple),
    nics=st.lists(NICS, max_size=3).map(tuple),
    tpm=st.none() | records(Tpm, version=st.text(min_size=1, max_size=5)),
    cloud_init=st.none() | records(CloudInit),
    extra_args=st.lists(TEXT, max_size=3).map(tuple),
    adopted=st.none(),  # the ledger's word alone: no caller may name a process
    display=records(Display),
    devices=st.lists(DEVICES, max_size=3).map(tuple),
    labels=st.dictionaries(TEXT, TEXT, max_size=3),
    policy=POLICIES,
)
PROGRESS = records(Progress, transferred_bytes=INT64, remaining_bytes=INT64, total_bytes=INT64, pending_acks=ACKS)
TIMELINES = st.lists(records(TimelineEntry), max_size=3).map(tuple)
REPORTS = records(
    AttemptReport,
    reason=st.none(),
    devices=st.lists(TEXT, max_size=2).map(tuple),
    zxid=INT64,
    requests=ACKS,
    acks=ACKS,
    requested_while_stopped=ACKS,
    transferred_bytes=INT64,
    timeline=TIMELINES,
)
REFS = records(AttemptRef)
GUEST_STATUS = records(GuestStatus, run_state=st.sampled_from(RunState))
ATTEMPT_STATUS = st.builds(
    AttemptStatus, REFS, st.none() | st.sampled_from(MigrationPhase), st.none() | PROGRESS, st.booleans()
)
IPS = st.ip_addresses().filter(lambda ip: str(ip) == str(parse_ip(str(ip)))).map(str)
ENDPOINTS = st.builds(Endpoint, IPS, st.integers(1, 65535))
PREPARED = records(Prepared, stream=ENDPOINTS, peer=ENDPOINTS)


@given(GUESTS)
def test_guest_specifications(spec: GuestSpec) -> None:
    message = types_pb2.GuestSpec.FromString(wire.guest_spec_to_proto(spec).SerializeToString())
    assert wire.guest_spec_from_proto(message) == spec


@given(POLICIES, POLICIES)
def test_a_whole_policy_leaves_nothing_of_the_one_below(policy: MigrationPolicy, below: MigrationPolicy) -> None:
    assert wire.policy_from_proto(wire.policy_to_proto(policy), below) == policy


@given(POLICIES, st.sets(st.sampled_from([field.name for field in known_fields(MigrationPolicy)])))
def test_a_part_of_a_policy_overrides_just_that_part(policy: MigrationPolicy, names: set[str]) -> None:
    given = {name: getattr(policy, name) for name in names}
    message = wire.policy_patch(given)
    assert message is not None
    merged = wire.policy_from_proto(message)
    for field in known_fields(MigrationPolicy):
        expected = policy if field.name in names else MigrationPolicy()
        assert getattr(merged, field.name) == getattr(expected, field.name)
    overrides = wire.overrides_from_proto(message)
    assert set(overrides) == names
    assert override(MigrationPolicy(), overrides) == merged
    assert wire.policy_patch(overrides) == message


@given(PROGRESS)
def test_progress(progress: Progress) -> None:
    assert wire_attempts.progress_from_proto(wire_attempts.progress_to_proto(progress)) == progress


@given(REPORTS)
def test_reports(report: AttemptReport) -> None:
    assert wire_attempts.report_from_proto(wire_attempts.report_to_proto(report)) == report


def test_a_reason_of_a_newer_agent_is_kept_for_people() -> None:
    known = wire_attempts.report_from_proto(types_pb2.AttemptReport(reason="LATE_SWITCHOVER_ACK", message="m"))
    assert (known.reason, known.message) == ("LATE_SWITCHOVER_ACK", "m")
    unknown = wire_attempts.report_from_proto(types_pb2.AttemptReport(reason="COSMIC_RAY", message="m"))
    assert (unknown.reason, unknown.message) == ("COSMIC_RAY", "m")
    nonsense = wire_attempts.report_from_proto(types_pb2.AttemptReport(reason="no reason", message="m"))
    assert (nonsense.reason, nonsense.message) == (None, "no reason: m")


@given(st.lists(GUEST_STATUS, max_size=3).map(tuple), st.lists(ATTEMPT_STATUS, max_size=3).map(tuple))
def test_what_agents_say(guests: tuple[GuestStatus, ...], attempts: tuple[AttemptStatus, ...]) -> None:
    sample = AgentSample(guests, attempts)
    assert wire_agent.agent_sample_from_proto(wire_agent.agent_sample_to_proto(sample)) == sample
    status = AgentStatus(HostRef("h1", "b"), 7, guests, attempts)
    assert wire_agent.agent_status_from_proto(wire_agent.agent_status_to_proto(status)) == status


@given(REFS, PREPARED, POLICIES, TEXT, INT64)
def test_what_agents_are_told(
    ref: AttemptRef, prepared: Prepared, policy: MigrationPolicy, text: str, epoch: int
) -> None:
    conduct = ConductOrder(ref, epoch, prepared, HostRef(text, text), policy, text)
    assert wire_agent.conduct_order_from_proto(wire_agent.conduct_order_to_proto(conduct)) == conduct
    prepare = PrepareOrder(ref, epoch, prepared.peer, policy.prepare_timeout_ms, policy.multifd_channels)
    assert wire_agent.prepare_order_from_proto(wire_agent.prepare_order_to_proto(prepare)) == prepare
    assert wire_agent.prepared_from_proto(wire_agent.prepared_to_proto(prepared)) == prepared


@pytest.mark.parametrize(
    ("ip", "port"),
    [
        ("exec:id > /proof", 1),
        ("file:/etc/shadow", 1),
        ("unix:/run/x", 1),
        ("host-1", 7702),
        ("192.0.2.1", 0),
        ("192.0.2.1", 65536),
        ("fe80::1%eth0", 1),
        ("", 0),
    ],
)
def test_an_endpoint_is_an_address_and_a_port(ip: str, port: int) -> None:
    """What QEMU would take for a command ran as root on the source."""
    message = agent_pb2.ConductAttemptRequest(stream=agent_pb2.Endpoint(ip=ip, port=port))
    with pytest.raises(DroverError) as caught:
        wire_agent.conduct_order_from_proto(message)
    assert (caught.value.reason, caught.value.field) == (RefusalReason.INVALID_ARGUMENT, "stream")


@given(st.booleans(), st.booleans(), st.none() | REPORTS, st.sampled_from(RunState))
def test_answers_of_agents(known: bool, ended: bool, report: AttemptReport | None, state: RunState) -> None:
    seen = AttemptSeen(known, ended, report)
    assert wire_agent.attempt_seen_from_proto(wire_agent.attempt_seen_to_proto(seen)) == seen
    wish = WishApplied(known, state)
    assert wire_agent.wish_applied_from_proto(wire_agent.wish_applied_to_proto(wish)) == wish


def test_every_word_of_the_core_has_its_word_in_the_protos() -> None:
    for phase in MigrationPhase:
        assert wire.word(types_pb2.Migration(phase=wire_words.phase_to_proto(phase)), "phase") == phase
    for phase in EvacuationPhase:
        assert wire.word(types_pb2.Evacuation(phase=wire_words.evacuation_phase_to_proto(phase)), "phase") == phase
    for phase in Ownership:
        assert wire.word(types_pb2.Guest(ownership=wire_words.ownership_to_proto(phase)), "ownership") == phase
    for state in RunState:
        assert wire.word(types_pb2.Guest(run_state=wire_words.run_state_to_proto(state)), "run_state") == state


def test_words_of_a_newer_version() -> None:
    newer: Any = 99
    assert wire_words.run_state_from_proto(newer) is RunState.UNKNOWN
    assert wire_words.phase_from_proto(newer) is None
    assert wire.word(types_pb2.Migration(phase=newer), "phase") == "99"
    assert wire.word(types_pb2.Migration(), "phase") == ""
    with pytest.raises(TypeError, match="not an enum"):
        wire.word(types_pb2.Migration(), "name")


def test_defaults_of_a_guest_that_says_little() -> None:
    device = types_pb2.DeviceSpec(name="nic", shim=types_pb2.SHIM_KIND_COMPANION, stop_copy_bytes=0)
    spec = wire.guest_spec_from_proto(types_pb2.GuestSpec(name="web", devices=[device]))
    assert spec == GuestSpec("web", devices=(DeviceSpec("nic", ShimKind.COMPANION, stop_copy_bytes=0),))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (types_pb2.GuestSpec(devices=[types_pb2.DeviceSpec()]), "spec.devices[0].shim"),
        (
            types_pb2.GuestSpec(policy=types_pb2.MigrationPolicy(on_timeout=9)),  # pyright: ignore[reportArgumentType]
            "spec.policy.on_timeout",
        ),
    ],
)
def test_words_that_a_request_needs_are_refused_by_their_field(message: types_pb2.GuestSpec, field: str) -> None:
    with pytest.raises(DroverError) as caught:
        wire.guest_spec_from_proto(message)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"max_attempts": "3"}, "policy.max_attempts"),
        ({"max_attempts": True}, "policy.max_attempts"),
        ({"max_attempts": 2**31}, "policy.max_attempts"),
        ({"max_attempts": -1}, "policy.max_attempts"),
        ({"auto_converge": 1}, "policy.auto_converge"),
        ({"on_timeout": "explode"}, "policy.on_timeout"),
        ({"speed": 1}, "policy.speed"),
    ],
)
def test_a_part_of_a_policy_is_read_strictly(given: dict[str, object], field: str) -> None:
    with pytest.raises(DroverError) as caught:
        wire.policy_patch(given)
    assert caught.value.field == field


def test_a_number_that_is_too_large_for_its_field_is_bad_input() -> None:
    with pytest.raises(DroverError, match="too large"):
        wire.guest_spec_to_proto(GuestSpec("web", memory_mib=2**40))


def test_json_for_scripts() -> None:
    guest = types_pb2.Guest(
        name="web",
        spec=types_pb2.GuestSpec(labels={"b": "2", "a": "1"}),
        run_state=types_pb2.RUN_STATE_PAUSED,
    )
    shown = wire.to_json(guest)
    assert shown["run_state"] == "PAUSED"
    assert shown["ownership"] == ""
    assert list(shown["spec"]["labels"].items()) == [("a", "1"), ("b", "2")]
    assert "policy" not in shown["spec"]
    migration = wire.to_json(
        types_pb2.Migration(
            name="m",
            create_time=wire.timestamp(1.5),
            attempts=[types_pb2.AttemptReport(zxid=2**40, acks=[types_pb2.AckRequest(device="nic", generation=2)])],
        )
    )
    assert migration["create_time"] == "1970-01-01T00:00:01.500Z"
    assert "end_time" not in migration
    assert migration["attempts"][0]["zxid"] == 2**40
    assert migration["attempts"][0]["acks"] == [{"device": "nic", "generation": 2}]
    assert wire.to_json(agent_pb2.DeviceLoad(digest=b"\x00\x01"))["digest"] == "AAE="
    wish = orchestrator_pb2.ChangeRunStateResponse(wish=orchestrator_pb2.WISH_STATE_QUEUED)
    assert wire.to_json(wish)["wish"] == "QUEUED"


def test_a_time_that_is_not_known_is_not_shown() -> None:
    assert wire.timestamp(0.0) is None
