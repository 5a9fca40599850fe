"""The folder of an architecture search: what its numbers depend on, where it lies, what its workers read there.

Design choices
- It is named by the hash of everything that a candidate's number depends on. How many candidates, seeds and proxies there are
  is not part of it: more of them are added to those that are there.
- search.json holds that recipe, the configuration of the latest start, and what is resolved once as sums in another order are
  other numbers: the threads of a worker, and how many candidates there were before a start added more (see search.Search).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from metadist.config import Config
from metadist.errors import UserError
from metadist.run.experts import data_recipe
from metadist.run.folder import config_from_dict
from metadist.store import atomic_write

VERSION = 2  # of the maker: raised by any change that alters a candidate's number
CIRCUMSTANCE = ("set", "truth", "candidates", "seeds", "proxy_seeds", "draws", "proxy", "best", "group")
FILE = "search.json"


def recipe(config: Config) -> dict[str, Any]:
    """Everything that the number of a candidate depends on, JSON-able. Raises UserError if set or data are not there."""
    from metadist.synthetic.distilled import find

    c = config.search
    own = {k: v for k, v in dataclasses.asdict(c).items() if k not in CIRCUMSTANCE}
    files = {"set": find(c.set) if c.set is not None else None, "truth": None}
    if c.truth not in ("train", "none"):
        files["truth"] = Path(c.truth).expanduser()
    made = {
        "search": VERSION,
        **{f"data.{k}": v for k, v in data_recipe(config).items()},
        **own,
        **{name: hashlib.sha256(path.read_bytes()).hexdigest() if path else None for name, path in files.items()},
        "dtype": config.engine.dtype,
        "precision": config.engine.precision,
    }
    return {**made, "smoke": True} if config.smoke else made  # trained on a few images only


def search_dir(config: Config) -> Path:
    """The folder of a search, be it there or not: run_dir, or runs/search-<space>-<data>-<8 hex of its recipe>."""
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser().absolute()
    key = hashlib.sha256(json.dumps(recipe(config), sort_keys=True).encode()).hexdigest()
    return Path(f"runs/search-{config.search.space}-{config.data.name}-{key[:8]}").absolute()


def record(folder: Path) -> dict[str, Any]:
    """What search.json holds; nothing where there is none. Older ones, which say less, are of another recipe."""
    path = folder / FILE
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def configuration(folder: Path) -> Config:
    """That of the latest start, as every worker has it."""
    return config_from_dict(record(folder)["config"])


def refuse_other(config: Config, folder: Path) -> None:
    """Raises UserError for the folder of a run, or of another search."""
    if (folder / "config.json").exists():
        raise UserError(f"out={folder} is a run's folder; give another")
    if known := record(folder):
        wanted = _plain(recipe(config)) | {"threads": config.threads or known.get("threads")}
        _same(folder, known["recipe"] | {"threads": known.get("threads")}, wanted)


def open_folder(config: Config, folder: Path, candidates: int) -> Config:
    """Make the folder of a search, and leave there what its workers read: the configuration with what the machine decides.

    candidates: how many there are. Raises UserError if it is another's.
    """
    refuse_other(config, folder)
    known = record(folder)
    threads = known.get("threads") or config.threads or config.cluster.cpus_per_task
    config, waves = dataclasses.replace(config, threads=threads), known.get("waves", [])
    if not waves or waves[-1] < candidates:
        waves = [*waves, candidates]
    made = {"recipe": recipe(config), "threads": threads, "waves": waves, "config": dataclasses.asdict(config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"out={folder} can't be made ({e.strerror}); give another") from None
    atomic_write(folder / FILE, (json.dumps(made, indent=1, sort_keys=True) + "\n").encode())
    return config


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """As it comes back from JSON."""
    return dict(json.loads(json.dumps(value)))


def _same(folder: Path, known: dict[str, Any], wanted: dict[str, Any]) -> None:
    keys = sorted({*known, *wanted})
    changed = [f"{k}: {_short(known.get(k))} -> {_short(wanted.get(k))}" for k in keys if known.get(k) != wanted.get(k)]
    if changed:
        raise UserError(f"out={folder} holds another search ({', '.join(changed)}; recorded -> given); give another out, "
                        "or the recorded values to go on")  # fmt: skip


def _short(value: object) -> str:
    return str(value)[:12] if isinstance(value, str) else str(value)
