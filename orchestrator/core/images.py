"""PURE. Disk images as they lie in pools: what the header of one says, and what may be brought in as one.

A header is data of a guest, or of a stranger. It is read by these few lines and by nothing that would act on it: a
`qemu-img info` opens what an image names as its data file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from orchestrator.core.hardware import Problem
from orchestrator.core.naming import MOVED_AWAY, file_error, name_error
from orchestrator.core.records import DiskFormat
from orchestrator.core.text import quoted

HEADER_BYTES = 4096
"""The beginning of an image, with all of a header that is looked at; a shorter image is given as it is."""
CHUNK_BYTES = 128 << 10
"""Of an image on its way, at most."""
DIGEST_BYTES = 32
MAX_IMAGE_BYTES = 1 << 50

_MAGIC = b"QFI\xfb"
_MAX_BACKING_BYTES = 1023
_EXTERNAL_DATA, _CORRUPT = 1 << 2, 1 << 1
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")
"""Header of version 2: magic, version, backing file's offset and size, cluster bits, size, encryption, ..."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the beginning of an image says of it."""

    format: DiskFormat
    size_bytes: int
    """Of the disk, as a guest sees it."""
    backing: str = ""
    """As it is named in the header; never opened."""
    message: str = ""
    """What is wrong with the header, or why nobody should use it; empty: nothing."""

    def told(self, message: str) -> ImageHeader:
        """With another word about it."""
        return replace(self, message=message)


def header_of(start: bytes, file_bytes: int) -> ImageHeader:
    """Of an image that begins with `start` (HEADER_BYTES of it) and is `file_bytes` long. Never raises."""
    if start[:4] != _MAGIC:
        return ImageHeader(DiskFormat.RAW, file_bytes)
    if len(start) < _FIXED.size:
        return ImageHeader(DiskFormat.QCOW2, 0, message="its header is cut off")
    _, version, backing_at, backing_bytes, _, size_bytes, encrypted, *_ = _FIXED.unpack_from(start)
    if version not in (2, 3):
        return ImageHeader(DiskFormat.QCOW2, 0, message=f"its header has version {version}, not 2 or 3")
    backing = ""
    if backing_at:
        name = start[backing_at : backing_at + min(backing_bytes, _MAX_BACKING_BYTES)]
        backing = name.decode(errors="replace") or "(outside of the header)"
    features = int.from_bytes(start[72:80], "big") if version == 3 and len(start) >= 80 else 0
    said = ""
    if features & _EXTERNAL_DATA:
        said = "its data is in another file"
    elif features & _CORRUPT:
        said = "it is marked as corrupt: `qemu-img check -r all` may mend it"
    elif encrypted:
        said = "it is encrypted"
    return ImageHeader(DiskFormat.QCOW2, size_bytes, backing, said)


@dataclass(frozen=True, slots=True)
class ImageImport:
    """What is to be brought in."""

    name: str
    pool: str
    format: DiskFormat
    size_bytes: int
    """Of the file."""


def import_errors(image: ImageImport) -> list[Problem]:
    """Everything that is wrong with it, as far as it says by itself; empty when nothing is."""
    bad: list[Problem] = []
    if wrong := image_name_error(image.name, image.pool):
        bad.append(("name", wrong))
    if wrong := name_error(image.pool):
        bad.append(("pool", wrong))
    if not 0 < image.size_bytes <= MAX_IMAGE_BYTES:
        bad.append(("size_bytes", f"must be between 1 and {MAX_IMAGE_BYTES}, not {image.size_bytes}"))
    if image.format is DiskFormat.RAW and image.size_bytes % 512:
        bad.append(("size_bytes", f"a raw image is whole sectors of 512 bytes, not {image.size_bytes} bytes"))
    return bad


def image_name_error(name: str, pool: str) -> str:
    """What is wrong with the name of an image that is to be made in a pool; empty when nothing is."""
    if wrong := file_error(name, f"pool {pool}"):
        return wrong
    return (
        f"{quoted(name)} would be removed: images of disks that moved away end so" if MOVED_AWAY.fullmatch(name) else ""
    )


def content_error(image: ImageImport, start: bytes) -> str:
    """Why what begins with `start` is not to be brought in as this image, as a clause; empty: it may be.

    `start` has HEADER_BYTES, or all of a file that is shorter.
    """
    header = header_of(start, image.size_bytes)
    if header.format is not image.format:
        if image.format is DiskFormat.RAW:
            return (
                "the file begins as a qcow2 image: say that it is one (a guest that wrote that could read other files)"
            )
        return "the file is no qcow2 image: say that it is raw, or convert it (`qemu-img convert -O qcow2`)"
    if header.backing:
        return f"it is based on another file, {quoted(header.backing)}: flatten it first (`qemu-img convert -O qcow2`)"
    return header.message
