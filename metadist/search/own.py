"""A user's own space of architectures by import path: search.space=package.module.Space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

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
    Raises UserError where it can't be imported or called, makes something else, or two architectures have one key.
    """
    if "." not in target:
        raise unknown("search.space", target, (*names, "package.module.Space"))
    make = resolve(target, "search.space")
    try:
        made = make()
        missing = [name for name in _WANTED if not callable(getattr(made, name, None))]
        keys = [] if missing else [made.key(i) for i in range(len(made))]
    except Exception as e:  # a user's class may fail in any way
        raise UserError(f"search.space={target} can't be made: {type(e).__name__}: {first_line(e)}") from e
    if missing:
        raise UserError(f"search.space={target} makes a {type(made).__name__} without {', '.join(missing)}; a space has "
                        f"{', '.join(_WANTED)}")  # fmt: skip
    _judge(target, keys)
    if not isinstance(getattr(made, "name", None), str):
        try:
            made.name = target.rpartition(".")[2]
        except Exception as e:  # a frozen dataclass
            raise UserError(
                f"search.space={target} has no name and can't be given one; write name = 'mine' in its class"
            ) from e
    return cast("Space", made)


def _judge(target: str, keys: Sequence[Any]) -> None:
    """Raises UserError unless there are keys, all of them texts and no two the same: results are told apart by them."""
    if not keys:
        raise UserError(f"search.space={target} is empty; a space holds one architecture at least")
    first: dict[Any, int] = {}
    for i, key in enumerate(keys):
        if not isinstance(key, str):
            raise UserError(f"search.space={target}: the key of architecture {i} is a {type(key).__name__}; it must be a text")
        if first.setdefault(key, i) != i:
            raise UserError(f"search.space={target}: architectures {first[key]} and {i} are both {key!r}; keys must differ")
