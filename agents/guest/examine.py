"""PURE. A running VMM that somebody else started: which guest it is, and what stands against taking it over.

All that is known of it is its command line and what it says of itself. From both follow a specification and a list of
live devices from which another host builds the same machine. What cannot be given to another host, and what is not
known for certain, is an obstacle; all of them are named, none is passed over.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from orchestrator.core.errors import RefusalReason
from orchestrator.core.guest import guest_errors
from orchestrator.core.offers import UNNAMED_CPUS, Obstacle
from orchestrator.core.records import (
    Boot,
    Cpu,
    DiskCache,
    DiskFormat,
    DiskSpec,
    Firmware,
    GuestSpec,
    LiveDevice,
    LiveMachine,
    NicSpec,
)
from orchestrator.core.text import clip

_R = RefusalReason

PERIPHERAL, ANONYMOUS, UNATTACHED = "/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached"

CODE, VARIABLES = "/machine/system.flash0", "/machine/system.flash1"
"""What a firmware of UEFI is in: its code, and the guest's variables."""

_FLAGS = frozenset(
    "daemonize nodefaults no-user-config nographic S no-shutdown no-reboot enable-kvm only-migratable "
    "snapshot no-fd-bootchk no-hpet no-acpi full-screen usb".split()
)
"""Options that take no value."""
_OWN_BUSINESS = frozenset(
    "daemonize nodefaults no-user-config nographic S no-shutdown no-reboot enable-kvm only-migratable name pidfile D d "
    "display vnc monitor qmp qmp-pretty mon chardev serial msg runas run-with sandbox trace accel action overcommit "
    "incoming uuid k".split()
)
"""Options that say how the process runs and not what the guest is, and those that are read elsewhere."""
_READ = frozenset("M machine cpu m smp kernel initrd append bios drive blockdev device netdev".split())
_HARMLESS = frozenset(
    {
        ("vga", "none"),
        ("net", "none"),
        ("nic", "none"),
        ("parallel", "none"),
        ("rtc", "base=utc"),
        ("boot", "strict=on"),
        ("usb", ""),
    }
)
_MACHINE_OPTIONS = frozenset({"accel", "dump-guest-core", "mem-merge"})
"""Of `-machine`, beside its type: they change nothing that the guest sees."""
_TAP_OPTIONS = frozenset({"id", "ifname", "script", "downscript", "queues", "br", "helper"})
_BEHIND = frozenset({"drive", "netdev"})
_REFERS = frozenset(
    "chardev chardevs iothread iothread-vq-mapping memdev rng fsdev audiodev tpmdev host hostdev sysfsdev "
    "socket fd vhostfd vhostfds".split()
)
"""Properties of devices that name something of the process or of its host."""
_PASSED = re.compile(r"(?:^|[,{\"])(?:fd|fds|vhostfd|vhostfds|vhostfd|guestfd)\"?[=:]\"?\d")
_CAPABILITIES = frozenset(
    {
        "events",
        "return-path",
        "pause-before-switchover",
        "multifd",
        "auto-converge",
        "late-block-activate",
        "switchover-ack",
        "validate-uuid",
    }
)
"""Of migrations: Drover sets them itself, or they do no harm."""
_CONNECTED = ("stdio", "pty", "mux", "vc:")


@dataclass(frozen=True, slots=True)
class Process:
    """What the kernel says."""

    pid: int
    start_time: int
    arguments: tuple[str, ...]
    taps: tuple[str, ...] = ()
    """Interfaces behind its open descriptors."""
    same_network: bool = True
    """It lives in the network namespace of the agent."""


