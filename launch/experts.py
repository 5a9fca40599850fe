"""Train expert trajectories: `python launch/experts.py data=mnist net=convnet workers=4`; `--help` lists what it takes."""

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run import experts_command
from metadist.run.guard import guarded


def main(argv: Sequence[str]) -> int:
    """Exit status of `launch/experts.py` on these words."""
    return guarded(experts_command.main, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
