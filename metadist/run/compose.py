"""Hydra overrides -> a validated ``metadist.config.Config``. Programs and tests come through here; nothing else touches Hydra.

Design choices
- Hydra's compose API with the dataclasses of ``metadist.config`` as typed schema: no working folders, no logging set-up.
- ``smoke=true`` composes twice: the preset's ``smoke_overrides`` go in front of the user's own words, which beat them.
- Every mistake leaves as one UserError; no exception of Hydra or OmegaConf escapes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metadist.config import Config
from metadist.errors import UserError
from metadist.run.overrides import config_dir, keys, kind_of, parse, plain
from metadist.run.unread import unread
from metadist.run.validate import validate


@dataclass
class Schema(Config):
    """What the files of ``configs/`` may hold: a Config, a preset's few-second version, and the program a preset is for."""

    smoke_overrides: list[str] = field(default_factory=list)
    program: str = "local"  # local: a distillation | experts | search: that launcher alone


Place = Callable[[Config], None]
Judge = Callable[[Config, Sequence[str]], None]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its overrides, the swept keys among them with their values, and the Config they make."""

    overrides: tuple[str, ...]
    swept: dict[str, str]
    config: Config


@functools.cache
def _store_schema() -> None:  # once a process: typing the whole schema is a fifth of a composition
    ConfigStore.instance().store(name="schema", node=Schema)


@contextmanager
def _hydra() -> Iterator[GlobalHydra]:
    _store_schema()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield GlobalHydra.instance()


def compose(
    overrides: Sequence[str] = (), place: Place | None = None, judge: Judge | None = None, program: str | None = None
) -> Config:
    """The Config of ``preset=mnist_random steps=10 ...``.

    overrides: words of Hydra's grammar, one value each. place: sets what another machine decides, and judges it; the run is
    then not for this machine. judge: refuses the words that another program than a run's would not read; None: a run.
    program: whose presets alone are taken; None: a run's, with a judge those of any.
    Raises UserError (one line) for an unknown key, option or value, a wrong type, a wrong form, or a Config that
    ``metadist.run.validate`` refuses.
    """
    with _hydra() as hydra:
        parsed = parse(overrides, hydra.config_loader())
        for override in parsed:
            if override.is_sweep_override():
                mend = "put -m in front to run each of them" if judge is None else "one is taken here; start once for each"
                raise UserError(f"{override.input_line} lists several values: {mend}")
        return _config(plain(parsed), place=place, judge=judge, program=program)


def expand(overrides: Sequence[str], place: Place | None = None) -> list[Point]:
    """The runs of a sweep, all composed and validated: the product of every ``key=a,b`` in the order given.

    Raises UserError as ``compose`` does, before any of them starts.
    """
    with _hydra() as hydra:
        parsed = parse(overrides, hydra.config_loader())
        swept = [o for o in parsed if o.is_sweep_override()]
        fixed = [o for o in parsed if not o.is_sweep_override()]
        values = [list(o.sweep_string_iterator()) for o in swept]
        for override, found in zip(swept, values):
            if not found:
                raise UserError(f"{override.input_line} names no value; list them: {override.get_key_element()}=a,b")
        return [_point(fixed, swept, chosen, place) for chosen in itertools.product(*values)]


def _point(fixed: Sequence[Override], swept: Sequence[Override], values: Sequence[str], place: Place | None) -> Point:
    chosen = {o.get_key_element(): v for o, v in zip(swept, values)}
    words = [str(o.input_line) for o in fixed] + [f"{k}={v}" for k, v in chosen.items()]
    # What one run of a sweep does not read, another may.
    return Point(tuple(words), chosen, _config(plain(parse(words)), not swept, place))


def _config(
    words: list[str],
    strict: bool = True,
    place: Place | None = None,
    judge: Judge | None = None,
    program: str | None = None,
) -> Config:
    schema = _compose(words)
    wanted = program or ("local" if judge is None else schema.program)
    preset = next((w for w in words if w.startswith("preset=")), None)
    if preset is not None and schema.program != wanted:
        what = "makes no distilled set" if wanted == "local" else f"is nothing for launch/{wanted}.py"
        raise UserError(f"{preset} is for python launch/{schema.program}.py; it {what}")
    if schema.smoke:
        schema = _compose([*schema.smoke_overrides, *words])
    config = Config(**{f.name: getattr(schema, f.name) for f in dataclasses.fields(Config)})
    if place is not None:
        place(config)
    validate(config, here=place is None)
    if judge is not None:
        judge(config, [word.lstrip("+").partition("=")[0] for word in words])
        return config
    ignored = unread(config, slurm=place is not None) if strict else {}
    for key in (word.lstrip("+").partition("=")[0] for word in words):
        if key in ignored:
            raise UserError(f"{key} is not read by this run: it belongs to {ignored[key]}; leave it out, or give that as well")
    return config


def _compose(words: list[str]) -> Schema:
    try:
        made = OmegaConf.to_object(hydra_compose("config", overrides=words))
    except (HydraException, OmegaConfBaseException) as e:
        raise _translated(e) from None
    assert isinstance(made, Schema)
    return made


def _translated(error: Exception) -> UserError:
    """One line out of a chain of Hydra and OmegaConf exceptions."""
    text = str(error).split("\n")[0]
    found = re.match(r"Error merging override \+*([^=]+)=(.*)", text)
    if found and found[1] in keys():
        return UserError(f"{found[1]}={found[2]} is not {kind_of(found[1])}")
    cause = error.__cause__
    detail = f": {str(cause).split(chr(10))[0]}" if cause is not None else ""
    return UserError(f"{text}{detail}")
