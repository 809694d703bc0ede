"""What a QEMU offers: asked of one without a machine, which is started for the questions and ended."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from agents.engine.base import EngineError
from agents.engine.qemu import process
from agents.engine.qemu.bounded import bounded
from agents.engine.qemu.qmp import QmpConnection
from agents.host import processes


@dataclass(frozen=True, slots=True)
class Features:
    """What this QEMU offers, read from its own schema and not from its version."""

    version: str
    machine_types: tuple[str, ...]
    capabilities: frozenset[str]
    exit_on_error: bool
    late_activation_always: bool
    reconnect_ms: bool
    switchover_bandwidth: bool
    switchover_ack: str
    devices_inside: bool
    """It can be given vfio-pci devices by descriptor, and waits for their ACKs."""
    machine_aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """What `pc` and the like stand for."""
    channels: frozenset[str] = frozenset()
    """Commands that take what to connect to as data (`channels`) and not only as a URI; since 8.2."""
    cpu_models: tuple[str, ...] = ()
    """That it can give in full under this accelerator, `host` and its like left out."""
    cpu_definitions: Mapping[str, str] = field(default_factory=dict[str, str])
    """What `host` and `max` are here, in words: two hosts of the same words give a guest the same CPU."""


async def read_features(binary: str, accelerator: str) -> Features:
    """Of that program. Raises EngineError with QEMU's own last words."""
    directory = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="drover-probe-"))
    socket = directory / "q"
    # A host whose accelerator does not work is told so by its first guest; everything else can be read all the same.
    command = [
        binary,
        "-M",
        "none",
        "-accel",
        accelerator,
        "-accel",
        "tcg",
        "-nodefaults",
        "-display",
        "none",
        "-qmp",
        f"unix:{socket},server=on,wait=off",
    ]
    child = await processes.spawned(lambda: process.popen_leashed(command, directory / "log"))
    connection = QmpConnection("probe")
    vfio: list[dict[str, Any]] = []
    cpus: list[dict[str, Any]] = []
    definitions: dict[str, dict[str, Any]] = {}
    try:
        async with bounded("probe of QEMU", 10.0):
            connection = await _first_answer(socket, child, binary, directory / "log")
        version = await connection.execute("query-version")
        machines = await connection.execute("query-machines")
        schema = await connection.execute("query-qmp-schema", timeout_s=4.0)
        with contextlib.suppress(EngineError):  # one that does not say: every model may be tried then
            cpus = await connection.execute("query-cpu-definitions", timeout_s=4.0)
        with contextlib.suppress(EngineError):  # one that does not say: no guest is given one of these then
            definitions = await _cpu_definitions(connection, accelerator)
        with contextlib.suppress(EngineError):  # a QEMU without that device
            vfio = await connection.execute("device-list-properties", {"typename": "vfio-pci"})
    except EngineError as error:
        ended = "QEMU runs" if child.poll() is None else f"QEMU ended with {child.returncode}"
        raise EngineError(f"{error} ({ended}: {processes.tail_of(directory / 'log')})") from error
    finally:
        await connection.close()
        await asyncio.to_thread(processes.end_leashed, child)
        await asyncio.to_thread(shutil.rmtree, directory, True)
    found = features_of(version, machines, schema, {entry["name"] for entry in vfio})
    whole = (cpu["name"] for cpu in cpus if cpu.get("unavailable-features") == [] and cpu.get("migration-safe"))
    addresses = await asyncio.to_thread(_address_sizes) if accelerator == "kvm" else ""
    told = {model: cpu_words(props, found.version, addresses) for model, props in definitions.items()}
    return replace(found, cpu_models=tuple(sorted(whole)), cpu_definitions=told)


