"""The certificates of one cluster on one machine: an authority, and an identity of every part, made before any starts.

A cluster lives for less long than its certificates do, and who may read its directory may do everything anyway.
"""

from __future__ import annotations

import ssl

from deploy.lab.cluster.layout import Layout, Places
from orchestrator.ledger.store import StoreUnavailable
from orchestrator.pki.names import Role, of_host, of_role

CLUSTER = "local"
_HOURS = 24.0 * 7


def make(layout: Layout, places: Places) -> None:
    """What is there already stays. Raises OSError and PkiError."""
    # Here, for the command line need not wait for them.
    from orchestrator.pki.authority import Authority
    from orchestrator.pki.files import utc_now

    if not layout.authority.exists():
        Authority.create(layout.authority, CLUSTER, utc_now())
    authority = Authority(layout.authority)
    wanted = [of_host(CLUSTER, place.name) for place in places.hosts]
    wanted += [of_role(CLUSTER, role) for role in (Role.API, Role.COORDINATOR, Role.ADMIN, Role.ZOOKEEPER)]
    for identity in wanted:
        directory = layout.identity(identity.kind, identity.name)
        if not directory.exists():
            authority.issue(identity, directory, utc_now(), hours=_HOURS)
    if len(places.zookeepers) > 1 and not layout.quorum_identity.exists():
        own = Authority.create(layout.quorum_identity.parent / "ca", CLUSTER, utc_now())
        own.issue(of_role(CLUSTER, Role.ZOOKEEPER), layout.quorum_identity, utc_now(), hours=_HOURS)


def as_admin(layout: Layout) -> ssl.SSLContext:
    """For questions to ZooKeeper. Raises OSError."""
    from orchestrator.pki.files import CA, CERT, KEY

    directory = layout.identity("role", Role.ADMIN)
    context = ssl.create_default_context(cafile=str(directory / CA))
    context.load_cert_chain(directory / CERT, directory / KEY)
    return context


async def enrolled(layout: Layout, places: Places, timeout_s: float) -> str | None:
    """Every host of the cluster may register. None: done; otherwise what was in the way."""
    from orchestrator.ledger.enrolment import enrol
    from orchestrator.ledger.zookeeper import ZooKeeperStore

    store = ZooKeeperStore(places.zookeeper, tls=layout.identity("role", Role.ADMIN))
    try:
        await store.start(timeout_s)
        for place in places.hosts:
            await enrol(store, place.name)
    except StoreUnavailable as error:
        return str(error)
    finally:
        await store.close()
    return None
