"""`pack.py TREE PROBE OUT`: the initramfs of the Linux test guest, of the modules in an unpacked kernel package and the
probe as its first process. Uses nothing but the standard library; the same inputs give the same bytes."""

from __future__ import annotations

import gzip
import lzma
import re
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon", "virtio_mem", "virtio_scsi", "isofs", "sr_mod")
"""What a guest of ours may have. What is built into the kernel, or not made for it, is passed over."""
_FIRST = 10
_SUFFIX = re.compile(r"\.ko(\.xz|\.gz)?$")
_DEPENDS = re.compile(rb"(?<=\0)depends=([^\0]*)\0")
_REGULAR, _DIRECTORY, _DEVICE = 0o100000, 0o040000, 0o020000


def module_name(path: Path) -> str:
    """As the kernel names it: the file's name, hyphens turned to underscores."""
    return _SUFFIX.sub("", path.name).replace("-", "_")


def load(path: Path) -> bytes:
    """A module's bytes, as the kernel takes them: the packages of newer kernels have them compressed."""
    packed = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(packed)
    return gzip.decompress(packed) if path.suffix == ".gz" else packed


def dependencies(module: bytes) -> list[str]:
    """Names of the modules that it says it needs."""
    found = _DEPENDS.search(module)
    names = found[1].decode() if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]


def in_order(found: dict[str, Path], wanted: tuple[str, ...] = MODULES) -> Iterator[bytes]:
    """Each module that is wanted or needed, once, after those that it needs."""
    done: set[str] = set()

    def visit(name: str) -> Iterator[bytes]:
        if name in done or name not in found:
            return
        done.add(name)
        module = load(found[name])
        for other in dependencies(module):
            yield from visit(other)
        yield module

    for name in wanted:
        yield from visit(name)


def archive(entries: list[tuple[str, int, bytes, tuple[int, int]]]) -> bytes:
    """A cpio archive ("newc") of (path, mode, content, device number)."""
    out = bytearray()
    for number, (name, mode, content, (major, minor)) in enumerate([*entries, ("TRAILER!!!", 0, b"", (0, 0))], start=1):
        path = name.encode() + b"\0"
        header = (number, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(path), 0)
        out += b"070701" + "".join(f"{field:08X}" for field in header).encode() + path
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(tree: Path, probe: bytes) -> bytes:
    """The packed initramfs. Raises LookupError when the tree has no modules at all."""
    found = {module_name(path): path for path in sorted(tree.glob("**/lib/modules/*/kernel/**/*.ko*"))}
    if not found:
        raise LookupError(f"{tree} has no kernel modules")
    entries = [(name, _DIRECTORY | 0o755, b"", (0, 0)) for name in ("dev", "proc", "modules")]
    entries.append(("dev/console", _DEVICE | 0o600, b"", (5, 1)))
    entries.append(("init", _REGULAR | 0o755, probe, (0, 0)))
    entries += [
        (f"modules/{number}.ko", _REGULAR | 0o644, module, (0, 0))
        for number, module in enumerate(in_order(found), start=_FIRST)
    ]
    return gzip.compress(archive(entries), compresslevel=6, mtime=0)


def main() -> None:
    """See the head of this file."""
    tree, probe, out = map(Path, sys.argv[1:])
    out.write_bytes(initramfs(tree, probe.read_bytes()))


if __name__ == "__main__":
    main()
