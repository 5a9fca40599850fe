"""The batch file of a run or a sweep, and its submission: submitit's executor with a command of our own.

Design choices
- Resources, their names and the text come from submitit. Its pickled function does not: the command names the run folder, so
  the file is whole in itself, may be submitted again by hand, and no pickle of an earlier start can be mistaken for news.
- Everything a start needs stands in the file: working folder, PYTHONPATH, the user's setup. The submitting shell's environment
  comes along as sbatch has it.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from metadist.config_machine import ClusterConfig
from metadist.errors import UserError

LOGS = "cluster"  # folder in the run's (or the sweep's) folder


@dataclass(frozen=True)
class Role:
    """What a batch file runs. program: of each task; after: the file's last line; file: where the text is kept."""

    program: str = "metadist.run.cluster.rank"
    after: str = "metadist.run.cluster.after"
    file: str = "batch.sh"
    suffix: str = ""
    arguments: tuple[str, ...] = ()


RUN = Role()


def workers_role(number: int, first: int) -> Role:
    """The ``number``-th array of a server's workers, whose first worker is the run's ``first``-th."""
    program, after = "metadist.run.cluster.member", "metadist.run.cluster.after_member"
    return Role(program, after, f"workers-{number}.sh", f"-workers-{number}", (str(first),))


class Executor(SlurmExecutor):
    """submitit's, for a command instead of a function."""

    def __init__(self, place: Path, cluster: ClusterConfig, count: int | None = None, role: Role = RUN) -> None:
        """place: the run's folder, or the sweep's; count: of an array's elements; role: what each of them runs.

        UserError for what submitit or sbatch refuses.
        """
        if "%" in str(place):
            raise UserError(f"run_dir={place} has a %, which sbatch would replace in the names of the logs; give one without")
        super().__init__(place / LOGS)
        self._place, self._role = place, role
        try:
            self.update_parameters(**parameters(place, cluster, role))
        except (ValueError, TypeError) as e:
            raise UserError(f"the batch file can't be made: {' '.join(str(e).split())}") from None
        if count is not None:
            self.parameters["map_count"] = count

    @classmethod
    def affinity(cls) -> int:
        """Also where there is no srun: to print is not to submit."""
        return 2

    @property
    def _submitit_command_str(self) -> str:
        return shlex.join([sys.executable, "-u", "-m", self._role.program, str(self._place), *self._role.arguments])

    @property
    def text(self) -> str:
        """What sbatch receives."""
        return self._make_submission_file_text(self._submitit_command_str, "")

    def send(self) -> str:
        """Submit; the job's number. Raises UserError with the scheduler's reason if it refuses."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder.chmod(0o700)
        (self.folder / self._role.file).write_text(self.text)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says is in the exception, too
                job = self._submit_command(self._submitit_command_str)
        except (FailedJobError, FailedSubmissionError) as e:
            raise UserError(f"SLURM refused the job and nothing was submitted: {_reason(str(e))}") from None
        finally:
            for draft in self.folder.glob(".submission_file_*.sh"):
                with contextlib.suppress(OSError):
                    draft.unlink()
        return str(job.job_id)


def _reason(text: str) -> str:
    lines = [line.removeprefix("sbatch: error: ").strip() for line in text.splitlines() if line.strip()]
    return "; ".join(lines) or "sbatch gave no reason"


def parameters(place: Path, cluster: ClusterConfig, role: Role = RUN) -> dict[str, Any]:
    """submitit's parameters."""
    path = ":".join(python_path())
    after = shlex.join([sys.executable, "-m", role.after])
    given: dict[str, Any] = {
        "job_name": f"metadist-{place.name}{role.suffix}"[-60:],
        "nodes": cluster.nodes,
        "ntasks_per_node": tasks_per_node(cluster),
        "cpus_per_task": cluster.cpus_per_task,
        "time": cluster.timeout_min,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "account": cluster.account,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "gpus_per_node": cluster.gpus_per_node or None,
        "mem": f"{round(1024 * cluster.mem_gb)}MB" if cluster.mem_gb else None,
        "signal_delay_s": cluster.signal_delay_s,
        "array_parallelism": cluster.array_parallelism,
        "setup": [*([f"export PYTHONPATH={shlex.quote(path)}"] if path else []), *cluster.setup, *visible(place)],
        # A task that fails ends the others; srun has not taken cpus_per_task from sbatch since SLURM 22.05.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cluster.cpus_per_task}"],
        "teardown": [f"{after} $? {shlex.quote(str(place))}", "exit $?"],
        "additional_parameters": _additional(cluster),
    }
    return {k: v for k, v in given.items() if v is not None}


def _additional(cluster: ClusterConfig) -> dict[str, Any]:
    """sbatch's words that have no name of their own. A word without a value is given true; false or null leaves it out."""
    given = {"requeue": True, "chdir": str(Path.cwd()), **cluster.additional_parameters}
    if not given["requeue"]:  # left out, the cluster's own default would stand
        given["no-requeue"] = True
    return {k: v for k, v in given.items() if v is not None and v is not False}


def visible(place: Path) -> list[str]:
    """Shell lines that end the job, before its workers start, if a node can't see the run folder.

    Such a node can't open its worker's log either: srun would leave the others waiting for it.
    """
    probe = 'test -d "$0" || echo "$SLURMD_NODENAME"'
    look = f"srun --nodes=$SLURM_JOB_NUM_NODES --ntasks=$SLURM_JOB_NUM_NODES --ntasks-per-node=1 bash -c {shlex.quote(probe)}"
    where = shlex.quote(str(place))
    say = f'echo "error: "$blind" can not see run_dir="{where}"; give one on a file system that all nodes share" >&2'
    return [f"blind=$({look} {shlex.quote(str(place / LOGS))})", f'if [ -n "$blind" ]; then {say}; exit 1; fi']


def tasks_per_node(cluster: ClusterConfig) -> int:
    """Workers a node: as given, else one, or one a GPU."""
    return cluster.tasks_per_node or cluster.gpus_per_node or 1


def python_path() -> list[str]:
    """Where Python finds this metadist, and what the user's environment adds."""
    root = Path(__file__).resolve().parents[3]
    checkout = [str(root)] if (root / "pyproject.toml").is_file() else []
    own = [str(Path(p).absolute()) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    return list(dict.fromkeys([*checkout, *own]))
