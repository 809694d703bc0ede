"""The four lists: what each of them can be filtered and ordered by, and where its rows come from (docs/lists.md).

Rows are in memory (`ledger.index`, `ledger.table`); the ledger is read only for what a page shows and memory has not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from orchestrator.api import decisions, views
from orchestrator.api.calls import Tools
from orchestrator.api.listing import MAX_PAGE, BadList, Field, Kind, Listing, Page, Standing
from orchestrator.api.reads import (
    EvacuationRead,
    GuestRead,
    MigrationRead,
    guest_uuid,
    not_found,
    quarantined,
    read_evacuation,
    read_migration,
)
from orchestrator.api.unreadable import Unreadable
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.placement import HostView
from orchestrator.fleet import Fleet
from orchestrator.ledger import paths, rows
from orchestrator.ledger.rows import EvacuationRow, MigrationRow
from orchestrator.ledger.snapshot import GuestEntry
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2

T = TypeVar("T")

_REMEMBERED = 2 * MAX_PAGE


class _Asked(Protocol):
    """The fields that every list request has."""

    filter: str
    order_by: str
    page_size: int
    page_token: str


@dataclass(frozen=True, slots=True)
class HostRow:
    """One host as a placement sees it."""

    name: str
    view: HostView
    guests: int


HOSTS = Listing[HostRow](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "live": Field(Kind.BOOL, lambda row: row.view.live),
        "cordoned": Field(Kind.BOOL, lambda row: row.view.cordoned),
        "memory_mib": Field(Kind.NUMBER, lambda row: row.view.memory_mib),
        "free_mib": Field(Kind.NUMBER, lambda row: row.view.free_mib),
        "guests": Field(Kind.NUMBER, lambda row: row.guests),
        "engine": Field(Kind.TEXT, lambda row: row.view.engine),
    },
    key="name",
    order_by="name",
)

MIGRATIONS = Listing[MigrationRow](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "guest": Field(Kind.TEXT, lambda row: row.guest_name),
        "guest_uuid": Field(Kind.TEXT, lambda row: row.guest),
        "evacuation": Field(Kind.TEXT, lambda row: row.evacuation),
        "source": Field(Kind.TEXT, lambda row: row.source),
        "destination": Field(Kind.TEXT, lambda row: row.destination),
        "phase": Field(Kind.TEXT, lambda row: row.phase),
        "failure": Field(Kind.TEXT, lambda row: row.failure),
        "attempts": Field(Kind.NUMBER, lambda row: row.attempts),
        "active": Field(Kind.BOOL, lambda row: not row.over),
        "create_time": Field(Kind.TIME, lambda row: row.create_time_s),
        "end_time": Field(Kind.TIME, lambda row: row.end_time_s),
        "order": Field(Kind.NUMBER, lambda row: row.order),
    },
    key="name",
    order_by="order desc",
)

EVACUATIONS = Listing[EvacuationRow](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "host": Field(Kind.TEXT, lambda row: row.host),
        "phase": Field(Kind.TEXT, lambda row: row.phase),
        "active": Field(Kind.BOOL, lambda row: not row.over),
        "create_time": Field(Kind.TIME, lambda row: row.create_time_s),
        "end_time": Field(Kind.TIME, lambda row: row.end_time_s),
        "order": Field(Kind.NUMBER, lambda row: row.order),
    },
    key="name",
    order_by="order desc",
)


def guests_listing(fleet: Fleet) -> Listing[GuestEntry]:
    """Of guests; what their agents say is asked of `fleet`."""

    def state(entry: GuestEntry) -> str:
        record = entry.input.record
        return decisions.run_state(record, fleet.guest(record.owner.host, entry.input.uuid)).value

    return Listing[GuestEntry](
        {
            "name": Field(Kind.TEXT, lambda row: row.input.record.name),
            "uuid": Field(Kind.TEXT, lambda row: row.input.uuid),
            "host": Field(Kind.TEXT, lambda row: row.input.record.owner.host),
            "ownership": Field(Kind.TEXT, lambda row: decisions.ownership(row.input.record)),
            "run_state": Field(Kind.TEXT, state),
            "memory_mib": Field(Kind.NUMBER, lambda row: row.input.spec.memory_mib),
            "vcpus": Field(Kind.NUMBER, lambda row: row.input.spec.vcpus),
            "machine": Field(Kind.TEXT, lambda row: row.input.spec.machine),
            "migration": Field(Kind.TEXT, lambda row: views.present_migration(row.input.record)),
            "labels": Field(Kind.MAP, lambda row: row.input.spec.labels),
        },
        key="uuid",
        order_by="name",
    )


def page(
    listing: Listing[T], found: Iterable[T] | Standing[T], asked: _Asked, where: Callable[[T], bool] | None = None
) -> Page[T]:
    """Raises INVALID_ARGUMENT with the field that is wrong."""
    try:
        return listing.page(
            found,
            where=where,
            filter=asked.filter,
            order_by=asked.order_by,
            page_size=asked.page_size,
            page_token=asked.page_token,
        )
    except BadList as error:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, str(error), field=error.field) from error


class Lists:
    """One per API."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._guests = guests_listing(tools.fleet)
        self._migrations = rows.migrations(tools.store)
        self._evacuations = rows.evacuations(tools.store)
        self._guests_stand = self._guests.standing()
        self._migrations_stand = MIGRATIONS.standing()
        self._evacuations_stand = EVACUATIONS.standing()
        self._attending = False
        self._over: OrderedDict[str, types_pb2.Migration] = OrderedDict()
        """As they were shown; they do not change any more."""

    async def close(self) -> None:
        """End the watches."""
        await self._migrations.close()
        await self._evacuations.close()

    def _attend(self) -> None:
        """From the first list on, hear of what moves."""
        if not self._attending:
            self._attending = True
            self._tools.index.listen(self._guest_moved)
            self._migrations.listen(self._migrations_stand.moved)
            self._evacuations.listen(self._evacuations_stand.moved)

    def _guest_moved(self, path: str) -> None:
        if uuid := paths.guest_of(path):
            self._guests_stand.moved(uuid)

    async def hosts(self, asked: pb.ListHostsRequest) -> pb.ListHostsResponse:
        """By name; those that cannot be read are named."""
        snapshot = await self._tools.index.recent()
        count = views.guests_by_host(snapshot)
        known = [HostRow(name, view, count.get(name, 0)) for name, view in snapshot.seen.items()]
        found = page(HOSTS, known, asked)
        unreadable = Unreadable()
        unreadable.add_nodes(snapshot.unreadable, paths.HOSTS)
        shown = [views.host(snapshot.hosts[row.name].input, row.view, row.guests) for row in found.rows]
        return pb.ListHostsResponse(hosts=shown, unreadable=unreadable.message(), next_page_token=found.next_page_token)

    async def guests(self, asked: pb.ListGuestsRequest) -> pb.ListGuestsResponse:
        """By name; guests that are gone are left out. Those that cannot be read are named: they may be on any host."""
        self._attend()
        entries = await self._tools.index.guests()
        snapshot = await self._tools.index.recent()
        if asked.host and asked.host not in snapshot.hosts:
            raise not_found("host", asked.host, field="host")
        self._guests_stand.sync(entries)

        def wanted(entry: GuestEntry) -> bool:
            return not asked.host or entry.input.record.owner.host == asked.host

        found = page(self._guests, self._guests_stand, asked, wanted)
        unreadable = Unreadable()
        unreadable.add_nodes(snapshot.unreadable, paths.GUESTS)
        fits: list[types_pb2.Guest] = []
        for entry in found.rows:
            with unreadable.of(entry.input.uuid):
                fits.append(views.without_texts(views.guest(_read_of(entry), self._tools.fleet)))
        told = unreadable.message()
        return pb.ListGuestsResponse(guests=fits, unreadable=told, next_page_token=found.next_page_token)

    async def migrations(self, asked: pb.ListMigrationsRequest) -> pb.ListMigrationsResponse:
        """Newest first by the ledger's own order, without time lines; those of the page that cannot be read are
        named."""
        self._attend()
        uuid = await guest_uuid(self._tools.ledger, asked.guest, field="guest") if asked.guest else ""
        complete = asked.active_only or await self._migrations.completed()
        self._migrations_stand.sync(await self._migrations.rows())

        def wanted(row: MigrationRow) -> bool:
            return (not uuid or row.guest == uuid) and not (asked.active_only and row.over)

        found = page(MIGRATIONS, self._migrations_stand, asked, wanted)
        unreadable = Unreadable()
        shown = await unreadable.others([row.name for row in found.rows], self._migration)
        reasons = await quarantined(self._tools.ledger)
        for one in shown:
            if one.name not in self._over:
                one.message = views.quarantined(one.message, reasons.get(f"migrations/{one.name}", ""))
        return pb.ListMigrationsResponse(
            migrations=shown,
            unreadable=unreadable.message(),
            next_page_token=found.next_page_token,
            incomplete=not complete,
        )

    async def _migration(self, name: str) -> types_pb2.Migration:
        if name in self._over:
            self._over.move_to_end(name)
            return self._over[name]
        read: MigrationRead = await read_migration(self._tools.ledger, name)
        shown = views.migration(read, self._tools.fleet, timelines=False)
        shown.elapsed_ms = views.migration_elapsed_ms(read, self._tools.fleet, self._tools.ages)
        if read.standing.state.phase.terminal:
            self._over[name] = shown
            while len(self._over) > _REMEMBERED:
                self._over.popitem(last=False)
        return shown

    async def evacuations(self, asked: pb.ListEvacuationsRequest) -> pb.ListEvacuationsResponse:
        """Newest first by the ledger's own order; those of the page that cannot be read are named."""
        self._attend()
        complete = await self._evacuations.completed()
        self._evacuations_stand.sync(await self._evacuations.rows())
        found = page(EVACUATIONS, self._evacuations_stand, asked)
        unreadable = Unreadable()
        shown = await unreadable.others([row.name for row in found.rows], self._evacuation)
        reasons = await quarantined(self._tools.ledger)
        for one in shown:
            if not one.end_time.seconds:
                one.message = views.quarantined(one.message, reasons.get(f"evacuations/{one.name}", ""))
        return pb.ListEvacuationsResponse(
            evacuations=shown,
            unreadable=unreadable.message(),
            next_page_token=found.next_page_token,
            incomplete=not complete,
        )

    async def _evacuation(self, name: str) -> types_pb2.Evacuation:
        read: EvacuationRead = await read_evacuation(self._tools.ledger, name)
        shown = views.evacuation(read, self._tools.fleet)
        shown.elapsed_ms = views.evacuation_elapsed_ms(read, self._tools.ages)
        return shown


def _read_of(entry: GuestEntry) -> GuestRead:
    known = entry.input
    return GuestRead(known.uuid, known.record, entry.version, entry.mzxid, known.spec, entry.wish, entry.wish_version)
