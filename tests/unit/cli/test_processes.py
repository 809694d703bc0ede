"""`drover` as a process: interruption, pipes, completion."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from orchestrator.cli.exits import Exit
from tests.fakes.orchestrator_service import FakeOrchestrator
from tests.unit.cli.ran import DROVER, ROOT, evacuation, guest, leaving


def process(address: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    # A test run in the background of a shell ignores Ctrl-C, and whoever it starts would inherit that.
    return subprocess.Popen(
        ["env", "--default-signal=INT", *DROVER, *arguments],
        cwd=ROOT,
        env={**os.environ, "DROVER_API": address, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_leaves_the_evacuation_running_and_says_how_to_cancel_it(
    address: str, service: FakeOrchestrator
) -> None:
    service.frames = [[evacuation("RUNNING", leaving("web", "PRECOPY")), 60.0]]
    watch = process(address, "evacuate", "host-1", "--watch")
    assert watch.stdout
    assert watch.stdout.readline().endswith("web to host-2: PRECOPY (attempt 1)\n")
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=20)
    name = "e" * 32
    assert watch.returncode == 130
    assert err == (
        f"the evacuation goes on; `drover evacuation cancel {name}` cancels it, "
        f"`drover evacuation watch {name}` looks again\n"
    )
    assert service.requests("CancelEvacuation") == []


def test_a_closed_pipe_is_no_complaint(address: str, service: FakeOrchestrator) -> None:
    for number in range(3000):
        service.guests[f"many-{number}"] = guest(f"many-{number}")
    # Without a buffer Python itself would leave the rest unwritten, without an error.
    listing = process(address, "guest", "list", "-o", "json", PYTHONUNBUFFERED="")
    assert listing.stdout
    assert listing.stdout.readline() == "{\n"
    listing.stdout.close()
    assert listing.stderr
    assert listing.stderr.read() == ""
    listing.stderr.close()
    assert listing.wait(20) == Exit.FAILED


def test_shell_completion(address: str) -> None:
    def complete(words: str) -> list[str]:
        count = str(len(words.split(" ")) - 1)
        shell = process(address, _DROVER_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=count)
        out, _ = shell.communicate(timeout=20)
        return [line.partition(",")[2] for line in out.splitlines()]

    assert complete("drover evac") == ["evacuate", "evacuation"]
    assert complete("drover guest show web") == ["web-2", "web-10"]
    assert complete("drover evacuate host-1") == ["host-1", "host-10"]


def test_the_command_line_starts_without_what_it_does_not_need() -> None:
    """Measured as modules, not as time, which depends on the machine."""
    program = (
        "import sys; from orchestrator.cli import main; code = main.run(['--help']); "
        "print(sorted(set(sys.modules) & {'grpc', 'google.protobuf', 'pydantic', 'rich', 'yaml', 'asyncio'}))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
