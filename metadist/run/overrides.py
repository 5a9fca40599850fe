"""Command-line words checked before Hydra sees them, so that a mistake is answered with names and not with a traceback.

Design choices
- Hydra's own grammar is used for parsing and for sweeps; only the check of names and the wording of errors are ours.
- Groups and their options are the folders and files of ``configs/``; keys are the fields of ``metadist.config.Config``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from metadist.config import Config
from metadist.errors import UserError, unknown
from metadist.identity import FREE

KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list such as [1,2,3]",
    dict: "keys",
}


@functools.cache
def config_dir() -> Path:
    """The folder of configurations: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    places = (package / "configs", package.parent / "configs")
    for place in places:
        if (place / "config.yaml").is_file():
            return place
    raise UserError(f"no configs/config.yaml in {places[0].parent} or {places[1].parent}: install metadist again")


@functools.cache
def groups() -> dict[str, tuple[str, ...]]:
    """Every group and its options."""
    folders = sorted(p for p in config_dir().iterdir() if p.is_dir() and p.name != "compare")  # that one is no Hydra group
    return {p.name: tuple(sorted(f.stem for f in p.glob("*.yaml"))) for p in folders}


@functools.cache
def keys() -> dict[str, Any]:
    """Every leaf of Config by its dotted name, and the type it takes."""

    def walk(prefix: str, kind: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(kind).items():
            out |= walk(f"{prefix}{name}.", hint) if dataclasses.is_dataclass(hint) else {f"{prefix}{name}": hint}
        return out

    return walk("", Config)


def kind_of(key: str) -> str:
    """What a key takes, in words."""
    hint = keys().get(key, str)
    parts = [t for t in typing.get_args(hint) if t is not type(None)] if type(None) in typing.get_args(hint) else [hint]
    words = KINDS[typing.get_origin(parts[0]) or parts[0]]
    return words if parts == [hint] else f"{words} or null"


def nearest(key: str, count: int = 3) -> list[str]:
    """The known keys most like a wrong one: all of the same last word, then those spelt alike, ``count`` in all or more."""
    known = [*keys(), *groups()]
    last = key.split(".")[-1]
    same = [k for k in known if k.split(".")[-1] == last]
    alike = difflib.get_close_matches(key, known, n=count, cutoff=0.6)
    ends = difflib.get_close_matches(last, sorted({k.split(".")[-1] for k in known}), n=count, cutoff=0.7)
    by_end = [k for end in ends for k in known if k.split(".")[-1] == end]
    return list(dict.fromkeys(same + alike + by_end))[: max(count, len(same))]


def parse(words: Sequence[str], config_loader: Any = None) -> list[Override]:
    """Parsed and checked overrides. UserError for a wrong form, an unknown key or option, or a group given twice."""
    parsed = [_parse_one(word, config_loader) for word in words]
    chosen: dict[str, str] = {}
    for override in parsed:
        key = override.key_or_group
        if key in groups() and key in chosen:
            raise UserError(f"{key} is given twice ({chosen[key]} and {override.input_line}): leave one")
        chosen[key] = str(override.input_line)
        _check(override)
    return parsed


def _parse_one(word: str, config_loader: Any) -> Override:
    try:
        return OverridesParser.create(config_loader).parse_overrides([word])[0]
    except HydraException as e:
        if "=" not in word:
            raise UserError(f"{word!r} is not of the form key=value (flags: -m, --cfg, --help)") from None
        why = " ".join(str(e).split("\n")[0].split())
        raise UserError(f"{word!r} cannot be read ({why}): quote special characters, key='\"value\"'") from None


def _check(override: Override) -> None:
    key, line = override.key_or_group, override.input_line
    if override.is_interval_sweep():
        raise UserError(f"{line}: an interval names no values; list them, or use range(a,b,step)")
    if key in groups():
        return _check_option(override)
    if not (key in keys() or _free(key)):
        inside = [k for k in keys() if k.startswith(f"{key}.")]
        near = inside[:6] if inside else nearest(key)
        what = f"{line}: {key} is a section, not a key" if inside else f"{line}: there is no key {key!r}"
        raise UserError(f"{what}; nearest: {', '.join(near)}" if near else f"{what}; --help lists all keys")
    if override.is_add() or override.is_force_add() or override.is_delete() or override.package is not None:
        raise UserError(f"{line}: only the plain form is taken: {key}=<value>")
    return None


def _check_option(override: Override) -> None:
    group, options = override.key_or_group, groups()[override.key_or_group]
    if override.is_add() or override.is_force_add() or override.is_delete() or override.package is not None:
        raise UserError(f"{override.input_line}: only the plain form is taken: {group}=<{' | '.join(options)}>")
    for name in _values(override):
        if name not in options and not (group == "preset" and name in ("None", "null")):
            raise unknown(group, name, options)


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        # Every value is one word here: option names hold no quotes.
        return [str(v).strip("'\"") for v in override.sweep_string_iterator()]
    value = override.value()
    return [value.text if isinstance(value, QuotedString) else str(value)]


def _free(key: str) -> bool:
    """Whether it is inside of a leaf that holds keys of its own."""
    return any(key.startswith(f"{leaf}.") for leaf in FREE)


def plain(overrides: Sequence[Override]) -> list[str]:
    """The words as Hydra's compose takes them: keys inside a free leaf may be new, preset=null is left out."""
    lines = [(o, str(o.input_line)) for o in overrides if not (o.key_or_group == "preset" and o.value() is None)]
    return [f"++{line}" if o.key_or_group in FREE or _free(o.key_or_group) else line for o, line in lines]
