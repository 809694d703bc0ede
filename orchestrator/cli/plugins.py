"""Commands that other packages add to `drover`, by entry points of the group `drover.commands`.

An entry point's name is the command's place: `up` for `drover up`, `host.power-cycle` for `drover host power-cycle`.
Its value is a click command; one with an attribute `section` is listed under that heading. A command of our own needs
no look at what is installed, so only `--help`, completion and the added commands themselves pay for it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import click

from orchestrator.cli.exits import CliError, Exit

ENTRY_POINTS = "drover.commands"
NONE_HINT = (
    "no installed package adds commands; those of a cluster on this machine (up, down, status, demo, ...) come with "
    "deploy/lab: `make venv` in a checkout installs them"
)


@functools.cache
def offered() -> Mapping[str, metadata.EntryPoint]:
    """What the installed packages add, by place. Empty for an installation that knows of none."""
    return {each.name: each for each in metadata.entry_points(group=ENTRY_POINTS)}


class OpenGroup(click.Group):
    """A group of commands that other packages may add to. On a clash of names ours wins."""

    prefix = ""
    """Of the places that belong here: `host.` for `drover host`, nothing for `drover` itself."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Our own in their order, then those of other packages by name. Loads none of them."""
        added = {
            place.removeprefix(self.prefix)
            for place in offered()
            if place.startswith(self.prefix) and "." not in place.removeprefix(self.prefix)
        }
        own = super().list_commands(ctx)
        return [*own, *sorted(added.difference(own))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Ours, else the one that a package offers under this name, loaded now."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        entry = None if "." in cmd_name else offered().get(f"{self.prefix}{cmd_name}")
        return _load(entry, cmd_name) if entry else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Raises CliError(USAGE) for an unknown command, with a hint if no package adds any."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if offered():
                raise
            said = error.format_message().rstrip(".")
            raise CliError(Exit.USAGE, f"{said[:1].lower()}{said[1:]}", hint=NONE_HINT) from None


def open_group(prefix: str) -> type[OpenGroup]:
    """The class of a group `drover PREFIX`."""
    return type("OpenGroup", (OpenGroup,), {"prefix": f"{prefix}."})


def _load(entry: metadata.EntryPoint, name: str) -> click.Command:
    """The command, or one that says why there is none: a broken package must not break `drover --help`."""
    try:
        found: Any = entry.load()
    except Exception as error:
        return _Missing(entry, name, f"{type(error).__name__}: {error}", hidden=isinstance(error, ModuleNotFoundError))
    if not isinstance(found, click.Command):
        return _Missing(entry, name, "it is no click command", hidden=False)
    return found


class _Missing(click.Command):
    """Stands where a command would be that an installed package promises. Hidden when its code is not there at all."""

    def __init__(self, entry: metadata.EntryPoint, name: str, why: str, *, hidden: bool) -> None:
        super().__init__(
            name,
            short_help=f"Cannot be loaded from {entry.value}.",
            hidden=hidden,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        self._said = f"the command {name} cannot be loaded from {entry.value}: {why}"

    def invoke(self, ctx: click.Context) -> None:
        raise CliError(Exit.FAILED, self._said, hint="install the package that it comes from again (`make venv`)")
