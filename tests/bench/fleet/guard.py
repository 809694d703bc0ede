"""`python -m tests.bench.fleet.guard DIRECTORY`: ends what a bench has started there, should the bench itself be ended.

A bench that is killed, or given too little time to clean up, cannot do that. This process waits for the end of its
standard input, of which the bench holds the other end, and then ends every process with the mark of the directory.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from deploy.lab.cluster import teardown
from deploy.lab.cluster.layout import Layout

TIMES = 3
"""Something may start another process at the moment it dies."""


def end_all(layout: Layout) -> None:
    """Every process of the directory, and the directory. May be repeated."""
    for _ in range(TIMES):
        teardown.kill_ray(layout)
        if not (left := set(teardown.find(layout))):
            break
        teardown.kill(left)
    shutil.rmtree(layout.dir, ignore_errors=True)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # whoever ends the bench by its group means the bench
    layout = Layout.of(Path(sys.argv[1]))
    sys.stdin.buffer.read()
    end_all(layout)


if __name__ == "__main__":
    main()
