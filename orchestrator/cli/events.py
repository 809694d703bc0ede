"""`drover events`: what operators want to be woken for, as lines, and to a webhook."""

from __future__ import annotations

import json
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from orchestrator.cli.context import Settings, pass_settings, remote
from orchestrator.cli.exits import CliError, Ended, Exit
from orchestrator.cli.output import note
from orchestrator.core.errors import DroverError
from orchestrator.core.events import Event, Observer

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Evacuation, Guest, Migration
    from orchestrator.rpc.orchestrator_client import OrchestratorClient

LOOK_S = 5.0
"""Hosts and who leads are asked for this often; everything else is watched."""
AGAIN_S = 2.0
QUEUED = 10_000
"""Sightings that wait; beyond that the watches wait, and the API begins them anew."""
POST_S = 10.0
TRIES = 5
FIRST_WAIT_S = 1.0

Sighting = Callable[[Observer], list[Event]]


@click.command(short_help="Tell what an operator wants to be woken for, as it happens.")
@click.option("--webhook", metavar="URL", help="POST each event there as JSON as well; tried five times.")
@click.option("--once", is_flag=True, help="Tell what is wrong now, and end. Exit code 1: something is.")
@remote
@pass_settings
def events(settings: Settings, webhook: str | None, once: bool) -> None:
    """Tell of guests that crash, hosts that fall silent, jobs that fail for good, and a control plane that is not well.

    Begins with what is wrong now, so that a reader which was away has missed nothing that still matters. Each line, and
    what a webhook gets, has kind, severity (page, ticket, info), subject, message and time; -o json: one document per
    line. Goes on until Ctrl-C, also while no API answers.
    """
    if webhook is not None and not webhook.startswith(("http://", "https://")):
        raise CliError(Exit.USAGE, f"{webhook!r} is no http:// or https:// address")
    found = 0
    for event in _present(settings) if once else _seen(settings):
        found += event.severity != "info"
        document = _document(event)
        if settings.printer.machine:
            settings.printer.stream(document)
        else:
            what = f"{event.severity:6}  {event.kind}  {event.subject}: {event.message}"
            settings.printer.show(f"{document['time']}  {what}")
        if webhook is not None and not posted(webhook, document):
            note(f"the webhook did not take {event.kind} of {event.subject} in {TRIES} tries: it is dropped")
    if once and found:
        raise Ended(Exit.FAILED)


def _document(event: Event) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "kind": event.kind.value,
        "severity": event.severity,
        "subject": event.subject,
        "message": event.message,
        "time": now,
    }


def posted(url: str, document: dict[str, Any], sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether the webhook took it, within TRIES tries that are ever further apart. One that says that the request is
    wrong (4xx, but for 408 and 429) is not asked again."""
    request = urllib.request.Request(
        url, json.dumps(document).encode(), {"Content-Type": "application/json", "User-Agent": "drover"}, method="POST"
    )
    for attempt in range(TRIES):
        if attempt:
            sleep(FIRST_WAIT_S * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=POST_S):
                return True
        except urllib.error.HTTPError as error:
            if 400 <= error.code < 500 and error.code not in (408, 429):
                return False
        except (OSError, ValueError):
            continue
    return False


# --- what is seen -----------------------------------------------------------------------------------------------------


def _present(settings: Settings) -> Iterator[Event]:
    """One look at everything that lasts."""
    observer = Observer()
    with settings.client() as client:
        crashed = client.list_guests(filter="ownership = CRASHED")
        for sighting in (*_looked(client), *map(_guest, crashed)):
            yield from sighting(observer)


def _seen(settings: Settings) -> Iterator[Event]:
    """For ever. Each source has a thread of its own, which ends with the process."""
    sightings: queue.Queue[Sighting] = queue.Queue(QUEUED)
    for source in (_hosts, _guests, _migrations, _evacuations):
        threading.Thread(target=_follow, args=(settings, source, sightings), daemon=True).start()
    observer = Observer()
    while True:
        yield from sightings.get()(observer)


def _follow(
    settings: Settings, source: Callable[[OrchestratorClient], Iterator[Sighting]], into: queue.Queue[Sighting]
) -> None:
    while True:
        try:
            with settings.client() as client:
                for sighting in source(client):
                    into.put(sighting)
        except (DroverError, CliError) as error:
            if source is _hosts:  # one of them says that the API is away
                into.put(_away(str(error)))
        time.sleep(AGAIN_S)


def _away(why: str) -> Sighting:
    return lambda observer: observer.away(why)


def _looked(client: OrchestratorClient) -> list[Sighting]:
    from orchestrator import wire

    hosts = {each.name: wire.word(each, "state") == "SILENT" for each in client.list_hosts()}
    health = client.get_cluster_health()
    quarantined = {each.resource: each.reason for each in health.quarantined}
    leader = health.leader
    return [lambda seen: seen.back(), lambda seen: seen.hosts(hosts), lambda seen: seen.health(leader, quarantined)]


def _hosts(client: OrchestratorClient) -> Iterator[Sighting]:
    while True:
        yield from _looked(client)
        time.sleep(LOOK_S)


def _guests(client: OrchestratorClient) -> Iterator[Sighting]:
    for each in client.watch_guests():
        yield _guest(each)


def _guest(each: Guest) -> Sighting:
    from orchestrator import wire

    ownership = wire.word(each, "ownership")
    return lambda seen: seen.guest(each.uuid, each.name, ownership, each.host, each.message)


def _migrations(client: OrchestratorClient) -> Iterator[Sighting]:
    for each in client.watch_migrations():
        yield _migration(each)


def _migration(each: Migration) -> Sighting:
    from orchestrator import wire

    phase = wire.word(each, "phase")
    return lambda seen: seen.migration(each.name, each.guest, phase, each.failure, each.message)


def _evacuations(client: OrchestratorClient) -> Iterator[Sighting]:
    for each in client.watch_evacuations():
        yield _evacuation(each)


def _evacuation(each: Evacuation) -> Sighting:
    from orchestrator import wire

    blocked = {one.guest: one.message or one.failure for one in each.guests if one.failure}
    phase = wire.word(each, "phase")
    return lambda seen: seen.evacuation(each.name, each.host, phase, each.failure, each.message, blocked)
