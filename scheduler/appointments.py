"""When those who were refused may come back: consecutive times, each the capacity of one request after the one before.

One time for all would bring them back together, and refuse most of them again. Here everybody who is told a time has so much of the
future set aside: newcomers are weighed as if those who have an appointment stood before them, and whoever comes when told is
let in.
A client is known by what it asks for (tenant, model, lengths, the prompt's last hash): it comes back as another request. One who
does not come loses the time after a grace.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import NamedTuple

from protocol.messages import Admit

MAX_APPOINTMENTS = 16_384
GRACE_S = 2.0  # and a quarter of the wait: how late one may come

EARLY_S = 1e-3  # so much early is in time: the answer's header and the client's clock round
LEARNING = 0.05

Mark = tuple[str, str, int, int, int, bytes]


def mark_of(admit: Admit) -> Mark:
    """What stays the same when the same client asks again for the same."""
    last = admit.prefix_hashes[-1] if admit.prefix_hashes else b""
    return admit.tenant, admit.model, admit.prompt_len, admit.max_tokens, admit.num_choices, last


class Appointment(NamedTuple):
    at: float
    until: float
    model: str
    band: int
    work_s: float  # of the resource that is short
    tenant: str
    tokens: float  # set aside in the tenant's buckets; 0: no bucket was short
    mark: Mark
    slot: float = 0.0  # `at` before its jitter, which moves nobody else's
    takes_s: float = 0.0  # until the next one's slot


class Appointments:
    """Those that are still to come."""

    def __init__(self) -> None:
        self._by_mark: dict[Mark, deque[Appointment]] = {}
        self._ends: list[tuple[float, int, Appointment]] = []
        self._gone: set[int] = set()  # numbers of those kept, or lost, that still stand in `_ends`
        self._numbers: dict[int, int] = {}  # id of an appointment -> its number
        self._lines: dict[tuple[str, int], deque[Appointment]] = {}  # model, band -> in the order of their times
        self._line_end: dict[tuple[str, int], float] = {}
        self._count = 0
        self.show_rate = 0.2  # of those that are told a time, who come; a moving mean

    def __len__(self) -> int:
        return len(self._numbers)

    def first_free(self, model: str, band: int, earliest: float) -> float:
        """The first time from `earliest` on that nobody has yet."""
        return max(earliest, self._line_end.get((model, band), earliest))

    def make(self, appointment: Appointment) -> None:
        """Nothing is noted when there are too many already."""
        if len(self._numbers) >= MAX_APPOINTMENTS:
            return
        line = appointment.model, appointment.band
        # Those who stay away leave their times to others: told closer together, as many come as there is room for.
        self._line_end[line] = max(self._line_end.get(line, 0.0), appointment.slot + appointment.takes_s * self.show_rate)
        self._count += 1
        self._numbers[id(appointment)] = self._count
        heapq.heappush(self._ends, (appointment.until, self._count, appointment))
        self._by_mark.setdefault(appointment.mark, deque()).append(appointment)
        self._lines.setdefault(line, deque()).append(appointment)

    def has(self, admit: Admit, now: float) -> bool:
        mine = self._by_mark.get(mark_of(admit))
        return mine is not None and mine[0].at <= now + EARLY_S

    def keep(self, admit: Admit, now: float) -> Appointment | None:
        """The appointment with which this one comes, if it has one and its time has come."""
        mine = self._by_mark.get(mark_of(admit))
        if not mine or mine[0].at > now + EARLY_S:
            return None
        appointment = mine[0]
        self._drop(appointment)
        self.show_rate += LEARNING * (1.0 - self.show_rate)
        return appointment

    def lost(self, now: float) -> list[Appointment]:
        """Those whose time has passed, taken out."""
        out = []
        while self._ends and self._ends[0][0] <= now:
            _, number, appointment = heapq.heappop(self._ends)
            if number in self._gone:
                self._gone.remove(number)
                continue
            self._drop(appointment)
            self._gone.discard(number)
            self.show_rate -= LEARNING * self.show_rate
            line = appointment.model, appointment.band
            if line in self._line_end:
                self._line_end[line] -= appointment.takes_s * self.show_rate
            out.append(appointment)
        return out

    def work_s(self, model: str, band: int, tenant: str, until: float) -> float:
        """What its own tenant's, and those of higher bands, who come will ask for by then. Other tenants' wait for
        their turn beside it, which the order sees to."""
        total = 0.0
        for (of, its_band), line in self._lines.items():
            if of != model or its_band > band:
                continue
            for appointment in line:
                if appointment.at > until:
                    break
                if its_band < band or appointment.tenant == tenant:
                    total += appointment.work_s
        return total * self.show_rate

    def _drop(self, appointment: Appointment) -> None:
        self._gone.add(self._numbers.pop(id(appointment)))
        mine = self._by_mark[appointment.mark]
        mine.remove(appointment)
        if not mine:
            del self._by_mark[appointment.mark]
        key = appointment.model, appointment.band
        line = self._lines[key]
        if line[0] is appointment:
            line.popleft()
        else:
            line.remove(appointment)
        if not line:
            del self._lines[key]
            self._line_end.pop(key, None)
