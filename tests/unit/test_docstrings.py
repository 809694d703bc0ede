"""Everything public in the product and the lab says what it means.

A method that overrides a documented one of a class in this repository (a port, a generated servicer) is documented
there, unless there is something particular to say.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TREES = ("orchestrator", "agents", "deploy/lab")
NOTHING = "Missing associated documentation comment in .proto file."
"""What the generator writes for a call that its .proto says nothing of."""

Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One file's classes, and where the names in it come from."""

    tree: ast.Module
    imported: dict[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    """Name here -> (module, name there); "" for a module itself."""

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                self.imported |= {each.asname or each.name: (node.module, each.name) for each in node.names}

    def top_class(self, name: str) -> ast.ClassDef | None:
        """The class of that name at the top of the file."""
        return next((each for each in self.tree.body if isinstance(each, ast.ClassDef) and each.name == name), None)


@cache
def module(name: str) -> Module | None:
    """The module of this repository; None for any other."""
    path = ROOT / name.replace(".", "/")
    for each in (path.with_suffix(".py"), path / "__init__.py"):
        if each.exists():
            return Module(ast.parse(each.read_text()))
    return None


def resolved(where: str, base: ast.expr) -> tuple[str, ast.ClassDef] | None:
    """The class that the expression names in module `where`, and its module; None outside of this repository."""
    if isinstance(base, ast.Subscript):
        return resolved(where, base.value)
    if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
        inside = module(where)
        origin = inside.imported.get(base.value.id) if inside else None
        return found(".".join(origin), base.attr) if origin else None
    return found(where, base.id) if isinstance(base, ast.Name) else None


def found(where: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """A class by its name in a module that defines or imports it."""
    known = module(where)
    if known is None:
        return None
    own = known.top_class(name)
    if own is not None:
        return where, own
    return found(*known.imported[name]) if name in known.imported else None


def inherits_words(where: str, owner: ast.ClassDef, name: str) -> bool:
    """A class above `owner` documents `name`."""
    for base in owner.bases:
        above = resolved(where, base)
        if above is None:
            continue
        documented = any(
            isinstance(each, Named) and each.name == name and (ast.get_docstring(each) or NOTHING) != NOTHING
            for each in above[1].body
        )
        if documented or inherits_words(*above, name):
            return True
    return False


def undocumented(where: str) -> list[str]:
    """What is public in the module and says nothing, as Class.method."""
    missing: list[str] = []

    def look(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for each in node.body:
            if not isinstance(each, Named) or each.name.startswith("_"):
                continue
            told = ast.get_docstring(each) or (
                isinstance(node, ast.ClassDef) and inherits_words(where, node, each.name)
            )
            if not told:
                missing.append(prefix + each.name)
            if isinstance(each, ast.ClassDef):
                look(each, f"{prefix}{each.name}.")

    known = module(where)
    assert known is not None
    look(known.tree, "")
    return missing


def modules() -> list[str]:
    """All of product and lab, by their import names."""
    files = sorted(path.relative_to(ROOT) for tree in TREES for path in (ROOT / tree).rglob("*.py"))
    return [".".join(path.with_suffix("").parts) for path in files if "_pb2" not in path.name]


def test_everything_public_says_what_it_means() -> None:
    silent = [f"{where}.{name}" for where in modules() for name in undocumented(where)]
    assert silent == [], f"{len(silent)} say nothing: {', '.join(silent)}"


def test_the_check_itself_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    port = 'class Port:\n    """."""\n    def told(self):\n        """It."""\n    def mute(self): ...\n'
    user = (
        "from port import Port\nimport other\n"
        'class A(Port):\n    """."""\n    def told(self): ...\n    def mute(self): ...\n    def _own(self): ...\n'
        'class B(A):\n    """."""\n    def told(self): ...\n'
        'class C(other.Port):\n    """."""\n    def told(self): ...\n'
        "def plain(): ...\n"
    )
    known = {"port": Module(ast.parse(port)), "user": Module(ast.parse(user))}
    monkeypatch.setattr(f"{__name__}.module", known.get)
    assert undocumented("user") == ["A.mute", "C.told", "plain"]
