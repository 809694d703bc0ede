"""Requests are bounded: as a whole, and each list and text of them, before anything of it is converted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from orchestrator import wire
from orchestrator.api import limits, views
from orchestrator.api.listing import MAX_PAGE
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.guest import MAX_APPEND_BYTES, guest_errors
from orchestrator.core.hardware import MAX_CLOUD_INIT_BYTES, MAX_DISKS, MAX_EXTRA_ARG_BYTES, MAX_NICS
from orchestrator.core.records import CloudInit, DeviceSpec, GuestSpec, ShimKind
from orchestrator.rpc.channels import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types

SERVICE = pb.DESCRIPTOR.services_by_name["OrchestratorService"]
REQUESTS: list[Descriptor] = [method.input_type for method in SERVICE.methods]
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def fields(message: Descriptor, path: tuple[FieldDescriptor, ...] = ()) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Every list and text that a request can hold, with the fields that lead to it."""
    for field in message.fields:
        here = (*path, field)
        if field.is_repeated or field.type in _TEXTS:
            yield here
        if field.message_type is not None and field not in path:
            yield from fields(field.message_type, here)


EVERY = [(request, path) for request in REQUESTS for path in fields(request)]


def reach(message: Any, path: tuple[FieldDescriptor, ...]) -> Any:
    """The message that holds the last field of the path; a list on the way gets one entry."""
    for field in path[:-1]:
        value = getattr(message, field.name)
        message = value.add() if field.is_repeated else value
    return message


def fill(holder: Any, field: FieldDescriptor, size: int) -> None:
    value = getattr(holder, field.name)
    if not field.is_repeated:
        setattr(holder, field.name, "x" * size if field.type == FieldDescriptor.TYPE_STRING else b"x" * size)
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        value.update({str(number): "" for number in range(size)})
    else:
        value.extend([GetMessageClass(field.message_type)()] * size if field.message_type else [""] * size)


def told(request: Message) -> tuple[tuple[str, str], ...]:
    try:
        limits.check(request)
    except DroverError as error:
        return error.violations if error.reason is RefusalReason.INVALID_ARGUMENT else ()
    return ()


def label(each: tuple[Descriptor, tuple[FieldDescriptor, ...]]) -> str:
    return f"{each[0].name}.{'.'.join(field.name for field in each[1])}"


@pytest.mark.parametrize("each", EVERY, ids=label)
def test_every_list_and_text_of_every_request_is_bounded(
    each: tuple[Descriptor, tuple[FieldDescriptor, ...]],
) -> None:
    request_type, path = each
    field = path[-1]
    most = limits.bound_of(field)
    assert most is not None, f"{label(each)} needs an entry in limits.BOUNDS"
    assert most < MAX_REQUEST_BYTES
    if any(step.message_type and step.message_type.GetOptions().map_entry for step in path[:-1]):
        request = GetMessageClass(request_type)()
        labels = getattr(reach(request, path[:-1]), path[-2].name)
        labels.update({"k": "v" * (most + 1)} if field.name == "value" else {"k" * (most + 1): "v"})
        assert told(request)
        return
    for size, wrong in ((most, False), (most + 1, True)):
        request = GetMessageClass(request_type)()
        fill(reach(request, path), field, size)
        assert bool(told(request)) == wrong, (label(each), size)


def test_there_are_fields_to_walk() -> None:
    assert len(REQUESTS) > 20
    assert {"CreateGuestRequest.spec.devices.options", "CreateGuestRequest.spec.labels"} <= set(map(label, EVERY))
    assert not [name for name in limits.BOUNDS if name not in _known()], "a bound of a field that there is not"


def _known() -> set[str]:
    return {path[-1].full_name.removeprefix("drover.v1.") for _, path in EVERY}


def test_what_the_core_takes_is_not_too_large_for_the_api() -> None:
    hardware = types.GuestSpec(
        boot=types.Boot(append="x" * MAX_APPEND_BYTES),
        nics=[types.NicSpec(name="n")] * MAX_NICS,
        disks=[types.DiskSpec(name="d")] * MAX_DISKS,
        extra_args=["x" * MAX_EXTRA_ARG_BYTES],
        cloud_init=types.CloudInit(user_data="x" * MAX_CLOUD_INIT_BYTES),
    )
    assert told(pb.CreateGuestRequest(spec=hardware)) == ()
    hardware.extra_args[0] += "x"
    assert told(pb.CreateGuestRequest(spec=hardware)) == (
        ("spec.extra_args[0]", f"at most {MAX_EXTRA_ARG_BYTES} characters, not {MAX_EXTRA_ARG_BYTES + 1}"),
    )


def test_each_entry_of_a_list_of_names_is_bounded() -> None:
    assert told(pb.WatchGuestsRequest(names=["a", "n" * 254])) == (("names[1]", "at most 253 characters, not 254"),)


def test_a_list_that_is_too_long_is_not_walked() -> None:
    request = pb.CreateGuestRequest(spec=types.GuestSpec(labels={str(n): "x" * 300 for n in range(20_000)}))
    started = time.process_time()
    assert told(request) == (("spec.labels", "at most 64 entries, not 20000"),)
    assert time.process_time() - started < 0.5, "the walk of a refused list takes seconds"


@pytest.mark.parametrize("kind", ShimKind)
def test_devices_of_every_kind_are_counted(kind: ShimKind) -> None:
    driver = "flows" if kind is ShimKind.EXTERNAL else ""
    devices = tuple(DeviceSpec(f"d{n}", kind, driver=driver) for n in range(9))
    assert ("devices", f"at most 8 {kind.value} devices per guest, not 9") in guest_errors(
        GuestSpec("g", devices=devices)
    )
    assert guest_errors(GuestSpec("g", devices=devices[:8])) == []


def test_a_whole_page_of_the_largest_guests_fits_into_a_message() -> None:
    """Their cloud-init files would not: lists leave them out."""
    text = "x" * (60 << 10)
    spec = GuestSpec("web", cloud_init=CloudInit(user_data=text))
    whole = types.Guest(name="web", spec=wire.guest_spec_to_proto(spec))
    listed = views.without_texts(types.Guest.FromString(whole.SerializeToString()))
    assert whole.ByteSize() * MAX_PAGE > MAX_MESSAGE_BYTES > listed.ByteSize() * MAX_PAGE
    assert listed.spec.HasField("cloud_init"), "that there are some is told"
