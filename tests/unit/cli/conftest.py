"""`drover` against a real gRPC server with a service in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.orchestrator_service import FakeOrchestrator, host, serve
from tests.unit.cli.ran import Drover, guest, runner


@pytest.fixture
def service() -> FakeOrchestrator:
    fake = FakeOrchestrator()
    fake.hosts = {name: host(name) for name in ("host-1", "host-2", "host-10")}
    for name in ("web-2", "web-10", "db"):
        fake.guests[name] = guest(name)
    return fake


@pytest.fixture
def address(service: FakeOrchestrator, tmp_path: Path) -> Iterator[str]:
    with serve(service, f"unix:{tmp_path}/api.sock") as listening:
        yield listening


@pytest.fixture
def drover(address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Drover:
    monkeypatch.setenv("DROVER_API", address)
    return runner(capsys)


@pytest.fixture
def local(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Drover:
    monkeypatch.setenv("DROVER_DIR", str(tmp_path))
    monkeypatch.delenv("DROVER_API", raising=False)
    return runner(capsys)
