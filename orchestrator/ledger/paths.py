"""The tree of znodes, below the chroot (docs/protocol.md)."""

from __future__ import annotations

CHROOT = "/drover/v1"
NAMES = "/names"
GUESTS = "/guests"
MIGRATIONS = "/migs"
EVACUATIONS = "/evac"
REQUESTS = "/requests"
REQUEST_CLOCK = "/reqclock"
"""Counts intervals, by which requests age (docs/adr/0017)."""
HOSTS = "/hosts"
FENCE = "/fence"
DEATHS = "/deaths"
FENCERS = "/fencers"
COORDINATOR = "/coord/0"
BARRIER = "/barrier"
ROOTS = (NAMES, GUESTS, MIGRATIONS, EVACUATIONS, REQUESTS, HOSTS, FENCE, DEATHS, FENCERS, COORDINATOR, BARRIER)


def name(guest_name: str) -> str:
    return f"{NAMES}/{guest_name}"


def guest(uuid: str) -> str:
    return f"{GUESTS}/{uuid}"


def guest_spec(uuid: str) -> str:
    return f"{GUESTS}/{uuid}/spec"


def want_run(uuid: str) -> str:
    return f"{GUESTS}/{uuid}/want_run"


def newest_migration(uuid: str) -> str:
    return f"{GUESTS}/{uuid}/migration"


def migration_shard(migration: str) -> str:
    return f"{MIGRATIONS}/{migration[:2]}"


def migration(migration_id: str) -> str:
    """Sharded by the first two characters so that no listing outgrows a reply."""
    return f"{migration_shard(migration_id)}/{migration_id}"


def migration_state(migration_id: str) -> str:
    return f"{migration(migration_id)}/state"


def attempts(migration_id: str) -> str:
    return f"{migration(migration_id)}/attempts"


def requests(migration_id: str) -> str:
    return f"{migration(migration_id)}/req"


def acks(migration_id: str) -> str:
    return f"{migration(migration_id)}/ack"


def evacuation(job: str) -> str:
    return f"{EVACUATIONS}/{job}"


def evacuation_state(job: str) -> str:
    return f"{EVACUATIONS}/{job}/state"


def evacuation_guests(job: str, number: int) -> str:
    """Some of the guests of a job, see `ledger.evacuations`."""
    return f"{EVACUATIONS}/{job}/guests-{number:04}"


def is_evacuation_guests(child: str) -> bool:
    """Whether a child of a job's node holds guests."""
    return child.startswith("guests-")


def request_id(request: str) -> str:
    return f"{REQUESTS}/{request}"


def host(host_name: str) -> str:
    return f"{HOSTS}/{host_name}"


def cordon(host_name: str) -> str:
    return f"{HOSTS}/{host_name}/cordon"


def live(host_name: str) -> str:
    return f"{HOSTS}/{host_name}/live"


def reservations(host_name: str) -> str:
    return f"{HOSTS}/{host_name}/resv"


def fences(host_name: str) -> str:
    return f"{FENCE}/{host_name}"


def fence(host_name: str, boot_id: str) -> str:
    return f"{FENCE}/{host_name}/{boot_id}"


def death(host_name: str) -> str:
    return f"{DEATHS}/{host_name}"


def epoch() -> str:
    return f"{COORDINATOR}/epoch"


def leader() -> str:
    return f"{COORDINATOR}/leader"


def quarantine() -> str:
    """What the leader has set aside, and why."""
    return f"{COORDINATOR}/quarantine"
