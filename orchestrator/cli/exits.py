"""How a command ends: exit codes that scripts can tell apart (docs/cli.md), and one sentence about what went wrong."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from orchestrator.core.errors import DroverError, RefusalReason


class Exit(IntEnum):
    """Exit codes of `drover`."""

    OK = 0
    FAILED = 1
    """The operation ended badly: a migration FAILED, an evacuation left guests, a check found something wrong."""
    USAGE = 2
    """The command line, a guest file or a request is wrong."""
    NOT_FOUND = 3
    REFUSED = 4
    """Not in the present state: the guest is migrating, the host is cordoned, there is no room, ..."""
    UNREACHABLE = 5
    """No answer in time. What a changing call did is then not known, and is said to be so."""
    CANCELLED = 6
    """The migration or evacuation that was waited for was cancelled."""
    INTERRUPTED = 130


class CliError(Exception):
    """Ends the command with this sentence on stderr. `lines` follow it, one each: the single things that are wrong.
    `reason` is that of the API, if it was the API that refused."""

    def __init__(
        self,
        code: Exit,
        message: str,
        *,
        lines: Sequence[str] = (),
        hint: str = "",
        reason: RefusalReason | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.lines = tuple(lines)
        self.hint = hint
        self.reason = reason


class Ended(Exception):
    """The command is over, everything is said, this is its exit code."""

    def __init__(self, code: Exit) -> None:
        super().__init__(code)
        self.code = code


_CODES = {
    RefusalReason.INVALID_ARGUMENT: Exit.USAGE,
    RefusalReason.DEADLINE_REQUIRED: Exit.USAGE,
    RefusalReason.REQUEST_ID_REUSED: Exit.USAGE,
    RefusalReason.NOT_FOUND: Exit.NOT_FOUND,
    RefusalReason.OUTCOME_UNKNOWN: Exit.UNREACHABLE,
    RefusalReason.LEDGER_UNREACHABLE: Exit.UNREACHABLE,
    RefusalReason.AGENT_UNREACHABLE: Exit.UNREACHABLE,
    RefusalReason.API_UNREACHABLE: Exit.UNREACHABLE,
    RefusalReason.INTERNAL: Exit.FAILED,
}
"""Every other reason is a refusal in the present state."""

_HINTS = {
    RefusalReason.API_UNREACHABLE: "`drover up` starts a local cluster, `drover status` shows it, --api or DROVER_API "
    "names another API",
    RefusalReason.AGENT_UNREACHABLE: "`drover host list` shows which agents are alive",
    RefusalReason.LEDGER_UNREACHABLE: "the API has lost ZooKeeper; try again when it is back",
    RefusalReason.OUTCOME_UNKNOWN: "look at the resource before you repeat the command",
    RefusalReason.GUEST_IS_MIGRATING: "`drover migration list --active` shows its migration; wait for it or cancel it",
    RefusalReason.DISPLAY_NOT_AVAILABLE: "`drover guest edit` changes a guest that was stopped with --keep",
    RefusalReason.GUEST_NOT_RUNNING: "`drover guest show` says how it is",
    RefusalReason.HOST_CORDONED: "`drover host uncordon` makes it eligible again",
    RefusalReason.HOST_NOT_LIVE: "`drover host list` shows which agents are alive",
    RefusalReason.NO_CAPACITY: "`drover host list` shows the free memory",
    RefusalReason.ALREADY_COMMITTED: "it cannot be cancelled any more: the guest belongs to the destination",
    RefusalReason.IMAGE_NOT_FOUND: "put it into the `images` directory of that host's agent, or name another --host",
    RefusalReason.INSTRUCTIONS_DISABLED: "`instructions` in the configuration of API and agents allows them",
    RefusalReason.REQUEST_ID_REUSED: "use a new --request-id for another request",
    RefusalReason.HOST_ALIVE: "a host that lives is cordoned and evacuated; `drover host show` says how it is",
    RefusalReason.FENCER_REQUIRED: "configure one (docs/fencing.md), or see that its power is off and say --i-am-sure",
    RefusalReason.NOT_FENCED: "nothing was changed; mend the fencer and repeat, or see that the power is off yourself",
    RefusalReason.CONFIRMATION_STALE: "run it without --confirm and look at what it says now",
    RefusalReason.HOST_NOT_EMPTY: "`drover guest list --host` shows what is recorded there",
    RefusalReason.INTERNAL: "the log of the API has the details",
}


def code_of(reason: RefusalReason) -> Exit:
    """The exit code of a command that was refused for this reason."""
    return _CODES.get(reason, Exit.REFUSED)


def explain(error: DroverError) -> CliError:
    """The refusal as it is said to a person; several wrong fields come one per line."""
    hint = _HINTS.get(error.reason, "")
    if len(error.violations) > 1:
        lines = [f"{field}: {message}" if field else message for field, message in error.violations]
        said = f"{len(lines)} fields are wrong [{error.reason}]"
        return CliError(code_of(error.reason), said, lines=lines, hint=hint, reason=error.reason)
    # Only of wrong input a person wants to know which field it was.
    field = f"{error.field}: " if error.field and error.reason is RefusalReason.INVALID_ARGUMENT else ""
    said = f"{field}{' '.join(error.message.split())} [{error.reason}]"
    return CliError(code_of(error.reason), said, hint=hint, reason=error.reason)
