"""How many descriptors this process may have, and how many of them strangers may take.

An agent without a free descriptor can begin nothing: no VMM, no note, no connection to a peer. Connections from outside
are therefore bounded to a part of what there is; the rest is kept for guests (about ten for each) and for the ledger.
"""

from __future__ import annotations

import resource

import structlog

log = structlog.get_logger(__name__)

MAX_CONNECTIONS = 1024
"""Of one server: more than a cluster has agents, coordinators and API replicas."""
_SHARE = 4
FEW = 4096
"""With fewer than so many, a host of some hundred guests runs out of them."""


def raise_limit() -> int:
    """Set the soft limit to the hard one, for this process and what it starts; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError) as error:
        log.warning("the limit of descriptors cannot be raised", limit=soft, error=str(error))
    if soft < FEW:
        log.warning("few descriptors: raise the hard limit of open files (LimitNOFILE)", limit=soft, wanted=FEW)
    return soft


def connections_of(limit: int) -> int:
    """How many connections each of the agent's servers takes, so that all of them leave half of `limit` to guests."""
    return max(16, min(MAX_CONNECTIONS, limit // _SHARE))
