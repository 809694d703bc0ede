"""`drover guest edit`: a guest's file in an editor, and what comes of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from orchestrator.cli.context import Settings
from orchestrator.cli.exits import CliError, Exit, explain
from orchestrator.core.errors import DroverError, RefusalReason

if TYPE_CHECKING:
    from orchestrator.core.records import GuestSpec
    from orchestrator.rpc.messages import Guest
    from orchestrator.rpc.orchestrator_client import OrchestratorClient

_HEAD = """# Guest {name}, on {host}. Save and leave the editor to have it changed; leave it as it is to change nothing.
# {said}
"""
_NOW = "labels, policy and on_host_death hold at once; everything else can be changed while it is stopped and kept."
_STOPPED = "It is stopped: what is changed here holds from its next start."


def edit(settings: Settings, client: OrchestratorClient, name: str, file: str | None, *, validate_only: bool) -> None:
    """Raises CliError, and DroverError as the API does. A text that was not taken is kept."""
    from orchestrator import wire
    from orchestrator.cli.guest import spec_of

    before = client.get_guest(name)
    if file is not None:
        after = _change(client, before, spec_of(file, before.name), validate_only)
    else:
        edited = _in_editor(before)
        if edited is None:
            settings.printer.show(f"{before.name} is left as it is")
            return
        after = _change(client, before, spec_of(str(edited), before.name), validate_only, edited)
        edited.unlink(missing_ok=True)
    if settings.printer.machine:
        settings.printer.document(wire.to_json(after))
    elif validate_only:
        settings.printer.show(f"{after.name} could be changed so")
    else:
        when = "; it holds from its next start" if wire.word(after, "ownership") == "STOPPED" else ""
        settings.printer.show(f"{after.name} is changed{when}")


def _change(
    client: OrchestratorClient, before: Guest, spec: GuestSpec, validate_only: bool, kept: Path | None = None
) -> Guest:
    try:
        return client.edit_guest(before.uuid, spec, before.etag, validate_only=validate_only)
    except DroverError as error:
        told = explain(error)
        if kept is not None:
            told.hint = f"your text is kept: `drover guest edit {before.name} -f {kept}`"
            if error.reason is RefusalReason.EDIT_STALE:
                told.hint = f"your text is kept in {kept}: compare it with what `drover guest edit` shows now"
        raise told from None


def _in_editor(guest: Guest) -> Path | None:
    """The edited file; None: nothing was changed."""
    from orchestrator import wire
    from orchestrator.cli.guest_text import text_of

    stopped = wire.word(guest, "ownership") == "STOPPED"
    head = _HEAD.format(name=guest.name, host=guest.host, said=_STOPPED if stopped else _NOW)
    text = head + text_of(wire.guest_spec_from_proto(guest.spec))
    try:
        edited = click.edit(text, extension=".yaml")
    except click.ClickException as error:
        hint = "set $EDITOR, or use `-f FILE`"
        raise CliError(Exit.USAGE, error.format_message(), hint=hint) from None
    if edited is None or edited == text:
        return None
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"drover-{guest.name}-", suffix=".yaml", delete=False, encoding="utf-8"
    ) as kept:
        kept.write(edited)
    return Path(kept.name)
