"""A configuration's experts: what they depend on, where they lie, how they are made and opened.

Design choices
- Their folder is named by the hash of everything that their weights depend on, so that no two recipes meet in one. How many
  there are is not part of it: more of them are added to those that are there.
- A task is a group of networks, done when their files are there; metadist.run.queue has them done by any number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metadist.config import Config
from metadist.errors import UserError
from metadist.identity import flatten, for_recipe
from metadist.run.compose import compose
from metadist.run.cost import duration, megabytes
from metadist.run.queue import run_queue
from metadist.run.unread import unread_by_experts

if TYPE_CHECKING:
    from metadist.store.experts import ExpertStore

VERSION = 1  # of the maker: raised by any change that alters what it makes
CIRCUMSTANCE = ("count", "path")


def recipe(config: Config) -> dict[str, Any]:
    """Everything that the weights of an expert depend on, JSON-able. Raises UserError if data.path is no folder."""
    experts = {k: v for k, v in dataclasses.asdict(config.experts).items() if k not in CIRCUMSTANCE}
    unread = [k.removeprefix("experts.") for k in flatten(config) if k.startswith("experts.") and unread_by_experts(config, k)]
    made = {
        "maker": VERSION,
        "data": data_recipe(config),
        "net": for_recipe("net", dataclasses.asdict(config.net)),
        "experts": {k: v for k, v in experts.items() if k not in unread},
        "dtype": config.engine.dtype,
        "precision": config.engine.precision,
    }
    return {**made, "smoke": True} if config.smoke else made  # trained on a few images only


def data_recipe(config: Config) -> dict[str, Any]:
    """What the real images depend on, JSON-able. Raises UserError if data.path is no folder."""
    data = {k: v for k, v in dataclasses.asdict(config.data).items() if k not in ("root", "download", "path")}
    data = for_recipe("data", data)
    return {**data, "files": _content(Path(config.data.path).expanduser())} if config.data.path else data


def _content(folder: Path) -> str:
    """SHA-256 of the names and bytes of all files below a folder."""
    if not folder.is_dir():
        raise UserError(f"data.path={folder} is no folder")
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def experts_dir(config: Config) -> Path:
    """The folder of a configuration's experts, be they there or not."""
    if config.experts.path is not None:
        return Path(config.experts.path).expanduser().absolute()
    from metadist.store.experts import key_of

    name = f"{config.data.name}-{config.net.name}-{key_of(recipe(config))[:32]}"
    return Path(config.cache_dir).expanduser().absolute() / "experts" / name


def command(config: Config) -> str:
    """The command line of launch/experts.py that makes a configuration's experts."""
    words = [f"data={config.data.name}", f"net={config.net.name}"]
    plain = flatten(compose(words, judge=lambda config, words: None))
    leaves = ("data.", "net.", "experts.", "engine.dtype", "engine.precision", "smoke", "cache_dir")
    for key, value in flatten(config).items():
        if key.startswith(leaves) and value != plain[key] and not unread_by_experts(config, key):
            words.append(f"{key}={json.dumps(value) if isinstance(value, dict | bool) or value is None else value}")
    return shlex.join(["python", "launch/experts.py", *words])


def open_experts(config: Config) -> ExpertStore:
    """The store of a configuration's experts, limited to experts.count of them.

    With experts.path only data, net and number format must be the configuration's; how they were trained is the store's affair.
    Raises UserError, which names the command that makes them, if they are missing or too few, and what the store refuses.
    """
    from metadist.store.experts import ExpertStore

    folder = experts_dir(config)
    if not (folder / "manifest.json").is_file():
        raise UserError(f"there are no experts in {folder}; make them with: {command(config)}")
    wanted, own = recipe(config), config.experts.path is None
    store = ExpertStore(folder, wanted if own else None)
    for part in () if own else ("data", "net", "dtype"):
        if store.recipe.get(part) != json.loads(json.dumps(wanted[part])):
            raise UserError(f"experts.path={folder}: their {part} is {store.recipe.get(part)}, this run's {wanted[part]}; give "
                            "the experts' own, or other experts")  # fmt: skip
    if store.count < config.experts.count:
        raise UserError(f"{folder} holds {store.count} finished experts of experts.count={config.experts.count}; go on with: "
                        f"{command(config)}; or give experts.count={max(store.count, 1)}")  # fmt: skip
    store.count = config.experts.count
    return store


