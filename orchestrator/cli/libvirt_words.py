"""PURE. What may stand in the XML of a libvirt domain that becomes a guest here (docs/import.md has it as a table).

What is not in here is refused by its path. Reasons are sentences for the operator who gives a domain up for a guest.
"""

from __future__ import annotations

from orchestrator.cli.accounted import Element, Fate, Value, left_out, same, used
from orchestrator.cli.plain_xml import Node

# --- reasons ----------------------------------------------------------------------------------------------------------

_NAMED = "a name that libvirt gives for itself"
_PLACE = (
    "devices get places of their own on the guest's buses: a guest that names its cards by their slot (enp1s0) "
    "has to be told their new names"
)
_BUSES = "the guest gets buses and controllers for the devices that it has here"
_TUNING = "tuning of the old host; the guest sees nothing of it"
_TAP = "each host names its taps itself"
_PEOPLE = "for people and for other tools"
_CONSOLE = "the guest's console is its first serial port, here as there"
_SCREEN = "a guest gets no screen unasked: `display: {vnc: true}` in its guest file gives it one"
_NO_HELPER = "the guest loses it; nothing that is stored depends on it"
_ALL_MEMORY = "a guest has all of its memory all the time"
_ENDS = "a guest that shuts down or crashes stays ended, and one that reboots goes on"
_HOSTS_OWN = "each host's configuration says which program and which firmware it has"

VARIABLES = (
    "the guest's UEFI variables come along: copy the file, once the domain is shut off, into the directory of images "
    "(`images` in the agent's configuration) of the host that the guest is first run on, as"
)
TPM_STATE = (
    "the TPM's state comes along: copy the domain's swtpm/<uuid>/tpm2/tpm2-00.permall, once it is shut off, into the "
    "directory of images (`images` in the agent's configuration) of the host that the guest is first run on, as"
)
_NO_SECURE_BOOT = (
    "Secure Boot needs a machine that keeps its variables from the guest (SMM), which a guest has not here"
)
OTHER_BUS = "a guest finds its disks on virtio here: it needs the driver before, and may know the disk by another name"
OTHER_CARD = "a guest's cards are virtio here: it needs the driver before"

# --- pieces that stand in many places ---------------------------------------------------------------------------------

_ALIAS = Element({"name": left_out(_NAMED)}, why=_NAMED)
_ADDRESS = Element(
    {
        name: left_out(_PLACE)
        for name in (
            "type",
            "domain",
            "bus",
            "slot",
            "function",
            "multifunction",
            "controller",
            "target",
            "unit",
            "port",
        )
    },
    why=_PLACE,
)
_PLACED = {"alias": _ALIAS, "address": _ADDRESS}
_YES_NO = "yes|no|on|off"


def _words(*names: str, pattern: str = ".*") -> dict[str, Value]:
    """Attributes of an element that is left out as a whole."""
    return {name: left_out("", pattern) for name in names}


def _gone(why: str, *attributes: str, **children: Element) -> Element:
    """A device that is left out."""
    return Element(_words(*attributes), {**_PLACED, **children}, why=why, many=True)


def _plain(*attributes: str, **children: Element) -> Element:
    """A part of something that is left out."""
    return Element(_words(*attributes), children, many=True)


_SIZE = Element(
    {"unit": used("b|bytes|KB|k|KiB|MB|M|MiB|GB|G|GiB"), "dumpCore": left_out("dumps of the guest are not made")},
    text=used(r"\d{1,15}", "must be a whole number"),
)

# --- devices ----------------------------------------------------------------------------------------------------------

_DISK_DRIVER = Element(
    {
        "name": same("qemu"),
        "type": used("raw|qcow2", "a disk is raw or qcow2 here: convert the image first (qemu-img convert)"),
        "cache": Value(
            (
                ("none|writeback", Fate.USED, ""),
                ("default", Fate.LEFT_OUT, "the guest's disks are opened without the host's cache (cache: none)"),
            ),
            "a disk's cache is none or writeback here",
        ),
        "io": left_out(_TUNING, "native|threads|io_uring"),
        "discard": Value(
            (("unmap", Fate.SAME, ""), ("ignore", Fate.LEFT_OUT, "what the guest discards is given back here"))
        ),
        "detect_zeroes": left_out(_TUNING, "off|on|unmap"),
        "queues": left_out(_TUNING, r"\d+"),
        "iothread": left_out(_TUNING, r"\d+"),
        "discard_no_unref": left_out(_TUNING, _YES_NO),
    }
)
_EMPTY_DRIVE = Element(
    {"type": left_out(""), "device": left_out("", "cdrom|floppy")},
    {
        **_PLACED,
        "driver": _plain("name", "type", "cache", "discard", "io"),
        "source": _plain("index", "startupPolicy"),
        "target": _plain("dev", "bus", "tray", "removable"),
        "readonly": Element(),
        "boot": _plain("order"),
    },
    why="an empty drive: a guest has media here, and no drives without one",
    many=True,
)


