"""The typed configuration of a run: every key, its default and its meaning. Hydra, the Python API and tests all build this."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from metadist.config_machine import ClusterConfig, EngineConfig, ExchangeConfig
from metadist.config_search import SearchConfig
from metadist.config_train import KdConfig, TrainConfig
from metadist.config_trajectory import ExpertsConfig, TrajectoryConfig


@dataclass
class MethodConfig:
    """A point in the space of methods; a published name sets the four words."""

    name: str = "dd_random_init"  # the published name; a run folder and its manifest carry it
    synthetic: str = "images"  # images | generator | network: ordinary training, no set is learned
    gradient: str = "unrolled"  # unrolled | truncated | implicit | matching | distribution | trajectory
    init: str = "random"  # fixed | random | pretrained | expert
    objective: str = "real"  # real | poison
    loss: str = "cross_entropy"  # of the inner training: cross_entropy | distillation: with a teacher's soft targets beside
    match: str = "batch"  # matching: batch: along each task's own training | class: class by class, on one learner for all
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
    shared_lr: bool = False  # learn one rate for all steps
    rate: str = "softplus"  # softplus: learn softplus^-1 of the rate | raw: the rate itself, clamped at 1e-6
    momentum: float = 0.9  # momentum's coefficient, Adam's beta1
    learn_momentum: bool = False  # through a sigmoid, one per step
    beta2: float = 0.999  # Adam's second
    eps: float = 1e-4  # Adam: sqrt(v + eps^2)
    loss_every: int = 0  # meta-loss at every k-th step; 0: at the last only
    window: int = 0  # gradient=truncated: differentiated steps; 0: all


@dataclass
class GeneratorConfig:
    """method.synthetic=generator: what makes the images of every inner step."""

    batch: int = 128  # images of an inner step
    noise: int = 128  # size of a latent code
    hidden: int = 1024  # outputs of the first linear layer
    maps: int = 128  # maps of a quarter of the images' side that the second makes
    conv: int = 64  # channels of the first convolution
    weight_norm: bool = True  # W = g V / |V| in every layer
    curriculum: str = "full"  # full: learned codes in order | shuffled_batches | shuffled: drawn from them | none: fresh noise
    chunk: int = 4  # inner steps whose images are made at once


@dataclass
class ImplicitConfig:
    """method.gradient=implicit: where the learner's training ends, and how the system there is solved."""

    steps: int = 32  # inner steps of a meta-step
    l2: float = 0.001  # weight of |theta|^2 / 2 in the inner loss
    warm_start: bool = True  # a task's learner goes on from the meta-step before
    restart: int = 20  # warm start: meta-steps after which it begins anew
    batches: int = 4  # synthetic batches that Hessian products see; 0: all
    solver: str = "neumann"  # neumann | cg
    terms: int = 10  # of the Neumann series, products of conjugate gradients
    step: float = 0.1  # neumann: below 2 / (largest eigenvalue + damping)
    damping: float = 0.0  # added to the Hessian's diagonal


@dataclass
class MatchingConfig:
    """method.gradient=matching; with match=batch the points of the path are inner.loss_every steps apart."""

    distance: str = "cosine"  # cosine: layer by layer, output by output | l2: of the whole, relative
    outer: int = 1  # match=class: meta-steps of one learner; then another is drawn
    inner: int = 1  # match=class: its passes over the distilled images between two of them
    batch: int = 256  # match=class: images of a step of that training
    lr: float = 0.01  # match=class: its rate, of plain SGD


