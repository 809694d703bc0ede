"""The peer for whoever measures: started in the guests' network, asked, and gone afterwards."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from deploy.lab.cluster.network import command_in
from deploy.lab.peer.outage import Outage

ANSWER_S = 65.0
EVERY_MS = 10.0


class PeerError(Exception):
    """The peer ended or does not answer, or the guest that it was asked about does not. The text says which."""


class Peer:
    """A context: the process lives as long as it. Calls block, each for at most a minute."""

    def __init__(self, namespace: str | None, environment: Mapping[str, str] | None = None) -> None:
        """`namespace`: where the guests' network can be reached; `environment`: marks that tell whose process it is."""
        self._namespace = namespace
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Peer:
        self._process = subprocess.Popen(
            command_in(self._namespace, [sys.executable, "-m", "deploy.lab.peer"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=self._environment,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def watch(self, guest: str, address: str, every_ms: float = EVERY_MS) -> None:
        """Talk with a guest from now on. Raises PeerError, as all calls do."""
        self._asked({"op": "watch", "guest": guest, "address": address, "every_ms": every_ms})

    def is_answered(self, guest: str) -> bool:
        """It has answered over UDP and over TCP."""
        answers = self._asked({"op": "answers", "guest": guest})
        return bool(answers["udp"] and answers["tcp"])

    def await_answers(self, guest: str, timeout_s: float) -> None:
        """Raises PeerError when the guest does not answer both ways in time."""
        end = time.monotonic() + timeout_s
        while not self.is_answered(guest):
            if time.monotonic() > end:
                raise PeerError(f"guest {guest} does not answer on the network within {timeout_s:.0f} s")
            time.sleep(0.05)

    def outage(self, guest: str, start_ns: int, end_ns: int) -> Outage:
        """The longest one in a window of the monotonic clock."""
        return Outage(**self._asked({"op": "outage", "guest": guest, "start_ns": start_ns, "end_ns": end_ns}))

    def ask(self, guest: str, letter: str) -> int:
        """See `Talk.ask`."""
        return int(self._asked({"op": "ask", "guest": guest, "letter": letter})["promised"])

    def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise PeerError("the peer is not running")
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], ANSWER_S)
            line = process.stdout.readline() if ready else b""
        except OSError as error:
            raise PeerError(f"the peer has ended: {error}") from error
        if not line:
            raise PeerError("the peer has ended, or does not answer")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"guest {question['guest']}: {answer['error']}")
        return answer
