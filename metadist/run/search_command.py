"""The command line of ``launch/search.py``: architectures ranked with distilled data, by workers here or on a cluster.

    python launch/search.py set=digits-10 data=digits width=4 candidates=20 epochs=5
    python launch/search.py set=runs/x data=mnist data.size=14 candidates=64 seeds=2 workers=2
    python launch/search.py set=runs/x data=cifar10 space=cells truth=none best=5        in use: the best by the set, in full
    python launch/search.py set=runs/x data=cifar10 cluster=slurm nodes=8 gpus_per_node=1    one array; each element works
    python launch/search.py data=cifar10 space=cells proxy=params,flops,synflow truth=table.json    no set, known accuracies

It draws `candidates` architectures of a space, judges each by every proxy on validation, trains each in full (truth=train), and
says how well each proxy ranks them, what picking by it costs in accuracy, and when making the set pays. Everything lies in
`out`, runs/search-<space>-<data>-<hash of what the numbers depend on>: report.json, table.txt, report.png, a file a training.
The same command goes on with what is missing; more candidates, seeds or proxies add to what is there.

proxies: distilled    the set's recorded steps, or with set_lr=<rate> ordinary training on it
         real_steps   as many images of the real data         early_stop   the start of full training, as many images
         random_real  as many random real images, as long     coreset      as many k-means centroids or k-center images
         params flops synflow    no training
A set must have been made by the same data.validation, split_seed, fraction and exclude, else it may have been learned from
images that judge the proxies. One that doesn't say (digits-10, mnist-*, older runs) is taken, and the report has a line on it.

keys: set space width cells candidates proxy seeds proxy_seeds epochs lr momentum weight_decay batch schedule steps set_lr draws
coreset group best truth halving seed init (all of them search.*), data data.* preset smoke out json, workers threads device
cache_dir, engine.dtype engine.precision engine.compile; with cluster=slurm those of launch/slurm.py.
`python launch/local.py --help` says what each of them means. threads, of each worker, is 1 (on SLURM cpus_per_task) unless the
first start says otherwise: it is recorded, and every worker of the search has as many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from metadist.config import Config
from metadist.config_search import SearchConfig
from metadist.errors import UserError, unknown
from metadist.run import validate_machine, validate_search
from metadist.run.compose import compose
from metadist.run.crew import together, worker
from metadist.run.guard import guarded
from metadist.run.search import Search
from metadist.run.search_folder import configuration, open_folder, refuse_other, search_dir
from metadist.run.signals import Stop, stop_status
from metadist.run.unread import unread_by_search

SHORT = {"out": "run_dir", **{f.name: f"search.{f.name}" for f in dataclasses.fields(SearchConfig)}}
FLAGS = ("-h", "--help", "--cfg")
PROGRAM = "metadist.run.search_command"  # of a worker


def judge(config: Config, words: Sequence[str], cluster: bool = False) -> None:
    """Raise UserError for keys among ``words`` that are not read, and for what can't be done. cluster: there is one."""
    validate_search.search(config)
    for key in words:
        if cluster and key.partition(".")[0] == "cluster":
            continue
        if why := unread_by_search(config, key):
            raise UserError(f"{key} is not read here: it belongs to {why}; leave it out, or give that as well")


def translated(argv: Sequence[str]) -> list[str]:
    """set=x -> search.set=x; proxy=a,b -> search.proxy=[a,b]."""
    out = []
    for key, sep, value in (word.partition("=") for word in argv):
        key = SHORT.get(key, key)
        listed = key == "search.proxy" and sep and not value.startswith("[")
        out.append(f"{key}{sep}[{value}]" if listed else f"{key}{sep}{value}")
    return out


