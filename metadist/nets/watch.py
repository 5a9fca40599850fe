"""Watching a module run: which layer is at work, on what, and whether it draws random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle


def first_line(error: BaseException) -> str:
    """The first sentence of an error, at most 160 characters."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line if len(line) <= 160 else f"{line[:157]}..."


@dataclass
class Call:
    """One layer at work: its name, itself, what it was given, and the generators' states before."""

    name: str
    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    before: list[Any]


def describe(call: Call) -> str:
    """The layer of a call, for a message."""
    return named(call.name, call.layer)


def named(name: str, module: nn.Module) -> str:
    """A layer by its place in the net and its type, for a message."""
    return f"layer {name} ({type(module).__name__})" if name else f"the net itself ({type(module).__name__})"


class Watch:
    """Hooks on every layer: who is running, who has finished on what, and who drew random numbers first."""

    def __init__(self, module: nn.Module, draws: bool = False) -> None:
        """Watches ``module`` inside ``with watch():``; its draws only on request: generators can't be read inside vmap."""
        self._state = _generators if draws else list
        self.running: list[Call] = []
        self.finished: list[Call] = []
        self.drawn: Call | None = None
        self._module = module

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept_args, kept_kwargs = tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, (args, kwargs))
            self.running.append(Call(name, layer, kept_args, kept_kwargs, self._state()))

        return hook

    def _leave(self, layer: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        call = self.running.pop()
        self.finished.append(call)
        if self.drawn is None and call.before != self._state():
            self.drawn = call

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Puts the hooks on, and takes them off whatever happens."""
        handles: list[RemovableHandle] = []
        for name, module in self._module.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _generators() -> list[Any]:
    """The state of every global generator a layer may draw from."""
    states: list[Any] = [torch.get_rng_state().numpy().tobytes(), random.getstate()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return states


@contextmanager
def same_generators() -> Iterator[None]:
    """Puts the global generators back to where they were."""
    state = random.getstate()
    try:
        # The current GPU's generator only: of several, fork_rng would save each, and warn.
        at_work = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if at_work else []):
            yield
    finally:
        random.setstate(state)
