"""Distil on a SLURM cluster: `python launch/slurm.py method=dd_random_init nodes=4`; `--help` lists what it takes."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run.cluster.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
