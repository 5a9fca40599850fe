"""Search for architectures with distilled data: `python launch/search.py set=digits-10 width=4`; `--help` lists its keys."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if (ROOT / "metadist" / "config.py").is_file():  # a checkout: works uninstalled, from any folder
    sys.path.insert(0, str(ROOT))

from metadist.run.search_command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
