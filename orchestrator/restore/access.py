"""Which ledger is meant, and a session with it: for commands that must work while no API does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.text import clip
from orchestrator.ledger import paths
from orchestrator.ledger.enrolment import enrol
from orchestrator.ledger.store import Store, StoreUnavailable
from orchestrator.ledger.zookeeper import ZooKeeperStore
from orchestrator.pki.files import PkiError
from orchestrator.pki.names import BadName, of_host

CONNECT_S = 15.0


@dataclass(frozen=True, slots=True)
class Where:
    """Of a ledger."""

    zookeeper: str
    """host:port[,host:port...]"""
    chroot: str = paths.CHROOT
    tls: Path | None = None
    """Directory of the identity to show ZooKeeper; None: it asks for none."""


def configured(path: Path) -> Where:
    """The ledger that a configuration of an agent, the API or a coordinator names. Raises OSError, and DroverError
    INVALID_ARGUMENT for a file that names none."""
    try:
        found: Any = yaml.safe_load(path.read_bytes())  # which reads JSON as well
    except yaml.YAMLError as error:
        said = f"{path} is no configuration: {clip(str(error))}"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="config") from error
    named = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    zookeeper = named.get("zookeeper")
    if not isinstance(zookeeper, str):
        raise DroverError(RefusalReason.INVALID_ARGUMENT, f"{path} names no `zookeeper`", field="config")
    tls: Any = named.get("tls")
    directory = cast("dict[str, Any]", tls).get("directory") if isinstance(tls, dict) else None
    return Where(
        zookeeper, str(named.get("chroot", paths.CHROOT)), Path(directory) if isinstance(directory, str) else None
    )


@contextlib.asynccontextmanager
async def opened(where: Where) -> AsyncGenerator[Store]:
    """A session of its own. Raises LEDGER_UNREACHABLE, INVALID_ARGUMENT."""
    try:
        store = ZooKeeperStore(where.zookeeper, chroot=where.chroot, tls=where.tls)
    except PkiError as error:
        said = f"the identity in {where.tls} cannot be used: {error}"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field="tls") from error
    try:
        try:
            await store.start(CONNECT_S)
        except StoreUnavailable as error:
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, str(error)) from error
        yield store
    finally:
        await store.close()


async def enrol_host(where: Where, host: str) -> None:
    """Let an agent with that host's certificate register. May be repeated; a registered host stays as it is.

    Raises INVALID_ARGUMENT for what cannot be the name of a host in a certificate, LEDGER_UNREACHABLE, also where the
    identity shown may not enrol hosts.
    """
    try:
        of_host("any", host)
    except BadName as error:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, str(error), field="host") from error
    async with opened(where) as store:
        try:
            await enrol(store, host)
        except StoreUnavailable as error:
            said = f"{host} could not be enrolled: {error}; hosts are enrolled by the identity role/admin"
            raise DroverError(RefusalReason.LEDGER_UNREACHABLE, said) from error
