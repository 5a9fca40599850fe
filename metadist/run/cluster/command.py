"""The command line of ``launch/slurm.py``: one run or a sweep, submitted, printed, or started here.

    python launch/slurm.py method=dd_random_init nodes=4                       submit, return at once
    python launch/slurm.py method=dd_random_init nodes=4 wait=true             stay until it ends
    python launch/slurm.py method=dd_random_init nodes=4 cluster=print         show the batch file
    python launch/slurm.py method=dd_random_init nodes=4 cluster=local         the same on this machine
    python launch/slurm.py -m seed=1,2,3 nodes=2                               one array, one table

Takes every key of launch/local.py, and those of the section `cluster` without its name: nodes gpus_per_node tasks_per_node
cpus_per_task mem_gb timeout_min partition qos account constraint exclude array_parallelism signal_delay_s max_num_timeout
max_restarts setup additional_parameters check_mount wait server_partition server_cpus server_mem_gb server_timeout_min. The
same command on a run folder resumes it. With exchange=server the server and its workers are jobs of their own:

    python launch/slurm.py exchange=server nodes=8 gpus_per_node=1               a server, and an array of 8 workers
    python launch/slurm.py join=true run_dir=runs/x workers=8                    8 more for it, at any time
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from metadist.config import Config
from metadist.config_machine import ClusterConfig
from metadist.errors import UserError, unknown
from metadist.run.cluster import record, scheduler
from metadist.run.cluster.batch import LOGS, Executor, tasks_per_node
from metadist.run.cluster.fleet import Fleet, join, joined, joining, submit
from metadist.run.cluster.mounts import refuse_local
from metadist.run.cluster.precheck import precheck
from metadist.run.compose import compose, expand
from metadist.run.folder import RunFolder
from metadist.run.guard import guarded
from metadist.run.sweep import quoted

OWN = {f.name for f in dataclasses.fields(ClusterConfig)} - {"name"}
FLAGS = ("-h", "--help", "-m", "--multirun")


def translated(words: Sequence[str]) -> list[str]:
    """nodes=4 -> cluster.nodes=4."""
    return [f"cluster.{word}" if word.partition("=")[0].partition(".")[0] in OWN else word for word in words]


def place_workers(words: Sequence[str]) -> Callable[[Config], None]:
    """What the machines decide: the number of workers. Judges what can be told of machines that are not this one."""
    given = {word.partition("=")[0] for word in words}

    def place(config: Config) -> None:
        cluster = config.cluster
        workers = cluster.nodes * tasks_per_node(cluster)
        if "workers" in given and config.workers != workers:
            raise UserError(
                f"workers={config.workers} contradicts nodes={cluster.nodes} x "
                f"tasks_per_node={tasks_per_node(cluster)} = {workers}; leave workers out"
            )
        config.workers = workers
        _judge(config)

    return place


def _judge(config: Config) -> None:
    cluster, engine = config.cluster, config.engine
    tasks = tasks_per_node(cluster)
    if config.method.name == "lower_bound":
        raise UserError("method=lower_bound takes a second on one core; use python launch/local.py method=lower_bound")
    if 1 <= 60 * cluster.timeout_min <= cluster.signal_delay_s:
        raise UserError(f"signal_delay_s={cluster.signal_delay_s} is not below timeout_min={cluster.timeout_min} "
                        f"({60 * cluster.timeout_min} s); give less of the one or more of the other")  # fmt: skip
    if cluster.gpus_per_node == 0 and (
        config.device == "cuda" or engine.precision != "fp32" or config.exchange.backend == "nccl"
    ):
        raise UserError("device=cuda, engine.precision=tf32|bf16 and exchange.backend=nccl need GPUs: give gpus_per_node=N")
    if config.exchange.backend == "nccl" and tasks > cluster.gpus_per_node:
        raise UserError(f"exchange.backend=nccl takes a GPU a worker: tasks_per_node={tasks}, "
                        f"gpus_per_node={cluster.gpus_per_node}; use gloo or auto")  # fmt: skip


def slurm(argv: Sequence[str]) -> int:
    """``launch/slurm.py``. Raises UserError and RunError."""
    flags = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    if wrong := next((f for f in flags if f not in FLAGS), None):
        raise unknown("flag", wrong, FLAGS)
    if {"-h", "--help"} & set(flags):
        print(__doc__)
        return 0
    if "join=true" in words:
        return _join(words)
    if {"-m", "--multirun"} & set(flags):
        return _sweep(words)
    config = compose(translated(words), place_workers(words))
    if config.cluster.name == "local":
        return _local(words, config)
    return _one(words, config)


def _one(words: Sequence[str], config: Config) -> int:
    from metadist.identity import default_run_dir

    place = Path(config.run_dir or default_run_dir(config)).expanduser().absolute()
    serving = config.exchange.name == "server"
    if config.cluster.name == "print":
        sys.stdout.write(Fleet(place, config.cluster).text if serving else Executor(place, config.cluster).text)
        return 0
    check_scheduler(config.cluster)
    if config.cluster.check_mount:
        refuse_local(place)
    precheck(config)
    folder = RunFolder.prepare(config)
    if (summary := folder.finished) is not None:
        from metadist.run.worker import result_text

        print(result_text(summary))
        return 0
    free(place)
    folder.write_config()
    arrays: list[str] = []
    if serving:
        job, arrays = submit(place, config, words)
    else:
        job = Executor(place, config.cluster).send()
        record.write(place / LOGS / "job.json", {"job": job, "cluster": "slurm", "time": time.time(), "words": list(words)})
    _sheet(job, place, words, arrays)
    return wait_for([(job, place, place / LOGS)]) if config.cluster.wait else 0


def _join(words: Sequence[str]) -> int:
    folder, cluster = joining(words, sorted(OWN))
    if cluster.name == "local":
        from metadist.run.local_server import join as join_here

        return join_here(folder, cluster.nodes * tasks_per_node(cluster))
    fleet = join(folder, cluster)
    if cluster.name == "print":
        sys.stdout.write(fleet.workers.text)
        return 0
    check_scheduler(cluster)
    array = joined(folder, fleet)
    print(f"submitted array {array}: {fleet.count} more workers for {folder.path}")
    print(f"  logs           {folder.path / LOGS}/{array}_<element>_<rank>_log.out and .err")
    print(f"  status         python launch/status.py run={folder.path}\n  cancel         scancel {array}")
    return 0


def _sweep(words: Sequence[str]) -> int:
    from metadist.run.cluster import sweep

    points = expand(translated(words), place_workers(words))
    cluster = points[0].config.cluster
    if points[0].config.exchange.name == "server" and cluster.name != "local":
        raise UserError("-m submits one array, and each run of exchange=server is a job and an array of its own; "
                        "submit a command for each")  # fmt: skip
    place, todo = sweep.plan(points)
    if cluster.name == "local":
        return _local(["-m", *words], points[0].config)
    executor = Executor(place, cluster, len(todo))
    if cluster.name == "print":
        sys.stdout.write(executor.text)
        return 0
    check_scheduler(cluster)
    for where in {place, *(Path(job.run_dir) for job in todo)} if cluster.check_mount else ():
        refuse_local(where)
    for point in points:
        precheck(point.config)
    for job in todo:
        free(Path(job.run_dir))
    folders = sweep.make(place, points, todo)
    if all(folder.finished is not None for folder in folders):
        print(sweep.text(place))
        return 0
    for folder in folders:
        folder.write_config()
    number = executor.send()
    for i, folder in enumerate(folders):
        record.write(folder.path / LOGS / "job.json", {"job": f"{number}_{i}", "cluster": "slurm", "sweep": str(place)})
    _sheet(number, place, ["-m", *words])
    if not cluster.wait:
        print(f"  table          python launch/status.py run={place}; at the end also {place / 'table.txt'}")
        return 0
    status = wait_for([(f"{number}_{i}", folder.path, place / LOGS) for i, folder in enumerate(folders)])
    print(f"\n{sweep.text(place)}")
    return status


def check_scheduler(cluster: ClusterConfig) -> None:
    """Raise UserError unless there is a SLURM here that knows the partition."""
    if shutil.which("sbatch") is None:
        raise UserError("cluster=slurm, but there is no sbatch on PATH: run this on a login node of the cluster, "
                        "or give cluster=local or cluster=print")  # fmt: skip
    if cluster.partition is not None and (known := scheduler.partitions()):
        for name in cluster.partition.split(","):
            if name not in known:
                raise unknown("partition", name, known)


def free(run_dir: Path) -> None:
    """Raise UserError if a job is at work on the folder already."""
    known = record.read(run_dir / LOGS / "job.json")
    if known.get("cluster") != "slurm":
        return
    now = scheduler.ask(str(known["job"]))
    if now.state not in ("", scheduler.FORGOTTEN, scheduler.UNREACHABLE) and not now.final:
        raise UserError(f"run_dir={run_dir} belongs to job {known['job']} ({now.state}); watch it with "
                        f"python launch/status.py run={run_dir}, or scancel {known['job']} first")  # fmt: skip


def _sheet(job: str, place: Path, words: Sequence[str], arrays: Sequence[str] = ()) -> None:
    own = [w for w in words if not w.startswith("run_dir=")]
    where = str(place) if re.fullmatch(r"[\w./-]+", str(place)) else quoted(str(place))
    resume = shlex.join(["python", "launch/slurm.py", *own, *([] if "-m" in own else [f"run_dir={where}"])])
    logs = place / LOGS / (f"{job}_<run>_<rank>_log.out" if "-m" in own else f"{job}_<rank>_log.out")
    print(f"submitted job {job}{f', the server, and its workers, array {arrays[0]}' if arrays else ''}")
    for what, how in (
        ("run folder", place),
        ("logs", f"{logs} and .err"),
        ("status", f"python launch/status.py run={place}"),
        ("monitor", f"tensorboard --logdir {place if '-m' not in own else place.parent}"),
        ("resume", resume),
        *([("more workers", f"python launch/slurm.py join=true run_dir={where} workers=2")] if arrays else []),
        ("cancel", f"scancel {' '.join((job, *arrays))}"),
    ):
        print(f"  {what:<14} {how}", flush=True)


def wait_for(watched: Sequence[tuple[str, Path, Path]]) -> int:
    """Show what jobs of (number, run folder, folder of logs) say until all have ended; the worst exit status."""
    from metadist.run.cluster.watch import Tail, wait

    worst = 0
    for job, run_dir, logs in watched:
        tails = [Tail(logs / f"{job}_0_log.{kind}") for kind in ("out", "err")]
        try:
            worst = max(worst, wait(job, run_dir, tails))
        except KeyboardInterrupt:
            print(f"no longer watching; the job goes on: scancel {watched[0][0].partition('_')[0]} ends it", file=sys.stderr)
            return 130
    return worst


def _local(words: Sequence[str], config: Config) -> int:
    from metadist.run.cluster.here import start

    return start(words, config, OWN)


def main(argv: Sequence[str]) -> int:
    """``launch/slurm.py`` with its exit status."""
    return guarded(slurm, argv)
