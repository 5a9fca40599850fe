"""What a search says: how well every proxy ranks, what it costs, what its best are worth. `make` gives numbers, `text` words.

Design choices
- A proxy's score is its mean over seeds. A candidate that a proxy failed on, or did not measure, ranks last for that proxy and
  is counted: a proxy may not leave out what it cannot do. A candidate that can't be trained in full has no place to be compared
  with: it is left out of every comparison and counted. One that diverges in full is a network that guesses, and stays.
- The proxies are held against the mean of the truth's seeds. The ceiling, one seed of full training against another, is held
  against a single seed, which is noisier: it is a low ceiling, and a good proxy may touch it. Its top half is the better half
  by what stands for the truth, as a proxy's is, for each of the two in turn: chosen by both, it would hide what they agree on.
- Seconds and images of a proxy are those of all its seeds, because the ranking stands on all of them; those of full training
  are of one training, because a search in practice trains once. Both are means over candidates that gave a score, and the
  pay-off counts such candidates alone: who can't be trained costs neither way.
- The report is plain JSON: whatever is undefined is None. Without truth it holds the ranking and the best of each proxy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from metadist.config_search import FREE
from metadist.search import regret
from metadist.search.correlation import Estimate, difference, estimate, kendall, spearman, top_half
from metadist.search.table import RETRAINED, Outcome, Table
from metadist.search.words import text

__all__ = ["make", "text"]

MISSING = "not measured"


def make(table: Table) -> dict[str, Any]:
    """The whole report, ready for JSON; accuracies are fractions, regrets points of accuracy, undefined figures None."""
    scores = {way: _scores(table.keys, table.ways[way]) for way in table.proxies}
    if table.rungs:
        scores["halving"] = _scores(table.keys, table.ways[table.rungs[-1]])
    truth = {k: o.mean for k in table.keys if (o := table.truth.get(k)) is not None and not math.isnan(o.mean)}
    judged = [k for k in table.keys if k in truth]
    y = [truth[k] for k in judged]
    full = _full(table)
    first = "distilled" if "distilled" in table.proxies else next(iter(table.proxies), None)
    cost = {way: _cost(table.keys, table.ways[way]) for way in table.proxies}
    trained = len(judged) if table.truth else sum(v > -math.inf for v in scores.get(first or "", {}).values())
    made: dict[str, Any] = _plain({
        "space": table.space, "data": table.data, "settings": dict(table.settings),
        "remarks": list(table.remarks),
        "count": len(table.keys), "judged": len(judged), "trained": trained,
        "truth_failed": len(table.keys) - len(judged) if table.truth else 0,
        "diverged": sum(table.truth[k].diverged for k in judged),
        "first": first, "best_of": table.best, "full": full,
        "candidates": [_candidate(k, truth, scores, table) for k in table.keys],
        "free": [way for way in table.proxies if way in FREE],
        "proxies": {way: cost[way] | _quality([scores[way][k] for k in judged], y) for way in table.proxies},
        "blind": {"regret": regret.regrets([0.0] * len(y), y)},
        "ceiling": _ceiling([table.truth[k] for k in judged]),
        "differences": _differences(first, {w: [scores[w][k] for k in judged] for w in table.proxies}, y),
        "payoff": None if first != "distilled" else regret.payoff(
            table.set_seconds, table.set_where, _searched(table, cost[first]["seconds"], trained),
            None if full is None else full["seconds"], table.best,
        ).as_dict(),
        "best": {way: _best(found, truth, table) for way, found in scores.items()},
        "halving": _halving(table, first, scores.get("halving", {}), truth),
        "failures": _failures(table),
    })  # fmt: skip
    return made


def _scores(keys: Sequence[str], found: Mapping[str, Outcome]) -> dict[str, float]:
    """Mean score of every candidate, -inf where there is none."""
    means = {k: found[k].mean if k in found else math.nan for k in keys}
    return {k: -math.inf if math.isnan(v) else v for k, v in means.items()}


def _candidate(key: str, truth: Mapping[str, float], scores: Mapping[str, Mapping[str, float]], table: Table) -> dict[str, Any]:
    seeds = list(table.truth[key].scores) if key in truth else []
    mine = {way: scores[way][key] for way in table.proxies}
    return {"key": key, "truth": truth.get(key), "truth_seeds": seeds, "scores": mine}


def _top(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """Spearman of scores x with truth y over the better half by truth."""
    top = top_half(y)
    return estimate(spearman, [x[i] for i in top], [y[i] for i in top])


def _mean(one: Estimate, other: Estimate) -> Estimate:
    """Of figures of the same candidates; its interval is a little wide, as the mean varies no more than they do."""
    return Estimate(*((a + b) / 2 for a, b in zip(astuple(one), astuple(other), strict=True)))


def _quality(x: Sequence[float], y: Sequence[float]) -> dict[str, Any]:
    """How well scores x rank candidates of truth y."""
    return {
        "spearman": estimate(spearman, x, y).as_dict(),
        "top_half": _top(x, y).as_dict(),
        "kendall": estimate(kendall, x, y).as_dict(),
        "regret": regret.regrets(x, y),
    }


def _cost(keys: Sequence[str], found: Mapping[str, Outcome]) -> dict[str, Any]:
    """Seconds and images a candidate with a score, by one way, all its seeds; how many candidates failed.

    One that can't be built costs nothing, by a proxy or in full: the mean over all would make the proxy look cheaper.
    """
    scored = [o for o in found.values() if o.reason is None]
    return {
        "seconds": sum(o.seconds for o in scored) / len(scored) if scored else None,
        "images": sum(o.images for o in scored) / len(scored) if scored else None,
        "seeds": max((len(o.scores) for o in scored), default=0),
        "failed": sum(k not in found or found[k].reason is not None for k in keys),
    }


def _searched(table: Table, proxy: float | None, trained: int) -> float | None:
    """Seconds a candidate before the best are trained in full: by the proxy, and its share of the rounds of halving."""
    rounds = sum(o.seconds for way in table.rungs for o in table.ways[way].values())
    return proxy + rounds / trained if proxy is not None and trained else proxy


def _full(table: Table) -> dict[str, Any] | None:
    """Seconds and images of one full training, of the truth or else of those retrained; None where neither was measured."""
    found = [o for o in (table.truth or table.ways.get(RETRAINED, {})).values() if o.reason is None]
    trained = sum(len(o.scores) for o in found)
    if not trained:
        return None
    seconds, images = sum(o.seconds for o in found) / trained, sum(o.images for o in found) / trained
    return {"seconds": seconds or None, "images": images or None, "seeds": max(len(o.scores) for o in found)}


def _ceiling(found: Sequence[Outcome]) -> dict[str, Any] | None:
    """The second seed of full training against the first, each once the proxy and once the truth; None without two seeds."""
    twice = [o.scores for o in found if len(o.scores) > 1]
    if len(twice) < 2:
        return None
    a, b = [s[0] for s in twice], [s[1] for s in twice]
    there, back = regret.regrets(a, b), regret.regrets(b, a)
    return {
        "n": len(twice),
        "spearman": estimate(spearman, a, b).as_dict(),
        "top_half": _mean(_top(a, b), _top(b, a)).as_dict(),
        "kendall": estimate(kendall, a, b).as_dict(),
        "regret": {budget: (there[budget] + back[budget]) / 2 for budget in there},
    }


def _differences(first: str | None, scores: Mapping[str, Sequence[float]], y: Sequence[float]) -> list[dict[str, Any]]:
    """Spearman of the first proxy less that of every other, paired."""
    if first is None or not y:
        return []
    found: dict[str, Estimate] = {w: difference(scores[first], scores[w], y) for w in scores if w != first}
    return [{"first": first, "second": way} | e.as_dict() for way, e in found.items()]


def _best(found: Mapping[str, float], truth: Mapping[str, float], table: Table) -> list[dict[str, Any]]:
    """The best k by one proxy; of equals those drawn first, of those without a score none."""
    retrained = table.ways.get(RETRAINED, {})
    ordered = [k for k in sorted(found, key=lambda k: -found[k]) if found[k] > -math.inf]
    return [
        {
            "key": k,
            "score": found[k],
            "truth": truth.get(k),
            "truth_rank": 1 + sum(v > truth[k] for v in truth.values()) if k in truth else None,
            "retrained": retrained[k].mean if k in retrained else None,
        }
        for k in ordered[: table.best]
    ]


def _halving(table: Table, first: str | None, last: Mapping[str, float], truth: Mapping[str, float]) -> dict[str, Any] | None:
    """The rungs of successive halving, its pick and what it cost; None for a random search."""
    if not table.rungs or first is None:
        return None
    rungs = []
    for way in (first, *table.rungs):
        found = table.ways[way].values()
        spent = {"images": sum(o.images for o in found), "seconds": sum(o.seconds for o in found)}
        rungs.append({"way": way, "candidates": len(found), "failed": sum(o.reason is not None for o in found)} | spent)
    pick = max(last, key=lambda k: last[k])
    pick_truth = truth.get(pick) if last[pick] > -math.inf else None
    return {
        "rungs": rungs,
        "pick": pick if last[pick] > -math.inf else None,
        "truth": pick_truth,
        "regret": None if pick_truth is None else 100 * (max(truth.values()) - pick_truth),
        "images": sum(r["images"] for r in rungs),
        "seconds": sum(r["seconds"] for r in rungs),
        "set_seconds": table.set_seconds,
    }


def _failures(table: Table) -> list[dict[str, Any]]:
    """Every candidate that failed or diverged, by reason, with the ways it did so in."""
    found: dict[tuple[str, str], list[str]] = {}
    for key in table.keys:
        for way, outcomes in {"truth": table.truth, **table.ways}.items():
            expected = way in table.proxies or (way == "truth" and bool(table.truth))
            reason = outcomes[key].failed or outcomes[key].reason if key in outcomes else MISSING if expected else None
            if reason is not None:
                found.setdefault((key, reason), []).append(way)
    return [{"key": key, "reason": reason, "ways": ways} for (key, reason), ways in found.items()]


def _plain(value: Any) -> Any:
    """The same with None for every float that is not finite."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
