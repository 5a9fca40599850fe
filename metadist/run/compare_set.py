"""A file of configs/compare/ with `kind: networks`: the runs it stands for, in the order in which they can be run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from metadist.config import Config
from metadist.errors import UserError
from metadist.run.compare import folder, last, truth
from metadist.run.compose import compose
from metadist.run.overrides import config_dir
from metadist.run.sweep import quoted

_OWN = ("preset", "out", "smoke", "json", "paths")
_REFERENCE = re.compile(r"@\{([^}]*)\}|@([\w.-]+)")


@dataclass(frozen=True)
class Row:
    """One run.

    words: of its command, references resolved. needs: the earlier runs it reads.
    at: its place in the picture. config: that of words.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    at: Mapping[str, Any]
    config: Config


@dataclass(frozen=True)
class Set:
    """A comparison: its rows, published figures by name, gaps to be recovered, axes of the picture."""

    name: str
    title: str
    rows: tuple[Row, ...]
    paper: Mapping[str, str]
    gaps: Mapping[str, Sequence[str]]
    plot: Mapping[str, str]


def is_networks(name: str) -> bool:
    """Whether a comparison is one of trained networks."""
    return _file(name).get("kind") == "networks"


def _file(name: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_object(OmegaConf.load(config_dir() / "compare" / f"{name}.yaml"))
    return dict(found)


def listed(found: Mapping[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """(name, words, place in the picture) of every run of a file: its runs, its grids, links of its chains, runs after them."""
    for name, words in (found.get("runs") or {}).items():
        yield name, words, {}
    grids = found.get("grid") or []
    for grid in grids if isinstance(grids, list) else [grids]:
        keys = list(grid["values"])
        for values in itertools.product(*grid["values"].values()):
            at = dict(zip(keys, values, strict=True))
            name = ", ".join(f"{k.split('.')[-1]} {v:g}" for k, v in at.items())
            yield grid.get("prefix", "") + name, [*grid["words"], *(f"{k}={v:g}" for k, v in at.items())], at
    if chains := found.get("chains"):
        yield from _links(chains)
    for name, words in (found.get("after") or {}).items():
        yield name, words, {}


def _all(found: Mapping[str, Any], smoke: bool) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """``listed``, with what runs have in common: first the methods that distil a set (`sets`), then the networks."""
    for part in (found.get("sets") or {}, found):
        for name, words, at in listed(part):
            yield name, [*part.get("common", []), *words, *(part["smoke"] if smoke else [])], at


def _links(chains: Mapping[str, Any]) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """Every link of every path, once: 10, 10-6, 10-6-2; the first of a path is a teacher trained alone."""
    seen = set()
    for path in chains["paths"]:
        for end in range(1, len(path) + 1):
            name = "-".join(map(str, path[:end]))
            if name in seen:
                continue
            seen.add(name)
            size = f"{chains['key']}={path[end - 1]}"
            before = "-".join(map(str, path[: end - 1]))
            words = [*chains["student"], f"kd.teachers=[@{before}]"] if before else list(chains["teacher"])
            yield name, [*words, size], {"path": path[:end]}


def _routes(given: str) -> list[list[int]]:
    """Paths of a chain from the word paths=[[10,6,2],[10,2]]."""
    try:
        found: Any = OmegaConf.to_object(OmegaConf.create(f"paths: {given}"))["paths"]  # type: ignore[index, call-overload]
    except (YAMLError, OmegaConfBaseException):
        found = None
    paths = found if isinstance(found, list) else []
    whole = all(isinstance(path, list) and len(path) > 1 and all(type(n) is int and n > 0 for n in path) for path in paths)
    if not paths or not whole:
        raise UserError(f"paths={given} is no list of chains; give sizes, the teacher first, such as paths=[[10,6,2],[10,2]]")
    return paths


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _compared(found: Mapping[str, Any]) -> set[str]:
    """The keys that runs of a file set differently: a word for all of them would leave the table's names untrue."""
    runs = [{_key(w): w.partition("=")[2] for w in words} for _, words, _ in _all(found, False)]
    return {key for run in runs for key in run if len({other.get(key) for other in runs}) > 1}


def _words_given(argv: Sequence[str], name: str, found: Mapping[str, Any]) -> list[str]:
    """Those that go to every run. Raises UserError for what the comparison sets itself."""
    given = [word for word in argv if word.partition("=")[0] not in _OWN]
    compared = _compared(found)
    if clash := next((key for word in given if (key := _key(word)) in compared), None):
        raise UserError(f"{clash} differs between the runs of {name}, which are named for it: leave it out")
    return given


def read(argv: Sequence[str], judge: Callable[[Sequence[str]], Config] = compose) -> tuple[Set, Path, bool]:
    """The comparison, where it goes, whether JSON is asked for. judge: words -> Config. UserError for what can't be run."""
    own = {k: v for k, _, v in (word.partition("=") for word in argv) if k in _OWN}
    if set_here := next((w.partition("=")[0] for w in argv if w.startswith(("steps=", "run_dir=", "budget_min="))), None):
        raise UserError(f"{set_here} is set by the comparison, for each run; leave it out")
    name = own["preset"]
    found = _file(name)
    if "paths" in own:
        if "chains" not in found:
            raise UserError(f"paths is for comparisons of chains; {name} has none: leave it out")
        found["chains"] |= {"paths": _routes(own["paths"])}
    smoke, as_json = truth("smoke", own), truth("json", own)
    place = Path(own.get("out") or f"runs/{name}{'-smoke' if smoke else ''}").expanduser().absolute()
    given = _words_given(argv, name, found)
    rows: list[Row] = []
    for run, mine, at in _all(found, smoke):
        needs = [a or b for word in mine for a, b in _REFERENCE.findall(word)]
        if unknown := [n for n in needs if n not in {r.name for r in rows}]:
            raise UserError(f"{name}, {run}: @{unknown[0]} is no run above it")
        own_words = (_REFERENCE.sub(lambda m: quoted(str(folder(place, m[1] or m[2]))), word) for word in mine)
        resolved = tuple(last(*own_words, *given))
        try:
            config = judge(resolved)
        except UserError as e:
            raise UserError(f"{name}, {run}: {e}") from None
        rows.append(Row(run, resolved, tuple(needs), at, config))
    made = Set(name, found["title"], tuple(rows), found.get("paper") or {}, found.get("gaps") or {}, found.get("plot") or {})
    return made, place, as_json
