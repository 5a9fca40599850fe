"""Counting bytes: the peak of live tensors, and how many tasks fit a budget.

Design choices
- On a CPU PyTorch keeps no allocation statistics, and the process's resident size also holds what the allocator keeps back.
  So every tensor operation is watched: a storage is counted once when it first appears as a result, and discounted by
  a finalizer when it dies. What was there before is not counted, nor is scratch space inside an operation.
- A compiled function allocates behind the back of the watch: measure the plain one, an upper bound for it.
- On a GPU the caching allocator's own peak, above what was allocated at the start, is taken.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that records the peak of bytes in tensors that live at once and were made inside it.

    ``with LiveBytes("cpu") as live: work()``, then ``live.peak`` in bytes (0 before the first tensor). One use each.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        """Watch tensors on ``device``: "cpu" or a CUDA device."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device(device)
        self.live = 0
        self._peak = 0
        self._known = WeakIdKeyDictionary()
        self._floor = 0

    @property
    def peak(self) -> int:
        """Most bytes alive at once, above what was alive on entry."""
        return self._peak

    def __enter__(self) -> LiveBytes:
        """Start counting."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._floor = torch.cuda.memory_allocated(self.device)
        else:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        """Stop counting."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._peak = torch.cuda.max_memory_allocated(self.device) - self._floor
        else:
            super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count the storages it made."""
        for leaf in tree_iter((args, kwargs)):
            self._see(leaf, new=False)
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            self._see(leaf, new=True)
        return out

    def _see(self, leaf: Any, new: bool) -> None:
        if not isinstance(leaf, Tensor) or leaf.device != self.device or leaf.layout is not torch.strided:
            return
        storage = leaf.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        if new:
            size = storage.nbytes()
            self.live += size
            self._peak = max(self._peak, self.live)
            weakref.finalize(storage, self._died, size).atexit = False

    def _died(self, size: int) -> None:
        self.live -= size


def group_size(budget_bytes: float, bytes_one_task: float, tasks: int) -> int:
    """How many tasks to run at once: within the budget, at least 1, at most ``tasks``.

    budget_bytes: memory for one group.
    bytes_one_task: measured peak of one task.
    tasks: tasks to be cut into groups of this fixed size.
    Of the sizes that need as few groups as the largest that fits, the smallest: the last group then has least to pad.
    Raises ValueError for tasks < 1 or a task of no size.
    """
    if tasks < 1 or bytes_one_task <= 0:
        raise ValueError(f"need tasks >= 1 and bytes_one_task > 0; got {tasks=}, {bytes_one_task=}")
    largest = max(1, min(tasks, int(budget_bytes // bytes_one_task)))
    return math.ceil(tasks / math.ceil(tasks / largest))
