"""A guest's files on its host: whenever an agent is killed while it removes them, the next one knows what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.guest.files import GuestFiles, found_on_disk
from orchestrator.core.records import GuestSpec
from tests.fakes.config import agent_config

G = "0f0e0d0c-0b0a-4987-8654-321001234567"


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", range(5))
def test_killed_after_any_step_of_the_removal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    config = agent_config(tmp_path)
    files = GuestFiles(config, G, GuestSpec("web"))
    files.make()
    for name in ("a.qmp", "a.log", "a.json"):
        (files.directory / name).touch()
    steps, unlink = 0, Path.unlink

    def unlink_or_die(path: Path) -> None:
        nonlocal steps
        if steps == after:
            raise Killed
        steps += 1
        unlink(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink_or_die)
        if after < 4:
            with pytest.raises(Killed):
                files.remove()
        else:
            files.remove()
    assert [found.uuid for found in found_on_disk(config).guests] == ([G] if after < 4 else [])
    files.remove()
    assert not files.directory.exists()


def test_a_directory_that_was_about_to_go_is_gone_at_the_next_start(tmp_path: Path) -> None:
    config = agent_config(tmp_path)
    left = config.dir / "guests" / G[:16]
    left.mkdir(parents=True)
    assert found_on_disk(config).guests == ()
    assert not left.exists()
