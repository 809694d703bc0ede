"""The configuration of an agent that a test runs in its own process."""

from __future__ import annotations

from pathlib import Path

from agents.config import AgentConfig
from deploy.lab.devices import PROGRAM


def agent_config(directory: Path, host: str = "h2") -> AgentConfig:
    """Everything below `directory`, which is there; the agent's own part of it is made."""
    (directory / host).mkdir(exist_ok=True)
    return AgentConfig(
        host=host,
        address="127.0.0.1",
        zookeeper="",
        dir=directory / host,
        console_dir=directory,
        volatile_dir=directory,
        memory_mib=1024,
        guest_image=directory / "guest.elf",
        device_program=PROGRAM,
    )
