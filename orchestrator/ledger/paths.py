"""The tree of znodes, below the chroot (docs/protocol.md)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

CHROOT = "/drover/v1"
NAMES = "/names"
GUESTS = "/guests"
MIGRATIONS = "/migs"
EVACUATIONS = "/evac"
REQUESTS = "/requests"
LAYOUT = "/layout"
"""Which layout this tree has: see `ledger.layout`."""
RIGHTS = "/rights"
"""There once every node says who may write it."""
ACTIVE = "/active"
"""What is not over: see `ledger.active`."""
ACTIVE_MIGRATIONS = "/active/migs"
ACTIVE_EVACUATIONS = "/active/evac"
ENDED_EVACUATIONS = "/active/ended"
LEDGER_CLOCK = "/reqclock"
"""Counts intervals, by which what is kept ages (docs/adr/0017)."""
HOSTS = "/hosts"
FENCE = "/fence"
DEATHS = "/deaths"
FENCERS = "/fencers"
COORDINATORS = "/coord"
"""Above everything that coordinators write of themselves."""
SHARDS = "/coord/shards"
"""Into how many shards the fleet is shared out among coordinators (`core.shards`); empty or missing: it is one."""
COORDINATOR = "/coord/0"
SEATS = "/coord/seats"
CLUSTER = "/cluster"
INCARNATION = "/cluster/incarnation"
"""Which ledger this is (`core.records.Incarnation`)."""
RESTORE = "/cluster/restore"
"""There while a backup is being imported."""
BARRIER = "/barrier"
ROOTS = (
    NAMES,
    GUESTS,
    MIGRATIONS,
    EVACUATIONS,
    ACTIVE_MIGRATIONS,
    ACTIVE_EVACUATIONS,
    ENDED_EVACUATIONS,
    REQUESTS,
    HOSTS,
    FENCE,
    DEATHS,
    FENCERS,
    COORDINATOR,
    SEATS,
    BARRIER,
)


SHARDED = (GUESTS, MIGRATIONS, EVACUATIONS, REQUESTS)
"""Roots of what grows: what is below them lies in up to 256 nodes each, so that no listing outgrows a reply. A node of
these, a shard, has two characters for a name, and is made when it is first needed."""


def shard(path: str) -> str:
    """The node that must be there before `path`, of a guest, migration, evacuation or request, can be created."""
    return path.rpartition("/")[0]


def _spread(name: str) -> str:
    """The shard of what has a name that callers chose, or a host's: the first characters may all be the same."""
    return hashlib.sha256(name.encode()).hexdigest()[:2]


def name(guest_name: str) -> str:
    """Uuid of the present life of a guest of that name. With the record in one transaction, so a name has one life."""
    return f"{NAMES}/{guest_name}"


def guest(uuid: str) -> str:
    """The guest record: who may run it, and the attempt under way. One per life; no step of the protocol deletes it."""
    return f"{GUESTS}/{uuid[:2]}/{uuid}"


def guest_spec(uuid: str) -> str:
    """What the guest is. Written by its birth and by edits, each a compare-and-set."""
    return f"{guest(uuid)}/spec"


def want_run(uuid: str) -> str:
    """The operator's wish that it runs or stands. Its own node, so that a pause never moves the record's version."""
    return f"{guest(uuid)}/want_run"


def newest_migration(uuid: str) -> str:
    """Id of the guest's newest migration: another is created only once that one is over."""
    return f"{guest(uuid)}/migration"


def migration(migration_id: str) -> str:
    """A migration: guest, wanted destination, policy; immutable."""
    return f"{MIGRATIONS}/{migration_id[:2]}/{migration_id}"


def migration_state(migration_id: str) -> str:
    """How far a migration has come; written by the coordinator, and by the API for a cancel."""
    return f"{migration(migration_id)}/state"


def attempts(migration_id: str) -> str:
    """One report per attempt."""
    return f"{migration(migration_id)}/attempts"


def requests(migration_id: str) -> str:
    """Accepted requests for switchover ACKs. Its version moves only when one is accepted (H14)."""
    return f"{migration(migration_id)}/req"


def acks(migration_id: str) -> str:
    """Acknowledgements, apart, so that an ACK never looks like a request."""
    return f"{migration(migration_id)}/ack"


def evacuation(job: str) -> str:
    """A job: host, limits, policy; immutable."""
    return f"{EVACUATIONS}/{_spread(job)}/{job}"


def evacuation_state(job: str) -> str:
    """The head of a job: phase, counts, what it says. Its guests are in `evacuation_guests`."""
    return f"{evacuation(job)}/state"


def evacuation_guests(job: str, number: int) -> str:
    """Some of the guests of a job, see `ledger.evacuations`."""
    return f"{evacuation(job)}/guests-{number:04}"


def is_evacuation_guests(child: str) -> bool:
    """Whether a child of a job's node holds guests."""
    return child.startswith("guests-")


def active_migration(migration_id: str) -> str:
    """There while the migration is not over. Holds its guest's uuid."""
    return f"{ACTIVE_MIGRATIONS}/{migration_id}"


