"""PURE. A domain of libvirt's as a guest file (docs/import.md).

Nothing of a domain is lost in silence: what cannot be kept is refused by its path, what is left out is told with the
reason. What only the operator knows is given: which pool a directory is, and which network a bridge.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from orchestrator.cli.accounted import Said, account
from orchestrator.cli.libvirt_words import DOMAIN, TPM_STATE, VARIABLES
from orchestrator.cli.plain_xml import Node, XmlError, parse
from orchestrator.core.naming import file_error, name_error
from orchestrator.core.text import quoted

_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": _KIB,
    "b": 1,
    "bytes": 1,
    "KB": 1000,
    "k": _KIB,
    "KiB": _KIB,
    "MB": 1000**2,
    "M": _MIB,
    "MiB": _MIB,
    "GB": 1000**3,
    "G": _GIB,
    "GiB": _GIB,
}
_BUS_BY_NAME = {"vd": "virtio", "sd": "scsi", "hd": "ide", "fd": "fdc", "xvd": "xen", "ubd": "uml"}
_DEFAULT_CARD = "rtl8139"
_LIBVIRT_CPU = "qemu64"


@dataclass(frozen=True, slots=True)
class Choices:
    """What the operator says about a domain."""

    pools: Mapping[str, str] = field(default_factory=dict[str, str])
    """Directory, or name of a pool of libvirt's -> pool of the hosts."""
    networks: Mapping[str, str] = field(default_factory=dict[str, str])
    """Bridge, or name of a network of libvirt's -> network of the hosts."""
    cpu: str = ""
    """Instead of the CPU that the domain names."""
    name: str = ""
    without: tuple[str, ...] = ()
    """Paths of what is left out although the guest loses by it."""


@dataclass(frozen=True, slots=True)
class Imported:
    """A guest as its file has it, and what of the domain is not in it."""

    guest: dict[str, Any]
    left_out: tuple[Said, ...]


class ImportRefused(Exception):
    """The domain cannot become a guest as it is: everything that stands against it."""

    def __init__(self, problems: list[Said]) -> None:
        super().__init__("\n".join(f"{each.path}: {each.text}" for each in problems))
        self.problems = tuple(problems)


def convert(data: bytes, choices: Choices) -> Imported:
    """Raises ImportRefused, and XmlError when it is no XML of a domain."""
    top = parse(data)
    if top.tag != "domain":
        said = "is the state of a running domain: give what `virsh dumpxml --inactive` prints"
        raise XmlError(said if top.tag == "domstatus" else f"has a <{top.tag}>, not a <domain>", top.line)
    _write_out(top)
    accounted = account(top, DOMAIN, choices.without)
    reader = _Reader(accounted.kept, choices)
    guest = reader.guest()
    refused = {each.path for each in accounted.refused}
    problems = accounted.refused + [each for each in reader.problems if each.path not in refused]
    problems += [Said(path, 0, "is to be done without, and is not there") for path in accounted.unused]
    if problems:
        raise ImportRefused(sorted(problems, key=lambda said: said.line))
    return Imported(guest, tuple(sorted(accounted.left_out + reader.left_out, key=lambda said: said.line)))


def _write_out(top: Node) -> None:
    """Put into words what libvirt takes for granted."""
    devices = top.child("devices")
    if devices is None:
        return
    for disk in devices.all("disk"):
        disk.attributes.setdefault("device", "disk")
        target = disk.child("target")
        if target is not None and "bus" not in target.attributes:
            target.attributes["bus"] = _BUS_BY_NAME.get(re.sub(r"[a-z]$", "", target.get("dev")), "unknown")
    for nic in devices.all("interface"):
        model = nic.child("model")
        if model is None:
            model = Node("model", nic.line)
            nic.children.append(model)
        model.attributes.setdefault("type", _DEFAULT_CARD)


