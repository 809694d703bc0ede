"""`python -m deploy.lab.peer`: questions in lines of JSON on stdin, an answer each on stdout, until stdin ends.

{"op": "watch", "guest": "linux-1", "address": "10.78.3.4", "every_ms": 10}
{"op": "answers", "guest": ...}                                   -> {"udp": 17, "tcp": 16}
{"op": "outage", "guest": ..., "start_ns": ..., "end_ns": ...}    -> {"udp_ms": 31.5, "tcp_ms": 204.0, ...}
{"op": "ask", "guest": ..., "letter": "z"}                        -> {"promised": 1234}
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import click

from deploy.lab.peer.talk import Talk


class Peer:
    """All guests that are talked with."""

    def __init__(self) -> None:
        self._talks: dict[str, Talk] = {}

    async def answer(self, line: bytes) -> dict[str, Any]:
        """What is wrong with the question, or with the guest, is the answer's `error`."""
        try:
            question = json.loads(line)
            return await self._answer(question["op"], question)
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"cannot be understood: {error!r}"}
        except (OSError, TimeoutError) as error:
            return {"error": f"the guest does not answer: {error!r}"}

    async def _answer(self, op: str, question: dict[str, Any]) -> dict[str, Any]:
        guest = str(question["guest"])
        if op == "watch":
            if guest in self._talks:
                await self._talks.pop(guest).close()
            self._talks[guest] = Talk(str(question["address"]), float(question["every_ms"]))
            return {}
        talk = self._talks[guest]
        match op:
            case "answers":
                return dict(zip(("udp", "tcp"), talk.answers, strict=True))
            case "outage":
                return asdict(talk.outage(int(question["start_ns"]), int(question["end_ns"])))
            case "ask":
                return {"promised": await talk.ask(str(question["letter"]))}
            case _:
                raise ValueError(f"unknown op {op!r}")

    async def close(self) -> None:
        """End all conversations."""
        await asyncio.gather(*(talk.close() for talk in self._talks.values()))


async def _serve() -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    peer = Peer()
    try:
        while line := await reader.readline():
            sys.stdout.write(json.dumps(await peer.answer(line)) + "\n")
            sys.stdout.flush()
    finally:
        await peer.close()


@click.command()
def main() -> None:
    """Talk with guests until stdin ends."""
    with contextlib.suppress(OSError):  # what this process sleeps through looks like an outage
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    asyncio.run(_serve())


if __name__ == "__main__":
    main()
