"""Architecture search: what each way of training costs and is, one task = many workers, killed and resumed, failures, words."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_helpers import Nursery, until
from slurm_programs import Programs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import metadist
from metadist import draw
from metadist.config import Config
from metadist.errors import UserError
from metadist.evaluate.train import accuracy, standard, statistics
from metadist.identity import identity_hash
from metadist.metagrad.inner import Inner
from metadist.metagrad.optimizers import Optimizer
from metadist.nets.loss import cross_entropy_loss
from metadist.run.attempts import Attempts
from metadist.run.compose import compose
from metadist.run.search import Search, Task
from metadist.run.search_command import judge, main, translated
from metadist.run.search_folder import configuration, open_folder, recipe
from metadist.run.search_job import KILLED, _do, marks, prepare
from metadist.run.search_results import Results
from metadist.search import free, training
from metadist.search.convnets import Convnets
from metadist.search.training import Measured, measure
from metadist.search.ways import Bench, cost, course, subset

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
PROGRAM = "metadist.run.search_command"
WORDS = ["set=digits-10", "data=digits", "width=4", "candidates=5", "seeds=2", "epochs=1", "device=cpu", "threads=1"]


def configured(*words: str) -> Config:
    every = {w.partition("=")[0]: w for w in [*WORDS, *words]}
    return compose(translated(list(every.values())), lambda config: None, judge)


def number(search: Search, key: str) -> int:
    """Of a candidate in the space."""
    return next(i for i in range(len(search.space)) if search.space.key(i) == key)


def results(folder: Path) -> dict[str, Any]:
    """All that was found, but for the time it took."""
    out = {}
    for path in folder.glob("results/*/*/*.json"):
        found = json.loads(path.read_text())
        found.pop("seconds")
        out[str(path.relative_to(folder))] = found
    return out


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return prepare(configured(), tmp_path)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search by one worker, in this process."""
    folder = tmp_path_factory.mktemp("alone") / "out"
    assert main([*WORDS, f"out={folder}"]) == 0
    return folder


# --- ways of training ---------------------------------------------------------------------------------------------------------


def test_every_proxy_that_trains_costs_what_the_set_does(bench: Bench) -> None:
    dset = metadist.load("digits-10")
    images = len(dset.order) * len(dset.images) // dset.steps
    assert images == 100
    assert {way: cost(bench, way) for way in ("distilled", "real_steps", "random_real", "coreset")} == dict.fromkeys(
        ("distilled", "real_steps", "random_real", "coreset"), images
    )
    assert cost(bench, "early_stop") == images  # of a batch of 128
    assert cost(bench, "truth") == len(bench.data.train)


@pytest.mark.parametrize(
    "words, images",
    [(["batch=512"], 100), (["batch=7"], 100), (["steps=1"], 10), (["batch=300", "steps=50"], 500), (["steps=900"], 1294)],
)
def test_the_start_of_full_training_costs_the_same_and_no_more_than_all_of_it(
    words: list[str], images: int, tmp_path: Path
) -> None:
    bench = prepare(configured(*words), tmp_path)
    assert cost(bench, "early_stop") == images <= cost(bench, "truth") == len(bench.data.train)


@pytest.mark.parametrize("words, images", [(["steps=25"], 250), (["steps=25", "set_lr=.1"], 250), (["steps=4"], 40)])
def test_steps_set_the_cost_of_all(words: list[str], images: int, tmp_path: Path) -> None:
    bench = prepare(configured(*words), tmp_path)
    assert {cost(bench, way) for way in ("distilled", "real_steps", "random_real", "coreset")} == {images}


