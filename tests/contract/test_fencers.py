"""The contract of a fencer: a program, a Redfish controller and the local cluster's power pass the same cases.

What no fencer may ever do is to say OFF without having seen it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from deploy.lab.cluster.layout import Layout
from orchestrator.core.errors import DroverError
from orchestrator.fencing.base import Fenced, Fencer, Power
from orchestrator.fencing.config import FencerConfig, FencerKind, make_fencers
from orchestrator.fencing.exec import KEPT_BYTES, ExecFencer
from orchestrator.fencing.redfish import RedfishFencer
from tests.fakes.redfish import Controller, serving

HOST = "host-1"
TIMEOUT_S = 3.0


class Rig(Protocol):
    """A fencer and the power it holds."""

    fencer: Fencer

    def is_on(self) -> bool: ...
    def break_down(self) -> None:
        """Whatever holds the power answers with errors from now on; the host keeps its power."""

    def fall_silent(self) -> None:
        """It answers nothing at all from now on."""

    def jam(self) -> None:
        """It takes the order and the host keeps its power."""


# --- a program --------------------------------------------------------------------------------------------------------

SWITCH = """
import json, os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
assert sys.argv[2:] == ["power-off", os.environ["DROVER_FENCE_HOST"]], sys.argv
order = json.loads(sys.stdin.readline())
(here / "order").write_text(json.dumps({"order": order, "environment": sorted(os.environ)}))
mode = (here / "mode").read_text()
if mode == "broken":
    print("the switch does not know me")
    sys.exit(3)
if mode == "silent":
    os.system("sleep 60 & echo $! > " + str(here / "child"))
    time.sleep(60)
if mode == "jammed":
    print("relay 7 is stuck")
    sys.exit(1)
if mode == "loud":
    sys.stdout.write("x" * 5_000_000 + "\\nswitched\\n")
