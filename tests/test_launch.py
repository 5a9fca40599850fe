"""configs/, launch/ and what they share: composition, refusals, sweeps, help, the list of runs."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import metadist.run.local
from metadist import data, nets
from metadist.config import Config
from metadist.errors import UserError
from metadist.identity import default_run_dir, flatten, identity
from metadist.run import sweep as sweep_module
from metadist.run import validate as validate_module
from metadist.run.compose import compose, expand
from metadist.run.helptext import header, help_text
from metadist.run.overrides import groups, keys, kind_of, nearest
from metadist.run.table import table

ROOT = Path(__file__).resolve().parents[1]


def program(name: str) -> ModuleType:
    """launch/<name>.py as a module, wherever the tests are started."""
    spec = importlib.util.spec_from_file_location(f"launch_{name}", ROOT / "launch" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


local_program, runs_program = program("local"), program("runs")
# Those of other launchers: tests/test_experts.py, tests/test_search_presets.py.
PRESETS = [p for p in groups()["preset"] if "_experts" not in p and not p.endswith("_search")]


@pytest.fixture
def started(monkeypatch):
    """Configs that reached metadist.run.local.run."""
    seen: list[Config] = []
    monkeypatch.setattr(metadist.run.local, "run", lambda config: seen.append(config) or 0)
    return seen


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_and_its_smoke(preset):
    full, smoke = compose([f"preset={preset}"]), compose([f"preset={preset}", "smoke=true"])
    for key in ("method.name", "data.name", "net.name", "inner.optimizer", "method.gradient", "data.normalize", "data.augment"):
        assert flatten(full)[key] == flatten(smoke)[key], key
    assert smoke.steps <= 4 < full.steps
    work = [c.tasks * c.real_batch * c.inner.steps * c.inner.epochs for c in (smoke, full)]
    assert work[0] < work[1]
    assert smoke.eval.final_nets <= 2 or smoke.method.synthetic == "network"
    assert set(header("preset", preset)) - {"experts", "scale"} == {"title", "source", "cost", "command", "expect"}
    assert f"preset={preset} " in header("preset", preset)["command"] + " "
    for config in (full, smoke):
        validate_module.validate_with_data(config, 10)


@pytest.mark.parametrize("group,option", [(g, o) for g in groups() if g != "preset" for o in groups()[g]])
def test_option_names_itself_and_says_what_it_is(group, option):
    extra = {
        "folder": ["data.path=x"],
        "distilled": ["data.path=x", "method=train"],
        "custom": ["net.target=a.B"],
        "kd": ["kd.teachers=[x]"],
    }.get(option, [])
    config = compose([f"{group}={option}", *extra], place=(lambda config: None) if group == "cluster" else None)
    assert getattr(config, group).name == option
    assert header(group, option)["title"].endswith(".")


def test_published_settings():
    fixed, rat = compose(["preset=mnist_fixed"]), compose(["preset=cifar10_rat_bptt"])
    assert (fixed.method.init, fixed.ipc, fixed.inner.steps, fixed.inner.epochs) == ("fixed", 1, 1, 3)
    assert (fixed.inner.lr, fixed.meta.lr, fixed.meta.beta1) == (0.02, 0.01, 0.5)
    assert (rat.inner.window, rat.inner.steps * rat.inner.epochs, rat.inner.optimizer, rat.inner.lr) == (60, 200, "adam", 1e-3)
    assert (rat.meta.lr, rat.ipc, rat.net.depth) == (1e-3, 10, 3)
    random, poison = compose(["preset=cifar10_random"]), compose(["preset=cifar10_poison"])
    assert (random.inner.lr, random.data.augment, random.net.name, random.eval.final_nets) == (
        0.001,
        "crop_flip",
        "alexcifar",
        200,
    )
    assert (poison.method.attack, poison.method.target, poison.meta.lr, poison.pretrained.count, poison.tasks) == (
        0,
        1,
        0.02,
        2000,
        4,
    )


def test_no_preset_is_preset_digits():
    assert identity(compose()) == identity(compose(["preset=digits"]))
    smoke = [flatten(compose([*words, "smoke=true"])) for words in ([], ["preset=digits"])]
    differ = {k for k in smoke[0] if smoke[0][k] != smoke[1][k] and not k.startswith(("experts.", "search."))}
    assert differ == {"pretrained.count", "pretrained.epochs"}  # for method=... alone
    assert compose(["preset=null"]) == compose()


def test_precedence():
    config = compose(["net=convnet", "net.width=64", "preset=mnist_random", "inner.epochs=2"])
    assert (config.net.name, config.net.width, config.net.init) == ("convnet", 64, "default")
    assert (config.data.name, config.inner.steps, config.inner.epochs) == ("mnist", 10, 2)
    assert compose(["smoke=true", "steps=7"]).steps == 7
    assert compose(["method=truncated"]).inner.epochs == 60
    assert compose(["method=truncated", "inner.epochs=30"]).inner.epochs == 30


def test_free_keys_of_a_users_own_net():
    config = compose(["net=custom", "net.target=my.Net", "net.kwargs.hidden=32", "net.kwargs.act=relu"])
    assert config.net.kwargs == {"hidden": 32, "act": "relu"}


def test_tables_agree_with_the_rooms():
    assert set(validate_module.NETS) == set(nets.NAMES) == set(groups()["net"])
    assert set(validate_module.DATA) == set(data.NAMES) == set(groups()["data"])
    assert set(validate_module.METHODS) == set(groups()["method"])
    ranged = [k for names, _ in validate_module.RANGES.values() for k in names]
    assert len(ranged) == len(set(ranged))
    assert set(ranged) | set(validate_module.CHOICES) <= set(keys()) == set(flatten(Config()))
    # Every number is bounded by some rule.
    numbers = {k for k, v in flatten(Config()).items() if isinstance(v, int | float) and not isinstance(v, bool)}
    assert numbers <= set(ranged)


BAD = {
    "method=foo": "dd_fixed_init, dd_implicit, dd_poison",
    "method=dd_random": "did you mean dd_random_init?",
    "data=minst": "did you mean mnist?",
    "preset=mnist": "mnist_fixed",
    "mehtod=truncated": "method",
    "lr=1": "nearest: pretrained.lr, inner.lr",
    "iner.steps=1": "inner.steps",
    "zzz=1": "--help lists all keys",
    "inner=3": "inner is a section",
    "hydra.run.dir=x": "no key 'hydra.run.dir'",
    "ipc=abc": "a whole number",
    "ipc=1.5": "a whole number",
    "ipc=null": "a whole number",
    "meta.lr_rate=a": "a number or null",
    "inner.learn_lr=maybe": "true or false",
    "lower_bound.set_sizes=3": "a list",
    "net.kwargs=3": "keys",
    "ipc=???": "ipc",
    "run_dir=${foo}": "foo",
    "run_dir=": "run_dir is empty",
    "ipc": "key=value",
    "ipc={": "cannot be read",
    "=3": "no key",
    "+ipc=3": "only the plain form",
    "~ipc": "only the plain form",
    "method@x=truncated": "only the plain form",
    "method=[truncated]": "is unknown",
    "method=null": "is unknown",
    "method=truncated method=dd_poison": "given twice",
    "seed=1,2": "put -m in front",
    "ipc=0": "at least 1",
    "steps=0": "at least 1",
    "tasks=0": "at least 1",
    "real_batch=0": "at least 1",
    "inner.steps=0": "at least 1",
    "data.size=0": "at least 1",
    "seed=-1": "at least 0",
    "seed=9223372036854775808": "2**63",
    "workers=5 tasks=4": "1 to 4",
    "meta.lr=0": "above 0",
    "meta.lr=nan": "finite",
    "meta.explode=inf": "finite",
    "inner.momentum=1": "below 1",
    "data.validation=0": "above 0 and below 1",
    "data.validation=1": "above 0 and below 1",
    "meta.decay=0": "at most 1",
    "lower_bound.set_sizes=[]": "one or more",
    "lower_bound.set_sizes=[0]": "at least 1",
    "inner.optimizer=rmsprop": "adam, momentum, sgd",
    "net.name=vgg": "lenet",
    "method=truncated inner.window=0": "needs inner.window",
    "method=truncated inner.window=61": "1 to 60",
    "inner.window=2": "method.gradient=truncated",
    "inner.loss_every=11": "0 to 10",
    "method=truncated inner.loss_every=21": "0 to 20",
    "inner.learn_momentum=true": "sgd has no momentum",
    "inner.learn_momentum=true inner.optimizer=adam inner.momentum=0": "above 0",
    "method=dd_poison method.attack=1": "two different classes",
    "method.init=fixed": "method=dd_fixed_init",
    "pretrained.data=mnist": "method.init=pretrained",
    "method=dd_pretrained_init pretrained.data=mnist pretrained.path=x": "both given",
    "method=dd_pretrained_init pretrained.data=folder": "pretrained.path",
    "data=folder": "data.path=",
    "data.path=x": "data=folder",
    "net=custom": "net.target=",
    "net.target=a.B": "net=custom",
    "net.kwargs.a=1": "net=custom",
    "meta.schedule=constant meta.horizon=9": "cosine",
    "meta.schedule=cosine meta.decay_every=9": "meta.schedule=step",
    "engine.precision=bf16 device=cpu": "on a CPU",
    "engine.precision=tf32 device=cpu": "on a CPU",
    "engine.precision=tf32 engine.dtype=float64": "float64",
    "exchange.backend=nccl device=cpu": "between GPUs",
    "--foo": "--multirun",
    "-m seed=1,2 method=dd_random_init,foo": "method=foo is unknown",
    "-m seed=1,2 ipc=0": "at least 1",
    "-m seed=interval(0,1)": "interval",
    "-m seed=glob(*)": "names no value",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_line_and_exit_2(words, started, capsys):
    assert local_program.main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD[words] in err
    assert started == []


@pytest.mark.parametrize("words,said", [("data=minst", "did you mean mnist?"), ("steps=x", "steps=x is not a whole number")])
def test_bad_input_in_a_process_of_its_own(words, said, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "local.py"), words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_cuda_is_refused_without_a_gpu(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert local_program.main(["device=cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err
    assert local_program.main(["engine.precision=bf16"]) == 2


def test_what_needs_the_classes():
    config = compose(["ipc=3", "inner.steps=4"])
    with pytest.raises(UserError, match=r"30 distilled images \(ipc=3 x 10 classes\); allowed: 1, 2, 3, 5, 6, 10, 15, 30$"):
        validate_module.validate_with_data(config, 10)
    validate_module.validate_with_data(config, 4)
    with pytest.raises(UserError, match=r"method.target=10 is no class .* allowed: 0 to 9"):
        validate_module.validate_with_data(compose(["method=dd_poison", "method.target=10"]), 10)


def test_local_runs_the_config(started):
    assert local_program.main(["preset=mnist_random", "workers=2", "steps=10", "seed=1", "run_dir=runs/x"]) == 0
    (config,) = started
    assert (config.workers, config.steps, config.seed, config.run_dir) == (2, 10, 1, "runs/x")
    assert config.eval.final_nets == 200
    assert type(config) is Config


def test_lower_bound_is_a_demonstration_in_a_run_folder(tmp_path, monkeypatch, started, capsys):
    calls = []

    def demonstrate(config, run_dir):
        calls.append((config.lower_bound.set_sizes, run_dir))
        return {"text": "M = 2: reached", "loss": [0.5]}

    monkeypatch.setitem(sys.modules, "metadist.methods.lower_bound", SimpleNamespace(demonstrate=demonstrate))
    words = ["method=lower_bound", "lower_bound.set_sizes=[1,2]", f"run_dir={tmp_path}/x"]
    for _ in range(2):  # the second prints the result again
        assert local_program.main(words) == 0
        assert capsys.readouterr().out == "M = 2: reached\n"
    assert calls == [([1, 2], tmp_path / "x")]
    assert json.loads((tmp_path / "x" / "summary.json").read_text())["loss"] == [0.5]
    assert started == []


def test_exit_status_is_the_runs(monkeypatch):
    monkeypatch.setattr(metadist.run.local, "run", lambda config: 143)
    assert local_program.main([]) == 143


def test_cfg_prints_what_would_run(started, capsys):
    from omegaconf import OmegaConf

    assert local_program.main(["--cfg", "net=convnet", "net.width=64"]) == 0
    printed = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out))
    assert printed == dataclasses.asdict(compose(["net=convnet", "net.width=64"]))
    assert started == []


def test_help_names_everything(capsys):
    assert local_program.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text().strip()
    for option in itertools.chain(*groups().values()):
        assert f"  {option}" in text, option
    for preset in PRESETS:
        assert f"cost: {header('preset', preset)['cost']}" in text
    lines = {line.split("=")[0].strip(): line for line in text.splitlines() if line.startswith("    ")}
    assert "teacher.net.*" in text  # the keys of net
    for key, value in flatten(compose()).items():
        if key.startswith("teacher.net."):
            continue
        assert key in lines, key
        assert lines[key][40:].strip(), f"{key} has no meaning in config.py"
        if isinstance(value, str):
            assert f"{key}={value}" in text


def test_kinds_and_nearest():
    assert [kind_of(k) for k in ("steps", "meta.lr", "data.size", "data.path")] == [
        "a whole number",
        "a number",
        "a whole number or null",
        "text or null",
    ]
    assert nearest("inner.stps")[0] == "inner.steps"
    assert nearest("window") == ["inner.window"]


def test_sweep_is_the_product_in_order():
    points = expand(["seed=1,2", "ipc=1", "method=dd_fixed_init,truncated", "inner.lr=range(1,3)"])
    found = [(p.config.seed, p.config.method.name, p.config.inner.lr) for p in points]
    assert found == list(itertools.product((1, 2), ("dd_fixed_init", "truncated"), (1.0, 2.0)))
    assert points[-1].swept == {"seed": "2", "method": "truncated", "inner.lr": "2"}
    assert {p.config.ipc for p in points} == {1}
    assert [p.config.data.name for p in expand(["preset=glob(mnist_d*)"])] == ["mnist"] * 2
    assert len(expand(["seed=3"])) == 1


def test_every_run_of_a_sweep_has_its_folder():
    separate = sweep_module.jobs(expand(["seed=1,2"]))
    assert [j.run_dir for j in separate] == [default_run_dir(compose([f"seed={s}"])) for s in (1, 2)]
    circumstance = sweep_module.jobs(expand(["workers=1,2"]))
    assert [j.run_dir for j in circumstance] == [f"{default_run_dir(compose())}/workers-{w}" for w in (1, 2)]
    given = sweep_module.jobs(expand(["seed=1,2", "net=lenet,mlp", "run_dir='a b'"]))
    assert [j.run_dir for j in given] == [f"a b/seed-{s}_net-{n}" for s in (1, 2) for n in ("lenet", "mlp")]
    for job in given:  # the words of a job make its own run and no other
        config = compose(job.words)
        assert (config.run_dir, str(config.seed), config.net.name) == (job.run_dir, job.swept["seed"], job.swept["net"])


@pytest.mark.parametrize("place", ["null", "1e3", "a b", "it's", 'a"b', "a\\b", "a\\", "a\\'b", "a=1,b=2", "é"])
def test_any_folder_name_survives_a_sweep(place):
    assert compose([f"run_dir={sweep_module.quoted(place)}"]).run_dir == place


def write_run(folder: Path, config: Config, mean: float | None = None, step: int = 0) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (folder / "checkpoints" / f"step-{step:010d}.inc-0001.safetensors").write_bytes(b"")
    if mean is not None:
        test = {"mean": mean, "sd": 0.0123, "n": 20}
        summary = {"steps": config.steps, "test": test, "baselines": {"random": {"mean": 0.5, "sd": 0.1}}, "minutes": 1.26}
        (folder / "summary.json").write_text(json.dumps(summary))


def test_sweep_ends_with_one_table(tmp_path, monkeypatch, capsys):
    def start(job, forward):
        config = compose(job.words)
        write_run(Path(job.run_dir), config, None if config.seed == 2 else 0.7 + config.seed / 100)
        return 1 if config.seed == 2 else 0

    monkeypatch.chdir(tmp_path)
    assert sweep_module.sweep(["seed=1,2,3"], start) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("  ") for line in lines[-3:]]
    assert [[c.strip() for c in row if c.strip()][1:] for row in rows] == [
        ["1", "71.00 +- 1.23", "50.00", "1.3", "finished"],
        ["2", "-", "-", "-", "failed"],
        ["3", "73.00 +- 1.23", "50.00", "1.3", "finished"],
    ]
    assert lines[-5].split()[:2] == ["run", "seed"]
    assert sum(line.startswith("[") for line in lines) == 3


def test_sweep_passes_a_signal_on_and_starts_no_more(tmp_path, monkeypatch, capsys):
    import signal

    def start(job, forward):
        forward.child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        os.kill(os.getpid(), signal.SIGTERM)
        return forward.child.wait()

    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    assert sweep_module.sweep(["seed=1,2"], start) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    statuses = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[-2:]]
    assert statuses == ["stopped", "not started"]


def test_a_job_runs_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    job = sweep_module.Job(("--cfg", "seed=4", "run_dir='it\\'s here'"), {"seed": "4"}, "x")
    assert sweep_module.run_child(job, sweep_module.Forward()) == 0
    out = capfd.readouterr().out
    assert "seed: 4\n" in out
    assert "run_dir: it's here\n" in out


def test_runs_lists_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runs_program.main([]) == 0
    assert "no runs yet" in capsys.readouterr().out
    write_run(tmp_path / "runs" / "a", compose(["steps=30"]), 0.8765)
    write_run(tmp_path / "runs" / "b", compose(["steps=30", "seed=1"]), None, step=20)
    (tmp_path / "runs" / "no-run").mkdir()
    assert runs_program.main([]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2
    assert all(
        word in rows[0] for word in ("runs/a", "dd_random_init", "digits", "mlp", "30/30", "87.65 +- 1.23", "50.00", "yes")
    )
    assert all(word in rows[1] for word in ("runs/b", "20/30", "  -", "no"))
    assert runs_program.main(["runs/b", "json=true"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["step"], found["steps"], found["finished"], found["accuracy"]) == (20, 30, False, None)


def test_runs_compares(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    write_run(a, compose(["workers=2"]), 0.5)
    write_run(b, compose(["seed=1", "ipc=5"]), 0.25)
    assert runs_program.main([f"compare={a},{b}", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identity"] == {"ipc": [1, 5], "seed": [0, 1]}  # workers is circumstance
    assert [r["figures"]["test.mean"] for r in found["runs"]] == [0.5, 0.25]
    assert runs_program.main([f"compare={a},{b}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["ipc", "1", "5"] in lines
    assert ["test.mean", "0.5", "0.25"] in lines


@pytest.mark.parametrize("words", ["nowhere", "--foo", "compare=a", "compare=a,b", "json=maybe", "foo=1"])
def test_runs_refuses(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert runs_program.main(words.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_a_broken_file_in_a_run_folder_is_named(tmp_path, capsys):
    write_run(tmp_path, compose())
    (tmp_path / "summary.json").write_text("{")
    assert runs_program.main([str(tmp_path)]) == 2
    assert "summary.json cannot be read" in capsys.readouterr().err


def test_table():
    assert table(("name", "n"), [("a", "1"), ("bb", "100")]).splitlines() == [
        "name    n",
        "----  ---",
        "a       1",
        "bb    100",
    ]