def _drive(disk: Node) -> Element | None:
    """A drive without a medium is left out."""
    source = disk.child("source")
    empty = source is None or not {"file", "dev", "volume", "name"} & set(source.attributes)
    return _EMPTY_DRIVE if empty and disk.get("device") in ("cdrom", "floppy") else None


_DISK = Element(
    {
        "type": used("file|block|volume", "an image is a file or a volume of a pool here"),
        "device": used("disk|cdrom", "a guest has disks and read-only media here, no floppy and no passed-through LUN"),
        "model": same("virtio"),
        "snapshot": left_out("snapshots are not taken here", "no|internal|external"),
    },
    {
        **_PLACED,
        "driver": _DISK_DRIVER,
        "source": Element(
            {
                **{name: used() for name in ("file", "dev", "pool", "volume")},
                "index": left_out(_NAMED, r"\d+"),
            }
        ),
        "backingStore": Element(
            {"type": Value((), "the image stands on another one: make it one image first (virsh blockpull)")}
        ),
        "target": Element({"dev": used("[a-z]{2,12}"), "bus": used("virtio", OTHER_BUS), "tray": same("closed")}),
        "readonly": Element(),
        "boot": Element({"order": used(r"\d{1,3}")}),
    },
    many=True,
    variant=_drive,
)

_NIC = Element(
    {"type": used("bridge|network", "a card is in a bridge or a network of libvirt's: put the hosts' bridge under it")},
    {
        **_PLACED,
        "mac": Element({"address": used("[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}"), "type": same("generated|static")}),
        "source": Element(
            {
                "bridge": used(),
                "network": used(),
                "portid": left_out(_NAMED),
            }
        ),
        "model": Element({"type": used("virtio", OTHER_CARD)}),
        "target": Element({"dev": left_out(_TAP)}, why=_TAP),
        "driver": Element({"name": left_out(_TUNING, "vhost|qemu"), "queues": used(r"\d{1,3}")}),
        "mtu": Element({"size": used(r"\d{1,5}")}),
        "rom": Element({"enabled": same("no"), "bar": same("off")}),
        "link": Element({"state": same("up")}),
        "boot": Element({"order": left_out("the firmware looks at the disks first, then at the network", r"\d{1,3}")}),
    },
    many=True,
)

_CONTROLLER = Element(
    {
        "type": left_out("", "usb|pci|sata|ide|scsi|virtio-serial|fdc"),
        **_words("index", "model", "ports", "vectors"),
    },
    {
        **_PLACED,
        "model": _plain("name"),
        "target": _plain("chassis", "port", "busNr", "chassisNr", "index", "hotplug"),
        "master": _plain("startport"),
        "driver": _plain("queues", "iothread", "max_sectors", "cmd_per_lun"),
    },
    why=_BUSES,
    many=True,
)

