"""Import rules that import-linter cannot say; the others are contracts in pyproject.toml.

A pure file decides and does nothing else, so it may use only what gives the same answer every time: the standard
library without its doors to the outside world, and other pure files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PURE_PACKAGES = ("orchestrator.core", "agents.handover.source")
PURE_MODULES = (
    "deploy.lab.devices.scenario",
    "agents.handover.pace",
    "agents.handover.table",
    "agents.handover.timers",
    "agents.handover.words",
    "agents.handover.destination",
    "agents.guest.duty",
    "agents.handover.report",
    "agents.engine.qemu.verdict",
    "deploy.lab.devices.device",
    "deploy.lab.devices.device_state",
    "agents.shims.inside",
    "deploy.lab.devices.vfio.endpoint",
    "deploy.lab.devices.vfio.layout",
    "deploy.lab.devices.vfio.uapi",
    "deploy.lab.demo.judge",
    "orchestrator.api.decisions",
    "deploy.lab.cluster.evidence",
    "deploy.lab.linux_guest.image",
    "deploy.lab.peer.outage",
    "deploy.lab.workload",
    "agents.nets.ports",
    "orchestrator.cli.accounted",
    "orchestrator.cli.libvirt_words",
    "orchestrator.cli.libvirt_xml",
    "orchestrator.cli.plain_xml",
    "orchestrator.cli.timeline",
)

DOORS = frozenset(
    "asyncio ctypes datetime http importlib io locale logging mmap multiprocessing os pathlib pickle queue random "
    "secrets select selectors shutil signal socket ssl subprocess sys tempfile threading time urllib uuid".split()
)
IMPURE_BUILTINS = frozenset({"__import__", "breakpoint", "eval", "exec", "input", "open", "print"})
# Names below a door that only describe values; anything else from there can read a clock, a file or the process.
VALUES_BEHIND_DOORS = frozenset({"datetime.timedelta", "uuid.UUID"})


def _module_path(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def _pure_files() -> list[Path]:
    files = [path for package in PURE_PACKAGES for path in (ROOT / package.replace(".", "/")).rglob("*.py")]
    files += [path for path in map(_module_path, PURE_MODULES) if path.exists()]
    return sorted(files)


def _is_pure(name: str) -> bool:
    return name in PURE_MODULES or any(name == p or name.startswith(p + ".") for p in PURE_PACKAGES)


def _is_allowed(name: str) -> bool:
    """May a pure file import `name` (a module, or a module and one name from it)?"""
    if _is_pure(name) or _is_pure(name.rpartition(".")[0]):
        return True
    top = name.partition(".")[0]
    return top in sys.stdlib_module_names and (top not in DOORS or name in VALUES_BEHIND_DOORS)


def violations(source: str) -> list[str]:
    """What in this Python source a pure file may not do, as "line N: ..." in order of appearance."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                found += [(node.lineno, f"imports {a.name}") for a in aliases if not _is_allowed(a.name)]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                names = [f"{'.' * level}{module or ''}.{a.name}" for a in aliases]
                found += [(node.lineno, f"imports {name}") for name in names if level or not _is_allowed(name)]
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_BUILTINS:
                found.append((node.lineno, f"calls {name}()"))
            case ast.AsyncFunctionDef(name=name):
                found.append((node.lineno, f"defines the coroutine {name}"))
            case _:
                pass
    return [f"line {line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("path", _pure_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pure_file_uses_only_what_is_pure(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import time", ["line 1: imports time"]),
        ("import os.path as p", ["line 1: imports os.path"]),
        ("from asyncio import sleep", ["line 1: imports asyncio.sleep"]),
        ("from datetime import datetime", ["line 1: imports datetime.datetime"]),
        ("import pydantic", ["line 1: imports pydantic"]),
        ("from orchestrator.ledger import store", ["line 1: imports orchestrator.ledger.store"]),
        ("from orchestrator import wire", ["line 1: imports orchestrator.wire"]),
        ("from . import ids", ["line 1: imports ..ids"]),
        ("x = 1\ndef f():\n    import random", ["line 3: imports random"]),
        ("print(open('x'))", ["line 1: calls open()", "line 1: calls print()"]),
        ("async def f(): ...", ["line 1: defines the coroutine f"]),
        ("import dataclasses, enum\nfrom orchestrator.core.ids import X\nfrom orchestrator.core import ids", []),
        ("from orchestrator import core\nfrom datetime import timedelta\nfrom agents.handover.words import S", []),
    ],
)
def test_the_check_itself_sees_what_it_should(source: str, expected: list[str]) -> None:
    assert violations(source) == expected


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("orchestrator.core", ("ray", "grpc", "kazoo", "asyncio")),
        ("orchestrator.cli", ("ray", "kazoo")),
        ("orchestrator.api", ("ray",)),
        ("orchestrator.coordinator.supervisor", ("ray",)),
        ("agents.handover.words", ("ray", "grpc", "kazoo", "asyncio")),
        ("deploy.lab.devices.device_process", ("ray", "grpc", "kazoo", "yaml", "structlog")),
        ("agents.serving.control", ("ray",)),
        ("agents.__main__", ("ray",)),
    ],
)
def test_importing_leaves_heavy_libraries_out(module: str, absent: tuple[str, ...]) -> None:
    """A static contract cannot see what an import drags in through a library; a fresh interpreter can."""
    if not (_module_path(module).exists() or _module_path(f"{module}.__init__").exists()):
        pytest.skip(f"{module} is not there yet")
    program = f"import sys, {module}; print(*sorted(set({absent!r}) & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr
