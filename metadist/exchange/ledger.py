"""Which task is where: the bookkeeping of the parameter server. No sockets and no clock in it.

Design choices
- Tasks travel in items: ``item`` consecutive tasks of one meta-step. Task k is i = k mod tasks of s = k div tasks, whoever
  computes it and how often it is handed out: what it draws never changes.
- An item is handed out only if, were everything before it applied first, it would still be fresh enough. With max_staleness=0
  that is the synchronous step: a version's tasks go out, and then workers wait.
- A meta-step takes accepted items in the order they came, until they hold ``batch`` tasks, and sums them in the order of their
  numbers: the same items give the same bits.
- Lost and refused items keep their number and go out first. Each item is applied exactly once: that, and not the number of
  messages, is what is counted.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

ACCEPTED, STALE, DUPLICATE, REFUSED = "accepted", "stale", "duplicate", "refused"


@dataclass(frozen=True)
class Lease:
    """An item in a worker's hands. number: of the lease, never reused; base: the version it computes on."""

    number: int
    item: int
    base: int


@dataclass(frozen=True)
class Gradient:
    """An accepted item: what was pushed for it. content: the gradient's sum over its tasks, in the server's own form."""

    item: int
    base: int
    lease: int
    content: Any


@dataclass(frozen=True)
class Plan:
    """The fixed sizes. total: items of the whole run; tasks: of a meta-step's numbering; item, batch: in tasks."""

    total: int
    tasks: int
    item: int
    batch: int
    max_staleness: int
    queue: int

    def where(self, item: int) -> tuple[int, int]:
        """(meta-step, first task in it) that an item's draws belong to."""
        return divmod(item * self.item, self.tasks)


