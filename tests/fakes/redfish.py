"""A management controller with enough Redfish to be fenced through: a real HTTP server on a thread of its own."""

from __future__ import annotations

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Controller:
    """One controller with one computer system. Set its fields to make it misbehave."""

    system: str = "1"
    power: str = "On"
    falls_after_s: float = 0.0
    """ForceOff takes effect so late; PowerState says PoweringOff meanwhile. Negative: it is accepted and ignored."""
    credentials: tuple[str, str] | None = None
    status: int = 0
    """Answer every request with this status."""
    body: bytes | None = None
    """Answer every GET with this."""
    silent: bool = False
    """Accept connections and answer nothing."""
    requests: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    resets: list[str] = field(default_factory=list[str])
    port: int = 0
    _off_at_s: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def power_state(self) -> str:
        if self.power == "PoweringOff" and time.monotonic() >= self._off_at_s:
            self.power = "Off"
        return self.power

    def reset(self, kind: str) -> None:
        self.resets.append(kind)
        if kind != "ForceOff" or self.falls_after_s < 0 or self.power == "Off":
            return
        self.power, self._off_at_s = "PoweringOff", time.monotonic() + self.falls_after_s


class _Handler(BaseHTTPRequestHandler):
    controller: Controller

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self, status: int, content: object = None, raw: bytes | None = None) -> None:
        data = raw if raw is not None else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refused(self) -> bool:
        known = self.controller
        known.requests.append((self.command, self.path))
        if known.silent:
            known._ended.wait(30)
            return True
        if known.credentials is not None:
            wanted = base64.b64encode(":".join(known.credentials).encode()).decode()
            if self.headers.get("Authorization") != f"Basic {wanted}":
                self._answer(401, {"error": {"code": "Base.1.8.AccessDenied"}})
                return True
        if known.status:
            self._answer(known.status)
            return True
        return False

    def do_GET(self) -> None:
        known = self.controller
        if self._refused():
            return
        if self.path != f"/redfish/v1/Systems/{known.system}":
            self._answer(404)
        elif known.body is not None:
            self._answer(200, raw=known.body)
        else:
            self._answer(200, {"@odata.id": self.path, "Id": known.system, "PowerState": known.power_state})

    def do_POST(self) -> None:
        known = self.controller
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self._refused():
            return
        if self.path != f"/redfish/v1/Systems/{known.system}/Actions/ComputerSystem.Reset":
            self._answer(404)
            return
        known.reset(content.get("ResetType", ""))
        self._answer(204)


@contextmanager
def serving(controller: Controller, *, certificate: Path | None = None) -> Iterator[str]:
    """Its URL. `certificate`: a PEM file with key and certificate; then it speaks TLS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"controller": controller}))
    server.daemon_threads = True
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    controller.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"{'https' if certificate else 'http'}://localhost:{controller.port}"
    finally:
        controller._ended.set()
        server.shutdown()
        server.server_close()
        thread.join(5)
