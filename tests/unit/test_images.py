"""Images in a host's pools: what a header says, what is listed, and an import that is whole or leaves nothing."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from agents.config import AgentConfig, PoolConfig
from agents.disks import imports
from agents.disks.imports import PoolImages
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.images import HEADER_BYTES, ImageImport, content_error, header_of, import_errors
from orchestrator.core.records import DiskFormat, PoolKind
from tests.fakes.config import agent_config

R = RefusalReason
CONTENT = bytes(range(256)) * 6144
"""1.5 MiB: more than one write."""
RAW = ImageImport("disk.raw", "fast", DiskFormat.RAW, len(CONTENT))


def config_of(directory: Path, host: str = "h2") -> AgentConfig:
    pools = {}
    for name, kind in (("fast", PoolKind.LOCAL), ("shared", PoolKind.SHARED_FILE), ("lun", PoolKind.BLOCK)):
        (directory / name).mkdir(exist_ok=True)
        pools[name] = PoolConfig(path=directory / name, kind=kind)
    return agent_config(directory, host).model_copy(update={"pools": pools})


@pytest.fixture
def pools(tmp_path: Path) -> PoolImages:
    return PoolImages(config_of(tmp_path))


async def parts(*data: bytes, digest: bytes | None = None) -> AsyncIterator[tuple[bytes, bytes]]:
    for each in data:
        for at in range(0, len(each), 1 << 16):
            yield each[at : at + (1 << 16)], b""
    yield b"", hashlib.sha256(b"".join(data)).digest() if digest is None else digest


def left(directory: Path) -> Sequence[str]:
    return sorted(path.name for path in directory.iterdir())


async def swept(directory: Path) -> None:
    """What is removed beside a call that was cut off is removed soon."""
    async with asyncio.timeout(10):
        while any(name.endswith(".import") for name in left(directory)):  # noqa: ASYNC110 - bounded above
            await asyncio.sleep(0.01)


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_headers_are_read_as_qemu_writes_them(tmp_path: Path) -> None:
    def made(name: str, *words: str) -> bytes:
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, name, "64M"], cwd=tmp_path, check=True)
        return (tmp_path / name).read_bytes()[:HEADER_BYTES]

    plain = header_of(made("plain"), 196_616)
    assert (plain.format, plain.size_bytes, plain.backing, plain.message) == (DiskFormat.QCOW2, 64 << 20, "", "")
    old = header_of(made("old", "-o", "compat=0.10"), 1)
    assert (old.size_bytes, old.message) == (64 << 20, "")
    (tmp_path / "base").write_bytes(bytes(512))
    based = header_of(made("based", "-b", "base", "-F", "raw"), 1)
    assert (based.backing, based.message) == ("base", "")
    elsewhere = header_of(made("elsewhere", "-o", "data_file=elsewhere.data"), 1)
    assert "in another file" in elsewhere.message


def test_what_is_no_header_of_qcow2_is_raw() -> None:
    assert header_of(b"\0" * HEADER_BYTES, 5 << 20).size_bytes == 5 << 20
    assert header_of(b"", 0).format is DiskFormat.RAW
    assert "cut off" in header_of(b"QFI\xfb\0\0", 6).message
    assert "version 9" in header_of(b"QFI\xfb" + (9).to_bytes(4, "big") + bytes(100), 108).message


def test_only_what_is_what_it_is_said_to_be_may_come() -> None:
    start = b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(100)
    qcow2 = ImageImport("x", "fast", DiskFormat.QCOW2, 4096)
    assert content_error(qcow2, start) == ""
    assert "no qcow2" in content_error(qcow2, bytes(4096))
    assert "as a qcow2" in content_error(RAW, start)
    based = b"QFI\xfb" + (3).to_bytes(4, "big") + (96).to_bytes(8, "big") + (11).to_bytes(4, "big") + bytes(76)
    assert "'/etc/shadow'" in content_error(qcow2, based + b"/etc/shadow")


def test_everything_that_is_wrong_with_an_import_is_said_at_once() -> None:
    bad = dict(import_errors(ImageImport("../x", "P", DiskFormat.RAW, 100)))
    assert set(bad) == {"name", "pool", "size_bytes"}
    assert import_errors(RAW) == []


# --- what there is ----------------------------------------------------------------------------------------------------


async def test_images_are_listed_by_pages_and_nothing_else_is(tmp_path: Path, pools: PoolImages) -> None:
    fast = tmp_path / "fast"
    for name in ("a", "b.qcow2", "c"):
        (fast / name).write_bytes(bytes(1024))
    for name in (".drover-pool", ".h2.0123456789abcdef.import", "gone.moved-0123abcd"):
        (fast / name).write_bytes(b"x")
    (fast / "directory").mkdir()
    (fast / "link").symlink_to("/etc/passwd")
    found, more = await pools.listed("fast", "", 2)
    assert ([each.name for each in found], more) == (["a", "b.qcow2"], True)
    found, more = await pools.listed("fast", "b.qcow2", 2)
    assert ([each.name for each in found], more) == (["c"], False)
    for pool in ("none", "lun"):
        with pytest.raises(DroverError) as refused:
            await pools.listed(pool)
        assert refused.value.reason is R.POOL_NOT_FOUND


async def test_a_pool_that_does_not_answer_is_given_up(
    pools: PoolImages, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(imports, "_listed", lambda *_: hangs.wait(60))
    monkeypatch.setattr(imports, "LOOK_S", 0.05)
    try:
        with pytest.raises(DroverError) as refused:
            await pools.listed("fast")
        assert "did not answer" in refused.value.message
    finally:
        hangs.set()


# --- bringing in ------------------------------------------------------------------------------------------------------


async def test_an_image_comes_in_whole_and_its_zeros_take_no_room(tmp_path: Path, pools: PoolImages) -> None:
    found = await pools.receive(RAW, parts(CONTENT))
    assert (tmp_path / "fast/disk.raw").read_bytes() == CONTENT
    assert (found.name, found.header.size_bytes) == ("disk.raw", len(CONTENT))
    zeros = ImageImport("zeros", "fast", DiskFormat.RAW, 8 << 20)
    assert (await pools.receive(zeros, parts(bytes(8 << 20)))).used_bytes < 1 << 20
    await swept(tmp_path / "fast")
    assert left(tmp_path / "fast") == ["disk.raw", "zeros"]


@pytest.mark.parametrize(
    ("image", "data", "reason"),
    [
        (RAW, CONTENT[:-512], R.INVALID_ARGUMENT),
        (RAW, CONTENT + bytes(512), R.INVALID_ARGUMENT),
        (ImageImport("disk.raw", "fast", DiskFormat.QCOW2, len(CONTENT)), CONTENT, R.INVALID_ARGUMENT),
        (ImageImport("disk.raw", "fast", DiskFormat.RAW, 1 << 49), CONTENT, R.POOL_FULL),
        (ImageImport("disk.raw", "lun", DiskFormat.RAW, len(CONTENT)), CONTENT, R.POOL_NOT_FOUND),
        (ImageImport("taken", "fast", DiskFormat.RAW, len(CONTENT)), CONTENT, R.ALREADY_EXISTS),
    ],
)
async def test_what_is_refused_leaves_nothing(
    tmp_path: Path, pools: PoolImages, image: ImageImport, data: bytes, reason: RefusalReason
) -> None:
    (tmp_path / "fast/taken").write_bytes(b"old")
    with pytest.raises(DroverError) as refused:
        await pools.receive(image, parts(data))
    assert refused.value.reason is reason
    await swept(tmp_path / "fast")
    assert left(tmp_path / "fast") == ["taken"]
    assert (tmp_path / "fast/taken").read_bytes() == b"old"


async def test_another_checksum_is_refused(tmp_path: Path, pools: PoolImages) -> None:
    with pytest.raises(DroverError, match="SHA-256"):
        await pools.receive(RAW, parts(CONTENT, digest=bytes(32)))
    await swept(tmp_path / "fast")
    assert not left(tmp_path / "fast")


async def test_two_that_come_under_one_name_do_not_mix(tmp_path: Path, pools: PoolImages) -> None:
    other = bytes(len(CONTENT) - 1) + b"x"
    results = await asyncio.gather(
        pools.receive(RAW, parts(CONTENT)), pools.receive(RAW, parts(other)), return_exceptions=True
    )
    refused = [each for each in results if isinstance(each, DroverError)]
    assert [each.reason for each in refused] == [R.ALREADY_EXISTS]
    assert (tmp_path / "fast/disk.raw").read_bytes() in (CONTENT, other)


async def test_a_sender_that_is_cut_off_leaves_nothing(tmp_path: Path, pools: PoolImages) -> None:
    begun, more = asyncio.Event(), asyncio.Event()

    async def stalls() -> AsyncIterator[tuple[bytes, bytes]]:
        for at in range(0, len(CONTENT) - (1 << 16), 1 << 16):
            yield CONTENT[at : at + (1 << 16)], b""
        begun.set()
        await more.wait()

    call = asyncio.create_task(pools.receive(RAW, stalls()))
    await begun.wait()
    assert [name for name in left(tmp_path / "fast") if name.endswith(".import")]
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await swept(tmp_path / "fast")
    assert not left(tmp_path / "fast")


async def test_a_write_that_hangs_never_goes_to_another_file(
    tmp_path: Path, pools: PoolImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given up, and whatever is opened next may get the number that its descriptor had."""
    hangs, goes_on, written = threading.Event(), threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(descriptor: int, block: bytes, at: int) -> int:
        if hangs.is_set():
            return pwrite(descriptor, block, at)
        hangs.set()
        done = pwrite(descriptor, block[:512], at)  # a short write: there will be another one
        goes_on.wait(30)
        threading.Timer(0.2, written.set).start()
        return done

    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(imports, "SYNC_S", 0.2)
    with pytest.raises(DroverError, match="did not answer"):
        await pools.receive(RAW, parts(CONTENT))
    assert hangs.is_set()
    await asyncio.sleep(0.2)  # what it leaves behind is put away
    others = [(tmp_path / f"other{n}").open("w+b") for n in range(16)]
    goes_on.set()
    await asyncio.to_thread(written.wait, 30)
    assert [other.read() for other in others] == [b""] * len(others)
    for other in others:
        other.close()
    await swept(tmp_path / "fast")
    assert not left(tmp_path / "fast")


