"""What a distilled set is worth: `python launch/evaluate.py run=runs/x`; `--help` lists the keys."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run import evaluation
from metadist.run.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/evaluate.py` on these words."""
    return guarded(evaluation.main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
