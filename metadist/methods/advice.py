"""What teachers say of an image: their probabilities at a temperature, averaged; computed as images come, or kept.

The key of what is kept is (row of the training split, variant of its augmentation): the augmentation of a row is drawn from
these two alone, so a student sees the very image its teachers saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metadist.data.normalization import Normalization
from metadist.errors import UserError
from metadist.store.logits import Logits
from metadist.synthetic.network import Network

_BATCH = 500  # images shown to a teacher at once


class Advice:
    """Soft targets for S students.

    teachers: one file of networks each; all of their networks are asked.
    own: normalization of the images that students see.
    temperature: T.
    pair: student s asks network s of each file, not all of them.
    kept: where logits are kept; None: nowhere.
    """

    def __init__(
        self,
        teachers: Sequence[Network],
        own: Normalization,
        temperature: float,
        pair: bool,
        device: torch.device,
        kept: Logits | None = None,
    ) -> None:
        """Build the teachers' nets. Raises UserError for a net that a file may not name."""
        self.temperature, self.pair, self.kept = temperature, pair, kept
        self._teachers = [
            (t.learner(device), t.theta.to(device), t.buffers.to(device), _between(own, t.normalization)) for t in teachers
        ]
        self.sizes = [len(t) for t in teachers]

    @torch.no_grad()
    def logits(self, x: Tensor, network: int | None = None) -> Tensor:
        """What each network says of images x [n, C, H, W]: [n, R, K], file by file.

        network: of each file only this one.
        """
        out = []
        for learner, theta, buffers, view in self._teachers:
            seen = view(x).to(theta.dtype)
            for r in range(len(theta)) if network is None else (network,):
                parts = [learner.predict(theta[r], buffers[r], part) for part in torch.split(seen, _BATCH)]
                out.append(torch.cat(parts).to(x.dtype))
        return torch.stack(out, 1)

    @torch.no_grad()
    def soft(self, x: Tensor) -> Tensor:
        """Probabilities [S, n, K] for the images x [S, n, C, H, W] of S students."""
        if self.pair:
            z = torch.stack([self.logits(own, s) for s, own in enumerate(x)])
        else:
            flat = self.logits(x.flatten(0, 1))
            z = flat.view(*x.shape[:2], *flat.shape[1:])
        return self._mean(z)

    @torch.no_grad()
    def looked_up(self, rows: Tensor, variant: int, images: Callable[[], Tensor]) -> Tensor:
        """The same, of kept logits: rows int64 [S, n] of one variant; ``images`` makes all of that variant's [N, C, H, W]."""
        assert self.kept is not None
        table = self.kept.variant(variant, lambda: self.logits(images()))
        z = table[rows.cpu()].to(rows.device)
        if self.pair:
            files = torch.split(z, self.sizes, 2)
            z = torch.stack([torch.stack([part[s, :, s] for s in range(len(rows))]) for part in files], 2)
        return self._mean(z)

    def _mean(self, z: Tensor) -> Tensor:
        return torch.softmax(z / self.temperature, -1).mean(-2)


def _between(own: Normalization, theirs: Normalization) -> Callable[[Tensor], Tensor]:
    """Images as students see them -> as a teacher does."""
    a, b = own.tensors(), theirs.tensors()
    if a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a):
        return lambda x: x
    return lambda x: theirs.apply(own.invert(x))


def check(teacher: Network, name: str, channels: int, size: int, classes: Sequence[str], networks: int | None) -> None:
    """Raise UserError unless a teacher sees the same images and classes; networks: what pairing needs."""
    m = teacher.manifest
    theirs, ours = (m["channels"], m["size"], len(teacher.classes)), (channels, size, len(classes))
    if theirs != ours:
        text = ["{0}x{1}x{1} of {2} classes".format(*v) for v in (theirs, ours)]
        raise UserError(f"the teacher {name} sees images of {text[0]}, its student {text[1]}; train one on the student's data")
    if teacher.classes != tuple(classes):
        first = next((a, b) for a, b in zip(teacher.classes, classes) if a != b)
        raise UserError(f"the teacher {name} knows other classes than its student ({first[0]!r} where that has {first[1]!r}); "
                        "train one on the student's data")  # fmt: skip
    if networks is not None and len(teacher) != networks:
        has = f"{name} has {len(teacher)} networks"
        raise UserError(f"kd.pair=true wants as many teachers as students: {has}, train.networks={networks}")
