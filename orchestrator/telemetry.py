"""Logs as JSON lines on stderr, one per event, for API, agents and every process of the coordinator.

    {"event": "attempt began", "level": "info", "at": "2026-03-01T12:00:00.123456Z", "guest": "db-1", "migration": ...}

What a task is about is bound once (`about(guest=..., migration=..., attempt=...)`) and stands in every line below it,
those of libraries included.

To log never blocks and never raises. Lines are written by a thread of their own, from a bounded queue; on a disk that
is full, or after an I/O error, it tries again until it can, and says then how many lines were lost meanwhile. A
process that ends waits a moment for the last lines.
"""

from __future__ import annotations

import atexit
import io
import json
import logging
import os
import re
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any, TextIO, cast

import structlog

LEVELS = ("debug", "info", "warning", "error")
MAX_QUEUED_BYTES = 4 << 20
"""Lines that wait to be written; what comes beyond is lost, and counted."""
FOLD_S = 60.0
"""A line that repeats itself is written so often."""
MAX_FOLDED = 256
FLUSH_S = 1.0
"""How long a process waits at its end for its last lines."""
_RETRY_S = (0.1, 1.0)
"""First and longest wait after a line could not be written."""


class LineWriter:
    """Takes whole lines from any thread and writes them to one place, in order, in a thread of its own.

    `sink` writes some of the bytes and returns how many; what it raises is taken for "not now".
    """

    def __init__(self, sink: Callable[[bytes], int], max_bytes: int = MAX_QUEUED_BYTES) -> None:
        self._sink = sink
        self._max_bytes = max_bytes
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._unsaid = 0
        self.lost = 0
        """Lines, since the start."""
        self._ending = False
        self._thread = threading.Thread(target=self._write_on, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Queue it. Never blocks and never raises."""
        data = text.encode(errors="replace")
        with self._changed:
            if self._bytes + len(data) > self._max_bytes:
                self.lost += 1
                self._unsaid += 1
            else:
                self._lines.append(data)
                self._bytes += len(data)
                self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """As files have it: nothing is to be done, the thread writes on by itself."""

    def drain(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until everything is written, at most so long."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._bytes and (left_s := deadline - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return not self._bytes

    def close(self, timeout_s: float = FLUSH_S) -> None:
        """`drain`, and end the thread; what was not written by then is lost."""
        self.drain(timeout_s)
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _write_on(self) -> None:
        while (line := self._next()) is not None:
            if not self._written(line):
                return
            with self._changed:
                self._bytes -= len(line)
                unsaid = self._unsaid if not self._lines else 0
                self._changed.notify_all()
            if unsaid and self._written(_lost(unsaid)):
                with self._changed:
                    self._unsaid -= unsaid

    def _next(self) -> bytes | None:
        with self._changed:
            while not self._lines:
                if self._ending:
                    return None
                self._changed.wait()
            return self._lines.popleft()

    def _written(self, line: bytes) -> bool:
        """To its last byte, however long that takes. False: the writer was closed meanwhile."""
        left, wait_s = memoryview(line), _RETRY_S[0]
        while left:
            try:
                count = self._sink(bytes(left))
            except Exception:
                count = 0
            if count > 0:
                left, wait_s = left[count:], _RETRY_S[0]
                continue
            with self._changed:
                if self._ending or self._changed.wait_for(lambda: self._ending, wait_s):
                    return False
            wait_s = min(2 * wait_s, _RETRY_S[1])
        return True


def _lost(lines: int) -> bytes:
    at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    said = {"event": "log lines were lost", "level": "error", "at": at, "lines": lines}
    return json.dumps(said).encode() + b"\n"


def _sink_of(file: TextIO) -> Callable[[bytes], int]:
    try:
        descriptor = file.fileno()
    except (OSError, ValueError, io.UnsupportedOperation):  # a file in memory

        def write(data: bytes) -> int:
            file.write(data.decode(errors="replace"))
            file.flush()
            return len(data)

        return write
    return lambda data: os.write(descriptor, data)


_writers: list[LineWriter] = []


def lost_lines() -> int:
    """Log lines of this process that could not be written."""
    return sum(writer.lost for writer in _writers)


def flush(timeout_s: float = FLUSH_S) -> None:
    """Wait until the lines so far are written, at most so long: before a process ends by other ways than an exit."""
    for writer in _writers:
        writer.drain(timeout_s)


atexit.register(flush)


def configure_logging(level: str = "info") -> None:
    """Once, at the start of a process. Raises ValueError for an unknown level."""
    if level.lower() not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, not {level!r}")
    number = getattr(logging, level.upper())
    writer = LineWriter(_sink_of(sys.stderr))
    while _writers:
        _writers.pop().close()
    _writers.append(writer)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    structlog.configure(
        processors=[Folding(), *shared, _rendered],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, writer)),
        cache_logger_on_first_use=True,
    )
    _catch_libraries(shared, number, writer)


class Folding:
    """Lets a warning or an error that repeats itself through once a minute, with the number of those left out.

    What is tried again five times a second while ZooKeeper is away would fill a disk, and says nothing new. Lines are
    the same when all their keys are; in `error`, numbers do not count. The last MAX_FOLDED kinds of lines are known.
    """

    def __init__(self, every_s: float = FOLD_S, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._every_s = every_s
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._seen: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def __call__(self, _logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Raises structlog.DropEvent for a line that is left out."""
        if method not in ("warning", "error"):
            return line
        try:
            kept = {**line, "exc_info": "", "error": re.sub(r"[0-9.]+", "#", str(line.get("error", "")))}
            key = f"{method} {sorted((name, str(value)) for name, value in kept.items())}"
        except Exception:  # a value that cannot be told; whoever renders the line says so
            return line
        now_s = self._clock_s()
        with self._lock:
            told_s, left_out = self._seen.pop(key, (float("-inf"), 0))
            if now_s - told_s < self._every_s:
                self._seen[key] = (told_s, left_out + 1)
                raise structlog.DropEvent
            self._seen[key] = (now_s, 0)
            while len(self._seen) > MAX_FOLDED:
                self._seen.popitem(last=False)
        if left_out:
            line["repeated"] = left_out
        return line


_render = structlog.processors.JSONRenderer(default=str)


def _rendered(logger: Any, method: str, line: MutableMapping[str, Any]) -> str:
    """Whatever is in a line, it costs at most the line."""
    try:
        return str(_render(logger, method, line))
    except Exception as error:
        return json.dumps({"event": str(line.get("event")), "level": method, "unspeakable": repr(error)})


def _catch_libraries(shared: list[structlog.typing.Processor], number: int, writer: LineWriter) -> None:
    """Lines that libraries write through `logging` come out in the same form."""
    handler = logging.StreamHandler(writer)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _name_of_logger],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _rendered,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(number, logging.WARNING))


def _name_of_logger(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    record = line.get("_record")
    if record is not None:
        line["logger"] = record.name
    return line


def about(**keys: Any) -> AbstractContextManager[None]:
    """Every line of this task inside the block carries these keys; empty ones are left out."""
    return structlog.contextvars.bound_contextvars(**{key: value for key, value in keys.items() if value})
