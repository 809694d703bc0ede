"""The `fencing` section of the coordinator's configuration, and the fencers that it names."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.core.errors import invalid
from orchestrator.core.records import FencerEntry
from orchestrator.fencing.base import Fencer, Fencers
from orchestrator.fencing.exec import ExecFencer
from orchestrator.fencing.redfish import RedfishFencer


class FencerKind(StrEnum):
    """What stands behind a fencer: a program of the operator's, or the host's own management controller."""

    EXEC = "exec"
    REDFISH = "redfish"


@dataclass(frozen=True, slots=True)
class FencerConfig:
    """One fencer (docs/fencing.md)."""

    name: str
    """What the fencer is called in `drover host list` and in certificates."""
    kind: FencerKind
    """`exec`: a program of yours; `redfish`: the host's management controller."""
    hosts: tuple[str, ...]
    """Patterns of host names, `*` and `?` as in a shell. The first fencer of the list that fits serves a host."""
    timeout_s: float = 60.0
    """Of one try."""
    command: tuple[str, ...] = ()
    """exec: program and first arguments; `power-off HOST` follow."""
    environment: dict[str, str] = field(default_factory=dict[str, str])
    """exec: beside PATH, HOME and the locale, nothing else is passed on."""
    url: str = ""
    """redfish: https://CONTROLLER[:PORT]; `{host}` stands for the host's name."""
    system: str = ""
    """redfish: id of the computer system; `{host}` stands for the host's name."""
    credentials_file: str = ""
    """redfish: JSON with `username` and `password`; must be nobody else's to read."""
    verify_tls: bool = True
    """redfish: false trusts whoever answers."""
    ca_file: str = ""
    """redfish: certificates to trust instead of the system's."""


def make_fencers(configs: tuple[FencerConfig, ...]) -> Fencers:
    """Raises INVALID_ARGUMENT with everything that is wrong with the section."""
    bad = [problem for index, config in enumerate(configs) for problem in _problems(config, f"fencing[{index}]")]
    names = [config.name for config in configs]
    bad += [("fencing", f"there are two fencers {name!r}") for name in {n for n in names if names.count(n) > 1}]
    if bad:
        raise invalid(bad)
    return Fencers(
        tuple((FencerEntry(config.name, config.kind, config.hosts), _make(config)) for config in configs),
    )


def _make(config: FencerConfig) -> Fencer:
    if config.kind is FencerKind.EXEC:
        return ExecFencer(config.command, timeout_s=config.timeout_s, environment=config.environment)
    return RedfishFencer(
        config.url,
        config.system,
        Path(config.credentials_file) if config.credentials_file else None,
        verify_tls=config.verify_tls,
        ca_file=Path(config.ca_file) if config.ca_file else None,
        timeout_s=config.timeout_s,
    )


def _problems(config: FencerConfig, where: str) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    if not config.name:
        bad.append((f"{where}.name", "must not be empty"))
    if not config.hosts:
        bad.append((f"{where}.hosts", 'must name the hosts that it serves, such as ["rack1-*"]'))
    if not 1 <= config.timeout_s <= 600:
        bad.append((f"{where}.timeout_s", f"must be between 1 and 600 s, not {config.timeout_s:g}"))
    if config.kind is FencerKind.EXEC and not config.command:
        bad.append((f"{where}.command", "must name a program"))
    if config.kind is FencerKind.REDFISH:
        bad += _redfish_problems(config, where)
    return bad


def _redfish_problems(config: FencerConfig, where: str) -> list[tuple[str, str]]:
    bad: list[tuple[str, str]] = []
    url = urlsplit(config.url)
    if url.scheme not in ("https", "http") or not url.netloc or url.path not in ("", "/"):
        bad.append((f"{where}.url", f"must be https://CONTROLLER[:PORT], not {config.url!r}"))
    if url.username or url.password:
        bad.append((f"{where}.url", "must hold no credentials: name a credentials_file"))
    if not config.system or "/" in config.system:
        bad.append((f"{where}.system", "must be the id of a computer system, such as 1 or System.Embedded.1"))
    file = Path(config.credentials_file)
    if config.credentials_file and file.exists() and file.stat().st_mode & 0o077:
        bad.append((f"{where}.credentials_file", f"{file} must be readable by its owner only (chmod 600)"))
    return bad
