"""In what hosts differ, of what guests may need where they go: pure, over the facts that their agents registered."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.rpc.messages import Host, Network, Pool


@dataclass(frozen=True, slots=True)
class Difference:
    """One fact that is not the same on all hosts."""

    fact: str
    """A word, such as `engine`, and where there are several of them a name: `network lan`."""
    found: Mapping[str, Sequence[str]]
    """What -> the hosts where it is so; `none` is also something."""
    means: str
    """What it keeps guests from."""


NONE = "none"
_MEANS: Mapping[str, str] = {
    "accelerator": "guests do not move between accelerators",
    "engine": "guests may be unable to go back to the older engine",
    "machine type": "guests of this machine type cannot go where it is missing",
    "cpu model": "guests with this model cannot go where it is missing",
    "firmware": "guests that started with this firmware go only where it is the same",
    "feature": "guests that make use of it cannot go where it is missing",
    "pool": "guests with a disk in it cannot go where it is missing",
    "network": "guests with a card on it cannot go where it is missing, or lose long packets where its MTU is less",
    "option": "guests that ask for it cannot go where it is missing",
}


def differences(hosts: Iterable[Host]) -> list[Difference]:
    """Of hosts whose facts are known, by fact."""
    facts = {host.name: _facts(host) for host in hosts}
    found: list[Difference] = []
    for fact in sorted({fact for known in facts.values() for fact in known}):
        values: defaultdict[str, list[str]] = defaultdict(list)
        for name in sorted(facts):
            values[facts[name].get(fact, NONE)].append(name)
        if len(values) > 1:
            kind = next(each for each in _MEANS if fact == each or fact.startswith(f"{each} "))
            found.append(Difference(fact, dict(values), _MEANS[kind]))
    return found


def _facts(host: Host) -> dict[str, str]:
    """By what a guest would name: the same key has the same text where hosts agree."""
    return {
        "engine": host.engine or NONE,
        "accelerator": host.accelerator or NONE,
        **{f"machine type {each}": "there" for each in host.machine_types},
        **{f"cpu model {each}": "there" for each in host.cpu_models},
        **{f"feature {each}": "there" for each in host.features},
        **{f"option {each}": "there" for each in host.extra_args},
        **{f"firmware {role}": digest[:12] for role, digest in host.firmware.items()},
        **{f"pool {each.name}": _kind(each) for each in host.pools},
        **{f"network {each.name}": f"{_kind(each)}, MTU {each.mtu}" for each in host.networks},
    }


def _kind(each: Pool | Network) -> str:
    from orchestrator import wire

    return wire.word(each, "kind").lower()
