"""`launch/compare.py`: a table of runs under one budget, on digits in smoke mode; and its refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare_cases import CHAIN
from PIL import Image

from metadist.evaluate import statistics
from metadist.run import command, compare, compare_networks, compare_set
from metadist.run.guard import guarded
from metadist.run.sweep import Job

ROOT = Path(__file__).resolve().parents[1]
WORDS = ["smoke=true", "data=digits", "data.size=8", "threads=1", "device=cpu", "engine.compile=off", "eval.nets=2"]


def program(words: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"} | more
    command = [sys.executable, str(ROOT / "launch" / "compare.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
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
    "steps=3": "usage: python launch/compare.py preset=<early_stop|early_stop_cifar100|gtn_curricula",
    "preset=hinton steps=3": "steps is set by the comparison",
    "preset=takd smoke=yes": "smoke=yes is unknown",
    "preset=gtn_curricula steps=3": "steps is set by the comparison",
    "preset=mtt_kd seed=3": "seed is set by the comparison: it runs with seeds 0, 1, 2; leave it out",
    "preset=gtn_curricula smoke=yes": "smoke=yes is unknown",
    "preset=gtn_curricula budget_min=nan": "budget_min=nan is no number of minutes",
    "preset=takd net.depth=4": "net.depth differs between the runs of takd",
    "preset=hinton +data.fraction=0.1": "data.fraction differs between the runs of hinton",
    "preset=hinton paths=[[3,2]]": "paths is for comparisons of chains; hinton has none",
    "preset=takd paths=[[4],[2]]": "paths=[[4],[2]] is no list of chains",
    "preset=takd paths=[": "paths=[ is no list of chains",
    "preset=takd paths=[[8,2]]": "takd, 10-2 with the steps of 10-6-4-2: @10 is no run above it",
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


@pytest.mark.slow
def test_every_comparison_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    for name in compare.comparisons():
        if compare_set.is_networks(name):
            continue
        for smoke in ("false", "true"):
            found, place, _ = compare.read([f"preset={name}", f"smoke={smoke}"])
            assert len(found.runs) >= 2 and found.curve in ("valid_accuracy", "meta_loss") and place.name.startswith(name)
    assert compare.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in compare.comparisons())


def test_of_several_words_for_a_key_the_last_counts() -> None:
    assert compare.last("a=1", "b=2", "a=3") == ("a=3", "b=2")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in compare.comparisons() if compare_set.is_networks(n)])
def test_every_comparison_of_networks_can_be_run(name: str) -> None:
    found, place, _ = compare_set.read([f"preset={name}", "smoke=true"])
    rows = {row.name: row for row in found.rows}
    assert len(rows) == len(found.rows) >= 3 and place.name.startswith(name)
    named = {*found.paper, *found.gaps, *(g.removesuffix(" together") for gap in found.gaps.values() for g in gap)}
    assert named <= set(rows)
    for row in found.rows:
        assert bool(row.needs) == any("kd.teachers=[" in w or ("data.path=" in w and "mnist-100" not in w) for w in row.words)
        assert all(any(str(compare.folder(place, need)) in word for word in row.words) for need in row.needs)


def test_chains_are_given_by_a_list_and_words_for_all_are_told_from_what_is_compared() -> None:
    found, place, _ = compare_set.read(["preset=takd", "paths=[[10,8,2],[10,2]]", "net.width=4", "data.root=/a/me@site"])
    rows = {row.name: row for row in found.rows}
    assert [name for name in rows if name.startswith("10-") and "with" not in name] == ["10-8", "10-8-2", "10-2"]
    assert rows["10-8-2"].needs == ("10-8",) and rows["10-8-2"].config.kd.teachers == [str(place / "10-8")]
    assert {row.config.net.width for row in found.rows} == {4} and rows["10"].config.data.root == "/a/me@site"


def test_the_part_recovered_is_known_as_well_as_the_gap() -> None:
    alone, student, teacher = [170.0, 180.0, 175.0], [120.0, 130.0, 110.0], [100.0]
    found = statistics.recovered(alone, student, teacher)
    assert found is not None and found.mean == pytest.approx(55 / 75)
    d = torch.tensor(alone, dtype=torch.float64) * (1 - 55 / 75) - torch.tensor(student, dtype=torch.float64)
    half = 4.302653 * float(d.std()) / 3**0.5 / 75  # of Student's t for two degrees of freedom
    assert found.ci95 == pytest.approx(half, rel=1e-6)
    drawn = statistics.recovered(alone, student, [90.0, 110.0])
    assert drawn is not None and drawn.mean == found.mean
    more = 4.302653 * 55 / 75 * (200 / 2) ** 0.5 / 75  # the teacher's: variance 200, two of them
    assert drawn.ci95 == pytest.approx((half**2 + more**2) ** 0.5, rel=1e-6)
    assert statistics.recovered(alone, student, [200.0]) is None
    single = statistics.recovered([10.0], [7.0], [4.0])
    assert single is not None and (single.mean, single.ci95) == (0.5, None)


def test_the_interval_of_the_part_recovered_covers() -> None:
    generator = torch.Generator().manual_seed(0)
    hit = 0
    for _ in range(1000):
        alone, student = (torch.randn(5, generator=generator, dtype=torch.float64) * 7 + m for m in (175, 120))
        found = statistics.recovered(alone.tolist(), student.tolist(), [99.0])
        assert found is not None and found.ci95 is not None
        hit += abs(found.mean - 55 / 76) <= found.ci95
    assert 0.93 < hit / 1000 < 0.97


def test_gaps_of_a_single_network_are_left_out() -> None:
    found = compare_set.Set("x", "x", (), {}, {"b": ["a", "a together"], "c": ["a", "b"]}, {})
    rows = [{"name": n, "errors": [e], "together": None} for n, e in (("a", 10), ("b", 4), ("c", 7))]
    gaps = compare_networks.recovered(found, rows)
    assert list(gaps) == ["c"] and gaps["c"]["mean"] == 0.5 and gaps["c"]["of"] == ["a", "b"]


@pytest.mark.slow
def test_a_chain_is_run_in_order_once_with_its_gap_and_its_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "chain.yaml").write_text(CHAIN)
    started: list[str] = []

    def here(job: Job, forward: object) -> int:
        started.append(Path(job.run_dir).name)
        return command.main(job.words)

    monkeypatch.setattr(compare_set, "config_dir", lambda: tmp_path)
    monkeypatch.setattr(compare_networks, "run_child", here)
    words = ["preset=chain", f"out={tmp_path / 'out'}"]
    assert compare_networks.main(words) == 0
    assert started == ["alone", "32", "32-4", "32-8", "32-8-4", "longer"]
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert {n: r["all_steps"] for n, r in rows.items()} == {
        "alone": 100, "32": 100, "32-4": 200, "32-8": 200, "32-8-4": 300, "longer": 300,
    }  # fmt: skip
    summary = json.loads((tmp_path / "out" / "32-8-4" / "summary.json").read_text())
    assert summary["teachers"][0]["path"] == str(tmp_path / "out" / "32-8")
    assert rows["32-8-4"]["errors"] == summary["errors"] and len(summary["errors"]) == 3
    gap = record["gaps"]["32-4"]
    mean = {n: sum(r["errors"]) / 3 for n, r in rows.items()}
    assert gap["mean"] == pytest.approx((mean["alone"] - mean["32-4"]) / (mean["alone"] - mean["32"])) and gap["ci95"] > 0
    out = capsys.readouterr().out
    assert "32-4: recovers" in out and "12 %" in out and (tmp_path / "out" / "comparison.png").stat().st_size > 5000
    assert compare_networks.main([*words, "json=true"]) == 0 and len(started) == 6  # nothing is repeated
    assert guarded(compare_networks.main, [*words, "seed=3"]) == 2


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