async def test_no_more_than_a_few_come_at_a_time(pools: PoolImages) -> None:
    never = asyncio.Event()

    async def stalls() -> AsyncIterator[tuple[bytes, bytes]]:
        await never.wait()
        yield b"", b""

    calls = [
        asyncio.create_task(pools.receive(ImageImport(f"i{n}", "fast", DiskFormat.RAW, 512), stalls()))
        for n in range(imports.MAX_IMPORTS)
    ]
    await asyncio.sleep(0)
    with pytest.raises(DroverError) as refused:
        await pools.receive(RAW, parts(CONTENT))
    assert refused.value.reason is R.BUSY
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await pools.receive(RAW, parts(CONTENT))


def test_a_new_agent_removes_what_imports_of_its_host_left(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for pool in ("fast", "shared"):
        for name in (".h2.0123456789abcdef.import", ".h3.0123456789abcdef.import", ".mine.import", "disk"):
            (tmp_path / pool / name).write_bytes(b"x")
    import os

    os.utime(tmp_path / "shared/.h3.0123456789abcdef.import", (0, 0))
    PoolImages(config).sweep()
    assert left(tmp_path / "fast") == [".h3.0123456789abcdef.import", ".mine.import", "disk"]
    assert left(tmp_path / "shared") == [".mine.import", "disk"]
