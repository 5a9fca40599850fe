"""How a pure function of fixed shapes is executed: as it stands, compiled, or captured in a CUDA graph.

Compilation needs a C++ compiler on a CPU, a C compiler on a GPU (Triton's launchers), and Python's headers for either;
``compiler_at_hand`` asks for them. Both ways of execution give the same numbers as
the plain one in float64 (tested), up to the rounding of another order of summation.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_SHAPES = 64  # a function is compiled for


def compiler_at_hand(kind: str = "cpu") -> bool:
    """Whether what ``torch.compile`` would use is on this machine. kind: "cpu" | "cuda", of the device."""
    if kind == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and any(shutil.which(name) is not None for name in names)


def accelerate(function: Callable[..., Any], compile: bool, graph: bool) -> Callable[..., Any]:
    """``function``, compiled and captured as asked. Capture applies where its tensors lie on a GPU."""
    fast: Any = function
    if compile:
        import torch._dynamo.config as limits  # ~1 s to import

        # Each number of tasks or networks is a shape of its own; at the limit of 8 a whole-graph compilation is an error.
        limits.recompile_limit = max(limits.recompile_limit, _SHAPES)
        fast = torch.compile(function, fullgraph=True, dynamic=False)
    return Captured(fast) if graph else fast


def lowered(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products inside are of bfloat16 where precision is "bf16"; of other precisions nothing is changed here."""
    if precision != "bf16":
        return nullcontext()
    # No cache of lowered weights: it would outlive a level of torch.func, or the recording of a CUDA graph.
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


class Captured:
    """A function of tensors recorded in a CUDA graph at its first call and replayed from then on.

    Every argument is a tree of tensors of fixed shapes on one GPU; so is the result. Each signature (shapes, dtypes) gets a
    graph of its own. The function must not synchronise with the host. On a CPU the function is simply called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        """Record nothing yet."""
        self.function = function
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]] = {}

    def __call__(self, *args: Any) -> Any:
        """Replay with these arguments; the result is a fresh copy, safe to keep."""
        leaves, spec = tree_flatten(args)
        if not leaves or not leaves[0].is_cuda:
            return self.function(*args)
        signature = (spec, *((leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in leaves))
        if signature not in self._graphs:
            self._graphs[signature] = self._capture(leaves, spec)
        graph, slots, out = self._graphs[signature]
        for slot, leaf in zip(slots, leaves, strict=True):
            slot.data.copy_(leaf.detach())
        graph.replay()
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, out)

    def _capture(self, leaves: list[Tensor], spec: Any) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Any]:
        slots = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
        args = tree_unflatten(slots, spec)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            # Compilation, autotuning and library handles happen here, where the host may be waited for.
            for _ in range(3):
                self.function(*args)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.function(*args)
        return graph, slots, out
