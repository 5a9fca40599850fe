"""The protocols that published figures were made by, as settings: a name stands for numbers, and each may be given anew.

Design choices
- dc and dsa: Zhao et al., arXiv 2006.05929, and Zhao and Bilen, arXiv 2102.08259; mtt: Cazenave et al., arXiv 2203.11932.
- Published accuracies are the best over evaluations on the test set while distilling; here the split that judges is used
  once, so ours are the lower of the two.
- Real images are trained on by the same protocol. A rate that was learned with the distilled images is no rate of theirs: with
  mtt theirs is chosen on validation, from that one and the published .01.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metadist.errors import UserError
from metadist.synthetic.distilled import DistilledSet

NAMES = ("dc", "dsa", "mtt")
RATE = 0.01  # of dc, dsa and of everything that has no learned rate
_COMMON: dict[str, Any] = {
    "nets": 20,
    "epochs": 1000,
    "optimizer": "momentum",
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "batch": 256,
    "augment": ("dsa",),
    "schedule": "half",
    "lr": (RATE,),
    "baselines": ("random",),
}
_MNIST = {"augment": ("dsa:crop_scale_rotate",)}  # dc augments no other data set


def settings(given: Mapping[str, Any], data: str, dset: DistilledSet) -> dict[str, Any]:
    """``given`` settings, filled up with the numbers of the published protocol that they name, if they do.

    given: keywords of ``Settings``; what is given is kept.
    data: the data set's name: dc trains 1,000 epochs with augmentation on MNIST, 300 without on others.
    dset: mtt trains at its learned rate, the mean where it has several.
    Raises UserError for mtt where the set's rates are Adam's.
    """
    name = next((p for p in given.get("protocol", ()) if p in NAMES), None)
    if name is None:
        return dict(given)
    numbers = dict(_COMMON)
    if name == "dc":
        numbers |= _MNIST if data == "mnist" else {"epochs": 300, "augment": ("none",)}
    if name == "mtt":
        numbers |= {"nets": 5, "schedule": "half_anew"}
        if "lr" not in given:
            numbers |= _learned(dset)
    return numbers | dict(given)


def _learned(dset: DistilledSet) -> dict[str, Any]:
    if dset.optimizer["kind"] == "adam":
        raise UserError("protocol=mtt trains by SGD at the set's learned rate, and this set's rates are Adam's; give lr=")
    rate = float(dset.lr.double().mean())
    return {"lr": (rate,), "baseline_lr": (rate, RATE)}
