"""The coordinator's configuration file, and the parts that it names."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from orchestrator.config import ConfigFile
from orchestrator.coordinator.ports import AgentDirectory
from orchestrator.coordinator.ray_head import RayHeadConfig
from orchestrator.coordinator.supervisor import Limits
from orchestrator.core.endpoint import split_address
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.retention import Retention
from orchestrator.core.shards import MAX_SHARDS
from orchestrator.fencing.base import Fencers
from orchestrator.fencing.config import FencerConfig, make_fencers
from orchestrator.history import HistoryConfig, HistoryFile
from orchestrator.ledger import paths
from orchestrator.ledger.store import Store
from orchestrator.pki.config import Tls


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """`coordinator.yaml`. Every process of the coordinator, also inside Ray, is made from it."""

    zookeeper: str
    """host:port[,host:port...]"""
    ray_address: str
    """host:port of the head's GCS."""
    shards: int = 1
    """Into so many parts the fleet is shared out, each led by one coordinator (docs/operations.md). The same for every
    seat."""
    name: str = "coordinator"
    """Of this seat: a coordinator that starts anew takes over what its predecessor of that name led. Of several seats
    each needs a name of its own."""
    chroot: str = paths.CHROOT
    """Where the tree stands in ZooKeeper: the same for agents, API and coordinator."""
    ray_token_file: str = ""
    """Empty: the cluster runs without token authentication."""
    ray_head: RayHeadConfig = field(default_factory=RayHeadConfig)
    """The Ray head that this coordinator starts at `ray_address`, and ends with it (packages do it so)."""
    ray_namespace: str = "drover"
    """Of the actors, in a Ray cluster that others use as well."""
    workers: int = 2
    """Worker processes. One carries 1,000 migrations; the second is there for fail-over."""
    max_arrivals: int = 0
    """Migrations towards one host at a time; 0: as many as its memory takes."""
    metrics_listen: str = ""
    """`host:port` that the coordinator's actor serves metrics at; empty: none are served."""
    log_level: str = "info"
    """Of the process outside Ray and of every actor: debug, info, warning or error."""
    limits: Limits = field(default_factory=Limits)
    """How many migrations begin, and run, at a time."""
    fencing: tuple[FencerConfig, ...] = ()
    """Who can cut which host's power (docs/fencing.md). Used by the leader alone."""
    retention: Retention = field(default_factory=Retention)
    """How long what is over is kept (docs/operations.md)."""
    history: HistoryConfig = field(default_factory=HistoryConfig)
    """Where what is removed is written first."""
    tls: Tls | None = None
    """Its identity, wherever its processes run: what it shows to ZooKeeper and to agents."""
    store_factory: str = "orchestrator.ledger.zookeeper:ZooKeeperStore"
    """module:callable, called with `zookeeper`, `chroot=` and, where there is an identity, its directory as `tls=`,
    returns a Store."""
    agents_factory: str = "orchestrator.coordinator.agents:RpcAgents"
    """module:callable, called with nothing or, where there is an identity, its directory as `tls=`, returns an
    AgentDirectory."""


def _problems(config: CoordinatorConfig) -> Iterator[str]:
    try:
        if config.metrics_listen:
            split_address(config.metrics_listen)
    except ValueError as error:
        yield f"metrics_listen: {error}"
    if config.ray_head.directory and not Path(config.ray_head.directory).is_absolute():
        yield f"ray_head.directory: is {config.ray_head.directory!r}: give an absolute path"
    if not config.ray_address.rpartition(":")[2].isdigit():
        yield f"ray_address: must be host:port, not {config.ray_address!r}"
    if not 1 <= config.shards <= MAX_SHARDS:
        yield f"shards: must be from 1 to {MAX_SHARDS}"


FILE = ConfigFile("coordinator", CoordinatorConfig, _problems)


def load(path: Path) -> CoordinatorConfig:
    """Raises ConfigError with everything that is wrong."""
    return FILE.load(path)


def _resolve(name: str) -> object:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_store(config: CoordinatorConfig) -> Store:
    """The store that the configuration names, not started yet. Raises ImportError or AttributeError when it names
    nothing."""
    factory = _resolve(config.store_factory)
    assert callable(factory)
    secured = {} if config.tls is None else {"tls": config.tls.directory}
    return cast(Store, factory(config.zookeeper, chroot=config.chroot, **secured))


def make_agents(config: CoordinatorConfig) -> AgentDirectory:
    """The agents' directory that the configuration names. Raises ImportError or AttributeError when it names
    nothing."""
    factory = _resolve(config.agents_factory)
    assert callable(factory)
    secured = {} if config.tls is None else {"tls": config.tls.directory}
    return cast(AgentDirectory, factory(**secured))


def fencers_of(config: CoordinatorConfig) -> Fencers:
    """Raises DroverError with everything that is wrong with the section `fencing`."""
    return make_fencers(config.fencing)


def check(config: CoordinatorConfig) -> None:
    """Raises DroverError with everything that is wrong with what `decode` cannot judge."""
    problems = [f"retention.{problem}" for problem in config.retention.problems()] + config.history.problems()
    if problems:
        raise DroverError(RefusalReason.INVALID_ARGUMENT, "; ".join(problems))


def history_of(config: CoordinatorConfig) -> HistoryFile | None:
    """None: what is removed is gone."""
    return HistoryFile(config.history) if config.history.path else None
