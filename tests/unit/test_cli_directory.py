"""Which API `drover` means when nobody names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.cli import context, directory
from orchestrator.cli.exits import CliError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("DROVER_API", "DROVER_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(directory, "PACKAGED", tmp_path / "run" / "api.sock")
    monkeypatch.setattr(directory, "PACKAGED_CONFIG", tmp_path / "etc" / "api.yaml")
    monkeypatch.setattr(context, "PACKAGED", directory.PACKAGED)
    return tmp_path


def configured(home: Path) -> None:
    directory.PACKAGED_CONFIG.parent.mkdir()
    directory.PACKAGED_CONFIG.touch()


def test_while_the_packages_api_restarts_nobody_is_sent_to_a_local_cluster(home: Path) -> None:
    configured(home)
    with pytest.raises(CliError) as caught:
        context.Settings().client()
    assert str(directory.PACKAGED) in str(caught.value)
    assert "systemctl status drover-api" in (caught.value.hint or "")


def test_without_packages_a_local_cluster_is_meant(home: Path) -> None:
    with pytest.raises(CliError) as caught:
        context.Settings().client()
    assert "drover up" in (caught.value.hint or "")


def test_a_local_cluster_that_is_up_goes_first(home: Path) -> None:
    configured(home)
    socket = home / ".drover" / "api.sock"
    socket.parent.mkdir()
    socket.touch()
    assert directory.api_sockets(directory.default_dir()) == (socket.resolve(),)


def test_a_directory_that_was_named_is_never_the_packages_api(home: Path) -> None:
    configured(home)
    directory.PACKAGED.parent.mkdir()
    directory.PACKAGED.touch()
    named = home / "lab"
    assert directory.api_sockets(named) == (named.resolve() / "api.sock",)
    assert directory.api_sockets(directory.default_dir()) == (directory.PACKAGED,)
