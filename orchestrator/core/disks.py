"""PURE. Local disks in a hand-over: what an image has, what must still be copied, and when a copy may run on it.

A guest's writes are promised by its source. A destination's image has all of them only at an instant when the guest
stands still and the copying is over without an error. Such an instant has an id (`SyncPoint.sync`), by which both ends
know it again: the source for what was written since, the destination for what its image has. Rules H15 and
H16 of docs/protocol.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from orchestrator.core.endpoint import Endpoint


@dataclass(frozen=True, slots=True, order=True)
class SyncPoint:
    """While the guest stood still, the destination's image of `disk` was made equal to the source's."""

    disk: str
    sync: str
    """The `inc` of the attempt that did it: never given twice."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SourceSide:
    """What the source knows of one disk's earlier copies. Gone with its VMM."""

    mirrors_to: str = ""
    """Id of the image that a mirror keeps up to date now; empty: none runs."""
    since: str = ""
    """The sync point since which all writes are noted; empty: they are not."""


@dataclass(frozen=True, slots=True)
class DestinationSide:
    """What the destination says of its image of one disk."""

    image: str
    """Id of the very image: another one, also of the same name and size, has another id."""
    since: str = ""
    """The sync point that it was released at, and that copying goes on from; empty: its content is worth nothing."""


@dataclass(frozen=True, slots=True)
class ImageThere:
    """One disk's image at the destination, and where the source reaches it."""

    disk: str
    side: DestinationSide
    size_bytes: int
    """As the guest sees it: equal at both ends, or it is not the same disk."""
    endpoint: Endpoint


class Copying(StrEnum):
    """How an image is brought up to date while the guest runs."""

    GOES_ON = "goes_on"
    """The mirror of an attempt before still runs into it: nothing is sent again."""
    INCREMENT = "increment"
    """What was written since the sync point that both ends name."""
    FULL = "full"
    """Everything, into an image that is made anew."""


def copying(source: SourceSide, destination: DestinationSide) -> Copying:
    """H16: an increment fits only the image that was released at the very point since which the source has noted all
    writes. Whatever is not proven is copied again."""
    if source.mirrors_to and source.mirrors_to == destination.image:
        return Copying.GOES_ON
    if source.since and source.since == destination.since:
        return Copying.INCREMENT
    return Copying.FULL


def has_every_write(drained: tuple[SyncPoint, ...], released: tuple[SyncPoint, ...]) -> bool:
    """H16: the destination holds, released by whoever wrote it, just the images that were drained in this attempt."""
    return tuple(sorted(drained)) == tuple(sorted(released))