_FIRST_PORT = "a guest has one serial port of its own here"
_CHARDEV = {
    "source": _plain("path", "mode", "host", "service", "append", "tls"),
    "log": _plain("file", "append"),
    "protocol": _plain("type"),
}
_SERIAL_TYPES = "pty|null|unix|file|tcp|stdio|dev"
_SERIAL = Element(
    {"type": left_out("", _SERIAL_TYPES), "tty": left_out("")},
    {
        **_PLACED,
        **_CHARDEV,
        "target": Element(
            {"type": left_out("", "isa-serial|serial"), "port": left_out("", "0", _FIRST_PORT)},
            {"model": Element({"name": left_out("", "isa-serial")})},
        ),
    },
    why=_CONSOLE,
    many=True,
)
_CONSOLES = Element(
    {"type": left_out("", _SERIAL_TYPES), "tty": left_out("")},
    {
        **_PLACED,
        **_CHARDEV,
        "target": Element({"type": left_out("", "serial"), "port": left_out("", "0", _FIRST_PORT)}),
    },
    why=_CONSOLE,
    many=True,
)
_AGENTS = "org[.]qemu[.]guest_agent[.]0|com[.]redhat[.]spice[.]0|org[.]spice-space[.]webdav[.]0"
_CHANNEL = Element(
    {"type": left_out("", "unix|spicevmc|spiceport")},
    {
        **_PLACED,
        "source": _plain("mode", "path", "channel"),
        "target": Element(
            {
                "type": left_out("", "virtio"),
                "name": left_out("", _AGENTS, "what the guest talks to through it is not known, and is not here"),
                "state": left_out("", "connected|disconnected"),
            }
        ),
    },
    why=f"a channel to the old host's tools: {_NO_HELPER}",
    many=True,
)
_GRAPHICS = Element(
    {
        "type": left_out("", "vnc|spice|sdl"),
        **_words("port", "autoport", "listen", "keymap", "websocket", "tlsPort", "sharePolicy", "defaultMode"),
    },
    {
        "listen": _plain("type", "address", "network", "socket"),
        **{
            name: _plain("compression", "mode", "enable", "copypaste", "defaultMode") for name in ("image", "clipboard")
        },
        **{
            name: _plain("compression", "mode", "enable") for name in ("jpeg", "zlib", "playback", "streaming", "mouse")
        },
        "filetransfer": _plain("enable"),
        "gl": Element({"enable": left_out("", "no")}),
    },
    why=_SCREEN,
    many=True,
)
_VIDEO = Element(
    {},
    {
        **_PLACED,
        "model": Element(
            _words("type", "ram", "vram", "vram64", "vgamem", "heads", "primary", "blob"),
            {"acceleration": _plain("accel3d", "accel2d"), "resolution": _plain("x", "y")},
        ),
        "driver": _plain("name", "vgaconf"),
    },
    why=_SCREEN,
    many=True,
)
_RNG = Element(
    {"model": left_out("", "virtio|virtio-(non-)?transitional")},
    {
        **_PLACED,
        "backend": Element({"model": left_out("", "random|builtin")}, text=left_out("")),
        "rate": _plain("bytes", "period"),
    },
    why="the guest gathers its randomness itself",
    many=True,
)
_MEMBALLOON = Element(
    {"model": left_out("", "virtio|virtio-(non-)?transitional|none"), **_words("autodeflate", "freePageReporting")},
    {**_PLACED, "stats": _plain("period")},
    why=_ALL_MEMORY,
)
_WATCHDOG = Element(
    {"model": left_out("", "itco", "a guest has no watchdog here"), "action": left_out("", "reset|none")},
    _PLACED,
    why="part of every q35 machine; nothing acts on it here",
    many=True,
)
_REDIRDEV = Element(
    {"bus": left_out("", "usb"), "type": left_out("", "spicevmc")},
    {**_PLACED, "source": _plain("mode"), "protocol": _plain("type")},
    why=_SCREEN,
    many=True,
)
_TPM = Element(
    {"model": used("tpm-crb", "a guest's TPM is of the model tpm-crb here: it needs the driver before")},
    {
        **_PLACED,
        "backend": Element(
            {
                "type": same("emulator", "a guest's TPM is an emulated one here: a TPM of the host's stays with it"),
                "version": same("2.0", "a guest's TPM is of version 2.0 here"),
                "persistent_state": left_out("a TPM keeps its state as long as its guest is there", _YES_NO),
                "debug": left_out(_TUNING, r"\d+"),
            },
            {
                "encryption": Element(
                    refused="the TPM's state is encrypted with a secret of libvirt's: take that out first"
                ),
                "active_pcr_banks": Element(
                    children={name: Element() for name in ("sha1", "sha256", "sha384", "sha512")},
                    why="the TPM has the banks that it has, with its state",
                ),
                "profile": _plain("source", "name", "removeDisabled"),
            },
        ),
    },
)
_DEVICES = Element(
    children={
        "emulator": Element(text=left_out(_HOSTS_OWN), why=_HOSTS_OWN),
        "disk": _DISK,
        "interface": _NIC,
        "controller": _CONTROLLER,
        "serial": _SERIAL,
        "console": _CONSOLES,
        "channel": _CHANNEL,
        "graphics": _GRAPHICS,
        "video": _VIDEO,
        "input": _gone(_SCREEN, "type", "bus", "model", driver=_plain("iommu", "ats", "packed")),
        "sound": _gone(_SCREEN, "model", codec=_plain("type"), audio=_plain("id")),
        "audio": _gone(_SCREEN, "id", "type"),
        "redirdev": _REDIRDEV,
        "memballoon": _MEMBALLOON,
        "rng": _RNG,
        "watchdog": _WATCHDOG,
        "tpm": _TPM,
        "hostdev": Element(refused="a device of the old host that is passed through: a guest has none here"),
        "filesystem": Element(refused="directories of the host are not shared with guests here"),
        "shmem": Element(refused="a guest that shares memory with another cannot move"),
        "vsock": Element(refused="a guest has no vsock here"),
        "panic": Element(refused="a guest's panic is told to nobody here"),
        "hub": Element(refused="a guest has no USB here"),
        "smartcard": Element(refused="a guest has no smartcard here"),
        "parallel": Element(refused="a guest has no parallel port here"),
        "memory": Element(refused="a guest has all of its memory from the start: put its size into /domain/memory"),
        "iommu": Element(refused="a guest has no IOMMU here"),
        "lease": Element(refused="what keeps two hosts off the guest's disks is the ledger and the pool's fence here"),
        "crypto": Element(refused="a guest has no crypto device here"),
        "nvram": Element(refused="only other architectures have it"),
        "pstore": Element(refused="a guest has no pstore here"),
    }
)

