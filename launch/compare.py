"""Several runs under one budget, one table: `python launch/compare.py preset=gtn_three_gradients`; `--help` lists the keys."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run import compare
from metadist.run.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/compare.py` on these words."""
    return guarded(compare.main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
