"""PURE. Who may call what: every method of every gRPC service, and the roles that may call it. What is not here nobody
may call.

`HOST` stands for the agent of some host; which host it must be is the handler's to say, from the record.
"""

from __future__ import annotations

from orchestrator.pki.names import Identity, Kind, Role

HOST = "host"
_API, _COORDINATOR = frozenset({Role.API}), frozenset({Role.COORDINATOR})
_BOTH = _API | _COORDINATOR
_ADMIN = frozenset({Role.ADMIN})
_GUESTS = _ADMIN | {Role.OPERATOR}
_MOVES = _GUESTS | {Role.SCHEDULER}
_READ = _MOVES | {Role.VIEWER, Role.CHAOS, Role.FENCER}
_FENCE = _ADMIN | {Role.FENCER}
_CHAOS = _ADMIN | {Role.CHAOS}

_AGENT = {
    _BOTH: ("GetAgent", "WatchAgent", "GetAttempt", "StartGuest", "Nudge"),
    _COORDINATOR: ("PrepareDestination", "ConductAttempt"),
    _API | _ADMIN: ("ListCopies", "RestoreRecord"),
    _API: (
        *("EndGuest", "KeepGuest", "ApplyWantRun", "PassInstruction", "ChangeMachine", "CheckGuests"),
        *(
            "ListPoolImages",
            "HoldConsole",
            "ReceiveImage",
            "ExamineVmm",
            "ReleaseVmm",
            "OpenVmmDisplay",
            "RejoinLedger",
        ),
    ),
}
_PEER = {
    frozenset({HOST}): (
        *("TransferDevices", "ReportLoaded", "Go", "ReportDone", "ReportFailed", "DescribeMachine"),
        *("DescribeImages", "ReleaseImages", "Ping"),
    ),
}
_ORCHESTRATOR = {
    _READ: (
        *("GetClusterHealth", "ExportHistory", "GetHost", "ListHosts", "GetHostDeath", "CheckPlacement", "ListImages"),
        *("GetGuest", "ListGuests", "WatchGuests", "GetMigration", "ListMigrations", "WatchMigrations"),
        *("GetEvacuation", "ListEvacuations", "WatchEvacuations"),
    ),
    _MOVES: ("CreateGuest", "StopGuest", "PauseGuest", "ResumeGuest", "CreateMigration", "CancelMigration"),
    _GUESTS: (
        *("CordonHost", "UncordonHost", "ImportImage", "StopAndKeepGuest", "StartGuestAgain", "EditGuest"),
        *("AttachConsole", "OpenDisplay", "AttachToGuest", "DetachFromGuest"),
        *("CreateEvacuation", "CancelEvacuation"),
    ),
    _ADMIN: ("RemoveHost", "RejoinHost", "AdoptGuest", "ReleaseGuest", "RepairGuest"),
    _FENCE: ("DeclareHostDead",),
    _CHAOS: ("InstructDevice",),
}
METHODS: dict[str, frozenset[str]] = {
    f"/drover.v1.{service}/{method}": frozenset(map(str, roles))
    for service, table in (("AgentService", _AGENT), ("PeerService", _PEER), ("OrchestratorService", _ORCHESTRATOR))
    for roles, methods in table.items()
    for method in methods
}
"""By the name that gRPC calls it."""


def may_call(identity: Identity, method: str) -> bool:
    """Whether its kind or role may call the method at all."""
    who = HOST if identity.kind is Kind.HOST else identity.name
    return who in METHODS.get(method, frozenset())
