"""PURE. The source's half of one attempt: hold, freeze, check, seal, submit, and every way back.

`state.py` says what it knows; its story goes through `precopy.py`, `blackout.py` and `outcome.py`, or turns round in
`back.py`; `machine.py` has the table of stages and events and `source_step`, the only mutator. The words are in
`agents/handover/words.py`, the rules in docs/protocol.md.
"""

from agents.handover.source.machine import TABLE, restarted_source, source_step
from agents.handover.source.state import SourceStage, SourceState

__all__ = ["TABLE", "SourceStage", "SourceState", "restarted_source", "source_step"]
