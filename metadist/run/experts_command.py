"""The command line of ``launch/experts.py``: expert trajectories, by workers on this machine or on a cluster.

    python launch/experts.py data=mnist net=convnet experts=100 epochs=50 workers=4
    python launch/experts.py preset=mnist_experts workers=2
    python launch/experts.py preset=cifar10_experts cluster=slurm nodes=8 gpus_per_node=1    one array; each element works
    python launch/experts.py preset=cifar10_experts cluster=print nodes=8                    shows its batch file

It trains experts.count networks on real data and keeps their weights after every epoch in a store: experts.path, or
<cache_dir>/experts/<data>-<net>-<hash of everything that made them>. The same command goes on with what is missing; a larger
experts.count adds to what is there. A task is a group of experts.group networks: on a CPU, where convolutional networks are
trained one after another, give 1.

keys: data net preset smoke, experts.* (experts=N is experts.count, epochs=N is experts.epochs), workers threads device
cache_dir, engine.dtype engine.precision engine.compile, run.checkpoint_s; with cluster=slurm those of launch/slurm.py.
`python launch/local.py --help` says what each of them means.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from metadist.config import Config
from metadist.errors import UserError, unknown
from metadist.run import validate_machine
from metadist.run.compose import compose
from metadist.run.crew import together, worker
from metadist.run.environment import cores
from metadist.run.experts import done, experts_dir, groups, outcome, recipe, work
from metadist.run.guard import guarded
from metadist.run.signals import Stop, stop_status
from metadist.run.unread import unread_by_experts

SHORT = {"experts": "experts.count", "epochs": "experts.epochs"}
PROGRAM = "metadist.run.experts_command"  # of a worker
FLAGS = ("-h", "--help", "--cfg")


def judge(config: Config, words: Sequence[str], cluster: bool = False) -> None:
    """Raise UserError for keys among ``words`` that are not read, and for what can't be trained. cluster: there is one."""
    for key in words:
        if cluster and key.partition(".")[0] == "cluster":
            continue
        if why := unread_by_experts(config, key):
            raise UserError(f"{key} is not read here: it belongs to {why}; leave it out, or give that as well")
    tasks = len(groups(config))
    if config.workers > tasks:
        raise UserError(f"workers={config.workers} is more than the {tasks} tasks ({config.experts.count} experts in groups of "
                        f"experts.group={config.experts.group}); give workers 1 to {tasks}, or smaller groups")  # fmt: skip
    if config.net.draw_width:
        raise UserError("net.draw_width=true makes nets of many widths, and experts are of one; leave it out")


def start(words: Sequence[str], config: Config) -> int:
    """Workers on this machine, until all experts are there; the exit status."""
    folder = open_folder(config)
    if all(done(config, folder, task) for task in groups(config)):
        print(outcome(config, folder), flush=True)
        return 0
    count, threads = config.workers, config.threads or max(1, cores() // config.workers)
    who = f"{count} worker{'s' if count > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}"
    tasks, c = len(groups(config)), config.experts
    print(f"{c.count} experts x {c.epochs} epochs in {tasks} tasks, {who}; {folder}", flush=True)
    status, text = _alone(config, folder) if count == 1 else together(PROGRAM, folder, count, threads)
    if status > 128:
        print(f"stopped by {signal.Signals(status - 128).name} with a checkpoint; run the same command again to go on")
        return status
    if text:
        print(text, file=sys.stderr, flush=True)
    if status:
        return status
    print(outcome(config, folder), flush=True)
    return 0


def _alone(config: Config, folder: Path) -> tuple[int, str]:
    with Stop() as stop:
        finished = work(config, folder, lambda: stop.requested is not None)
    return (0 if finished else stop_status(stop.requested or "SIGTERM")), ""


def open_folder(config: Config) -> Path:
    """Make the store's folder, and leave there what its workers read. Raises UserError if it can't be made or is another's."""
    from metadist.store import atomic_write
    from metadist.store.experts import check_recipe

    folder = experts_dir(config)
    check_recipe(folder, recipe(config))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"the experts' folder {folder} can't be made ({e.strerror}); give another experts.path or cache_dir") \
            from None  # fmt: skip
    atomic_write(folder / "config.json", (json.dumps(dataclasses.asdict(config), indent=1, sort_keys=True) + "\n").encode())
    return folder


def experts(argv: Sequence[str]) -> int:
    """``launch/experts.py``. Raises UserError and RunError."""
    flags = [word for word in argv if word.startswith("-")]
    words = [SHORT.get(key, key) + sep + value for key, sep, value in (w.partition("=") for w in argv if w not in flags)]
    if wrong := next((f for f in flags if f not in FLAGS), None):
        raise unknown("flag", wrong, FLAGS)
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return 0
    from metadist.run.cluster.command import translated

    words = translated(words)
    if any(w.startswith("cluster=") and w != "cluster=local" for w in words):
        from metadist.run.cluster.experts import submit

        return submit(words)
    config = compose([w for w in words if w != "cluster=local"], _here, judge)
    if "--cfg" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), end="")
        return 0
    validate_machine.gpu(config)
    return start(words, config)


def main(argv: Sequence[str]) -> int:
    """``launch/experts.py`` with its exit status."""
    return guarded(experts, argv)


def _here(config: Config) -> None:
    config.tasks = max(config.tasks, config.workers)  # a run's meta-batch: no bound of ours


def _work(folder: Path, stop: Stop) -> bool:
    from metadist.run.folder import config_from_dict

    config = config_from_dict(json.loads((folder / "config.json").read_text()))
    return work(config, folder, lambda: stop.requested is not None)


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(worker(lambda stop: _work(Path(sys.argv[1]), stop)))
