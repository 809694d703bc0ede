"""What commands print: tables for people, JSON and YAML for programs.

A table takes the width that its content needs. On a terminal that is too narrow the elastic columns (messages) are cut
first, then the least important columns are left out; ids and names are never cut or wrapped. On a pipe nothing is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TextIO, TypeVar

from orchestrator.core.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from orchestrator.rpc.messages import Unreadable

T = TypeVar("T")

GAP = "  "
Cell = str | tuple[str, str]
"""Text, or text and its style."""

STYLES = {
    "SUCCEEDED": "green",
    "COMMITTED": "green",
    "FAILED": "bold red",
    "ABORTED": "yellow",
    "ABORTING": "yellow",
    "RETRY_WAIT": "yellow",
    "CANCELLED": "yellow",
    "CANCELLING": "yellow",
    "PENDING": "dim",
    "SWITCHOVER": "bold cyan",
    "LIVE": "green",
    "RUNNING": "green",
    "SILENT": "bold red",
    "PAUSED": "yellow",
    "STOPPED": "yellow",
    "UNKNOWN": "bold red",
    "CRASHED": "bold red",
    "ok": "green",
}


def styled(word: str) -> Cell:
    """A state, in its colour."""
    return word, STYLES.get(word, "")


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table of `T`."""

    header: str
    cell: Callable[[T], Cell]
    right: bool = False
    elastic: bool = False
    """May be cut, with an ellipsis, down to `least`."""
    least: int = 12
    wraps: bool = False
    """Of an elastic last column: go on in the next line instead of being cut."""
    rank: int = 0
    """Left out on narrow terminals, highest first; 0: always shown."""
    optional: bool = False
    """Left out when it would be empty in every row."""


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _style(cell: Cell) -> str:
    return "" if isinstance(cell, str) else cell[1]


def table(columns: Sequence[Column[T]], rows: Sequence[T], width: int | None) -> Text:
    """The table as lines with a header; `width` None: as wide as it wants to be."""
    from rich.text import Text

    cells = [[column.cell(row) for row in rows] for column in columns]
    shown = [
        index
        for index, column in enumerate(columns)
        if not column.optional or any(_text(cell).strip() for cell in cells[index])
    ]
    widths = _fit(columns, cells, shown, width)
    lines = [_line([(columns[i].header, "bold") for i in widths], columns, widths)]
    for row in range(len(rows)):
        lines += [_line(part, columns, widths) for part in _wrapped([cells[i][row] for i in widths], columns, widths)]
    return Text("\n").join(lines)


def _wrapped(cells: Sequence[Cell], columns: Sequence[Column[T]], widths: dict[int, int]) -> list[list[Cell]]:
    """The row as one line, or as several when its last column wraps."""
    import textwrap

    last = list(widths)[-1]
    text, style = _text(cells[-1]), _style(cells[-1])
    pieces = textwrap.wrap(text, widths[last]) if columns[last].wraps else [text]
    blank: list[Cell] = ["" for _ in cells[:-1]]
    return [[*(blank if index else cells[:-1]), (piece, style)] for index, piece in enumerate(pieces or [""])]


def _fit(
    columns: Sequence[Column[T]], cells: Sequence[Sequence[Cell]], shown: Iterable[int], width: int | None
) -> dict[int, int]:
    """Width of each column that is shown, in their order."""
    from rich.cells import cell_len

    widths = {
        index: max(cell_len(columns[index].header), *(cell_len(_text(cell)) for cell in cells[index]), 0)
        for index in shown
    }
    while width is not None:
        excess = sum(widths.values()) + len(GAP) * (len(widths) - 1) - width
        if excess <= 0:
            break
        elastic = [i for i in widths if columns[i].elastic and widths[i] > columns[i].least]
        if elastic:
            widest = max(elastic, key=lambda i: widths[i])
            widths[widest] = max(columns[widest].least, widths[widest] - excess)
            continue
        droppable = [i for i in widths if columns[i].rank]
        if not droppable:
            break
        del widths[max(droppable, key=lambda i: (columns[i].rank, i))]
    return widths


