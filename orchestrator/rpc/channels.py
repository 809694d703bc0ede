"""The only place where channels and servers are made: keepalive, message size, and one spot for credentials.

Addresses are `host:port`, `[IPv6]:port` or `unix:PATH`. With credentials it is mutual TLS, but for unix sockets: the
modes of their directories say who may connect.

A peer that froze or lost its network keeps its TCP connection for many minutes. The pings below end it within seconds;
`http2.ping_timeout_ms` is what does it, the keepalive options alone do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import grpc
from grpc import aio

from orchestrator.core.endpoint import join_address, split_address
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.pki.names import Identity, Role, of_role
from orchestrator.rpc.credentials import Credentials

MAX_MESSAGE_BYTES = 16 << 20
"""A list of some thousand guests fits; pages of guest memory never travel here."""
MAX_REQUEST_BYTES = 256 << 10
"""Of a request to OrchestratorService, at both ends: a specification with eight scripted devices fits."""
MAX_CALLS = 256
"""Under way at a time over one connection to OrchestratorService; a client's later ones wait for these."""

MAX_CONNECTIONS = 1024
"""Of one server and address. Each costs a descriptor, also when nothing is ever said on it."""
MAX_AGE_MS = 3_600_000
"""Of a connection to a server of the control plane that asks for certificates."""
HANDSHAKE_TIMEOUT_MS = 5_000
"""Who connects and does not speak HTTP/2 by then is cut off (gRPC itself waits two minutes)."""

_SIZES: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
_AGAIN_AT_ONCE: tuple[tuple[str, int], ...] = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 100),
)
_COMMON: tuple[tuple[str, int], ...] = (
    *_SIZES,
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL = (
    *_COMMON,
    ("grpc.keepalive_permit_without_calls", 1),
    # A peer that restarts is back within a second: look for it that often.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # An older server may send a status that is longer than gRPC takes by itself (8 KiB): better long than lost.
    ("grpc.max_metadata_size", 64 << 10),
    ("grpc.absolute_max_metadata_size", 256 << 10),
    # Hosts are reached directly, whatever the environment says about a proxy.
    ("grpc.enable_http_proxy", 0),
)
_SERVER = (
    *_COMMON,
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    # Two servers on one port would share its calls between them.
    ("grpc.so_reuseport", 0),
)


def _with(options: Sequence[tuple[str, int]], other: Mapping[str, int]) -> list[tuple[str, int]]:
    """Of an option that is given twice gRPC takes the first."""
    return [*other.items(), *((name, value) for name, value in options if name not in other)]


def _read(address: str) -> str:
    """Raises INVALID_ARGUMENT for what would be read in another way than it was meant, such as `::1:7701`."""
    if address.startswith("unix:"):
        return address
    try:
        return join_address(*split_address(address))
    except ValueError as error:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, str(error), field="address") from error


def _read_or_as_it_is(address: str) -> str:
    """Of what others have registered: an address that leads nowhere is told by the first call."""
    try:
        return _read(address)
    except DroverError:
        return address


def aio_channel(address: str, *, alone: bool = False) -> aio.Channel:
    """For the running event loop. Connects with the first call.

    Channels to one address share a connection and what is known of it: one that could not connect a moment ago lets the
    next one fail at once. `alone` asks the address itself.
    """
    options = (*_CHANNEL, ("grpc.use_local_subchannel_pool", int(alone)))
    return aio.insecure_channel(_read_or_as_it_is(address), options=options)


def tls_channel(address: str, credentials: Credentials, server: Identity) -> aio.Channel:
    """As `aio_channel`, alone, and only to a server whose certificate is that of `server`: the address proves nothing.

    While renewed certificates cannot be read, those from before are shown."""
    options = (
        *_CHANNEL,
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.ssl_target_name_override", server.server_name),
    )
    return aio.secure_channel(_read_or_as_it_is(address), credentials.channel(), options=options)


def local_channel(path: Path) -> aio.Channel:
    """To a program of this machine behind a unix socket, for the running event loop. Connects with the first call.

    A program that restarts is looked for ten times a second (gRPC allows no more): a stopped guest may be waiting for
    it. No keepalive: the kernel closes a socket whose other end died.
    """
    options = (*_SIZES, *_AGAIN_AT_ONCE, ("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
    return aio.insecure_channel(f"unix:{path}", options=options)


def channel(address: str, credentials: Credentials | None = None) -> grpc.Channel:
    """For synchronous callers of OrchestratorService. Connects with the first call; sends no request that is larger
    than MAX_REQUEST_BYTES. With credentials only to the API of their cluster. Raises INVALID_ARGUMENT for what is no
    address."""
    options = _with(_CHANNEL, {"grpc.max_send_message_length": MAX_REQUEST_BYTES})
    if credentials is None or address.startswith("unix:"):
        return grpc.insecure_channel(_read(address), options=options)
    server = of_role(credentials.identity.cluster, Role.API).server_name
    options = [*options, ("grpc.ssl_target_name_override", server)]
    return grpc.secure_channel(_read(address), credentials.channel(), options=cast(Any, options))


def aio_server(
    interceptors: Sequence[aio.ServerInterceptor] = (),
    *,
    max_request_bytes: int = 0,
    max_connections: int = MAX_CONNECTIONS,
    max_age_ms: int = 0,
) -> aio.Server:
    """A server that listens nowhere yet and is not started.

    Of each address that it listens at it takes `max_connections`, and closes what comes beyond.

    `max_age_ms` > 0: a connection takes no new calls after so long, and its client makes another, which shows what it
    has of certificates then; calls under way go on.

    `max_request_bytes` > 0 is for a server that strangers may call: larger requests are not taken in, and a connection
    has at most MAX_CALLS calls under way.
    """
    bounds = {"grpc.max_allowed_incoming_connections": max_connections}
    if max_age_ms:
        bounds |= {"grpc.max_connection_age_ms": max_age_ms}
    if max_request_bytes:
        bounds |= {"grpc.max_receive_message_length": max_request_bytes, "grpc.max_concurrent_streams": MAX_CALLS}
    return aio.server(interceptors=list(interceptors), options=_with(_SERVER, bounds))


def listen(server: aio.Server, address: str, credentials: Credentials | None = None) -> int:
    """Let a server that is not started listen there too; the port (0 for a unix socket's path).

    Raises DroverError INVALID_ARGUMENT when the address cannot be used. A unix socket that lies there is replaced.
    """
    try:
        if credentials is None or address.startswith("unix:"):  # a socket's modes say who may connect
            port = server.add_insecure_port(_read(address))
        else:
            port = server.add_secure_port(_read(address), credentials.server())
    except RuntimeError as error:
        raise DroverError(
            RefusalReason.INVALID_ARGUMENT, f"cannot listen at {address}: it is in use, or not an address of this host"
        ) from error
    return 0 if address.startswith("unix:") else port
