"""Distil on this machine: `python launch/local.py workers=2`; `--help` lists methods, presets and every key."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
