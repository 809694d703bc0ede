"""The API's messages for those who read them but may not import the stubs: the CLI, scripts.

`OrchestratorClient` returns them. Import this for types only: it pulls in protobuf.
"""

from google.protobuf.timestamp_pb2 import Timestamp

from protos.drover.v1.orchestrator_pb2 import (
    AdoptGuestResponse,
    ChangeRunStateResponse,
    CheckPlacementResponse,
    ClusterHealth,
    CreateEvacuationResponse,
    HostVerdict,
    PlacementVerdict,
    Quarantined,
    Unreadable,
)
from protos.drover.v1.types_pb2 import (
    AttemptReport,
    DeviceSpec,
    DisplayAddress,
    Evacuation,
    EvacuationGuest,
    Guest,
    GuestFate,
    Host,
    HostAgent,
    HostCopy,
    HostDeath,
    HostTrouble,
    Image,
    Migration,
    MigrationPolicy,
    Network,
    Obstacle,
    Pool,
    Progress,
    TimelineEntry,
)

__all__ = [
    "AdoptGuestResponse",
    "AttemptReport",
    "ChangeRunStateResponse",
    "CheckPlacementResponse",
    "ClusterHealth",
    "CreateEvacuationResponse",
    "DeviceSpec",
    "DisplayAddress",
    "Evacuation",
    "EvacuationGuest",
    "Guest",
    "GuestFate",
    "Host",
    "HostAgent",
    "HostCopy",
    "HostDeath",
    "HostTrouble",
    "HostVerdict",
    "Image",
    "Migration",
    "MigrationPolicy",
    "Network",
    "Obstacle",
    "PlacementVerdict",
    "Pool",
    "Progress",
    "Quarantined",
    "TimelineEntry",
    "Timestamp",
    "Unreadable",
]
