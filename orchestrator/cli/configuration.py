"""`drover config`: the configuration files of agent, API and coordinator, judged and explained.

Each program brings its own by an entry point of the group `drover.config`, since this command line is a client of the
API and knows none of their code.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from orchestrator.cli.exits import CliError, Exit

if TYPE_CHECKING:
    from orchestrator.config import ConfigFile

ENTRY_POINTS = "drover.config"
PROGRAMS = ("agent", "api", "coordinator")

_program = click.option(
    "--for", "program", type=click.Choice(PROGRAMS), help="Whose file it is; left out: as the file is named."
)


@click.group()
def config() -> None:
    """Check and explain the configuration files of agent, API and coordinator (docs/configuration.md)."""


@config.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_program
def check(file: Path, program: str | None) -> None:
    """Say everything that is wrong with FILE, and what to write instead. Reads the file and nothing else.

    Exit code 0: it can be used, 2: it cannot.
    """
    _load(file, program)
    click.echo(f"{file}: fit for drover {program or file.stem}")


@config.command()
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@_program
@click.option("--defaults", is_flag=True, help="Every key with its default and what it means.")
@click.option(
    "-o", "--output", "form", type=click.Choice(["yaml", "json", "markdown"]), default="yaml", show_default=True
)
def show(file: Path | None, program: str | None, defaults: bool, form: str) -> None:
    """Show FILE with every default filled in; with --defaults what there is to configure.

    Without --for, --defaults shows the files of all three programs.
    """
    if defaults == (file is not None):
        raise CliError(Exit.USAGE, "name a file, or give --defaults")
    if file is not None:
        _show(*_load(file, program), form)
        return
    for number, each in enumerate([program] if program else PROGRAMS):
        if number and form != "json":
            click.echo()
        _show_defaults(_file_of(each), form)


def _show(kind: ConfigFile[Any], loaded: Any, form: str) -> None:
    tree = kind.tree(loaded)
    if form == "yaml":
        import yaml

        click.echo(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), nl=False)
    elif form == "json":
        click.echo(json.dumps(tree, indent=2, ensure_ascii=False))
    else:
        raise CliError(Exit.USAGE, "markdown is for --defaults")


def _show_defaults(kind: ConfigFile[Any], form: str) -> None:
    from orchestrator import config as configuration

    if form == "json":
        rows = [
            {"program": kind.program, "key": each.key, "takes": each.takes, "required": each.required}
            | {"default": each.default, "meaning": each.meaning}
            for each in kind.settings()
        ]
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        show = configuration.as_yaml if form == "yaml" else configuration.as_markdown
        click.echo(show(kind), nl=False)


def _load(file: Path, program: str | None) -> tuple[ConfigFile[Any], Any]:
    from orchestrator.config import ConfigError

    program = program or file.stem
    if program not in PROGRAMS:
        raise CliError(Exit.USAGE, f"whose file is {file}?", hint="say it with --for agent, api or coordinator")
    kind = _file_of(program)
    try:
        return kind, kind.load(file)
    except ConfigError as error:
        hint = f"`drover config show --defaults --for {program}` explains every key"
        raise CliError(
            Exit.USAGE, f"{file} cannot be used by drover {program}:", lines=error.problems, hint=hint
        ) from None


def _file_of(program: str) -> ConfigFile[Any]:
    found = next(iter(metadata.entry_points(group=ENTRY_POINTS, name=program)), None)
    if found is None:
        raise CliError(Exit.FAILED, f"the {program} is not installed here, nor what its file may hold")
    return cast("ConfigFile[Any]", found.load())
