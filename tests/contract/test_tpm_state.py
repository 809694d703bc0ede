"""The state of a TPM that was somebody else's, under real swtpm: what is made of it has the same keys."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from agents.engine.base import EngineError
from agents.guest import tpm_state
from agents.guest.tpm import PROGRAM
from tests.fakes.swtpm import key_of, tpm, tpm_of_theirs

if not shutil.which(PROGRAM):
    pytest.skip("not installed: swtpm", allow_module_level=True)


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, bytes]:
    """The file of a TPM as libvirt keeps it, and its key."""
    return tpm_of_theirs(tmp_path)


async def test_a_tpm_of_ours_has_the_keys_of_the_one_that_was_taken_over(
    tmp_path: Path, theirs: tuple[Path, bytes]
) -> None:
    given, key = theirs
    before = given.read_bytes()
    ours = tmp_path / "ours"
    await tpm_state.taken(PROGRAM, given, ours)
    assert given.read_bytes() == before
    with tpm(f"backend-uri=file://{ours}", tmp_path) as asked:
        assert key_of(asked) == key
    with tpm(f"backend-uri=file://{tmp_path / 'another'}", tmp_path) as asked:
        assert key_of(asked) != key
    assert {each.name for each in tmp_path.iterdir() if each.is_file()} == {"ours", "another"} | {
        each.name for each in tmp_path.iterdir() if each.name.startswith(".lock")
    }


async def test_what_is_no_state_of_a_tpm_is_refused(tmp_path: Path) -> None:
    given, ours = tmp_path / "given", tmp_path / "ours"
    for content in (b"", os.urandom(6000), bytes(tpm_state.MAX_STATE_BYTES + 1)):
        given.write_bytes(content)
        with pytest.raises(EngineError):
            await tpm_state.taken(PROGRAM, given, ours)
    with pytest.raises(EngineError):
        await tpm_state.taken(PROGRAM, tmp_path / "none", ours)
    with pytest.raises(EngineError):
        await tpm_state.taken("/bin/false", given, ours)
    assert {each.name for each in tmp_path.iterdir()} == {"given"}


async def test_a_state_under_a_key_is_refused(tmp_path: Path) -> None:
    """libvirt encrypts where the domain says so."""
    (directory := tmp_path / "theirs").mkdir()
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    with tpm(f"dir={directory}", tmp_path, "--key", f"file={secret},format=binary,mode=aes-256-cbc") as asked:
        key_of(asked)
    with pytest.raises(EngineError):
        await tpm_state.taken(PROGRAM, directory / "tpm2-00.permall", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