# --- the machine ------------------------------------------------------------------------------------------------------

_OS = Element(
    {"firmware": used("efi|bios")},
    {
        "type": Element(
            {
                "arch": same("x86_64", "a guest is an x86_64 machine here"),
                "machine": used("(pc|q35)([-a-z0-9.]*)", "a guest's machine is of the kind pc or q35 here"),
            },
            text=same("hvm"),
        ),
        "firmware": Element(
            children={
                "feature": Element(
                    {
                        "enabled": same("no", _NO_SECURE_BOOT),
                        "name": same("secure-boot|enrolled-keys"),
                    },
                    many=True,
                )
            }
        ),
        "loader": Element(
            {
                "type": used("pflash|rom"),
                "readonly": same("yes"),
                "secure": same("no", _NO_SECURE_BOOT),
                "format": same("raw"),
            },
            text=used(),
        ),
        "nvram": Element(
            {
                "template": left_out(_HOSTS_OWN),
                "templateFormat": same("raw"),
                "format": same("raw", "the variables are raw here: convert the file first (qemu-img convert -O raw)"),
                "type": same("file", "the variables are a file here"),
            },
            {"source": Element({"file": used()})},
            text=used(),
        ),
        "kernel": Element(text=used()),
        "initrd": Element(text=used()),
        "cmdline": Element(text=used()),
        "boot": Element(
            {
                "dev": Value(
                    (
                        ("hd", Fate.USED, ""),
                        ("cdrom|network", Fate.LEFT_OUT, "the firmware looks at the disks first, then at the network"),
                    ),
                    "a guest has no floppy here",
                )
            },
            many=True,
        ),
        "bootmenu": Element({"enable": same("no"), "timeout": left_out(_TUNING)}),
        "smbios": Element({"mode": same("emulate", "what the guest reads of its system (SMBIOS) is QEMU's own here")}),
    },
)

_FEATURES = Element(
    children={
        "acpi": Element(),
        "apic": Element({"eoi": left_out(_TUNING, _YES_NO)}),
        "pae": Element(),
        "vmport": Element({"state": left_out("a guest has what its machine type brings along", _YES_NO)}),
        "hyperv": Element(refused="a CPU is a model without features of its own here, and these are some for Windows"),
        "kvm": Element(refused="a CPU is a model without features of its own here"),
        "smm": Element({"state": left_out("a guest has what its machine type brings along", "off|on")}),
    }
)

