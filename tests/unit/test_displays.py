"""What is told of a screen: where viewers reach it, and by which password."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agents.config import AgentConfig, ConfigError, load
from agents.engine import base
from agents.guest import displays
from agents.guest.copies import Copy
from orchestrator.core.endpoint import Endpoint
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import Display, GuestSpec
from tests.fakes.config import agent_config


class Screen:
    """A VMM that serves one."""

    def __init__(self, at: base.DisplayAt | None) -> None:
        self.at = at
        self.passwords: list[str] = []

    async def open_display(self, password: str, valid_s: int) -> base.DisplayAt:
        assert valid_s == displays.VALID_S
        self.passwords.append(password)
        if self.at is None:
            raise base.EngineError("its VMM serves no screen")
        return self.at


def copy(vmm: object, config: AgentConfig, *, vnc: bool = True) -> Copy:
    files = SimpleNamespace(spec=GuestSpec("web", display=Display(vnc=vnc)), config=config)
    return cast(Copy, SimpleNamespace(files=files, vmm=vmm))


@pytest.mark.parametrize(
    ("listens", "told"),
    [
        ("192.0.2.7", "192.0.2.7:5901"),
        ("2001:db8::7", "[2001:db8::7]:5901"),
        ("0.0.0.0", "127.0.0.1:5901"),
    ],
)
async def test_at_an_address_each_answer_has_a_password_of_its_own(tmp_path: Path, listens: str, told: str) -> None:
    screen = Screen(base.DisplayAt(endpoint=Endpoint(listens, 5901)))
    here = copy(screen, agent_config(tmp_path))
    answers = [await displays.opened(here) for _ in range(3)]
    assert {answer.address for answer in answers} == {told}
    assert [answer.password for answer in answers] == screen.passwords
    assert len(set(screen.passwords)) == 3
    assert all(len(password) == 8 and password.isalnum() for password in screen.passwords)


async def test_at_a_socket_there_is_no_password(tmp_path: Path) -> None:
    found = await displays.opened(copy(Screen(base.DisplayAt(socket=Path("/run/x.vnc"))), agent_config(tmp_path)))
    assert (found.socket, found.address, found.password, found.password_valid_s) == ("/run/x.vnc", "", "", 0)


@pytest.mark.parametrize(
    ("vmm", "vnc", "said"),
    [
        (Screen(None), False, "has no screen"),
        (Screen(None), True, "its VMM serves no screen"),
        (object(), True, "the engine of guest web's host serves no screens"),
    ],
)
async def test_what_serves_no_screen_is_said(tmp_path: Path, vmm: object, vnc: bool, said: str) -> None:
    with pytest.raises(DroverError, match=said) as refused:
        await displays.opened(copy(vmm, agent_config(tmp_path), vnc=vnc))
    assert refused.value.reason is RefusalReason.DISPLAY_NOT_AVAILABLE


def test_screens_are_served_at_an_ip_address_of_the_host(tmp_path: Path) -> None:
    def read(vnc_listen: str) -> Any:
        made = agent_config(tmp_path).model_copy(update={"vnc_listen": vnc_listen})
        (tmp_path / "agent.json").write_text(made.model_dump_json())
        return load(tmp_path / "agent.json").vnc_listen

    assert [read(each) for each in ("", "10.0.0.1", "[::1]")] == ["", "10.0.0.1", "::1"]
    with pytest.raises(ConfigError, match="vnc_listen"):
        read("host-1")
