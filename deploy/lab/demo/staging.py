"""The stage: a cluster of the demo's own, with the guests of a guest file on one host, each heard on its console."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from deploy.lab.cluster import commands, console_client, network, parts
from deploy.lab.cluster.evidence import Beat, parse_beat
from deploy.lab.cluster.layout import Layout
from deploy.lab.commands import cluster
from deploy.lab.workload import LINUX_INITRD, is_linux, linux_address
from orchestrator.cli import guest_file
from orchestrator.cli.exits import CliError, Exit, explain
from orchestrator.cli.guest import AT_A_TIME
from orchestrator.core.errors import DroverError
from orchestrator.core.records import GuestSpec
from orchestrator.rpc.orchestrator_client import OrchestratorClient

GUESTS = Path(__file__).with_name("guests.yaml")
GUESTS_11 = GUESTS.with_name("guests-11.yaml")
"""More of them where QEMU has per-device ACKs: devices inside the VMM."""
GUESTS_LINUX = GUESTS.with_name("guests-linux.yaml")
"""More of them where their kernel is, and namespaces for their network."""
HOSTS = 4
FIRST_BEAT_S = 30.0
LINUX_S = 150.0
"""What Linux takes to boot beside all the others, on a machine that does much else."""
_LOOK_S = 0.05


def guest_files(qemu: str, directory: Path) -> tuple[Path, ...]:
    """What the demo runs when nobody names guests. `qemu` as of `drover up`, `directory` the cluster's."""
    linux = () if without_linux(directory) else (GUESTS_LINUX,)
    return (GUESTS, GUESTS_11, *linux) if qemu.startswith("11") else (GUESTS, *linux)


def without_linux(directory: Path) -> str:
    """Why the demo has no Linux guests here, as a clause; empty: it has them."""
    images, _ = parts.linux_guest(Layout.of(directory))
    if not (images / LINUX_INITRD).is_file():
        return "their kernel was not to be had (`make linux-guest` says why)"
    no_network = network.obstacle()
    return f"there is no network for them ({no_network})" if no_network else ""


def read_guests(files: Sequence[Path]) -> list[GuestSpec]:
    """Raises CliError with everything that is wrong with the files."""
    try:
        return guest_file.load([(str(path), path.read_text()) for path in files])
    except OSError as error:
        raise CliError(
            Exit.USAGE, f"cannot read {error.filename}: {error.strerror}", hint="name a guest file"
        ) from None
    except guest_file.GuestFileError as error:
        raise CliError(Exit.USAGE, "a guest file is wrong", lines=[str(each) for each in error.problems]) from None


def refuse_running(directory: Path) -> None:
    """The demo ends the cluster that it finds in its directory, so it must be its own. Raises CliError."""
    if commands.status(directory).running:
        raise CliError(
            Exit.REFUSED,
            f"a cluster runs in {directory}: another demo, or one that was killed",
            hint=f"`drover down --dir {directory}` ends it; --dir names another directory",
        )


def raise_cluster(directory: Path, qemu: str) -> None:
    """`drover up`; returns when everything serves. Raises what `up` raises."""
    arguments = ["--dir", str(directory), "--hosts", str(HOSTS), *(["--qemu", qemu] if qemu else [])]
    cluster.up.main(arguments, prog_name="drover up", standalone_mode=False)


def client_of(directory: Path) -> OrchestratorClient:
    """Of the API of the demo's cluster."""
    return OrchestratorClient(f"unix:{Layout.of(directory).api_socket}")


def run_guests(directory: Path, specs: Sequence[GuestSpec], host: str) -> None:
    """Run them all and wait until each is heard. Raises CliError when one cannot be run, or stays silent."""
    client = client_of(directory)

    def create(spec: GuestSpec) -> None:
        client.create_guest(spec, host)

    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        list(pool.map(create, specs))
    except DroverError as error:
        raise explain(error) from None
    finally:
        client.close()  # ends calls under way when we are interrupted
        pool.shutdown(cancel_futures=True)
    within_s = LINUX_S if any(is_linux(spec.boot) for spec in specs) else FIRST_BEAT_S
    _await_beats(directory, {spec.name for spec in specs}, within_s)


def _await_beats(directory: Path, names: set[str], within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while silent := names - beats(directory).keys():
        if time.monotonic() > deadline:
            raise CliError(Exit.FAILED, f"no heartbeat within {within_s:.0f} s of {', '.join(sorted(silent))}")
        time.sleep(_LOOK_S)


def addresses(directory: Path, names: Sequence[str]) -> dict[str, str]:
    """Where Linux guests answer. Raises DroverError."""
    if not names:
        return {}
    with client_of(directory) as client:
        return {name: linux_address(client.get_guest(name).uuid) for name in names}


def beats(directory: Path) -> dict[str, Beat]:
    """The last word on an open console of each guest, where that is a heartbeat. The stamps are not told."""
    consoles = console_client.list_consoles_sync(directory)
    found = {each.vmm.guest: parse_beat(0, each.last_line or "") for each in consoles if each.connected}
    return {guest: beat for guest, beat in found.items() if beat}
