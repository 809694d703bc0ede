"""A client of several APIs, over real gRPC servers: one that is gone, one that froze, one that breaks off."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.cli.context import Settings
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import GuestSpec
from orchestrator.rpc import several
from orchestrator.rpc.orchestrator_client import OrchestratorClient
from protos.drover.v1 import types_pb2 as types
from tests.fakes import orchestrator_service
from tests.fakes.orchestrator_service import FakeOrchestrator, serve

R = RefusalReason


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("f")


def an_api(number: int) -> FakeOrchestrator:
    service = FakeOrchestrator(hosts={"host-1": orchestrator_service.host("host-1", boot_id=f"by-{number}")})
    service.guests["web"] = types.Guest(name="web", uuid="u", host="host-1", ownership=types.OWNERSHIP_PHASE_IDLE)
    return service


@contextlib.contextmanager
def frozen() -> Iterator[str]:
    """Takes every connection, as the kernel of a stopped process does, and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def nobody() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def both_served(one: FakeOrchestrator, other: FakeOrchestrator) -> Iterator[OrchestratorClient]:
    with serve(one, "127.0.0.1:0") as first, serve(other, "127.0.0.1:0") as second:
        client = OrchestratorClient(f"{first},{second}")
        with client:
            yield client


def who(client: OrchestratorClient) -> str:
    return client.get_host("host-1").boot_id


def test_another_api_answers_when_the_first_is_gone_and_when_it_froze() -> None:
    with serve(an_api(2), "127.0.0.1:0") as second, frozen() as silent:
        for first in (nobody(), silent):
            with OrchestratorClient(f"{first},{second}") as client:
                begun = time.monotonic()
                assert who(client) == "by-2"
                assert time.monotonic() - begun < 5
                begun = time.monotonic()
                client.pause_guest("web")  # it reached nobody else: no doubt about its effect
                assert time.monotonic() - begun < several.CONNECT_S, "it stays with the one that answers"


def test_a_client_goes_on_when_the_api_that_it_used_goes_and_comes(folder: Path) -> None:
    one, two = f"unix:{folder}/one.sock", f"unix:{folder}/two.sock"
    with serve(an_api(2), two), OrchestratorClient(f"{one},{two}") as client:
        with serve(an_api(1), one):
            assert who(client) == "by-1"
        assert who(client) == "by-2"
        client.pause_guest("web")
        with serve(an_api(1), one):
            assert who(client) == "by-2", "no reason to go back"


def test_what_nobody_answers_is_repeated_only_where_that_is_safe() -> None:
    first, other = an_api(1), an_api(2)
    hung = ("GetHost", "PauseGuest", "CreateGuest")
    first.delays_s = dict.fromkeys(hung, 30.0)
    with serve(first, "127.0.0.1:0") as one, serve(other, "127.0.0.1:0") as two:
        addresses = f"{one},{two}"
        with OrchestratorClient(addresses, timeout_s=1.0) as client, pytest.raises(DroverError) as caught:
            client.pause_guest("web")
        assert caught.value.reason is R.OUTCOME_UNKNOWN
        assert not other.requests("PauseGuest"), "nobody knows whether the first has heard it"

        with OrchestratorClient(addresses, timeout_s=1.0) as client:
            assert who(client) == "by-2"

        with OrchestratorClient(addresses, timeout_s=1.0) as client, pytest.MonkeyPatch.context() as patch:
            patch.setattr("orchestrator.rpc.orchestrator_client.SLOW_S", 1.0)
            spec = GuestSpec(name="new", memory_mib=64, vcpus=1)
            assert client.create_guest(spec, "host-1", request_id="r-1").name == "new"
        heard = [first.requests("CreateGuest"), other.requests("CreateGuest")]
        assert [[each.request_id for each in some] for some in heard] == [["r-1"], ["r-1"]]


def test_a_refusal_is_an_answer() -> None:
    first, other = an_api(1), an_api(2)
    first.failures["GetGuest"] = DroverError(R.NOT_FOUND, "no such guest")
    with both_served(first, other) as client, pytest.raises(DroverError, match="no such guest"):
        client.get_guest("web")
    assert not other.requests("GetGuest")


def test_a_read_goes_on_with_an_api_that_still_has_the_ledger() -> None:
    first, other = an_api(1), an_api(2)
    first.failures["GetHost"] = DroverError(R.LEDGER_UNREACHABLE, "ZooKeeper is away")
    with both_served(first, other) as client:
        assert who(client) == "by-2"


def test_when_none_is_there_the_error_names_all_of_them() -> None:
    both = f"{nobody()},{nobody()}"
    with OrchestratorClient(both) as client, pytest.raises(DroverError) as caught:
        client.list_hosts()
    assert caught.value.reason is R.API_UNREACHABLE
    assert both in caught.value.message
    with OrchestratorClient(both) as client, pytest.raises(DroverError) as caught:
        next(client.watch_migrations(["m"]))
    assert caught.value.reason is R.API_UNREACHABLE


def test_a_watch_goes_on_elsewhere_also_after_a_long_silence(folder: Path) -> None:
    name = "5" * 32
    under_way = types.Migration(name=name, phase=types.MIGRATION_PHASE_PRECOPY, guest="web")
    over = types.Migration(name=name, phase=types.MIGRATION_PHASE_SUCCEEDED, guest="web")
    first, other = an_api(1), an_api(2)
    first.migrations[name] = other.migrations[name] = under_way
    first.frames, other.frames = [[under_way, 60.0]], [[over]]
    one, two = f"unix:{folder}/one.sock", f"unix:{folder}/two.sock"
    with serve(other, two), OrchestratorClient(f"{one},{two}", timeout_s=0.5) as client:
        with serve(first, one):
            seen = client.watch_migrations([name])
            assert next(seen).phase == types.MIGRATION_PHASE_PRECOPY
            time.sleep(0.8)  # longer than the client has patience with an API that is gone
        assert [each.phase for each in seen] == [types.MIGRATION_PHASE_SUCCEEDED]


def test_addresses_with_commas_between_them_and_in_a_path() -> None:
    assert several.addresses("a:1, [::1]:2,unix:/x/api.sock") == ["a:1", "[::1]:2", "unix:/x/api.sock"]
    assert several.addresses("unix:/x,y/api.sock,unix:/z.sock,b:1") == ["unix:/x,y/api.sock", "unix:/z.sock", "b:1"]
    assert several.addresses("") == [""]


def test_the_command_line_uses_every_api_of_the_local_cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DROVER_API", raising=False)
    assert Settings(directory=folder).address == f"unix:{folder.resolve()}/api.sock"
    with serve(an_api(1), f"unix:{folder}/api.sock"), serve(an_api(2), f"unix:{folder}/api-2.sock"):
        settings = Settings(directory=folder)
        assert settings.address == f"unix:{folder.resolve()}/api.sock,unix:{folder.resolve()}/api-2.sock"
        with settings.client() as client:
            assert who(client) == "by-1"
