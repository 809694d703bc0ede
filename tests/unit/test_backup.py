"""The ledger as a file: what a backup holds, and that nothing which happened to the file goes unnoticed."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.cli.main import run
from orchestrator.core import handover
from orchestrator.core.ids import HostRef
from orchestrator.core.records import GuestSpec, Incarnation, Leader, WantRun
from orchestrator.ledger import backup, paths
from orchestrator.ledger.backup import Backup, BadBackup
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.records import encode
from orchestrator.ledger.store import SetData, Versioned
from orchestrator.restore.access import Where, configured
from tests.fakes.coordination import MemoryStore, World

G = "0f0e0d0c-0b0a-4987-8654-321001234567"


async def world() -> World:
    made = World(MemoryStore())
    await Ledger(made.store).init_tree()
    made.host("host-1")
    made.put(paths.name("web"), G)
    made.put(paths.guest(G), handover.birth("web", HostRef("host-1", "b"), writer="api"))
    made.put(paths.guest_spec(G), GuestSpec("web", labels={"tier": "naïve ☃"}))
    made.put(paths.want_run(G), WantRun())
    made.put(paths.INCARNATION, Incarnation("abc"))
    made.put(paths.live("host-1"), "session")
    made.put(paths.leader(), Leader("coordinator", "x"))
    made.put(paths.seat("coordinator"), Leader("coordinator", "x"))
    return made


async def taken() -> Backup:
    return await backup.take((await world()).store, time_s=1.0)


async def test_what_is_written_is_what_is_read_and_sessions_are_left_out(tmp_path: Path) -> None:
    made = await taken()
    file = tmp_path / "ledger.jsonl"
    backup.write(made, file)
    found = backup.read(file)
    assert dict(found.nodes) == dict(made.nodes)
    assert (found.snapshot, found.incarnation) == (True, "abc")
    assert backup.problems(found) == []
    assert paths.guest(G) in found.nodes
    assert paths.host("host-1") in found.nodes
    for path in (paths.live("host-1"), paths.leader(), paths.seat("coordinator"), paths.SEATS, paths.BARRIER):
        assert path not in found.nodes
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


async def test_bytes_that_are_no_text_come_back() -> None:
    odd = Backup({"/names": Versioned(b"\xff\x00", 1, 2)}, 3)
    assert dict(backup.parse(backup.lines(odd)).nodes) == dict(odd.nodes)


async def test_a_ledger_that_never_rests_is_exported_and_said_not_to_be_of_one_instant() -> None:
    made = await world()
    read = made.store.read
    turns = 0

    async def restless(path: str, timeout_s: float = 2.0) -> Versioned | None:
        nonlocal turns
        if path == paths.want_run(G):
            turns += 1
            node = await read(path)
            assert node is not None
            await made.store.multi([SetData(path, encode(WantRun(sequence=turns)), node.version)])
        return await read(path, timeout_s)

    made.store.read = restless
    found = await backup.take(made.store, time_s=0.0)
    assert not found.snapshot
    assert turns == backup.LOOKS
    assert backup.problems(found) == []


def cut(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def cut_in_a_line(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-2], lines[-2][:20]]


def changed(lines: list[bytes]) -> list[bytes]:
    return [line.replace(b"host-1", b"host-2") for line in lines]


def left_out(lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines[2:]]


def swapped_head(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"abc"', b'"abd"'), *lines[1:]]


def twice(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1], *lines[1:]]


def longer(lines: list[bytes]) -> list[bytes]:
    return [*lines, lines[1]]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut, "cut off"),
        (cut_in_a_line, "not a whole line"),
        (changed, "/hosts/host-1.*checksum|was changed"),
        (left_out, "digest"),
        (swapped_head, "digest"),
        (twice, "twice"),
        (longer, "follows the line that ends"),
        (lambda _: [], "empty"),
        (lambda _: [b'{"a": 1}\n'], "no.*backup|does not say"),
    ],
)
async def test_whatever_happened_to_the_file_is_named(harm: Callable[[list[bytes]], list[bytes]], said: str) -> None:
    lines = list(backup.lines(await taken()))
    with pytest.raises(BadBackup, match=said):
        backup.parse(harm(lines))


async def test_what_cannot_be_restored_is_named() -> None:
    made = await world()
    made.put(paths.guest(G), "no record")
    made.put(paths.name("lost"), "11111111-0000-4000-8000-000000000000")
    del made.store.tree.nodes[paths.guest_spec(G)]
    found = "\n".join(backup.problems(await backup.take(made.store, time_s=0.0)))
    assert paths.guest(G) in found
    assert "/names/lost names guest 11111111" in found


async def test_verify_tells_programs_and_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    backup.write(await taken(), good)
    bad.write_bytes(good.read_bytes()[:-10])
    assert run(["ledger", "verify", str(good), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["guests"], told["hosts"], told["snapshot"], told["problems"]) == (1, 1, True, [])
    assert run(["ledger", "verify", str(bad)]) == 1
    out = capsys.readouterr()
    assert "no usable backup" in out.out
    assert "cut off" in out.err + out.out


def test_which_ledger_is_meant_has_to_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ledger", "export", str(tmp_path / "f"), "--dir", str(tmp_path)]) == 2
    assert "which ledger" in capsys.readouterr().err
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("listen: [a:1]\n")
    assert run(["ledger", "export", str(tmp_path / "f"), "--config", str(wrong)]) == 2
    assert "names no `zookeeper`" in capsys.readouterr().err


def test_the_identity_is_that_of_the_configuration_and_must_be_usable(tmp_path: Path) -> None:
    config = tmp_path / "api.yaml"
    config.write_text(f"zookeeper: z:2181\nchroot: /x\ntls: {{directory: {tmp_path}}}\n")
    assert configured(config) == Where("z:2181", "/x", tmp_path)
    assert run(["ledger", "export", str(tmp_path / "f"), "--config", str(config)]) == 2
