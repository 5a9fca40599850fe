"""Small sets made of real images, of the same number as the distilled ones: what distillation has to beat.

Design choices
- Work is per class, in the normalised space that learners see.
- Image i has class i mod classes, so that any batch of consecutive images is as balanced as the distilled batches are.
- k-means gives the centroids themselves (the images a set of this size is free to choose), not the nearest real images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from metadist import draw, errors
from metadist.data.splits import Split
from metadist.errors import UserError


def baseline(kind: str, split: Split, classes: int, ipc: int, seed: int) -> tuple[Tensor, Tensor]:
    """(images [classes * ipc, C, H, W], labels int64 [classes * ipc]) on the split's device, image i of class i mod classes.

    kind: random (without replacement) | class_mean (the mean image of the class, ipc times) | kmeans (centroids) |
        kcenter (greedy farthest-first real images).
    ipc: images per class.
    seed: of the draws; the same seed gives the same set.
    Raises UserError if the kind is unknown or a class has fewer than ipc images.
    """
    if kind not in _KINDS:
        raise errors.unknown("baseline", kind, _KINDS)
    chosen = []
    for c in range(classes):
        members = split.x[split.y == c]
        if not 1 <= ipc <= len(members):
            raise UserError(
                f"ipc={ipc} is not possible for baseline {kind}: class {c} has {len(members)} images (1 to that many)"
            )
        chosen.append(_KINDS[kind](members, ipc, draw.key(seed, f"baseline {kind}", 0, c)))
    labels = torch.arange(classes, device=split.y.device).repeat(ipc)
    return torch.stack(chosen, dim=1).flatten(0, 1), labels


def _random(x: Tensor, k: int, key: Tensor) -> Tensor:
    return x[draw.permutation(key, len(x))[:k].to(x.device)]


def _class_mean(x: Tensor, k: int, key: Tensor) -> Tensor:
    return x.mean(0).expand(k, *x.shape[1:])


def _kmeans(x: Tensor, k: int, key: Tensor) -> Tensor:
    """Centroids of Lloyd's algorithm from k-means++ (scikit-learn, on the CPU)."""
    from sklearn.cluster import KMeans  # two seconds that other sets do without

    seed = int(draw.bits(key, 1).item())
    # On several threads scikit-learn adds up in the order they happen to finish.
    with threadpool_limits(1):
        centres = KMeans(n_clusters=k, n_init=1, random_state=seed).fit(x.flatten(1).cpu().numpy()).cluster_centers_
    return torch.from_numpy(centres).to(x).reshape(k, *x.shape[1:])


def _kcenter(x: Tensor, k: int, key: Tensor) -> Tensor:
    """Farthest-first traversal (Gonzalez 1985) from a drawn image: at most twice the best possible covering radius."""
    flat = x.flatten(1)
    centres = [int(draw.integers(key, (1,), len(x)).item())]
    distance = (flat - flat[centres[0]]).square().sum(1)
    while len(centres) < k:
        centres.append(int(distance.argmax().item()))
        distance = torch.minimum(distance, (flat - flat[centres[-1]]).square().sum(1))
    return x[torch.tensor(centres, device=x.device)]


_KINDS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "random": _random,
    "class_mean": _class_mean,
    "kmeans": _kmeans,
    "kcenter": _kcenter,
}
KINDS = tuple(_KINDS)