_CPU = Element(
    {
        "mode": used("custom|host-passthrough|host-model|maximum"),
        "match": same("exact"),
        "check": left_out("a host that cannot give all of the CPU does not start the guest", "none|partial|full"),
        "migratable": left_out("the CPU is a model by name here", _YES_NO),
    },
    {
        "model": Element(
            {"fallback": left_out("no other model is taken here", "allow|forbid")},
            text=used("[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
        ),
        "vendor": Element(refused="the vendor is the model's here"),
        "topology": Element({name: used(r"\d{1,4}") for name in ("sockets", "dies", "clusters", "cores", "threads")}),
        "feature": Element(many=True, refused="a CPU is a model without features of its own here"),
        "cache": Element(refused="the CPU's cache is the model's here"),
        "numa": Element(refused="a guest is one NUMA node here"),
        "maxphysaddr": Element(refused="the width of addresses is the model's here"),
    },
)

_TIMERS = {
    "name": left_out("", "rtc|pit|hpet|kvmclock"),
    "tickpolicy": left_out("", "catchup|delay"),
    "present": left_out("", "yes|no"),
}
_CLOCK = Element(
    {
        "offset": same("utc", "a guest's hardware clock is UTC here"),
        "adjustment": same("reset|0"),
        "basis": same("utc"),
    },
    {
        "timer": Element(
            _TIMERS,
            why="a guest has the timers of its machine type, and QEMU's way to catch up on interrupts that came late",
            many=True,
        )
    },
)
_PLACEMENT = "which CPUs a guest runs on is not set here"
_LIMITS = "a guest has no limits of this kind here"

DOMAIN = Element(
    {
        "type": left_out("the accelerator is each host's", "kvm|qemu"),
        "id": left_out("the domain runs: it must be shut down there before the guest is run here", r"\d+|-1"),
    },
    {
        "name": Element(text=used()),
        "uuid": Element(text=used("[0-9A-Fa-f-]{32,36}")),
        "genid": Element(refused="a guest has no generation id here"),
        "title": Element(text=left_out(_PEOPLE)),
        "description": Element(text=left_out(_PEOPLE)),
        "metadata": Element(why=_PEOPLE, free=True),
        "memory": _SIZE,
        "currentMemory": Element({"unit": left_out("")}, text=left_out(""), why=_ALL_MEMORY),
        "maxMemory": Element(refused="memory is not added to a running guest here"),
        "memoryBacking": Element(refused="a guest's memory is plain memory of its host"),
        "memtune": Element(refused=_LIMITS),
        "blkiotune": Element(refused=_LIMITS),
        "cputune": Element(refused=_PLACEMENT),
        "numatune": Element(refused=_PLACEMENT),
        "vcpu": Element(
            {
                "placement": same("static"),
                "cpuset": Value((), _PLACEMENT),
                "current": Value((), "vCPUs are not added to a running guest here: give it the number that it has"),
            },
            text=used(r"\d{1,4}"),
        ),
        "vcpus": Element(refused="vCPUs are not added to a running guest here"),
        "iothreads": Element(text=left_out(_TUNING, r"\d+"), why=_TUNING),
        "resource": Element(children={"partition": Element(text=left_out(""))}, why=_TUNING),
        "sysinfo": Element(refused="what the guest reads of its system (SMBIOS) is QEMU's own here"),
        "os": _OS,
        "features": _FEATURES,
        "cpu": _CPU,
        "clock": _CLOCK,
        "on_poweroff": Element(text=left_out("", "destroy"), why=_ENDS),
        "on_reboot": Element(text=left_out("", "restart"), why=_ENDS),
        "on_crash": Element(text=left_out("", "destroy|restart|preserve|coredump-destroy|coredump-restart"), why=_ENDS),
        "on_lockfailure": Element(refused="locks of images are not libvirt's here"),
        "pm": Element(
            children={
                name: Element({"enabled": left_out("", "yes|no")}) for name in ("suspend-to-mem", "suspend-to-disk")
            },
            why="a guest has what its machine type brings along",
        ),
        "perf": Element(refused="counters of the host are not read here"),
        "seclabel": Element(
            {"type": left_out("", "none|dynamic"), "model": left_out(""), "relabel": left_out("", "yes|no")},
            {name: Element(text=left_out("")) for name in ("label", "imagelabel", "baselabel")},
            why=_HOSTS_OWN,
            many=True,
        ),
        "launchSecurity": Element(refused="a guest with encrypted memory cannot move here"),
        "{http://libvirt.org/schemas/domain/qemu/1.0}commandline": Element(
            refused="arguments for QEMU past libvirt: `extra_args` of the guest file has those that the hosts allow"
        ),
        "devices": _DEVICES,
    },
)
