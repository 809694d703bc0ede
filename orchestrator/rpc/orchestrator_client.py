"""OrchestratorService for programs that want answers, not coroutines: the CLI, the demo, scripts."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import grpc

from orchestrator import wire, wire_hardware
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.images import CHUNK_BYTES, ImageImport
from orchestrator.core.records import DiskSpec, GuestSpec, NicSpec
from orchestrator.rpc.channels import channel
from orchestrator.rpc.console import ConsoleSession
from orchestrator.rpc.credentials import credentials_of
from orchestrator.rpc.errors import from_rpc_error
from orchestrator.rpc.several import SeveralChannel, addresses
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2
from protos.drover.v1.orchestrator_pb2_grpc import OrchestratorServiceStub

SLOW_S = 60.0
"""Least bound of calls that wait for a VMM to start or to end."""
WATCH_S = 600.0
"""A watch is renewed that often; each renewal begins with what is the case then."""
_RECONNECT_S = 0.25
IMPORT_S = 24 * 3600.0
"""For an image on its way; one that does not move any more is given up much earlier."""
PAGE = 500
"""Rows asked for at a time."""
EVERYTHING = 1_000_000
_INCOMPLETE = "the API has just started and has not read all of them yet: there may be more"

Answer = TypeVar("Answer")

Policy = Mapping[str, object]
"""Part of a MigrationPolicy by its field names; `on_timeout` is "abort" or "suspend"."""


class OrchestratorClient:
    """The API, at `host:port` or `unix:PATH`, or at several such addresses with commas between them; connects with the
    first call. A context manager, or `close` it.

    Of several the one that answered last is asked, and another when it is silent: a call that reached none goes to the
    next, reads and creates are repeated there also when nobody knows whether they were heard, watches go on there.

    Every call raises DroverError: the API's refusal, API_UNREACHABLE when nothing answers there, OUTCOME_UNKNOWN when
    no answer came within `timeout_s` and the call may have had its effect. A create call that ended so may be repeated
    with the same `request_id`; one is made up when none is given.
    """

    def __init__(self, address: str, timeout_s: float = 10.0, tls: Path | None = None) -> None:
        """`tls`: directory of the identity that it shows, and believes in, at `host:port`. Raises PkiError."""
        self.address = address
        self.timeout_s = timeout_s
        several = addresses(address)
        credentials = credentials_of(tls)
        alone = len(several) == 1
        self._channel = channel(several[0], credentials) if alone else SeveralChannel(several, credentials)
        self._stub = OrchestratorServiceStub(self._channel)
        self._closed = False

    def __enter__(self) -> OrchestratorClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Watches under way end."""
        self._closed = True
        self._channel.close()

    def _call(self, call: Callable[..., Answer], request: Any, timeout_s: float | None = None) -> Answer:
        try:
            return call(request, timeout=self.timeout_s if timeout_s is None else timeout_s)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    def _failed(self, error: grpc.RpcError) -> DroverError:
        return from_rpc_error(error, peer=f"the API at {self.address}", unreachable=RefusalReason.API_UNREACHABLE)

    def _pages(
        self, call: Callable[..., Any], request: Any, field: str, limit: int, unreadable: list[pb.Unreadable] | None
    ) -> list[Any]:
        found: list[Any] = []
        told: dict[str, pb.Unreadable] = {}
        while len(found) < limit:
            request.page_size = min(PAGE, limit - len(found))
            answer = self._call(call, request)
            found += getattr(answer, field)
            told |= {one.name: one for one in answer.unreadable}
            if getattr(answer, "incomplete", False):
                told[""] = pb.Unreadable(reason=_INCOMPLETE)
            request.page_token = answer.next_page_token
            if not request.page_token:
                break
        if unreadable is not None:
            unreadable.extend(told.values())
        return found

    @property
    def _slow_s(self) -> float:
        return max(self.timeout_s, SLOW_S)

    def get_cluster_health(self) -> pb.ClusterHealth:
        """Who leads, and what is quarantined."""
        return self._call(self._stub.GetClusterHealth, pb.GetClusterHealthRequest())

    def export_history(self, kind: str = "", name_prefix: str = "") -> Iterator[pb.HistoryEntry]:
        """What the ledger has forgotten, oldest first. Raises NO_HISTORY where none is kept."""
        request = pb.ExportHistoryRequest(kind=kind, name_prefix=name_prefix)
        try:
            yield from self._stub.ExportHistory(request, timeout=WATCH_S)
        except grpc.RpcError as error:
            raise self._failed(error) from error

    # --- hosts --------------------------------------------------------------------------------------------------------

    def get_host(self, name: str, *, ask_agent: bool = False) -> types_pb2.Host:
        """`ask_agent`: with what its agent says is there, or that it is silent (`agent`), within a few seconds."""
        return self._call(self._stub.GetHost, pb.GetHostRequest(name=name, ask_agent=ask_agent))

    def list_hosts(
        self,
        *,
        filter: str = "",
        order_by: str = "",
        limit: int = EVERYTHING,
        unreadable: list[pb.Unreadable] | None = None,
    ) -> list[types_pb2.Host]:
        """By name, at most `limit`; `filter` and `order_by` as in docs/lists.md. `unreadable` is given those that the
        API cannot read, here and in the other lists, and a nameless one with what else is to be known of the list."""
        request = pb.ListHostsRequest(filter=filter, order_by=order_by)
        return self._pages(self._stub.ListHosts, request, "hosts", limit, unreadable)

    def cordon_host(self, name: str, reason: str = "") -> types_pb2.Host:
        """New guests and migrations no longer go there. Idempotent."""
        return self._call(self._stub.CordonHost, pb.CordonHostRequest(name=name, reason=reason))

    def uncordon_host(self, name: str) -> types_pb2.Host:
        """New guests and migrations may go to the host again. Idempotent."""
        return self._call(self._stub.UncordonHost, pb.UncordonHostRequest(name=name))

    def rejoin_host(self, name: str) -> types_pb2.Host:
        """Let the host's agent believe the ledger as it is now, whatever it has known before."""
        return self._call(self._stub.RejoinHost, pb.RejoinHostRequest(name=name))

    def declare_host_dead(
        self, name: str, confirmation_token: str = "", *, on_operators_word: bool = False, requested_by: str = ""
    ) -> types_pb2.HostDeath:
        """Without a token: what would become of which guest, and the token. With it: the declaration, ended or as far
        as it got within the time; `get_host_death` shows how it goes on."""
        request = pb.DeclareHostDeadRequest(
            name=name,
            confirmation_token=confirmation_token,
            on_operators_word=on_operators_word,
            requested_by=requested_by,
        )
        return self._call(self._stub.DeclareHostDead, request, self._slow_s if confirmation_token else None)

    def get_host_death(self, name: str) -> types_pb2.HostDeath:
        """The newest declaration."""
        return self._call(self._stub.GetHostDeath, pb.GetHostDeathRequest(name=name))

    def remove_host(self, name: str) -> None:
        """Forget a host that is not live, has no guests, and is certified dead or cordoned."""
        self._call(self._stub.RemoveHost, pb.RemoveHostRequest(name=name))

    # --- placement ----------------------------------------------------------------------------------------------------

    def check_placement(self, guest: str | GuestSpec, host: str = "") -> pb.CheckPlacementResponse:
        """Where a guest could move (by its name), or run (by its specification), now: the choice, and the verdict on
        every host, or on `host` alone. Asks page by page; the choice is that of the first page."""
        request = pb.CheckPlacementRequest(host=host)
        if isinstance(guest, str):
            request.guest = guest
        else:
            request.spec.CopyFrom(wire.guest_spec_to_proto(guest))
        found = answer = self._call(self._stub.CheckPlacement, request)
        while answer.next_page_token:
            request.page_token = answer.next_page_token
            answer = self._call(self._stub.CheckPlacement, request)
            found.verdicts.extend(answer.verdicts)
        found.next_page_token = ""
        return found

    # --- images -------------------------------------------------------------------------------------------------------

    def list_images(
        self, host: str = "", pool: str = "", *, limit: int = EVERYTHING, unreadable: list[pb.Unreadable] | None = None
    ) -> list[types_pb2.Image]:
        """By pool, host and name; of one host, of one pool, or of all. `unreadable` is given the pools whose images are
        not known."""
        return self._pages(
            self._stub.ListImages, pb.ListImagesRequest(host=host, pool=pool), "images", limit, unreadable
        )

    def import_image(
        self, image: ImageImport, data: Iterable[bytes], host: str = "", *, timeout_s: float = IMPORT_S
    ) -> types_pb2.Image:
        """Bring an image into a pool; it is there and durable when this returns. `data`: all of it, in pieces of any
        size, in another thread. Its checksum goes along. Whatever `data` raises is raised here, and nothing was brought
        in then."""
        failed: list[Exception] = []

        def requests() -> Iterator[pb.ImportImageRequest]:
            digest = hashlib.sha256()
            yield pb.ImportImageRequest(image=wire_hardware.image_import_to_proto(image, host))
            try:
                for piece in data:
                    for at in range(0, len(piece), CHUNK_BYTES):
                        part = piece[at : at + CHUNK_BYTES]
                        digest.update(part)
                        yield pb.ImportImageRequest(data=part)
            except Exception as error:
                failed.append(error)
                return  # without the checksum it is not taken
            yield pb.ImportImageRequest(sha256=digest.digest())

        try:
            return self._call(self._stub.ImportImage, requests(), timeout_s)
        except DroverError:
            if failed:
                raise failed[0] from None
            raise

    # --- guests -------------------------------------------------------------------------------------------------------

    def create_guest(
        self, spec: GuestSpec, host: str = "", *, validate_only: bool = False, request_id: str | None = None
    ) -> types_pb2.Guest:
        """Create and start a guest; returns when it runs. `host` empty: the eligible one with most free memory."""
        request = pb.CreateGuestRequest(
            request_id=_request_id(request_id),
            spec=wire.guest_spec_to_proto(spec),
            host=host,
            validate_only=validate_only,
        )
        return self._call(self._stub.CreateGuest, request, self._slow_s)

    def adopt_guest(
        self,
        name: str,
        host: str,
        pid: int,
        qmp: str,
        spec: GuestSpec | None = None,
        destination: str = "",
        *,
        validate_only: bool = False,
        request_id: str | None = None,
    ) -> pb.AdoptGuestResponse:
        """Make a QEMU that somebody else started on `host` a guest and move it at once; returns when the move was asked
        for. `spec` is for what cannot be seen. With `validate_only` the answer has what stands against it."""
        request = pb.AdoptGuestRequest(
            request_id=_request_id(request_id),
            name=name,
            host=host,
            pid=pid,
            qmp=qmp,
            destination=destination,
            validate_only=validate_only,
        )
        if spec is not None:
            request.spec.CopyFrom(wire.guest_spec_to_proto(spec))
        return self._call(self._stub.AdoptGuest, request, self._slow_s)

    def release_guest(self, name: str) -> types_pb2.Guest:
        """Give a guest that was adopted and has not moved since back to whoever started its process."""
        return self._call(self._stub.ReleaseGuest, pb.ReleaseGuestRequest(name=name), self._slow_s)

    def get_guest(self, name: str) -> types_pb2.Guest:
        """By name, or by the uuid of a life."""
        return self._call(self._stub.GetGuest, pb.GetGuestRequest(name=name))

    def list_guests(
        self,
        host: str = "",
        *,
        filter: str = "",
        order_by: str = "",
        limit: int = EVERYTHING,
        unreadable: list[pb.Unreadable] | None = None,
    ) -> list[types_pb2.Guest]:
        """By name; of one host, or of all."""
        request = pb.ListGuestsRequest(host=host, filter=filter, order_by=order_by)
        return self._pages(self._stub.ListGuests, request, "guests", limit, unreadable)

    def pause_guest(self, name: str) -> pb.ChangeRunStateResponse:
        """Record the wish that the guest is paused; the answer says how far it got. Idempotent."""
        return self._call(self._stub.PauseGuest, pb.PauseGuestRequest(name=name))

    def resume_guest(self, name: str) -> pb.ChangeRunStateResponse:
        """Take that wish back; the answer says how far it got. Idempotent."""
        return self._call(self._stub.ResumeGuest, pb.ResumeGuestRequest(name=name))

    def stop_guest(self, name: str) -> types_pb2.Guest:
        """End the guest for good; a migration of it is cancelled first. Returns when it is gone."""
        return self._call(self._stub.StopGuest, pb.StopGuestRequest(name=name), self._slow_s)

    def stop_and_keep_guest(self, name: str) -> types_pb2.Guest:
        """End the guest's VMM and keep the guest, for `start_guest_again`. Returns when nothing of it runs."""
        return self._call(self._stub.StopAndKeepGuest, pb.StopAndKeepGuestRequest(name=name), self._slow_s)

    def start_guest_again(self, name: str) -> types_pb2.Guest:
        """Start a guest that was kept, has shut down or has crashed, where it is. Returns when it runs. Idempotent."""
        return self._call(self._stub.StartGuestAgain, pb.StartGuestAgainRequest(name=name), self._slow_s)

    def edit_guest(self, name: str, spec: GuestSpec, etag: str = "", *, validate_only: bool = False) -> types_pb2.Guest:
        """Replace what the guest is. `etag`: of the guest as it was read, so that no other edit is lost."""
        request = pb.EditGuestRequest(
            name=name, spec=wire.guest_spec_to_proto(spec), etag=etag, validate_only=validate_only
        )
        return self._call(self._stub.EditGuest, request)

    def attach_console(self, guest: str) -> ConsoleSession:
        """A session with the guest's console. Nothing is called before it is iterated."""
        return ConsoleSession(self._stub.AttachConsole, guest, self._failed)

    def open_display(self, guest: str) -> types_pb2.DisplayAddress:
        """Where the guest's screen is served (VNC), and what lets a viewer in for a minute."""
        return self._call(self._stub.OpenDisplay, pb.OpenDisplayRequest(guest=guest)).display

    def attach_to_guest(
        self,
        guest: str,
        *,
        disk: DiskSpec | None = None,
        nic: NicSpec | None = None,
        memory_mib: int = 0,
        vcpus: int = 0,
    ) -> types_pb2.Guest:
        """Add one of these to a guest that runs; memory and vCPUs are what it is to have in all. Repeat-safe."""
        _fits("memory_mib", memory_mib, 31)
        _fits("vcpus", vcpus, 31)
        request = pb.AttachToGuestRequest(guest=guest)
        if disk is not None:
            request.disk.CopyFrom(wire_hardware.disk_to_proto(disk))
        elif nic is not None:
            request.nic.CopyFrom(wire_hardware.nic_to_proto(nic))
        elif memory_mib:
            request.memory_mib = memory_mib
        else:
            request.vcpus = vcpus
        return self._call(self._stub.AttachToGuest, request, self._slow_s)

    def detach_from_guest(self, guest: str, *, disk: str = "", nic: str = "") -> types_pb2.Guest:
        """Take a disk or a network card from a guest that runs, by its name. DEVICE_NOT_RELEASED: the guest's system
        has not let go of it, and it is all there. NOT_FOUND: it has none of that name (any more)."""
        request = pb.DetachFromGuestRequest(guest=guest)
        if disk:
            request.disk = disk
        else:
            request.nic = nic
        return self._call(self._stub.DetachFromGuest, request, self._slow_s)

    def watch_guests(self, names: Sequence[str] = ()) -> Iterator[types_pb2.Guest]:
        """The named guests, or all, as they are and then each time they change; for ever."""
        for answer in self._watch(self._stub.WatchGuests, pb.WatchGuestsRequest(names=names)):
            yield answer.guest

    def repair_guest(self, name: str, action: str = "") -> pb.RepairGuestResponse:
        """What is where, and what can safely be done; with an action that was offered it is done first. NOTHING_SAFE:
        it is not safe now."""
        return self._call(self._stub.RepairGuest, pb.RepairGuestRequest(name=name, action=action))

    # --- migrations ---------------------------------------------------------------------------------------------------

    def create_migration(
        self,
        guest: str,
        destination: str = "",
        policy: Policy | None = None,
        *,
        validate_only: bool = False,
        request_id: str | None = None,
    ) -> types_pb2.Migration:
        """Ask for a migration. `destination` empty: chosen by free memory. What `policy` leaves out is the guest's."""
        request = pb.CreateMigrationRequest(
            request_id=_request_id(request_id),
            guest=guest,
            destination=destination,
            policy=wire.policy_patch(policy),
            validate_only=validate_only,
        )
        return self._call(self._stub.CreateMigration, request)

    def get_migration(self, name: str) -> types_pb2.Migration:
        """With all its attempts and their time lines, also long after its end."""
        return self._call(self._stub.GetMigration, pb.GetMigrationRequest(name=name))

    def list_migrations(
        self,
        guest: str = "",
        *,
        active_only: bool = False,
        filter: str = "",
        order_by: str = "",
        limit: int = 1_000,
        unreadable: list[pb.Unreadable] | None = None,
    ) -> list[types_pb2.Migration]:
        """Newest first, at most `limit`, without the time lines of their attempts."""
        request = pb.ListMigrationsRequest(guest=guest, active_only=active_only, filter=filter, order_by=order_by)
        return self._pages(self._stub.ListMigrations, request, "migrations", limit, unreadable)

    def cancel_migration(self, name: str) -> types_pb2.Migration:
        """Returns when the migration will certainly never commit. ALREADY_COMMITTED (details: `zxid`): too late."""
        return self._call(self._stub.CancelMigration, pb.CancelMigrationRequest(name=name))

    def watch_migrations(self, names: Sequence[str] = ()) -> Iterator[types_pb2.Migration]:
        """The named migrations until each is over, or all that are not over and those to come, for ever."""
        for answer in self._watch(self._stub.WatchMigrations, pb.WatchMigrationsRequest(names=names)):
            yield answer.migration

    # --- evacuations --------------------------------------------------------------------------------------------------

    def create_evacuation(
        self,
        host: str,
        max_concurrent: int = 0,
        policy: Policy | None = None,
        *,
        validate_only: bool = False,
        request_id: str | None = None,
    ) -> pb.CreateEvacuationResponse:
        """Cordon a host and move its guests away, `max_concurrent` (0: 4) at a time; with a verdict per guest."""
        _fits("max_concurrent", max_concurrent, 31)
        request = pb.CreateEvacuationRequest(
            request_id=_request_id(request_id),
            host=host,
            max_concurrent=max_concurrent,
            policy=wire.policy_patch(policy),
            validate_only=validate_only,
        )
        return self._call(self._stub.CreateEvacuation, request)

    def get_evacuation(self, name: str) -> types_pb2.Evacuation:
        """One evacuation with where each of its guests stands, also after its end."""
        return self._call(self._stub.GetEvacuation, pb.GetEvacuationRequest(name=name))

    def list_evacuations(
        self,
        *,
        filter: str = "",
        order_by: str = "",
        limit: int = 1_000,
        unreadable: list[pb.Unreadable] | None = None,
    ) -> list[types_pb2.Evacuation]:
        """Newest first, at most `limit`."""
        request = pb.ListEvacuationsRequest(filter=filter, order_by=order_by)
        return self._pages(self._stub.ListEvacuations, request, "evacuations", limit, unreadable)

    def cancel_evacuation(self, name: str) -> types_pb2.Evacuation:
        """Migrations under way are cancelled; those past their commit arrive all the same. The host stays cordoned."""
        return self._call(self._stub.CancelEvacuation, pb.CancelEvacuationRequest(name=name))

    def watch_evacuations(self, names: Sequence[str] = ()) -> Iterator[types_pb2.Evacuation]:
        """The named evacuations until each is over, or all that are not over and those to come, for ever."""
        for answer in self._watch(self._stub.WatchEvacuations, pb.WatchEvacuationsRequest(names=names)):
            yield answer.evacuation

    # --- devices ------------------------------------------------------------------------------------------------------

    def instruct_device(self, guest: str, device: str, instruction: str) -> str:
        """Tell a device something in its own program's words; what the program says to it (docs/shims.md)."""
        request = pb.InstructDeviceRequest(guest=guest, device=device, instruction=instruction)
        return self._call(self._stub.InstructDevice, request).answer

    # --- watches ------------------------------------------------------------------------------------------------------

    def _watch(self, call: Callable[..., Iterator[Answer]], request: Any) -> Iterator[Answer]:
        """Answers until the API ends the stream. Renewed at its bound, when it was read too slowly, and when the API
        went away and it, or another one, is there within `timeout_s`: each subscription begins with the present state,
        so nothing is missed but what came in between."""
        heard = False
        gone_since: float | None = None
        while not self._closed:
            try:
                for answer in call(request, timeout=WATCH_S):
                    heard, gone_since = True, None
                    yield answer
                return
            except grpc.RpcError as error:
                code = cast(grpc.Call, error).code()
                if code is grpc.StatusCode.DEADLINE_EXCEEDED or self._closed:
                    gone_since = None
                    continue
                told = self._failed(error)
                if told.reason is RefusalReason.SLOW_READER:
                    continue
                now = time.monotonic()
                gone_since = now if gone_since is None else gone_since
                if code is not grpc.StatusCode.UNAVAILABLE or not heard or now - gone_since > self.timeout_s:
                    raise told from error
            time.sleep(_RECONNECT_S)


def _request_id(given: str | None) -> str:
    return given or str(uuid.uuid4())


def _fits(field: str, value: int, bits: int) -> None:
    if not 0 <= value < 1 << bits:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, f"must be from 0 to {(1 << bits) - 1}", field=field)