def _line(cells: Sequence[Cell], columns: Sequence[Column[T]], widths: dict[int, int]) -> Text:
    from rich.cells import cell_len, set_cell_size
    from rich.text import Text

    line = Text(no_wrap=True, overflow="ignore")
    for place, (index, cell) in enumerate(zip(widths, cells, strict=True)):
        text, wanted = _text(cell).replace("\n", " "), widths[index]
        if cell_len(text) > wanted:
            text = set_cell_size(text, wanted - 1) + "…"
        pad = " " * (wanted - cell_len(text))
        last = place == len(widths) - 1
        line.append(GAP if place else "")
        line.append(pad if columns[index].right else "")
        line.append(text, style=_style(cell) or None)
        line.append("" if columns[index].right or last else pad)
    line.rstrip()
    return line


def pairs(entries: Iterable[tuple[str, Cell]]) -> Text:
    """Name and value, one pair per line; empty values are left out."""
    from rich.text import Text

    kept = [(name, cell) for name, cell in entries if _text(cell)]
    wide = max((len(name) for name, _ in kept), default=0)
    lines: list[Text] = []
    for name, cell in kept:
        line = Text(f"{name:<{wide}}{GAP}", no_wrap=True, overflow="ignore", style="")
        line.stylize("bold", 0, len(name))
        lines.append(line.append(_text(cell), style=_style(cell) or None))
    return Text("\n").join(lines)


class Printer:
    """Where a command's result goes. `output` is table, json or yaml."""

    def __init__(self, output: str, out: TextIO | None = None) -> None:
        self.output = output
        self.out = out or sys.stdout
        self._console: Console | None = None

    @property
    def machine(self) -> bool:
        """The result is for a program: a document, and nothing else on standard output."""
        return self.output != "table"

    @property
    def console(self) -> Console:
        """Made when it is first needed, since importing rich takes longer than many commands."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(file=self.out, highlight=False, markup=False, emoji=False, soft_wrap=True)
        return self._console

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where there is none and nothing is to be cut."""
        return self.console.width if self.console.is_terminal else None

    def document(self, document: dict[str, Any]) -> None:
        """One document for programs, as JSON or YAML."""
        if self.output == "yaml":
            import yaml

            self.out.write(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000))
        else:
            self.out.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        self.out.flush()

    def stream(self, document: dict[str, Any]) -> None:
        """One of several documents: JSON, one per line, or YAML, each after `---`."""
        if self.output == "yaml":
            self.out.write("---\n")
            self.document(document)
        else:
            self.out.write(json.dumps(document, ensure_ascii=False) + "\n")
            self.out.flush()

    def show(self, *parts: Text | str) -> None:
        """For people. No text can tell the terminal to do anything (`core.text.visible`)."""
        for part in parts:
            shown = _filled(visible(part), self.width) if isinstance(part, str) else tame(part)
            self.console.print(shown, soft_wrap=True)

    def table(self, columns: Sequence[Column[T]], rows: Sequence[T], *, empty: str) -> None:
        """A table for people, or the sentence `empty`, on stderr, when there is nothing to show."""
        if rows:
            self.show(table(columns, rows, self.width))
        else:
            note(empty)


def tame(text: Text) -> Text:
    """The same text, styles and all, without what a terminal would obey."""
    text.plain = visible(text.plain)
    return text


def note_unreadable(kind: str, unreadable: Iterable[Unreadable]) -> None:
    """What a list has to leave out: one remark each."""
    for each in unreadable:
        said = f"{kind} {each.name} cannot be read and is not listed: {each.reason}" if each.name else each.reason
        note(said)


def note(text: str) -> None:
    """A remark beside the result: stderr, so that a pipe sees the result only."""
    sys.stderr.write(f"{_filled(visible(text), _columns_of(sys.stderr))}\n")
    sys.stderr.flush()


def _columns_of(out: TextIO) -> int | None:
    import shutil

    return shutil.get_terminal_size().columns if out.isatty() else None


def _filled(text: str, width: int | None) -> str:
    """Broken between words where the terminal would break within one: an id is to be copied whole."""
    import textwrap

    if width is None:
        return text
    lines = text.split("\n")
    return "\n".join(textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in lines)
