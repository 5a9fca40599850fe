"""Experts on a cluster: an array of jobs, each of which works on the same queue; and its worker.

srun python -u -m metadist.run.cluster.experts <folder of the experts>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from metadist.run.cluster.array import Job, element, of_node, placed
from metadist.run.cluster.array import submit as submit_array
from metadist.run.cluster.record import read
from metadist.run.signals import Stop


def submit(words: Sequence[str]) -> int:
    """``launch/experts.py cluster=slurm``: print or submit the array. Raises UserError."""
    from metadist.run.compose import compose
    from metadist.run.experts import done, experts_dir, groups, outcome
    from metadist.run.experts_command import judge, open_folder

    config = compose(words, placed(words), lambda c, keys: judge(c, keys, cluster=True))
    folder = experts_dir(config)

    def result() -> str | None:
        return outcome(config, folder) if all(done(config, folder, task) for task in groups(config)) else None

    job = Job(
        folder,
        "cache_dir" if config.experts.path is None else "experts.path",
        "metadist.run.cluster.experts",
        "experts",
        len(groups(config)),
        lambda: open_folder(config),
        result,
    )
    return submit_array(words, config, job)


def main(argv: Sequence[str]) -> int:
    """Work on the queue of ``argv[0]``; the exit status, 0 also where a signal ended it with a checkpoint."""
    return element(Path(argv[0]), _work)


def _work(folder: Path, stop: Stop) -> str | None:
    from metadist.run.experts import outcome, work
    from metadist.run.folder import config_from_dict

    config = of_node(config_from_dict(read(folder / "config.json")))
    finished = work(config, folder, lambda: stop.requested is not None, patient=False)
    return outcome(config, folder) if finished else None


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main(sys.argv[1:]))
