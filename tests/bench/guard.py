"""`python -m tests.bench.guard DIRECTORY`: ends what a bench has started there, should the bench itself be ended.

A bench that is killed, or given too little time to clean up, cannot do that. This process waits for the end of its
standard input, of which the bench holds the other end, and then ends every process with the mark of the directory. One
that is given no work, since the bench has cleaned up, ends as well.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

from deploy.lab.cluster import commands, teardown
from deploy.lab.cluster.layout import Layout

TIMES = 3
"""Something may start another process at the moment it dies."""
END_S = 60.0


@contextlib.contextmanager
def guarded(directory: Path) -> Generator[None]:
    """Whatever has the mark of the directory is ended with this process, however that ends, and the directory goes."""
    guard = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.guard", str(directory)], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    finally:
        assert guard.stdin is not None
        guard.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # it goes on alone
            guard.wait(END_S)


def end_all(layout: Layout) -> None:
    """Every process of the directory, and the directory. May be repeated."""
    if layout.lock.exists():  # a cluster of the lab, with namespaces
        commands.down(layout.dir)
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