def start(config: Config, as_json: bool = False) -> int:
    """Workers on this machine, until everything is done; the exit status."""
    from metadist.run.search_set import precheck

    folder, search = opened(config)
    other = sys.stderr if as_json else None  # where progress goes, None: as everything
    out = other or sys.stdout
    finished = search.finished()
    if not finished:
        precheck(config)
    config = open_folder(config, folder, len(search.candidates))
    if not finished:
        count, threads = config.workers, config.threads
        who = f"{count} worker{'s' if count > 1 else ''} of {threads} thread{'s' if threads > 1 else ''}"
        ways = [*config.search.proxy, *(["truth"] if config.search.truth == "train" else [])]
        print(f"{len(search.candidates)} of the {len(search.space)} architectures of {config.search.space}, by "
              f"{', '.join(ways)}; {who}; {folder}", file=out, flush=True)  # fmt: skip
        with contextlib.redirect_stdout(out):
            status, text = _alone(config, folder) if count == 1 else together(PROGRAM, folder, count, threads, other)
        if status > 128:
            print(f"stopped by {signal.Signals(status - 128).name}; run the same command again to go on", file=out)
            return status
        if text:
            print(text, file=sys.stderr, flush=True)
        if status:
            return status
    show(config, folder, as_json)
    return 0


def opened(config: Config) -> tuple[Path, Search]:
    """The folder and the search. Raises UserError, also for more workers than tasks."""
    folder = search_dir(config)
    refuse_other(config, folder)
    search = Search(config, folder)
    if config.workers > (tasks := search.count()):
        singles = sum(search.repeats(way) * len(indices) for way, indices in next(search.phases()).items())
        other = (
            f"a smaller search.group than {config.search.group}" if singles >= config.workers else "more candidates or seeds"
        )
        raise UserError(f"workers={config.workers} is more than the {tasks} tasks; give workers 1 to {tasks}, or {other}")
    return folder, search


def show(config: Config, folder: Path, as_json: bool = False) -> None:
    """Print what a finished search has found."""
    from metadist.run.search_job import outcome

    made = outcome(config, folder)
    print(json.dumps(made["report"]) if as_json else f"{made['text']}\n{folder}", flush=True)


def _alone(config: Config, folder: Path) -> tuple[int, str]:
    from metadist.run.search_job import marks, work

    attempts = marks(folder)

    def leave(name: str) -> None:
        attempts.leave()
        print(f"stopped by {name}; run the same command again to go on", flush=True)
        os._exit(stop_status(name))

    with Stop(at_once=leave):  # what is finished is on the disk; what is not begins anew
        work(config, folder, attempts)
    return 0, ""


def search(argv: Sequence[str]) -> int:
    """``launch/search.py``. Raises UserError and RunError."""
    flags = [word for word in argv if word.startswith("-")]
    if wrong := next((f for f in flags if f not in FLAGS), None):
        raise unknown("flag", wrong, FLAGS)
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return 0
    from metadist.run.cluster.command import translated as of_cluster

    asked = {"json=true": True, "json=false": False}
    if wrong := next((w for w in argv if w.startswith("json=") and w not in asked), None):
        raise UserError(f"{wrong} is neither json=true nor json=false")
    words = of_cluster(translated([w for w in argv if w not in flags and w not in asked]))
    as_json = any(asked.get(w, False) for w in argv)
    if any(w.startswith("cluster=") and w != "cluster=local" for w in words):
        from metadist.run.cluster.search import submit

        return submit(words)
    config = compose([w for w in words if w != "cluster=local"], here, judge, "search")
    if "--cfg" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))), end="")
        return 0
    validate_machine.gpu(config)
    return start(config, as_json)


def here(config: Config) -> None:
    """A run's meta-batch is no bound of ours."""
    config.tasks = max(config.tasks, config.workers)


def main(argv: Sequence[str]) -> int:
    """``launch/search.py`` with its exit status."""
    return guarded(search, argv)


def _crew(folder: Path) -> int:
    """One of several workers; its exit status."""
    from metadist.run.search_job import marks, work

    attempts = marks(folder)

    def leave(name: str) -> None:
        attempts.leave()
        os._exit(stop_status(name))

    return worker(lambda stop: work(configuration(folder), folder, attempts), leave)


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(_crew(Path(sys.argv[1])))
