"""A user's own space of architectures by import path: search.space=package.module.Space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from metadist.errors import UserError, unknown
from metadist.nets.custom import resolve
from metadist.nets.watch import first_line

if TYPE_CHECKING:
    from metadist.search.space import Space

_WANTED = ("__len__", "key", "module")


def own(target: str, names: Sequence[str]) -> Space:
    """The space that ``target`` makes when it is called without arguments.

    target: import path of a class, or of a function, that makes an object with __len__(), key(index) and
        module(index, channels, size, classes); its name is the path's last part unless it has one.
    names: of the spaces that come with metadist.
    Raises UserError where it can't be imported or called, or makes something else.
    """
    if "." not in target:
        raise unknown("search.space", target, (*names, "package.module.Space"))
    make = resolve(target, "search.space")
    try:
        made = make()
        missing = [name for name in _WANTED if not callable(getattr(made, name, None))]
        count = 0 if missing else len(made)
    except Exception as e:  # a user's class may fail in any way
        raise UserError(f"search.space={target} can't be made: {type(e).__name__}: {first_line(e)}") from e
    if missing:
        raise UserError(f"search.space={target} makes a {type(made).__name__} without {', '.join(missing)}; a space has "
                        f"{', '.join(_WANTED)}")  # fmt: skip
    if count < 1:
        raise UserError(f"search.space={target} is empty; a space holds one architecture at least")
    if not isinstance(getattr(made, "name", None), str):
        made.name = target.rpartition(".")[2]
    return cast("Space", made)
