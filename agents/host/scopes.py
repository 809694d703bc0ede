"""Guests' processes in systemd scopes of their own, where systemd runs the agent.

A process that an agent starts is in the agent's control group, and with it under whatever limit the agent has. The unit
of the packages names a slice in `DROVER_GUESTS_SLICE`; then each VMM, and whatever else a guest stands on, moves into a
scope below `<slice>-<guest>.slice` before it begins. The scope ends with its last process, whatever becomes of the
agent.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence

VARIABLE = "DROVER_GUESTS_SLICE"


def scoped(command: Sequence[str], guest: str, part: str) -> list[str]:
    """The command, beginning in a scope of its own below its guest's slice; where none is configured, as it is.

    Its pid and start time stay the command's own: systemd-run becomes the command. `guest` is its uuid or the beginning
    of it, `part` says in a word what the process is to the guest.
    """
    slice_ = os.environ.get(VARIABLE, "").removesuffix(".slice")
    if not slice_:
        return list(command)
    short = re.sub(r"[^0-9A-Za-z]", "", guest)[:16]
    unit = f"{slice_}-{short}-{part}-{secrets.token_hex(3)}"
    own = [f"--slice={slice_}-{short}.slice", f"--unit={unit}", f"--description=Guest {short}: {part}"]
    return ["systemd-run", "--scope", "--quiet", "--collect", *own, "--", *command]
