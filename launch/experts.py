"""Train expert trajectories: `python launch/experts.py data=mnist net=convnet workers=4`; `--help` lists what it takes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run.experts_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
