"""metadist.search: rank correlations against scipy, exact regret against enumeration, and what the report says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from metadist.search import correlation, picture, regret, report
from metadist.search.correlation import difference, estimate, kendall, resamples, spearman, top_half
from metadist.search.table import Outcome, Table

Values = NDArray[np.float64]
INF = math.inf


def by_scipy(x: Values, y: Values) -> tuple[float, float]:
    """Spearman and Kendall's tau-b of one sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant samples and gives nan
        ranks = scipy.stats.rankdata(x), scipy.stats.rankdata(y)
        return float(scipy.stats.spearmanr(*ranks).statistic), float(scipy.stats.kendalltau(*ranks).statistic)


def one(x: Values, y: Values) -> tuple[float, float]:
    weights = np.ones((1, len(x)), dtype=np.int64)
    return float(spearman(x, y, weights)[0]), float(kendall(x, y, weights)[0])


# ---------------------------------------------------------------- correlation


@pytest.mark.parametrize("n", [2, 3, 4, 5, 17, 64])
@pytest.mark.parametrize("values", [2, 3, 1000])
def test_correlations_are_those_of_scipy_with_and_without_ties(n: int, values: int) -> None:
    generator = np.random.default_rng(n * values)
    for _ in range(20):
        x, y = generator.integers(0, values, (2, n)).astype(np.float64)
        x[x == 0] = -INF  # failed candidates
        np.testing.assert_allclose(one(x, y), by_scipy(x, y), atol=1e-12)


@pytest.mark.parametrize("n", [3, 4, 40])
def test_a_weighted_row_is_the_resample_itself(n: int) -> None:
    generator = np.random.default_rng(n)
    x, y = generator.integers(0, n, (2, n)).astype(np.float64)
    weights = resamples(n, 60)
    drawn = [np.repeat(np.arange(n), row) for row in weights]
    expected = np.array([by_scipy(x[i], y[i]) for i in drawn]).T
    assert np.isnan(expected).any() == (n < 5)  # small resamples are often constant
    np.testing.assert_allclose((spearman(x, y, weights), kendall(x, y, weights)), expected, atol=1e-12)


def test_known_answers() -> None:
    x = np.arange(5.0)
    assert one(x, np.array([2.0, 1, 4, 3, 5])) == pytest.approx((1 - 6 * 4 / (5 * 24), (8 - 2) / 10))
    assert one(np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 2, 3]))[1] == pytest.approx(4 / 5)  # two ties, on either side
    assert one(x, -x) == pytest.approx((-1, -1))


def test_many_pairs_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    whole = one(x, y)
    monkeypatch.setattr(correlation, "_BLOCK", 7)
    assert one(x, y) == whole


@pytest.mark.parametrize("statistic", [spearman, kendall])
def test_what_has_no_order_gives_nan(statistic: correlation.Statistic) -> None:
    for x, y in (([], []), ([1], [2]), ([3, 3, 3], [1, 2, 3]), ([1, 2, 3], [0, 0, 0]), ([1, math.nan, 3], [1, 2, 3])):
        found = estimate(statistic, x, y)
        assert all(math.isnan(v) for v in (found.value, found.low, found.high))
        assert found.as_dict() == {"value": None, "low": None, "high": None}
    pair = estimate(statistic, [1, 2], [5, 4])
    assert pair.value == -1 and math.isnan(pair.low)
    with pytest.raises(ValueError, match="same candidates"):
        estimate(statistic, [1, 2, 3], [1, 2])


def test_resamples_are_draws_with_replacement() -> None:
    weights = resamples(30, 3000)
    assert (weights.sum(1) == 30).all() and not weights.flags.writeable
    np.testing.assert_allclose(weights.mean(0), 1, atol=0.1)  # five deviations of the mean of 3000
    assert weights.var() == pytest.approx(1 - 1 / 30, abs=0.03)  # binomial
    assert len(np.unique(weights, axis=0)) == 3000
    assert (weights != resamples(30, 3000, seed=1)).any()


