"""What the agents call it by."""

from orchestrator.whole import flush, write_whole

__all__ = ["flush", "write_whole"]
