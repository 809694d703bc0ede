"""The API's configuration file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.core.endpoint import split_address
from orchestrator.history import HistoryConfig
from orchestrator.ledger import paths
from orchestrator.ledger.records import BadRecord, decode_config


@dataclass(frozen=True, slots=True)
class ApiConfig:
    """`api.json`."""

    listen: tuple[str, ...]
    """Addresses to serve at, `host:port` or `unix:PATH`."""
    zookeeper: str
    """host:port[,host:port...]"""
    chroot: str = paths.CHROOT
    instructions: bool = False
    """Whether devices may be instructed on request: a device that is told to misbehave does."""
    metrics_listen: str = ""
    """`host:port` to serve metrics at; empty: none are served."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """The coordinator's history file, where the API can read it: what the ledger has forgotten is looked up there."""
    log_level: str = "info"


def load(path: Path) -> ApiConfig:
    """Raises OSError, BadRecord with the field that is wrong, or ValueError for an address that is none."""
    config = decode_config(ApiConfig, path.read_bytes(), path=str(path))
    if config.metrics_listen:
        split_address(config.metrics_listen)
    if problems := config.history.problems():
        raise BadRecord("; ".join(problems))
    return config
