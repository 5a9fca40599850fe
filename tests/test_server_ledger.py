"""The parameter server's bookkeeping as pure logic: the ledger of items, the parts of an evaluation, the roster of workers."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter

import pytest

from metadist.exchange.ledger import Gradient, Lease, Ledger, Plan


def plan(**other: int) -> Plan:
    sizes = {"total": 40, "tasks": 4, "item": 1, "batch": 4, "max_staleness": 0, "queue": 64}
    return Plan(**(sizes | other))


def served(**other: int) -> Ledger:
    ledger = Ledger(plan(**other))
    ledger.publish()
    return ledger


def all_leases(ledger: Ledger) -> list[Lease]:
    return list(iter(ledger.issue, None))


def accept(ledger: Ledger, leases: list[Lease]) -> None:
    assert [ledger.push(lease.number, lease.item) for lease in leases] == ["accepted"] * len(leases)


@pytest.mark.parametrize(("item", "wanted"), [(1, 4), (2, 2), (4, 1)])
def test_without_staleness_a_version_hands_out_its_tasks_and_nothing_more_until_the_next(item: int, wanted: int) -> None:
    ledger = Ledger(plan(item=item, total=40 // item))
    assert ledger.issue() is None
    assert ledger.publish() == 0
    for version in range(3):
        leases = all_leases(ledger)
        assert [lease.item for lease in leases] == list(range(version * wanted, (version + 1) * wanted))
        assert {lease.base for lease in leases} == {version}
        accept(ledger, leases[:-1])
        assert ledger.issue() is None and ledger.take() == []
        accept(ledger, leases[-1:])
        assert ledger.issue() is None
        assert len(ledger.take()) == wanted
        assert ledger.issue() is None
        assert ledger.publish() == version + 1


def test_an_item_has_the_same_draws_however_many_tasks_an_update_takes() -> None:
    sizes = plan(tasks=6, item=2, batch=4, total=9)
    assert [sizes.where(k) for k in range(5)] == [(0, 0), (0, 2), (0, 4), (1, 0), (1, 2)]
    assert plan(tasks=3, item=1).where(32) == (10, 2)


def test_with_staleness_as_many_more_versions_of_tasks_go_out_and_not_one_task_more() -> None:
    ledger = served(max_staleness=2)
    first = all_leases(ledger)
    assert [lease.item for lease in first] == list(range(12))
    accept(ledger, first[:4])
    assert ledger.issue() is None
    ledger.take()
    assert ledger.issue() is None
    ledger.publish()
    assert [lease.item for lease in all_leases(ledger)] == [12, 13, 14, 15]


def test_lost_and_stale_items_keep_their_number_and_go_out_first() -> None:
    ledger = served(max_staleness=1)
    leases = all_leases(ledger)
    ledger.give_back(leases[5].number)
    ledger.give_back(leases[2].number, "refused")
    again = [ledger.issue(), ledger.issue()]
    assert [(lease.item, lease.number) for lease in again if lease] == [(2, 9), (5, 10)]
    assert ledger.push(leases[2].number, None) == "duplicate"
    for _ in range(2):
        accept(ledger, [lease for lease in again if lease and lease.number in ledger._out][:1])
        ledger.take(late=True)
        ledger.publish()
    assert ledger.push(leases[0].number, None) == "stale"
    assert (ledger.issue() or leases[1]).item == 0
    assert ledger.counts == {"lost": 1, "refused": 1, "duplicate": 1, "accepted": 2, "stale": 1}


def test_an_update_takes_what_came_first_and_sums_it_by_number() -> None:
    ledger = served(max_staleness=3)
    leases = all_leases(ledger)
    accept(ledger, [leases[k] for k in (9, 2, 7, 4, 0, 1)])
    assert [g.item for g in ledger.take()] == [2, 4, 7, 9]
    assert (ledger.queued, ledger.waiting, ledger.done) == (2, 2, 4)
    assert ledger.take() == []
    assert [g.item for g in ledger.take(late=True)] == [0, 1]
    assert ledger.take(late=True) == []


def test_the_staleness_of_what_is_applied_is_counted() -> None:
    ledger = served(max_staleness=2)
    leases = all_leases(ledger)
    for at in (0, 4, 8):
        accept(ledger, leases[at : at + 4])
        ledger.take()
        ledger.publish()
    assert ledger.staleness == {0: 4, 1: 4, 2: 4}


def test_a_queue_that_is_full_stops_the_handing_out() -> None:
    ledger = served(max_staleness=9, queue=6)
    for _ in range(6):
        lease = ledger.issue()
        assert lease is not None
        accept(ledger, [lease])
    assert ledger.issue() is None and ledger.queued == 6
    ledger.take()
    assert ledger.issue() is not None


def test_beyond_a_full_queue_comes_only_what_was_out_when_it_filled() -> None:
    ledger = served(max_staleness=9, queue=6)
    out = [lease for lease in (ledger.issue() for _ in range(9)) if lease]
    accept(ledger, out[:6])
    assert ledger.issue() is None
    accept(ledger, out[6:])
    assert ledger.queued == 9 and ledger.issue() is None
    ledger.take()
    assert ledger.queued == 5 and ledger.issue() is not None


def test_the_last_update_of_a_run_takes_what_is_left() -> None:
    ledger = served(total=6)
    accept(ledger, all_leases(ledger))
    assert len(ledger.take()) == 4
    ledger.publish()
    leases = all_leases(ledger)
    assert [lease.item for lease in leases] == [4, 5]
    accept(ledger, leases)
    assert [g.item for g in ledger.take()] == [4, 5]
    ledger.publish()
    assert ledger.issue() is None and ledger.take() == [] and ledger.done == 6


def test_a_snapshot_goes_through_json_and_back() -> None:
    ledger = served(max_staleness=3, item=2, tasks=4, batch=4, total=20)
    leases = all_leases(ledger)
    accept(ledger, [leases[k] for k in (5, 0, 3, 2)])
    ledger.take()
    record = json.loads(json.dumps(ledger.snapshot()))
    assert record == {"item": 2, "low": 1, "done": [5]}
    other = Ledger(ledger.plan)
    assert other.restore(record) == [] and other.issue() is None
    other.publish()
    assert [lease.item for lease in all_leases(other)] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert sorted(ledger.restore(record)) == [2, 3, 4, 5, 7, 8]
    assert ledger.queued == 0 and ledger.push(leases[1].number, None) == "stale"
    with pytest.raises(ValueError, match="items of 3 tasks are no items of 2"):
        other.restore(record | {"item": 3})


class Naive:
    """The ledger's rules in sets and lists, with the history of what was applied."""

    def __init__(self, sizes: Plan) -> None:
        self.plan, self.made, self.version, self.published = sizes, 0, 0, False
        self.number = self.barrier = 0
        self.updates: list[list[int]] = []
        self.counts: Counter[str] = Counter()
        self.staleness: Counter[int] = Counter()
        self.restart()

    def restart(self) -> None:
        self.out: dict[int, tuple[int, int]] = {}
        self.queue: list[tuple[int, int, int]] = []
        self.given: set[int] = set()

    @property
    def applied(self) -> set[int]:
        return set(itertools.chain(*self.updates))

    def issue(self) -> tuple[int, int, int] | None:
        ahead = (len(self.out) + len(self.queue)) * self.plan.item // self.plan.batch
        if not self.published or len(self.queue) >= self.plan.queue:
            return None
        if self.made + ahead - self.version > self.plan.max_staleness:
            return None
        busy = self.applied | {i for i, _ in self.out.values()} | {i for i, _, _ in self.queue}
        free = [i for i in range(self.plan.total) if i not in busy]
        if not free:
            return None
        item = min([i for i in free if i in self.given] or free)
        self.given.add(item)
        self.number += 1
        self.out[self.number] = item, self.version
        return self.number, item, self.version

    def push(self, number: int) -> str:
        verdict = "stale" if number <= self.barrier else "duplicate"
        if number in self.out:
            item, base = self.out.pop(number)
            verdict = "accepted" if self.made - base <= self.plan.max_staleness else "stale"
            self.queue += [(item, base, number)] * (verdict == "accepted")
        self.counts[verdict] += 1
        return verdict

    def take(self, late: bool) -> list[int]:
        fresh = [g for g in self.queue if self.made - g[1] <= self.plan.max_staleness]
        self.counts.update(stale=len(self.queue) - len(fresh), accepted=len(fresh) - len(self.queue))
        self.queue = fresh
        wanted = self.plan.batch // self.plan.item
        if not fresh or (len(fresh) < min(wanted, self.plan.total - len(self.applied)) and not late):
            return []
        taken, self.queue = fresh[:wanted], fresh[wanted:]
        self.staleness.update(self.made - base for _, base, _ in taken)
        self.updates.append(sorted(i for i, _, _ in taken))
        self.made += 1
        return self.updates[-1]

    def untake(self, taken: list[Gradient]) -> None:
        self.made -= 1
        self.updates.pop()
        self.staleness.subtract(self.made - g.base for g in taken)
        self.counts.update(accepted=-len(taken), lost=len(taken))

    def recall(self) -> list[int]:
        gone = [number for _, _, number in self.queue]
        self.counts.update(accepted=-len(gone), lost=len(gone))
        self.queue = []
        return gone

    def restore(self, updates: list[list[int]]) -> set[int]:
        gone = {*self.out, *(number for _, _, number in self.queue)}
        self.number += 1
        self.barrier, self.published, self.updates = self.number, False, list(updates)
        self.restart()
        return gone


