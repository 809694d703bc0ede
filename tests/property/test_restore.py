"""A guest's life goes on any way it likes, a backup is made somewhere on the way, the ledger is lost somewhere later:
what an import decides starts no second copy and ends none that runs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from agents.guest.duty import Copy, Do, duty
from orchestrator.core import handover
from orchestrator.core.handover import GuestRecord, Ownership
from orchestrator.core.ids import HostRef
from orchestrator.core.restore import Fate, Held, Settled, settle

HOSTS = ("h1", "h2", "h3")
FORTH = ("open", "seal", "commit", "run", "done")
"""Steps of a move: taken more often than others, or its middle would hardly ever be seen."""
BETWEEN = (Ownership.OPEN, Ownership.COMMITTED)


def ref(host: str) -> HostRef:
    return HostRef(host, f"boot-{host}")


@dataclass
class Life:
    """One guest, as the hosts and the ledger have it. Every step is one that the protocol allows."""

    record: GuestRecord = field(default_factory=lambda: GuestRecord("g", Ownership.IDLE, ref("h1")))
    copies: dict[str, tuple[HostRef, Copy]] = field(
        default_factory=lambda: {"i0": (ref("h1"), Copy("i0", incoming=False, running=True))}
    )
    made: int = 0

    def own(self) -> Copy | None:
        here = [copy for host, copy in self.copies.values() if host == self.record.owner]
        found = [copy for copy in here if not copy.incoming or copy.inc == self.record.inc]
        named = [copy for copy in found if copy.inc == self.record.inc]
        return (named or sorted(found, key=lambda copy: copy.sealed) or [None])[0]

    def put(self, inc: str, **changes: object) -> None:
        host, copy = self.copies[inc]
        self.copies[inc] = (host, replace(copy, **changes))

    def steps(self) -> list[str]:
        own, phase = self.own(), self.record.phase
        able = {
            "open": phase in (Ownership.IDLE, Ownership.ABORTED) and own is not None,
            "seal": phase is Ownership.OPEN and own is not None and not own.sealed,
            "commit": phase is Ownership.OPEN and own is not None and own.sealed,
            "run": phase is Ownership.COMMITTED and own is not None and not own.running,
            "done": phase is Ownership.COMMITTED and own is not None and own.running,
            "abort": phase is Ownership.OPEN,
            "back": phase is Ownership.ABORTED and own is not None and own.sealed,
            "drop": len(self.copies) > 1 and own is not None and not own.sealed and phase not in BETWEEN,
            "pause": phase is Ownership.IDLE and own is not None and own.running,
            "resume": phase is Ownership.IDLE and own is not None and not own.running and not own.sealed,
            "crash": own is not None,
        }
        return sorted(name for name, can in able.items() if can)

    def do(self, step: str, host: str) -> None:
        own, record = self.own(), self.record
        match step:
            case "open":
                to = host if host != record.owner.host else next(h for h in HOSTS if h != record.owner.host)
                self.made += 1
                inc = f"i{self.made}"
                self.copies = {k: v for k, v in self.copies.items() if v[0].host != to}
                self.copies[inc] = (ref(to), Copy(inc, incoming=True, migration="m", attempt=self.made))
                self.record = replace(
                    record, phase=Ownership.OPEN, migration="m", attempt=self.made, destination=ref(to), inc=inc
                )
            case "seal":
                assert own is not None
                self.put(own.inc, running=False, sealed=True)
            case "commit":
                assert record.destination is not None
                self.record = replace(record, phase=Ownership.COMMITTED, owner=record.destination, source=record.owner)
            case "run":
                self.put(record.inc, running=True)
            case "done":
                self.record = replace(record, phase=Ownership.IDLE)
                self.put(record.inc, incoming=False)
            case "abort":
                self.record = replace(record, phase=Ownership.ABORTED, inc="")
            case "back" | "resume":
                assert own is not None
                self.put(own.inc, running=True, sealed=False)
            case "drop":
                assert own is not None
                self.copies = {own.inc: self.copies[own.inc]}
            case "pause":
                assert own is not None
                self.put(own.inc, running=False)
            case _:
                assert own is not None
                del self.copies[own.inc]

    def runs(self) -> list[str]:
        return [inc for inc, (_, copy) in self.copies.items() if copy.running]

    def held(self, unheard: frozenset[str]) -> list[Held]:
        return [
            Held(host, inc, copy.incoming, copy.running, copy.sealed)
            for inc, (host, copy) in self.copies.items()
            if host.host not in unheard
        ]


def keep(life: Life, settled: Settled, wish: bool) -> None:
    """What the agents do by the record that the import wrote, until nothing is owed any more. An attempt that is left
    is ended as its record says: closed at the source, discarded at a destination."""
    record = settled.record
    for _ in range(20):
        moved = False
        for host in map(ref, HOSTS):
            mine = [copy for where, copy in life.copies.values() if where == host]
            owed = duty(record, host, mine, marker=False, want_run=wish)
            moved = moved or owed.do not in (Do.NOTHING, Do.ASK_AGAIN, Do.REFUSE_OWNER)
            match owed.do:
                case Do.RUN:
                    life.put(owed.inc, running=True, sealed=False)
                case Do.STOP:
                    life.put(owed.inc, running=False)
                case Do.DISCARD:
                    del life.copies[owed.inc]
                case Do.PROMOTE:
                    life.put(owed.inc, incoming=False)
                case Do.DECLARE_CRASHED:
                    assert record is not None
                    record = handover.crashed(record, writer="a")
                case _:
                    pass
            assert len(life.runs()) <= 1, f"{owed} on {host.host} made a second copy run"
        if not moved:
            return


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_no_second_copy_runs_and_none_that_runs_is_ended(data: st.DataObject) -> None:
    life = Life()
    exported = life.record
    for _ in range(data.draw(st.integers(0, 14))):
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            exported = life.record
        able = life.steps()
        if not able:
            break
        forth = [step for step in able if step in FORTH]
        life.do(data.draw(st.sampled_from(able + 5 * forth)), data.draw(st.sampled_from(HOSTS)))
    unheard = frozenset(data.draw(st.sets(st.sampled_from(HOSTS))))
    before = life.runs()
    assert len(before) <= 1
    settled = settle(exported, life.held(unheard), unheard=sorted(unheard), writer="import")
    keep(life, settled, wish=bool(settled.runs))
    if before:
        assert life.runs() == before, f"{settled}: what ran does not run any more"
        seen = life.copies[before[0]][0].host not in unheard
        assert not seen or settled.fate is Fate.OWNED
    else:
        assert not life.runs(), f"{settled}: something runs that stood"
    if settled.fate in (Fate.CRASHED, Fate.GONE):
        assert not life.copies, "what is said to be over is nowhere"
    keep(life, settled, wish=True)  # an operator resumes it
    if before:
        assert life.runs() == before


def test_what_the_backup_says_of_the_owner_decides_nothing() -> None:
    old = GuestRecord("g", Ownership.IDLE, ref("h1"), inc="i0")
    settled = settle(old, [Held(ref("h2"), "i7", running=True)], writer="import")
    assert settled.fate is Fate.OWNED
    assert settled.record is not None
    assert (settled.record.owner, settled.record.inc, settled.record.phase) == (ref("h2"), "i7", Ownership.IDLE)


def test_two_that_run_are_left_alone() -> None:
    two = [Held(ref("h1"), "i0", running=True), Held(ref("h2"), "i1", running=True)]
    settled = settle(GuestRecord("g", Ownership.IDLE, ref("h1")), two, writer="import")
    assert (settled.fate, settled.record) == (Fate.UNKNOWN, None)
    assert "h1" in settled.why
    assert "h2" in settled.why


def test_a_life_whose_name_is_anothers_is_over() -> None:
    settled = settle(GuestRecord("g", Ownership.IDLE, ref("h1")), [], succeeded=True, writer="import")
    assert settled.fate is Fate.GONE
    assert settled.record is not None
    assert settled.record.phase is Ownership.GONE


def test_a_host_that_was_not_heard_may_run_it() -> None:
    settled = settle(GuestRecord("g", Ownership.CRASHED, ref("h1")), [], unheard=["h3"], writer="import")
    assert settled.fate is Fate.UNKNOWN
    assert "h3" in settled.why
