"""The typed configuration of a run: every key, its default and its meaning. Hydra, the Python API and tests all build this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class MethodConfig:
    """A point in the space of methods; a published name sets the four words."""

    name: str = "dd_random_init"  # the published name; a run folder and its manifest carry it
    synthetic: str = "images"  # images
    gradient: str = "unrolled"  # unrolled | truncated
    init: str = "random"  # fixed | random | pretrained
    objective: str = "real"  # real | poison
    attack: int = 0  # poison: class K whose images are to be misread
    target: int = 1  # poison: class T they are to be read as


@dataclass
class PretrainedConfig:
    """Where theta0 comes from when method.init=pretrained."""

    count: int = 20  # networks for training; as many again times `held_out` are kept for evaluation
    held_out: float = 0.25  # fraction of the networks kept for evaluation only
    data: str | None = None  # data set they are trained on; null: the run's own
    epochs: int = 3  # passes over that data set
    lr: float = 0.001  # Adam's rate
    batch: int = 128  # real images a step
    path: str | None = None  # a safetensors file of weights [count, P] instead of training


@dataclass
class InnerConfig:
    """Training on the distilled images."""

    steps: int = 10  # steps per pass over the distilled set
    epochs: int = 3  # passes
    optimizer: str = "sgd"  # sgd | momentum | adam
    lr: float = 0.02  # initial rate of every step
    learn_lr: bool = True  # one rate per step, learned; false: all stay at lr
    rate: str = "softplus"  # softplus: learn softplus^-1 of the rate | raw: the rate itself, clamped at 1e-6
    momentum: float = 0.9  # momentum's coefficient, Adam's beta1
    learn_momentum: bool = False  # through a sigmoid, one per step
    beta2: float = 0.999  # Adam's second
    eps: float = 1e-4  # Adam: sqrt(v + eps^2)
    loss_every: int = 0  # meta-loss at every k-th step; 0: at the last only
    window: int = 0  # gradient=truncated: differentiated steps; 0: all


@dataclass
class LabelsConfig:
    """Labels of the distilled images."""

    kind: str = "hard"  # hard | soft: learned, as logits of a softmax
    confidence: float = 0.9  # soft: probability of the own class at the start


@dataclass
class MetaConfig:
    """The outer optimization."""

    optimizer: str = "adam"  # adam | sgd
    lr: float = 0.01  # meta rate of the distilled images
    lr_rate: float | None = None  # meta rate of learned rates and momenta; null: lr
    lr_labels: float | None = None  # meta rate of soft labels; null: lr
    beta1: float = 0.5  # Adam's first, SGD's momentum
    beta2: float = 0.999  # Adam's second
    eps: float = 1e-8  # Adam: sqrt(v) + eps
    schedule: str = "step"  # constant | step | cosine
    decay: float = 0.5  # step: factor; cosine: final fraction
    decay_every: int = 0  # step: meta-steps between decays; 0: never
    warmup: int = 0  # meta-steps of linear warm-up
    horizon: int = 0  # cosine: its length in meta-steps; 0: `steps` at the first start, recorded then
    ema: float = 0.0  # decay of the average of the distilled set that is evaluated and kept; 0: none
    clip: float = 0.0  # meta-gradient norm is clipped to this; 0: never
    explode: float = 1e6  # a meta-gradient norm above this is skipped like a NaN
    max_bad: int = 10  # skipped steps in a row before roll-back and half rate
    max_rollbacks: int = 3  # after that many the run ends


@dataclass
class DataConfig:
    """Real data."""

    name: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn | usps | folder
    root: str = "data"  # where torchvision finds or puts it
    download: bool = False  # fetch it there if it is missing
    path: str | None = None  # name=folder: class folders of images
    size: int | None = None  # resize to size x size
    validation: float = 0.1  # fraction of the training data held out
    split_seed: int = 0  # draws which images are held out
    normalize: str = "standard"  # standard: published mean and sd, else measured | zca | none
    augment: str = "none"  # of real batches: none | crop | flip | crop_flip


@dataclass
class NetConfig:
    """The learner."""

    name: str = "lenet"  # mlp | lenet | alexcifar | convnet | resnet18 | resnet50 | custom
    init: str = "xavier"  # xavier | kaiming | orthogonal | default
    width: int = 0  # 0: the net's own default
    depth: int = 0  # 0: the net's own default
    norm: str = "instance"  # convnet: none | batch | layer | instance | group
    activation: str = "relu"  # sigmoid | relu | leaky
    pooling: str = "avg"  # none | max | avg
    target: str | None = None  # name=custom: import path of an nn.Module class
    kwargs: dict[str, Any] = field(default_factory=dict)  # name=custom: its arguments


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
class EvalConfig:
    """Evaluation during the run (validation split) and at its end (test split, once)."""

    every: int = 100  # meta-steps between validations
    nets: int = 20  # fresh networks, or held-out pre-trained ones
    final_nets: int = 200  # at the end, on the test split
    chunk: int = 20  # networks trained at once


@dataclass
class RunConfig:
    """How a run is kept."""

    checkpoint_every: int = 100  # meta-steps between checkpoints
    checkpoint_s: float = 300.0  # and at least every so many seconds; 0: never by time
    anchor_every: int = 0  # anchors kept for ever at these steps; 0: none
    keep: int = 3  # newest checkpoints kept
    log_every: int = 10  # meta-steps between lines and scalars
    image_every: int = 200  # meta-steps between pictures in TensorBoard


@dataclass
class LowerBoundConfig:
    """method=lower_bound: the linear-regression demonstration. It reads these keys, seed and run_dir alone."""

    dimension: int = 16  # D: features of the real data
    samples: int = 64  # N: real examples
    set_sizes: list[int] = field(default_factory=lambda: [1, 4, 8, 12, 15, 16, 20, 32])  # M: distilled examples, each tried
    trials: int = 5  # random problems for every M


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


@dataclass
class Config:
    """One run."""

    method: MethodConfig = field(default_factory=MethodConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    run: RunConfig = field(default_factory=RunConfig)
    lower_bound: LowerBoundConfig = field(default_factory=LowerBoundConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    steps: int = 400  # meta-steps
    tasks: int = 8  # global meta-batch
    ipc: int = 10  # distilled images per class in all
    real_batch: int = 256  # real images per task
    seed: int = 0  # of every random draw
    run_dir: str | None = None  # null: runs/<method>-<data>-<net>-<8 hex of the identity>
    workers: int = 1  # processes that share the tasks of a meta-step; 1 to tasks
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # per worker; 0: cores / workers
    cache_dir: str = "~/.cache/metadist"  # what several runs can share: whitening, pre-trained networks
    smoke: bool = False  # the preset's few-second version, on a few real images
