"""exchange=server on a cluster: a job for the server, an array for its workers, and more arrays whenever somebody adds them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.config_machine import ClusterConfig
from metadist.errors import UserError
from metadist.run.cluster import record, scheduler
from metadist.run.cluster.batch import LOGS, Executor, tasks_per_node, workers_role
from metadist.run.compose import compose
from metadist.run.folder import RunFolder

JOIN = ("join", "run_dir", "workers")


def server_cluster(cluster: ClusterConfig) -> ClusterConfig:
    """What the server's job asks for: one task, no GPU."""
    return dataclasses.replace(
        cluster,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=0,
        cpus_per_task=cluster.server_cpus,
        mem_gb=cluster.server_mem_gb,
        partition=cluster.server_partition or cluster.partition,
        timeout_min=cluster.server_timeout_min or cluster.timeout_min,
    )


class Fleet:
    """The batch files of a run's server and of one array of workers. number: of the array; first: of its first worker."""

    def __init__(self, place: Path, cluster: ClusterConfig, number: int = 1, first: int = 1) -> None:
        """UserError for what submitit or sbatch refuses."""
        self.place, self.count = place, cluster.nodes * tasks_per_node(cluster)
        self.server = Executor(place, server_cluster(cluster))
        role = workers_role(number, first)
        self.workers = Executor(place, dataclasses.replace(cluster, nodes=1), cluster.nodes, role)

    @property
    def text(self) -> str:
        """Both files, as sbatch receives them."""
        return f"# the server\n{self.server.text}\n# its workers\n{self.workers.text}"


def submit(place: Path, config: Config, words: Sequence[str]) -> tuple[str, list[str]]:
    """Submit the server and, unless they are there still, its workers; the server's job and the arrays."""
    known = record.read(place / LOGS / "job.json")
    alive = [a for a in _arrays(known) if scheduler.active(a)]
    fleet = Fleet(place, config.cluster)
    job = fleet.server.send()
    _write(place, {"job": job, "workers": alive, "words": list(words), "last": fleet.count})
    if not alive:
        try:
            alive = [fleet.workers.send()]
        except UserError:
            scheduler.cancel(job)
            raise
        _write(place, {"job": job, "workers": alive, "words": list(words), "last": fleet.count})
    return job, alive


def _write(place: Path, known: dict[str, Any]) -> None:
    record.write(place / LOGS / "job.json", {**known, "cluster": "slurm", "time": time.time()})


def _arrays(known: dict[str, Any]) -> list[str]:
    return [str(a) for a in known.get("workers", [])]


def joining(words: Sequence[str], own: Sequence[str]) -> tuple[RunFolder, ClusterConfig]:
    """The run that ``join=true run_dir=... workers=8`` names, and what its new workers ask for: as the first, unless given.

    own: the cluster's keys. Raises UserError.
    """
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if wrong := next((k for k in given if k.partition(".")[0] not in {*own, *JOIN, "cluster"}), None):
        raise UserError(f"{wrong} can't be given with join=true: the run has its configuration; allowed: run_dir, workers, "
                        "cluster and what its machines are")  # fmt: skip
    if "run_dir" not in given:
        raise UserError("join=true needs run_dir=<folder of the run whose server gets more workers>")
    placed = compose([f"run_dir={given['run_dir']}"]).run_dir
    folder = RunFolder.attach(Path(str(placed)))
    if folder.config.exchange.name != "server":
        raise UserError(
            f"run_dir={folder.path} is a run of exchange={folder.config.exchange.name}; only a server takes workers"
        )
    if folder.finished is not None:
        raise UserError(f"run_dir={folder.path} is finished; there is nothing to join")
    keys = [w for w in words if w.partition("=")[0].partition(".")[0] in own]
    where = [f"cluster={given['cluster']}"] if "cluster" in given else []
    asked = compose([*where, *(f"cluster.{w}" for w in keys)], lambda config: None).cluster
    changed = {k.partition("=")[0].partition(".")[0] for k in keys}
    cluster = dataclasses.replace(folder.config.cluster, **{k: getattr(asked, k) for k in changed})
    cluster.name = asked.name
    return folder, _sized(cluster, given)


def _sized(cluster: ClusterConfig, given: dict[str, str]) -> ClusterConfig:
    each = tasks_per_node(cluster)
    if "workers" not in given:
        return cluster if "nodes" in given else dataclasses.replace(cluster, nodes=1)
    workers = int(given["workers"]) if given["workers"].isdigit() else 0
    if workers < 1 or workers % each:
        raise UserError(f"workers={given['workers']} is no multiple of tasks_per_node={each}; give {each}, {2 * each}, ...")
    if "nodes" in given and cluster.nodes * each != workers:
        raise UserError(f"workers={workers} contradicts nodes={cluster.nodes} x tasks_per_node={each}; leave one of them out")
    return dataclasses.replace(cluster, nodes=workers // each)


def join(folder: RunFolder, cluster: ClusterConfig) -> Fleet:
    """The batch files of one more array; ``workers`` is the one to submit."""
    known = record.read(folder.path / LOGS / "job.json")
    return Fleet(folder.path, cluster, len(_arrays(known)) + 1, int(known.get("last", folder.config.workers)) + 1)


def joined(folder: RunFolder, fleet: Fleet) -> str:
    """Submit the new array; its job."""
    array = fleet.workers.send()
    known = record.read(folder.path / LOGS / "job.json")
    last = int(known.get("last", folder.config.workers)) + fleet.count
    _write(folder.path, {**known, "workers": [*_arrays(known), array], "last": last})
    return array
