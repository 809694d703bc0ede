"""What an operator may choose about a local cluster."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy.lab.cluster.layout import Layout, LocalClusterError
from orchestrator.cli.directory import default_dir

PartKind = Literal["zookeeper", "ray", "agent", "api", "coordinator", "collector"]

_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg])bit", re.IGNORECASE)
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


def rate_bps(text: str) -> int:
    """ "1gbit", "100mbit", "2.5gbit" in bits per second. ValueError for anything else."""
    found = _RATE.fullmatch(text.strip())
    if not found or not float(found[1]):
        raise ValueError(f"not a bandwidth: {text!r}; write for example 1gbit, 2.5gbit or 100mbit")
    return int(float(found[1]) * _UNITS[found[2].lower()])


class LocalConfig(BaseModel):
    """One local cluster. The defaults are a cluster of four hosts that fits two cores and a few GiB."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dir: Path = Field(default_factory=default_dir)
    hosts: Annotated[int, Field(ge=1, le=64)] = 4
    bandwidth: str = "1gbit"
    """Per host and direction."""
    shape: bool = True
    """False: no bandwidth limit."""
    memory_mib: Annotated[int, Field(ge=64)] = 8192
    """What guests on one host may take together."""
    chaos: bool = False
    """Allow `drover chaos`."""
    accelerator: Literal["tcg", "kvm"] = "tcg"
    qemu: str = "qemu-system-x86_64"
    qemu_on: dict[str, str] = Field(default_factory=dict[str, str])
    """Another QEMU on some hosts, by name: a cluster in the middle of an upgrade."""
    libvirt_on: dict[str, Path] = Field(default_factory=dict[str, Path])
    """Hosts whose guests a libvirt daemon runs, by name: its socket. Their agents need its Python binding."""
    guest_image: Path | None = None
    """Of guests that name no kernel. None: $DROVER_GUEST_IMAGE, else the one built from deploy/lab/guest_image."""
    images: Path | None = None
    """Directory of the images that guests may name."""
    shims: dict[str, str] = Field(default_factory=dict[str, str])
    """Programs for external devices, as agents know them: name -> unix socket; {host} in it is filled in."""
    tls: bool = False
    """The parts have certificates: ZooKeeper lets in nobody else and knows who asks, memory and disks go by TLS."""
    zookeeper: Literal[1, 3, 5] = 1
    """Servers of the ensemble; three bear the loss of one."""
    coordinators: Annotated[int, Field(ge=1, le=4)] = 1
    """Seats, each with a Ray head of its own."""
    shards: Annotated[int, Field(ge=1, le=64)] = 1
    """Into so many the fleet is shared out among the coordinators."""
    apis: Annotated[int, Field(ge=1, le=4)] = 1
    ray_cpus: Annotated[int, Field(ge=1)] = 2
    workers: Annotated[int, Field(ge=1, le=16)] = 2
    """Ray actors that drive migrations; two for fail-over, one carries a thousand."""
    max_concurrent_migrations: Annotated[int, Field(ge=1)] = 64
    max_per_source: Annotated[int, Field(ge=1)] = 8
    """Migrations that leave one host at a time; they share its bandwidth."""
    start_rate_per_s: Annotated[float, Field(gt=0)] = 125.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    start_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """`drover up` gives up after this."""
    commands: dict[PartKind, list[str]] = Field(default_factory=dict[PartKind, list[str]])
    """Other programs in place of the usual ones, for tests: {dir} {host} {config} are filled in, [] leaves one out."""

    @model_validator(mode="after")
    def _knows_its_hosts(self) -> LocalConfig:
        unknown = sorted({*self.qemu_on, *self.libvirt_on} - {f"host-{n}" for n in range(1, self.hosts + 1)})
        if unknown:
            raise ValueError(f"there is no host {', '.join(unknown)} to give another QEMU or libvirt to")
        return self

    @field_validator("bandwidth")
    @classmethod
    def _is_bandwidth(cls, value: str) -> str:
        rate_bps(value)
        return value

    @property
    def layout(self) -> Layout:
        """Where this cluster's files are. Creates nothing."""
        return Layout.of(self.dir)

    @property
    def servers(self) -> dict[str, int]:
        """How many there are of each kind of which there may be several."""
        return {"zookeeper": self.zookeeper, "api": self.apis, "coordinator": self.coordinators}

    @property
    def bandwidth_bps(self) -> int:
        """Of each host's link and direction, in bits per second."""
        return rate_bps(self.bandwidth)


def make(**values: Any) -> LocalConfig:
    """A configuration from options; one line for the operator, as LocalClusterError, about what is wrong with them."""
    try:
        return LocalConfig(**values)
    except ValidationError as error:
        raise LocalClusterError(_one_line(error)) from None


def load(path: Path) -> LocalConfig:
    """Read what `up` wrote for the supervisor."""
    try:
        return LocalConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise LocalClusterError(f"{path}: {_one_line(error)}") from None
    except OSError as error:
        raise LocalClusterError(f"{path}: {error.strerror}; start the cluster with `drover up`") from None


def _one_line(error: ValidationError) -> str:
    problems = (f"{'.'.join(map(str, p['loc']))}: {p['msg'].removeprefix('Value error, ')}" for p in error.errors())
    return "; ".join(problems)
