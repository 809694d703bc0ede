"""PURE. The domain that libvirt is given for a guest, and what of it another host changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree as ET

from agents.engine.base import DiskFile, EngineError, VmmSpec
from orchestrator.core.guest import command_line_of
from orchestrator.core.hardware import beyond_libvirt, disk_pools, disks_beyond_libvirt
from orchestrator.core.records import NicSpec, PoolKind

NAME_LINK = "kernel"


@dataclass(frozen=True, slots=True)
class Places:
    """What of a domain is another one at each host. `kernel` and `initrd` are links among the guest's files, so that
    the process can be told by them."""

    name: str
    kernel: str
    initrd: str
    console: str
    device: str
    """Socket of the companion devices; empty: there are none."""
    disks: Mapping[str, str] = field(default_factory=dict[str, str])
    """What the guest has a disk at (`vda`) -> its image."""
    cards: Mapping[str, str] = field(default_factory=dict[str, str])
    """Address of a network card -> the tap that its frames go through."""

    def told(self) -> dict[str, object]:
        """For the source's agent. What the guest has none of is left out: an agent of an earlier version, which has
        no such guests, knows no word for it."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, dict) or value}


def places_of(spec: VmmSpec) -> Places:
    """Of the copy `spec.inc` on this host."""
    return Places(
        name=f"{spec.spec.name}.{spec.inc}",
        kernel=str(kernel_link(spec)),
        initrd=str(initrd_link(spec)) if spec.spec.boot.initrd else "",
        console=str(console_socket(spec)),
        device=str(spec.device_path) if spec.device_path is not None else "",
        disks={target: str(disk.path.absolute()) for target, disk in _disks(spec)},
        cards={mac: ifname for _, mac, ifname in _cards(spec)},
    )


def kernel_link(spec: VmmSpec) -> Path:
    """The path of the kernel as the VMM's command line has it: it names the copy."""
    return (spec.directory / f"{spec.inc}.{NAME_LINK}").absolute()


def initrd_link(spec: VmmSpec) -> Path:
    """As `kernel_link`."""
    return (spec.directory / f"{spec.inc}.initrd").absolute()


def console_socket(spec: VmmSpec) -> Path:
    """The socket of COM1."""
    return (spec.directory / f"{spec.inc}.com1").absolute()


def not_possible(spec: VmmSpec) -> str:
    """What of this guest the engine cannot make; empty: nothing."""
    if beyond := beyond_libvirt(spec.spec) + disks_beyond_libvirt(disk_pools(spec.spec), _kinds(spec)):
        return ", ".join(beyond)
    if len(spec.disks) != len(spec.spec.disks) or len(_cards(spec)) != len(spec.spec.nics):
        return "disks or network cards that this host knows nothing of"
    if spec.vfio_path is not None:
        return "devices inside the VMM"
    if spec.nics:
        return "network cards of the lab"
    return ""


def domain_xml(spec: VmmSpec, accelerator: str, emulator: str) -> str:
    """Raises EngineError for a guest that this engine cannot make."""
    if cannot := not_possible(spec):
        raise EngineError(f"guest {spec.spec.name} has {cannot}, which the libvirt engine does not make")
    places, guest = places_of(spec), spec.spec
    domain = ET.Element("domain", type="kvm" if accelerator == "kvm" else "qemu")
    _text(domain, "name", places.name)
    _text(domain, "uuid", spec.guest)
    _text(domain, "memory", str(guest.memory_mib), unit="MiB")
    _text(domain, "vcpu", str(guest.vcpus))
    system = ET.SubElement(domain, "os")
    _text(
        system, "type", "hvm", arch="x86_64", machine=spec.machine.type if spec.machine is not None else guest.machine
    )
    _text(system, "kernel", places.kernel)
    if places.initrd:
        _text(system, "initrd", places.initrd)
    _text(system, "cmdline", command_line_of(guest.boot, name=guest.name, uuid=spec.guest))
    ET.SubElement(ET.SubElement(domain, "features"), "acpi")
    _text(domain, "on_poweroff", "destroy")
    _text(domain, "on_reboot", "restart")
    _text(domain, "on_crash", "destroy")
    devices = ET.SubElement(domain, "devices")
    _text(devices, "emulator", emulator)
    ET.SubElement(devices, "controller", type="usb", model="none")
    _serial(devices, 0, "bind", places.console)
    if places.device:
        _serial(devices, 1, "connect", places.device)
    else:
        ET.SubElement(ET.SubElement(devices, "serial", type="null"), "target", port="1")
    for target, disk in _disks(spec):
        _disk(devices, target, disk)
    for nic, mac, ifname in _cards(spec):
        _card(devices, mac, ifname, nic.mtu)
    ET.SubElement(devices, "memballoon", model="none")
    return ET.tostring(domain, encoding="unicode")


