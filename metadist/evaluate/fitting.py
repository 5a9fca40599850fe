"""Does this set fit these data and this net? And the data as the set's networks see them."""

from __future__ import annotations

import dataclasses

import torch

from metadist.data import Data, Split
from metadist.data.normalization import Normalization
from metadist.errors import UserError
from metadist.synthetic.distilled import DistilledSet


def check(dset: DistilledSet, data: Data) -> None:
    """Raises UserError if the set was made for other images or another number of classes than ``data`` has."""
    made, given = tuple(dset.images.shape[1:]), tuple(data.train.x.shape[1:])
    if made != given:
        mend = f"; data.size={made[-1]} resizes them" if made[0] == given[0] else "; give data= of the set's kind"
        raise UserError(f"the set was made for images of {_text(made)}, data={data.name} has {_text(given)}{mend}")
    if len(dset.classes) != len(data.classes):
        raise UserError(
            f"the set has {len(dset.classes)} classes, data={data.name} has {len(data.classes)}; give data= of the same classes"
        )


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def aligned(data: Data, normalization: Normalization) -> Data:
    """``data`` under the normalization of a set: unchanged if it is its own, else inverted and applied anew."""
    own, other = data.normalization.tensors(), normalization.tensors()
    if own.keys() == other.keys() and all(torch.equal(own[k], other[k]) for k in own):
        return data

    def again(split: Split) -> Split:
        parts = [normalization.apply(data.normalization.invert(x)) for x in torch.split(split.x, 4096)]
        return Split(torch.cat(parts), split.y)

    train, valid, test = (again(split) for split in (data.train, data.valid, data.test))
    return dataclasses.replace(data, train=train, valid=valid, test=test, normalization=normalization)
