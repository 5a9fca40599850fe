"""The command line of ``launch/local.py``: flags, one run or a sweep, exit status.

Exit status: the run's own, or that of ``metadist.run.guard``: 1 a fault on the way, 2 the user's mistake, one line for either.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from omegaconf import OmegaConf

from metadist.config import Config
from metadist.errors import unknown
from metadist.run.compose import compose
from metadist.run.guard import guarded
from metadist.run.helptext import help_text
from metadist.run.sweep import sweep

FLAGS = ("-h", "--help", "-m", "--multirun", "--cfg")


def start(config: Config) -> int:
    """Run one validated Config; its exit status."""
    if config.method.name == "lower_bound":
        return _demonstrate(config)
    from metadist.run.local import run

    return run(config)


def _demonstrate(config: Config) -> int:
    """method=lower_bound: in a run folder like any other, a finished one prints its result again."""
    from metadist.methods.lower_bound import demonstrate
    from metadist.run.folder import RunFolder

    folder = RunFolder.open(config)
    summary = folder.finished
    if summary is None:
        summary = {**demonstrate(folder.config, folder.path), "steps": config.steps}
        folder.write_summary(summary)
    print(summary.get("text", ""))
    return 0


def local(argv: Sequence[str]) -> int:
    """``launch/local.py``: see metadist.run.helptext.USAGE. Raises UserError and RunError."""
    flags = [word for word in argv if word.startswith("-")]
    words = [word for word in argv if not word.startswith("-")]
    for flag in flags:
        if flag not in FLAGS:
            raise unknown("flag", flag, FLAGS)
    if {"-h", "--help"} & set(flags):
        print(help_text())
        return 0
    if "--cfg" in flags:
        print(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(compose(words)))), end="")
        return 0
    if {"-m", "--multirun"} & set(flags):
        return sweep(words)
    return start(compose(words))


def main(argv: Sequence[str]) -> int:
    """``launch/local.py`` with its exit status."""
    return guarded(local, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
