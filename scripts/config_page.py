"""`make docs`: write the tables of docs/configuration.md anew from the code."""

from __future__ import annotations

from pathlib import Path

from agents.config import FILE as AGENT
from orchestrator.api.config import FILE as API
from orchestrator.config import as_markdown
from orchestrator.coordinator.wiring import FILE as COORDINATOR

PAGE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- from here on written by `make docs` -->\n"


def main() -> None:
    """Replace everything behind the mark."""
    head, mark, _ = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{head}{mark}\n" + "\n".join(as_markdown(file) for file in (AGENT, API, COORDINATOR)))


if __name__ == "__main__":
    main()
