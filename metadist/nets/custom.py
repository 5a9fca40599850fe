"""A user's own module by import path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from metadist.errors import UserError
from metadist.nets.watch import first_line


def resolve(target: str, key: str = "net.target") -> Any:
    """What an import path names. key: for errors. Raises UserError where it can't be imported."""
    path, _, name = target.rpartition(".")
    if not path or not name:
        raise UserError(f"{key}={target} is not an import path: write package.module.Class")
    # Programs started as files do not see the folder they are started in; a user's module often lies there.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return getattr(importlib.import_module(path), name)
    except AttributeError as e:
        raise UserError(f"{key}={target}: module {path} has no {name}") from e
    except Exception as e:  # a user's module may fail in any way while it is imported
        raise UserError(f"{key}={target} can't be imported: {type(e).__name__}: {first_line(e)}") from e


def factory(target: str | None, kwargs: dict[str, Any]) -> Callable[[], nn.Module]:
    """A function that builds a new module ``target(**kwargs)``.

    target: import path of an ``nn.Module`` class, or of a function that returns one.
    Raises UserError where it can't be imported or called, or makes something else.
    """
    if not target:
        raise UserError("net.name=custom needs net.target=package.module.Class, the import path of an nn.Module")
    make = resolve(target)
    if not callable(make):
        raise UserError(
            f"net.target={target} is a {type(make).__name__}: give an nn.Module class or a function that returns one"
        )

    def build() -> nn.Module:
        try:
            module = make(**kwargs)
        except Exception as e:
            raise UserError(f"net.target={target} fails with net.kwargs={kwargs}: {type(e).__name__}: {first_line(e)}") from e
        if not isinstance(module, nn.Module):
            raise UserError(f"net.target={target} makes a {type(module).__name__}: it must make an nn.Module")
        return module

    return build
