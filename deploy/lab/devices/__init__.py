"""Devices without hardware: scripted companions and emulated VFIO devices, in one process per VMM."""

from __future__ import annotations

import sys

PROGRAM = (sys.executable, "-m", "deploy.lab.devices.device_process")
"""What an agent runs for the devices of a VMM (AgentConfig.device_program)."""