def test_images_are_counted_as_they_are_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a loss that counts: full training has passes whose last batch is smaller, early stopping cuts its last batch."""
    space = Search(configured(), Path()).space
    seen: list[int] = []
    real = cross_entropy_loss

    def counting(*args: Any) -> Any:
        loss = real(*args)

        def counted(theta: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
            seen.append(len(batch[1]))
            return loss(theta, batch)

        return counted

    monkeypatch.setattr(training, "cross_entropy_loss", counting)
    for way in ("truth", "early_stop", "distilled", "real_steps", "random_real", "coreset"):
        seen.clear()
        ((_, found),) = measure(bench, space, way, 0, (0,), (0,))
        assert found.failed is None and sum(seen) == found.images == cost(bench, way), way


def test_recorded_training_is_the_sets_own(tmp_path: Path) -> None:
    """Against DistilledSet.replay on an ordinary module, from the same weights; more steps go round again."""
    config = configured("engine.dtype=float64")
    bench, search = prepare(config, tmp_path), Search(config, tmp_path)
    index = number(search, "d2-w8-instance-relu-avg")
    group = training._group(bench, search.space, (index,))
    theta0 = group.start(draw.key(0, "search cheap theta0", 0, torch.tensor([index])))
    theta, _, images = training._way(bench, group.learner, "distilled", 0, theta0, torch.zeros(1, 2, dtype=torch.int64))
    net = group.learner.module(theta0[0])
    metadist.load("digits-10").replay(net)
    assert (group.learner.flatten(net) - theta[0]).abs().max() < 1e-6 and images == 100
    longer = prepare(configured("engine.dtype=float64", "steps=20"), tmp_path)
    twice, _, _ = training._way(longer, group.learner, "distilled", 0, theta0, torch.zeros(1, 2, dtype=torch.int64))
    again, _, _ = training._way(bench, group.learner, "distilled", 0, theta, torch.zeros(1, 2, dtype=torch.int64))
    assert torch.equal(twice, again)


def test_early_stopping_is_the_beginning_of_full_training(tmp_path: Path) -> None:
    """By a plain loop: the rate of the beginning, though the schedule of so few steps would have fallen."""
    config = configured("epochs=4", "steps=60", "lr=.1", "batch=64", "engine.dtype=float64")
    bench, search = prepare(config, tmp_path), Search(config, tmp_path)
    c = course(bench, "early_stop", 0)
    each = -(-len(bench.data.train) // 64)
    assert (c.steps, c.images) == (4 * each, 600)
    group = training._group(bench, search.space, (number(search, "d2-w4-group-leaky-max"),))
    keys = draw.key(0, "k", 0, torch.tensor([3]))
    theta0 = group.learner.init(keys)
    theta, _, _ = training._way(bench, group.learner, "early_stop", 0, theta0, keys)
    rows = draw.permutation(draw.split(draw.split(keys, 0), 0), len(c.x))[0][:600].split(64)
    assert [len(batch) for batch in rows] == [64] * 9 + [24]
    own, velocity = theta0[0].clone(), torch.zeros_like(theta0[0])
    for batch in rows:
        own.requires_grad_()
        loss = cross_entropy(group.learner(own, c.x[batch]), c.y[batch]) + 0.5 * 0.0005 * own.square().sum()
        velocity = 0.9 * velocity + torch.autograd.grad(loss, own)[0]
        own = (own - 0.1 * velocity).detach()
    assert (own - theta[0]).abs().max() < 1e-10


def test_random_images_and_centroids_are_as_many_as_the_set_and_one_draw_for_all(bench: Bench) -> None:
    x, y = subset(bench, "random", 0)
    assert x.shape == bench.set.images[0].shape and sorted(y.tolist()) == list(range(10))
    rows = bench.data.train.x.flatten(1)
    hits = [(rows == image).all(1).nonzero()[0, 0] for image in x.flatten(1)]
    assert bench.data.train.y[torch.stack(hits)].tolist() == y.tolist()
    assert torch.equal(x, subset(bench, "random", 0)[0]) and not torch.equal(x, subset(bench, "random", 1)[0])
    centres, labels = subset(bench, "kmeans", 0)
    mean = bench.data.train.x[bench.data.train.y == 7].mean(0)
    assert (centres[labels == 7][0] - mean).abs().max() < 1e-5  # one centroid a class is its mean
    assert torch.equal(course(bench, "coreset", 0).x, centres) and torch.equal(course(bench, "random_real", 0).x, x)


def test_full_training_alone_is_judged_on_the_test_split(bench: Bench) -> None:
    assert all(bench.judge(way) is bench.data.test for way in ("truth", "retrained"))
    others = ("distilled", "real_steps", "early_stop", "random_real", "coreset", "halving-2")
    assert all(bench.judge(way) is bench.data.valid for way in others)


def test_a_step_without_vmap_takes_the_same_gradient() -> None:
    from metadist.nets.convnet import convnet
    from metadist.nets.learner import Learner

    learner = Learner(convnet(1, 8, 3, 4, 2, "batch"), dtype=torch.float64)
    keys = draw.key(0, "k", 0, torch.arange(2))
    x, y = draw.normal(draw.key(1, "x"), (50, 1, 8, 8), torch.float64), torch.arange(50) % 3
    found = []
    for alone in (False, True):
        inner = Inner(cross_entropy_loss(learner, 0.01), Optimizer("momentum"), shared=False, alone=alone)
        start, optimizer = learner.init(keys), Optimizer("momentum")
        found.append(standard(learner, start, x, y, epochs=3, optimizer=optimizer, lr=0.1, batch=20, keys=keys, inner=inner))
    assert (found[0] - found[1]).abs().max() < 1e-12 < (found[0] - learner.init(keys)).abs().max()


# --- failures -----------------------------------------------------------------------------------------------------------------


class Odd:
    """Candidates that fail in ways of their own, and some that do not."""

    name = "odd"
    keys = ("good", "small", "raises", "memory", "nan", "better")

    def __len__(self) -> int:
        return 6

    def key(self, index: int) -> str:
        return self.keys[index]

    def module(self, index: int, channels: int, size: int, classes: int) -> nn.Module:
        if index == 1:
            raise UserError(f"the net needs images of 99 pixels, these have {size}")
        if index == 2:
            raise KeyError("a fault\nof two lines")
        if index == 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte")
        net = nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, classes))
        return nn.Sequential(Exploding(), net) if index == 4 else net


class Exploding(nn.Module):
    """Its gradients are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sqrt(self.weight - self.weight + 0.0)


