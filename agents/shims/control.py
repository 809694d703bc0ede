"""Frames of a device process's control socket, which both of its ends use.

    4 bytes  length of what follows, big-endian
    4 bytes  length of the header
    header   a JSON object
    body     bytes, often none

A frame with `id` and `call` is a request; the answer has the same `id` and either `ok: true` or `error` (a sentence)
with `reset` (the device lost its state). A frame with `note` comes unasked. Requests are answered in any order.
"""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any, cast

MAX_FRAME = 16 << 20
_LENGTHS = struct.Struct("!II")


def encode(header: dict[str, Any], body: bytes = b"") -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return _LENGTHS.pack(4 + len(text) + len(body), len(text)) + text + body


async def read_frame(reader: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """The next frame. Raises ConnectionError when the other side is gone or speaks something else."""
    try:
        total, head = _LENGTHS.unpack(await reader.readexactly(_LENGTHS.size))
        if total > MAX_FRAME or head > total - 4:
            raise ConnectionError("the other side does not speak this protocol")
        content = await reader.readexactly(total - 4)
        header: object = json.loads(content[:head])
    except asyncio.IncompleteReadError:
        raise ConnectionError("the other side is gone") from None
    except ValueError as error:
        raise ConnectionError(f"the other side does not speak this protocol: {error}") from None
    if not isinstance(header, dict):
        raise ConnectionError("the other side does not speak this protocol: a header is no object")
    return cast(dict[str, Any], header), content[head:]
