"""What only a guest's host knows against moving it. Asked where somebody only checks, before anything is written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from orchestrator.api.calls import Caller, Tools
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.obstacles import certain
from orchestrator.core.offers import Obstacle
from orchestrator.core.placement import Choice, PlannedGuest
from orchestrator.ledger.records import BadRecord

CHECK_S = 3.0
"""For the answer of one agent."""
AT_ONCE = 500
"""Guests that an agent is asked about in one call."""


async def obstacles(
    tools: Tools, host: str, guests: Sequence[str], caller: Caller
) -> Mapping[str, tuple[Obstacle, ...]]:
    """By the guests' uuids. What cannot be found out is an obstacle of its own: it proves nothing, and is told."""
    found: dict[str, tuple[Obstacle, ...]] = {}
    try:
        agent = await tools.agent(host)
        async with asyncio.timeout(caller.remaining_s(CHECK_S)):
            for first in range(0, len(guests), AT_ONCE):
                part = guests[first : first + AT_ONCE]
                answer = await agent.check_guests(part, caller.remaining_s(CHECK_S))
                found |= {uuid: answer.get(uuid, _not_there(host)) for uuid in part}
    except TimeoutError:
        error = DroverError(RefusalReason.OUTCOME_UNKNOWN, f"the agent of {host} did not answer in time")
        return {uuid: found.get(uuid, _not_told(error)) for uuid in guests}
    except (DroverError, BadRecord) as error:
        return {uuid: found.get(uuid, _not_told(error)) for uuid in guests}
    return found


def _not_there(host: str) -> tuple[Obstacle, ...]:
    return ((RefusalReason.OUTCOME_UNKNOWN, f"the agent of {host} does not have it"),)


def _not_told(error: DroverError | BadRecord) -> tuple[Obstacle, ...]:
    """An agent of an older version does not know the question; it refuses an attempt all the same."""
    unreachable = isinstance(error, DroverError) and error.reason is RefusalReason.AGENT_UNREACHABLE
    reason = RefusalReason.AGENT_UNREACHABLE if unreachable else RefusalReason.OUTCOME_UNKNOWN
    said = error.message if isinstance(error, DroverError) else str(error)
    return ((reason, f"what only its host knows was not checked: {said}"),)


def need_none(name: str, found: Iterable[Obstacle]) -> None:
    """Raises what certainly stands in the guest's way: the first reason, and a sentence with all of them."""
    sure = [each for each in found if certain(each)]
    if sure:
        said = "; ".join(sentence for _, sentence in sure)
        raise DroverError(sure[0][0], f"guest {name}: {said}")


def despite(planned: PlannedGuest, found: Iterable[Obstacle]) -> PlannedGuest:
    """A guest's place in a plan, given up if it cannot leave its host."""
    sure = [each for each in found if certain(each)]
    if not sure or planned.choice.destination is None:
        return planned
    said = "; ".join(sentence for _, sentence in sure)
    return replace(planned, choice=Choice(None, planned.choice.verdicts, sure[0][0], said))
