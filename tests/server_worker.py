"""One worker of a server for several runs, one after another: a start of the program costs seconds, a run of it none.

    python server_worker.py <label> <run folder> ...

The folders must exist; each worker waits for the server of the first, then for that of the next.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from metadist.run.folder import RunFolder
from metadist.run.member import serve


def main(label: str, *folders: str) -> None:
    """Serve all runs as the worker ``label``."""
    torch.set_num_threads(1)
    for path in folders:
        assert serve(RunFolder.attach(Path(path)), label, lambda client: None) == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
