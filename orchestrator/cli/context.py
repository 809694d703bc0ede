"""What every command has in common: options, the API's client, and finding what an argument means."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
from click.shell_completion import CompletionItem

from orchestrator.cli.directory import PACKAGED, api_sockets, default_dir
from orchestrator.cli.exits import CliError, Exit
from orchestrator.cli.output import Printer
from orchestrator.core.errors import DroverError, RefusalReason

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Evacuation, Migration
    from orchestrator.rpc.orchestrator_client import OrchestratorClient

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_TIMEOUT_S = 10.0
COMPLETION_TIMEOUT_S = 1.0


@dataclass
class Settings:
    """The common options of one call of `drover`."""

    api: str = ""
    directory: Path = field(default_factory=default_dir)
    tls: Path | None = None
    """Directory of the identity that the API at an address of TCP is shown."""
    output: str = "table"
    timeout_s: float = DEFAULT_TIMEOUT_S

    @property
    def address(self) -> str:
        """Of the API: --api, else $DROVER_API, else the local cluster's sockets, else that of this host's packages."""
        given = self.api or os.environ.get("DROVER_API", "")
        return given or ",".join(f"unix:{socket}" for socket in api_sockets(self.directory))

    @property
    def printer(self) -> Printer:
        """Where the command's result goes, in the form that was asked for."""
        return Printer(self.output)

    def client(self, timeout_s: float = 0.0) -> OrchestratorClient:
        """A client of the API; a context manager."""
        self._check_socket()
        from orchestrator.pki.files import PkiError
        from orchestrator.rpc.orchestrator_client import OrchestratorClient

        named = self.tls or os.environ.get("DROVER_TLS") or None
        try:
            return OrchestratorClient(self.address, timeout_s or self.timeout_s, Path(named) if named else None)
        except PkiError as error:
            raise CliError(Exit.USAGE, str(error)) from error

    def _check_socket(self) -> None:
        """A missing socket is known at once, and which remedy there is."""
        paths = [each.removeprefix("unix:") for each in self.address.split(",unix:")]
        if not self.address.startswith("unix:") or any(Path(path).exists() for path in paths):
            return
        path = paths[0]
        if path == f"{PACKAGED}":
            raise CliError(
                Exit.UNREACHABLE,
                f"the API of this host does not listen on {path}",
                hint="`systemctl status drover-api` says why; while it restarts, repeat the command",
            )
        raise CliError(
            Exit.UNREACHABLE,
            f"no API listens on {path}: no local cluster runs there",
            hint="`drover up` starts one, --dir or DROVER_DIR names another, --api or DROVER_API another API",
        )


pass_settings = click.make_pass_decorator(Settings, ensure=True)


def _into(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """Keeps a common option's value in the settings; the innermost place where it is given wins."""

    def store(context: click.Context, _: click.Parameter, value: Any) -> None:
        settings = context.ensure_object(Settings)
        if value is not None:
            setattr(settings, name, value)

    return store


def api_option(command: F) -> F:
    """`--api`, into `Settings`."""
    return click.option(
        "--api",
        metavar="ADDRESS",
        expose_value=False,
        callback=_into("api"),
        help="The API: host:port or unix:PATH, or several with commas. Default: $DROVER_API, else the local cluster's.",
    )(command)


def tls_option(command: F) -> F:
    """`--tls`, into `Settings`."""
    return click.option(
        "--tls",
        metavar="DIRECTORY",
        type=click.Path(file_okay=False, path_type=Path),
        expose_value=False,
        callback=_into("tls"),
        help="Directory of the identity to show to an API at host:port.  Default: $DROVER_TLS, else none.",
    )(command)


def dir_option(command: F) -> F:
    """`--dir`, into `Settings`."""
    return click.option(
        "--dir",
        "directory",
        type=click.Path(file_okay=False, path_type=Path),
        expose_value=False,
        callback=_into("directory"),
        help="Directory of the local cluster. Default: $DROVER_DIR, else ~/.drover.",
    )(command)


def output_option(command: F) -> F:
    """`-o`, into `Settings`."""
    return click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "yaml"]),
        expose_value=False,
        callback=_into("output"),
        help="Form of the result.  [default: table]",
    )(command)


