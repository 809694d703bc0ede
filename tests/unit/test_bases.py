"""Images that others lie on: what a guest may say of them, and how a host comes to know their content."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from agents.config import AgentConfig, ConfigError, PoolConfig, load
from agents.disks import images
from agents.guest import hardware
from agents.guest.files import GuestFiles
from agents.host import pools
from agents.host.commands import ran
from orchestrator import wire_hardware
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.hardware import hardware_errors
from orchestrator.core.records import DiskFormat, DiskSpec, GuestSpec, LiveMachine, PoolKind
from tests.fakes.config import agent_config

BASE = "debian.qcow2"
ROOT = DiskSpec("root", "fast", "root.qcow2", size_bytes=1 << 20, base=BASE)
SPEC = GuestSpec("g", disks=(ROOT,))


def config_of(directory: Path, host: str = "h1") -> AgentConfig:
    (directory / host).mkdir(exist_ok=True)
    pool = PoolConfig(path=directory / host, kind=PoolKind.LOCAL, bases=(BASE,))
    return agent_config(directory / host, host).model_copy(update={"pools": {"fast": pool}})


def test_a_disk_says_what_it_lies_on(tmp_path: Path) -> None:
    assert wire_hardware.disk_from_proto(wire_hardware.disk_to_proto(ROOT)) == ROOT
    raw = replace(ROOT, base_format=DiskFormat.RAW, iothread=True)
    assert wire_hardware.disk_from_proto(wire_hardware.disk_to_proto(raw)) == raw
    machine = LiveMachine("t", "c", 64, 1, base_sha256={"root": "a1"})
    assert wire_hardware.machine_from_proto(wire_hardware.machine_to_proto(machine)) == machine


@pytest.mark.parametrize(
    ("disk", "field", "said"),
    [
        (ROOT, "", ""),
        (replace(ROOT, base="../etc/passwd"), "disks[0].base", "the pool"),
        (replace(ROOT, format=DiskFormat.RAW), "disks[0].base", "a raw one lies on nothing"),
        (replace(ROOT, read_only=True, size_bytes=0), "disks[0].base", "read-only"),
        (replace(ROOT, base="a.moved-01234567"), "disks[0].base", "moved away"),
        (replace(ROOT, base=ROOT.image), "disks[0].base", "the guest writes to"),
    ],
)
def test_what_cannot_lie_on_another_image_is_refused(disk: DiskSpec, field: str, said: str) -> None:
    found = hardware_errors(replace(SPEC, disks=(disk,)))
    assert [where for where, _ in found] == ([field] if field else [])
    assert all(said in sentence for _, sentence in found)


def test_a_base_is_known_once_it_was_read_and_until_it_changes(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    base = tmp_path / "h1" / BASE
    base.write_bytes(b"one")
    assert pools.bases(config) == {}, "telling it reads no file"
    pools.read_bases(config)
    assert pools.bases(config) == {"fast": {BASE: hashlib.sha256(b"one").hexdigest()}}
    base.write_bytes(b"two, written in place")
    assert pools.bases(config) == {}
    pools.read_bases(config)
    assert pools.bases(config) == {"fast": {BASE: hashlib.sha256(b"two, written in place").hexdigest()}}
    base.unlink()
    pools.read_bases(config)
    assert pools.bases(config) == {}


def test_a_later_agent_does_not_read_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path)
    base = tmp_path / "h1" / BASE
    base.write_bytes(b"one")
    pools.read_bases(config)
    known = pools.bases(config)
    monkeypatch.setattr(pools, "_read", {})
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("it was read again"))
    pools.read_bases(config)
    assert pools.bases(config) == known != {}
    (config.dir / "bases.json").write_text("{")  # a note that cannot be read is no reason to stay without
    monkeypatch.undo()
    monkeypatch.setattr(pools, "_read", {})
    pools.read_bases(config)
    assert pools.bases(config) == known


def test_another_content_at_the_destination_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    here, there = config_of(tmp_path, "h1"), config_of(tmp_path, "h2")
    (tmp_path / "h1" / BASE).write_bytes(b"one")
    pools.read_bases(here)
    machine = LiveMachine("t", "c", 64, 1, base_sha256={"root": pools.bases(here)["fast"][BASE]})
    hardware.must_agree(here, SPEC, machine)
    with pytest.raises(DroverError, match="still being read") as missing:
        hardware.must_agree(there, SPEC, machine)
    (tmp_path / "h2" / BASE).write_bytes(b"One")
    pools.read_bases(there)
    with pytest.raises(DroverError, match="put the same file there") as other:
        hardware.must_agree(there, SPEC, machine)
    assert {missing.value.reason, other.value.reason} == {RefusalReason.BASE_NOT_AVAILABLE}
    shutil.copy(tmp_path / "h1" / BASE, tmp_path / "h2" / BASE)
    pools.read_bases(there)
    hardware.must_agree(there, SPEC, machine)


def test_bases_are_files_of_a_pool(tmp_path: Path) -> None:
    config = config_of(tmp_path).model_dump(mode="json")
    for pool, said in (
        ({"path": "/p", "kind": "block", "bases": [BASE]}, "bases are files"),
        ({"path": "/p", "kind": "local", "bases": ["a/b"]}, "the pool"),
        ({"path": "/p", "kind": "local", "bases": [f"b{n}" for n in range(17)]}, "at most 16"),
    ):
        path = tmp_path / "agent.json"
        path.write_text(json.dumps({**config, "pools": {"p": pool}}))
        with pytest.raises(ConfigError, match=said):
            load(path)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img")
async def test_an_image_is_made_on_its_base_and_must_lie_on_the_one_that_is_said(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    for name in (BASE, "other.qcow2"):
        await ran("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "h1" / name), "1M", timeout_s=30)
    pools.read_bases(config)
    files = GuestFiles(config, "6b1f3f2a-9d1c-4a51-8a3e-0d6f3c1b2a49", SPEC)
    files.make()
    probed = {"accelerator": "tcg", "machine_aliases": ""}
    born = await hardware.born(files, "s", probed)
    assert born is not None
    assert born.machine is not None
    assert born.machine.base_sha256 == {"root": pools.bases(config)["fast"][BASE]}
    assert await images.base_of(tmp_path / "h1" / "root.qcow2") == BASE
    assert await hardware.born(files, "s", probed) is not None, "one that is there and lies on it will do"
    (tmp_path / "h1" / "root.qcow2").unlink()
    image = str(tmp_path / "h1" / "root.qcow2")
    await ran("qemu-img", "create", "-q", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", image, "1M", timeout_s=30)
    with pytest.raises(DroverError, match=r"lies on other\.qcow2, not on debian\.qcow2") as refused:
        await hardware.born(files, "s", probed)
    assert refused.value.reason is RefusalReason.BASE_NOT_AVAILABLE
