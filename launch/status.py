"""What runs are doing: `python launch/status.py run=all`, from their folders and the scheduler."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run.cluster import status
from metadist.run.guard import guarded

if __name__ == "__main__":
    sys.exit(guarded(status.main, sys.argv[1:]))
