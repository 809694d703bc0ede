"""The documentation names files that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOPS = ("agents", "deploy", "docs", "orchestrator", "tests")
PAGES = sorted([*ROOT.glob("*.md"), *(page for top in TOPS for page in (ROOT / top).rglob("*.md"))])
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_PATH = re.compile(r"(?<![\w/.-])((?:agents|deploy|docs|orchestrator|protos|scripts|tests)/[\w./{},*-]*[\w}*/])")


def expanded(path: str) -> list[str]:
    """`a/{b,c}.py` is two paths."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [
        one
        for word in found[1].split(",")
        for one in expanded(f"{path[: found.start()]}{word.strip()}{path[found.end() :]}")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_on_the_page_exists(page: Path) -> None:
    text = page.read_text()
    links = [link for link in _LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    if page.name != "CHANGELOG.md":  # which tells of what was
        named = [one for path in _PATH.findall(text) for one in expanded(path)]
        missing += [path for path in named if not list(ROOT.glob(path.rstrip("/")))]
    assert missing == []
