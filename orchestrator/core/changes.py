"""PURE. What an operator adds to a guest that runs, or takes away from it, and what that makes of its specification.

A change says what is to be there, never how much is to be added: repeated, it finds that it was done, or (of what was
taken away) that there is no such thing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import guest_errors
from orchestrator.core.hardware import MODULE_MIB
from orchestrator.core.records import DiskSpec, GuestSpec, NicSpec
from orchestrator.core.text import quoted


@dataclass(frozen=True, slots=True)
class MachineChange:
    """One of its fields is set."""

    disk: DiskSpec | None = None
    """To be added."""
    nic: NicSpec | None = None
    """To be added."""
    memory_mib: int = 0
    """What the guest is to have in all."""
    vcpus: int = 0
    """What the guest is to have in all."""
    detach_disk: str = ""
    """Name of the disk that is to be taken away."""
    detach_nic: str = ""
    """Name of the network card that is to be taken away."""


def with_machine_of(spec: GuestSpec, other: GuestSpec) -> GuestSpec:
    """With what changes may change as another version of the specification has it."""
    return replace(spec, disks=other.disks, nics=other.nics, memory_mib=other.memory_mib, vcpus=other.vcpus)


def changed(spec: GuestSpec, change: MachineChange) -> GuestSpec:
    """The specification once that is done; the same one when it is done already.

    Raises INVALID_ARGUMENT with everything that is wrong, ALREADY_EXISTS for a name that something else of the guest
    bears, NOT_FOUND for what it does not have.
    """
    after = _changed(spec, change)
    bad = guest_errors(after)
    bad += [] if after == spec else _more(spec, change)
    if bad:
        raise invalid(bad)
    return after


def _changed(spec: GuestSpec, change: MachineChange) -> GuestSpec:
    if change.disk is not None:
        found = next((disk for disk in spec.disks if disk.name == change.disk.name), None)
        if found is None:
            return replace(spec, disks=(*spec.disks, change.disk))
        return _same(spec, "disk", found, change.disk)
    if change.nic is not None:
        card = next((nic for nic in spec.nics if nic.name == change.nic.name), None)
        if card is None:
            return replace(spec, nics=(*spec.nics, change.nic))
        return _same(spec, "network card", card, change.nic)
    if change.detach_disk:
        left = tuple(disk for disk in spec.disks if disk.name != change.detach_disk)
        _must_have(spec, "disk", change.detach_disk, [disk.name for disk in spec.disks])
        return replace(spec, disks=left)
    if change.detach_nic:
        cards = tuple(nic for nic in spec.nics if nic.name != change.detach_nic)
        _must_have(spec, "network card", change.detach_nic, [nic.name for nic in spec.nics])
        return replace(spec, nics=cards)
    return replace(spec, memory_mib=change.memory_mib or spec.memory_mib, vcpus=change.vcpus or spec.vcpus)


def _more(spec: GuestSpec, change: MachineChange) -> list[tuple[str, str]]:
    """Nothing but disks and cards is taken away while a guest runs, and there is room for more or there is not."""
    bad: list[tuple[str, str]] = []
    more = change.memory_mib - spec.memory_mib
    if change.memory_mib and not spec.max_memory_mib:
        bad.append(("memory_mib", "the guest was created without max_memory: there is no room for more"))
    elif change.memory_mib and (more <= 0 or more % MODULE_MIB):
        said = f"the guest has {spec.memory_mib} MiB; it can be given a multiple of {MODULE_MIB} MiB more"
        bad.append(("memory_mib", f"{said}, not {more} MiB"))
    if change.vcpus and not spec.max_vcpus:
        bad.append(("vcpus", "the guest was created without max_vcpus: there is no room for more"))
    elif change.vcpus and change.vcpus <= spec.vcpus:
        bad.append(("vcpus", f"the guest has {spec.vcpus}, and none is taken away while it runs"))
    if change.disk is not None and change.disk.boot:
        bad.append(("boot", "the firmware has chosen long ago: leave it out"))
    return bad


def _same(spec: GuestSpec, what: str, found: object, wanted: object) -> GuestSpec:
    if found == wanted:
        return spec
    name = getattr(wanted, "name", "")
    said = f"guest {spec.name} has another {what} {quoted(name)}: give this one another name, or detach that one first"
    raise DroverError(RefusalReason.ALREADY_EXISTS, said, field="name")


def _must_have(spec: GuestSpec, what: str, name: str, names: list[str]) -> None:
    if name not in names:
        known = ", ".join(names) or "none"
        said = f"guest {spec.name} has no {what} {quoted(name)}; it has {known}"
        raise DroverError(RefusalReason.NOT_FOUND, said, field="name")
