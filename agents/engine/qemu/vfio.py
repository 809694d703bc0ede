"""PURE. VFIO devices on QEMU's command line: their character devices and the IOMMU come as open descriptors.

Where the machine has no such devices, a library that is loaded into QEMU (the agent's configuration names it as
`vfio_preload`) opens the descriptors and answers for the devices over a socket.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_FD = 400
"""The IOMMU's; the devices' follow."""
_FIRST_SLOT = 0x10


def environment(preload: str, socket: str, count: int) -> dict[str, str]:
    """What a QEMU whose `count` devices come from the preload needs in its environment; both others are paths."""
    return {"LD_PRELOAD": preload, "DROVER_VFIO": f"{count}:{socket}"}


def arguments(names: Sequence[str]) -> list[str]:
    """QEMU's command line for devices of these names. Slots are fixed, so that both ends of a migration agree."""
    found = ["-object", f"iommufd,id=vfio-iommu,fd={FIRST_FD}"]
    for place, name in enumerate(names):
        where = f"fd={FIRST_FD + 1 + place},iommufd=vfio-iommu,addr={_FIRST_SLOT + place:#x}"
        how = "rombar=0,enable-migration=on,migration-events=on"
        found += ["-device", f"vfio-pci,id=vfio-{name},{where},{how}"]
    return found
