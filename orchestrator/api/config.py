"""The API's configuration file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config import ConfigFile
from orchestrator.core.endpoint import split_address
from orchestrator.history import HistoryConfig
from orchestrator.ledger import paths
from orchestrator.pki.config import Tls


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """`api.yaml`."""

    listen: tuple[str, ...]
    """Addresses to serve at, `host:port` or `unix:PATH`."""
    zookeeper: str
    """host:port[,host:port...]"""
    chroot: str = paths.CHROOT
    """Where the tree stands in ZooKeeper: the same for agents, API and coordinator."""
    instructions: bool = False
    """Whether devices may be instructed on request: a device that is told to misbehave does."""
    metrics_listen: str = ""
    """`host:port` to serve metrics at; empty: none are served."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """The coordinator's history file, where the API can read it: what the ledger has forgotten is looked up there."""
    tls: Tls | None = None
    """The identity of the API, shown to ZooKeeper and agents. With it, callers by TCP need a certificate of the
    cluster, and its role allows what they may do. None: everybody may do everything."""
    log_level: str = "info"
    """debug, info, warning or error; lines are JSON, on standard error."""


def _problems(config: ApiConfig) -> Iterator[str]:
    try:
        if config.metrics_listen:
            split_address(config.metrics_listen)
    except ValueError as error:
        yield f"metrics_listen: {error}"
    yield from config.history.problems()


FILE = ConfigFile("api", ApiConfig, _problems)


def load(path: Path) -> ApiConfig:
    """Raises ConfigError with everything that is wrong."""
    return FILE.load(path)
