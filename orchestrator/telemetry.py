"""Logs as JSON lines on stderr, one per event, for API and agents.

    {"event": "attempt began", "level": "info", "at": "2026-03-01T12:00:00.123456Z", "guest": "db-1", "migration": ...}

What a task is about is bound once (`about(guest=..., migration=..., attempt=...)`) and stands in every line below it,
those of libraries included.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any

import structlog

LEVELS = ("debug", "info", "warning", "error")


def configure_logging(level: str = "info") -> None:
    """Once, at the start of a process. Raises ValueError for a level that there is not."""
    if level.lower() not in LEVELS:
        raise ValueError(f"log level must be one of {', '.join(LEVELS)}, not {level!r}")
    number = getattr(logging, level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer(default=str)],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    _catch_libraries(shared, number)


def _catch_libraries(shared: list[structlog.typing.Processor], number: int) -> None:
    """Lines that libraries write through `logging` come out in the same form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _name_of_logger],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(default=str),
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
