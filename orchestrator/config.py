"""Configuration files of agent, API and coordinator: how they are read, judged and explained.

A file is YAML; one that begins with `{` is read as JSON. What a key means is its attribute's docstring, and its unit is
the end of its name, so that pages, `drover config show` and errors cannot say anything else than the code does.
"""

# The stubs of PyYAML leave out what its loader's methods take and return.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnnecessaryCast=false

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel, TypeAdapter, ValidationError

T = TypeVar("T")

SECTION = "keys below"
DIRECTORY = Path("/etc/drover")
"""Where packages look for them: `<program>.yaml`."""
MAX_BYTES = 1 << 20


class ConfigError(ValueError):
    """A file cannot be used. `problems` has a sentence for each key that is wrong; the text has all of them."""

    def __init__(self, path: Path, problems: Iterable[str]) -> None:
        self.path = path
        self.problems = tuple(problems)
        super().__init__(f"{path}: {'; '.join(self.problems)}")


@dataclass(frozen=True, slots=True)
class Setting:
    """One key, as it is explained."""

    key: str
    """With those around it: `limits.burst`, `pools.NAME.path`, `fencing[].hosts`."""
    takes: str
    """What may be given, in a few words."""
    default: Any
    """As JSON; None without `required`: nothing."""
    required: bool
    meaning: str


class ConfigFile(Generic[T]):
    """The configuration of one program, a dataclass or a pydantic model with a docstring for each attribute."""

    def __init__(self, program: str, kind: type[T], also: Callable[[T], Iterable[str]] | None = None) -> None:
        """`also` says what is wrong with keys that are right one by one."""
        self.program = program
        self.kind = kind
        self._also = also

    def load(self, path: Path) -> T:
        """Raises ConfigError with everything that is wrong."""
        tree = _read(path)
        problems = list(_strangers(self.kind, tree, ""))
        config: T | None = None
        try:
            config = _adapter(self.kind).validate_python(tree)
        except ValidationError as error:
            for each in error.errors():
                if each["type"] != "extra_forbidden":
                    problems.append(_sentence(each["loc"], each["msg"], each.get("input")))
        if config is not None and self._also is not None:
            problems += self._also(config)
        if config is None or problems:
            raise ConfigError(path, problems)
        return config

    def settings(self) -> list[Setting]:
        """Every key with its default and meaning, in the order of the code."""
        return list(_settings(self.kind, ""))

    def tree(self, config: T) -> dict[str, Any]:
        """The configuration as JSON, defaults filled in."""
        return cast("dict[str, Any]", _adapter(self.kind).dump_python(config, mode="json"))


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(path, [error.strerror or str(error)]) from None
    if len(data) > MAX_BYTES:
        raise ConfigError(path, [f"it has more than {MAX_BYTES} bytes"])
    try:
        text = data.decode()
        tree = json.loads(text, object_pairs_hook=_once) if text.lstrip().startswith("{") else _yaml(text)
    except json.JSONDecodeError as error:
        raise ConfigError(path, [f"Invalid JSON: {error}"]) from None
    except ValueError as error:
        raise ConfigError(path, [str(error)]) from None
    if not isinstance(tree, dict):
        raise ConfigError(path, ["it holds no keys: write one `key: value` a line"])
    return cast(Any, tree)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)}: is there twice")
    return found


def _yaml(text: str) -> Any:
    """Raises ValueError with the place of what is wrong."""
    import yaml  # a tenth of an agent's start, and its file may well be JSON

    class Loader(yaml.SafeLoader):
        """Keys once, and no aliases, which make small files large."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise ValueError(f"line {mark.line + 1}: aliases (*name) are not understood here")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            found: dict[Any, Any] = {}
            for name, value in node.value:
                key = cast(Any, self.construct_object(name, deep=True))
                if not isinstance(key, str):
                    raise ValueError(f"line {name.start_mark.line + 1}: {key!r} is no name of a key")
                if key in found:
                    raise ValueError(f"line {name.start_mark.line + 1}: {key} is there twice")
                found[key] = cast(Any, self.construct_object(value, deep=True))
            return found

    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{error.problem or 'this is no YAML'}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


# --- what is wrong ----------------------------------------------------------------------------------------------------

_BINARY = {"b": 1.0, "bytes": 1.0, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}
_SIZES = _BINARY | {
    "k": 2.0**10, "m": 2.0**20, "g": 2.0**30, "t": 2.0**40, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
}  # fmt: skip
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_RATES = {
    "kbps": 1e3, "mbps": 1e6, "gbps": 1e9, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9,
    "kbit/s": 1e3, "mbit/s": 1e6, "gbit/s": 1e9,
}  # fmt: skip
_SHOWN = {"mib": "MiB", "bytes": "bytes", "ms": "milliseconds", "s": "seconds", "h": "hours", "mbps": "Mbit/s"}
_TABLES: Mapping[str, dict[str, float]] = {
    "mib": _SIZES, "gib": _SIZES, "kib": _SIZES, "bytes": _SIZES, "b": _SIZES, "mb": _SIZES, "gb": _SIZES,
    "us": _TIMES, "ms": _TIMES, "s": _TIMES, "min": _TIMES, "h": _TIMES, "d": _TIMES,
    "kbps": _RATES, "mbps": _RATES, "gbps": _RATES,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z/]+)\s*")


def _unit(key: str) -> str:
    """The unit at the end of a key's name; empty: it has none."""
    stem, _, last = key.rpartition("_")
    return last if last in _TABLES and not stem.endswith("per") else ""


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _converted(value: float, of: str, unit: str) -> str | None:
    """A quantity in another unit, as it is to be written; None: they do not measure the same."""
    ours = _TABLES[unit]
    return _number(value * ours[of] / ours[unit]) if of in ours else None


