"""Scenarios as people write them: YAML, read strictly (docs/scenario.md)."""

from __future__ import annotations

from typing import Any

import yaml

from deploy.lab.devices.scenario import Scenario, scenario_from, scenario_mapping
from orchestrator.core.errors import invalid

MAX_TEXT = 65_536


class _Loader(yaml.SafeLoader):
    """Refuses what YAML would pass over in silence: a key that is given twice, and references that multiply."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not allowed here: write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key == "<<":
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key!r} is given twice: keep one of the two", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_scenario(text: str, where: str = "") -> Scenario:
    """Empty text is a well-behaved device. Raises DroverError(INVALID_ARGUMENT) with every wrong field and what to do.

    `where` is put before each field path, e.g. `guest.devices[0].scenario`.
    """
    if len(text) > MAX_TEXT:
        raise invalid([(where or "scenario", f"at most {MAX_TEXT} characters, not {len(text)}")])
    try:
        content: object = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = error.problem or error.context or "this is no YAML"
        raise invalid([(where or "scenario", f"{place}{said}")]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise invalid([(where or "scenario", f"this cannot be read as YAML: {' '.join(str(error).split())}")]) from None
    return scenario_from({} if content is None else content, where)


def format_scenario(scenario: Scenario) -> str:
    """YAML that `parse_scenario` reads back to an equal scenario; empty for a well-behaved device."""
    mapping = scenario_mapping(scenario)
    return yaml.safe_dump(mapping, sort_keys=False, default_flow_style=None) if mapping else ""
