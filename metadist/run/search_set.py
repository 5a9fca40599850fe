"""What is known of the distilled set that a search trains on beside its images: cost, what it was learned from, what it fits.

Images that judge the proxies must not be among those that the set was learned from: it would be good at these very ones.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from metadist import data as data_room
from metadist.config import Config
from metadist.data import Data
from metadist.errors import UserError
from metadist.evaluate import fitting
from metadist.synthetic.distilled import DistilledSet, load


def precheck(config: Config, elsewhere: bool = False) -> None:
    """Hold the set against a few of the data before a folder is made. Raises UserError.

    elsewhere: the search is for other machines, which may have data that are not here: that is said, and no mistake.
    """
    if config.search.set is None:
        return
    dset = load(config.search.set)
    try:
        few = data_room.load(config.data, torch.device("cpu"), torch.float32, config.cache_dir, smoke=True)
    except UserError as e:
        if not elsewhere:
            raise
        print(f"note: data={config.data.name} can't be read here, the nodes must have it ({e})", file=sys.stderr)
        return
    check(config, dset, few)


def check(config: Config, dset: DistilledSet, data: Data) -> None:
    """Raises UserError for a set that doesn't fit the data, or can't train what the search trains."""
    fitting.check(dset, data)
    check_split(config, dset)
    fixed = dset.theta0 is not None or "theta0_recipe" in dset.manifest
    if fixed and "distilled" in config.search.proxy and not config.search.set_lr:
        net = dset.manifest.get("net", {}).get("name", "net")
        raise UserError(f"set={config.search.set} was made for one initialization of {net}: other networks learn nothing by "
                        "its recorded steps; give a set for any initialization, or set_lr=<rate>")  # fmt: skip


def check_split(config: Config, dset: DistilledSet) -> None:
    """Raises UserError for a set of these data that was learned from another part of them."""
    known = _known(config, dset)
    own = data_room.split_of(config.data)
    if changed := [name for name in own if known is not None and known.get(name, own[name]) != own[name]]:
        made, given = (" ".join(f"data.{name}={_word(split[name])}" for name in changed) for split in (known or {}, own))
        raise UserError(f"set={config.search.set} was made with {made}, this search has {given}: the set may have been learned "
                        f"from images that judge the proxies; give {made}")  # fmt: skip


def remark(config: Config) -> str | None:
    """A sentence of the report where nobody knows which images a set of these data was learned from."""
    if config.search.set is None or _known(config, load(config.search.set)) is not None:
        return None
    return (
        "The set doesn't say which images it was learned from: those that judge the proxies may be among them, which would "
        "flatter proxy=distilled."
    )


def _known(config: Config, dset: DistilledSet) -> dict[str, Any] | None:
    """The split that a set was made by; {} for other data; None: not known, as an older version of metadist has made it."""
    if dset.manifest.get("data", config.data.name) != config.data.name:
        return {}
    return dset.manifest.get("split")


def _word(value: object) -> str:
    return str(value).replace(" ", "")


def cost(given: str | None) -> tuple[float | None, str | None]:
    """Seconds of all workers that making the set took, and where, in words; None where no finished run's folder is given.

    An older run's seconds are its rounded minutes. Nobody has recorded what experts cost: that they are missing is said.
    """
    folder = Path(given or "").expanduser()
    try:
        found = json.loads((folder / "summary.json").read_text()) if given else {}
        seconds = float(found["seconds"] if "seconds" in found else 60 * found["minutes"]) * int(found.get("workers", 1))
    except (OSError, ValueError, KeyError, TypeError):
        return None, None
    return seconds, f"by {given}" + ("; its experts not counted" if _by_trajectories(folder) else "")


def _by_trajectories(folder: Path) -> bool:
    """Whether a run stands on experts, which launch/experts.py has trained."""
    try:
        return bool(json.loads((folder / "config.json").read_text())["method"]["gradient"] == "trajectory")
    except (OSError, ValueError, KeyError, TypeError):
        return False