def _sentence(where: tuple[int | str, ...], said: str, given: Any) -> str:
    """What is wrong with one key, and what to write where that is known."""
    key = ".".join(map(str, where)) or "content"
    name = next((str(part) for part in reversed(where) if isinstance(part, str)), "")
    unit = _unit(name)
    measured = _QUANTITY.fullmatch(given) if unit and isinstance(given, str) else None
    if measured:
        right = _converted(float(measured[1]), measured[2].lower(), unit)
        shown = _SHOWN.get(unit, unit)
        if right is not None:
            return f"{key}: is a number of {shown}, without a unit: for {given} write {right}"
        return f"{key}: is a number of {shown}, which {measured[2]!r} is no unit of"
    if isinstance(given, bool):
        return f"{key}: {said} (yes, no, on and off without quotes are true and false in YAML)"
    return f"{key}: {said}"


def _strangers(kind: Any, tree: Any, at: str) -> Iterator[str]:
    """Keys that no field has, each as a sentence."""
    kind = _bare(kind)
    if _has_fields(kind) and isinstance(tree, dict):
        hints = _hints(kind)
        for key, value in cast("dict[str, Any]", tree).items():
            if key in hints:
                yield from _strangers(hints[key], value, f"{at}{key}.")
            else:
                yield f"{at}{key}: there is no such key; {_instead(key, value, sorted(hints))}"
    elif get_origin(kind) in (list, tuple) and isinstance(tree, list):
        for number, value in enumerate(cast("list[Any]", tree)):
            yield from _strangers(get_args(kind)[0], value, f"{at}{number}.")
    elif get_origin(kind) is dict and isinstance(tree, dict):
        for key, value in cast("dict[str, Any]", tree).items():
            yield from _strangers(get_args(kind)[1], value, f"{at}{key}.")


def _instead(key: str, value: Any, known: list[str]) -> str:
    unit = _unit(key)
    for one in known if unit else ():
        ours = _unit(one)
        if ours and one.removesuffix(ours) == key.removesuffix(unit) and isinstance(value, int | float):
            right = _converted(float(value), unit, ours)
            if right is not None:
                return f"it is given in {_SHOWN.get(ours, ours)}: write {one}: {right}"
    stems = {one.removesuffix(f"_{_unit(one)}"): one for one in known}
    near = stems.get(key) or next(iter(difflib.get_close_matches(key, known, 1, 0.6)), None)
    return f"did you mean {near}?" if near else f"there are {', '.join(known)}"


# --- what there is ----------------------------------------------------------------------------------------------------


def _bare(kind: Any) -> Any:
    """Without what constrains it, and without None."""
    while True:
        if get_origin(kind) is Annotated:
            kind = get_args(kind)[0]
        elif get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind):
            kind = next(each for each in get_args(kind) if each is not NoneType)
        else:
            return kind


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and (is_dataclass(kind) or issubclass(kind, BaseModel))


def _hints(kind: type[Any]) -> dict[str, Any]:
    names = kind.model_fields if issubclass(kind, BaseModel) else {each.name: each for each in fields(kind)}
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in names}


def _default(kind: type[Any], name: str) -> Any:
    """MISSING: it must be given."""
    if issubclass(kind, BaseModel):
        field = kind.model_fields[name]
        return MISSING if field.is_required() else cast(Any, field.get_default(call_default_factory=True))
    found = next(each for each in fields(kind) if each.name == name)
    if found.default_factory is not MISSING:
        return found.default_factory()
    return found.default


