"""What a search knows of its distilled set beside the images: what making it cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_helpers import TINY

from metadist.run import command
from metadist.run.search_set import cost


def run_folder(place: Path, summary: dict[str, Any], method: dict[str, str] | None = None) -> str:
    place.mkdir()
    (place / "summary.json").write_text(json.dumps(summary))
    if method is not None:
        (place / "config.json").write_text(json.dumps({"method": method}))
    return str(place)


def test_a_set_costs_the_seconds_of_all_its_workers(tmp_path: Path) -> None:
    short = run_folder(tmp_path / "a", {"minutes": 0.0, "seconds": 0.21, "workers": 1})  # minutes would say nothing
    four = run_folder(tmp_path / "b", {"minutes": 0.57, "seconds": 34.4, "workers": 4})
    older = run_folder(tmp_path / "c", {"minutes": 0.57, "workers": 2})
    assert cost(short) == (0.21, f"by {short}")
    assert cost(four) == (pytest.approx(4 * 34.4), f"by {four}")
    assert cost(older) == (pytest.approx(2 * 0.57 * 60), f"by {older}")
    assert cost("digits-10") == cost(None) == cost(str(tmp_path)) == (None, None)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ({"gradient": "trajectory"}, "; its experts not counted"),
        ({"gradient": "unrolled"}, ""),
    ],
)
def test_experts_are_named_that_are_not_counted(method: dict[str, str], named: str, tmp_path: Path) -> None:
    given = run_folder(tmp_path / "a", {"seconds": 5.0, "workers": 1}, method)
    assert cost(given) == (5.0, f"by {given}{named}")


def test_a_run_records_its_seconds_unrounded(tmp_path: Path) -> None:
    assert command.main([*TINY, "steps=1", "eval.report=false", f"run_dir={tmp_path / 'x'}"]) == 0
    summary = json.loads((tmp_path / "x/summary.json").read_text())
    assert summary["seconds"] > 0 and round(summary["seconds"] / 60, 2) == summary["minutes"]
    assert cost(str(tmp_path / "x"))[0] == summary["seconds"]