def test_who_fails_says_why_and_stops_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in WORDS if not w.startswith(("width", "candidates"))]
    words += ["space=test_search.Odd", "candidates=6", "proxy=distilled,random_real,params", f"out={tmp_path / 'o'}"]
    assert main(words) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    found = {r["architecture"]: r for k, r in results(tmp_path / "o").items() if k.startswith("results/distilled/")}
    assert found["small"]["failed"] == "the net needs images of 99 pixels, these have 8"
    assert found["nan"]["failed"] == training.NOT_FINITE and found["memory"]["failed"] == "out of memory"
    assert "a fault" in found["raises"]["failed"] and "\n" not in found["raises"]["failed"]
    assert found["good"]["failed"] is None and found["better"]["score"] > 0.2
    assert {k for k, r in found.items() if r["score"] is None} == {"small", "raises", "memory", "nan"}
    for key in ("small", "raises", "memory", "nan"):
        assert re.search(rf"\b{key}\b", said)
    assert "needs images of 99 pixels" in said
    full = {r["architecture"]: r for k, r in results(tmp_path / "o").items() if k.startswith("results/truth/")}
    assert {k for k, r in full.items() if r["score"] is None} == {"small", "raises", "memory"}
    # Who has trained such a network has one that guesses among ten classes.
    assert (full["nan"]["score"], full["nan"]["failed"]) == (0.1, training.NOT_FINITE)
    assert "left out: 3; 1 diverged: such a training counts as a network that guesses" in said.replace("\n", " ")
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert next(c for c in report["candidates"] if c["key"] == "nan")["truth_seeds"] == [0.1, 0.1]


def test_one_diverged_seed_is_one_guess_in_the_mean(tmp_path: Path) -> None:
    found = Results(tmp_path, Odd())
    seeds = (Measured(0.9, None, 1, 100), Measured(0.1, training.NOT_FINITE, 1, 100), Measured(None, "out of memory", 1, 0))
    for repeat, measured in enumerate(seeds):
        found.put("truth", repeat, 5, measured)
    both, all_three = found.outcome("truth", 5, 2), found.outcome("truth", 5, 3)
    assert (both.scores, both.mean, both.failed) == ((0.9, 0.1), 0.5, training.NOT_FINITE)
    assert (all_three.scores, all_three.failed) == ((), "out of memory")


