"""`drover api`."""

from orchestrator.late import LateCommand

api = LateCommand(
    "api", "orchestrator.api.__main__:main", short_help="Serve Drover's API until told to stop.", section="Services"
)
