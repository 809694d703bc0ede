"""What a guest has on this host's disk: one short directory, what it is, and the notes of its VMM processes.

<dir>/roots.json                                where guests of this installation are and were
<dir>/guests/<16 of the uuid>/guest.json        uuid and spec
                              birth.images      images made for it, until it runs
                              birth.before      what it has run with (as guest.json), while it is started again
                              <inc>.json        one VMM process (VmmMetadata)
                              <inc>.machine.json its machine (LiveMachine), of a guest with hardware
                              <inc>.cards.json  which of its taps is whose, once its cards have changed
                              change.json       a change of its machine that was begun (changes.py)
                              <inc>.nvram .seed .tpm*   its UEFI variables, its cloud-init disk, its TPM
                              <inc>.owner       the same, as it will be once an incoming one is the guest
                              <inc>.qmp .oob .com1 .dev .ctl .vfio .vnc   sockets
<volatile>/<uuid>.<inc>                         marker: something here may have had an effect on the guest
<volatile>/<uuid>.<inc>.reserved                room for it
<console_dir>/<host>.<guest>.<inc>.sock         link to .com1
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import structlog

from agents.config import AgentConfig
from agents.disks.births import Births
from agents.engine.base import Tap, VmmMetadata, VmmSpec
from agents.guest.console import ConsoleAt
from agents.nets.ports import MAX_PORTS, Owner, Port, tap_name
from agents.nets.taps import NetsError, Taps, root_of
from agents.shims import net
from agents.shims.companion import DevicesSpec
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.core.record import Record
from orchestrator.core.records import DeviceSpec, GuestSpec, NetworkKind, NicSpec, ShimKind
from orchestrator.ledger.records import BadRecord, decode, encode
from orchestrator.proc import start_time_of, vmms_below
from orchestrator.whole import write_whole

log = structlog.get_logger(__name__)


_OTHER_NOTES = (".devices.json", ".machine.json", ".cards.json")
_OF_THE_GUEST = ("guest.json", "change.json")
_INC = re.compile(r"[0-9a-f]{16}")
_STATE = (".nvram", ".tpmstate")

_LONGEST_ROOT = 107 - len("/0123456789abcdef/0123456789abcdef.vfio")
"""In bytes. Below it lie sockets, whose paths the kernel bounds."""


def _runtime() -> Path:
    """A short directory of this user alone, which need not outlive the machine's power."""
    return Path("/run/drover") if os.getuid() == 0 else Path(f"/tmp/drover-{os.getuid()}")


