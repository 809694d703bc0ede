"""PURE. The disk on which a guest finds its cloud-init files: an ISO 9660 image with Joliet names, labelled `cidata`.

Made by this code and no other program, so that every host makes the same bytes of the same description: a disk that
differs between the two ends of a migration would change under the guest.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Literal

from orchestrator.core.records import CloudInit

LABEL = "cidata"
_SECTOR = 2048
_PLAIN_TABLES, _JOLIET_TABLES = 19, 21
_PLAIN_ROOT, _JOLIET_ROOT = 23, 24
_FIRST_FILE = 25
"""Sectors, by what stands there. Before them: sixteen empty ones, two descriptors and their end."""
_DATE = bytes([70, 1, 1, 0, 0, 0, 0])
"""Of every file: the beginning of 1970. A date of today would be another one at the next host."""
_NO_DATE = b"0" * 16 + b"\0"


def files_of(given: CloudInit, *, uuid: str, name: str) -> dict[str, bytes]:
    """What stands on the disk, by file name."""
    meta = given.meta_data or f"instance-id: {uuid}\nlocal-hostname: {name}\n"
    found = {"meta-data": meta.encode(), "user-data": given.user_data.encode()}
    if given.network_config:
        found["network-config"] = given.network_config.encode()
    return found


def seed(given: CloudInit, *, uuid: str, name: str) -> bytes:
    """The image. The same for the same guest, wherever it is made."""
    return image(files_of(given, uuid=uuid, name=name))


def digest(given: CloudInit, *, uuid: str, name: str) -> str:
    """SHA-256 of the image."""
    return sha256(seed(given, uuid=uuid, name=name)).hexdigest()


def image(files: dict[str, bytes]) -> bytes:
    """An ISO 9660 image with these files in its root, under their own names (Joliet) and under plain ones."""
    extents: list[tuple[str, int, int]] = []
    at = _FIRST_FILE
    for name, data in sorted(files.items()):
        extents.append((name, at, len(data)))
        at += max(1, _sectors(len(data)))
    plain = [(f"{name.upper()}.;1".encode(), start, size) for name, start, size in extents]
    joliet = [(name.encode("utf-16-be"), start, size) for name, start, size in extents]
    sectors = [b""] * 16
    sectors += [_descriptor(1, at, _PLAIN_TABLES, _PLAIN_ROOT), _descriptor(2, at, _JOLIET_TABLES, _JOLIET_ROOT)]
    sectors.append(b"\xffCD001\x01")
    for root in (_PLAIN_ROOT, _JOLIET_ROOT):
        sectors += [_path_table(root, "little"), _path_table(root, "big")]
    sectors += [_directory(_PLAIN_ROOT, plain), _directory(_JOLIET_ROOT, joliet)]
    body = b"".join(_padded(data, _SECTOR * max(1, _sectors(len(data)))) for _, data in sorted(files.items()))
    return b"".join(_padded(sector, _SECTOR) for sector in sectors) + body


def _sectors(size: int) -> int:
    return -(-size // _SECTOR)


def _padded(data: bytes, size: int) -> bytes:
    return data + bytes(size - len(data))


def _both(value: int, size: int) -> bytes:
    """In both byte orders, as the format has its numbers."""
    return value.to_bytes(size, "little") + value.to_bytes(size, "big")


def _text(value: str, size: int, *, joliet: bool) -> bytes:
    """Filled up with blanks."""
    if not joliet:
        return value.encode().ljust(size)
    return (value.encode("utf-16-be") + b"\0 " * size)[: size // 2 * 2] + bytes(size % 2)


def _record(name: bytes, start: int, size: int, *, directory: bool = False) -> bytes:
    body = bytes([0]) + _both(start, 4) + _both(size, 4) + _DATE + bytes([2 if directory else 0, 0, 0]) + _both(1, 2)
    body += bytes([len(name)]) + name + bytes(1 - len(name) % 2)
    return bytes([len(body) + 1]) + body


def _directory(here: int, entries: list[tuple[bytes, int, int]]) -> bytes:
    """In one sector: there are three files at most. Itself and its parent, which is itself, come first."""
    known = [_record(name, here, _SECTOR, directory=True) for name in (b"\0", b"\1")]
    return b"".join([*known, *(_record(*entry) for entry in entries)])


def _path_table(root: int, order: Literal["little", "big"]) -> bytes:
    return bytes([1, 0]) + root.to_bytes(4, order) + (1).to_bytes(2, order) + b"\0\0"


def _descriptor(kind: int, sectors: int, tables: int, root: int) -> bytes:
    joliet = kind == 2
    text = b"".join(_text("", size, joliet=joliet) for size in (128, 128, 128, 128, 37, 37, 37))
    return b"".join(
        [
            bytes([kind]) + b"CD001\x01\0",
            _text("", 32, joliet=joliet) + _text(LABEL, 32, joliet=joliet),
            bytes(8) + _both(sectors, 4) + _padded(b"%/E" if joliet else b"", 32),
            _both(1, 2) + _both(1, 2) + _both(_SECTOR, 2) + _both(10, 4),
            tables.to_bytes(4, "little") + bytes(4) + (tables + 1).to_bytes(4, "big") + bytes(4),
            _record(b"\0", root, _SECTOR, directory=True),
            text,
            _NO_DATE * 4 + bytes([1]),
        ]
    )
