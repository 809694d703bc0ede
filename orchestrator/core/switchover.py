"""The ACK ledger of one attempt: requests, acknowledgements, the gate, the freeze and the check.

What "late" means (docs/protocol.md, 5.1): a request that is neither acknowledged nor in the baseline, at the check,
or that was accepted into the ledger between freeze and COMMIT. The *baseline* is empty if the guest ran until the
switchover stop; else it is what was pending when the operator or policy had stopped the guest, and then no request
is late any more: there is no downtime left to protect.

This is Drover's own accounting, by device and generation. QEMU's, by one number, is in
`deploy/lab/devices/qemu_acks.py`; where the two differ, docs/rules.md says so and why.

Pure values: every method returns a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

from orchestrator.core.ids import AckRequest


class AckMode(StrEnum):
    """What an ACK means in one migration; the same at both of its ends, or the hand-over goes wrong (R4)."""

    OFF = "off"
    """Nobody waits for the devices: the gate is always open and nothing is ever late."""
    LEGACY = "legacy"
    """QEMU 8.1 to 11.0, and later with the machine types of those: the destination acknowledges all devices at once,
    one time. No ACK can be asked for again, so none can be late."""
    PER_DEVICE = "per-device"
    """QEMU 11.1, and every companion device: each device asks, whenever it needs to, and is answered for itself."""


def _newest(entries: tuple[AckRequest, ...], entry: AckRequest) -> tuple[AckRequest, ...]:
    """Keep the newest generation of each device; an older or equal one changes nothing."""
    kept = {known.device: known for known in entries}
    if entry.device in kept and kept[entry.device].generation >= entry.generation:
        return entries
    kept[entry.device] = entry
    return tuple(sorted(kept.values()))


@dataclass(frozen=True, slots=True)
class AckLedger:
    """Requests and ACKs as the source agent knows them. One open request per device: a newer generation replaces it."""

    requests: tuple[AckRequest, ...] = ()
    acks: tuple[AckRequest, ...] = ()
    stopped: bool = False
    """The guest had been stopped by operator or policy before the freeze."""
    frozen: bool = False
    sealed_check: bool = False
    """The check passed: later requests are served in stop-copy (R30)."""
    while_stopped: tuple[AckRequest, ...] = ()
    """Requests made, or left pending, while the guest was stopped: named in the result, never a reason to abort."""
    mode: AckMode = AckMode.PER_DEVICE

    def request(self, entry: AckRequest) -> AckLedger:
        """A device asks. Idempotent by (device, generation); an older generation is dropped (R13)."""
        requests = _newest(self.requests, entry)
        if requests == self.requests:
            return self
        noted = _newest(self.while_stopped, entry) if self.stopped else self.while_stopped
        return replace(self, requests=requests, while_stopped=noted)

    def ack(self, entry: AckRequest) -> AckLedger:
        """The destination answered a generation. It never satisfies a newer one, nor another device's (R11, R13).

        In legacy mode any ACK is the one for all devices, and it is never revoked (R7).
        """
        return replace(self, acks=_newest(self.acks, entry))

    @property
    def pending(self) -> tuple[AckRequest, ...]:
        """Requests that still wait for their ACK: per device, for that of their own generation."""
        match self.mode:
            case AckMode.OFF:
                return ()
            case AckMode.LEGACY:
                return () if self.acks else self.requests
            case AckMode.PER_DEVICE:
                acked = {known.device: known.generation for known in self.acks}
                return tuple(entry for entry in self.requests if acked.get(entry.device, 0) < entry.generation)

    @property
    def gate_open(self) -> bool:
        """May the engine stop the guest? A guest that is stopped anyway has nothing to gain by waiting (R6).

        In legacy mode it opens with the one ACK (R7), whether or not anybody said that it is needed.
        """
        if self.mode is AckMode.LEGACY:
            return self.stopped or bool(self.acks)
        return self.stopped or not self.pending

    def stop_by_wish(self) -> AckLedger:
        """Operator or policy stopped the guest before the freeze: the pending requests become the baseline (R18)."""
        if self.frozen or self.stopped:
            return self
        return replace(self, stopped=True, while_stopped=self.pending)

    def resume_by_wish(self) -> AckLedger:
        """The guest runs again before the freeze: the gate is evaluated anew (R15)."""
        if self.frozen or not self.stopped:
            return self
        return replace(self, stopped=False, while_stopped=())

    def freeze(self) -> AckLedger:
        """The decision to switch over: requests that come from here on are late, until the check (docs/protocol.md,
        5.1)."""
        return replace(self, frozen=True)

    @property
    def late(self) -> tuple[AckRequest, ...]:
        """What aborts the attempt at the check; the same look later finds what the check could not have seen.

        Only a device that may ask again can be late: there is no check in the other modes (R19).
        """
        if self.stopped or self.mode is not AckMode.PER_DEVICE:
            return ()
        return self.pending

    def pass_check(self) -> AckLedger:
        """R30: from here a device's own request is TOO_LATE and served in stop-copy."""
        return replace(self, sealed_check=True)
