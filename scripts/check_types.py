"""Check the types of what changed since they last passed, and of what imports it: quick enough for each commit.

Where nothing was checked before (a fresh clone, as in CI) every file is checked, and with `--all`. A change can reach
further than the files that import it, through types that they infer: CI is what finds that.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "build" / "types-passed.json"
"""The digest of each file, and of what decides how files are checked, when all of them last passed."""


def main(everything: bool) -> int:
    now = digests()
    before = {} if everything else _passed()
    if now.get("") != before.get(""):
        before = {}  # another pyright, or other settings
    changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)} - {""}
    if not changed and before:
        print("types: nothing has changed since they passed")
        return 0
    command = [str(Path(sys.executable).with_name("pyright")), "--threads", "2"]
    if before:
        command += sorted(name for name in concerned(now, changed) if not name.startswith("protos/"))
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status == 0:
        PASSED.parent.mkdir(exist_ok=True)
        PASSED.write_text(json.dumps(now))
    return status


def _passed() -> dict[str, str]:
    try:
        return json.loads(PASSED.read_text())
    except (OSError, ValueError):
        return {}


def digests() -> dict[str, str]:
    """By path below the root; "" stands for pyright and its settings."""
    project = (ROOT / "pyproject.toml").read_bytes()
    settings = tomllib.loads(project.decode())["tool"]["pyright"]
    lock = (ROOT / "requirements.lock").read_bytes()
    key = json.dumps([settings, version("pyright"), sys.version, hashlib.sha256(lock).hexdigest()])
    found = {"": hashlib.sha256(key.encode()).hexdigest()}
    for folder in (*settings["include"], "protos"):
        for path in sorted((ROOT / folder).rglob("*.py*")):
            if path.suffix in (".py", ".pyi"):
                found[path.relative_to(ROOT).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def concerned(now: dict[str, str], changed: set[str]) -> set[str]:
    """What changed and is there, and what imports something that changed."""
    modules = {_module(name) for name in changed}
    return {name for name in now if name and (name in changed or not modules.isdisjoint(imported(name)))}


def _module(name: str) -> str:
    return name.rsplit(".", 1)[0].removesuffix("/__init__").replace("/", ".")


def imported(name: str) -> Iterator[str]:
    """The modules that a file may import; of `from a import b` both `a` and `a.b`, for b may be one."""
    try:
        tree = ast.parse((ROOT / name).read_text())
    except SyntaxError:
        return  # it has changed, and pyright says so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


if __name__ == "__main__":
    sys.exit(main("--all" in sys.argv[1:]))
