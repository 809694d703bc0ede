"""What every operation needs: the shared parts, who calls and how long they wait, and writes that come to an end."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from google.protobuf.message import Message

from orchestrator.api.ages import Ages
from orchestrator.core.errors import DroverError, RefusalReason
from orchestrator.core.records import HostRecord
from orchestrator.fleet import Fleet
from orchestrator.history import HistoryFile
from orchestrator.ledger import paths
from orchestrator.ledger.index import Index
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.store import Conflict, Done, Op, OutcomeUnknown, Store, StoreUnavailable
from orchestrator.ledger.tries import TRIES, Tries
from orchestrator.rpc.agent_client import AgentClient, AgentClients

WRITE_TRIES = TRIES
RETRY_S = 0.05


@dataclass(slots=True)
class Tools:
    """What the operations of one API process share."""

    store: Store
    agents: AgentClients
    fleet: Fleet
    index: Index
    ledger: Ledger
    instructions: bool = False
    history: HistoryFile | None = None
    """What the ledger has forgotten; None: it is not to be had here."""
    looking_back: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One look through the history at a time: it is long, and callers who ask for what never was must not take all
    threads of the process."""
    wall_s: Callable[[], float] = time.time
    """Only for stamps that people read."""
    ages: Ages = field(default_factory=Ages)
    placing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One placement at a time per process, so that it does not lose races against itself."""

    async def agent(self, host: str) -> AgentClient:
        """Of that host, where it registered last. Raises AGENT_UNREACHABLE for a host that has registered none,
        StoreUnavailable, BadRecord."""
        found = await self.ledger.read(HostRecord, paths.host(host))
        if found is None:
            raise DroverError(RefusalReason.AGENT_UNREACHABLE, f"{host} has not registered an agent")
        return self.agents.at(found[0].control_address, host)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, and until when they wait, on the event loop's clock."""

    by: str
    deadline_s: float

    def remaining_s(self, at_most_s: float = 3600.0) -> float:
        """What is left, but never less than enough to try once."""
        return min(at_most_s, max(0.05, self.deadline_s - asyncio.get_running_loop().time()))

    @property
    def out_of_time(self) -> bool:
        """The caller has stopped waiting, or is about to."""
        return asyncio.get_running_loop().time() >= self.deadline_s


async def write(tools: Tools, ops: Sequence[Op], caller: Caller) -> Done | Conflict | None:
    """One transaction. None: its answer was lost, and a barrier stands behind it: what is read now decides.

    Raises LEDGER_UNREACHABLE when it certainly never left, OUTCOME_UNKNOWN when that cannot be told in time.
    """
    result = await tools.store.multi(ops)
    if not isinstance(result, OutcomeUnknown):
        return result
    if not result.sent:
        raise DroverError(RefusalReason.LEDGER_UNREACHABLE, f"nothing was written: {result.why or 'no connection'}")
    while True:
        try:
            await tools.store.barrier()
            return None
        except StoreUnavailable as error:
            if caller.out_of_time:
                raise DroverError(
                    RefusalReason.OUTCOME_UNKNOWN,
                    f"it is not known whether the request was written ({error}): look again, or repeat it as it is",
                ) from error
            await asyncio.sleep(RETRY_S)


def tries(caller: Caller) -> Tries:
    """For a loop of looks and writes. It ends with OUTCOME_UNKNOWN when others are always faster, or the caller's time
    is over."""
    return Tries(contended, pause=lambda: pause(caller))


async def pause(caller: Caller) -> None:
    """Between two tries of a write that lost a race. Raises OUTCOME_UNKNOWN when the caller's time is over."""
    if caller.out_of_time:
        raise contended()
    await asyncio.sleep(RETRY_S)


def contended() -> DroverError:
    """To be raised when WRITE_TRIES writes in a row lost to others; none of them was applied."""
    return DroverError(RefusalReason.OUTCOME_UNKNOWN, "others kept changing what this request changes: try again")


def digest(method: str, request: Message, *, without: str = "request_id") -> str:
    """Of a request's content: equal for the same request under the same id."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField(without)
    return hashlib.sha256(method.encode() + b"\n" + content.SerializeToString(deterministic=True)).hexdigest()