(here / "power").write_text("off")
print("relay 7 is open")
"""


class ProgramRig:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "switch.py").write_text(SWITCH)
        (directory / "power").write_text("on")
        self.mode("sound")
        command = (sys.executable, "-S", str(directory / "switch.py"), str(directory))
        self.fencer: Fencer = ExecFencer(command, timeout_s=TIMEOUT_S, environment={"RACK": "7"})

    def mode(self, mode: str) -> None:
        (self.directory / "mode").write_text(mode)

    def is_on(self) -> bool:
        return (self.directory / "power").read_text() == "on"

    def break_down(self) -> None:
        self.mode("broken")

    def fall_silent(self) -> None:
        self.mode("silent")

    def jam(self) -> None:
        self.mode("jammed")


# --- Redfish ----------------------------------------------------------------------------------------------------------


class RedfishRig:
    def __init__(self, controller: Controller, fencer: RedfishFencer) -> None:
        self.controller = controller
        self.fencer: Fencer = fencer

    def is_on(self) -> bool:
        return self.controller.power_state == "On"

    def break_down(self) -> None:
        self.controller.status = 503

    def fall_silent(self) -> None:
        self.controller.silent = True

    def jam(self) -> None:
        self.controller.falls_after_s = -1


# --- the local cluster ------------------------------------------------------------------------------------------------


class LabRig:
    """The lab's program against a socket that speaks as the cluster's supervisor does."""

    def __init__(self, directory: Path) -> None:
        self.mode = "sound"
        self.power = "on"
        layout = Layout.of(directory)
        layout.supervisor_socket.parent.mkdir(parents=True, exist_ok=True)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(layout.supervisor_socket))
        self._server.listen()
        self._ended = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        command = (sys.executable, "-m", "deploy.lab.cluster.fence", "--dir", str(directory))
        self.fencer: Fencer = ExecFencer(command, timeout_s=TIMEOUT_S + 5)

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._server.accept()
            except OSError:
                return
            with link, link.makefile("rb") as questions:
                self._reply(link, json.loads(questions.readline()))

    def _reply(self, link: socket.socket, question: dict[str, Any]) -> None:
        assert question == {"op": "power_off", "host": HOST}
        if self.mode == "silent":
            self._ended.wait(30)
        elif self.mode != "sound":
            link.sendall(b'{"error": "the supervisor is shutting down"}\n')
        else:
            self.power = "off"
            link.sendall(b"{}\n")

    def is_on(self) -> bool:
        return self.power == "on"

    def break_down(self) -> None:
        self.mode = "broken"

    def fall_silent(self) -> None:
        self.mode = "silent"

    def jam(self) -> None:
        self.mode = "jammed"

    def close(self) -> None:
        self._ended.set()
        self._server.close()


@pytest.fixture(params=["program", "redfish", "lab"])
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "program":
        yield ProgramRig(tmp_path)
    elif request.param == "redfish":
        controller = Controller()
        with serving(controller) as url:
            yield RedfishRig(controller, RedfishFencer(url, "1", timeout_s=TIMEOUT_S))
    else:
        directory = Path("/tmp") / f"df{os.getpid()}-{time.monotonic_ns() % 10**6}"
        lab = LabRig(directory)
        yield lab
        lab.close()
        shutil.rmtree(directory, ignore_errors=True)


async def power_off(rig: Rig) -> Fenced:
    async with asyncio.timeout(30):
        return await rig.fencer.power_off(HOST)


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.rule("H11")
async def test_the_host_is_off_when_the_fencer_says_so(rig: Rig) -> None:
    assert rig.is_on()
    answer = await power_off(rig)
    assert answer.power is Power.OFF, answer
    assert not rig.is_on()


async def test_a_host_that_is_off_already_is_confirmed(rig: Rig) -> None:
    await power_off(rig)
    assert (await power_off(rig)).power is Power.OFF


@pytest.mark.rule("H11")
async def test_an_error_is_no_answer(rig: Rig) -> None:
    rig.break_down()
    answer = await power_off(rig)
    assert answer.power is Power.UNKNOWN
    assert answer.said
    assert rig.is_on()


@pytest.mark.rule("H11")
async def test_silence_is_no_answer_and_ends(rig: Rig) -> None:
    rig.fall_silent()
    answer = await power_off(rig)
    assert answer.power is Power.UNKNOWN
    assert answer.said
    assert "\n" not in answer.said


@pytest.mark.rule("H11")
async def test_an_order_that_has_no_effect_is_never_off(rig: Rig) -> None:
    rig.jam()
    answer = await power_off(rig)
    assert answer.power is not Power.OFF
    assert rig.is_on()


async def test_a_fencer_that_is_cut_off_ends_at_once(rig: Rig) -> None:
    rig.fall_silent()
    task = asyncio.create_task(rig.fencer.power_off(HOST))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(10):
            await task


# --- of the program ---------------------------------------------------------------------------------------------------


async def test_what_the_program_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_SOMEBODY", "x")
    assert (await power_off(ProgramRig(tmp_path))).said == "relay 7 is open"
    told = json.loads((tmp_path / "order").read_text())
    assert told["order"] == {"contract": 1, "action": "power-off", "host": HOST}
    assert {"DROVER_FENCE_HOST", "DROVER_FENCE_ACTION", "RACK", "PATH"} <= set(told["environment"])
    assert "SECRET_OF_SOMEBODY" not in told["environment"]


async def test_a_program_that_says_too_much_is_heard_to_the_end(tmp_path: Path) -> None:
    rig = ProgramRig(tmp_path)
    rig.mode("loud")
    answer = await power_off(rig)
    assert answer.power is Power.OFF
    assert len(answer.said) <= KEPT_BYTES


async def test_nothing_of_a_program_that_hangs_stays(tmp_path: Path) -> None:
    rig = ProgramRig(tmp_path)
    rig.fall_silent()
    await power_off(rig)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _alive(child):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("what the program started is still there")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    answer = await ExecFencer((str(tmp_path / "none"),)).power_off(HOST)
    assert answer.power is Power.UNKNOWN
    assert "cannot be started" in answer.said


async def test_a_program_that_is_killed_has_said_nothing(tmp_path: Path) -> None:
    answer = await ExecFencer(("/bin/sh", "-c", "kill -9 $$")).power_off(HOST)
    assert (answer.power, "signal 9" in answer.said) == (Power.UNKNOWN, True)


# --- of Redfish -------------------------------------------------------------------------------------------------------


async def test_redfish_asks_for_forceoff_and_waits_until_it_reads_off() -> None:
    controller = Controller(falls_after_s=0.8)
    with serving(controller) as url:
        answer = await RedfishFencer(url, "1", timeout_s=10).power_off(HOST)
    assert answer.power is Power.OFF
    assert controller.resets == ["ForceOff"]
    assert [method for method, _ in controller.requests][:2] == ["GET", "POST"]


async def test_redfish_that_goes_on_running_is_not_off() -> None:
    controller = Controller(falls_after_s=-1)
    with serving(controller) as url:
        answer = await RedfishFencer(url, "1", timeout_s=1.5).power_off(HOST)
    assert answer.power is Power.NOT_OFF
    assert "PowerState is On" in answer.said


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b'{"PowerState": null}', b'{"PowerState": "' + b"O" * 300_000])
async def test_redfish_answers_that_say_nothing(body: bytes) -> None:
    with serving(Controller(body=body)) as url:
        assert (await RedfishFencer(url, "1", timeout_s=2).power_off(HOST)).power is Power.UNKNOWN


async def test_redfish_of_another_system() -> None:
    with serving(Controller(system="2")) as url:
        answer = await RedfishFencer(url, "1", timeout_s=2).power_off(HOST)
    assert (answer.power, "404" in answer.said) == (Power.UNKNOWN, True)


async def test_redfish_credentials_come_from_a_file_and_are_never_said(tmp_path: Path) -> None:
    file = tmp_path / "credentials"
    file.write_text('{"username": "fence", "password": "s3cret"}')
    with serving(Controller(credentials=("fence", "s3cret"))) as url:
        assert (await RedfishFencer(url, "1", file, timeout_s=3).power_off(HOST)).power is Power.OFF
    with serving(Controller(credentials=("fence", "other"))) as url:
        answer = await RedfishFencer(url, "1", file, timeout_s=3).power_off(HOST)
    assert answer.power is Power.UNKNOWN
    assert "401" in answer.said
    assert "s3cret" not in answer.said
    file.write_text("s3cret")
    answer = await RedfishFencer(url, "1", file, timeout_s=3).power_off(HOST)
    assert answer.power is Power.UNKNOWN
    assert "s3cret" not in answer.said


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    directory = tmp_path_factory.mktemp("tls")
    key, made, both = (directory / name for name in ("key.pem", "cert.pem", "both.pem"))
    words = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(made)]
    subprocess.run(["openssl", *words, *names], check=True, capture_output=True)
    both.write_text(key.read_text() + made.read_text())
    return both


async def test_redfish_trusts_only_what_it_was_told_to_trust(certificate: Path) -> None:
    controller = Controller()
    with serving(controller, certificate=certificate) as url:
        answer = await RedfishFencer(url, "1", timeout_s=3).power_off(HOST)
        assert answer.power is Power.UNKNOWN
        assert controller.resets == []
        answer = await RedfishFencer(url, "1", ca_file=certificate, timeout_s=3).power_off(HOST)
        assert answer.power is Power.OFF
        controller.power = "On"
        assert (await RedfishFencer(url, "1", verify_tls=False, timeout_s=3).power_off(HOST)).power is Power.OFF


async def test_redfish_names_of_hosts_in_the_address() -> None:
    controller = Controller(system="system-host-1")
    with serving(controller) as url:
        fencer = RedfishFencer(url, "system-{host}", timeout_s=3)
        assert (await fencer.power_off(HOST)).power is Power.OFF
        assert (await fencer.power_off("host-2")).power is Power.UNKNOWN


# --- the configuration ------------------------------------------------------------------------------------------------

SOUND = FencerConfig("ipmi", FencerKind.EXEC, ("rack1-*",), command=("/usr/bin/fence",))
CARD = FencerConfig("cards", FencerKind.REDFISH, ("*",), url="https://{host}-bmc.example", system="1")


async def test_the_first_fencer_that_fits_is_asked(tmp_path: Path) -> None:
    rig = ProgramRig(tmp_path)
    known = FencerConfig("program", FencerKind.EXEC, ("host-*",), command=rig.fencer._command)  # pyright: ignore
    fencers = make_fencers((known, CARD))
    assert [fencers.name_for(name) for name in ("host-1", "other")] == ["program", "cards"]
    assert (await fencers.power_off("host-1")).power is Power.OFF
    assert (await make_fencers((known,)).power_off("other")).power is Power.UNKNOWN


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (FencerConfig("", FencerKind.EXEC, ()), ["fencing[0].name", "fencing[0].hosts", "fencing[0].command"]),
        (FencerConfig("a", FencerKind.EXEC, ("*",), timeout_s=0, command=("a",)), ["fencing[0].timeout_s"]),
        (FencerConfig("a", FencerKind.REDFISH, ("*",)), ["fencing[0].url", "fencing[0].system"]),
        (FencerConfig("a", FencerKind.REDFISH, ("*",), url="ftp://x", system="1"), ["fencing[0].url"]),
        (FencerConfig("a", FencerKind.REDFISH, ("*",), url="https://u:p@x", system="1"), ["fencing[0].url"]),
        (FencerConfig("a", FencerKind.REDFISH, ("*",), url="https://x", system="a/b"), ["fencing[0].system"]),
    ],
)
def test_everything_that_is_wrong_is_said(config: FencerConfig, fields: list[str]) -> None:
    with pytest.raises(DroverError) as caught:
        make_fencers((config,))
    assert [field for field, _ in caught.value.violations] == fields


def test_names_differ_and_credentials_are_nobody_elses(tmp_path: Path) -> None:
    with pytest.raises(DroverError, match="two fencers 'ipmi'"):
        make_fencers((SOUND, SOUND))
    file = tmp_path / "credentials"
    file.write_text("{}")
    file.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP)
    config = FencerConfig("a", FencerKind.REDFISH, ("*",), url="https://x", system="1", credentials_file=str(file))
    with pytest.raises(DroverError, match="chmod 600"):
        make_fencers((config,))
    file.chmod(0o600)
    make_fencers((config,))
