"""`drover ledger export` and `verify`: the ledger into a file, and what such a file is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import clip
from orchestrator.ledger import backup, paths
from orchestrator.ledger.backup import SHOWN, Backup, BadBackup
from orchestrator.ledger.layout import WrongLayout
from orchestrator.ledger.records import BadRecord
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.pki.files import PkiError
from orchestrator.restore.access import Where, opened
from orchestrator.restore.importing import Import, Outcome
from orchestrator.rpc.agent_client import AgentClients
from orchestrator.rpc.credentials import credentials_of


@dataclass(frozen=True, slots=True)
class Looked:
    """What is in a file."""

    held: Backup | None
    """None: it cannot be read at all."""
    problems: tuple[str, ...] = ()
    """What keeps it from being imported, or would be lost; none for a good one."""

    def document(self) -> dict[str, Any]:
        """For programs."""
        return {**self._counts(), "problems": [clip(each) for each in self.problems]}

    def _counts(self) -> dict[str, Any]:
        held = self.held
        if held is None:
            return {}
        return {
            "nodes": len(held.nodes),
            "guests": _members(held, paths.GUESTS),
            "hosts": _members(held, paths.HOSTS, depth=2),
            "migrations": _members(held, paths.MIGRATIONS),
            "snapshot": held.snapshot,
            "incarnation": held.incarnation,
            "sha256": held.digest,
        }

    def said(self, file: Path) -> str:
        """For people."""
        if self.held is None:
            return f"{file} is no usable backup of a ledger"
        counts = self._counts()
        what = f"{counts['nodes']} nodes, {counts['guests']} guests, {counts['hosts']} hosts"
        how = "of one instant" if self.held.snapshot else "not of one instant: the ledger moved all the time"
        return f"{file}: {what}, {how}" + (f"; {len(self.problems)} problems" if self.problems else "")

    def shown(self) -> list[str]:
        """The first few of what is wrong."""
        more = len(self.problems) - SHOWN
        return [*map(clip, self.problems[:SHOWN]), *([f"and {more} more"] if more > 0 else [])]


def _members(held: Backup, root: str, depth: int = 3) -> int:
    return sum(1 for path, _ in held.of(root) if path.count("/") == depth)


async def export(where: Where, file: Path, *, time_s: float) -> Looked:
    """Write the ledger into `file`, and read that again. Raises LEDGER_UNREACHABLE, INTERNAL when the ledger or the
    file cannot be used; `file` is as it was then."""
    async with opened(where) as store:
        try:
            held = await backup.take(store, time_s=time_s)
        except StoreUnavailable as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, f"the ledger was not exported: {error}") from error
        except (WrongLayout, BadRecord, BadBackup) as error:
            raise DroverError(RefusalReason.INTERNAL, f"the ledger was not exported: {error}") from error
    try:
        backup.write(held, file)
    except OSError as error:
        raise DroverError(RefusalReason.INTERNAL, f"the ledger was not exported: {error}") from error
    return verify(file)


async def bring_back(where: Where, file: Path, *, dead: Sequence[str], token: str, time_s: float) -> Outcome:
    """What an import of `file` would do; with the `token` of that, it is done. Raises as `Import` does, and
    INVALID_ARGUMENT for a file that cannot be imported."""
    looked = verify(file)
    if looked.held is None or looked.problems:
        said = f"{file} cannot be imported: {'; '.join(looked.shown())}"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="file")
    try:
        agents = AgentClients(credentials_of(where.tls))
    except PkiError as error:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, str(error), field="tls") from error
    try:
        async with opened(where) as store:
            run = Import(store, agents, looked.held, dead=dead, time_s=time_s)
            outcome = await run.look()
            if token:
                await run.carry_out(outcome, token)
            return outcome
    finally:
        await agents.close()


def lines(outcome: Outcome) -> list[str]:
    """An import for people."""
    said = [f"hosts: {', '.join(host.host.host for host in outcome.asked.heard) or 'none'}"]
    for one in outcome.plan.found:
        where = f" on {one.where}" if one.where else ""
        said.append(f"{one.name}: {one.fate}{where}" + (f" ({one.why})" if one.why else ""))
    if outcome.incarnation:
        said.append(f"done: the ledger is incarnation {outcome.incarnation}; start a coordinator and the APIs")
    else:
        said.append(f"nothing was done: repeat with --confirm {outcome.token}")
    return said


def verify(file: Path) -> Looked:
    """What `file` is. Raises nothing for a bad one: that is the answer. Raises INVALID_ARGUMENT when it cannot be
    opened."""
    try:
        held = backup.read(file)
    except BadBackup as error:
        return Looked(None, tuple(error.problems))
    except OSError as error:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, f"{file} cannot be read: {error}", field="file") from error
    return Looked(held, tuple(backup.problems(held)))
