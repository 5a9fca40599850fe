"""The typed configuration of how and where a run is executed: engine, exchange, cluster (see ``metadist.config``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class EngineConfig:
    """How the mathematics is executed. Resolved once (`auto`), recorded, reused on resume."""

    compile: str = "auto"  # auto | on | off
    mixed: str = "reverse"  # reverse | forward
    group: int = 0  # tasks at once; 0: as many as memory_gb allows
    memory_gb: float = 2.0  # budget of one worker for a group
    dtype: str = "float32"  # float32 | float64
    precision: str = "fp32"  # fp32 | tf32 | bf16 (matrix units)


@dataclass
class ExchangeConfig:
    """How workers make one step together."""

    name: str = "allreduce"  # allreduce | server
    backend: str = "auto"  # auto | gloo | nccl
    timeout_s: float = 600.0  # silence after which a worker is given up
    interface: str | None = None  # network interface the workers of several machines meet on; null: found by itself
    max_staleness: int = 4  # server, as all below: versions a gradient may be behind; 0: the synchronous step
    damping: float = 0.0  # a gradient of staleness t is weighed by (1 + t)^-damping; 0: all alike
    batch: int = 0  # tasks a meta-step takes; 0: `tasks`
    deadline_s: float = 0.0  # a meta-step takes what has come by then, if anything has; 0: it waits for `batch`
    item: int = 0  # tasks handed out at once; 0: a worker's share, as far as it divides tasks and batch
    wire: str = "full"  # numbers on the wire: full, as computed | bfloat16: half of float32's bytes; the server's stay whole
    shards: int = 1  # server processes, a range of the flat vector each
    queue: int = 0  # gradients accepted and not yet applied, at most; 0: 1 GB of them, at most 64
    encrypt: bool = True  # CURVE; false: only for a closed network, the run's token is still demanded
    patience: float = 600.0  # seconds a worker waits for a server that went away
    heartbeat_s: float = 2.0  # between signs of life; after five without one a worker is given up


@dataclass
class ClusterConfig:
    """Where launch/slurm.py runs it; there the keys are given without the prefix: nodes=4. The names are submitit's."""

    name: str = "slurm"  # slurm | local: processes on this machine | print: show the batch file, submit nothing
    nodes: int = 1  # machines
    tasks_per_node: int = 0  # workers a node; 0: one, or one a GPU
    gpus_per_node: int = 0  # GPUs a node
    cpus_per_task: int = 1  # CPU cores, and threads, of a worker
    mem_gb: float = 0.0  # memory a node in GB; 0: the partition's default
    timeout_min: int = 60  # time limit in minutes
    partition: str | None = None  # null: the scheduler's default; so the next four
    qos: str | None = None  # quality of service
    account: str | None = None  # who pays
    constraint: str | None = None  # features a node must have
    exclude: str | None = None  # nodes not to be used
    array_parallelism: int = 256  # -m: runs at once
    signal_delay_s: int = 90  # seconds between the warning signal and the time limit
    max_num_timeout: int = 3  # requeued so often after a time limit; after a preemption always
    max_restarts: int = 3  # requeued so often after a worker was killed
    setup: list[str] = field(default_factory=list)  # shell lines before the workers start
    additional_parameters: dict[str, Any] = field(default_factory=dict)  # any other option of sbatch, {mail-type: END}
    server_partition: str | None = None  # exchange=server: the server's, best one without preemption; null: partition
    server_cpus: int = 2  # its CPU cores
    server_mem_gb: float = 0.0  # its memory in GB; 0: the partition's default
    server_timeout_min: int = 0  # its time limit; 0: timeout_min
    check_mount: bool = True  # refuse a run_dir on a mount that other machines can't see
    wait: bool = False  # stay, show progress, exit with the job's status
