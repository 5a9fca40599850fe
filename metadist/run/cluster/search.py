"""An architecture search on a cluster: an array of jobs, each of which works on the same queue; and its worker.

srun python -u -m metadist.run.cluster.search <folder of the search>
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from metadist.run.cluster.array import Job, element, placed
from metadist.run.cluster.array import submit as submit_array
from metadist.run.signals import Stop


def submit(words: Sequence[str]) -> int:
    """``launch/search.py cluster=slurm``: print or submit the array. Raises UserError."""
    from metadist.run.compose import compose
    from metadist.run.search_command import judge, opened
    from metadist.run.search_folder import open_folder
    from metadist.run.search_job import outcome
    from metadist.run.search_set import precheck

    config = compose(words, placed(words), lambda c, keys: judge(c, keys, cluster=True), "search")
    folder, search = opened(config)

    def open_() -> None:
        if not search.finished():
            precheck(config, elsewhere=True)
        open_folder(config, folder, len(search.candidates))

    job = Job(
        folder,
        "out",
        "metadist.run.cluster.search",
        "search",
        search.count(),
        open_,
        lambda: str(outcome(config, folder)["text"]) if search.finished() else None,
    )
    return submit_array(words, config, job)


def main(argv: Sequence[str]) -> int:
    """Work on the queue of ``argv[0]``; the exit status, 0 also where a signal ended it."""
    from metadist.run.search_folder import configuration
    from metadist.run.search_job import marks, outcome, work

    folder = Path(argv[0])
    attempts = marks(folder)

    def until_done(folder: Path, stop: Stop) -> str | None:
        config = configuration(folder)
        return str(outcome(config, folder)["text"]) if work(config, folder, attempts, patient=False) else None

    return element(folder, until_done, attempts.leave)


if __name__ == "__main__":
    from metadist.run.worker import leave

    leave(main(sys.argv[1:]))
