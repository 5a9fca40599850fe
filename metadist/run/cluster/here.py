"""cluster=local: the same command as processes on this machine, detached, to try it before it queues."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from metadist.config import Config
from metadist.errors import UserError
from metadist.identity import default_run_dir
from metadist.run.cluster import record
from metadist.run.cluster.batch import LOGS, python_path
from metadist.run.cluster.watch import POLL_S, Tail
from metadist.run.sweep import quoted

READ = {"nodes", "tasks_per_node", "gpus_per_node", "wait", "cpus_per_task", "array_parallelism"}


def start(words: Sequence[str], config: Config, own: Collection[str]) -> int:
    """Start launch/local.py's program in the background; wait=true stays until its end. Returns the exit status."""
    given = [w for w in words if _key(w, own) is not None]
    if unread := [w for w in given if _key(w, own) not in READ]:
        print(f"note: cluster=local does not read {' '.join(unread)}", file=sys.stderr)
    rest = [w for w in words if w not in given and not w.startswith(("cluster=", "workers=", "run_dir="))]
    sweep = "-m" in words
    place = Path(config.run_dir or ("runs/sweep-local" if sweep else default_run_dir(config))).expanduser().absolute()
    logs = place / LOGS
    try:
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as e:
        raise UserError(f"run_dir={place} can't be made ({e.strerror}); give another") from None
    command = [sys.executable, "-u", "-m", "metadist.run.command", *rest, f"workers={config.workers}"]
    command += [f"threads={config.threads or config.cluster.cpus_per_task}"] if "threads" not in _keys(rest) else []
    command += [] if sweep else [f"run_dir={quoted(str(place))}"]
    log = logs / f"local-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}_0_log.out"
    paths = os.pathsep.join([*python_path(), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("ab") as out:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
    if not sweep:
        record.write(logs / "job.json", {"job": f"pid {child.pid}", "cluster": "local", "words": list(words)})
    _sheet(child.pid, place, log, words)
    return _stay(child, log) if config.cluster.wait else 0


def _key(word: str, own: Collection[str]) -> str | None:
    """The cluster's key that a word sets, without the section's name; None if it is the run's own."""
    name = word.lstrip("+").partition("=")[0]
    key = name.removeprefix("cluster.").partition(".")[0]
    return key if key in own or name.startswith("cluster.") else "interface" if name == "exchange.interface" else None


def _keys(words: Sequence[str]) -> set[str]:
    return {w.partition("=")[0] for w in words}


def _sheet(pid: int, place: Path, log: Path, words: Sequence[str]) -> None:
    print(f"started process {pid} on this machine")
    print(f"  run folder     {place}\n  logs           {log}\n  monitor        tensorboard --logdir {place}")
    print(f"  resume         python launch/slurm.py {shlex.join(words)}\n  cancel         kill {pid}", flush=True)


def _stay(child: subprocess.Popen[bytes], log: Path) -> int:
    tail = Tail(log)
    while child.poll() is None:
        print(tail(), end="", flush=True)
        time.sleep(POLL_S / 4)
    print(tail(), end="", flush=True)
    return child.returncode
