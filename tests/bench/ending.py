"""How a bench ends early: whoever ends the process ends all that it started."""

from __future__ import annotations

import asyncio
import signal


def ends_well() -> None:
    """From now on SIGTERM and SIGINT cancel the calling task, so that its clean-up runs. Once: a second signal, as from
    somebody who signals a whole process group, would cancel the clean-up."""
    doing = asyncio.current_task()
    assert doing is not None
    signalled: list[int] = []

    def end(number: int) -> None:
        if not signalled:
            doing.cancel()
        signalled.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end, number)
