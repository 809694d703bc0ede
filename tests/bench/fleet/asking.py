"""`python -m tests.bench.fleet.asking COORDINATOR.JSON`: how many migrations the workers drive, asked of them in Ray.

Waits for a line on standard input, then connects and writes a line of JSON after each look, until it is ended.
"""

# ray hides the types of what it returns.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.coordinator import actor
from orchestrator.coordinator.wiring import CoordinatorConfig, load

LOOK_S = 0.1
_ANSWER_S = 5.0


def _connected(config: CoordinatorConfig) -> None:
    while True:
        try:
            actor.connect(config)
            return
        except actor.RayGone:
            time.sleep(LOOK_S)


def _look(config: CoordinatorConfig) -> dict[str, Any]:
    names = [name for name in ray.util.list_named_actors() if name.startswith(actor.WORKER)]
    handles = [ray.get_actor(name, namespace=config.ray_namespace) for name in names]
    told = ray.get([handle.ping.remote() for handle in handles], timeout=_ANSWER_S)
    return {"driving": sum(one["driving"] for one in told), "workers": len(told), "at_s": time.monotonic()}


def main() -> None:
    config = load(Path(sys.argv[1]))
    sys.stdin.readline()
    _connected(config)
    while True:
        with contextlib.suppress(RayError, ValueError):
            print(json.dumps(_look(config)), flush=True)
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
