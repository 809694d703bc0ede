"""Commands of `drover` whose code is heavy: the programs that run for ever, behind the one command line."""

from __future__ import annotations

import importlib
from typing import Any

import click


class LateCommand(click.Command):
    """Stands for `target` (module:attribute), whose module is imported when the command itself is called.

    `drover --help` and every other command do without it: no gRPC server, no kazoo, no Ray.
    """

    def __init__(self, name: str, target: str, *, short_help: str, section: str) -> None:
        super().__init__(name, short_help=short_help, help=short_help)
        self.section = section
        """Heading of `drover --help` that it is listed under."""
        self._target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Of the command that this one stands for. Raises ImportError when its code is not installed."""
        module, _, attribute = self._target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command.make_context(info_name, args, parent, **extra)
