"""Hosts: look at them, make them ineligible, make them eligible again."""

from __future__ import annotations

import structlog

from orchestrator.api import decisions, views
from orchestrator.api.asking import ask
from orchestrator.api.calls import Caller, Tools, tries, write
from orchestrator.api.reads import not_found
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.guest import name_error
from orchestrator.core.records import Cordon, Incarnation
from orchestrator.ledger import paths
from orchestrator.ledger.ledger import op_set
from orchestrator.ledger.records import BadRecord, decode
from orchestrator.ledger.snapshot import Snapshot
from orchestrator.ledger.store import Done
from orchestrator.rpc.agent_client import CALL_S
from protos.drover.v1 import types_pb2

log = structlog.get_logger(__name__)


class Hosts:
    """The calls about hosts."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools

    async def get(self, name: str) -> types_pb2.Host:
        """The host as the ledger has it; its agent is not asked. Raises NOT_FOUND."""
        _check_name(name)
        return _one(await self._tools.index.recent(), name)

    async def get_with_agent(self, name: str, caller: Caller) -> types_pb2.Host:
        """With what its agent says is there, or that the agent is silent. Never fails for the agent's sake."""
        _check_name(name)
        snapshot = await self._tools.index.recent()
        host = _one(snapshot, name)
        status = await ask(self._tools, snapshot.hosts[name].input.record, caller)
        owners = {uuid: guest.record.owner.host for uuid, guest in snapshot.guests.items()}
        host.agent.CopyFrom(views.host_agent(status, owners))
        return host

    async def cordon(self, name: str, why: str, caller: Caller) -> types_pb2.Host:
        """New guests and migrations no longer go there: whoever places one checks the cordon's version."""
        await self._change(name, True, why, caller)
        return await self.get(name)

    async def uncordon(self, name: str, caller: Caller) -> types_pb2.Host:
        """With the same write no evacuation says any more that the host may be powered off: what they say holds under
        the cordon that they saw."""
        await self._change(name, False, "", caller)
        return await self.get(name)

    async def rejoin(self, name: str, caller: Caller) -> types_pb2.Host:
        """The host's agent believes the ledger as it is now. Raises NOT_FOUND, AGENT_UNREACHABLE and as the agent
        does."""
        _check_name(name)
        snapshot = await self._tools.index.recent()
        _one(snapshot, name)
        found = await self._tools.ledger.read(Incarnation, paths.INCARNATION)
        if found is None:
            raise DroverError(
                RefusalReason.NOT_FOUND, "the ledger does not say which it is yet: a coordinator has to lead"
            )
        agent = self._tools.agents.at(snapshot.hosts[name].input.record.control_address, name)
        await agent.rejoin_ledger(found[0].id, caller.remaining_s(CALL_S))
        log.warning("host rejoins", host=name, incarnation=found[0].id, by=caller.by)
        return await self.get(name)

    async def _change(self, name: str, on: bool, why: str, caller: Caller) -> None:
        _check_name(name)
        path = paths.cordon(name)
        contest = tries(caller)
        while True:
            await contest.another()
            node = await self._tools.store.read(path)
            if node is None:
                raise not_found("host", name)
            current = decode(Cordon, node.data, path=path) if node.data else Cordon()
            wanted = decisions.cordon(current, on, why, caller.by)
            if wanted is None:
                return
            if isinstance(await write(self._tools, [op_set(path, wanted, node.version)], caller), Done):
                log.info("cordon", host=name, on=on, why=why, by=caller.by)
                return


def _one(snapshot: Snapshot, name: str) -> types_pb2.Host:
    entry = snapshot.hosts.get(name)
    if entry is not None:
        return views.host(entry.input, snapshot.seen[name], views.guests_by_host(snapshot).get(name, 0))
    if wrong := snapshot.unreadable.get(paths.host(name)):
        raise BadRecord(wrong)
    raise not_found("host", name)


def _check_name(name: str) -> None:
    if wrong := name_error(name):
        raise invalid([("name", wrong)])
