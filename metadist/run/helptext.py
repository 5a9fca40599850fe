"""What ``launch/local.py --help`` prints: made from the files of ``configs/`` and the comments of ``metadist/config.py``.

Nothing is written twice: a method's line is its file's first comment, a preset's cost is in its header, a key's meaning is the
comment beside its default.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import tokenize
from collections.abc import Iterator
from io import StringIO
from typing import Any

from metadist import config as config_module
from metadist import config_machine, config_search, config_train, config_trajectory, identity
from metadist.run.compose import compose
from metadist.run.overrides import config_dir, groups

USAGE = """usage: python launch/local.py [-m] [--cfg] [key=value ...]

  python launch/local.py workers=2                            the quick main job
  python launch/local.py preset=mnist_random workers=2 run_dir=runs/x
  python launch/local.py -m seed=1,2,3 method=dd_fixed_init,dd_random_init   a sweep: every combination, one table at the end
  python launch/local.py preset=mnist_random smoke=true       the same code in seconds
  python launch/local.py --cfg net=convnet net.width=64       print the resolved configuration, run nothing

The same command on a run folder resumes it. Keys given here beat a preset's, which beat its method's, data set's and network's.
`python launch/runs.py` lists and compares run folders."""

FIELDS = ("source", "scale", "cost", "experts", "command", "expect")


def header(group: str, option: str) -> dict[str, str]:
    """The comment block on top of a configuration file: {"title": ..., "source": ..., "cost": ..., ...}."""
    out = {"title": ""}
    for line in (config_dir() / group / f"{option}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("#").strip()
        if text.startswith("@"):
            continue
        found = re.match(rf"({'|'.join(FIELDS)}):\s*(.*)", text)
        key, value = (found[1], found[2]) if found else ("title", text)
        out[key] = f"{out.get(key, '')} {value}".strip()
    return out


def help_text() -> str:
    """The whole help, ready to print."""
    parts = [USAGE]
    for group, title in (
        ("method", "methods"),
        ("data", "data sets"),
        ("net", "networks"),
        ("exchange", "exchanges"),
        ("cluster", "places for launch/slurm.py"),
    ):
        width = max(len(o) for o in groups()[group])
        lines = [f"  {o.ljust(width)}  {header(group, o)['title']}" for o in groups()[group]]
        parts.append("\n".join([f"{title} ({group}=...)", *lines]))
    parts.append("\n".join(["presets (preset=...; smoke=true for a few seconds)", *_presets()]))
    parts.append("\n".join(["keys: value without a preset, meaning", *_keys()]))
    return "\n\n".join(parts)


def _presets() -> Iterator[str]:
    for option in groups()["preset"]:
        found = header("preset", option)
        yield f"  {option}: {found['title']}"
        yield from (f"      {field}: {found[field]}" for field in FIELDS if field in found)


def _keys() -> Iterator[str]:
    """One line a key: sections first in the order of Config, then the keys of the top level."""
    classes, meanings = dict[str, ast.ClassDef](), dict[str, str]()
    for module in (config_machine, config_search, config_train, config_trajectory, config_module):
        source = inspect.getsource(module)
        tokens = tokenize.generate_tokens(StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        found = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
        meanings |= {f"{c}.{n}": comments.get(i, "") for c, node in found.items() for n, _, i in _fields(node)}
        classes |= found
    defaults = identity.flatten(compose())
    top: list[str] = []
    for name, kind, _ in _fields(classes["Config"]):
        if kind not in classes:
            top.append(_line(name, defaults, meanings[f"Config.{name}"]))
            continue
        yield f"  {name}: {(ast.get_docstring(classes[kind]) or '').splitlines()[0]}"
        for leaf, of, _ in _fields(classes[kind]):
            key, meaning = f"{name}.{leaf}", meanings[f"{kind}.{leaf}"]
            # A section inside a section has the keys of its kind's own: teacher.net those of net.
            yield f"    {key}.*".ljust(38) + f"  {meaning}" if of in classes else _line(key, defaults, meaning)
    yield from ["  without a section:", *top]


def _fields(node: ast.ClassDef) -> list[tuple[str, str, int]]:
    """Name, type and line of every field of a dataclass."""
    items = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return [(ast.unparse(i.target), ast.unparse(i.annotation), i.lineno) for i in items]


def _line(key: str, defaults: dict[str, Any], meaning: str) -> str:
    value = defaults[key]
    shown = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return f"    {key}={shown}".ljust(38) + f"  {meaning}"
