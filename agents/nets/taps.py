"""The taps of one copy of a guest, made before its VMM and removed after it; and those that nobody owns any more.

Each call is one or two short-lived programs (`ip`, `ovs-vsctl`), bounded in time, and none of them is in a blackout:
what is said at the take-over (`bind`) is said once the guest runs.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from hashlib import blake2b
from pathlib import Path

import structlog

from agents.host.commands import CommandFailed, ran
from agents.nets import ports
from agents.nets.ports import Link, Owner, Port

log = structlog.get_logger(__name__)

COMMAND_S = 5.0
_OVS_WAIT_S = "4"
"""Of `ovs-vsctl` itself, so that it ends by its own word before it is killed."""


class NetsError(OSError):
    """A tap could not be made, or not removed; the text says what and why."""


class NetworkNotFound(NetsError):
    """This host has no such network, or one whose MTU is too small. Nothing was made."""


def root_of(directory: Path) -> str:
    """Names an agent by its directory, in few letters."""
    return blake2b(str(directory.resolve()).encode(), digest_size=6).hexdigest()


async def _run(*command: str, text: str = "") -> str:
    """What the program printed. Raises NetsError when it failed, or did not end in time: it is killed then."""
    try:
        return await ran(*command, timeout_s=COMMAND_S, text=text)
    except CommandFailed as error:
        # ip says last which line of its batch it was; what was wrong with it comes first.
        lines = [line for line in error.words.splitlines() if not line.startswith("Command failed")]
        raise NetsError(f"{command[0]}: {lines[0]}" if lines else str(error)) from error


async def links() -> list[Link]:
    """Every interface of this host. Raises NetsError."""
    told = await _run("ip", "-json", "link", "show")
    try:
        return ports.links_of(json.loads(told or "[]"))
    except (ValueError, TypeError, KeyError) as error:
        raise NetsError(f"ip printed what cannot be read: {error}") from error


class Taps:
    """Of one copy. Their names follow from the copy's `inc`, so an agent that comes later needs no note of them."""

    def __init__(self, owner: Owner, wanted: Sequence[Port]) -> None:
        self._owner = owner
        self._ports = tuple(wanted)

    @property
    def _in_ovs(self) -> list[Port]:
        return [port for port in self._ports if port.ovs]

    async def make(self) -> None:
        """They are there, up and in their bridges. Raises NetsError, and then none of them is."""
        if not self._ports:
            return
        if wrong := ports.obstacle(self._ports, await links()):
            raise NetworkNotFound(wrong)
        try:
            await _run("ip", "-batch", "-", text="\n".join(ports.make_lines(self._ports, self._owner)) + "\n")
            for port in self._in_ovs:
                await _run("ovs-vsctl", "-t", _OVS_WAIT_S, *ports.ovs_add(port, self._owner))
        except BaseException:
            with contextlib.suppress(NetsError):
                await self.remove()
            raise

    async def bind(self) -> None:
        """The guest runs here: say so to whoever controls the bridge. Nothing to do for a bridge of the kernel, which
        learns from the guest's own frames. Idempotent. Raises NetsError."""
        for port in self._in_ovs:
            await _run("ovs-vsctl", "-t", _OVS_WAIT_S, *ports.ovs_bind(port, self._owner))

    async def remove(self) -> None:
        """They are gone. Idempotent. Raises NetsError when one is left; to be repeated then."""
        if self._in_ovs:
            await _run("ovs-vsctl", "-t", _OVS_WAIT_S, *ports.ovs_remove([port.ifname for port in self._in_ovs]))
        await _delete([port.ifname for port in self._ports])


async def _delete(names: Collection[str]) -> None:
    if not names:
        return
    refused = ""
    try:
        await _run("ip", "-force", "-batch", "-", text="\n".join(ports.remove_lines(names)) + "\n")
    except NetsError as error:
        refused = str(error)  # also said of one that is gone already
    left = {link.name for link in await links()} & set(names) if refused else set[str]()
    if left:
        raise NetsError(f"taps are left ({', '.join(sorted(left))}): {refused}")


async def sweep(root: str, known: Collection[str], *, ovs: bool = False) -> list[str]:
    """Remove the taps that earlier agents of `root` left, but those of copies that are known (`inc`) or of living
    processes. Returns their names. Raises NetsError; what is left is found again at the next start."""
    there = await links()
    found = ports.left_over(there, root, known)
    await _delete(found)
    if ovs:
        names = (await _run("ovs-vsctl", "-t", _OVS_WAIT_S, *ports.ovs_find(root))).split()
        if gone := sorted((set(names) - {link.name for link in there}) | (set(names) & set(found))):
            await _run("ovs-vsctl", "-t", _OVS_WAIT_S, *ports.ovs_remove(gone))
    if found:
        log.warning("removed taps that nobody owned", taps=found)
    return found
