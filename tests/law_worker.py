"""One worker of the test of the first law: trains every configuration of a list in one process, through one exchange.

    python law_worker.py <list.json> <run folder of the launcher>

The list holds run folders, opened by the test; each holds its configuration. Beside each run its first combined buffer
(meta-gradient sum, loss sum, task count) is written as buffer.safetensors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from metadist import exchange, store
from metadist.exchange import Exchange
from metadist.run import trainer
from metadist.run.folder import RunFolder
from metadist.run.signals import Stop
from metadist.run.worker import leave, main


class Recorded:
    """An exchange that also keeps the buffers that were applied."""

    def __init__(self, link: Exchange) -> None:
        self.link = link
        self.buffers: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)

    def step(self, state: Any, tasks: int, compute: Any, apply: Callable[[Any, Tensor], Any], stop: Any) -> tuple[Any, bool]:
        def kept(state: Any, total: Tensor) -> Any:
            self.buffers.append(total.clone())
            return apply(state, total)

        return self.link.step(state, tasks, compute, kept, stop)


def train_all(folders: list[RunFolder], link: Exchange) -> None:
    """Train each run with the real trainer."""
    for folder in folders:
        recorded = Recorded(link)
        trainer.train(folder.config, folder, recorded, Stop())
        if link.rank == 0:
            buffers = {f"{i}": b for i, b in enumerate(recorded.buffers)}
            store.save_tensors(folder.path / "buffers.safetensors", buffers)


def body(folder: RunFolder, rank: int, world: int, address: str | None, stop: Stop) -> dict[str, Any]:
    link = exchange.connect(folder.config, rank, world, address, folder.incarnation)
    paths = json.loads(Path(sys.argv[1]).read_text())
    train_all([RunFolder.attach(path, 1, rank) for path in paths], link)
    link.close()
    return {"steps": 0}


if __name__ == "__main__":
    leave(main(sys.argv[2:], body))
