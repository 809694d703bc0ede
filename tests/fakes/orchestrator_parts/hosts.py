"""Hosts: cordons, deaths, removals."""

# ruff: noqa: N802 (the methods have the names that the service gives them)

from __future__ import annotations

from orchestrator.api import hosts, lists, views
from orchestrator.api.listing import Field, Kind, Listing
from orchestrator.core.agent import AgentStatus
from orchestrator.core.death import issued_at_s
from orchestrator.core.errors import DroverError, RefusalReason, invalid
from orchestrator.core.ids import HostRef
from protos.drover.v1 import orchestrator_pb2 as pb
from protos.drover.v1 import types_pb2 as types
from tests.fakes.orchestrator_parts.state import State

R = RefusalReason


class Hosts(State):
    async def GetHost(self, request: pb.GetHostRequest, context: object) -> types.Host:
        await self._called("GetHost", request)
        found = types.Host()
        found.CopyFrom(self._host(request.name))
        if request.ask_agent:
            nothing = AgentStatus(HostRef(found.name, found.boot_id), 0, complete=True)
            owners = {each.uuid: each.host for each in self.guests.values()}
            found.agent.CopyFrom(views.host_agent(self.agents.get(found.name, nothing), owners))
        return found

    async def ListHosts(self, request: pb.ListHostsRequest, context: object) -> pb.ListHostsResponse:
        await self._called("ListHosts", request)
        page = lists.page(_HOSTS, self.hosts.values(), request)
        return pb.ListHostsResponse(hosts=page.rows, unreadable=self.unreadable, next_page_token=page.next_page_token)

    async def CordonHost(self, request: pb.CordonHostRequest, context: object) -> types.Host:
        await self._called("CordonHost", request)
        host = self._host(request.name)
        host.cordoned, host.cordon_reason = True, request.reason or host.cordon_reason
        return host

    async def UncordonHost(self, request: pb.UncordonHostRequest, context: object) -> types.Host:
        await self._called("UncordonHost", request)
        host = self._host(request.name)
        host.cordoned, host.cordon_reason = False, ""
        for evacuation in self.evacuations.values():
            if evacuation.host == host.name:
                evacuation.safe_to_power_off = False
        return host

    async def RejoinHost(self, request: pb.RejoinHostRequest, context: object) -> types.Host:
        await self._called("RejoinHost", request)
        return self._host(request.name)

    async def DeclareHostDead(self, request: pb.DeclareHostDeadRequest, context: object) -> types.HostDeath:
        await self._called("DeclareHostDead", request)
        host = self._host(request.name)
        if host.state == types.HOST_STATE_LIVE:
            raise DroverError(R.HOST_ALIVE, f"the session of the agent of {host.name} lives")
        death = self.deaths.setdefault(host.name, types.HostDeath(host=host.name, boot_id=host.boot_id))
        if host.state == types.HOST_STATE_DEAD:
            death.phase = types.HOST_DEATH_PHASE_DONE
            return death
        if not request.confirmation_token:
            plan = types.HostDeath()
            plan.CopyFrom(death)
            plan.phase, plan.confirmation_token = types.HOST_DEATH_PHASE_PLANNED, f"token-{host.name}"
            return plan
        if issued_at_s(request.confirmation_token) is None and not request.confirmation_token.startswith("token-"):
            raise invalid([("confirmation_token", "is no token of this call")])
        if request.confirmation_token != f"token-{host.name}":
            raise DroverError(R.CONFIRMATION_STALE, f"{host.name} or its guests have changed")
        if not death.fencer and not request.on_operators_word:
            raise DroverError(R.FENCER_REQUIRED, f"no fencer is configured for {host.name}")
        host.state = types.HOST_STATE_DEAD
        death.phase, death.message = types.HOST_DEATH_PHASE_DONE, f"{host.name} is dead"
        death.on_operators_word, death.requested_by = request.on_operators_word, request.requested_by
        return death

    async def GetHostDeath(self, request: pb.GetHostDeathRequest, context: object) -> types.HostDeath:
        await self._called("GetHostDeath", request)
        hosts._check_name(request.name)
        return self._known(self.deaths, request.name, "declaration of the death of")

    async def RemoveHost(self, request: pb.RemoveHostRequest, context: object) -> pb.RemoveHostResponse:
        await self._called("RemoveHost", request)
        host = self._host(request.name)
        if host.state == types.HOST_STATE_LIVE:
            raise DroverError(R.HOST_ALIVE, f"the session of the agent of {host.name} lives")
        there = [each.name for each in self.guests.values() if each.host == host.name]
        if there:
            raise DroverError(R.HOST_NOT_EMPTY, f"{len(there)} guests are recorded on {host.name}")
        if host.state != types.HOST_STATE_DEAD and not host.cordoned:
            raise DroverError(R.HOST_NOT_EMPTY, f"{host.name} is silent, but neither cordoned nor declared dead")
        del self.hosts[host.name]
        return pb.RemoveHostResponse()


_HOSTS = Listing[types.Host](
    {
        "name": Field(Kind.TEXT, lambda row: row.name),
        "cordoned": Field(Kind.BOOL, lambda row: row.cordoned),
        "memory_mib": Field(Kind.NUMBER, lambda row: row.memory_mib),
    },
    key="name",
    order_by="name",
)
