"""The configuration of an agent that a test runs in its own process."""

from __future__ import annotations

from pathlib import Path

from agents.config import AgentConfig
from deploy.lab.devices import PROGRAM
from orchestrator.core.identity import AgentIdentity
from orchestrator.core.ids import HostRef


def agent_config(directory: Path, host: str = "h2") -> AgentConfig:
    """Everything below `directory`, which is there; the agent's own part of it is made."""
    (directory / host).mkdir(exist_ok=True)
    return AgentConfig(
        host=host,
        address="127.0.0.1",
        zookeeper="127.0.0.1:1",
        dir=directory / host,
        console_dir=directory,
        volatile_dir=directory,
        memory_mib=1024,
        guest_image=directory / "guest.elf",
        device_program=PROGRAM,
    )


def agent_identity(here: HostRef, *, agent: str = "a1", machine: str = "m", lock: str = "1:1") -> AgentIdentity:
    """Of an agent process of a host; another one of the same host and lock is its successor."""
    return AgentIdentity("", f"{machine}-{here.host}", here.boot_id, agent, lock)
