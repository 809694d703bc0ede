"""The lab's devices behind the shim protocol (protos/drover/v1/shim.proto): gRPC in front of `DeviceServer`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from grpc import StatusCode, aio

from deploy.lab.devices.scenario import scenario_from
from deploy.lab.devices.scenario_text import format_scenario
from deploy.lab.devices.server import CallError, DeviceServer
from orchestrator.rpc import channels
from protos.drover.v1 import shim_pb2 as pb
from protos.drover.v1.shim_pb2_grpc import ShimServiceServicer, add_ShimServiceServicer_to_server

Context = aio.ServicerContext[Any, Any]

_KINDS = {
    "": pb.STATE_KIND_UNSPECIFIED,
    "precopy": pb.STATE_KIND_PRECOPY,
    "initial_sent": pb.STATE_KIND_INITIAL_SENT,
    "stop_copy": pb.STATE_KIND_STOP_COPY,
    "end": pb.STATE_KIND_END,
    "over": pb.STATE_KIND_OVER,
}
_WORDS = {number: word for word, number in _KINDS.items()}


async def serve(server: DeviceServer, path: Path) -> aio.Server:
    """Serve at a unix socket; the caller stops it."""
    made = channels.aio_server()
    add_ShimServiceServicer_to_server(ShimServicer(server), made)
    channels.listen(made, f"unix:{path}")
    await made.start()
    return made


class ShimServicer(ShimServiceServicer):
    """Each call is one of `DeviceServer`; what that refuses becomes a status with its sentence."""

    def __init__(self, server: DeviceServer) -> None:
        self._server = server

    async def _call(
        self, name: str, request: Any, context: Context, body: bytes = b"", **fields: object
    ) -> tuple[dict[str, Any], bytes]:
        await self._must_be_ours(request.tag, context)
        key = "" if name == "read" else request.call_id
        try:
            return await self._server.call(name, request.tag.device, fields, body, key)
        except CallError as error:
            await _refuse(context, error)

    async def _must_be_ours(self, tag: pb.DeviceTag, context: Context) -> None:
        if (tag.guest_uuid, tag.inc) != (self._server.guest, self._server.inc):
            await context.abort(
                StatusCode.NOT_FOUND, f"the devices here are those of {self._server.guest}/{self._server.inc}"
            )

    # --- what there is ------------------------------------------------------------------------------------------------

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        answer = pb.DescribeResponse(program=f"drover lab devices {metadata.version('drover')}")
        for one in self._server.hosted():
            asked = self._server.asked(one.name)
            answer.devices.add(
                tag=self._tag(one.name),
                state=one.device.state.name,
                live=one.live,
                session=one.session,
                asked=asked[1] if asked else None,
            )
        if not answer.devices:  # only devices inside the VMM: whose they are must be known all the same
            answer.devices.add(tag=self._tag(""))
        return answer

    def _tag(self, device: str) -> pb.DeviceTag:
        return pb.DeviceTag(guest_uuid=self._server.guest, inc=self._server.inc, device=device)

    async def AttachDevice(self, request: pb.AttachDeviceRequest, context: Context) -> pb.AttachDeviceResponse:
        await context.abort(StatusCode.UNIMPLEMENTED, "one program per VMM: its devices were named at its start")
        raise AssertionError("abort raises")

    async def DetachDevice(self, request: pb.DetachDeviceRequest, context: Context) -> pb.DetachDeviceResponse:
        await context.abort(StatusCode.UNIMPLEMENTED, "one program per VMM: end it")
        raise AssertionError("abort raises")

    async def WatchAckRequests(
        self, request: pb.WatchAckRequestsRequest, context: Context
    ) -> AsyncIterator[pb.WatchAckRequestsResponse]:
        with self._server.watching() as queue:
            while True:
                device, session, generation = await queue.get()
                yield pb.WatchAckRequestsResponse(tag=self._tag(device), session=session, generation=generation)

    # --- the source ---------------------------------------------------------------------------------------------------

    async def BeginSession(self, request: pb.BeginSessionRequest, context: Context) -> pb.BeginSessionResponse:
        await self._call("begin", request, context, session=request.session, by=request.by)
        asked = self._server.asked(request.tag.device)
        return pb.BeginSessionResponse(asked=asked[1] if asked and asked[0] == request.session else None)

    async def ReadState(self, request: pb.ReadStateRequest, context: Context) -> pb.ReadStateResponse:
        found, data = await self._call(
            "read",
            request,
            context,
            session=request.session,
            seq=request.seq,
            wait_ms=request.wait_ms,
            stopped=request.stopped,
        )
        return pb.ReadStateResponse(
            kind=_KINDS[found["frame"]],
            generation=found.get("generation", 0),
            data=data,
            total_bytes=found.get("total", 0),
            digest=bytes.fromhex(found.get("digest", "")),
        )

    async def ReachHook(self, request: pb.ReachHookRequest, context: Context) -> pb.ReachHookResponse:
        await self._call("hook", request, context, hook=request.hook)
        asked = self._server.asked(request.tag.device)
        return pb.ReachHookResponse(session=asked[0], asked=asked[1]) if asked else pb.ReachHookResponse()

    async def Quiesce(self, request: pb.QuiesceRequest, context: Context) -> pb.QuiesceResponse:
        session = request.session if request.HasField("session") else None
        found, _ = await self._call("quiesce", request, context, session=session)
        return pb.QuiesceResponse(asked=found["newest"], stop_copy_bytes=found["stop_copy_bytes"])

    async def StopCopy(self, request: pb.StopCopyRequest, context: Context) -> pb.StopCopyResponse:
        await self._call("stop_copy", request, context, session=request.session)
        return pb.StopCopyResponse()

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.RollBackResponse:
        await self._call("roll_back", request, context)
        return pb.RollBackResponse()

    async def Retire(self, request: pb.RetireRequest, context: Context) -> pb.RetireResponse:
        await self._call("retire", request, context)
        return pb.RetireResponse()

    # --- the destination ----------------------------------------------------------------------------------------------

    async def BeginLoad(self, request: pb.BeginLoadRequest, context: Context) -> pb.BeginLoadResponse:
        await self._call("begin_load", request, context, session=request.session)
        return pb.BeginLoadResponse()

    async def LoadState(self, request: pb.LoadStateRequest, context: Context) -> pb.LoadStateResponse:
        found, _ = await self._call(
            "load",
            request,
            context,
            request.data,
            session=request.session,
            kind=_WORDS.get(request.kind, ""),
            total=request.total_bytes,
            digest=request.digest.hex(),
        )
        return pb.LoadStateResponse(acknowledged=found["ack"])

    async def Validate(self, request: pb.ValidateRequest, context: Context) -> pb.ValidateResponse:
        found, _ = await self._call("validate", request, context, session=request.session)
        return pb.ValidateResponse(bytes=found["bytes"], digest=bytes.fromhex(found["digest"]))

    async def Activate(self, request: pb.ActivateRequest, context: Context) -> pb.ActivateResponse:
        await self._call("activate", request, context)
        return pb.ActivateResponse()

    async def Discard(self, request: pb.DiscardRequest, context: Context) -> pb.DiscardResponse:
        await self._call("discard", request, context)
        return pb.DiscardResponse()

    # --- instructions, devices inside the VMM, the end ----------------------------------------------------------------

    async def Instruct(self, request: pb.InstructRequest, context: Context) -> pb.InstructResponse:
        found, _ = await self._call("instruct", request, context, instruction=request.instruction)
        return pb.InstructResponse(answer=format_scenario(scenario_from(found["scenario"])))

    async def LookInside(self, request: pb.LookInsideRequest, context: Context) -> pb.LookInsideResponse:
        answer = pb.LookInsideResponse()
        for one in self._server.look():
            answer.devices.add(
                device=one.device,
                session=one.session,
                initial_bytes=one.initial_bytes,
                stop_copy_bytes=one.stop_copy_bytes,
                precopy_sent_bytes=one.precopy_sent_bytes,
                stop_copy_sent_bytes=one.stop_copy_sent_bytes,
                reinits=one.reinits,
                late=one.late,
                lost=one.lost,
                events=[pb.LookInsideResponse.Event(at_s=event.at_s, what=event.what) for event in one.events],
            )
        return answer

    async def End(self, request: pb.EndRequest, context: Context) -> pb.EndResponse:
        self._server.over.set()
        return pb.EndResponse()


async def _refuse(context: Context, error: CallError) -> NoReturn:
    code = StatusCode.FAILED_PRECONDITION
    if error.reset:
        code = StatusCode.DATA_LOSS
    elif error.unknown:
        code = StatusCode.NOT_FOUND
    elif error.wrong:
        code = StatusCode.INVALID_ARGUMENT
    await context.abort(code, str(error))
    raise AssertionError("abort raises")
