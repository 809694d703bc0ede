"""Between protos and the core: with its parts the one place that knows both.

Here: policies, guests' specs, and messages as people and scripts read them. Its parts: wire_words (enumerations, and
what is said of wrong input), wire_hardware (disks, cards, devices, machines), wire_attempts (how an attempt goes) and
wire_agent (AgentService). In all of them:

`X_to_proto` never fails for a value of the core whose numbers fit the field. `X_from_proto` raises DroverError
INVALID_ARGUMENT with the field for a word that this version does not know where it must understand it (a request);
where it only passes on what others said (a status), an unknown word becomes None or UNKNOWN.

`word` and `to_json` make messages readable for people and scripts.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.offers import Obstacle
from orchestrator.core.policy import MigrationPolicy, OnTimeout, override
from orchestrator.core.record import known_fields
from orchestrator.core.records import CloudInit, Cpu, Display, GuestSpec, OnHostDeath, Tpm
from orchestrator.core.text import clip, quoted
from orchestrator.wire_hardware import (
    boot_from_proto,
    boot_to_proto,
    device_from_proto,
    device_to_proto,
    disk_from_proto,
    disk_to_proto,
    nic_from_proto,
    nic_to_proto,
)
from orchestrator.wire_words import is_set, unknown_word, wrong
from protos.drover.v1 import types_pb2

# --- policy -----------------------------------------------------------------------------------------------------------

_ON_TIMEOUT = {value: types_pb2.OnTimeout.Value(f"ON_TIMEOUT_{value.name}") for value in OnTimeout}
_ON_TIMEOUT_OF = {number: value for value, number in _ON_TIMEOUT.items()}
_POLICY_SWITCHES = ("auto_converge", "wait_for_capacity")
_POLICY_NUMBERS = tuple(
    field.name for field in known_fields(MigrationPolicy) if field.name not in ("on_timeout", *_POLICY_SWITCHES)
)


def policy_to_proto(policy: MigrationPolicy) -> types_pb2.MigrationPolicy:
    """Every field set."""
    plain: dict[str, Any] = {name: getattr(policy, name) for name in (*_POLICY_NUMBERS, *_POLICY_SWITCHES)}
    return types_pb2.MigrationPolicy(**plain, on_timeout=_ON_TIMEOUT[policy.on_timeout])


def policy_from_proto(
    message: types_pb2.MigrationPolicy, base: MigrationPolicy = MigrationPolicy(), *, field: str = "policy"
) -> MigrationPolicy:
    """`base` with what is set in the message."""
    return override(base, overrides_from_proto(message, field=field))


def overrides_from_proto(message: types_pb2.MigrationPolicy, *, field: str = "policy") -> dict[str, int | bool | str]:
    """What is set in the message, as `core.policy.override` takes it."""
    given: dict[str, int | bool | str] = {
        name: getattr(message, name) for name in (*_POLICY_NUMBERS, *_POLICY_SWITCHES) if is_set(message, name)
    }
    if message.on_timeout:
        known = _ON_TIMEOUT_OF.get(message.on_timeout)
        if known is None:
            raise unknown_word(f"{field}.on_timeout", message.on_timeout, OnTimeout)
        given["on_timeout"] = known.value
    return given


def overrides_to_proto(given: Mapping[str, object]) -> tuple[types_pb2.MigrationPolicy, tuple[str, ...]]:
    """A part of a policy as it is stored, and the names of what this version cannot say: a newer one wrote it."""
    message = types_pb2.MigrationPolicy()
    unknown: list[str] = []
    for name, value in given.items():
        try:
            message.MergeFrom(policy_patch({name: value}) or types_pb2.MigrationPolicy())
        except DroverError:
            unknown.append(name)
    return message, tuple(unknown)


def policy_patch(given: Mapping[str, object] | None) -> types_pb2.MigrationPolicy | None:
    """A part of a policy, by the field names of `MigrationPolicy`; what is not given stays unset. None stays None.

    Raises DroverError INVALID_ARGUMENT for an unknown field, or a value of the wrong kind.
    """
    if given is None:
        return None
    message = types_pb2.MigrationPolicy()
    for name, value in given.items():
        field = f"policy.{name}"
        if name == "on_timeout":
            known = next((word for word in OnTimeout if str(value).lower() == word.value), None)
            if known is None:
                raise unknown_word(field, value, OnTimeout)
            message.on_timeout = _ON_TIMEOUT[known]
        elif name in _POLICY_SWITCHES:
            if not isinstance(value, bool):
                raise wrong(field, f"must be true or false, not {quoted(value)}")
            setattr(message, name, value)
        elif name in _POLICY_NUMBERS:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
                raise wrong(field, f"must be a whole number from 0 to {(1 << 31) - 1}, not {quoted(value)}")
            setattr(message, name, value)
        else:
            names = ", ".join(each.name for each in known_fields(MigrationPolicy))
            raise wrong(field, f"there is no such field; there are {names}")
    return message


# --- guests -----------------------------------------------------------------------------------------------------------

_ON_HOST_DEATH = {value: types_pb2.OnHostDeath.Value(f"ON_HOST_DEATH_{value.name}") for value in OnHostDeath}
_ON_HOST_DEATH_OF = {number: value for value, number in _ON_HOST_DEATH.items()}


def guest_spec_to_proto(spec: GuestSpec) -> types_pb2.GuestSpec:
    """Raises INVALID_ARGUMENT when a number does not fit its field."""
    try:
        return types_pb2.GuestSpec(
            name=spec.name,
            memory_mib=spec.memory_mib,
            vcpus=spec.vcpus,
            machine=spec.machine,
            boot=boot_to_proto(spec.boot),
            devices=[device_to_proto(device) for device in spec.devices],
            labels=spec.labels,
            policy=policy_to_proto(spec.policy),
            on_host_death=_ON_HOST_DEATH[spec.on_host_death],
            cpu=types_pb2.Cpu(model=spec.cpu.model),
            disks=map(disk_to_proto, spec.disks),
            nics=map(nic_to_proto, spec.nics),
            tpm=types_pb2.Tpm(version=spec.tpm.version, state=spec.tpm.state) if spec.tpm else None,
            cloud_init=_cloud_init_to_proto(spec.cloud_init) if spec.cloud_init else None,
            extra_args=spec.extra_args,
            max_memory_mib=spec.max_memory_mib,
            max_vcpus=spec.max_vcpus,
            system_uuid=spec.system_uuid,
            display=types_pb2.Display(vnc=spec.display.vnc) if spec.display.vnc else None,
        )
    except (ValueError, OverflowError) as error:
        raise wrong("spec", f"a number is too large: {error}") from error


def _cloud_init_to_proto(files: CloudInit) -> types_pb2.CloudInit:
    return types_pb2.CloudInit(
        user_data=files.user_data, meta_data=files.meta_data, network_config=files.network_config
    )


def _cloud_init_from_proto(message: types_pb2.CloudInit) -> CloudInit:
    return CloudInit(message.user_data, message.meta_data, message.network_config)


def guest_spec_from_proto(message: types_pb2.GuestSpec, *, field: str = "spec") -> GuestSpec:
    """What is not set gets its default. Raises INVALID_ARGUMENT, with a field below `field`, for words that this
    version does not know."""
    default = GuestSpec(message.name)
    devices, disks = enumerate(message.devices), enumerate(message.disks)
    return GuestSpec(
        name=message.name,
        memory_mib=message.memory_mib or default.memory_mib,
        vcpus=message.vcpus or default.vcpus,
        machine=message.machine or default.machine,
        boot=boot_from_proto(message.boot, field=f"{field}.boot"),
        devices=tuple(device_from_proto(device, field=f"{field}.devices[{index}]") for index, device in devices),
        labels=dict(message.labels),
        policy=policy_from_proto(message.policy, field=f"{field}.policy"),
        on_host_death=_on_host_death(message, field=field),
        cpu=Cpu(message.cpu.model),
        disks=tuple(disk_from_proto(disk, field=f"{field}.disks[{index}]") for index, disk in disks),
        nics=tuple(map(nic_from_proto, message.nics)),
        tpm=Tpm(message.tpm.version or "2.0", message.tpm.state) if message.HasField("tpm") else None,
        cloud_init=_cloud_init_from_proto(message.cloud_init) if message.HasField("cloud_init") else None,
        extra_args=tuple(message.extra_args),
        max_memory_mib=message.max_memory_mib,
        max_vcpus=message.max_vcpus,
        display=Display(message.display.vnc),
        system_uuid=message.system_uuid,
    )


def _on_host_death(message: types_pb2.GuestSpec, *, field: str) -> OnHostDeath:
    if not message.on_host_death:
        return OnHostDeath.LEAVE
    known = _ON_HOST_DEATH_OF.get(message.on_host_death)
    if known is None:
        raise wrong(f"{field}.on_host_death", f"must be LEAVE or RESTART, not {message.on_host_death}")
    return known


# --- times and obstacles ----------------------------------------------------------------------------------------------


def timestamp(wall_s: float) -> Timestamp | None:
    """None for 0: not known."""
    if wall_s <= 0:
        return None
    seconds = int(wall_s)
    return Timestamp(seconds=seconds, nanos=int((wall_s - seconds) * 1e9))


MAX_OBSTACLE = 500
"""Characters of one obstacle's sentence."""


