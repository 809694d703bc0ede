"""Migrations."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from collections.abc import AsyncIterator
from copy import deepcopy

from orchestrator import wire
from orchestrator.api import decisions, lists, migrations
from orchestrator.api.listing import Field, Kind, Listing
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State, created_at_s, name_of, over, record_of

R = RefusalReason

_COMMITTED = (types.MIGRATION_PHASE_COMMITTED, types.MIGRATION_PHASE_FINALIZING, types.MIGRATION_PHASE_SUCCEEDED)


class Migrations(State):
    async def CreateMigration(self, request: pb.CreateMigrationRequest, context: object) -> types.Migration:
        await self._called("CreateMigration", request)
        return self._created(request)

    def _created(self, request: pb.CreateMigrationRequest) -> types.Migration:
        migrations.check(request)
        if earlier := self._earlier("CreateMigration", request):
            return self.migrations[earlier]
        guest = self._guest(request.guest, "guest")
        decisions.need_movable(record_of(guest))
        for other in self.migrations.values():
            if other.guest_uuid == guest.uuid and not over(other):
                said = f"guest {guest.name} is in migration {other.name} already"
                raise DroverError(R.GUEST_IS_MIGRATING, said, details={"migration": other.name})
        spec = wire.guest_spec_from_proto(guest.spec)
        best = ""
        if request.destination or request.validate_only:
            best = self._place(spec, guest.host, request.destination, "destination")
        if bad := migrations.policy_violations(request.policy, [spec.policy]):
            raise invalid(bad)
        migration = types.Migration(
            guest=guest.name,
            guest_uuid=guest.uuid,
            source=guest.host,
            destination=best,
            policy=wire.policy_to_proto(wire.policy_from_proto(request.policy, spec.policy)),
        )
        if not request.validate_only:
            migration.name = name_of("5", len(self.migrations))
            migration.phase = types.MIGRATION_PHASE_PENDING
            migration.create_time.GetCurrentTime()
            self.migrations[migration.name] = migration
            self._remember("CreateMigration", request, f"migrations/{migration.name}")
        return migration

    async def GetMigration(self, request: pb.GetMigrationRequest, context: object) -> types.Migration:
        await self._called("GetMigration", request)
        return self._known(self.migrations, request.name, "migration")

    async def ListMigrations(self, request: pb.ListMigrationsRequest, context: object) -> pb.ListMigrationsResponse:
        await self._called("ListMigrations", request)
        of = self._guest(request.guest, "guest").uuid if request.guest else ""
        found = [
            _without_time_lines(each)
            for each in self.migrations.values()
            if of in ("", each.guest_uuid) and not (request.active_only and over(each))
        ]
        page = lists.page(_MIGRATIONS, found, request)
        return pb.ListMigrationsResponse(
            migrations=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token
        )

    async def CancelMigration(self, request: pb.CancelMigrationRequest, context: object) -> types.Migration:
        await self._called("CancelMigration", request)
        return self._cancelled(self._known(self.migrations, request.name, "migration"))

    @staticmethod
    def _cancelled(migration: types.Migration) -> types.Migration:
        if migration.phase == types.MIGRATION_PHASE_FAILED:
            raise DroverError(R.ALREADY_ENDED, f"migration {migration.name} has failed: {migration.failure}")
        if migration.phase in _COMMITTED:
            said = f"migration {migration.name} has committed"
            raise DroverError(R.ALREADY_COMMITTED, said, details={"destination": migration.destination})
        if not over(migration):
            migration.phase, migration.failure = types.MIGRATION_PHASE_CANCELLED, "CANCELLED"
            migration.cancel_requested = True
            migration.end_time.GetCurrentTime()
        return migration

    async def WatchMigrations(
        self, request: pb.WatchMigrationsRequest, context: object
    ) -> AsyncIterator[pb.WatchMigrationsResponse]:
        await self._called("WatchMigrations", request)
        async for migration in self._watch(self.migrations, request.names):
            yield pb.WatchMigrationsResponse(migration=_without_time_lines(migration))


_MIGRATIONS = Listing[types.Migration](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "guest": Field(Kind.TEXT, lambda row: row.guest),
        "phase": Field(Kind.TEXT, lambda row: wire.word(row, "phase")),
        "active": Field(Kind.BOOL, lambda row: not over(row)),
        "order": Field(Kind.NUMBER, created_at_s),
    },
    key="name",
    order_by="order desc",
)


def _without_time_lines(migration: types.Migration) -> types.Migration:
    short = deepcopy(migration)
    for attempt in short.attempts:
        attempt.ClearField("timeline")
    return short
