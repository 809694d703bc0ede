"""PURE. The domain that libvirt is given for a guest, and what of it another host changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

from agents.engine.base import EngineError, VmmSpec
from orchestrator.core.guest import command_line_of

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


def places_of(spec: VmmSpec) -> Places:
    """Of the copy `spec.inc` on this host."""
    return Places(
        name=f"{spec.spec.name}.{spec.inc}",
        kernel=str(kernel_link(spec)),
        initrd=str(initrd_link(spec)) if spec.spec.boot.initrd else "",
        console=str(console_socket(spec)),
        device=str(spec.device_path) if spec.device_path is not None else "",
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
    if spec.machine is not None:
        return "hardware of its own (disks, network cards, firmware, TPM, a CPU model)"
    if spec.vfio_path is not None:
        return "devices inside the VMM"
    if spec.nics:
        return "network cards of the lab"
    return "options of QEMU (extra_args)" if spec.spec.extra_args else ""


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
    _text(system, "type", "hvm", arch="x86_64", machine=guest.machine)
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
