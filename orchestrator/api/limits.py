"""How large a request may be, field by field; looked at before anything of it is converted or kept.

A request as a whole takes at most `rpc.channels.MAX_REQUEST_BYTES`. Within that a list of many thousand entries would
still cost everybody's event loop dearly, so every list and every text of every request has a bound of its own:
`tests/unit/test_api_limits.py` walks the messages and finds a field that has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from orchestrator.core.errors import invalid
from orchestrator.core.guest import (
    MAX_APPEND_BYTES,
    MAX_DEVICES,
    MAX_INSTRUCTION_BYTES,
    MAX_LABELS,
    MAX_OPTIONS,
    MAX_OPTIONS_BYTES,
)
from orchestrator.core.hardware import (
    MAX_CLOUD_INIT_BYTES,
    MAX_DISKS,
    MAX_EXTRA_ARG_BYTES,
    MAX_EXTRA_ARGS,
    MAX_NICS,
)
from orchestrator.core.images import CHUNK_BYTES
from orchestrator.core.records import ShimKind

MAX_NAME = 253
"""Characters of any name or id. What kinds of names there are is judged later, with better words."""
MAX_WATCHED = 1_000
MAX_REASON = 1_024
MAX_TYPED_BYTES = 16 << 10

BOUNDS: dict[str, int] = {
    "AttachConsoleRequest.data": MAX_TYPED_BYTES,
    "Boot.append": MAX_APPEND_BYTES,
    "CloudInit.meta_data": MAX_CLOUD_INIT_BYTES,
    "CloudInit.network_config": MAX_CLOUD_INIT_BYTES,
    "CloudInit.user_data": MAX_CLOUD_INIT_BYTES,
    "CordonHostRequest.reason": MAX_REASON,
    "DeviceSpec.options": MAX_OPTIONS,
    "DeviceSpec.OptionsEntry.value": MAX_OPTIONS_BYTES,
    "GuestSpec.devices": MAX_DEVICES * len(ShimKind),
    "GuestSpec.disks": MAX_DISKS,
    "GuestSpec.extra_args": MAX_EXTRA_ARGS,
    "GuestSpec.labels": MAX_LABELS,
    "GuestSpec.LabelsEntry.value": 253,
    "GuestSpec.nics": MAX_NICS,
    "ImportImageRequest.data": CHUNK_BYTES,
    "InstructDeviceRequest.instruction": MAX_INSTRUCTION_BYTES,
    "ListImagesRequest.page_token": MAX_NAME + 2 * 64 + 2,
    "WatchEvacuationsRequest.names": MAX_WATCHED,
    "WatchGuestsRequest.names": MAX_WATCHED,
    "WatchMigrationsRequest.names": MAX_WATCHED,
}
"""Characters of a text, entries of a list, by message and field. A text that is not here has MAX_NAME."""
ENTRIES: dict[str, int] = {"GuestSpec.extra_args": MAX_EXTRA_ARG_BYTES}
"""Characters of each text of a list of texts; MAX_NAME for one that is not here."""
_TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def bound_of(field: FieldDescriptor) -> int | None:
    """Entries of a list, characters of a text; None for a list that has no bound, which may not be."""
    name = field.full_name.removeprefix("drover.v1.")
    return BOUNDS.get(name, None if field.is_repeated else MAX_NAME)


def check(request: Message) -> None:
    """Raises INVALID_ARGUMENT with every list that is too long, and every text."""
    if bad := list(_too_large(request, "")):
        raise invalid(bad)


def _too_large(message: Message, where: str) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        path = f"{where}{field.name}"
        if field.is_repeated:
            yield from _list(field, value, path)
        elif field.type in _TEXTS:
            yield from _text(len(value), bound_of(field) or MAX_NAME, path)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            yield from _too_large(value, f"{path}.")


def _list(field: FieldDescriptor, value: Any, path: str) -> Iterator[tuple[str, str]]:
    most = bound_of(field) or 0
    if len(value) > most:
        yield path, f"at most {most} entries, not {len(value)}"
        return  # nobody looks at the entries of a list that is refused
    entry = cast(Any, field.message_type)
    if entry is not None and entry.GetOptions().map_entry:
        for key, text in value.items():
            yield from _text(len(key), bound_of(entry.fields_by_name["key"]) or MAX_NAME, path)
            yield from _text(len(text), bound_of(entry.fields_by_name["value"]) or MAX_NAME, path)
    elif entry is not None:
        for index, each in enumerate(value):
            yield from _too_large(each, f"{path}[{index}].")
    elif field.type in _TEXTS:
        each_most = ENTRIES.get(field.full_name.removeprefix("drover.v1."), MAX_NAME)
        for index, each in enumerate(value):
            yield from _text(len(each), each_most, f"{path}[{index}]")


def _text(size: int, most: int, path: str) -> Iterator[tuple[str, str]]:
    if size > most:
        yield path, f"at most {most} characters, not {size}"
