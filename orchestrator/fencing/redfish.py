"""A fencer that speaks Redfish to the management controller of each host (DMTF DSP0266)."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from orchestrator.fencing.base import Fenced, Fencer, Power

RESET = "ComputerSystem.Reset"
MAX_BODY = 262_144
"""Of an answer; a longer one is an error."""
REQUEST_S = 10.0
"""For one request; all of them together have the fencer's own bound."""
POLL_S = 0.5
_SAID = 300


class _Trouble(Exception):
    """What went wrong, for people. It proves nothing about the host's power."""


@dataclass(frozen=True, slots=True)
class RedfishFencer(Fencer):
    """`url` and `system` may hold `{host}`: the host's name takes its place."""

    url: str
    """https://HOST[:PORT] of the controller."""
    system: str
    """Id of the computer system, the last part of /redfish/v1/Systems/ID."""
    credentials_file: Path | None = None
    """JSON with `username` and `password`; read anew each time, so that it may be rotated."""
    verify_tls: bool = True
    ca_file: Path | None = None
    timeout_s: float = 60.0

    async def power_off(self, host: str) -> Fenced:
        """On a thread of its own: each request is bounded, and none begins after the fencer's own bound."""
        try:
            return await asyncio.to_thread(self._power_off, host)
        except _Trouble as error:
            return Fenced(Power.UNKNOWN, str(error)[:_SAID])

    def _power_off(self, host: str) -> Fenced:
        deadline = time.monotonic() + self.timeout_s
        controller = _Controller(self, host, deadline)
        path = f"/redfish/v1/Systems/{self.system.replace('{host}', host)}"
        state = self._state(controller, path)
        if state == "Off":
            return Fenced(Power.OFF, "it was off already")
        action = f"{path}/Actions/{RESET}"
        controller.call("POST", action, {"ResetType": "ForceOff"})
        while True:
            state = self._state(controller, path)
            if state == "Off":
                return Fenced(Power.OFF, "ForceOff, then PowerState Off")
            if time.monotonic() + POLL_S >= deadline:
                return Fenced(Power.NOT_OFF, f"PowerState is {state} {self.timeout_s:g} s after ForceOff")
            time.sleep(POLL_S)

    @staticmethod
    def _state(controller: _Controller, path: str) -> str:
        state = controller.call("GET", path).get("PowerState")
        if not isinstance(state, str):
            raise _Trouble(f"{path} has no PowerState")
        return state


class _Controller:
    """One management controller. Every call raises _Trouble."""

    def __init__(self, fencer: RedfishFencer, host: str, deadline: float) -> None:
        self._fencer = fencer
        self._url = urlsplit(fencer.url.replace("{host}", host))
        self._deadline = deadline
        self._headers = {"Accept": "application/json", "OData-Version": "4.0", **self._authorization()}

    def _authorization(self) -> dict[str, str]:
        file = self._fencer.credentials_file
        if file is None:
            return {}
        try:
            known = json.loads(file.read_text())
            pair = f"{known['username']}:{known['password']}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Trouble(f"{file} holds no username and password: {type(error).__name__}") from error
        return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        name, port = self._url.hostname or "", self._url.port
        if self._url.scheme == "http":
            return http.client.HTTPConnection(name, port, timeout=timeout_s)
        context = ssl.create_default_context(cafile=self._fencer.ca_file)
        if not self._fencer.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection(name, port, timeout=timeout_s, context=context)

    def call(self, method: str, path: str, content: object = None) -> dict[str, Any]:
        where = f"{self._url.netloc}{path}"
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise _Trouble(f"{where}: no answer within {self._fencer.timeout_s:g} s")
        body = None if content is None else json.dumps(content)
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        try:
            connection = self._connect(min(left, REQUEST_S))
            try:
                connection.request(method, path, body, headers)
                answer = connection.getresponse()
                data = answer.read(MAX_BODY + 1)
            finally:
                connection.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Trouble(f"{where}: {error or type(error).__name__}") from error
        if answer.status >= 300 or answer.status < 200:
            raise _Trouble(f"{where} answered {answer.status} {answer.reason}")
        if len(data) > MAX_BODY:
            raise _Trouble(f"{where} answered more than {MAX_BODY} bytes")
        if not data.strip():
            return {}
        try:
            found = json.loads(data)
        except ValueError as error:
            raise _Trouble(f"{where} did not answer in JSON") from error
        if not isinstance(found, dict):
            raise _Trouble(f"{where} did not answer with an object")
        return cast("dict[str, Any]", found)
