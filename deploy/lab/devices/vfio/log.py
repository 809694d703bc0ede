"""What a VMM asked its devices, line by line: evidence for tests, and for whoever wonders what QEMU did.

Each line is a JSON object: `at_s` (the machine's monotonic clock), `device`, `call`, `asked`, `answer`, and `same`: how
many questions that were answered alike were left out before it. A VMM that waits for an ACK asks thousands of times a
second, so of the looks at a device that changed nothing only the first one is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

from deploy.lab.devices.vfio.endpoint import Entry

MAX_LINES = 20_000
_REPEATED = frozenset({"DATA_SIZE", "PRECOPY_INFO", "DMA_REPORT"})
"""And reads for which there is nothing."""


class Log:
    """Give it to endpoints as their `record`. `write` takes whole lines."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._lines = 0
        self._seen: dict[str, dict[str, Entry]] = {}
        """By device and call: the newest look, while nothing else was asked."""
        self._left_out: dict[str, int] = {}

    def __call__(self, entry: Entry) -> None:
        seen = self._seen.setdefault(entry.device, {})
        if entry.call in _REPEATED or entry.answer.get("errno") == "ENOMSG":
            known = seen.get(entry.call)
            seen[entry.call] = entry
            if known is not None and (known.asked, known.answer) == (entry.asked, entry.answer):
                self._left_out[entry.device] = self._left_out.get(entry.device, 0) + 1
                return
        else:
            seen.clear()
        if self._lines < MAX_LINES:
            self._lines += 1
            content = asdict(entry) | {"at_s": round(entry.at_s, 6), "same": self._left_out.pop(entry.device, 0)}
            self._write(json.dumps(content) + "\n")