class Ledger:
    """All items of a run.

    version: of the newest published parameters. made: updates begun since the start: made > version while one is computed.
    """

    def __init__(self, plan: Plan) -> None:
        """Nothing is done, nothing is out."""
        self.plan = plan
        self.version = self.made = 0
        self.published = False
        self.counts: Counter[str] = Counter()
        self.dropped: list[int] = []  # leases whose gradient was accepted, and dropped after all; the reader empties it
        self.staleness: Counter[int] = Counter()  # of applied items, since it was last emptied
        self._leases, self._before = itertools.count(1), 0
        self._low, self._done = 0, set[int]()  # applied: all below _low, and these
        self._restart()

    def _restart(self) -> None:
        self._out: dict[int, Lease] = {}
        self._queue: deque[Gradient] = deque()
        self._again: list[int] = []
        self._next = self._low

    @property
    def queued(self) -> int:
        """Accepted items that wait to be applied."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Their tasks."""
        return len(self._queue) * self.plan.item

    @property
    def done(self) -> int:
        """Applied items."""
        return self._low + len(self._done)

    def publish(self) -> int:
        """New parameters are there: their version."""
        self.version, self.published = self.made, True
        return self.version

    def issue(self) -> Lease | None:
        """The next item for a worker, or None: there is nothing to do until something changes."""
        if not self.published or self._would_be_stale() or self.queued >= self.plan.queue:
            return None
        item = self._take_number()
        if item is None:
            return None
        lease = Lease(next(self._leases), item, self.version)
        self._out[lease.number] = lease
        return lease

    def _would_be_stale(self) -> bool:
        ahead = (len(self._out) + self.queued) * self.plan.item
        return self.made + ahead // self.plan.batch - self.version > self.plan.max_staleness

    def _take_number(self) -> int | None:
        if self._again:
            return heapq.heappop(self._again)
        self._next = max(self._next, self._low)
        while self._next in self._done:
            self._next += 1
        if self._next >= self.plan.total:
            return None
        self._next += 1
        return self._next - 1

    def push(self, lease: int, content: Any) -> str:
        """A worker's gradient for its lease: ACCEPTED, STALE (the item goes out again) or DUPLICATE (the lease is no more)."""
        held = self._out.pop(lease, None)
        if held is None:
            return self.miss(lease)
        if self.made - held.base > self.plan.max_staleness:
            heapq.heappush(self._again, held.item)
            return self._count(STALE)
        self._queue.append(Gradient(held.item, held.base, held.number, content))
        return self._count(ACCEPTED)

    def holds(self, lease: int) -> bool:
        """Whether a gradient for this lease is still to come, or waits to be applied."""
        return lease in self._out or any(g.lease == lease for g in self._queue)

    def miss(self, lease: int) -> str:
        """A push for a lease that its sender does not hold, or holds no more: the verdict."""
        return self._count(STALE if lease <= self._before else DUPLICATE)

    def give_back(self, lease: int, reason: str = "lost") -> None:
        """Its worker is gone, or what it pushed is no gradient: the item goes out again."""
        if (held := self._out.pop(lease, None)) is not None:
            heapq.heappush(self._again, held.item)
            self._count(reason)

    def _count(self, what: str) -> str:
        self.counts[what] += 1
        return what

    def take(self, late: bool = False) -> list[Gradient]:
        """The items of the next update, by their numbers; [] if they hold too few tasks yet.

        late: the deadline has passed, so any are enough. They count as applied from here on.
        """
        self._drop_stale()
        wanted = -(-self.plan.batch // self.plan.item)
        left = self.plan.total - self.done  # the run's last update may be short
        if not self._queue or (not late and len(self._queue) < min(wanted, left)):
            return []
        taken = [self._queue.popleft() for _ in range(min(wanted, len(self._queue)))]
        self.staleness.update(self.made - g.base for g in taken)
        self._done.update(g.item for g in taken)
        while self._low in self._done:
            self._done.remove(self._low)
            self._low += 1
        self.made += 1
        return sorted(taken, key=lambda g: g.item)

    def _drop_stale(self) -> None:
        """Deadlines make more versions than were reckoned with when an item was accepted."""
        old = [g for g in self._queue if self.made - g.base > self.plan.max_staleness]
        for gradient in old:
            self._queue.remove(gradient)
            self.dropped.append(gradient.lease)
            heapq.heappush(self._again, gradient.item)
        if old:
            self.counts[STALE] += len(old)
            self.counts[ACCEPTED] -= len(old)

    def untake(self, taken: list[Gradient]) -> None:
        """What ``take`` gave can't be applied, because its numbers were lost: the items go out again."""
        self.made -= 1
        self.staleness.subtract(self.made - g.base for g in taken)
        for gradient in taken:
            if gradient.item < self._low:
                self._done.update(range(gradient.item, self._low))
                self._low = gradient.item
            self._done.discard(gradient.item)
            heapq.heappush(self._again, gradient.item)
        self.counts[ACCEPTED] -= len(taken)
        self.counts["lost"] += len(taken)

    def recall(self) -> list[int]:
        """Accepted gradients are lost before they were applied: their items go out again. Returns their leases' numbers."""
        gone = [g.lease for g in self._queue]
        for gradient in self._queue:
            heapq.heappush(self._again, gradient.item)
        self.counts[ACCEPTED] -= len(gone)
        self.counts["lost"] += len(gone)
        self._queue.clear()
        return gone

    def snapshot(self) -> dict[str, Any]:
        """What is applied, for a checkpoint: all below "low", and "done"."""
        return {"item": self.plan.item, "low": self._low, "done": sorted(self._done)}

    def restore(self, record: dict[str, Any]) -> list[int]:
        """Go back to what was applied at a snapshot: what is in anybody's hands won't count. Returns those leases' numbers.

        Raises ValueError for items of another size.
        """
        if record["item"] != self.plan.item:
            raise ValueError(f"items of {record['item']} tasks are no items of {self.plan.item}")
        gone = [*self._out, *(g.lease for g in self._queue)]
        self._low, self._done = int(record["low"]), set(record["done"])
        self._before, self.published = next(self._leases), False
        self._restart()
        return gone