class _Reader:
    """Makes the guest out of what was kept of a domain."""

    def __init__(self, kept: Node, choices: Choices) -> None:
        self._top = kept
        self._choices = choices
        self.problems: list[Said] = []
        self.left_out: list[Said] = []

    def guest(self) -> dict[str, Any]:
        """As the guest file has it. Sound only if there are no problems."""
        found: dict[str, Any] = {"name": self._name()}
        found["memory"] = f"{self._memory_mib()}MiB"
        found["vcpus"] = vcpus = self._number(self._top.child("vcpu"), 1)
        found["machine"] = self._machine()
        found["cpu"] = {"model": self._cpu(vcpus)}
        found["boot"] = boot = self._boot()
        disks = self._disks(direct="firmware" not in boot)
        if disks:
            found["disks"] = disks
        nics = self._nics()
        if nics:
            found["nics"] = nics
        if (tpm := self._top.child("devices", "tpm")) is not None:
            found["tpm"] = {"version": "2.0", "state": f"{found['name']}.permall"}
            self.left_out.append(Said("/domain/devices/tpm", tpm.line, f"{TPM_STATE} {found['tpm']['state']}"))
        if (uuid := self._top.child("uuid")) is not None:
            found["system_uuid"] = self._uuid(uuid)
            found["labels"] = {"libvirt-uuid": found["system_uuid"]}
        return found

    def _uuid(self, node: Node) -> str:
        digits = node.text.lower().replace("-", "")
        if len(digits) != 32:
            self._wrong("/domain/uuid", node, f"is no uuid: {quoted(node.text)}")
        ends = (0, 8, 12, 16, 20, 32)
        return "-".join(digits[begin:end] for begin, end in pairwise(ends))

    def _wrong(self, path: str, node: Node | None, text: str) -> None:
        self.problems.append(Said(path, (node or self._top).line, text))

    def _name(self) -> str:
        node = self._top.child("name")
        if self._choices.name or node is None:
            name = self._choices.name
            wrong = name_error(name) if name else "is missing"
            if node is not None:
                self.left_out.append(Said("/domain/name", node.line, f"the guest is {name}, as asked"))
        else:
            name = node.text
            wrong = name_error(name)
        if wrong:
            self._wrong("/domain/name", node, f"{wrong}: give the guest its name with --name")
        return name

    def _number(self, node: Node | None, otherwise: int) -> int:
        return int(node.text) if node is not None and node.text.isdecimal() else otherwise

    def _memory_mib(self) -> int:
        node = self._top.child("memory")
        if node is None:
            self._wrong("/domain/memory", None, "is missing")
            return 0
        count = self._number(node, 0) * _UNITS.get(node.get("unit"), 0)
        if count % (1 << 20):
            self._wrong("/domain/memory", node, f"must be whole MiB, not {count} bytes: change it there (virsh edit)")
        return count >> 20

    def _machine(self) -> str:
        node = self._top.child("os", "type")
        machine = node.get("machine") if node is not None else ""
        if not machine:
            self._wrong("/domain/os/type/@machine", node, "is missing: give what `virsh dumpxml --inactive` prints")
        return machine

    def _cpu(self, vcpus: int) -> str:
        node = self._top.child("cpu")
        self._topology(node, vcpus)
        mode = node.get("mode", "custom") if node is not None else "custom"
        model = node.child("model") if node is not None else None
        if self._choices.cpu:
            if node is not None:
                self.left_out.append(Said("/domain/cpu", node.line, f"the CPU is {self._choices.cpu}, as asked"))
            return self._choices.cpu
        if mode != "custom":
            said = "the CPU is the old host's: name a model that all hosts have with --cpu"
            self._wrong("/domain/cpu/@mode", node, f"is {quoted(mode)}: {said}")
            return ""
        if model is None:  # libvirt leaves it to QEMU then, which takes this one
            return _LIBVIRT_CPU
        return model.text

    def _topology(self, cpu: Node | None, vcpus: int) -> None:
        node = cpu.child("topology") if cpu is not None else None
        if node is None:
            if vcpus > 1:
                said = "the vCPUs are the cores of one socket here; libvirt made each of them a socket of its own"
                self.left_out.append(Said("/domain/vcpu", self._top.line, said))
            return
        given = {name: self._number(Node("", 0, text=node.get(name, "1")), 0) for name in node.attributes}
        if given.pop("cores", 1) != vcpus or any(number != 1 for number in given.values()):
            self._wrong("/domain/cpu/topology", node, f"the vCPUs are the cores of one socket here: {vcpus} cores")

    # --- what it boots ------------------------------------------------------------------------------------------------

    def _boot(self) -> dict[str, Any]:
        node = self._top.child("os") or Node("os", self._top.line)
        loader, kernel = node.child("loader"), node.child("kernel")
        if loader is not None:
            self.left_out.append(Said("/domain/os/loader", loader.line, "each host has firmware of its own"))
            if loader.get("type", "rom") == "rom" and "bios" not in posixpath.basename(loader.text):
                self._wrong("/domain/os/loader", loader, f"is {quoted(loader.text)}: firmware is SeaBIOS or UEFI here")
        uefi = node.get("firmware") == "efi" or (loader is not None and loader.get("type") == "pflash")
        if kernel is None:
            for tag in ("initrd", "cmdline"):
                if (found := node.child(tag)) is not None:
                    self._wrong(f"/domain/os/{tag}", found, "goes with a kernel, and there is none")
            return {"firmware": "uefi", **self._variables(node)} if uefi else {"firmware": "bios"}
        if uefi:
            self._wrong("/domain/os/kernel", kernel, "a kernel is started directly or found by UEFI, not both")
        boot: dict[str, Any] = {"kernel": self._image(kernel)}
        if (initrd := node.child("initrd")) is not None:
            boot["initrd"] = self._image(initrd)
        if (cmdline := node.child("cmdline")) is not None and cmdline.text:
            if "${name}" in cmdline.text or "${uuid}" in cmdline.text:
                self._wrong("/domain/os/cmdline", cmdline, "has ${name} or ${uuid}, which would be the guest's here")
            boot["append"] = cmdline.text
        return boot

    def _variables(self, os: Node) -> dict[str, str]:
        """A domain that was never started has none."""
        node = os.child("nvram")
        if node is None:
            return {}
        source = node.child("source")
        given = source.get("file") if source is not None else node.text
        if not given:
            return {}
        name = posixpath.basename(given)
        if wrong := file_error(name, "the host's directory of images"):
            self._wrong("/domain/os/nvram", node, wrong)
        self.left_out.append(Said("/domain/os/nvram", node.line, f"{VARIABLES} {name}"))
        return {"nvram": name}

    def _image(self, node: Node) -> str:
        name = posixpath.basename(node.text)
        path = f"/domain/os/{node.tag}"
        if wrong := file_error(name, "each host's directory of images"):
            self._wrong(path, node, wrong)
        said = f"each host needs the file as {name} in its directory of images (`images` in its configuration)"
        self.left_out.append(Said(f"{path}/text()", node.line, said))
        return name

    # --- disks --------------------------------------------------------------------------------------------------------

    def _disks(self, *, direct: bool) -> list[dict[str, Any]]:
        disks = self._all("disk")
        found = [self._disk(path, node) for path, node in disks]
        orders = [(int(order), number) for number, order in enumerate(_order(node) for _, node in disks) if order]
        of_os = (self._top.child("os") or self._top).all("boot")
        first = min(orders)[1] if orders else None
        if first is None and any(boot.get("dev") == "hd" for boot in of_os):
            first = next((number for number, (_, node) in enumerate(disks) if node.get("device") == "disk"), None)
        if direct and (orders or of_os):
            self.left_out.append(Said("/domain/os/boot", self._top.line, "the kernel is started directly"))
        elif first is not None:
            found[first]["boot"] = True
            later = "the firmware looks at the boot disk first, and at the others as they stand in the guest file"
            for number, (path, node) in enumerate(disks):
                if number != first and _order(node):
                    self.left_out.append(Said(f"{path}/boot/@order", node.line, later))
        return found

    def _disk(self, path: str, node: Node) -> dict[str, Any]:
        driver, target = node.child("driver"), node.child("target")
        name = target.get("dev") if target is not None else ""
        if not name:
            self._wrong(f"{path}/target/@dev", node, "is missing")
        pool, image = self._where(path, node)
        found: dict[str, Any] = {"name": name, "pool": pool, "image": image}
        # Without a word on it libvirt takes every image for a raw one: what it holds is not guessed.
        found["format"] = (driver.get("type") if driver is not None else "") or "raw"
        cache = driver.get("cache") if driver is not None else ""
        if cache:
            found["cache"] = cache
        if node.get("device") == "cdrom" or node.child("readonly") is not None:
            found["read_only"] = True
        return found

    def _where(self, path: str, node: Node) -> tuple[str, str]:
        """Pool and image. Empty where a problem says why."""
        source, kind = node.child("source"), node.get("type")
        wanted = {"file": "file", "block": "dev", "volume": "volume"}.get(kind, "")
        value = source.get(wanted) if source is not None else ""
        if not wanted:
            return "", ""  # refused already
        place = f"{path}/source/@{wanted}"
        for name in source.attributes if source is not None else ():
            if name != wanted and (kind, name) != ("volume", "pool"):
                self._wrong(f"{path}/source/@{name}", node, f"does not go with a disk of type {kind}")
        if not value:
            self._wrong(place, node, "is missing")
            return "", ""
        if kind == "volume":
            where, image = source.get("pool") if source is not None else "", value
        elif not value.startswith("/") or posixpath.normpath(value) != value:
            self._wrong(place, node, f"must be a plain path from the root, not {quoted(value)}")
            return "", ""
        else:
            where, image = posixpath.split(value)
        if wrong := file_error(image, "the pool"):
            self._wrong(place, node, wrong)
        pool = self._choices.pools.get(where, "")
        if not pool:
            self._wrong(place, node, f"is in {where}: say which pool of the hosts that is, with --pool {where}=POOL")
        return pool, image

    # --- cards --------------------------------------------------------------------------------------------------------

    def _nics(self) -> list[dict[str, Any]]:
        return [self._nic(number, path, node) for number, (path, node) in enumerate(self._all("interface"))]

    def _nic(self, number: int, path: str, node: Node) -> dict[str, Any]:
        source, kind = node.child("source"), node.get("type")
        value = source.get(kind) if source is not None and kind else ""
        network = self._choices.networks.get(value, "")
        if source is not None and kind == "network" and source.get("bridge"):
            said = "which bridge a network is, each host's configuration says"
            self.left_out.append(Said(f"{path}/source/@bridge", source.line, said))
        elif source is not None and kind == "bridge" and source.get("network"):
            self._wrong(f"{path}/source/@network", node, "does not go with a card of type bridge")
        if kind and not value:
            self._wrong(f"{path}/source/@{kind}", node, "is missing")
        elif kind and not network:
            said = f"is {quoted(value)}: say which network of the hosts that is, with --network {value}=NETWORK"
            self._wrong(f"{path}/source/@{kind}", node, said)
        found: dict[str, Any] = {"name": f"eth{number}", "network": network}
        mac, driver, mtu = node.child("mac"), node.child("driver"), node.child("mtu")
        if mac is not None:
            found["mac"] = mac.get("address").lower()
        if driver is not None and driver.get("queues"):
            found["queues"] = int(driver.get("queues"))
        if mtu is not None and mtu.get("size"):
            found["mtu"] = int(mtu.get("size"))
        return found

    def _all(self, tag: str) -> list[tuple[str, Node]]:
        """Devices of a kind with their paths."""
        return [(node.path, node) for node in (self._top.child("devices") or self._top).all(tag)]


def _order(disk: Node) -> str:
    boot = disk.child("boot")
    return boot.get("order") if boot is not None else ""