def active_evacuation(job: str) -> str:
    """There while the job is not over. Holds its host."""
    return f"{ACTIVE_EVACUATIONS}/{job}"


def ended_evacuation(job: str) -> str:
    """There once the job is over, until its host is uncordoned: it says whether that is safe to power off."""
    return f"{ENDED_EVACUATIONS}/{job}"


def request_id(request: str) -> str:
    """What a request id was used for, so that a repeated request is answered alike."""
    return f"{REQUESTS}/{_spread(request)}/{request}"


def host(host_name: str) -> str:
    """The host record: the agent's addresses, what the host can carry, whose machine it is."""
    return f"{HOSTS}/{host_name}"


def cordon(host_name: str) -> str:
    """Whether the host takes guests. Always there: absence cannot be checked in a transaction."""
    return f"{HOSTS}/{host_name}/cordon"


def live(host_name: str) -> str:
    """Ephemeral, of the agent's session: who serves the host just now. A hint, never a right."""
    return f"{HOSTS}/{host_name}/live"


def reservations(host_name: str) -> str:
    """Above what is promised to migrations on their way to the host. Empty; its version moves with whatever takes room
    there, so that two who saw the same free memory cannot both take it, and with nothing that frees it."""
    return f"{HOSTS}/{host_name}/resv"


def reservation(host_name: str, migration_id: str) -> str:
    """What is promised to one migration: from the opening of its attempt until its end, or until it goes elsewhere."""
    return f"{reservations(host_name)}/{migration_id}"


def space(host_name: str) -> str:
    """Free bytes of the host's pools. May be missing: the host's record says how much there was."""
    return f"{HOSTS}/{host_name}/space"


def host_guests(host_name: str) -> str:
    """Above the nodes of the guests that concern the host: see `ledger.markers`."""
    return f"{HOSTS}/{host_name}/guests"


def host_guest(host_name: str, uuid: str) -> str:
    """There while the record of the guest names the host, and some time longer. Empty."""
    return f"{host_guests(host_name)}/{uuid}"


def fences(host_name: str) -> str:
    """Certificates of the host's power cycles."""
    return f"{FENCE}/{host_name}"


def fence(host_name: str, boot_id: str) -> str:
    """The certificate that one power cycle is over (H11)."""
    return f"{FENCE}/{host_name}/{boot_id}"


def death(host_name: str) -> str:
    """A declaration that the host is dead, and how far it has come."""
    return f"{DEATHS}/{host_name}"


def epoch(fleet_shard: int = 0) -> str:
    """Its version is the epoch of the coordinator that leads this shard of the fleet, or led it last."""
    return f"{COORDINATORS}/{fleet_shard}/epoch"


def leader(fleet_shard: int = 0) -> str:
    """Ephemeral: the seat of the coordinator that leads this shard of the fleet."""
    return f"{COORDINATORS}/{fleet_shard}/leader"


def seat(name: str) -> str:
    """Ephemeral: a coordinator that runs, whether it leads or waits for its turn."""
    return f"{SEATS}/{name}"


def quarantine(fleet_shard: int = 0) -> str:
    """What the leader of this shard of the fleet has set aside, and why."""
    return f"{COORDINATORS}/{fleet_shard}/quarantine"


_OF_A_GUEST = ("", "spec", "want_run")
_OF_A_HOST = ("", "cordon", "live", "resv", "space")


def guest_of(path: str) -> str:
    """The uuid of the guest whose record, specification or wish stands at `path`; empty for any other node."""
    root, _, rest = path[1:].partition("/")
    _, _, rest = rest.partition("/")
    uuid, _, child = rest.partition("/")
    return uuid if f"/{root}" == GUESTS and child in _OF_A_GUEST else ""


def host_of(path: str) -> str:
    """The host whose record, cordon, session, reservations, space or certificates stand at `path`; empty: none's."""
    root, _, rest = path[1:].partition("/")
    name, _, child = rest.partition("/")
    of_host = child in _OF_A_HOST or child.startswith("resv/")
    return name if f"/{root}" == FENCE or (f"/{root}" == HOSTS and of_host) else ""


def active_of(path: str, root: str) -> str:
    """The migration or job whose node of the active set stands at `path`; empty for any other node. `root` is the part
    of the set that is meant."""
    name = path[len(root) + 1 :] if path.startswith(f"{root}/") else ""
    return "" if "/" in name else name


def is_quarantine(path: str) -> bool:
    """Whether a list of what a leader has set aside stands at `path`."""
    return path.startswith(f"{COORDINATORS}/") and path.endswith("/quarantine")


def member(path: str, root: str, children: Sequence[str] | None = None) -> str:
    """Of a sharded root, the member whose node, or one of whose `children` (None: whichever), stands at `path`; empty
    for any other node."""
    _, first, *rest = path.split("/")
    name, child = (rest[1] if len(rest) > 1 else ""), "/".join(rest[2:])
    return name if f"/{first}" == root and (children is None or child in children) else ""