@dataclass(frozen=True, slots=True)
class Here:
    """What this host has of all that the process names."""

    accelerator: str
    images: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Image, as the VMM says it -> pool and name in it. Not in it: in no pool."""
    boots: Mapping[str, str] = field(default_factory=dict[str, str])
    """Kernel or initrd, as the command line says it -> name of the image that is the same."""
    networks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Interface -> network that it is in."""
    same_bios: bool = True
    """The host's configuration names no BIOS of its own, and neither does the command line; or both name the same."""
    uefi_sha256: str = ""
    """Of the UEFI firmware that guests of this host are given, if the process runs the same. Empty: it does not."""
    same_variables: bool = False
    """Its UEFI variables have the size that this host's firmware has."""
    extra_args: tuple[str, ...] = ()
    """That the host's configuration allows."""


@dataclass(frozen=True, slots=True)
class Examined:
    """The guest that a process is."""

    spec: GuestSpec
    machine: LiveMachine
    nodes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Disk -> the VMM's name for what the guest's device writes to."""
    paths: Mapping[str, str] = field(default_factory=dict[str, str])
    """Live device -> its path in the VMM."""
    running: bool = True
    obstacles: tuple[Obstacle, ...] = ()


# --- the command line -------------------------------------------------------------------------------------------------


def options_of(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Option and value, in their order; a word that belongs to none is an option `""`."""
    found: list[tuple[str, str]] = []
    rest = iter(arguments[1:])
    for word in rest:
        if not word.startswith("-"):
            found.append(("", word))
            continue
        name = word.lstrip("-")
        found.append((name, "" if name in _FLAGS else next(rest, "")))
    return found


def settings_of(value: str, first: str = "") -> dict[str, str]:
    """`a=b,c` or JSON. `first` is what a leading word without `=` stands for; other such words are switches."""
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError:
            return {first or "": value}
        return {name: _plain(each) for name, each in cast("dict[str, object]", found).items()}
    words = [word.replace("\0", ",") for word in value.replace(",,", "\0").split(",")]
    settings: dict[str, str] = {}
    for number, word in enumerate(words):
        name, equals, given = word.partition("=")
        if equals:
            settings[name] = given
        elif number == 0 and first:
            settings[first] = word
        elif word:
            settings[word] = "on"
    return settings


def _plain(value: object) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def boot_files(arguments: Sequence[str]) -> dict[str, str]:
    """`kernel`, `initrd` and `bios` as the command line names them."""
    return {name: value for name, value in options_of(arguments) if name in ("kernel", "initrd", "bios")}


def disk_files(answers: Mapping[str, Any]) -> list[str]:
    """Names of the images that the VMM has open, as it says them."""
    return [str(block["inserted"]["file"]) for block in answers["query-block"] if "inserted" in block]


