"""`drover`: the command line. Each group of commands has a file of its own; what is heavy is imported when needed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

import click

from orchestrator.cli import (
    adopting,
    configuration,
    enrolling,
    evacuation,
    events,
    explain,
    guest,
    health,
    history,
    host,
    image,
    importing,
    ledger,
    migration,
    pki,
    repair,
)
from orchestrator.cli.context import api_option, dir_option
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.exits import explain as told
from orchestrator.cli.plugins import OpenGroup
from orchestrator.core.errors import DroverError
from orchestrator.core.text import visible

NAME = "drover"


class _Root(OpenGroup):
    """Commands under headings, in the order in which they are needed; those of other packages come last."""

    sections = (
        ("Hosts and guests", ("host", "guest", "image", "import", "health", "events", "ledger")),
        ("Moving guests", ("migrate", "migration", "explain", "evacuate", "evacuation")),
        ("Services", ("agent", "api", "coordinator", "config", "doctor", "pki")),
    )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        places = {name: title for title, names in self.sections for name in names}
        rows: dict[str, list[tuple[str, str]]] = {title: [] for title, _ in self.sections}
        for name in dict.fromkeys([*places, *self.list_commands(ctx)]):
            command = self.get_command(ctx, name)
            if command is None or command.hidden:
                continue
            title = places.get(name) or getattr(command, "section", "More")
            rows.setdefault(title, []).append((name, command.get_short_help_str(80)))
        for title, found in rows.items():
            if found:
                with formatter.section(title):
                    formatter.write_dl(found, col_max=12)


@click.group(cls=_Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@api_option
@dir_option
@click.version_option(package_name="drover", prog_name=NAME)
def root() -> None:
    """Move running guests between hosts, and never run one twice or lose one.

    Exit codes: 0 done, 1 ended badly, 2 wrong input, 3 not found, 4 refused in the present state, 5 no answer,
    6 cancelled, 130 Ctrl-C (docs/cli.md).
    """


for command in (
    host.host,
    guest.guest,
    image.image,
    importing.import_,
    migration.migrate,
    migration.migration,
    explain.explain,
    evacuation.evacuate,
    evacuation.evacuation,
    repair.repair,
    health.health,
    history.history,
    ledger.ledger,
    events.events,
    pki.pki,
    configuration.config,
):
    root.add_command(command)
for command in (adopting.adopt, adopting.release):
    guest.guest.add_command(command)
host.host.add_command(enrolling.enroll)


def run(arguments: Sequence[str]) -> int:
    """One call of `drover`; its exit code. Everything that goes wrong is one sentence on stderr."""
    try:
        code = root.main(args=list(arguments), prog_name=NAME, standalone_mode=False)
    except Ended as ended:
        return ended.code
    except CliError as error:
        return _complain(error)
    except DroverError as error:
        return _complain(told(error))
    except click.exceptions.NoArgsIsHelpError as error:
        sys.stderr.write(f"{error.format_message()}\n")
        return Exit.USAGE
    except click.ClickException as error:
        return _complain(_usage(error))
    except (click.Abort, KeyboardInterrupt):
        sys.stderr.write("\n")
        return Exit.INTERRUPTED
    except BrokenPipeError:
        return _pipe_closed()
    return code if isinstance(code, int) else Exit.OK


def _usage(error: click.ClickException) -> CliError:
    """What is wrong with the command line, and where to read on."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    message = error.format_message()
    hint = f"`{context.command_path} --help` tells more" if context else ""
    return CliError(Exit.USAGE, f"{message[:1].lower()}{message[1:]}".rstrip("."), hint=hint)


def _complain(error: CliError) -> int:
    hint = f"\n  {error.hint}" if error.hint else ""
    lines = "".join(f"\n  {line}" for line in error.lines)
    sys.stderr.write(visible(f"{NAME}: {error.message}{lines}{hint}\n"))
    return error.code


def _pipe_closed() -> int:
    """The reader, such as `head`, has seen enough. What is still in the buffer must not raise once more at exit."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Exit.FAILED


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
