"""What an architecture search is asked for, judged before any work (see metadist.run.validate)."""

from __future__ import annotations

from pathlib import Path

from metadist.config import Config
from metadist.config_search import FREE, TRAINED
from metadist.errors import UserError, unknown

SPACES = ("convnets", "cells")
# Of metadist.run.validate's tables.
CHOICES = {
    "search.coreset": ("kmeans", "kcenter"),
    "search.schedule": ("half", "constant"),
    "search.init": ("xavier", "kaiming", "orthogonal", "default"),
}
AT_LEAST_1 = tuple(f"search.{name}" for name in ("seeds", "proxy_seeds", "epochs", "batch", "draws", "group", "best"))
AT_LEAST_0 = tuple(
    f"search.{name}" for name in ("width", "cells", "candidates", "steps", "set_lr", "weight_decay", "halving", "seed")
)


def search(config: Config) -> None:
    """The section ``search``, as far as can be told without the space and the data. Raises UserError."""
    c = config.search
    if c.space not in SPACES and "." not in c.space:
        raise UserError(f"{unknown('search.space', c.space, SPACES)}; or give the import path of your own")
    if c.candidates == 1:
        raise UserError("search.candidates=1 leaves nothing to compare; give 2 or more, or 0 for the whole space")
    if c.halving == 1:
        raise UserError("search.halving=1 would drop nobody; give 2 or more, or 0 for none")
    _proxies(config)
    if c.truth not in ("train", "none") and not Path(c.truth).expanduser().is_file():
        raise UserError(f"search.truth={c.truth} is no file; allowed: train, none, or a JSON file of architecture: accuracy")


def _proxies(config: Config) -> None:
    c = config.search
    if wrong := next((p for p in c.proxy if p not in (*TRAINED, *FREE)), None):
        raise unknown("search.proxy", wrong, (*TRAINED, *FREE))
    if twice := next((p for p in c.proxy if c.proxy.count(p) > 1), None):
        raise UserError(f"search.proxy names {twice} twice; once is enough")
    if not c.proxy:
        raise UserError(f"search.proxy=[] names no proxy; give some of {', '.join((*TRAINED, *FREE))}")
    if c.halving and "distilled" not in c.proxy:
        raise UserError(f"search.halving={c.halving} begins with proxy=distilled; name that as well, or leave halving out")
    trained = [p for p in c.proxy if p in TRAINED]
    if trained and c.set is None:
        raise UserError(f"proxy={trained[0]} costs what training on a distilled set does: give set=<run folder, file or "
                        f"shipped name>, or proxy={','.join(FREE)} alone")  # fmt: skip
    if c.set == "":
        raise UserError("set= names no distilled set; give a run folder, a file or a shipped name")
