"""`drover coordinator`."""

from orchestrator.late import LateCommand

coordinator = LateCommand(
    "coordinator",
    "orchestrator.coordinator.__main__:main",
    short_help="Keep a coordinator alive inside Ray until told to stop.",
    section="Services",
)
