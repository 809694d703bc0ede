"""Images that were made for a guest that does not run yet: they go with it when its birth fails, however that ends.

A note in the guest's directory names them before they are there, and is gone, durably, before the ledger may say that
the guest runs: an image that it names has never been a running guest's. For a disk that is added to a guest that runs
it is gone before anything says that the guest has the disk, and with the VMM at the latest. A name alone proves
nothing, so it says the inode too; and an image that somebody has open is left alone. Blocking.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from agents.host.byte_locks import is_locked
from orchestrator.whole import flush, write_whole

log = structlog.get_logger(__name__)

_LOCKS = (100, 200)
"""Start and length of the bytes that QEMU locks in an image while it has it open."""


@dataclass(frozen=True, slots=True)
class Made:
    """One image, and the name under which it was made first."""

    path: str
    fresh: str
    inode: int = 0
    """0: it has only its first name."""


class Births:
    """Of one guest, whose directory it is."""

    def __init__(self, directory: Path) -> None:
        self._note = directory / "birth.images"
        self.before = directory / "birth.before"
        """What a guest that is started again ran with. It goes once the guest runs; a start that failed leaves it."""

    def begins(self, path: Path, fresh: Path) -> None:
        """An image for `path` is about to be made as `fresh`. Raises OSError; nothing was noted then."""
        self._write([*self._noted(), Made(str(path), str(fresh))])

    def made(self, path: Path, fresh: Path) -> None:
        """It is about to get its own name. Raises OSError."""
        inode = fresh.stat().st_ino
        self._write([replace(each, inode=inode) if each.path == str(path) else each for each in self._noted()])

    def succeeded(self) -> None:
        """The guest is about to be said to run: its images are its own. Durable. Idempotent. Raises OSError."""
        for note in (self.before, self._note):
            with contextlib.suppress(FileNotFoundError):
                note.unlink()
                flush(note.parent)

    def failed(self) -> None:
        """Remove what was made. Idempotent. Raises OSError when something is left; to be repeated then."""
        noted = self._noted()
        for each in noted:
            Path(each.fresh).unlink(missing_ok=True)
            path = Path(each.path)
            with contextlib.suppress(FileNotFoundError):
                if path.lstat().st_ino != each.inode:
                    continue
                if _is_open(path):
                    log.error("an image of a guest that was not born is open: it is left", image=each.path)
                    continue
                path.unlink()
        if noted:
            self._note.unlink(missing_ok=True)

    def _noted(self) -> list[Made]:
        try:
            return [Made(**each) for each in json.loads(self._note.read_bytes())]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError) as error:  # nothing is removed on the word of half a note
            log.error("the note of a birth cannot be read: its images are left", note=str(self._note), error=str(error))
            return []

    def _write(self, made: list[Made]) -> None:
        write_whole(self._note, json.dumps([asdict(each) for each in made]).encode())


def _is_open(path: Path) -> bool:
    """Whether a VMM, or a tool of QEMU, has the image open. Raises OSError."""
    with path.open("rb") as file:
        return is_locked(file.fileno(), *_LOCKS)