def a_random_life(seed: int, roll_backs: bool) -> tuple[Ledger, Naive]:
    """Both models through the same losses, deadlines, maybe roll-backs; then to the run's end."""
    rng = random.Random(seed)
    item, batch = rng.choice([(1, 4), (2, 4), (1, 3), (3, 6)])
    sizes = Plan(24 * batch // item, rng.choice([batch, 6]), item, batch, rng.randrange(4), rng.choice([batch, 64]))
    real, naive = Ledger(sizes), Naive(sizes)
    saved: list[tuple[str, list[list[int]]]] = []
    actions = ["issue"] * 8 + ["push"] * 7 + ["take"] * 4 + ["late", "lose", "again", "save", "recall"] + ["back"] * roll_backs
    for _ in range(900):
        act(rng.choice(actions), rng, real, naive, saved)
        assert (real.made, real.version, real.queued, real.done) == (
            naive.made, naive.version, len(naive.queue), len(naive.applied),
        )  # fmt: skip
    while real.done < sizes.total:
        for action in ("take", "issue", "push"):
            act(action, rng, real, naive, saved, calm=True)
    return real, naive


def act(
    action: str, rng: random.Random, real: Ledger, naive: Naive, saved: list[tuple[str, list[list[int]]]], calm: bool = False
) -> None:
    out = sorted(naive.out)
    if action == "issue":
        lease = real.issue()
        assert (None if lease is None else (lease.number, lease.item, lease.base)) == naive.issue()
    elif action == "push" and out:
        number = rng.choice(out) if calm or rng.random() < 0.9 else rng.randint(1, naive.number)
        assert real.push(number, number) == naive.push(number)
    elif action == "lose" and out:
        naive.counts["lost"] += naive.out.pop(number := rng.choice(out)) is not None
        real.give_back(number)
    elif action in ("take", "late", "again"):
        taken = real.take(late=action == "late")
        assert [g.item for g in taken] == naive.take(action == "late")
        assert all(real.made - 1 - g.base <= real.plan.max_staleness and g.content == g.lease for g in taken)
        if taken and action == "again":
            real.untake(taken)
            naive.untake(taken)
        elif taken or not real.published:
            naive.version, naive.published = naive.made, True
            assert real.publish() == naive.version
    elif action == "save":
        saved.append((json.dumps(real.snapshot()), list(naive.updates)))
    elif action == "recall":
        assert real.recall() == naive.recall()
    elif action == "back" and saved:
        record, updates = saved[rng.randrange(len(saved))]
        assert set(real.restore(json.loads(record))) == naive.restore(updates)


@pytest.mark.parametrize("roll_backs", [False, True])
def test_every_item_is_applied_exactly_once_whatever_happens(roll_backs: bool) -> None:
    for seed in range(16):
        real, naive = a_random_life(seed, roll_backs)
        assert sorted(itertools.chain(*naive.updates)) == list(range(real.plan.total)), seed
        assert +real.counts == +naive.counts and +real.staleness == +naive.staleness
        assert real.snapshot() == {"item": real.plan.item, "low": real.plan.total, "done": []}
        assert real.issue() is None and real.take(late=True) == []


def test_what_was_applied_beyond_a_gap_is_not_handed_out_when_the_gap_closes() -> None:
    ledger = Ledger(plan(total=4, batch=1, max_staleness=9))
    ledger.restore({"item": 1, "low": 0, "done": [1]})
    ledger.publish()
    first = ledger.issue()
    assert first is not None and first.item == 0
    accept(ledger, [first])
    assert [g.item for g in ledger.take()] == [0]
    ledger.publish()
    assert [lease.item for lease in all_leases(ledger)] == [2, 3]