@cache
def _meanings(kind: type[Any]) -> dict[str, str]:
    """The docstring of each attribute."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        if not _has_fields(each) or each is BaseModel:
            continue
        body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]).body
        for here, after in itertools.pairwise(body):
            if not (isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name)):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[here.target.id] = " ".join(str(after.value.value).split())
    return found


def _settings(kind: type[Any], at: str, above: Any = MISSING) -> Iterator[Setting]:
    meanings = _meanings(kind)
    for name, hint in _hints(kind).items():
        default = getattr(above, name) if above is not MISSING else _default(kind, name)
        bare, key = _bare(hint), f"{at}{name}"
        meaning = meanings.get(name, "")
        args = get_args(bare)
        if _has_fields(bare):
            yield Setting(key, SECTION, None, default is MISSING, meaning or _first(bare))
            default = MISSING if default is None else default
            yield from _settings(bare, f"{key}.", default)
        elif get_origin(bare) is dict and _has_fields(_bare(args[1])):
            yield Setting(key, "NAME: keys below", {}, False, meaning)
            yield from _settings(_bare(args[1]), f"{key}.NAME.")
        elif get_origin(bare) in (tuple, list) and _has_fields(_bare(args[0])):
            yield Setting(key, "list of keys below", [], False, meaning)
            yield from _settings(_bare(args[0]), f"{key}[].")
        else:
            shown = None if default is MISSING else TypeAdapter[Any](hint).dump_python(default, mode="json")
            yield Setting(key, _takes(hint), shown, default is MISSING, meaning)


def _first(kind: type[Any]) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


_WORDS: Mapping[Any, str] = {str: "text", Path: "path", bool: "true or false", int: "whole number", float: "number"}


def _takes(hint: Any) -> str:
    bare = _bare(hint)
    origin, args = get_origin(bare), get_args(bare)
    if origin is Literal:
        return ", ".join(map(str, args))
    if isinstance(bare, type) and issubclass(bare, Enum):
        return ", ".join(str(each.value) for each in bare)
    if origin in (tuple, list):
        return f"list of {_takes(args[0])}"
    if origin is dict:
        return f"NAME: {_takes(args[1])}"
    return f"{_WORDS.get(bare, 'text')}{_bounds(hint)}"


def _bounds(hint: Any) -> str:
    low = high = None
    for one in _constraints(hint):
        low, high = getattr(one, "ge", low), getattr(one, "le", high)
    if low is not None and high is not None:
        return f", {low} to {high}"
    return f", at least {low}" if low is not None else f", at most {high}" if high is not None else ""


def _constraints(hint: Any) -> Iterator[Any]:
    for each in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        yield each
        yield from getattr(each, "metadata", ())


# --- showing it -------------------------------------------------------------------------------------------------------


def as_yaml(file: ConfigFile[Any]) -> str:
    """Every key with its default, explained; a file of these keys alone changes nothing."""
    lines = [f"# {file.program}.yaml: every key, with its default. What has none is commented out."]
    settings = file.settings()
    given = [each.key for each in settings if each.default is not None and not _of_many(each.key)]
    for each in settings:
        depth = each.key.count(".")
        indent = "  " * depth
        lines.append("")
        lines += textwrap.wrap(
            each.meaning, 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ", break_on_hyphens=False
        )
        if each.takes != SECTION:
            lines.append(f"{indent}# takes: {each.takes}{'; must be given' if each.required else ''}")
        stands = any(key == each.key or key.startswith(f"{each.key}.") for key in given)
        name = each.key if _of_many(each.key) else each.key.rpartition(".")[2]
        value = "" if each.default is None else f" {json.dumps(each.default, ensure_ascii=False)}"
        lines.append(f"{indent}{'' if stands else '# '}{name}:{value}")
    return "\n".join(lines) + "\n"


def _of_many(key: str) -> bool:
    return "NAME" in key or "[]" in key


def as_markdown(file: ConfigFile[Any]) -> str:
    """A table of every key."""
    rows = [f"## {file.program}.yaml", "", "| key | takes | default | meaning |", "|---|---|---|---|"]
    for each in file.settings():
        if each.required:
            default = "must be given"
        elif each.default is None or each.default in ("", [], {}):
            default = ""
        else:
            default = f"`{json.dumps(each.default, ensure_ascii=False).strip(chr(34))}`"
        rows.append(f"| `{each.key}` | {each.takes} | {default} | {each.meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows) + "\n"
