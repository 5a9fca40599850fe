"""Meta-gradients: three differentiable operations on training, each with one second-order product in its backward pass.

- ``Inner.unroll``: training on a sequence of batches (reverse recursion; the states are all that is kept).
- ``inner_gradient``: the gradient of a training loss.
- ``fixed_point``: weights at a stationary point of a training loss.

Everything is a function of tensors: no data sets, files or ranks.
"""

from metadist.metagrad.implicit import SOLVERS, Solve, fixed_point
from metadist.metagrad.inner import Inner
from metadist.metagrad.matching import inner_gradient
from metadist.metagrad.memory import LiveBytes, group_size
from metadist.metagrad.mixed import FORMS, Batch, Loss, Mixed, gradients, mixed
from metadist.metagrad.optimizers import KINDS, Optimizer, State

__all__ = [
    "FORMS",
    "KINDS",
    "SOLVERS",
    "Batch",
    "Inner",
    "LiveBytes",
    "Loss",
    "Mixed",
    "Optimizer",
    "Solve",
    "State",
    "fixed_point",
    "gradients",
    "group_size",
    "inner_gradient",
    "mixed",
]
