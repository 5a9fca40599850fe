"""`launch/compare.py`: a table of runs under one budget, on digits in smoke mode; and its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from metadist.run import compare
from metadist.run.guard import guarded

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["smoke=true", "data=digits", "data.size=8", "threads=1", "device=cpu", "engine.compile=off", "eval.nets=2"]


def program(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | more
    command = [sys.executable, str(ROOT / "launch" / "compare.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_three_gradients_make_a_table_a_picture_and_a_record_and_are_not_repeated(tmp_path: Path) -> None:
    place = tmp_path / "compared"
    words = ["preset=gtn_three_gradients", *WORDS, f"out={place}", f"cache_dir={tmp_path / 'cache'}"]
    done = program(words)
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "comparison.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert list(rows) == ["unrolled", "implicit", "matching"]
    for name, row in rows.items():
        summary = json.loads((place / name / "summary.json").read_text())
        assert row["steps"] == summary["steps"] == 3 and row["test"] == summary["test"] and row["test"]["n"] == 2
        minutes = [minute for minute, _ in row["valid_accuracy"]]
        assert minutes == sorted(minutes) and 0 < minutes[-1] < 5 and row["step_s"] > 0
        assert [step for step, _ in row["valid_accuracy"]] and len(row["meta_loss"]) >= 2
        assert list(row["memory"]) == ["8", "16"] and min(row["memory"].values()) > 1e5
    assert f"{100 * rows['implicit']['test']['mean']:.2f} +- " in done.stdout and "MB at 16" in done.stdout
    with Image.open(place / "comparison.png") as image:
        assert image.size[0] > 2 * image.size[1]

    stamps = {path: path.stat().st_mtime_ns for path in place.glob("*/summary.json")}
    again = program([*words, "json=true"])
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert json.loads(again.stdout[again.stdout.index("\n[\n") :]) == record["rows"]

    other = program([*words, "seed=3"])
    assert other.returncode == 2 and other.stderr.count("\n") == 1 and "a comparison of other settings" in other.stderr


WRONG = {
    "steps=3": "usage: python launch/compare.py preset=<gtn_curricula|gtn_three_gradients",
    "preset=gtn_curricula steps=3": "steps is set by the comparison",
    "preset=mtt_kd seed=3": "seed is set by the comparison: it runs with seeds 0, 1, 2; leave it out",
    "preset=gtn_curricula smoke=yes": "smoke=yes is unknown",
    "preset=gtn_curricula budget_min=nan": "budget_min=nan is no number of minutes",
    "preset=gtn_two": "preset=gtn_two is unknown (did you mean gtn_",
    "preset=gtn_curricula meta.lr=-1": "gtn_curricula, full: meta.lr=-1.0 is out of range",
    "preset=gtn_curricula budget_min=long": "budget_min=long is no number of minutes",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_is_one_line_before_any_work(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(compare.main, [*wrong.split(), f"out={tmp_path / 'x'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and WRONG[wrong].split(" (")[0] in err
    assert not (tmp_path / "x").exists()


def test_every_comparison_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name in compare.comparisons():
        for smoke in ("false", "true"):
            found, place, _ = compare.read([f"preset={name}", f"smoke={smoke}"])
            assert len(found.runs) >= 2 and found.curve in ("valid_accuracy", "meta_loss") and place.name.startswith(name)
    assert compare.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in compare.comparisons())


def test_of_several_words_for_a_key_the_last_counts() -> None:
    assert compare._last("a=1", "b=2", "a=3") == ("a=3", "b=2")


def test_runs_of_one_cost_get_the_steps_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, lengths = iter((2.0, 5.0, 2.0, 5.0)), []
    monkeypatch.setattr(compare, "probe", lambda words: {"step_s": next(seconds), "bytes": 0})
    monkeypatch.setattr(compare, "run_child", lambda job, forward: lengths.append(job.words[-2]) or 0)
    for name, longer in (("gtn_weight_norm", "steps=300"), ("gtn_three_gradients", "steps=120")):
        found, _, _ = compare.read([f"preset={name}", "budget_min=10"])
        two = dataclasses.replace(found, runs=dict(list(found.runs.items())[:2]), memory_steps=())
        assert compare.run_all(two, tmp_path / name, compare.Record(tmp_path / name / "comparison.json"))
        assert lengths[-2:] == ["steps=300", longer]


def test_seeds_repeat_a_run_at_the_steps_of_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, commands = iter((1.0, 2.0)), []
    monkeypatch.setattr(compare, "probe", lambda words: {"step_s": next(seconds), "bytes": 0})
    monkeypatch.setattr(compare, "run_child", lambda job, forward: commands.append(job.words) or 0)
    found, _, _ = compare.read(["preset=mtt_kd", "budget_min=10"])
    names = list(found.runs)
    assert names == [f"{method}, seed {seed}" for method in ("mtt", "mtt_kd") for seed in (0, 1, 2)]
    assert compare.run_all(found, tmp_path, compare.Record(tmp_path / "comparison.json"))
    for seed, words in zip((0, 1, 2, 0, 1, 2), commands, strict=True):
        assert f"seed={seed}" in words
    assert [words[-2] for words in commands] == ["steps=600"] * 3 + ["steps=300"] * 3
    assert len({words[-1] for words in commands}) == 6 and compare.folder(tmp_path, names[0]).name == "mtt-seed-0"


def test_over_seeds_a_run_has_a_mean_and_a_deviation() -> None:
    values = {"mtt, seed 0": 0.30, "mtt, seed 1": 0.32, "mtt, seed 2": 0.34, "alone": 0.5}
    rows = [{"name": name, "test": {"mean": value}} for name, value in values.items()]
    assert compare.over_seeds(rows) == ["mtt: 32.00 +- 2.00 over 3 seeds"]
