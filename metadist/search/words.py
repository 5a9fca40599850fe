"""The report of a search for people: one table of proxies, then what follows from it in sentences."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

CEILING, BLIND = "another seed, in full", "a blind guess"
WIDTH, FEW = 120, 10
COSTS = "Seconds and images a candidate with a score: all seeds of a proxy, one full training."


def text(report: Mapping[str, Any]) -> str:
    """Lines of at most about 120 characters. report: as of ``metadist.search.report.make``, or that read from its JSON."""
    blocks = [_head(report), _proxies(report)]
    if report["judged"]:
        blocks += [_differences(report), _payoff(report)]
    blocks += [_halving(report), _best(report), _failures(report)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _head(report: Mapping[str, Any]) -> list[str]:
    shown = ", ".join(f"{k}={v}" for k, v in report["settings"].items())
    lines = [f"Architecture search: {report['space']} on {report['data']}, {report['count']} candidates"]
    full, lost = report["full"], report["truth_failed"]
    if report["judged"]:
        seeds = "" if full is None or full["seeds"] == 1 else f", mean of {full['seeds']} trainings"
        without = f"; without one and left out: {lost}" if lost else ""
        guesses = (
            f"; {report['diverged']} diverged: such a training counts as a network that guesses" if report["diverged"] else ""
        )
        lines += textwrap.wrap(f"Truth: test accuracy after full training{seeds}{without}{guesses}.", WIDTH)
    elif lost:
        lines.append("Full training of every candidate failed: how well the proxies rank is not known here.")
    else:
        lines.append("No truth was asked for: how well the proxies rank is not known here.")
    lines += [line for remark in report["remarks"] for line in textwrap.wrap(remark, WIDTH)]
    return [*lines, *(textwrap.wrap(shown, WIDTH, initial_indent="  ", subsequent_indent="  ") if shown else [])]


def _proxies(report: Mapping[str, Any]) -> list[str]:
    """A row a proxy; below, what stands beside them: the ceiling and a guess."""
    costs = ("seconds", "images", "failed")
    rows: list[tuple[str, ...]]
    if not report["judged"]:
        rows = [(way, *_costs(p), str(p["failed"])) for way, p in report["proxies"].items()]
        return [*_aligned([("proxy", *costs), *rows, *_full_row(report, 0)]), COSTS]
    budgets = list(report["blind"]["regret"])
    rows = [(way, *_quality(p, budgets), *_costs(p), str(p["failed"])) for way, p in report["proxies"].items()]
    rows += _full_row(report, len(budgets))
    rows.append((BLIND, "-", "-", "-", *_regrets(report["blind"], budgets), "-", "-", "-"))
    header = ("proxy", "Spearman", "top half", "tau-b", *(f"@{b}" for b in budgets), *costs)
    return [*_aligned([header, *rows]), *textwrap.wrap(_notes(report), WIDTH)]


def _notes(report: Mapping[str, Any]) -> str:
    """What the columns and the last rows mean."""
    notes = [
        "Correlation with truth [95 % bootstrap interval over candidates]; top half: among the better half by truth.",
        "@B: points of accuracy that the pick among B random candidates lacks to the best of them.",
        COSTS,
        "Candidates that failed rank last." if any(p["failed"] for p in report["proxies"].values()) else "",
        f"Intervals of {report['judged']} candidates say little." if report["judged"] < FEW else "",
        "There is no ceiling: full training has one seed."
        if report["ceiling"] is None
        else f"{CEILING.capitalize()}: the ceiling, two single trainings of {report['ceiling']['n']} candidates against each "
        "other; a low one, as proxies are held against the mean of seeds, which is less noisy.",
    ]
    return " ".join(note for note in notes if note)


def _full_row(report: Mapping[str, Any], budgets: int) -> list[tuple[str, ...]]:
    ceiling, full = report["ceiling"], report["full"]
    if ceiling is None and full is None:
        return []
    lost = str(report["truth_failed"]) if report["judged"] else "-"
    costs = ("-", "-") if full is None else _costs(full)
    if not report["judged"]:
        return [("full training", *costs, lost)]
    if ceiling is None:
        return [("full training", *("-",) * (3 + budgets), *costs, lost)]
    return [(CEILING, *_quality(ceiling, list(ceiling["regret"])), *("-",) * (budgets - len(ceiling["regret"])), *costs, lost)]


def _quality(found: Mapping[str, Any], budgets: Sequence[str]) -> tuple[str, ...]:
    return (*(_estimate(found[k]) for k in ("spearman", "top_half", "kendall")), *_regrets(found, budgets))


def _regrets(found: Mapping[str, Any], budgets: Sequence[str]) -> list[str]:
    return [f"{found['regret'][b]:.2f}" if b in found["regret"] else "-" for b in budgets]


def _costs(found: Mapping[str, Any]) -> tuple[str, str]:
    return ("-" if found["seconds"] is None else f"{found['seconds']:.3g}",
            "-" if found["images"] is None else f"{found['images']:,.0f}")  # fmt: skip


def _estimate(e: Mapping[str, Any], sign: str = "") -> str:
    """`0.81 [0.70, 0.88]`."""
    if e["value"] is None:
        return "-"
    return f"{e['value']:{sign}.2f}" + (f" [{e['low']:.2f}, {e['high']:.2f}]" if e["low"] is not None else "")


def _differences(report: Mapping[str, Any]) -> list[str]:
    rows = [(d["first"], "-", d["second"], _estimate(d, "+"), _verdict(d)) for d in report["differences"]]
    if not rows:
        return []
    return ["Spearman of one proxy less that of another, on the same candidates:", *_aligned(rows, left=3, header=False)]


def _verdict(d: Mapping[str, Any]) -> str:
    if d["low"] is None:
        return "undefined"
    return "better" if d["low"] > 0 else "worse" if d["high"] < 0 else "not told apart"


def _payoff(report: Mapping[str, Any]) -> list[str]:
    p = report["payoff"]
    if p is None:
        return []
    if p["candidates"] is None:
        return textwrap.wrap(f"Pay-off of the distilled set: none to be named, as {p['reason']}.", WIDTH)
    where = f" ({p['where']})" if p["where"] else ""
    rounds = " with its share of the rounds of halving" if report["halving"] else ""
    line = (
        f"Pay-off: the set cost {_seconds(p['set_seconds'])}{where}, a candidate costs {p['proxy_seconds']:.3g} s by it{rounds}"
        f" and {p['full_seconds']:.3g} s in full: {p['ratio']:.1f} candidates pay for the set. With {p['best']} trained in "
        f"full at the end, a search is cheaper than full training of all from {p['candidates']} candidates on that can be "
        f"trained; this one has {report['trained']}. Equal-cost training on real images has no set to pay for: against it only "
        "the ranking counts."
    )
    return textwrap.wrap(line, WIDTH)


def _seconds(s: float) -> str:
    return f"{s:.3g} s" if s < 120 else f"{s / 60:.3g} min" if s < 7200 else f"{s / 3600:.3g} h"


def _halving(report: Mapping[str, Any]) -> list[str]:
    h = report["halving"]
    if h is None:
        return []
    rows = [("rung", "candidates", "images", "seconds", "failed")]
    rows += [(r["way"], str(r["candidates"]), f"{r['images']:,}", f"{r['seconds']:.3g}", str(r["failed"])) for r in h["rungs"]]
    pick = f"It picks {h['pick']}" if h["pick"] else "It picks nothing: all failed"
    judged = "" if h["truth"] is None else f", truth {100 * h['truth']:.2f} %, regret {h['regret']:.2f} points"
    made = "the set's, which is not known" if h["set_seconds"] is None else f"the set's {_seconds(h['set_seconds'])}"
    cost = f"Cost: {h['images']:,} images in {_seconds(h['seconds'])}, and {made}"
    if (full := report["full"]) and full["images"] and full["seconds"]:
        images, seconds = (report["trained"] * full[k] for k in ("images", "seconds"))
        cost += f"; full training of all once: {images:,.0f} in {_seconds(seconds)}"
    return ["Successive halving:", *_aligned(rows), *textwrap.wrap(f"{pick}{judged}. {cost}.", WIDTH)]


def _best(report: Mapping[str, Any]) -> list[str]:
    """Every proxy's best with its score and, where known, its truth; columns that say nothing are left out."""
    rows = [("proxy", "score", "truth %", "truth's rank", "retrained %", "architecture")]
    for way, found in report["best"].items():
        for i, b in enumerate(found):
            score = f"{b['score']:.4g}" if way in report["free"] else _percent(b["score"])
            rank = "-" if b["truth_rank"] is None else f"{b['truth_rank']} of {report['judged']}"
            rows.append((way if i == 0 else "", score, _percent(b["truth"]), rank, _percent(b["retrained"]), b["key"]))
    if len(rows) == 1:
        return []
    shown = [j for j in range(len(rows[0])) if any(row[j] != "-" for row in rows[1:])]
    lines = _aligned([tuple(row[j] for j in shown) for row in rows], last_left=True)
    return [f"The best {report['best_of']} by each proxy:", *lines]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _failures(report: Mapping[str, Any]) -> list[str]:
    """A line a reason: who failed and by which ways; one that felled all candidates by a way names none."""
    counts = Counter((f["reason"], way) for f in report["failures"] for way in f["ways"])
    general = {found for found, times in counts.items() if times == report["count"] > 1}
    lines = [f"  all {report['count']} candidates: {reason} ({way})" for reason, way in counts if (reason, way) in general]
    alike: dict[tuple[str, str], list[str]] = {}
    for f in report["failures"]:
        if ways := ", ".join(way for way in f["ways"] if (f["reason"], way) not in general):
            alike.setdefault((f["reason"], ways), []).append(f["key"])
    for (reason, ways), keys in alike.items():
        if len(keys) == 1:
            lines.append(f"  {keys[0]}: {reason} ({ways})")
        else:
            names = textwrap.wrap(", ".join(keys), WIDTH - 4, break_on_hyphens=False)
            lines += [f"  {len(keys)} candidates: {reason} ({ways})", *(f"    {name}" for name in names)]
    return ["Failed:", *lines] if lines else []


def _aligned(rows: Sequence[Sequence[str]], left: int = 1, header: bool = True, last_left: bool = False) -> list[str]:
    """Columns, the first ones lean left, the others right; a rule under the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lean = [j < left or (last_left and j == len(widths) - 1) for j in range(len(widths))]
    lines = [
        "  ".join(c.ljust(w) if a else c.rjust(w) for c, w, a in zip(row, widths, lean, strict=True)).rstrip() for row in rows
    ]
    rule = "  ".join("-" * w for w in widths)
    return [lines[0], rule, *lines[1:]] if header else lines
