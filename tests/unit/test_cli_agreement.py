"""In what hosts differ."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format

from orchestrator.cli.agreement import NONE, Difference, differences
from orchestrator.rpc.messages import Host

FACTS: dict[str, Any] = {
    "engine": "qemu 10.0.2",
    "accelerator": "kvm",
    "machineTypes": ["pc-q35-10.0"],
    "cpuModels": ["Skylake"],
    "firmware": {"bios": "ab" * 32},
    "pools": [{"name": "fast", "kind": "POOL_KIND_LOCAL"}],
    "networks": [{"name": "lan", "kind": "NETWORK_KIND_BRIDGE", "mtu": 1500}],
    "features": ["HARDWARE"],
    "extraArgs": ["-fw_cfg"],
}


def host(name: str, **other: Any) -> Host:
    return json_format.ParseDict({**FACTS, **other, "name": name}, Host())


def found(*hosts: Host) -> dict[str, Difference]:
    return {each.fact: each for each in differences(hosts)}


def test_hosts_that_are_alike_differ_in_nothing() -> None:
    assert found(host("a"), host("b"), host("c")) == {}
    assert found(host("a")) == {}
    assert found() == {}


def test_each_fact_is_compared() -> None:
    for key, fact in (
        ("engine", "engine"),
        ("accelerator", "accelerator"),
        ("machineTypes", "machine type pc-q35-10.0"),
        ("cpuModels", "cpu model Skylake"),
        ("firmware", "firmware bios"),
        ("pools", "pool fast"),
        ("networks", "network lan"),
        ("features", "feature HARDWARE"),
        ("extraArgs", "option -fw_cfg"),
    ):
        less = host("b", **{key: "" if isinstance(FACTS[key], str) else type(FACTS[key])()})
        said = found(host("a"), less)
        assert said.keys() == {fact}
        assert said[fact].found[NONE] == ["b"]
        assert said[fact].means


def test_another_mtu_or_kind_is_a_difference() -> None:
    said = found(
        host("a"),
        host("b", networks=[{"name": "lan", "kind": "NETWORK_KIND_BRIDGE", "mtu": 9000}]),
        host("c", pools=[{"name": "fast", "kind": "POOL_KIND_SHARED_FILE"}]),
    )
    assert said["network lan"].found == {"bridge, MTU 1500": ["a", "c"], "bridge, MTU 9000": ["b"]}
    assert said["pool fast"].found == {"local": ["a", "b"], "shared_file": ["c"]}