@dataclass
class ImagesConfig:
    """method.synthetic=images."""

    start: str = "noise"  # noise: N(0, 1) | real: drawn training images of their classes


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

    name: str = "digits"  # digits | mnist | fashion_mnist | cifar10 | cifar100 | svhn | usps | folder | distilled
    root: str = "data"  # where torchvision finds or puts it
    download: bool = False  # fetch it there if it is missing
    path: str | None = None  # name=folder: class folders of images; name=distilled: a distilled set, or its run folder
    size: int | None = None  # resize to size x size
    validation: float = 0.1  # fraction of the training data held out
    split_seed: int = 0  # draws which images are held out
    normalize: str = "standard"  # standard: published mean and sd, else measured | zca | none
    augment: str = "none"  # of real batches: none | crop | flip | crop_flip | jitter: shifts by up to 2 pixels
    fraction: float = 1.0  # of the training images, every class in proportion, that are trained on
    exclude: list[int] = field(default_factory=list)  # method=kd and train: classes without a training image


@dataclass
class NetConfig:
    """The learner."""

    name: str = "lenet"  # mlp|lenet|alexcifar|convnet|resnet18|resnet50|gtn|alexnet|vgg11|plain|resnet_cifar|custom
    init: str = "xavier"  # xavier | kaiming | orthogonal | default
    width: int = 0  # 0: the net's own default
    depth: int = 0  # 0: the net's own default
    draw_width: bool = False  # gtn: every learner's channels are drawn, from half to twice those of `width`
    norm: str = "instance"  # convnet, vgg11: none | batch | layer | instance | group
    activation: str = "relu"  # sigmoid | relu | leaky
    pooling: str = "avg"  # none | max | avg
    weight_norm: bool = False  # W = g V / |V| in every convolution and linear layer
    dropout: float = 0.0  # mlp, method=train and kd: probability that a hidden unit is dropped, to 1/256
    input_dropout: float = 0.0  # the same for a pixel
    target: str | None = None  # name=custom: import path of an nn.Module class
    kwargs: dict[str, Any] = field(default_factory=dict)  # name=custom: its arguments


@dataclass
class TeacherConfig:
    """method.loss=distillation: the frozen teacher, trained by SGD with momentum on the run's own training data, or read."""

    net: NetConfig = field(default_factory=lambda: NetConfig(name="resnet18", init="default"))  # teacher.net.name=resnet50
    epochs: int = 20  # passes; the rate drops to a tenth at half of the steps
    lr: float = 0.05  # rate
    momentum: float = 0.9  # its momentum
    weight_decay: float = 0.0005  # l2 in the loss
    batch: int = 128  # real images a step
    augment: str = "none"  # of them: none | crop | flip | crop_flip
    path: str | None = None  # a safetensors file of theta [P] and, with BatchNorm, buffers [Q], instead of training


@dataclass
class EvalConfig:
    """Evaluation during the run (validation split) and at its end (test split, once)."""

    every: int = 100  # meta-steps between validations
    nets: int = 20  # fresh networks, or held-out pre-trained ones
    final_nets: int = 200  # at the end, on the test split
    chunk: int = 20  # networks trained at once
    report: bool = True  # sets: report.png at the end, beside as many random real images; false: the test accuracy alone


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
class Config:
    """One run."""

    method: MethodConfig = field(default_factory=MethodConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    inner: InnerConfig = field(default_factory=InnerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    implicit: ImplicitConfig = field(default_factory=ImplicitConfig)
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    trajectory: TrajectoryConfig = field(default_factory=TrajectoryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kd: KdConfig = field(default_factory=KdConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    data: DataConfig = field(default_factory=DataConfig)
    net: NetConfig = field(default_factory=NetConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
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
    dsa: str = "none"  # differentiable siamese augmentation: none | operations joined by _, such as color_crop_cutout
    seed: int = 0  # of every random draw
    run_dir: str | None = None  # null: runs/<method>-<data>-<net>-<8 hex of the identity>
    workers: int = 1  # processes that share the tasks of a meta-step; 1 to tasks
    device: str = "auto"  # auto | cpu | cuda
    threads: int = 0  # per worker; 0: cores / workers
    cache_dir: str = "~/.cache/metadist"  # what several runs can share: whitening, pre-trained networks
    smoke: bool = False  # the preset's few-second version, on a few real images