def test_the_interval_is_that_of_scipys_percentile_bootstrap() -> None:
    generator = np.random.default_rng(4)
    x = generator.normal(size=40)
    y = x + generator.normal(size=40)
    for statistic, column in ((spearman, 0), (kendall, 1)):
        mine = estimate(statistic, x, y)
        theirs = scipy.stats.bootstrap(
            (x, y), lambda a, b, c=column: by_scipy(a, b)[c], paired=True, vectorized=False, method="percentile",
            n_resamples=1000, rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
        assert mine.low < mine.value < mine.high
    assert estimate(spearman, np.exp(x), y) == estimate(spearman, x, y)  # order alone counts


def test_intervals_cover_the_true_correlation_nineteen_times_of_twenty() -> None:
    generator = np.random.default_rng(5)
    r = 0.7
    truth = {spearman: 6 / math.pi * math.asin(r / 2), kendall: 2 / math.pi * math.asin(r)}  # of normal pairs
    for statistic, true in truth.items():
        held = 0
        for _ in range(200):
            x, z = generator.normal(size=(2, 60))
            e = estimate(statistic, x, r * x + math.sqrt(1 - r * r) * z, count=500)
            held += e.low <= true <= e.high
        assert 0.89 <= held / 200 <= 0.985


def test_a_difference_is_paired() -> None:
    generator = np.random.default_rng(6)
    y = generator.normal(size=60)
    shared = y + generator.normal(size=60)
    good, bad = shared, shared + 0.5 * generator.normal(size=60)
    d, first, second = difference(good, bad, y), estimate(spearman, good, y), estimate(spearman, bad, y)
    assert d.value == pytest.approx(first.value - second.value, abs=1e-12)
    assert d.low < d.value < d.high
    # Proxies that err alike are told apart better than two separate intervals would.
    assert d.high - d.low < 0.7 * math.hypot(first.high - first.low, second.high - second.low)
    back = difference(bad, good, y)
    assert (back.value, back.low, back.high) == pytest.approx((-d.value, -d.high, -d.low))
    assert dataclasses.astuple(difference(good, good, y)) == (0, 0, 0)
    assert math.isnan(difference(good, np.zeros(60), y).value)


def test_the_top_half_is_the_better_one() -> None:
    assert top_half([0.1, 0.9, 0.5, 0.7, 0.2]).tolist() == [1, 3, 2]
    assert top_half([0.5, 0.5, 0.5, 0.4]).tolist() == [0, 1]
    assert top_half([]).tolist() == []


# -------------------------------------------------------------------- regret


def enumerated(scores: list[float], truth: list[float], budget: int) -> float:
    """Regret in points, over every draw; of equals each is as likely."""
    lost = []
    for drawn in itertools.combinations(range(len(truth)), budget):
        best = max(scores[i] for i in drawn)
        picks = [truth[i] for i in drawn if scores[i] == best]
        lost.append(max(truth[i] for i in drawn) - sum(picks) / len(picks))
    return 100 * sum(lost) / len(lost)


@pytest.mark.parametrize("scores", [[3, 1, 4, 1, 5, 9, 2], [1, 1, 2, 2, 2, 0, 1], [0] * 7, [-INF, -INF, 1, 2, -INF, 2, 3]])
def test_regret_is_that_of_every_draw(scores: list[float]) -> None:
    truth = [0.9, 0.5, 0.7, 0.7, 0.95, 0.2, 0.6]
    for budget in range(1, 8):
        assert regret.regret(scores, truth, budget) == pytest.approx(enumerated(scores, truth, budget), abs=1e-10)
        assert regret.regret(truth, truth, budget) == 0


def test_regret_of_many_candidates_is_that_of_sampled_draws() -> None:
    generator = np.random.default_rng(7)
    truth = generator.beta(8, 2, 200)
    scores = truth + 0.1 * generator.normal(size=200)
    drawn = np.argsort(generator.random((20000, 200)), axis=1)[:, :20]
    picks = np.take_along_axis(drawn, scores[drawn].argmax(1)[:, None], 1)[:, 0]
    lost = 100 * (truth[drawn].max(1) - truth[picks])
    assert regret.regret(scores, truth, 20) == pytest.approx(lost.mean(), abs=5 * lost.std() / math.sqrt(20000))


def test_budgets_are_no_more_than_there_are_candidates() -> None:
    assert regret.budgets(64) == (10, 20, 50, 64)
    assert regret.budgets(100) == (10, 20, 50, 100)
    assert regret.budgets(7) == (7,) and regret.budgets(0) == ()
    assert set(regret.regrets(list(range(12)), list(range(12)))) == {"10", "12"}
    for budget in (0, 4):
        with pytest.raises(ValueError, match="among 3"):
            regret.taken([1, 2, 3], [1, 2, 3], budget)


def test_the_pay_off_is_the_first_number_that_saves() -> None:
    p = regret.payoff(100.0, "on a laptop", 1.0, 11.0, 2)
    assert p.ratio == 10 and p.candidates == 13
    assert 100 + 13 * 1 + 2 * 11 < 13 * 11 and not 100 + 12 * 1 + 2 * 11 < 12 * 11
    assert regret.payoff(98.0, None, 1.0, 11.0, 2).candidates == 13  # 12 would be just as dear
    assert regret.payoff(0.0, None, 1.0, 11.0, 5).candidates == 6
    for seconds, reason in {
        (None, 1.0, 2.0): "cost is not known",
        (5.0, 1.0, None): "full training were not",
        (5.0, None, 1.0): "the proxy were not",
        (5.0, 2.0, 2.0): "no less by the proxy",
    }.items():
        cost, proxy, full = seconds
        p = regret.payoff(cost, None, proxy, full, 2)
        assert p.candidates is None and p.ratio is None and reason in str(p.reason)


# -------------------------------------------------------------------- report


def done(*scores: float, seconds: float = 1.0, images: int = 100) -> Outcome:
    return Outcome(scores, None, float(seconds), images)


def lost(reason: str) -> Outcome:
    return Outcome((), reason, 0.5, 30)


KEYS = tuple("abcdefghijkl")
TRUTH = (0.90, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995)


@pytest.fixture
def table() -> Table:
    """Twelve candidates, the last ones better; the truth of `a` failed, and three trainings of proxies."""
    truth = {k: done(t - 0.001, t + 0.001, seconds=40, images=8000) for k, t in zip(KEYS, TRUTH)}
    truth["a"] = lost("out of memory")
    order = {k: done(t - 0.3, t - 0.2, seconds=2, images=200) for k, t in zip(KEYS, TRUTH)}
    order["l"] = lost("not finite at step 3")
    backwards = {k: done(1 - t, seconds=2, images=200) for k, t in zip(KEYS, TRUTH)}
    backwards["l"], backwards["c"] = lost("not finite at step 3"), done(math.nan)
    del backwards["d"]
    ways = {"distilled": order, "random_real": backwards, "params": {k: done(7.0, images=0) for k in KEYS}}
    return Table("convnets", "digits", KEYS, truth, ways, 100.0, "by runs/x", 3, {"epochs": 10, "lr": 0.1}, ("A remark.",))


def without(table: Table, **changes: Any) -> dict[str, Any]:
    return report.make(dataclasses.replace(table, **changes))


def test_a_table_goes_through_json(table: Table) -> None:
    text = json.dumps(table.as_dict(), allow_nan=False)
    back = Table.of(json.loads(text))
    assert json.dumps(back.as_dict()) == text
    assert back.keys == table.keys and back.truth == table.truth and back.ways["distilled"] == table.ways["distilled"]
    assert back.ways["random_real"]["c"].reason == "its score is not finite"


def test_failures_rank_last_and_are_counted(table: Table) -> None:
    r = report.make(table)
    judged = KEYS[1:]
    scores = [-INF if k == "l" else t for k, t in zip(judged, TRUTH[1:])]
    expected = by_scipy(np.array(scores), np.array(TRUTH[1:]))
    found = r["proxies"]["distilled"]
    assert (found["spearman"]["value"], found["kendall"]["value"]) == pytest.approx(expected)
    top = by_scipy(np.array(scores[-6:]), np.array(TRUTH[-6:]))[0]
    assert found["top_half"]["value"] == pytest.approx(top)
    assert found["regret"]["11"] == pytest.approx(0.5) and list(found["regret"]) == ["10", "11"]  # takes k for l
    assert (r["count"], r["judged"], r["truth_failed"]) == (12, 11, 1)
    assert {way: p["failed"] for way, p in r["proxies"].items()} == {"distilled": 1, "random_real": 3, "params": 0}
    assert r["failures"] == [
        {"key": "a", "reason": "out of memory", "ways": ["truth"]},
        {"key": "c", "reason": "its score is not finite", "ways": ["random_real"]},
        {"key": "d", "reason": "not measured", "ways": ["random_real"]},
        {"key": "l", "reason": "not finite at step 3", "ways": ["distilled", "random_real"]},
    ]


def test_who_diverges_in_full_is_a_guess_and_no_proxys_excuse(table: Table) -> None:
    """The proxy likes l and k best: one diverges by both seeds, the other by one of them."""
    why = "its weights are not finite"
    truth = table.truth | {"l": Outcome((0.1, 0.1), why, 40, 8000), "k": Outcome((0.98, 0.1), why, 40, 8000)}
    likes = {k: done(t) for k, t in zip(KEYS, TRUTH)}
    r = without(table, truth=truth, ways={"distilled": likes})
    y = np.array([*TRUTH[1:-2], 0.54, 0.1])
    found = r["proxies"]["distilled"]
    assert found["spearman"]["value"] == pytest.approx(by_scipy(np.array(TRUTH[1:]), y)[0]) and found["failed"] == 0
    assert found["regret"]["11"] == pytest.approx(100 * (0.985 - 0.1))
    assert (r["judged"], r["truth_failed"], r["diverged"]) == (11, 1, 2)
    assert [f for f in r["failures"] if f["key"] in "kl"] == [{"key": k, "reason": why, "ways": ["truth"]} for k in "kl"]
    said = report.text(r)
    assert "left out: 1; 2 diverged: such a training counts as a network that guesses." in said.replace("\n", " ")
    assert "  2 candidates: its weights are not finite (truth)\n    k, l" in said
    back = Table.of(json.loads(json.dumps(dataclasses.replace(table, truth=truth).as_dict())))
    assert back.truth == truth and back.truth["k"].diverged and not back.truth["a"].diverged


def test_costs_are_a_candidates(table: Table) -> None:
    r = report.make(table)
    assert r["full"] == {"seconds": 20, "images": 4000, "seeds": 2}  # one training
    found = r["proxies"]["distilled"]
    assert (found["seconds"], found["images"], found["failed"]) == (2, 200, 1)  # of the eleven that gave a score
    assert r["payoff"]["candidates"] == math.floor((100 + 3 * 20) / (20 - 2)) + 1
    assert "this one has 11" in report.text(r).replace("\n", " ")
    free = without(table, truth={k: Outcome(o.scores, o.failed, 0.0, 0) for k, o in table.truth.items()})
    assert free["full"]["seconds"] is None and "full training were not measured" in report.text(free)
    unknown = without(table, set_seconds=None)
    assert unknown["payoff"]["candidates"] is None and "distilled set cost is not known" in report.text(unknown)


def test_who_can_not_be_trained_makes_no_proxy_cheaper(table: Table) -> None:
    """The same eleven candidates, with a hundred beside that can't be built: the same costs and the same pay-off."""
    small = {f"small-{i}": Outcome((), "too small", 0.0, 0) for i in range(100)}
    lean = without(table, keys=KEYS[1:])
    ways = {way: {**found, **small} for way, found in table.ways.items()}
    wide = without(table, keys=(*KEYS[1:], *small), truth={**table.truth, **small}, ways=ways)
    assert wide["payoff"] == lean["payoff"] and wide["full"] == lean["full"] and wide["trained"] == lean["trained"] == 11
    costs = [{k: r["proxies"]["distilled"][k] for k in ("seconds", "images", "seeds")} for r in (lean, wide)]
    assert costs[0] == costs[1] == {"seconds": 2, "images": 200, "seeds": 2}
    untold = without(table, truth={}, keys=(*KEYS, *small), ways=ways)
    assert untold["trained"] == 11  # of distilled, without l and the small ones
    nobody = without(table, ways={"distilled": small}, keys=tuple(small), truth={})
    assert nobody["proxies"]["distilled"]["seconds"] is None and "None" not in report.text(nobody)


def test_the_ceiling_is_one_seed_against_another(table: Table) -> None:
    generator = np.random.default_rng(9)
    pairs = generator.normal(0.9, 0.02, (12, 1)) + generator.normal(0, 0.01, (12, 2))
    truth = {k: done(*map(float, pair)) for k, pair in zip(KEYS, pairs)}
    found = without(table, truth=truth)["ceiling"]
    assert found["spearman"]["value"] == pytest.approx(by_scipy(pairs[:, 0], pairs[:, 1])[0])
    halves = [pairs[np.argsort(-pairs[:, j])[:6]] for j in (0, 1)]  # the better half by either, as if it was the truth
    rho = [by_scipy(half[:, 0], half[:, 1])[0] for half in halves]
    by_both = pairs[np.argsort(-pairs.mean(1))[:6]]
    assert rho[0] != pytest.approx(rho[1]) and by_scipy(by_both[:, 0], by_both[:, 1])[0] != pytest.approx(sum(rho) / 2)
    assert found["top_half"]["value"] == pytest.approx(sum(rho) / 2)
    assert found["top_half"]["low"] < found["top_half"]["value"] < found["top_half"]["high"]
    a, b = pairs.T.tolist()
    assert found["regret"]["10"] == pytest.approx((enumerated(a, b, 10) + enumerated(b, a, 10)) / 2, abs=1e-9)
    single = without(table, truth={k: done(float(p[0])) for k, p in zip(KEYS, pairs)})
    assert single["ceiling"] is None and "full training has one seed" in report.text(single).replace("\n", " ")


def test_differences_stand_on_the_same_candidates(table: Table) -> None:
    r = report.make(table)
    assert [(d["first"], d["second"]) for d in r["differences"]] == [("distilled", "random_real"), ("distilled", "params")]
    d = r["differences"][0]
    assert d["value"] == pytest.approx(
        r["proxies"]["distilled"]["spearman"]["value"] - r["proxies"]["random_real"]["spearman"]["value"]
    )
    assert 0 < d["low"] < d["value"] < d["high"] and r["differences"][1]["value"] is None
    assert "better" in report.text(r) and "undefined" in report.text(r)


def test_the_best_are_listed_with_their_truth(table: Table) -> None:
    r = report.make(table)
    assert [b["key"] for b in r["best"]["distilled"]] == ["k", "j", "i"]
    assert r["best"]["distilled"][0] == {"key": "k", "score": pytest.approx(0.74), "truth": pytest.approx(0.99),
                                         "truth_rank": 2, "retrained": None}  # fmt: skip
    assert [b["key"] for b in r["best"]["params"]] == ["a", "b", "c"]  # equals: in drawn order
    assert r["best"]["params"][0]["truth"] is None
    nothing = without(table, ways={"distilled": {k: lost("out of memory") for k in KEYS}})
    assert nothing["best"]["distilled"] == []
    assert "all 12 candidates: out of memory (distilled)" in report.text(nothing)


def test_the_text_names_every_proxy_and_failure(table: Table) -> None:
    r = report.make(table)
    text = report.text(json.loads(json.dumps(r, allow_nan=False)))
    assert text == report.text(r)
    lines = text.splitlines()
    row = next(line for line in lines if line.startswith("distilled "))
    e = r["proxies"]["distilled"]["spearman"]
    assert f"{e['value']:.2f} [{e['low']:.2f}, {e['high']:.2f}]" in row and " 0.50 " in row and row.endswith(" 1")
    for way in (*table.proxies, "another seed, in full", "a blind guess"):
        assert any(line.startswith(way + " ") for line in lines), way
    for failed in r["failures"]:
        assert f"  {failed['key']}: {failed['reason']} ({', '.join(failed['ways'])})" in lines
    assert "A remark." in lines
    assert "nan" not in text and "None" not in text and max(map(len, lines)) < 150


def test_who_fails_alike_shares_a_line(table: Table) -> None:
    found = table.ways["distilled"] | {k: lost("too small") for k in "bcd"}
    lines = report.text(without(table, truth={}, ways={"distilled": found})).splitlines()
    assert lines[lines.index("Failed:") + 1 :] == [
        "  3 candidates: too small (distilled)",
        "    b, c, d",
        "  l: not finite at step 3 (distilled)",
    ]


def test_without_truth_there_is_a_ranking(table: Table) -> None:
    retrained = {"k": done(0.97, 0.99, seconds=40, images=8000), "j": lost("out of memory")}
    r = without(table, truth={}, ways={**table.ways, "retrained": retrained})
    assert r["judged"] == 0 and r["ceiling"] is None and r["full"] == {"seconds": 20, "images": 4000, "seeds": 2}
    assert "retrained" not in r["proxies"] and r["proxies"]["distilled"]["spearman"]["value"] is None
    assert [b["retrained"] for b in r["best"]["distilled"]] == [pytest.approx(0.98), None, None]
    assert {"key": "j", "reason": "out of memory", "ways": ["retrained"]} in r["failures"]
    text = report.text(json.loads(json.dumps(r, allow_nan=False)))
    assert "No truth was asked for" in text and "98.00" in text and "Spearman" not in text


def test_halving_tells_its_rungs_its_pick_and_its_cost(table: Table) -> None:
    rungs = {"halving-10": {"j": done(0.9, images=900)}, "halving-2": {k: done(0.8, images=400) for k in "ijk"}}
    found = without(table, ways={**table.ways, **rungs})
    h = found["halving"]
    assert [(x["way"], x["candidates"]) for x in h["rungs"]] == [("distilled", 12), ("halving-2", 3), ("halving-10", 1)]
    assert h["images"] == 11 * 200 + 30 + 3 * 400 + 900
    assert h["pick"] == "j" and h["truth"] == pytest.approx(0.985) and h["regret"] == pytest.approx(1.0)
    assert [b["key"] for b in found["best"]["halving"]] == ["j"] and "halving-2" not in found["proxies"]
    said = report.text(found).replace("\n", " ")
    assert "It picks j, truth 98.50 %, regret 1.00 points" in said
    # 11 x 2 + .5 s by the set, 3 and 1 s of the rounds, 100 s of the set; eleven trainings in full of 20 s.
    assert h["seconds"] == 26.5
    assert "Cost: 4,330 images in 26.5 s, and the set's 100 s" in said
    assert "full training of all once: 44,000 in 3.67 min" in said
    each = 2 + 4 / 11
    assert found["payoff"]["proxy_seconds"] == pytest.approx(each) and "share of the rounds of halving" in said
    assert found["payoff"]["candidates"] == math.floor((100 + 3 * 20) / (20 - each)) + 1
    unknown = without(table, ways={**table.ways, **rungs}, set_seconds=None)
    assert "and the set's, which is not known" in report.text(unknown).replace("\n", " ")


@pytest.mark.parametrize("case", ["whole", "no truth", "one", "free", "long names"])
def test_the_page_is_drawn(table: Table, case: str, tmp_path: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "whole": {},
        "no truth": {"truth": {}},
        "one": {"keys": KEYS[1:2]},
        "free": {"truth": {}, "ways": {"params": table.ways["params"]}},
        "long names": {"keys": ("b", "|nor_conv_3x3~0|+" * 5)},
    }
    picture.save(tmp_path / "report.png", json.loads(json.dumps(without(table, **changes[case]))))
    data = (tmp_path / "report.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(data[16:20], "big")
    assert width == 1690 if case in ("whole", "one", "long names") else width < 1000
