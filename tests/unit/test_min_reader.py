"""Records that older versions must not act on say so, and are refused by them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from orchestrator.core.record import READS, Record
from orchestrator.core.records import MigrationState
from orchestrator.ledger import records
from orchestrator.ledger.records import BadRecord, decode, encode


@dataclass(frozen=True, slots=True)
class Promise(Record):
    """A record that can say something that versions before `READS + 1` would overlook."""

    name: str = ""
    twice: bool = False

    def min_reader(self) -> int:
        return READS + 1 if self.twice else 1


def test_what_every_version_may_read_says_nothing() -> None:
    assert "min_reader" not in json.loads(encode(Promise("a")))
    assert "min_reader" not in json.loads(encode(MigrationState()))


def test_an_older_reader_refuses_and_says_what_to_do() -> None:
    data = encode(Promise("a", twice=True))
    assert json.loads(data)["min_reader"] == READS + 1
    with pytest.raises(BadRecord) as caught:
        decode(Promise, data, path="/promises/a")
    said = str(caught.value)
    assert said.startswith("/promises/a: it was written for Drover versions that read min_reader 2")
    assert "upgrade this process" in said


def test_a_newer_reader_reads_it_and_writes_what_is_true_now(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Promise("a", twice=True))
    monkeypatch.setattr(records, "READS", READS + 1)
    read = decode(Promise, data)
    assert read == Promise("a", twice=True)
    assert read.newer == {}, "it is the ledger's own word, not a field of a newer version"
    assert json.loads(encode(read))["min_reader"] == READS + 1
    assert "min_reader" not in json.loads(encode(replace(read, twice=False))), "readable for all again"


@pytest.mark.parametrize("least", ['"2"', "true", "null", "1.5"])
def test_a_word_that_is_no_number_is_refused(least: str) -> None:
    with pytest.raises(BadRecord, match="is no whole number"):
        decode(Promise, f'{{"name": "a", "min_reader": {least}}}'.encode())
