"""The files of a VMM under libvirt: its note, and links by which its process is told."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from agents.engine.base import EngineError, VmmMetadata, VmmSpec
from agents.engine.libvirt import domain
from orchestrator import proc
from orchestrator.core.liveness import LivenessUnknown
from orchestrator.whole import write_whole


def note_path(spec: VmmSpec) -> Path:
    """`VmmMetadata`, for an agent that is started later."""
    return spec.directory / f"{spec.inc}.json"


def owner_path(spec: VmmSpec) -> Path:
    """Room for the note that an incoming VMM leaves when it becomes the guest."""
    return spec.directory / f"{spec.inc}.owner"


def client_sockets(spec: VmmSpec) -> tuple[Path, Path]:
    """Where libvirt's client finds the daemons of source and destination during a migration."""
    return spec.directory / f"{spec.inc}.lvs", spec.directory / f"{spec.inc}.lvd"


def write(path: Path, metadata: VmmMetadata) -> None:
    """Atomic. Raises OSError."""
    write_whole(path, json.dumps(asdict(metadata)).encode())


def link_all(spec: VmmSpec, kernel: Path, initrd: Path | None) -> None:
    """What the domain names among the guest's files. Raises OSError."""
    links = [(domain.kernel_link(spec), kernel.absolute()), (spec.console_path, domain.console_socket(spec))]
    if initrd is not None:
        links.append((domain.initrd_link(spec), initrd.absolute()))
    for link, target in links:
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def bar(spec: VmmSpec) -> None:
    """A VMM of the copy that libvirt has still to start cannot load its kernel, and ends at once: libvirt may come to a
    call after whoever made it is dead or has given up. Idempotent. Raises OSError."""
    domain.kernel_link(spec).unlink(missing_ok=True)


def remove_all(spec: VmmSpec) -> None:
    """The note last: an agent that is killed in the middle leaves a successor that knows what to remove."""
    links = (domain.kernel_link(spec), domain.initrd_link(spec), domain.console_socket(spec), spec.console_path)
    for path in (*links, *client_sockets(spec), owner_path(spec), note_path(spec)):
        path.unlink(missing_ok=True)


def process_of(spec: VmmSpec) -> tuple[int, int] | None:
    """Pid and start time of the process that libvirt started for the copy; None: there is none. Blocking: reads /proc.

    Raises EngineError when it cannot be told.
    """
    try:
        for pid in proc.vmms_naming(domain.kernel_link(spec)):
            if (start_time := proc.start_time_of(pid)) is not None:
                return pid, start_time
    except LivenessUnknown as error:
        raise EngineError(f"the VMM of {spec.spec.name} is not known: {error}") from error
    return None
