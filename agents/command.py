"""`drover agent` and `drover doctor`."""

from orchestrator.late import LateCommand

agent = LateCommand(
    "agent", "agents.__main__:main", short_help="Run the agent of this host until told to stop.", section="Services"
)

doctor = LateCommand(
    "doctor",
    "agents.host.doctor:main",
    short_help="Say what of this host stands against running its agent, and what to do.",
    section="Services",
)
