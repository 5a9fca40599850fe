"""Run folders read for people: one row each, and several side by side.

Design choices
- Only config.json, summary.json and the names of checkpoints are read: no tensor, no code, so a folder of any version,
  running or broken, can be listed.
- Accuracies are fractions in summary.json and percent on the screen.

    python launch/runs.py                      every folder under runs/
    python launch/runs.py path/to/run other/   these (or the run folders inside them)
    python launch/runs.py compare=a,b          differences of identity, figures side by side
    python launch/runs.py json=true            for machines; goes with both
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metadist.errors import UserError
from metadist.identity import FREE, is_circumstance
from metadist.run.table import table
from metadist.store import newest_step

USAGE = "usage: python launch/runs.py [folder ...] [compare=<run>,<run>] [json=true]"


@dataclass(frozen=True)
class Row:
    """What a run folder says of itself. Accuracies are fractions; None: not there (yet)."""

    run: str
    method: str
    data: str
    net: str
    step: int
    steps: int
    accuracy: float | None
    sd: float | None
    valid_accuracy: float | None
    baseline: float | None
    minutes: float | None
    date: str
    finished: bool

    @property
    def figures(self) -> tuple[str, str, str]:
        """Test accuracy +- sd, random real images' accuracy, minutes, as cells of a table."""
        minutes = "-" if self.minutes is None else f"{self.minutes:.1f}"
        return percent(self.accuracy, self.sd), percent(self.baseline), minutes


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none. UserError if it is broken."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read ({e}); restore or remove it") from None
    return found if isinstance(found, dict) else {}


def read(folder: Path) -> Row:
    """The row of one run folder."""
    config, summary = _leaves(read_json(folder / "config.json")), read_json(folder / "summary.json")
    step = max(newest_step(folder / "checkpoints"), int(summary.get("steps", 0)))
    test, random = _part(summary, "test"), _part(_part(summary, "baselines"), "random")
    steps = int(config.get("steps", 0))
    return Row(
        run=str(folder),
        method=str(config.get("method.name", "-")),
        data=str(config.get("data.name", "-")),
        net=str(config.get("net.name", "-")),
        step=step,
        steps=steps,
        accuracy=test.get("mean"),
        sd=test.get("sd"),
        valid_accuracy=summary.get("valid_accuracy"),
        baseline=random.get("mean"),
        minutes=summary.get("minutes"),
        date=_date(folder),
        finished=int(summary.get("steps", -1)) >= steps,
    )


def _part(node: dict[str, Any], key: str) -> dict[str, Any]:
    found = node.get(key)
    return found if isinstance(found, dict) else {}


def _leaves(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and f"{prefix}{key}" not in FREE
        out |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def _date(folder: Path) -> str:
    places = [folder / "summary.json", folder / "checkpoints", folder / "config.json"]
    seconds = next((p.stat().st_mtime for p in places if p.exists()), 0.0)
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def find(places: Sequence[str]) -> list[Path]:
    """Run folders among ``places`` and directly inside them. UserError for a place that is none and holds none."""
    found: list[Path] = []
    for place in (Path(p) for p in places):
        inside = [place] if (place / "config.json").is_file() else sorted(p.parent for p in place.glob("*/config.json"))
        if not inside:
            raise UserError(f"{place} is no run folder and holds none; a run folder has a config.json (default place: runs/)")
        found += inside
    return list(dict.fromkeys(found))


def percent(mean: float | None, sd: float | None = None) -> str:
    """A fraction as "79.5 +- 1.2"; "-" for none."""
    if mean is None:
        return "-"
    return f"{100 * mean:.2f}" if sd is None else f"{100 * mean:.2f} +- {100 * sd:.2f}"


def show(rows: Sequence[Row]) -> str:
    """The table of several runs."""
    header = ("run", "method", "data", "net", "step", "accuracy %", "random real %", "minutes", "date", "finished")

    def cells(r: Row) -> tuple[str, ...]:
        return r.run, r.method, r.data, r.net, f"{r.step}/{r.steps}", *r.figures, r.date, "yes" if r.finished else "no"

    return table(header, [cells(r) for r in rows])


def differences(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Every key of identity in which the runs differ, with each run's value."""
    configs = [_leaves(read_json(f / "config.json")) for f in folders]
    names = sorted({k for c in configs for k in c if not is_circumstance(k)})
    values = {k: [c.get(k) for c in configs] for k in names}
    return {k: v for k, v in values.items() if any(x != v[0] for x in v)}


def figures(folder: Path) -> dict[str, Any]:
    """Every number in summary.json by its dotted name."""
    leaves = _leaves(read_json(folder / "summary.json"))
    return {k: v for k, v in leaves.items() if isinstance(v, int | float)}


def side_by_side(folders: Sequence[Path]) -> str:
    """Two tables, one column a run: what differs in identity, then every figure of summary.json."""
    names = [str(f) for f in folders]
    changed = [(k, *(str(x) for x in v)) for k, v in differences(folders).items()]
    found = [figures(f) for f in folders]
    keys = sorted({k for f in found for k in f})
    numbers = [(k, *(f"{f[k]:.6g}" if k in f else "-" for f in found)) for k in keys]
    first = table(("identity", *names), changed) if changed else "identity: no difference"
    return f"{first}\n\n{table(('figure', *names), numbers) if numbers else 'figures: none yet'}"


def main(argv: Sequence[str]) -> int:
    """List or compare run folders (USAGE); returns 0. Raises UserError for a wrong word or place."""
    options = dict(word.split("=", 1) for word in argv if re.match(r"(compare|json)=", word))
    words = [word for word in argv if not re.match(r"(compare|json)=", word)]
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    if bad := next((w for w in words if w.startswith("-") or ("=" in w and not Path(w).exists())), None):
        raise UserError(f"{bad} is unknown; {USAGE}")
    if options.get("json", "false") not in ("true", "false"):
        raise UserError(f"json={options['json']} is neither true nor false; {USAGE}")
    as_json = options.get("json") == "true"
    return _compare(options["compare"], words, as_json) if "compare" in options else _list(words, as_json)


def _compare(given: str, words: Sequence[str], as_json: bool) -> int:
    folders = [Path(p) for p in given.split(",") if p]
    if len(folders) < 2 or words:
        raise UserError(f"compare={given} takes two run folders or more, and no other folder beside; {USAGE}")
    if missing := next((f for f in folders if not (f / "config.json").is_file()), None):
        raise UserError(f"{missing} is no run folder (it has no config.json); python launch/runs.py lists those under runs/")
    runs = [asdict(read(f)) | {"figures": figures(f)} for f in folders]
    print(json.dumps({"identity": differences(folders), "runs": runs}, indent=1) if as_json else side_by_side(folders))
    return 0


def _list(words: Sequence[str], as_json: bool) -> int:
    default = Path("runs")
    nothing = not words and not any(default.glob("*/config.json"))
    rows = sorted((read(f) for f in ([] if nothing else find(words or [str(default)]))), key=lambda r: r.date)
    if as_json:
        print(json.dumps([asdict(r) for r in rows], indent=1))
    else:
        print(show(rows) if rows else f"no runs yet under {default.absolute()}; python launch/local.py makes one")
    return 0
