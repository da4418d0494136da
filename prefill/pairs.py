"""What a prefill worker has learnt about the transports between itself and one decode worker: which are out, why, and until when.

A transport that cannot be set up, or whose transfers fail twice in a row, is left out of the next hand-shakes for a while that
doubles each time. Pure: the clock is an argument. Used by `links.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST_HOLD_S = 1.0
MAX_HOLD_S = 300.0
MAX_FAILURES = 2  # transfers in a row


class _Record:
    """One transport of the pair."""

    def __init__(self) -> None:
        self.num_holds = 0  # in a row; a transfer that succeeds ends the row
        self.num_failures = 0  # transfers in a row
        self.until = float("-inf")
        self.reason = ""


class Pair:
    """transports: what this worker would offer, in order of preference."""

    def __init__(self, transports: Sequence[str]) -> None:
        self.incompatible = ""  # why these two lives can never exchange KV; empty: nothing is known against it
        self.num_fallbacks = 0
        self._records = {name: _Record() for name in transports}

    def offered(self, now: float) -> tuple[str, ...]:
        """What to offer now. With nothing else left, what failed only once is given a second chance at once."""
        able = tuple(name for name, record in self._records.items() if now >= record.until)
        return able or tuple(name for name, record in self._records.items() if record.num_holds == 1)

    def unusable(self, name: str, reason: str, now: float) -> None:
        """It could not be set up."""
        self._hold(name, reason, now)
        self.num_fallbacks += 1

    def transfer_failed(self, name: str, reason: str, now: float) -> bool:
        """True: it is taken out, use another. The only one there is stays: a bad transport is better than none."""
        record = self._records[name]
        record.num_failures += 1
        if record.num_failures < MAX_FAILURES or not any(n != name and now >= r.until for n, r in self._records.items()):
            return False
        record.num_failures = 0
        self._hold(name, reason, now)
        self.num_fallbacks += 1
        return True

    def transfer_succeeded(self, name: str) -> None:
        record = self._records[name]
        record.num_failures = record.num_holds = 0

    def may_improve(self, name: str, now: float) -> bool:
        """A transport that comes before this one was out and may be tried again."""
        for other, record in self._records.items():
            if other == name:
                return False
            if record.num_holds and now >= record.until:
                return True
        return False

    def reasons(self) -> str:
        """Each transport and why it is out."""
        return "; ".join(f"{name}: {record.reason}" for name, record in self._records.items() if record.reason) or "none is offered"

    def _hold(self, name: str, reason: str, now: float) -> None:
        record = self._records[name]
        record.until = now + min(FIRST_HOLD_S * 2**record.num_holds, MAX_HOLD_S)
        record.num_holds += 1
        record.reason = reason