def moved(live_xml: str, places: Places) -> str:
    """The live domain as it is to be at another host, but for its name, which libvirt changes itself.

    Raises EngineError when it is none that this engine made.
    """
    domain = ET.fromstring(live_xml)
    values = {"os/kernel": places.kernel, "os/initrd": places.initrd}
    for path, value in values.items():
        if (element := domain.find(path)) is not None:
            element.text = value
    for port, value in ((0, places.console), (1, places.device)):
        for kind in ("serial", "console"):
            for element in domain.findall(f"devices/{kind}[@type='unix']"):
                target, source = element.find("target"), element.find("source")
                if target is not None and source is not None and target.get("port") == str(port):
                    source.set("path", value)
    for element in domain.findall("devices/disk"):
        target, source = element.find("target"), element.find("source")
        image = places.disks.get(target.get("dev", "")) if target is not None else None
        if image is None or source is None:
            raise EngineError("the domain has a disk that is none of the guest's: it was changed behind Drover's back")
        source.set("file", image)
    for element in domain.findall("devices/interface"):
        mac, target = element.find("mac"), element.find("target")
        ifname = places.cards.get(mac.get("address", "")) if mac is not None else None
        if ifname is None or target is None:
            raise EngineError("the domain has a card that is none of the guest's: it was changed behind Drover's back")
        target.set("dev", ifname)
    if domain.find("devices/serial[@type='unix']/source") is None:
        raise EngineError("the domain has no console among the guest's files: it was changed behind Drover's back")
    return ET.tostring(domain, encoding="unicode")


def machine_of(live_xml: str) -> str:
    """The machine type that the domain really has."""
    kind = ET.fromstring(live_xml).find("os/type")
    return kind.get("machine", "") if kind is not None else ""


def _text(parent: ET.Element, name: str, text: str, **attributes: str) -> None:
    ET.SubElement(parent, name, attributes).text = text


def _serial(devices: ET.Element, port: int, mode: str, path: str) -> None:
    serial = ET.SubElement(devices, "serial", type="unix")
    source = ET.SubElement(serial, "source", mode=mode, path=path)
    if mode == "connect":
        ET.SubElement(source, "reconnect", enabled="yes", timeout="1")
    ET.SubElement(serial, "target", port=str(port))


def _kinds(spec: VmmSpec) -> dict[str, PoolKind]:
    """What each pool that a disk is in is on this host."""
    of = {disk.name: disk.kind for disk in spec.disks}
    return {disk.pool: of[disk.name] for disk in spec.spec.disks if disk.name in of}


def _disks(spec: VmmSpec) -> list[tuple[str, DiskFile]]:
    """With what the guest has each at. The order is the specification's, and so the same at every host."""
    return [(f"vd{chr(ord('a') + number)}", disk) for number, disk in enumerate(spec.disks)]


def _cards(spec: VmmSpec) -> list[tuple[NicSpec, str, str]]:
    """Those that have a tap here, with their addresses and taps."""
    devices = spec.machine.devices if spec.machine is not None else ()
    macs = {device.backend.removeprefix("nic:"): device.properties.get("mac", "") for device in devices}
    taps = {tap.nic: tap.ifname for tap in spec.taps}
    return [(nic, macs[nic.name], taps[nic.name]) for nic in spec.spec.nics if macs.get(nic.name) and nic.name in taps]


def _disk(devices: ET.Element, target: str, disk: DiskFile) -> None:
    """The image belongs to all hosts of its pool: libvirt changes neither its owner nor its label, at a start or at the
    end of a source whose guest writes to it elsewhere by then. It lies on nothing, whatever its header says."""
    element = ET.SubElement(devices, "disk", type="file", device="disk")
    ET.SubElement(element, "driver", name="qemu", type=disk.format.value, cache=disk.cache.value, discard="unmap")
    source = ET.SubElement(element, "source", file=str(disk.path.absolute()))
    ET.SubElement(source, "seclabel", model="dac", relabel="no")
    ET.SubElement(element, "backingStore")
    ET.SubElement(element, "target", dev=target, bus="virtio")
    if disk.read_only:
        ET.SubElement(element, "readonly")


def _card(devices: ET.Element, mac: str, ifname: str, mtu: int) -> None:
    """The tap is the agent's, which makes and removes it: libvirt only opens it."""
    element = ET.SubElement(devices, "interface", type="ethernet")
    ET.SubElement(element, "mac", address=mac)
    ET.SubElement(element, "target", dev=ifname, managed="no")
    ET.SubElement(element, "model", type="virtio")
    if mtu:
        ET.SubElement(element, "mtu", size=str(mtu))
    ET.SubElement(element, "rom", enabled="no")
