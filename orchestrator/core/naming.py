"""PURE. What names of things may look like, and what is said of those that may not."""

from __future__ import annotations

import re

from orchestrator.core.text import quoted

_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
MOVED_AWAY = re.compile(r".+\.moved-[0-9a-f]{8}")
"""Names of images whose guests have moved away: they are removed after a time."""
_WORDS = "must be lower-case letters, digits and hyphens, 1 to 63 of them, with a letter or digit at both ends"


def name_error(name: str) -> str:
    """What is wrong with the name of a guest, host, device, pool or network; empty when nothing is."""
    return "" if _DNS_LABEL.fullmatch(name) else f"{_WORDS}, not {quoted(name)}"


def file_error(name: str, where: str) -> str:
    """What is wrong with the name of a file in a directory of a host's (`where`); empty when nothing is.

    Such a name never leads out of the directory.
    """
    if _FILE.fullmatch(name):
        return ""
    said = f"must be the name, not a path, of a file in {where}: 1 to 128 letters, digits and '.', '_', '+', '-', the"
    return f"{said} first a letter or digit; not {quoted(name)}"
