"""A stand-in for an agent, the API, the collector or the coordinator: a small process that listens where it should.

`python local_part.py KIND CONFIG [qemu]`. An agent's stand-in also starts one guest in a session of its own and notes
it down as real agents do; a restarted one finds it alive and leaves it be. The guest is a sleeping process, or with
`qemu` a real one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

# It is run without site-packages, to start at once.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from orchestrator.proc import start_time_of


def listener(kind: str, config: Path) -> socket.socket | None:
    if kind == "collector":
        path = config.parent / "collector.sock"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()
        return server
    content = json.loads(config.read_text())
    if kind == "agent":
        return socket.create_server((content["address"], content["control_port"]))
    if kind == "api":
        address, _, port = content["listen"][1].rpartition(":")
        return socket.create_server((address, int(port)))
    return None


def keep_guest(config: Path) -> None:
    note = config.parent / "guests" / "one" / "i1.json"
    if note.exists():
        known = json.loads(note.read_text())
        try:
            if start_time_of(known["pid"]) == known["start_time"]:
                return
        except OSError:
            pass
    # An empty environment and nothing on the command line: only the note, or the namespace, tells whose it is.
    guest = subprocess.Popen(guest_command(config), start_new_session=True, env={"PATH": os.environ["PATH"]})
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"pid": guest.pid, "start_time": start_time_of(guest.pid)}))


def guest_command(config: Path) -> list[str]:
    if "qemu" not in sys.argv[3:]:
        return ["sleep", "600"]
    agent = json.loads(config.read_text())
    console = f"socket,id=console,path={agent['console_dir']}/{agent['host']}.one.i1.sock,server=on,wait=off"
    command = [agent["qemu"], *"-accel tcg -M pc -m 64 -nodefaults -no-user-config -display none".split()]
    command += ["-chardev", console, "-serial", "chardev:console"]
    return [*command, "-kernel", agent["guest_image"], "-append", "hz=100 hb=2 rate=16 pages=1024"]


def main() -> None:
    kind, config = sys.argv[1], Path(sys.argv[2])
    server = listener(kind, config)
    if kind == "agent":
        keep_guest(config)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while server:
        server.accept()[0].close()
    signal.pause()


if __name__ == "__main__":
    main()