def obstacle_to_proto(obstacle: Obstacle) -> types_pb2.Obstacle:
    """Why a guest cannot move."""
    return types_pb2.Obstacle(reason=obstacle[0], message=clip(obstacle[1], MAX_OBSTACLE))


def obstacle_from_proto(message: types_pb2.Obstacle) -> Obstacle:
    """A reason of a newer version stands in the way as well: it becomes DEVICE_NOT_MIGRATABLE, with its own words."""
    try:
        return RefusalReason(message.reason), message.message
    except ValueError:
        return RefusalReason.DEVICE_NOT_MIGRATABLE, f"{message.message} [{clip(message.reason)}]"


# --- for people and scripts -------------------------------------------------------------------------------------------


def word(message: Message, field: str) -> str:
    """The word of an enum field without its prefix, e.g. "RETRY_WAIT"; empty when it is not set.

    A number that this version has no word for is given as a number.
    """
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    if descriptor.enum_type is None:
        raise TypeError(f"{message.DESCRIPTOR.name}.{field} is not an enum")
    return _word(descriptor.enum_type, getattr(message, field))


def _word(enum: Any, number: int) -> str:
    if number == 0:
        return ""
    names: dict[int, str] = {each.number: each.name for each in enum.values}
    if number not in names:
        return str(number)
    return names[number].removeprefix(names[0].removesuffix("UNSPECIFIED"))


def to_json(message: Message) -> dict[str, Any]:
    """Snake-case names, enum words without prefix, 64-bit numbers as numbers, times as RFC 3339, bytes as base64.

    Every field is there, empty or not, except those that tell "not set" from "empty" and are not set.
    """
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            result[field.name] = {str(key): _json(entry.fields_by_name["value"], value[key]) for key in sorted(value)}
        elif field.is_repeated:
            result[field.name] = [_json(field, item) for item in value]
        else:
            result[field.name] = _json(field, value)
    return result


def _json(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value