async def _cpu_definitions(connection: QmpConnection, accelerator: str) -> dict[str, dict[str, Any]]:
    """Properties of the models that are another CPU on each host, as far as guests can have them here."""
    kvm = bool((await connection.execute("query-kvm"))["enabled"])
    if kvm != (accelerator == "kvm"):
        return {}  # QEMU fell back: its guests' CPU is not seen here
    found: dict[str, dict[str, Any]] = {}
    for model in ("host", "max") if kvm else ("max",):
        asked = {"type": "full", "model": {"name": model}}
        found[model] = (await connection.execute("query-cpu-model-expansion", asked, timeout_s=4.0))["model"]["props"]
    return found


_CPU_VALUES = frozenset(
    "vendor family model stepping model-id level xlevel level-func7 min-level min-xlevel phys-bits ucode-rev".split()
)
"""Of a CPU model's properties, beside its features: what the guest reads of them."""


def cpu_words(props: Mapping[str, Any], version: str, addresses: str = "") -> str:
    """What a CPU is, in sorted words. `version` is part of it: what no property says is QEMU's own business."""
    words = {name.replace("_", "-") for name, value in props.items() if value is True}
    words |= {f"{name}={value}".replace(" ", "-") for name, value in props.items() if name in _CPU_VALUES and value}
    return " ".join(sorted({*words, f"qemu={version}", *([f"addresses={addresses}"] if addresses else [])}))


def _address_sizes() -> str:
    """Blocking. Of the host's CPU, which its guests have under KVM; empty: the kernel does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "address sizes":
                return value.strip().replace(" ", "-")
    return ""


async def _first_answer(socket: Path, child: subprocess.Popen[bytes], binary: str, log: Path) -> QmpConnection:
    """The socket's file is there before anybody listens on it: tried until it answers. The caller bounds it."""
    while True:
        connection = QmpConnection("probe")
        try:
            await connection.connect(socket, 2.0)
            return connection
        except EngineError:
            await connection.close()
            if child.poll() is not None:
                raise EngineError(f"{binary} does not start: {processes.tail_of(log)}") from None
            await asyncio.sleep(0.01)


def features_of(
    version: Mapping[str, Any], machines: list[dict[str, Any]], schema: list[dict[str, Any]], vfio: set[str]
) -> Features:
    """From its answers to query-version, query-machines and query-qmp-schema, and the properties of its vfio-pci."""
    by_name = {entry["name"]: entry for entry in schema}

    def members(type_name: str) -> set[str]:
        return {member["name"] for member in by_name[type_name].get("members", [])}

    def takes(command: str) -> set[str]:
        return members(by_name[command]["arg-type"])

    enums = [set(entry["values"]) for entry in schema if entry["meta-type"] == "enum"]
    capabilities = next((values for values in enums if {"return-path", "xbzrle"} <= values), set[str]())
    objects = [{m["name"] for m in entry["members"]} for entry in schema if entry["meta-type"] == "object"]
    # The per-device acknowledgement came together with the top-level `remaining` of query-migrate.
    per_device = "remaining" in members(by_name["query-migrate"]["ret-type"])
    ack = "none" if "switchover-ack" not in capabilities else "per-device" if per_device else "legacy"
    numbers = version["qemu"]
    aliases = {machine["alias"]: machine["name"] for machine in machines if "alias" in machine}
    names = {machine["name"] for machine in machines} | set(aliases)
    return Features(
        version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}",
        machine_types=tuple(sorted(names)),
        machine_aliases=aliases,
        capabilities=frozenset(capabilities),
        exit_on_error="exit-on-error" in takes("migrate-incoming"),
        late_activation_always="blockdev-set-active" in by_name,
        reconnect_ms=any("reconnect-ms" in names for names in objects),
        switchover_bandwidth="avail-switchover-bandwidth" in takes("migrate-set-parameters"),
        switchover_ack=ack,
        channels=frozenset(each for each in ("migrate", "migrate-incoming") if "channels" in takes(each)),
        devices_inside=ack != "none" and {"fd", "iommufd", "migration-events"} <= vfio,
    )