def groups(config: Config) -> list[str]:
    """Names of the tasks: the number of each group."""
    return [f"{g:05d}" for g in range(-(-config.experts.count // config.experts.group))]


def done(config: Config, folder: Path, task: str) -> bool:
    """Whether all files of a group are there."""
    from metadist.run.trajectories import members
    from metadist.store.experts import file_name, listing

    names = listing(folder)
    return all(file_name(i) in names for i in members(config, int(task)))


def work(config: Config, folder: Path, stop: Callable[[], bool], patient: bool = True) -> bool:
    """Work on what is missing beside all others who do; True once every expert is there. Raises UserError and RunError."""
    tasks = groups(config)
    if all(done(config, folder, task) for task in tasks):
        return True
    from metadist.run.experts_job import prepare
    from metadist.run.trajectories import train_group

    job = prepare(config, folder)
    return run_queue(
        tasks,
        lambda task: train_group(job, int(task), stop),
        lambda task: done(config, folder, task),
        folder / "queue",
        stop,
        patient,
    )


def outcome(config: Config, folder: Path) -> str:
    """What a finished job prints; it is kept in summary.json. Raises what the store refuses."""
    from metadist.evaluate.statistics import Summary
    from metadist.store import atomic_write
    from metadist.store.experts import ExpertStore

    store = ExpertStore(folder)
    store.require(config.experts.count)
    _tidy(folder, store.count)
    found = [store.figures(i) for i in range(config.experts.count)]
    own, decoded = (Summary.of([f[k] for f in found]) for k in ("valid_accuracy", "valid_accuracy_decoded"))
    lost = max(f["difference_error"] for f in found)
    size = sum((folder / f"expert-{i:05d}.safetensors").stat().st_size for i in range(config.experts.count))
    whole = 4 * store.size * (store.epochs + 1) * config.experts.count
    text = (
        f"{config.experts.count} experts x {store.epochs} epochs: {100 * own.mean:.2f} +- {100 * own.sd:.2f} % on validation "
        f"(as stored: {100 * decoded.mean:.2f} %, differences to {lost:.1e}), {megabytes(size / 1e6)}, "
        f"{100 * size / whole:.0f} % of float32; {folder}"
    )
    record = {"finished": True, "count": store.count, "accuracy": own.mean, "sd": own.sd, "decoded": decoded.mean,
              "difference_error": lost, "bytes": size, "text": text}  # fmt: skip
    atomic_write(folder / "summary.json", (json.dumps(record, indent=1) + "\n").encode())
    return text


def _tidy(folder: Path, count: int) -> None:
    """Remove checkpoints of experts that are all there: of who was killed between an expert's file and this."""
    for place in (folder / "partial").glob("[0-9]*-[0-9]*"):
        first, _, last = place.name.partition("-")
        if first.isdigit() and last.isdigit() and int(last) < count:
            shutil.rmtree(place, ignore_errors=True)


def time_left(config: Config, folder: Path, workers: int) -> Callable[[float, int], str]:
    """What is left, in words, as a function of the seconds an epoch of a network takes and of the epochs begun."""

    def left(each: float, begun: int) -> str:
        from metadist.run.trajectories import members
        from metadist.store.experts import file_name, listing

        names = listing(folder)
        experts = [i for task in groups(config) for i in members(config, int(task))]
        ready = sum(file_name(i) in names for i in experts)
        # Each worker sees its own epochs; the others are taken to be as far.
        epochs = (len(experts) - ready) * config.experts.epochs - workers * begun
        return f"{ready} of {len(experts)} done, about {duration(max(epochs, 0) * each / workers)} left"

    return left