def timeout_option(command: F) -> F:
    """`--timeout`, into `Settings`: seconds for each call to the API, not for the command."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(min=0, min_open=True, max=3600),
        metavar="SECONDS",
        expose_value=False,
        callback=_into("timeout_s"),
        help=f"How long one call to the API may take.  [default: {DEFAULT_TIMEOUT_S:.0f}]",
    )(command)


def remote(command: F) -> F:
    """Options of a command that asks the API."""
    return output_option(api_option(tls_option(dir_option(timeout_option(command)))))


def local(command: F) -> F:
    """Options of a command about the local cluster."""
    return output_option(dir_option(command))


def list_options(command: F) -> F:
    """Options of every list."""
    for option in (
        click.option("--order-by", default="", metavar="FIELDS", help="Such as 'host, memory_mib desc'."),
        click.option("--filter", default="", metavar="FILTER", help="Such as 'labels.tier = web AND host = host-*'."),
    ):
        command = option(command)
    return command


def request_id_option(command: F) -> F:
    """`--request-id`, for commands that create something."""
    return click.option(
        "--request-id",
        metavar="ID",
        help="Makes the command repeat-safe: the same id and request is the same resource.  [default: a new one]",
    )(command)


# --- what an argument means -------------------------------------------------------------------------------------------


def pick(wanted: str, known: Sequence[str], what: str) -> str:
    """The one id that begins with `wanted`. Raises CliError: none (3), or several (2)."""
    if wanted in known:
        return wanted
    found = sorted(one for one in known if one.startswith(wanted.lower()))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CliError(Exit.NOT_FOUND, f"no {what} begins with {wanted!r}", hint=f"`drover {what} list` shows them")
    some = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    raise CliError(Exit.USAGE, f"{wanted!r} begins the id of {len(found)} {what}s ({some}): write more of it")


def find_migration(client: OrchestratorClient, wanted: str) -> Migration:
    """By id, or by a beginning of it that only one migration has."""
    past = partial(_forgotten, client, "migrations")
    return _find(wanted, client.get_migration, client.list_migrations, "migration", past)


def find_evacuation(client: OrchestratorClient, wanted: str) -> Evacuation:
    """By id, or by a beginning of it that only one evacuation has."""
    return _find(wanted, client.get_evacuation, client.list_evacuations, "evacuation")


_ID = re.compile(r"[A-Za-z0-9._-]+")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_Named)


_SEVERAL = 5
"""So many ids with the same beginning are asked for, to name a few of them."""


def _find(
    wanted: str,
    get: Callable[[str], Named],
    known: Callable[..., Sequence[Named]],
    what: str,
    past: Callable[[str], list[str]] = lambda _: [],
) -> Named:
    """The whole id costs one call, a beginning of it two, however many there are."""
    try:
        return get(wanted)
    except DroverError as error:
        if error.reason is not RefusalReason.NOT_FOUND:
            raise
    if not _ID.fullmatch(wanted):
        raise CliError(Exit.NOT_FOUND, f"no {what} begins with {wanted!r}", hint=f"`drover {what} list` shows them")
    found = [each.name for each in known(filter=f'name = "{wanted.lower()}*"', limit=_SEVERAL)]
    return get(pick(wanted, found or past(wanted.lower()), what))


def _forgotten(client: OrchestratorClient, kind: str, wanted: str) -> list[str]:
    """Names in the history; none where no history is kept."""
    try:
        found = (entry.name for entry in client.export_history(kind, wanted))
        return list(islice(dict.fromkeys(found), _SEVERAL))
    except DroverError as error:
        if error.reason is not RefusalReason.NO_HISTORY:
            raise
        return []


# --- completion -------------------------------------------------------------------------------------------------------

_Names = Callable[["OrchestratorClient"], Iterable[str]]


def _completer(names: _Names) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """Names that the API knows; none when it does not answer at once: a completion must not complain."""

    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        settings = context.find_object(Settings) or Settings()
        try:
            with settings.client(timeout_s=COMPLETION_TIMEOUT_S) as client:
                return [CompletionItem(name) for name in names(client) if name.startswith(incomplete)]
        except Exception:
            return []

    return complete


COMPLETIONS = 500

complete_host = _completer(lambda client: [each.name for each in client.list_hosts(limit=COMPLETIONS)])
complete_guest = _completer(lambda client: [each.name for each in client.list_guests(limit=COMPLETIONS)])
complete_migration = _completer(lambda client: [each.name for each in client.list_migrations(limit=COMPLETIONS)])
complete_evacuation = _completer(lambda client: [each.name for each in client.list_evacuations(limit=COMPLETIONS)])
