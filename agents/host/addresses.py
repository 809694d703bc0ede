"""Where this host listens, and at which address others reach it: settled once, before anything is opened.

Names are looked up here and nowhere else: what is registered is an IP address, which every host understands alike.
"""

from __future__ import annotations

import socket

from agents.config import AgentConfig
from orchestrator.core.endpoint import is_ip, parse_ip, unreachable_by_others
from orchestrator.core.errors import DroverError, RefusalReason


def settled(config: AgentConfig) -> AgentConfig:
    """The configuration with `address` and `listen` as plain IP addresses; `listen` is `address` where it is not given.

    Raises DroverError INVALID_ARGUMENT when others could not reach the host at `address`, or a name is not known.
    """
    address = _ip(config.address, "address")
    name = "" if is_ip(config.address) else config.address
    if wrong := unreachable_by_others(address, loopback=config.allow_loopback, name=name):
        raise DroverError(RefusalReason.INVALID_ARGUMENT, wrong, field="address")
    listen = _ip(config.listen, "listen") if config.listen else address
    return config.model_copy(update={"address": address, "listen": listen})


def _ip(text: str, field: str) -> str:
    if is_ip(text):
        return str(parse_ip(text))
    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = f"{text!r} is no IP address, and no name that can be looked up here ({error})"
        raise DroverError(RefusalReason.INVALID_ARGUMENT, said, field=field) from error
    return str(parse_ip(str(found[0][4][0])))