def test_a_network_that_explodes_leaves_its_group_alone(tmp_path: Path) -> None:
    """Its weights are made infinite; those beside it come to the very numbers that they come to without it."""
    config = configured("steps=10", "set_lr=.1", "space=convnets", "candidates=0")
    bench, search = prepare(config, tmp_path), Search(config, tmp_path)
    words = ("sigmoid-max", "relu-avg", "leaky-avg")
    part = tuple(number(search, f"d2-w4-instance-{word}") for word in words)
    real = training._group

    def spoiled(bench: Bench, space: Any, indices: Any) -> Any:
        group = real(bench, space, indices)
        start = group.start
        object.__setattr__(group, "start", lambda keys: start(keys) * torch.tensor([1.0, torch.inf, 1.0])[:, None])
        return group

    whole = dict(measure(bench, search.space, "distilled", 0, part, part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_group", spoiled)
        found = dict(measure(bench, search.space, "distilled", 0, part, part))
    assert found[part[1]].failed == training.NOT_FINITE and whole[part[1]].failed is None
    assert [found[i].score for i in (part[0], part[2])] == [whole[i].score for i in (part[0], part[2])]


def test_a_group_without_memory_is_tried_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("candidates=0", "steps=10")
    bench, search = prepare(config, tmp_path), Search(config, tmp_path)
    part = tuple(number(search, f"d1-w4-none-{word}-max") for word in ("sigmoid", "relu", "leaky"))
    real, sizes = training._trained, []

    def short(bench: Bench, space: Any, way: str, repeat: int, indices: tuple[int, ...]) -> Any:
        sizes.append(len(indices))
        if len(indices) > 1 or indices[0] == part[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return real(bench, space, way, repeat, indices)

    monkeypatch.setattr(training, "_trained", short)
    found = dict(measure(bench, search.space, "distilled", 0, part, part))
    assert sizes == [len(part), *[1] * len(part)]
    assert found[part[0]].failed == "out of memory" and all(found[i].failed is None for i in part[1:])


@pytest.mark.parametrize("error", [SystemExit(3), KeyError("x")])
def test_a_module_that_exits_ends_no_search(error: BaseException, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(*_: object) -> nn.Module:
        raise error

    monkeypatch.setattr(Odd, "module", module)
    for way in ("distilled", "params"):
        ((_, found),) = measure(bench, Odd(), way, 0, (0,), (0,))
        assert found.score is None and str(found.failed).startswith(f"{type(error).__name__}: ")


KILLING = ["data=digits", "space=killing.Space", "candidates=3", "proxy=params", "truth=none", "best=1", "seeds=1", "epochs=1"]


def killer_has_failed(folder: Path, said: str) -> bool:
    """The others have their number of parameters; nobody is marked any more."""
    found = {r["architecture"]: (r["score"], r["failed"]) for k, r in results(folder).items() if "/params/" in k}
    assert found == {"number-0": (650, None), "number-1": (None, KILLED), "number-2": (650, None)}
    return f"number-1: {KILLED} (params)" in said and not list(folder.glob("queue/*.begun"))


def test_who_killed_alone_is_not_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark that two processes have left which were killed at the group, and one at this candidate."""
    words = [*KILLING, "device=cpu", f"out={tmp_path / 'o'}"]
    config = compose(translated(words), lambda config: None, judge)
    search = Search(config, tmp_path / "o")
    (task,) = search.tasks("params", search.candidates)
    (tmp_path / "o/queue").mkdir(parents=True)
    (tmp_path / f"o/queue/{task.name}.begun").write_text(json.dumps({"killed": 2, "part": 1}))
    assert len(task.indices) == 3 and main(words) == 0
    assert killer_has_failed(tmp_path / "o", capsys.readouterr().out)
    # By another seed it isn't tried, and the others do without it.
    again = Task("params", 1, task.indices)
    _do(search, prepare(config, tmp_path / "o"), again, lambda way: None, marks(tmp_path / "o"))
    assert not search.missing(again) and search.results.of("params", 1, 1).failed == KILLED


@pytest.mark.slow
def test_who_kills_its_process_has_failed_after_three_times(nursery: Nursery, tmp_path: Path) -> None:
    """Twice in its group, once alone."""
    words = [*KILLING, "device=cpu", f"out={tmp_path / 'o'}"]
    assert [nursery.start(words, tmp_path, program=PROGRAM).wait() for _ in range(3)] == [-signal.SIGKILL] * 3
    assert killer_has_failed(tmp_path / "o", nursery.run(words, tmp_path, program=PROGRAM).out)


def test_marks_are_of_processes_that_were_killed(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    with attempts.begun("a"):
        assert (Attempts(tmp_path).killed("a"), Attempts(tmp_path).suspect("a")) == (1, None)  # if it were killed now
    assert attempts.killed("a") == 0 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="orderly"), attempts.begun("a"):
        raise ValueError("orderly")
    assert not list(tmp_path.iterdir())
    killed = [Attempts(tmp_path).begun("a") for _ in range(2)]
    for times, one in enumerate(killed, 1):
        one.__enter__()  # and nothing after
        assert attempts.killed("a") == times
    left = Attempts(tmp_path)
    alone = left.begun("a", 7)
    alone.__enter__()
    assert (attempts.killed("a"), attempts.suspect("a")) == (2, 7)
    left.leave()  # by a signal
    assert (attempts.killed("a"), attempts.suspect("a")) == (2, None)
    with left.begun("b"):  # a thread that has not yet heard of it
        assert attempts.killed("b") == 0
    attempts.forget("a")
    assert attempts.killed("a") == 0


# --- a search -----------------------------------------------------------------------------------------------------------------


def test_a_search_finds_what_each_candidate_is_worth(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured()
    search = Search(config, alone)
    assert search.finished() and len(search.candidates) == 5
    # proxies by one seed, full training by two
    assert len(results(alone)) == 5 * (8 + 2)
    bench, index = prepare(config, alone), search.candidates[-1]
    group = training._group(bench, search.space, (index,))
    own, d = torch.tensor([index]), bench.data
    theta = standard(
        group.learner, group.start(draw.key(0, "search full theta0", 1, own)), d.train.x, d.train.y, epochs=1,
        optimizer=Optimizer("momentum"), lr=0.01, weight_decay=0.0005, batch=128, schedule="half",
        keys=draw.key(0, "search full order", 1, own),
    )  # fmt: skip
    buffers = statistics(group.learner, theta, d.train.x[:0].unsqueeze(0)) if not group.learner.buffers_size else None
    found = json.loads((alone / f"results/truth/1/{index:05d}.json").read_text())
    assert found["architecture"] == search.key(index) and found["images"] == len(d.train)
    if buffers is not None:
        assert abs(float(accuracy(group.learner, theta, buffers, d.test)) - found["score"]) < 0.01
    summary = json.loads((alone / "summary.json").read_text())
    assert summary["finished"] and (alone / "table.txt").read_text() == summary["text"] + "\n"
    assert all((alone / name).is_file() for name in ("report.json", "report.png", "search.json"))


def test_the_same_command_prints_it_again_and_computes_nothing(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in alone.rglob("*.json") if p.name != "search.json"}
    assert main([*WORDS, f"out={alone}"]) == 0
    text = json.loads((alone / "summary.json").read_text())["text"]
    assert capsys.readouterr().out == f"{text}\n{alone}\n"
    assert {p: p.stat().st_mtime_ns for p in alone.rglob("*.json") if p.name != "search.json"} == before
    assert main([*WORDS, f"out={alone}", "json=true"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((alone / "report.json").read_text())


def test_synflow_draws_its_weights_as_it_is_told(tmp_path: Path) -> None:
    space, scores = Convnets(4), set()
    for init in ("default", "xavier", "orthogonal"):
        ((_, found),) = measure(prepare(configured(f"init={init}"), tmp_path), space, "synflow", 0, (7,), (7,))
        assert found.score == free.score("synflow", space, 7, 1, 8, 10, 0, init)
        scores.add(found.score)
    assert len(scores) == 3


def test_who_is_added_is_grouped_apart_and_nobody_is_trained_again(tmp_path: Path) -> None:
    """Tasks that lack something lack all of it, as whole groups are trained; once opened, as well where a start was killed."""

    def opened(count: int) -> Search:
        config = configured(f"candidates={count}")
        open_folder(config, tmp_path, count)
        return Search(config, tmp_path)

    def tasks(search: Search) -> list[tuple[int, ...]]:
        return [t.indices for t in search.tasks("truth", search.candidates) if t.repeat == 0]

    few = opened(60)
    assert max(map(len, tasks(few))) > 1
    for part in tasks(few)[:-5]:  # killed before the last five
        for i in part:
            few.results.put("truth", 0, i, Measured(0.5, None, 1.0, 1))
    many = opened(120)
    lacking = {t.indices: many.missing(t) for t in many.tasks("truth", many.candidates) if t.repeat == 0}
    assert all(not lost or lost == list(part) for part, lost in lacking.items())
    assert tasks(few) == tasks(many)[: len(tasks(few))] and sum(map(len, tasks(many))) == 120
    assert tasks(opened(60)) == tasks(few) and tasks(opened(120)) == tasks(many) == tasks(
        Search(configured("candidates=120"), tmp_path)
    )


def test_more_is_added_to_what_is_there(tmp_path: Path) -> None:
    """Candidates, seeds and proxies: what was found stays, and is what a larger search from nothing finds."""
    small = ["proxy=params,distilled", "candidates=2", "seeds=1", "epochs=1"]
    large = ["proxy=distilled,params,random_real", "candidates=3", "seeds=2", "proxy_seeds=2", "draws=2"]
    for words, out in ((small, "a"), (large, "a"), (large, "b")):
        if (out, words) == ("a", large):
            first = {p: p.read_bytes() for p in (tmp_path / "a").glob("results/*/*/*")}
        every = {w.partition("=")[0]: w for w in [*WORDS, *words, f"out={tmp_path / out}"]}
        assert main(list(every.values())) == 0
    assert all(p.read_bytes() == kept for p, kept in first.items()) and len(first) == 2 * 3
    assert results(tmp_path / "a") == results(tmp_path / "b")
    assert len(results(tmp_path / "b")) == 3 * (2 + 2 + 1 + 4)


@pytest.mark.slow
def test_three_workers_find_what_one_does(nursery: Nursery, tmp_path: Path, alone: Path) -> None:
    nursery.run([*WORDS, f"out={tmp_path / 'o'}", "workers=3"], tmp_path, times=2, program=PROGRAM)
    assert results(tmp_path / "o") == results(alone)


def test_two_workers_find_what_one_does(nursery: Nursery, tmp_path: Path, alone: Path) -> None:
    """Also where nobody has said how many threads a worker has, as in ``alone`` somebody has."""
    words = [w for w in WORDS if not w.startswith(("seeds", "threads"))]
    proxy = "proxy=distilled,random_real,params"
    started = nursery.run([*words, "seeds=1", proxy, f"out={tmp_path / 'o'}", "workers=2"], tmp_path, program=PROGRAM)
    found, whole = results(tmp_path / "o"), results(alone)
    assert len(found) == 5 * 4 and found == {k: whole[k] for k in found} and "2 workers of 1 thread" in started.out


@pytest.mark.parametrize("words, threads", [(["workers=1"], 1), (["workers=2"], 1), (["threads=2"], 2)])
def test_the_first_start_says_how_many_threads_a_worker_has(words: list[str], threads: int, tmp_path: Path) -> None:
    """And no later one, however many workers it has: on one core or many, the numbers are the same."""
    plain = [w for w in WORDS if not w.startswith("threads")]

    def threads_of(*words: str) -> int:
        config = compose(translated([*plain, *words]), lambda config: None, judge)
        return open_folder(config, tmp_path / "o", 5).threads

    assert threads_of(*words) == threads_of() == threads_of("workers=3") == threads_of(f"threads={threads}") == threads
    assert configuration(tmp_path / "o").threads == threads
    with pytest.raises(UserError, match=rf"holds another search \(threads: {threads} -> 5; recorded -> given\)"):
        threads_of("threads=5")


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_killed_and_resumed_it_repeats_nothing(nursery: Nursery, tmp_path: Path, alone: Path, number: int, status: int) -> None:
    out, rng = tmp_path / "o", random.Random(0)
    started = nursery.start([*WORDS, f"out={out}"], tmp_path, program=PROGRAM)
    until(lambda: len(results(out)) >= 3, "a few results")
    time.sleep(rng.uniform(0, 0.2))
    started.kill(number)
    assert started.wait() == status and started.err == ""
    if status > 0:
        assert started.out.splitlines()[-1] == "stopped by SIGTERM; run the same command again to go on"
    kept = {p: p.stat().st_mtime_ns for p in out.glob("results/*/*/*.json")}
    assert 3 <= len(kept) < 50 and len(list(out.glob("queue/*.begun"))) <= (status < 0)
    nursery.run([*WORDS, f"out={out}"], tmp_path, program=PROGRAM)
    assert results(out) == results(alone)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())


# --- truth ------------------------------------------------------------------------------------------------------------------


def test_a_file_of_accuracies_is_the_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = Search(configured(), tmp_path).space
    known = {space.key(i): [0.5 + i / 2000, 0.51 + i / 2000] for i in (3, 40, 77, 100)}
    (tmp_path / "t.json").write_text(json.dumps(known))
    words = ["data=digits", "width=4", "candidates=4", "proxy=params,synflow", f"truth={tmp_path / 't.json'}"]
    assert main([*words, f"out={tmp_path / 'o'}", "device=cpu", "threads=1"]) == 0, capsys.readouterr().err
    assert {r["architecture"] for r in results(tmp_path / "o").values()} == set(known)
    assert not (tmp_path / "o/results/truth").exists()
    report = json.loads((tmp_path / "o/report.json").read_text())
    said = capsys.readouterr().out
    assert all(key in said for key in known) and report
    assert main([*words[:2], "candidates=5", *words[3:], f"out={tmp_path / 'p'}"]) == 2
    assert "candidates=5 is more than the 4 architectures of" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, line",
    [
        ("[1, 2]", "is not a JSON file of {architecture: accuracy or list of accuracies}"),
        ("{", "is not a JSON file of"),
        ("[" * 100000, "is not a JSON file of"),
        ("{}", "holds too few accuracies to compare (0); give those of 2"),
        ('{"d1-w4-none-relu-max": 0.5}', "holds too few accuracies to compare (1); give those of 2"),
        ('{"d1-w4-none-relu-max": 93.5, "d1-w4-none-relu-avg": 1}', "d1-w4-none-relu-max has [93.5]; accuracies are fractions"),
        ('{"d1-w4-none-relu-max": [], "d1-w4-none-relu-avg": 1}', "accuracies are fractions"),
        ('{"d1-w4-none-relu-max": true, "d1-w4-none-relu-avg": 1}', "d1-w4-none-relu-max has [True]; accuracies are fractions"),
        ('{"d1-w4-none-relu-max": "0.5", "d1-w4-none-relu-avg": 1}', "d1-w4-none-relu-max has ['0.5']; accuracies are"),
        (f'{{"d1-w4-none-relu-max": {10**400}, "d1-w4-none-relu-avg": 1}}', "d1-w4-none-relu-max has [1000"),
        ('{"d1-w4-none-relu-max": NaN, "d1-w4-none-relu-avg": 1}', "d1-w4-none-relu-max has [nan]; accuracies are"),
        ('{"d1-w4-none-relu-max": {"a": 1}, "d1-w4-none-relu-avg": 1}', "accuracies are fractions"),
        ('{"resnet": 0.5, "d1-w4-none-relu-avg": 1}', "'resnet' is no architecture of space=convnets; one is 'd1-w4-"),
    ],
    ids=range(13),
)
def test_a_wrong_file_of_accuracies(content: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.json").write_text(content)
    words = ["data=digits", "width=4", "candidates=0", "proxy=params", f"truth={tmp_path / 't.json'}", f"out={tmp_path / 'o'}"]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1, err


def test_without_a_truth_the_best_are_trained_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {w.partition("=")[0]: w for w in [*WORDS, "proxy=distilled,params", "truth=none", "best=2", "seeds=1"]}
    assert main([*words.values(), f"out={tmp_path / 'o'}"]) == 0
    found = results(tmp_path / "o")
    scores = {k.rpartition("/")[2]: -1 if r["failed"] else r["score"] for k, r in found.items() if "/distilled/" in k}
    names = [f"{i:05d}.json" for i in Search(configured(), tmp_path).candidates]  # of two alike, who was drawn first
    best = sorted(names, key=lambda k: -scores[k])[:2]
    assert {k.rpartition("/")[2] for k in found if "/retrained/" in k} == set(best) and not any("/truth/" in k for k in found)
    said = capsys.readouterr().out
    assert all(found[f"results/retrained/0/{name}"]["architecture"] in said for name in best)


def test_halving_keeps_the_best_and_trains_them_longer(tmp_path: Path) -> None:
    words = ["proxy=distilled", "truth=none", "halving=2", "best=1", "candidates=8", "seeds=1", "epochs=2"]
    every = {w.partition("=")[0]: w for w in [*WORDS, *words, f"out={tmp_path / 'o'}"]}
    assert main(list(every.values())) == 0
    found = results(tmp_path / "o")

    def rung(way: str) -> dict[str, Any]:
        return {k.rpartition("/")[2]: r for k, r in found.items() if k.startswith(f"results/{way}/")}

    before = rung("distilled")
    for way, size, images in (("halving-1", 4, 200), ("halving-2", 2, 400)):
        now = rung(way)
        assert len(now) == size and all(r["images"] == images for r in now.values() if not r["failed"])
        worst = min(-1 if before[k]["failed"] else before[k]["score"] for k in now)
        assert all(r["failed"] or r["score"] <= worst for k, r in before.items() if k not in now)
        before = now
    assert len(rung("retrained")) == 1 and set(rung("retrained")) < set(before)
    assert len(found) == 8 + 4 + 2 + 1


# --- words --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, line",
    [
        (["proxy=distiled"], "search.proxy=distiled is unknown; did you mean distilled?"),
        (["proxy=params,params"], "search.proxy names params twice"),
        (["proxy=[]"], "search.proxy=[] names no proxy"),
        (["set=null"], "proxy=distilled costs what training on a distilled set does: give set="),
        (["set=digits-11"], "distilled set=digits-11 is unknown; did you mean digits-10?"),
        (["set="], "set= names no distilled set"),
        (["set=mnist-100"], "the set was made for images of 1x28x28, data=digits has 1x8x8"),
        (["set=mnist-10", "data.size=28"], "set=mnist-10 was made for one initialization of lenet"),
        (["space=convnet"], "search.space=convnet is unknown; did you mean convnets?"),
        (["candidates=1"], "search.candidates=1 leaves nothing to compare"),
        (["candidates=721"], "candidates=721 is more than the 720 architectures of space=convnets"),
        (["candidates=many"], "search.candidates=many is not a whole number"),
        (["lr=0"], "search.lr=0.0 is out of range; allowed: above 0"),
        (["momentum=1"], "search.momentum=1.0 is out of range"),
        (["halving=1"], "search.halving=1 would drop nobody"),
        (["halving=2", "proxy=params"], "search.halving=2 begins with proxy=distilled"),
        (["halving=3", "candidates=9", "best=5"], "search.halving=3 keeps 3 of 9 candidates, no more than best=5: there would"),
        (["preset=mnist_random"], "preset=mnist_random is for python launch/local.py; it is nothing for launch/search.py"),
        (["preset=mnist_experts"], "preset=mnist_experts is for python launch/experts.py; it is nothing for launch/search.py"),
        (["seed=1,2"], "search.seed=1,2 lists several values: one is taken here; start once for each"),
        (["truth=test"], "search.truth=test is no file; allowed: train, none, or a JSON file"),
        (["coreset=herding"], "search.coreset=herding is unknown"),
        (["proxy=distilled", "coreset=kcenter"], "search.coreset is not read here: it belongs to proxy=coreset"),
        (["cells=3"], "search.cells is not read here: it belongs to space=cells"),
        (["net=lenet"], "net is not read here: it belongs to launch/local.py"),
        (["inner.steps=3"], "inner.steps is not read here: it belongs to launch/local.py"),
        (["nodes=4"], "cluster.nodes is not read here: it belongs to cluster=slurm"),
        (["workers=99"], "workers=99 is more than the 50 tasks; give workers 1 to 50, or more candidates or seeds"),
        (["data.augment=flip"], "data.augment=flip mirrors images"),
        (["json=yes"], "json=yes is neither json=true nor json=false"),
        (["sets=x"], "sets=x: there is no key 'sets'"),
        (["out=/dev/null/x"], "out=/dev/null/x can't be made"),
        (["--faster"], "flag=--faster is unknown"),
        (["steps=2", "set_lr=-1"], "search.set_lr=-1.0 is out of range"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = {w.partition("=")[0]: w for w in [*WORDS, f"out={tmp_path / 'o'}", *words]}
    assert main(list(every.values())) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {line}") and err.count("\n") == 1, err
    assert not (tmp_path / "o").exists()  # checked before anything is made


def test_more_workers_than_tasks_of_several_candidates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*KILLING, "workers=3", f"out={tmp_path / 'o'}"]) == 2
    assert "more than the 1 tasks; give workers 1 to 1, or a smaller search.group than 16" in capsys.readouterr().err


def test_a_space_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for space, line in (("nowhere.Space", "search.space=nowhere.Space"), ("test_search.Nothing", "has no Nothing")):
        assert main(["data=digits", f"space={space}", "proxy=params"]) == 2
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1, err


def test_another_search_in_the_folder_is_refused(alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (alone / "search.json").read_bytes()
    assert main([*WORDS, "width=8", f"out={alone}"]) == 2  # whose architectures have other names
    assert "holds another search (width: 4 -> 8; recorded -> given)" in capsys.readouterr().err
    assert main([*WORDS, "lr=.5", f"out={alone}"]) == 2
    err = capsys.readouterr().err
    assert "holds another search (lr: 0.01 -> 0.5; recorded -> given)" in err and err.count("\n") == 1
    assert (alone / "search.json").read_bytes() == before
    (tmp_path / "config.json").write_text("{}")
    assert main([*WORDS, f"out={tmp_path}"]) == 2 and "is a run's folder" in capsys.readouterr().err


class Reordered(Odd):
    """The same architectures by other numbers."""

    keys = ("better", "small", "raises", "memory", "nan", "good")


def test_a_space_that_has_changed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished or not: nobody gets another architecture's results, and nothing is done."""
    words = ["data=digits", "space=test_search.Odd", "candidates=6", "truth=none", "best=1", "seeds=1", "device=cpu"]
    words += ["threads=1", "smoke=true", f"out={tmp_path / 'o'}"]
    assert main([*words, "proxy=params"]) == 0
    before = results(tmp_path / "o")
    monkeypatch.setattr(sys.modules["test_search"], "Odd", Reordered)
    capsys.readouterr()
    for proxy in ("params", "params,flops"):
        assert main([*words, f"proxy={proxy}"]) == 2
        err = capsys.readouterr().err
        assert "is of better, which is now good in search.space=odd: the space has changed; give another out" in err
        assert err.count("\n") == 1 and results(tmp_path / "o") == before


def test_what_is_no_part_of_a_searchs_identity() -> None:
    plain = recipe(configured())
    for words in (["candidates=9"], ["proxy=params"], ["seeds=5"], ["best=9"], ["group=1"], ["workers=3"], ["data.root=x"]):
        assert recipe(configured(*words)) == plain
    for words in (["lr=.1"], ["steps=3"], ["data.size=16"], ["seed=1"], ["coreset=kcenter"], ["halving=3"], ["init=xavier"]):
        assert recipe(configured(*words)) != plain


def test_distilling_programs_refuse_what_is_for_a_search_and_keep_their_folders() -> None:
    with pytest.raises(UserError, match=r"search.lr is not read by this run: it belongs to launch/search.py"):
        compose(["search.lr=1"])
    other = Config()
    other.search.lr, other.search.set = 0.5, "x"
    assert identity_hash(other) == identity_hash(Config())


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import fields

    from metadist.config_search import SearchConfig

    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"\b{f.name}\b", said) for f in fields(SearchConfig))
    assert main([*WORDS, "--cfg"]) == 0 and "candidates: 5" in capsys.readouterr().out


@pytest.mark.slow
def test_the_program_runs_as_a_program(tmp_path: Path) -> None:
    words = ["data=digits", "width=4", "candidates=3", "proxy=params", "smoke=true", "threads=1", "truth=none", "best=1"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "launch/search.py"), *words, "workers=2", "json=true"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) and "2 workers" in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"search-convnets-digits-[0-9a-f]{8}", folder.name) and (folder / "report.png").is_file()