def flash(answers: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What the VMM says of the images of its UEFI firmware: `CODE`, `VARIABLES` -> image. Empty: it has none."""
    blocks = {str(block.get("qdev", "")): block for block in answers["query-block"] if "inserted" in block}
    return {place: blocks[place]["inserted"] for place in (CODE, VARIABLES) if place in blocks}


# --- all of it --------------------------------------------------------------------------------------------------------


class _Examination:
    """One look, with everything that was found against the guest so far."""

    def __init__(self, process: Process, answers: Mapping[str, Any], here: Here) -> None:
        self.process = process
        self.answers = answers
        self.here = here
        self.options = options_of(process.arguments)
        self.against: list[Obstacle] = []
        self.nodes: dict[str, str] = {}
        self.paths: dict[str, str] = {}
        self.disks: list[DiskSpec] = []
        self.nics: list[NicSpec] = []

    def refuse(self, reason: RefusalReason, said: str) -> None:
        if (reason, said) not in self.against:
            self.against.append((reason, said))

    def last(self, *names: str) -> str:
        return next((value for name, value in reversed(self.options) if name in names), "")


def examine(name: str, process: Process, answers: Mapping[str, Any], here: Here, wished: GuestSpec | None) -> Examined:
    """The guest that the process is, under that name, and everything that stands against taking it over.

    `wished` is the operator's own description, for what cannot be seen: labels, policy, what becomes of it with its
    host, and the names of disks (by pool and image) and cards (by MAC).
    """
    look = _Examination(process, answers, here)
    _state(look)
    _process(look)
    extra = _options(look)
    machine_type = str(answers["machine"]["type"]).removesuffix("-machine")
    model, cpu = _cpu(look)
    boot = _boot(look)
    _topology(look)
    devices = _devices(look, wished)
    memory_bytes = int(answers["machine"]["memory"]["size"])
    if memory_bytes % (1 << 20):
        look.refuse(_R.FEATURE_NOT_AVAILABLE, f"its memory of {memory_bytes} bytes is not a number of whole MiB")
    serials = sum(1 for kind in _unattached(answers) if kind == "isa-serial")
    machine = LiveMachine(
        type=machine_type,
        cpu=cpu,
        memory_mib=memory_bytes >> 20,
        vcpus=int(answers["machine"]["smp"]["cpus"]),
        firmware=boot.firmware,
        firmware_sha256={"uefi_code": here.uefi_sha256} if boot.firmware is Firmware.UEFI else {},
        devices=tuple(devices),
        serials=serials,
        uuid=_uuid(answers),
    )
    spec = GuestSpec(
        name=name,
        memory_mib=machine.memory_mib,
        vcpus=machine.vcpus,
        machine=machine_type,
        boot=boot,
        cpu=Cpu(model),
        disks=tuple(look.disks),
        nics=tuple(look.nics),
        extra_args=extra,
        system_uuid=machine.uuid,
    )
    if wished is not None:
        labels, policy, death = wished.labels, wished.policy, wished.on_host_death
        spec = replace(spec, labels=labels, policy=policy, on_host_death=death)
    for where, said in guest_errors(spec):
        look.refuse(_R.NOT_ADOPTABLE, f"it would be no guest of Drover's: {where} {said}")
    running = str(answers["query-status"]["status"]) == "running"
    return Examined(spec, machine, look.nodes, look.paths, running, tuple(look.against))


def _uuid(answers: Mapping[str, Any]) -> str:
    found = str(answers["query-uuid"]["UUID"])
    return "" if set(found) <= {"0", "-"} else found


def _state(look: _Examination) -> None:
    answers = look.answers
    status = str(answers["query-status"]["status"])
    if status not in ("running", "paused"):
        look.refuse(_R.GUEST_NOT_RUNNING, f"it neither runs nor is paused: its VMM says {status}")
    moving = str(answers["query-migrate"].get("status", "none"))
    if moving not in ("none", "completed", "failed", "cancelled"):
        look.refuse(_R.GUEST_IS_MIGRATING, f"somebody moves it just now: its migration is {moving}")
    for said in answers["query-migrate"].get("blocked-reasons", []):
        look.refuse(_R.DEVICE_NOT_MIGRATABLE, str(said))
    for job in answers["query-block-jobs"]:
        said = f"job {job['device']} ({job['type']}) works on one of its disks, and would end with the move"
        look.refuse(_R.BLOCK_JOB_RUNNING, said)
    for each in answers["query-migrate-capabilities"]:
        if each["state"] and each["capability"] not in _CAPABILITIES:
            said = f"somebody has set the capability {each['capability']} for its migrations: take it back"
            look.refuse(_R.NOT_ADOPTABLE, said)


def _process(look: _Examination) -> None:
    """What only that process has, and no other can be given."""
    for name, value in look.options:
        if _PASSED.search(value):
            look.refuse(_R.NOT_ADOPTABLE, f"-{name} {clip(value)}: it was given an open descriptor, which only it has")
    if "add-fd" in dict(look.options) or look.answers["query-fdsets"]:
        look.refuse(_R.NOT_ADOPTABLE, "it was given sets of open descriptors (-add-fd), which only it has")
    for each in look.answers["query-chardev"]:
        label, where = str(each["label"]), str(each["filename"])
        monitor = label.startswith("compat_monitor") or label in _monitors(look)
        taken = where.startswith(_CONNECTED) or "<->" in where
        if monitor and taken and label != look.answers.get("own-monitor", ""):
            look.refuse(
                _R.MONITOR_BUSY, f"its monitor {label} ({where}) is in somebody's hands: he could start it again"
            )


def _monitors(look: _Examination) -> set[str]:
    said = [settings_of(value, "chardev") for name, value in look.options if name == "mon"]
    said += [{"chardev": value.removeprefix("chardev:")} for name, value in look.options if name in ("qmp", "monitor")]
    return {each.get("chardev", "") for each in said}


def _options(look: _Examination) -> tuple[str, ...]:
    """Options that the guest takes along. Everything that is not known stands against it."""
    extra: list[str] = []
    for name, value in look.options:
        whole = f"-{name} {value}".strip()
        if name == "":
            look.refuse(_R.NOT_ADOPTABLE, f"{clip(value)}: a disk without an option cannot be taken over")
        elif name == "object":
            kind = settings_of(value, "qom-type").get("qom-type", "")
            look.refuse(_R.NOT_ADOPTABLE, f"-object {kind}: what else its VMM was given cannot be given to another one")
        elif name == "add-fd" or name in _OWN_BUSINESS or name in _READ or (name, value) in _HARMLESS:
            continue
        elif whole in look.here.extra_args:
            extra.append(whole)
        else:
            look.refuse(
                _R.EXTRA_ARGS_NOT_ALLOWED, f"it was started with {clip(whole)}, which no other VMM is given here"
            )
    for option in settings_of(look.last("M", "machine"), "type").items():
        if option[0] != "type" and option[0] not in _MACHINE_OPTIONS:
            _machine_option(look, *option)
    if look.answers["machine"].get("memory-backend", "/objects/pc.ram") != "/objects/pc.ram":
        look.refuse(
            _R.NOT_ADOPTABLE, "its memory is an object of its own (memory-backend), which no other VMM is given"
        )
    if {"slots", "maxmem"} & set(settings_of(look.last("m"), "size")) or look.answers["query-memory-devices"]:
        look.refuse(_R.FEATURE_NOT_AVAILABLE, "memory may be, or was, plugged into it while it runs (slots, maxmem)")
    return tuple(extra)


def _machine_option(look: _Examination, name: str, value: str) -> None:
    if name not in ("pflash0", "pflash1") and (name, value) not in (
        ("usb", "off"),
        ("graphics", "on"),
        ("vmport", "auto"),
    ):
        look.refuse(_R.NOT_ADOPTABLE, f"-machine {name}={value}: no other machine is built so here")


def _cpu(look: _Examination) -> tuple[str, str]:
    """The model, and all that was said of it."""
    said = look.last("cpu") or "qemu64"
    model, _, features = said.partition(",")
    if model in UNNAMED_CPUS:
        look.refuse(_R.CPU_NOT_AVAILABLE, f"its CPU is `{model}`: another one on each host, so no host can promise it")
    kept = ",".join(word for word in features.split(",") if word and word not in ("enforce", "check", "check=on"))
    accelerators = [settings_of(value, "accel").get("accel", "") for name, value in look.options if name == "accel"]
    if machine := settings_of(look.last("M", "machine"), "type").get("accel", ""):
        accelerators += machine.split(":")
    if "enable-kvm" in dict(look.options):
        accelerators.append("kvm")
    used = str(look.answers.get("accelerator", "")) or (accelerators or ["tcg"])[0]
    if used != look.here.accelerator:
        said_used = f"it runs under {used}, and guests of this host run under {look.here.accelerator}"
        look.refuse(_R.CPU_NOT_AVAILABLE, f"{said_used}: the state of its CPUs fits no other VMM here")
    return model, f"{model},{kept}" if kept else model


def _boot(look: _Examination) -> Boot:
    files = boot_files(look.process.arguments)
    if _has_flash(look):
        _uefi(look, files)
        return Boot(firmware=Firmware.UEFI)
    if not look.here.same_bios:
        said = "its BIOS is not the one that guests of this host are given (`firmware.bios` in the configuration)"
        look.refuse(_R.FIRMWARE_NOT_AVAILABLE, said)
    if "kernel" not in files:
        return Boot(firmware=Firmware.BIOS)
    for what in ("kernel", "initrd"):
        if what in files and files[what] not in look.here.boots:
            said = f"its {what} {clip(files[what])} is none of the images of this host: put the same file there"
            look.refuse(_R.IMAGE_NOT_FOUND, said)
    named = {what: look.here.boots.get(files[what], what) for what in ("kernel", "initrd") if what in files}
    return Boot(named.get("kernel", ""), named.get("initrd", ""), look.last("append"))


def _has_flash(look: _Examination) -> bool:
    told = any(settings_of(value).get("if") == "pflash" for name, value in look.options if name == "drive")
    return told or any(name.startswith("pflash") for name in settings_of(look.last("M", "machine"), "type"))


def _uefi(look: _Examination, files: Mapping[str, str]) -> None:
    """A build whose code is apart from the variables, and that another host has as well: the code is part of the
    machine, and the variables go along."""
    images = flash(look.answers)
    code, variables = images.get(CODE), images.get(VARIABLES)
    if code is None or variables is None or not code["ro"] or variables["ro"]:
        said = "its UEFI firmware is not made of code that it only reads and variables of its own (pflash0, pflash1)"
        look.refuse(_R.FIRMWARE_NOT_AVAILABLE, said)
        return
    for image in (code, variables):
        if image["drv"] not in ("raw", "file"):
            said = f"{image['file']} of its UEFI firmware is opened by {image['drv']}: here it is raw"
            look.refuse(_R.FIRMWARE_NOT_AVAILABLE, said)
    if not look.here.uefi_sha256:
        said = f"its UEFI firmware {code['file']} is not the one that guests of this host are given"
        look.refuse(_R.FIRMWARE_NOT_AVAILABLE, f"{said} (`firmware.uefi_code` in the configuration)")
    elif not look.here.same_variables:
        said = f"its UEFI variables {variables['file']} are of another size than those of this host's firmware"
        look.refuse(_R.FIRMWARE_NOT_AVAILABLE, said)
    if "kernel" in files:
        look.refuse(_R.NOT_ADOPTABLE, "it is given a kernel, and UEFI as well: a guest has one or the other here")


def _topology(look: _Examination) -> None:
    """Only what `-smp N` gives: the guest's CPUs have their places in the machine by it."""
    smp = {name: int(value) for name, value in look.answers["machine"]["smp"].items()}
    plain = smp["maxcpus"] == smp["cpus"] and smp["threads"] == 1 and smp["dies"] == 1
    if not plain or smp["cpus"] not in (smp["cores"], smp["sockets"]):
        said = f"{smp['cpus']} of {smp['maxcpus']} CPUs, {smp['sockets']} sockets, {smp['cores']} cores"
        look.refuse(_R.FEATURE_NOT_AVAILABLE, f"its CPUs are laid out in their own way ({said})")


# --- devices ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Told:
    """A device of the command line."""

    driver: str
    id: str
    properties: dict[str, str]


def _told(look: _Examination) -> list[_Told]:
    """In the order in which they were made: those in JSON and those of `-drive if=virtio` come last."""
    plain: list[_Told] = []
    virtio: list[_Told] = []
    as_json: list[_Told] = []
    for name, value in look.options:
        if name == "device":
            settings = settings_of(value, "driver")
            told = _Told(settings.pop("driver", ""), settings.pop("id", ""), settings)
            (as_json if value.startswith("{") else plain).append(told)
        elif name == "drive" and settings_of(value).get("if", "none") == "virtio":
            virtio.append(_Told("virtio-blk-pci", "", {}))
        elif name == "drive" and settings_of(value).get("if", "ide") not in ("none", "pflash"):
            kind = settings_of(value).get("if", "ide")
            said = f"-drive {clip(value)}: a disk behind {kind} cannot be taken over, one behind virtio can"
            look.refuse(_R.DEVICE_NOT_MIGRATABLE, said)
    return plain + virtio + as_json


def _devices(look: _Examination, wished: GuestSpec | None) -> list[LiveDevice]:
    live: dict[str, Mapping[str, Any]] = dict(look.answers["devices"])
    blocks = {_owner(str(block.get("qdev", ""))): block for block in look.answers["query-block"]}
    ids = {path.rpartition("/")[2] for path in live if path.startswith(PERIPHERAL + "/")}
    found: list[LiveDevice] = []
    anonymous = 0
    for told in _told(look):
        if told.id:
            path, own_id = f"{PERIPHERAL}/{told.id}", told.id
        else:
            path, own_id = f"{ANONYMOUS}/device[{anonymous}]", _free(f"anon{anonymous}", ids)
            anonymous += 1
        state = live.pop(path, None)
        if state is None:
            continue  # taken out since: the guest no longer sees it
        if not _same_kind(told.driver, str(state["type"])):
            said = f"device {path} is a {state['type']}, and its VMM was started with a {told.driver} there"
            look.refuse(_R.NOT_ADOPTABLE, f"{said}: it was changed while it ran")
            continue
        look.paths[own_id] = path
        found.append(_device(look, own_id, told, path, state, blocks.pop(path, None), wished))
    for path, state in live.items():
        said = f"device {path.rpartition('/')[2]} ({state['type']}) was added while it ran"
        look.refuse(
            _R.NOT_ADOPTABLE, f"{said}: its properties are not on the command line, so no other host can make it"
        )
    for owner, block in blocks.items():
        if "inserted" in block and owner not in (CODE, VARIABLES):
            where = owner or str(block.get("device", "")) or "nothing"
            said = f"{block['inserted']['file']} is behind {where}: only disks behind virtio-blk can be taken over"
            look.refuse(_R.DEVICE_NOT_MIGRATABLE, said)
    return found


def _same_kind(told: str, real: str) -> bool:
    """`virtio-blk` stands for virtio-blk-pci."""
    return told == real or f"{told}-pci" == real


def _free(wanted: str, ids: set[str]) -> str:
    while wanted in ids:
        wanted += "x"
    return wanted


def _owner(qdev: str) -> str:
    """Path of the device that a block device is a part of."""
    path = qdev.removesuffix("/virtio-backend")
    return path if not path or path.startswith("/") else f"{PERIPHERAL}/{path}"


def _device(
    look: _Examination,
    own_id: str,
    told: _Told,
    path: str,
    state: Mapping[str, Any],
    block: Mapping[str, Any] | None,
    wished: GuestSpec | None,
) -> LiveDevice:
    kind = str(state["type"])
    properties = {name: value for name, value in told.properties.items() if name not in {"bus", "addr", *_BEHIND}}
    for name in sorted(_REFERS & set(properties)):
        said = f"device {own_id} ({kind}) stands on {name}={clip(properties[name])}"
        look.refuse(_R.DEVICE_NOT_MIGRATABLE, f"{said}, which only its own VMM has")
    bus, address = _place(look, own_id, kind, state)
    backend = ""
    if "drive" in told.properties or block is not None:
        backend = _disk(look, own_id, kind, block, wished)
    elif state.get("netdev"):
        backend = _nic(look, own_id, str(state["netdev"]), str(state.get("mac", "")), properties, wished)
    if backend.startswith("nic:"):
        properties["mac"] = str(state.get("mac", ""))
    return LiveDevice(own_id, kind, bus, address, properties, backend)


def _place(look: _Examination, own_id: str, kind: str, state: Mapping[str, Any]) -> tuple[str, str]:
    bus, number = str(state.get("parent_bus", "")), state.get("addr")
    if bus.startswith(ANONYMOUS + "/"):
        look.refuse(_R.NOT_ADOPTABLE, f"device {own_id} ({kind}) sits behind a bridge without an id: {bus}")
    if not isinstance(number, int) or number < 0:
        said = f"device {own_id} is a {kind}, which is on no PCI bus"
        look.refuse(_R.DEVICE_NOT_MIGRATABLE, f"{said}: only PCI devices are built anew elsewhere")
        return bus.rpartition("/")[2], ""
    slot, function = number >> 3, number & 7
    return bus.rpartition("/")[2], f"0x{slot:x}.0x{function:x}" if function else f"0x{slot:x}"


def _named(wanted: str, taken: Sequence[str], kind: str) -> str:
    """A name that a disk or a card can have."""
    name = re.sub(r"[^a-z0-9-]", "-", wanted.lower()).strip("-")[:40]
    for word in (f"{kind}-", kind):
        name = name.removeprefix(word) if name != word else name
    name = name.strip("-") or str(len(taken))
    name = name if name[0].isalpha() else f"{kind}{name}"
    return name if name not in taken else f"{name}-{len(taken)}"


def _disk(look: _Examination, own_id: str, kind: str, block: Mapping[str, Any] | None, wished: GuestSpec | None) -> str:
    if block is None or "inserted" not in block:
        look.refuse(_R.DEVICE_NOT_MIGRATABLE, f"device {own_id} ({kind}) has a drive that its VMM says nothing of")
        return ""
    inserted = cast("Mapping[str, Any]", block["inserted"])
    file, said = str(inserted["file"]), f"the image {inserted['file']} of device {own_id}"
    if kind != "virtio-blk-pci":
        look.refuse(
            _R.DEVICE_NOT_MIGRATABLE, f"device {own_id} is a {kind}: only disks behind virtio-blk are taken over"
        )
    _image(look, said, inserted)
    pool, image = look.here.images.get(file, ("", ""))
    if not pool:
        look.refuse(_R.POOL_NOT_FOUND, f"{said} is in no pool of this host: add a pool of its directory")
        pool, image = "none", file.rpartition("/")[2] or "none"
    direct = bool(inserted["cache"]["direct"])
    names = {(disk.pool, disk.image): disk for disk in wished.disks} if wished is not None else {}
    known = names.get((pool, image))
    name = known.name if known is not None else _named(own_id, [disk.name for disk in look.disks], "disk")
    read_only = bool(inserted["ro"])
    look.disks.append(
        DiskSpec(
            name,
            pool,
            image,
            DiskFormat.RAW if inserted["drv"] == "raw" else DiskFormat.QCOW2,
            0 if read_only else int(inserted["image"]["virtual-size"]),
            DiskCache.NONE if direct else DiskCache.WRITEBACK,
            read_only,
        )
    )
    look.nodes[name] = str(inserted["node-name"])
    return f"disk:{name}"


def _image(look: _Examination, said: str, inserted: Mapping[str, Any]) -> None:
    if inserted["drv"] not in ("raw", "qcow2"):
        look.refuse(
            _R.DISK_NOT_MIGRATABLE, f"{said} is opened by {inserted['drv']}: only raw and qcow2 images can move"
        )
    if inserted.get("backing_file_depth") or "backing-filename" in inserted["image"]:
        look.refuse(_R.DISK_NOT_MIGRATABLE, f"{said} stands on another image: make it one first (block-stream)")
    if inserted.get("encrypted"):
        look.refuse(_R.DISK_NOT_MIGRATABLE, f"{said} is encrypted with a secret that only its VMM has")
    if any(inserted.get(limit) for limit in ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")):
        look.refuse(_R.DISK_NOT_MIGRATABLE, f"{said} is throttled, and the limits would be gone after the move")


def _nic(
    look: _Examination,
    own_id: str,
    netdev: str,
    mac: str,
    properties: Mapping[str, str],
    wished: GuestSpec | None,
) -> str:
    said = f"card {own_id}"
    told = [settings_of(value, "type") for name, value in look.options if name == "netdev"]
    given = next((each for each in told if each.get("id") == netdev), None)
    if given is None:
        look.refuse(_R.NOT_ADOPTABLE, f"{said} is on {netdev}, which is not on its command line")
        return ""
    kind = given.pop("type", "")
    if kind not in ("tap", "bridge"):
        look.refuse(_R.NETWORK_NOT_FOUND, f"{said} is on a network of kind {kind}: only taps in a bridge can follow it")
        return ""
    for name in sorted(set(given) - _TAP_OPTIONS):
        look.refuse(_R.NETWORK_NOT_FOUND, f"{said}: -netdev {kind} with {name} is not made elsewhere")
    ifname = given.get("ifname", "") or (look.process.taps[0] if len(set(look.process.taps)) == 1 else "")
    network = look.here.networks.get(ifname, "")
    if not look.process.same_network:
        look.refuse(_R.NETWORK_NOT_FOUND, f"{said} is in another network namespace than the agent of this host")
    elif not network:
        where = f"its tap {ifname}" if ifname else "its tap, whose name is not known,"
        look.refuse(_R.NETWORK_NOT_FOUND, f"{said}: {where} is in no bridge that a network of this host names")
    names = {nic.mac: nic.name for nic in wished.nics if nic.mac} if wished is not None else {}
    name = names.get(mac.lower()) or _named(own_id, [nic.name for nic in look.nics], "nic")
    mtu = properties.get("host_mtu", "0")
    look.nics.append(
        NicSpec(name, network or "none", mac.lower(), int(given.get("queues", "1")), int(mtu) if mtu.isdigit() else 0)
    )
    return f"nic:{name}"


# --- the machine that would be built ----------------------------------------------------------------------------------


def _unattached(answers: Mapping[str, Any]) -> list[str]:
    return [str(kind) for kind in answers["unattached"]]


def differences(live: Mapping[str, Any], built: Mapping[str, Any], examined: Examined) -> list[Obstacle]:
    """What the machine that another host would build, tried out here, has more or less than the one that runs."""
    found: list[str] = []
    there, here = Counter(_unattached(live)), Counter(_unattached(built))
    for kind in sorted((there - here) | (here - there)):
        found.append(f"{there[kind]} of {kind} in its machine, {here[kind]} in the one that would be built elsewhere")
    for own_id, path in examined.paths.items():
        was, would = live["devices"].get(path), built["devices"].get(f"{PERIPHERAL}/{own_id}")
        if was is not None and (would is None or _seen(was) != _seen(would)):
            found.append(f"device {own_id} would be another one elsewhere: {_seen(was)}, not {_seen(would or {})}")
    blocks, others = _renamed(live), _renamed(built)
    for name in sorted(set(blocks) ^ set(others)):
        where = "in its machine only" if name in blocks else "only in the machine that would be built elsewhere"
        found.append(f"a piece of memory called {name} is {where}")
    for name in sorted(set(blocks) & set(others)):
        if blocks[name] != others[name]:
            found.append(f"the piece of memory {name} has {blocks[name]} bytes, and would have {others[name]}")
    against: list[Obstacle] = [(_R.NOT_ADOPTABLE, each) for each in found]
    if live["features"] != built["features"]:
        said = "the CPU that it sees differs from the one that it would see elsewhere"
        against.append(
            (_R.CPU_NOT_AVAILABLE, f"{said}: it was started without `enforce`, or its features were changed")
        )
    return against


def _seen(state: Mapping[str, Any]) -> tuple[str, str, object]:
    return str(state.get("type", "")), str(state.get("parent_bus", "")).rpartition("/")[2], state.get("addr")


def _renamed(answers: Mapping[str, Any]) -> dict[str, int]:
    return {str(name): int(size) for name, size in answers["ram"].items()}
