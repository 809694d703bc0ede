"""Scenarios as people write them: YAML, read strictly (docs/scenario.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from deploy.lab.devices.scenario import Ask, Scenario, outside_errors, scenario_from, scenario_mapping
from orchestrator.core.errors import DroverError, invalid

MAX_TEXT = 65_536
OPTION = "scenario"
"""Of a device's specification: the only option that the lab's devices have."""


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


def options_of(text: str) -> dict[str, str]:
    """The options of a device that follows this scenario."""
    return {OPTION: text} if text else {}


def scenario_of(options: Mapping[str, str], *, in_vmm: bool) -> Scenario:
    """What the lab's device of these options follows. Raises DroverError(INVALID_ARGUMENT) with every wrong option.

    `in_vmm`: it is one inside the VMM, which can do more.
    """
    bad = [
        (name, f"the lab's devices have no such option; {OPTION} is the only one") for name in options if name != OPTION
    ]
    scenario = Scenario()
    try:
        scenario = parse_scenario(options.get(OPTION, ""), OPTION)
    except DroverError as error:
        bad += error.violations
    bad += [] if in_vmm else [(f"{OPTION}.{field}", said) for field, said in outside_errors(scenario)]
    if bad:
        raise invalid(bad)
    return scenario


def parse_instruction(text: str) -> Ask:
    """What an instruction to a device of the lab means: a scenario with one ask and nothing else.

    Raises DroverError(INVALID_ARGUMENT).
    """
    scenario = parse_scenario(text, "instruction")
    if len(scenario.asks) != 1 or scenario != Scenario(asks=scenario.asks):
        said = "must be one ask and nothing else, such as asks: [{at: freeze, times: 2}]"
        raise invalid([("instruction", f"{said} (docs/scenario.md)")])
    return scenario.asks[0]


def late_ack(at: str, times: int = 1, bytes: int = 0) -> str:
    """The instruction to ask for another ACK at a hook, with so much new initial data each time. Not checked here."""
    return f"asks: [{{at: {at}, times: {times}, bytes: {bytes}}}]"
