"""Which files `make check` looks at again."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "check_types.py"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_types", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "PASSED", tmp_path / "build" / "types-passed.json")
    for name, text in {
        "pyproject.toml": '[tool.pyright]\ninclude = ["a"]',
        "requirements.lock": "",
        "a/__init__.py": "",
        "a/base.py": "WORD = 1",
        "a/module.py": "from a import base",
        "a/name.py": "def late():\n    from a.base import WORD\n    return WORD",
        "a/far.py": "import a.module",
        "protos/x_pb2.pyi": "X: int",
        "a/uses.py": "from protos.x_pb2 import X",
        "a/broken.py": "def (",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return module


@pytest.mark.parametrize(
    ("changed", "concerned"),
    [
        ("a/base.py", {"a/base.py", "a/module.py", "a/name.py"}),
        ("a/module.py", {"a/module.py", "a/far.py"}),
        ("protos/x_pb2.pyi", {"protos/x_pb2.pyi", "a/uses.py"}),
        ("a/broken.py", {"a/broken.py"}),
        ("a/gone.py", set()),
    ],
)
def test_what_changed_and_what_imports_it_is_looked_at(script: ModuleType, changed: str, concerned: set[str]) -> None:
    assert script.concerned(script.digests(), {changed}) == concerned


def test_a_pass_is_remembered_until_something_changes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []
    status = 0

    class Done:
        @property
        def returncode(self) -> int:
            return status

    def run(command: list[str], **_: object) -> Done:
        calls.append(command[3:])
        return Done()

    monkeypatch.setattr(script.subprocess, "run", run)
    assert (script.main(False), script.main(False)) == (0, 0)
    assert calls == [[]], "all of them, and then nothing"
    (tmp_path / "a" / "module.py").write_text("from a import base as other")
    status = 1
    assert (script.main(False), script.main(False)) == (1, 1)
    assert calls[1:] == [["a/far.py", "a/module.py"]] * 2, "a failure is not forgotten"
    (tmp_path / "pyproject.toml").write_text('[tool.pyright]\ninclude = ["a"]\nstrict = ["a"]')
    status = 0
    assert script.main(False) == 0
    assert calls[3:] == [[]], "other settings concern every file"
