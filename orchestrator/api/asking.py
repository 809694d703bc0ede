"""Agents asked what they have, each within a bound."""

from __future__ import annotations

import structlog

from orchestrator.api.calls import Caller, Tools
from orchestrator.core.agent import AgentStatus
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import HostRecord
from orchestrator.rpc.agent_client import CALL_S

log = structlog.get_logger(__name__)


async def ask(tools: Tools, host: HostRecord, caller: Caller) -> AgentStatus | DroverError:
    """What the host's agent has, or why it does not say. Waits CALL_S at most.

    An agent of another host that answers at the address counts as silence, and silence proves nothing.
    """
    try:
        status = await tools.agents.at(host.control_address, host.name).get_agent(caller.remaining_s(CALL_S))
    except DroverError as error:
        log.info("an agent does not say what it has", host=host.name, why=str(error))
        return error
    if status.host.host != host.name:
        said = f"at {host.control_address} answers the agent of {status.host.host}"
        return DroverError(RefusalReason.AGENT_UNREACHABLE, said)
    return status