# --- SLURM --------------------------------------------------------------------------------------------------------------------


def test_on_slurm_it_is_an_array_of_workers(slurm: Programs) -> None:
    words = [*WORDS, "out=x", "nodes=3", "cpus_per_task=2"]
    printed = slurm(*words, "cluster=print", program=main)
    assert (printed.code, printed.err) == (0, "") and slurm.asked == [] and not (slurm.place / "x").exists()
    for line in ("--array=0-2%3", "--nodes=1", "--cpus-per-task=2", "--requeue", "--signal=USR2@90"):
        assert f"#SBATCH {line}\n" in printed.out
    place = slurm.place / "x"
    assert f"-m metadist.run.cluster.search {place}\n" in printed.out
    assert f"-m metadist.run.cluster.after_member $? {place}\n" in printed.out
    sent = slurm(*words, "cluster=slurm", program=main)
    assert sent.code == 0, sent.err
    assert slurm.received == printed.out.encode() and re.search(r"submitted array 4711: 3 workers for \d+ tasks", sent.out)
    assert configuration(place).workers == 3 and configuration(place).threads == 1
    assert "out=" + str(place) in slurm(*words, "cluster=slurm", program=main, mount=True).err
    words = [*(w for w in words if not w.startswith(("threads", "out"))), "out=y"]
    assert slurm(*words, "cluster=slurm", program=main).code == 0
    assert configuration(slurm.place / "y").threads == 2  # the cores that a worker has, as at the first start
    words[words.index("cpus_per_task=2")] = "cpus_per_task=4"
    assert slurm(*words, "cluster=slurm", program=main).code == 0
    assert configuration(slurm.place / "y").threads == 2


def test_a_worker_of_the_array_finishes_the_search(slurm: Programs, monkeypatch: pytest.MonkeyPatch, alone: Path) -> None:
    from metadist.run.cluster import after_member, search

    assert slurm(*WORDS, "out=x", "nodes=2", "cluster=slurm", program=main).code == 0
    for name, value in {"JOB_ID": "4712", "ARRAY_JOB_ID": "4711", "ARRAY_TASK_ID": "1", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    done = slurm(program=lambda argv: search.main([str(slurm.place / "x")]), mount=True)
    assert done.code == 0 and "distilled" in done.out, done.err
    assert results(slurm.place / "x") == results(alone)
    assert after_member.main(["0", str(slurm.place / "x")]) == 0
    again = slurm(*WORDS, "out=x", "nodes=2", "cluster=slurm", program=main)
    assert again.code == 0 and "submitted" not in again.out and "distilled" in again.out
