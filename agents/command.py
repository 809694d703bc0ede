"""`drover agent`."""

from orchestrator.late import LateCommand

agent = LateCommand(
    "agent", "agents.__main__:main", short_help="Run the agent of this host until told to stop.", section="Services"
)