@functools.cache
def guests_root(guests: Path) -> Path:
    """The directory itself where its path is short enough for sockets below it, else a short link to it.

    Raises OSError when the link cannot be made, or its directory belongs to somebody else.
    """
    if len(os.fsencode(guests)) <= _LONGEST_ROOT:
        return guests
    runtime = _runtime()
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    owned = runtime.lstat()
    if owned.st_uid != os.getuid() or owned.st_mode & 0o022 or not stat.S_ISDIR(owned.st_mode):
        raise PermissionError(errno.EPERM, "others may write to it, and sockets are reached through it", str(runtime))
    guests.mkdir(parents=True, exist_ok=True)
    target = guests.resolve()
    link = runtime / blake2b(os.fsencode(target), digest_size=6).hexdigest()
    if not link.is_symlink() or link.readlink() != target:
        fresh = link.with_suffix(f".{os.getpid()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(link)
    return link


_ROOTS_KEPT = 16


def known_roots(config: AgentConfig) -> list[str]:
    """Every directory, as it was spelled, below which agents of this installation have had guests: the one of now, and
    those of before the agent's directory was moved or its path changed. Raises OSError."""
    now = guests_root(config.dir / "guests")
    try:
        noted = (config.dir / "roots.json").read_bytes()
        before = [str(root) for root in json.loads(noted)]
    except FileNotFoundError:
        before = []
    except (ValueError, TypeError) as error:
        raise OSError(
            errno.EINVAL, f"cannot be read ({error!r}): mend or remove it", str(config.dir / "roots.json")
        ) from error
    spelled = list(dict.fromkeys((str(now), str(now.absolute()))))
    return [*(root for root in before if root not in spelled), *spelled]


def forget_stale_links() -> None:
    """Remove links to directories of agents that are no more. Best effort: they do no harm, they only pile up."""
    with contextlib.suppress(OSError):
        for link in listed(_runtime()):
            if link.is_symlink() and not there(link.readlink()):
                link.unlink()


def note_roots(config: AgentConfig) -> None:
    """Remember where the sockets of this agent's guests are, before it has any: a process whose note is lost is found
    by them, also from a moved directory. Raises OSError; nothing has changed then."""
    roots = known_roots(config)[-_ROOTS_KEPT:]
    write_whole(config.dir / "roots.json", json.dumps(roots).encode())


@dataclass(frozen=True, slots=True)
class _Note(Record):
    uuid: str
    spec: GuestSpec


def there(path: Path) -> bool:
    """Raises OSError when it cannot be told: what cannot be looked at is not missing."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def reserved(marker: Path) -> Path:
    """What a marker is before it is one: a file with room in the directory, which says nothing."""
    return marker.with_name(f"{marker.name}.reserved")


def make_marker(marker: Path) -> None:
    """Idempotent. Raises OSError, and then there is none that was not there before."""
    try:
        reserved(marker).replace(marker)
    except FileNotFoundError:  # made before, or prepared by an agent that reserved nothing
        marker.touch()


def listed(directory: Path) -> list[Path]:
    """Its entries, sorted; none when it does not exist. Raises OSError, which `glob` would hide."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return []


def seed_of(uuid: str) -> int:
    """Mixed into the devices' first states, so that two guests' devices never look alike."""
    return int(uuid.replace("-", "")[:8], 16)


@dataclass(frozen=True, slots=True)
class GuestFiles:
    """The files of one guest. The directory name is short because the kernel bounds the paths of sockets."""

    config: AgentConfig
    uuid: str
    spec: GuestSpec

    @property
    def directory(self) -> Path:
        """What must survive a power loss; holds everything of the guest on this host."""
        return guests_root(self.config.dir / "guests") / self.uuid[:16]

    def vmms(self, *, adopted: bool = True) -> list[int]:
        """Pids of the guest's VMMs that run on this host, noted down or not; `adopted`: also the one that somebody else
        started, if it was, or was to be, taken over here. Raises LivenessUnknown."""
        try:
            roots = known_roots(self.config)
        except OSError as error:
            raise LivenessUnknown(f"where processes of the guest would be is not known: {error}") from error
        found = vmms_below(f"{root}/{self.uuid[:16]}" for root in roots)
        taken = self.spec.adopted if adopted else None
        if taken is not None and start_time_of(taken.pid) == taken.start_time:  # its command line names nothing of ours
            found.append(taken.pid)
        return found

    def make(self) -> None:
        """Idempotent. Raises OSError when the disk is full."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)  # whatever the umask was when it was made
        if not (self.directory / "guest.json").exists():
            self.note()

    def with_spec(self, spec: GuestSpec) -> GuestFiles:
        """The files of the guest once it is something else. Writes nothing."""
        return replace(self, spec=spec)

    def note(self) -> None:
        """Write down what the guest is, for a later agent, over what was noted before. Raises OSError."""
        write_whole(self.directory / "guest.json", encode(_Note(self.uuid, self.spec)))

    def ran_with(self) -> GuestSpec:
        """What a guest that is about to be started again has run with, also after a start that nobody finished. It is
        noted until the guest runs, for by then `guest.json` says what it is to be. Raises OSError."""
        before = self.births.before
        try:
            return decode(_Note, before.read_bytes(), path=str(before)).spec
        except FileNotFoundError:
            pass
        except BadRecord as error:
            log.error("what the guest has run with cannot be read", guest=self.spec.name, error=str(error))
            return self.spec
        if self.directory.exists():
            temporary = before.with_suffix(".tmp")
            temporary.write_bytes(encode(_Note(self.uuid, self.spec)))
            temporary.replace(before)
        return self.spec

    def remove(self) -> None:
        """The note last: an agent that is killed in the middle leaves a guest that its successor knows. The images of a
        guest that never ran go as well.

        What cannot be removed stays, and is tried again by the next agent.
        """
        try:
            self.births.failed()
        except OSError as error:
            log.error("images of a guest that was not born are left", guest=self.spec.name, error=str(error))
            return
        note = self.directory / "guest.json"
        markers = self.config.volatile_dir.glob(f"{self.uuid}.*")  # of copies that are gone: they say nothing any more
        for path in (*markers, *(path for path in self.directory.glob("*") if path != note), note):
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):
            self.directory.rmdir()

    @property
    def births(self) -> Births:
        """What was made for it before it ran."""
        return Births(self.directory)

    def marker(self, inc: str) -> Path:
        """Its presence says that the copy may have run as the guest (H10)."""
        return self.config.volatile_dir / f"{self.uuid}.{inc}"

    @property
    def companions(self) -> tuple[DeviceSpec, ...]:
        """Its devices that live in the device process beside the VMM."""
        return tuple(device for device in self.spec.devices if device.shim is ShimKind.COMPANION)

    @property
    def in_vmm(self) -> tuple[DeviceSpec, ...]:
        """Devices inside the VMM."""
        return tuple(device for device in self.spec.devices if device.shim is ShimKind.VFIO)

    @property
    def externals(self) -> tuple[DeviceSpec, ...]:
        """Devices that programs of the host hold."""
        return tuple(device for device in self.spec.devices if device.shim is ShimKind.EXTERNAL)

    @property
    def outside(self) -> tuple[DeviceSpec, ...]:
        """Devices whose state lives outside the VMM, whoever holds them, in the order of the specification."""
        return tuple(device for device in self.spec.devices if device.shim in (ShimKind.COMPANION, ShimKind.EXTERNAL))

    @property
    def has_process(self) -> bool:
        """A device process goes with each of the guest's VMMs."""
        return bool(self.companions or self.in_vmm)

    def devices_spec(self, inc: str) -> DevicesSpec:
        """Of everything that a device process holds."""
        devices = (*self.companions, *self.in_vmm)
        return DevicesSpec(self.uuid, inc, self.directory, devices, seed_of(self.uuid), self.config.device_program)

    def taps(self, inc: str, *, made: bool = True) -> Taps:
        """Of the copy `inc`: its network cards' ends on this host. Makes none. Not `made`: somebody else made them."""
        return Taps(Owner(root_of(self.config.dir), self.uuid, inc), self._ports(inc) if made else [])

    def _ports(self, inc: str) -> list[Port]:
        cards = self._cards(inc)
        return [self._port(inc, cards[nic.name], nic) for nic in self.spec.nics if nic.name in cards]

    def cards_path(self, inc: str) -> Path:
        """The numbers that a copy's cards have in the names of their taps, once these may differ from their order."""
        return self.directory / f"{inc}.cards.json"

    def _cards(self, inc: str) -> dict[str, int]:
        try:
            return {str(name): int(number) for name, number in json.loads(self.cards_path(inc).read_bytes()).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {nic.name: number for number, nic in enumerate(self.spec.nics)}

    def note_cards(self, inc: str, cards: dict[str, int] | None = None) -> None:
        """Keep the numbers that they have, so that a card which is taken away changes no other's. Raises OSError."""
        if cards is None and self.cards_path(inc).exists():
            return
        write_whole(self.cards_path(inc), json.dumps(self._cards(inc) if cards is None else cards).encode())

    async def plug(self, inc: str, nic: NicSpec) -> None:
        """Make the tap of a card that the copy is to have; its numbers are noted. Raises NetsError, OSError."""
        cards = self._cards(inc)
        number = cards.get(nic.name)
        if number is None:
            number = min(set(range(MAX_PORTS)) - set(cards.values()))
            self.note_cards(inc, {**cards, nic.name: number})
        taps = self._tap(inc, number, nic)
        await taps.make()
        with contextlib.suppress(NetsError):  # whoever controls the bridge may be away: the card is there all the same
            await taps.bind()

    async def unplug(self, inc: str, nic: NicSpec) -> None:
        """Remove the tap of a card that the copy does not have. Idempotent. Raises NetsError, OSError."""
        cards = self._cards(inc)
        if (number := cards.pop(nic.name, None)) is not None:
            await self._tap(inc, number, nic).remove()
            self.note_cards(inc, cards)

    def _tap(self, inc: str, number: int, nic: NicSpec) -> Taps:
        return Taps(Owner(root_of(self.config.dir), self.uuid, inc), [self._port(inc, number, nic)])

    def _port(self, inc: str, number: int, nic: NicSpec) -> Port:
        here = self.config.networks.get(nic.network)
        return Port(
            nic.name,
            tap_name(inc, number),
            here.bridge if here else "",
            nic.mac or net.mac_address(self.uuid, nic.name),
            here.mtu if here else 0,
            nic.queues,
            here is not None and here.kind is NetworkKind.OVS,
            nic.network,
            nic.mtu,
        )

    def console_name(self, inc: str) -> str:
        """What whoever holds consoles knows the copy's by."""
        return f"{self.config.host}.{self.spec.name}.{inc}"

    def console(self, inc: str) -> ConsoleAt:
        """Where the copy's console is."""
        return ConsoleAt(self.directory / f"{inc}.com1", self.config.console_server, self.console_name(inc))

    def vmm_spec(self, inc: str, *, multifd_channels: int = 0) -> VmmSpec:
        """What the copy `inc` is started from on this host, as owner or as destination. Writes nothing."""
        return VmmSpec(
            guest=self.uuid,
            inc=inc,
            spec=self.spec,
            directory=self.directory,
            console_path=self.config.console_dir / f"{self.console_name(inc)}.sock",
            device_path=self.directory / f"{inc}.dev" if self.companions else None,
            listen_address=self.config.listen or self.config.address,
            multifd_channels=multifd_channels,
            vfio_path=self.directory / f"{inc}.vfio" if self.in_vmm else None,
            nics=net.nics(self.uuid, self.spec.devices),
            segment=net.segment_of(f"{self.config.zookeeper}{self.config.chroot}", self.config.address),
            taps=tuple(Tap(port.nic, port.ifname) for port in self._ports(inc)),
            vnc_listen=self.config.vnc_listen,
        )

    def reserve_marker(self, inc: str) -> None:
        """So that `make_marker` takes no room: a destination whose disk fills up meanwhile can still take over.

        Raises OSError.
        """
        self.config.volatile_dir.mkdir(parents=True, exist_ok=True)
        self.reserved_marker(inc).touch()

    def reserved_marker(self, inc: str) -> Path:
        """Room for a marker, which says nothing: goes with its copy, also when a later agent finds that gone."""
        return reserved(self.marker(inc))

    def drop_marker(self, inc: str) -> None:
        """Idempotent. Raises OSError."""
        for path in (self.marker(inc), self.reserved_marker(inc)):
            path.unlink(missing_ok=True)

    def has_marker(self, inc: str) -> bool:
        """Raises BadRecord when that cannot be told."""
        try:
            return there(self.marker(inc))
        except OSError as error:
            raise BadRecord(f"whether there is a marker cannot be told: {error}") from error

    def _listed(self) -> list[Path]:
        try:
            return listed(self.directory)
        except OSError as error:
            raise BadRecord(f"the notes of a guest's VMMs cannot be listed: {error}") from error

    def processes(self) -> list[VmmMetadata]:
        """The VMM processes that were noted down; any may be dead by now. Raises BadRecord: and that one alive."""
        found: list[VmmMetadata] = []
        for path in self._listed():
            if path.suffix != ".json" or path.name in _OF_THE_GUEST or path.name.endswith(_OTHER_NOTES):
                continue
            try:
                found.append(VmmMetadata(**json.loads(path.read_bytes())))
            except FileNotFoundError:
                continue  # its process was just destroyed
            except (OSError, ValueError, TypeError) as error:
                raise BadRecord(f"{path}: the note of a VMM cannot be read ({error}): mend or remove it") from error
        return found

    def unnoted(self, known: Collection[str]) -> set[str]:
        """The copies (`inc`) that something was made for here, and whose VMM no note names; `known` left out. Raises
        BadRecord when it cannot be told."""
        names = [path.name for path in self._listed()]
        made = {name.partition(".")[0] for name in names}
        noted = {one.inc for one in self.processes()}
        return {inc for inc in made if _INC.fullmatch(inc)} - noted - set(known)

    def remove_unnoted(self, inc: str) -> None:
        """Nothing is left of a copy whose VMM never came to be, but what a guest might have written, should only its
        note have been lost: that goes with the guest. Idempotent. Raises OSError."""
        for path in listed(self.directory):
            if path.name.startswith(f"{inc}.") and not path.name.endswith(_STATE):
                path.unlink(missing_ok=True)
        self.reserved_marker(inc).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Found:
    """What earlier agents of this host left on its disk."""

    guests: tuple[GuestFiles, ...]
    unreadable: tuple[str, ...] = ()
    """What cannot be read: there may be guests behind it that nobody knows of."""


def found_on_disk(config: AgentConfig) -> Found:
    """Every guest that an earlier agent of this host had to do with; what it was about to remove is gone afterwards."""
    found: list[GuestFiles] = []
    unreadable: list[str] = []
    try:
        directories = listed(config.dir / "guests")
    except OSError as error:
        directories = []
        unreadable.append(str(error))
    for directory in directories:
        with contextlib.suppress(OSError):  # not empty, as it should be
            directory.rmdir()
            continue
        note = directory / "guest.json"
        try:
            text = decode(_Note, note.read_bytes(), path=str(note))
        except (BadRecord, OSError) as error:
            unreadable.append(str(error))
            continue
        found.append(GuestFiles(config, text.uuid, text.spec))
    for one in unreadable:
        log.error("a guest's note is unreadable", error=one)
    return Found(tuple(found), tuple(unreadable))
