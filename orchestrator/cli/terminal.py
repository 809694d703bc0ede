"""A terminal that is lent to a guest: what is typed goes there as it is, until Ctrl-]."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.rpc.console import ConsoleSession

ESCAPE = b"\x1d"
"""Ctrl-]."""
_READ_BYTES = 4096
_LOOK_S = 0.2


def sit(session: ConsoleSession) -> None:
    """Until the session ends, or Ctrl-] is typed. Raises DroverError.

    What the guest says goes to standard output as it is; where it is, and what was lost, is told on standard error.
    """
    with _raw() as is_terminal:
        over = threading.Event()
        typing = threading.Thread(target=_type, args=(session, over, is_terminal), daemon=True)
        _say("the session begins; Ctrl-] ends it" if is_terminal else "", is_terminal)
        typing.start()
        try:
            for said in session:
                if said.host:
                    _say(f"it is on {said.host}", is_terminal)
                if said.lost_bytes:
                    _say(f"{said.lost_bytes} bytes are lost", is_terminal)
                if said.data:
                    sys.stdout.buffer.write(said.data)
                    sys.stdout.buffer.flush()
                if said.message:
                    _say(said.message, is_terminal)
        finally:
            over.set()
            typing.join(2 * _LOOK_S)
    if is_terminal:
        sys.stderr.write("\n")


@contextlib.contextmanager
def _raw() -> Generator[bool]:
    """The terminal passes on every key, and is as it was afterwards. False: there is none."""
    if not sys.stdin.isatty():
        yield False
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield True
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _say(text: str, is_terminal: bool) -> None:
    """A raw terminal needs both: to the next line, and to its beginning."""
    if text:
        sys.stderr.write(f"\r\n[drover: {text}]\r\n" if is_terminal else f"drover: {text}\n")
        sys.stderr.flush()


def _type(session: ConsoleSession, over: threading.Event, is_terminal: bool) -> None:
    descriptor = sys.stdin.fileno()
    while not over.is_set():
        if not select.select([descriptor], [], [], _LOOK_S)[0]:
            continue
        data = os.read(descriptor, _READ_BYTES)
        before, escape, _ = data.partition(ESCAPE) if is_terminal else (data, b"", b"")
        if before:
            session.type(before)
        if escape:
            session.close()
        if escape or not data:
            return
