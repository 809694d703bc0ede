"""A guest as a guest file would have it: what `drover guest edit` lets people change."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from orchestrator.core.records import Boot, DeviceSpec, DiskSpec, GuestSpec, NicSpec

_KEYS = {"memory_mib": "memory", "max_memory_mib": "max_memory", "size_bytes": "size"}
_ALWAYS = frozenset({"name", "memory_mib", "vcpus", "machine", "pool", "image", "format", "network", "shim"})
"""Written also where they are what they would be by default."""


def text_of(spec: GuestSpec) -> str:
    """The guest file. What it leaves out has its default; read again it gives the same guest."""
    import yaml

    document = _mapping(spec, GuestSpec(""))
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)


def _mapping(value: Any, default: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for each in fields(value):
        given = getattr(value, each.name)
        if each.name not in _ALWAYS and given == getattr(default, each.name):
            continue
        if each.name in _ALWAYS and given in ("", None):
            continue
        found[_KEYS.get(each.name, each.name)] = _plain(each.name, given)
    if "memory" in found and isinstance(value, GuestSpec):
        found["memory"] = f"{value.memory_mib}MiB"
    if "max_memory" in found:
        found["max_memory"] = f"{value.max_memory_mib}MiB"
    return found


_DEFAULTS: dict[type, Any] = {DiskSpec: DiskSpec("", "", ""), NicSpec: NicSpec("", ""), Boot: Boot()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(name, each) for each in cast("tuple[Any, ...]", value)]
    if isinstance(value, dict):
        return dict(sorted(cast("dict[str, Any]", value).items()))
    if hasattr(value, "__dataclass_fields__"):
        return _mapping(value, _default_of(value))
    if hasattr(value, "value"):  # a word of an enumeration
        return value.value
    return value


def _default_of(value: Any) -> Any:
    if isinstance(value, DeviceSpec):
        return DeviceSpec("", value.shim)
    if type(value) in _DEFAULTS:
        return _DEFAULTS[type(value)]
    required = [each.name for each in fields(value) if each.name == "user_data"]
    return type(value)(**dict.fromkeys(required, ""))
