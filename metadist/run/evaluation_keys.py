"""The words of `launch/evaluate.py`: `key=value`, typed by the dataclasses that use them."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metadist.config import DataConfig
from metadist.data import BASELINES
from metadist.errors import UserError, unknown
from metadist.evaluate.settings import Settings

USAGE = "usage: python launch/evaluate.py run=<run folder> | set=<name or file> [key=value ...]; --help lists the keys"


@dataclass(frozen=True)
class Words:
    """Keys that are no settings of the measurement."""

    run: str | None = None
    set: str | None = None
    out: str | None = None
    transfer: tuple[str, ...] = ()
    net: str | None = None
    data: str | None = None
    device: str | None = None
    threads: int = 0
    cache_dir: str | None = None
    json: bool = False
    check: str | None = None


def _value(key: str, text: str, kind: Any) -> Any:
    """``text`` as a value of the annotated type. Raises UserError if it is none."""
    if type(None) in typing.get_args(kind):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if text in ("null", "None"):
            return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text} is neither true nor false")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            raise UserError(f"{key}={text} is not {'an integer' if kind is int else 'a number'}") from None
    if kind is str:
        return text
    names = tuple(word for word in text.split(",") if word)
    if typing.get_args(kind)[:1] == (float,):
        return () if text in ("null", "None") else tuple(_value(key, word, float) for word in names)
    if key == "baselines":
        return BASELINES if names == ("all",) else () if names == ("none",) else names
    return () if key == "transfer" and names == ("none",) else names


def parse(argv: Sequence[str]) -> tuple[Words, dict[str, Any], dict[str, Any]]:
    """(words, settings, data keys) of `key=value` words. Raises UserError for an unknown key or a value of another type."""
    kinds = (typing.get_type_hints(Words), typing.get_type_hints(Settings), typing.get_type_hints(DataConfig))
    kinds = (kinds[0], kinds[1], {f"data.{k}": v for k, v in kinds[2].items() if k not in ("name", "augment")})
    found: tuple[dict[str, Any], ...] = ({}, {}, {})
    for word in argv:
        key, equals, text = word.partition("=")
        place = next((i for i, k in enumerate(kinds) if key in k), None)
        if not equals:
            raise UserError(f"{word} is not key=value; {USAGE}")
        if place is None:
            raise unknown("key", key, [k for kind in kinds for k in kind])
        found[place][key.removeprefix("data.")] = _value(key, text, kinds[place][key])
    return Words(**found[0]), found[1], found[2]
