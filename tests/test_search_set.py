"""What a search knows of its distilled set beside the images: what making it cost, what it was learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_helpers import TINY

from metadist.config import Config
from metadist.run import command, search_command
from metadist.run.search_set import check_split, cost, remark
from metadist.synthetic.distilled import load


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


# --- what it was learned from -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned from all but three tenths of digits, and its file alone."""
    folder = tmp_path_factory.mktemp("set") / "x"
    assert command.main([*TINY, "steps=1", "eval.report=false", "data.validation=.3", f"run_dir={folder}"]) == 0
    return folder


SPACE = ["data=digits", "width=4", "candidates=2", "proxy=distilled", "truth=none", "best=1", "seeds=1", "epochs=1"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "made with data.validation=0.3, this search has data.validation=0.1: the set may"),
        (["data.validation=.3", "data.split_seed=4"], "made with data.split_seed=0, this search has data.split_seed=4: the"),
        (["data.fraction=.5"], "data.validation=0.3 data.fraction=1.0, this search has data.validation=0.1 data.fraction=0.5"),
    ],
)
def test_a_set_of_another_split_is_refused(
    words: list[str], said: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in (made, made / "distilled.safetensors"):
        assert search_command.main([*SPACE, *words, f"set={given}", "device=cpu", f"out={tmp_path / 'o'}"]) == 2
        err = capsys.readouterr().err
        assert said in err and "learned from images that judge the proxies; give data." in err and err.count("\n") == 1


def test_the_same_split_is_taken_and_an_unknown_one_is_named(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert search_command.main([*SPACE, "data.validation=.3", f"set={made}", "device=cpu", f"out={tmp_path / 'o'}"]) == 0
    assert "doesn't say" not in capsys.readouterr().out
    assert search_command.main([*SPACE, "set=digits-10", "device=cpu", f"out={tmp_path / 'p'}"]) == 0
    said = capsys.readouterr().out
    assert "The set doesn't say which images it was learned from: those that judge the proxies may be among them" in said


def test_a_set_of_other_data_has_seen_none_of_these(made: Path) -> None:
    dset = load(made)
    assert dset.manifest["split"] == {"validation": 0.3, "split_seed": 0, "fraction": 1.0, "exclude": []}
    other = Config()
    other.data.name, other.search.set = "usps", str(made)
    check_split(other, dset)
    assert remark(other) is None
