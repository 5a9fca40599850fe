"""The run folder: the whole truth of a run.

Design choices
- `config.json` defines the run. Its identity never changes; what is circumstance (workers, threads, a raised `steps`) is
  rewritten by the start that changes it. `config.yaml` is the same for people.
- What depends on the clock or the machine is resolved once: `resolved/<name>.json`, one file a value, and the FIRST writer wins
  (a hard link that fails if the name exists). So a forgotten older process can never change a value a newer one has read, and
  every rank may read while rank 0 writes.
- Each start claims the next incarnation and leaves `starts/<n>.json`: its exact configuration and environment. Ranks read
  their configuration there, so a later start with other circumstances does not reach into an earlier one.
- A finished run is only read: no incarnation is claimed for printing its result again.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

from metadist.config import Config
from metadist.errors import RunError, UserError
from metadist.identity import default_run_dir, identity
from metadist.run.environment import changed_code, environment, packages
from metadist.store import Checkpoints, atomic_write, claim, clean, newest_step, write_first

_POLL_S = 0.05


def config_from_dict(record: dict[str, Any]) -> Config:
    """The Config of a nested dict as ``dataclasses.asdict`` makes it; a missing key has its default.

    Raises UserError for a key this version does not know.
    """
    return _build(Config, record, "")  # type: ignore[no-any-return]


def _build(cls: type[Any], record: dict[str, Any], prefix: str) -> Any:
    kinds = get_type_hints(cls)
    if extra := sorted(set(record) - set(kinds)):
        raise UserError(f"{prefix}{extra[0]} is no key of this version of metadist; use the version that made the run")
    nested = {k: _build(kinds[k], v, f"{prefix}{k}.") for k, v in record.items() if dataclasses.is_dataclass(kinds[k])}
    return cls(**{**record, **nested})


def _dump(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _read(path: Path) -> Any:
    """The JSON in ``path``; None if there is no such file; RunError if it can't be read."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as e:
        raise RunError(f"{path} can't be read ({e}); restore it or start a new run_dir") from None


class RunFolder:
    """One run's folder, seen by one start of it.

    path: the folder; ``config``: the configuration in force, `run_dir` filled in; ``incarnation``: this start's number (0: it
    only reads); ``writes``: whether this process writes (rank 0 of a start).
    """

    def __init__(self, path: Path, config: Config, incarnation: int, writes: bool) -> None:
        """Use ``open`` or ``attach``."""
        self.path, self.config, self.incarnation, self.writes = path, config, incarnation, writes

    @classmethod
    def open(cls, config: Config) -> RunFolder:
        """Make the folder of ``config`` or resume it, and claim an incarnation; a finished one is opened for reading.

        Raises UserError if the folder holds another identity (the differing keys are listed) or can't be made.
        """
        folder = cls.prepare(config)
        if folder.finished is None:
            folder._start()
        return folder

    @classmethod
    def prepare(cls, config: Config) -> RunFolder:
        """Make the folder of ``config``, or check that it is this run's, and start nothing. Raises UserError as ``open``."""
        path = Path(config.run_dir or default_run_dir(config)).expanduser().absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"run_dir={path} can't be made ({e.strerror}); give another run_dir") from None
        clean(path)
        config = dataclasses.replace(copy.deepcopy(config), run_dir=str(path))
        write_first(path / "config.json", _dump(dataclasses.asdict(config)))
        _check_identity(path, config)
        return cls(path, config, 0, False)

    @classmethod
    def attach(cls, path: str | Path, incarnation: int = 0, rank: int | None = None) -> RunFolder:
        """The folder as seen by a rank of start ``incarnation`` (rank 0 writes), or by a reader (both left out).

        Raises UserError if it is no run folder.
        """
        path = Path(path).expanduser().absolute()
        record = _read(path / "starts" / f"{incarnation:04d}.json")["config"] if incarnation else _read(path / "config.json")
        if record is None:
            raise UserError(f"run_dir={path} is no run folder (it holds no config.json); give one that a run has made")
        return cls(path, config_from_dict(record), incarnation, rank == 0 and incarnation > 0)

    def _start(self) -> None:
        self.incarnation, self.writes = claim(self.path), True
        record = {"config": dataclasses.asdict(self.config), "environment": environment(), "packages": packages()}
        if changes := changed_code():
            atomic_write(self.path / "starts" / f"{self.incarnation:04d}.diff", changes)
        atomic_write(self.path / "starts" / f"{self.incarnation:04d}.json", _dump(record))
        self.write_config()

    def write_config(self) -> None:
        """Record the configuration with its present circumstances: what the next start of this folder reads."""
        from omegaconf import OmegaConf

        record = dataclasses.asdict(self.config)
        if _read(self.path / "config.json") != json.loads(_dump(record)):
            atomic_write(self.path / "config.json", _dump(record))
        atomic_write(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(record)).encode())

    @functools.cached_property
    def checkpoints(self) -> Checkpoints:
        """This start's view of `checkpoints/`."""
        run = self.config.run
        return Checkpoints(self.path / "checkpoints", self.incarnation, run.keep, run.anchor_every)

    @property
    def newest_step(self) -> int:
        """Step of the newest checkpoint, 0 if there is none. Its content is not checked."""
        return newest_step(self.path / "checkpoints")

    def resolve(self, name: str, compute: Callable[[], Any], anyone: bool = False) -> Any:
        """The value of ``name`` that this run uses for ever: recorded already, or computed now and recorded.

        name: letters, digits, "-", "_" and "."; where it depends on a circumstance, say so in the name ("threads-2").
        compute: JSON-able; called in the writing rank only, or in ``anyone`` who needs it first (a server's workers). Others
        wait for the record: no exchange is needed.
        Raises RunError if a non-writing process waits longer than exchange.timeout_s.
        """
        path = self.path / "resolved" / f"{name}.json"
        if not path.exists() and (self.writes or anyone):
            write_first(path, _dump(compute()))
        until = time.monotonic() + (self.config.exchange.timeout_s if self.incarnation else 0.0)
        while not path.exists():
            if time.monotonic() > until:
                raise RunError(f"{path} was never written: rank 0 has not resolved {name}")
            time.sleep(_POLL_S)
        return _read(path)

    @property
    def resolved(self) -> dict[str, Any]:
        """All values resolved so far, by name."""
        return {p.stem: _read(p) for p in sorted((self.path / "resolved").glob("[!.]*.json"))}

    def fence(self) -> None:
        """Raise RunError if a newer start has taken this folder over: a forgotten older process ends itself.

        Called before every write of a name that holds no incarnation, and worth a call at every checkpoint.
        """
        newest = max((int(p.name) for p in (self.path / "incarnations").glob("*") if p.name.isdigit()), default=0)
        if newest > self.incarnation:
            raise RunError(
                f"a newer start ({newest}) has taken over {self.path}; this one ({self.incarnation}) ends and leaves it alone"
            )

    @property
    def finished(self) -> dict[str, Any] | None:
        """summary.json if the run has done at least the configured steps (its key "steps"), else None."""
        summary: dict[str, Any] | None = _read(self.path / "summary.json")
        return summary if summary is not None and summary.get("steps", -1) >= self.config.steps else None

    def write(self, name: str, data: bytes) -> Path:
        """Put ``data`` at ``name`` in the folder, atomically, if this process may; returns the path.

        Raises RunError if a newer start has taken over or the disk refuses.
        """
        if not self.writes:
            raise RuntimeError(f"{name}: only rank 0 of a start writes")
        self.fence()
        atomic_write(self.path / name, data)
        return self.path / name

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Record the result: summary.json. Its "steps" says for how many meta-steps it stands."""
        self.write("summary.json", _dump({"steps": summary["steps"], **summary}))


def _check_identity(path: Path, config: Config) -> None:
    old, new = (json.loads(json.dumps(identity(c))) for c in (config_from_dict(_read(path / "config.json")), config))
    started = (path / "summary.json").exists() or any((path / "checkpoints").glob("*.safetensors"))
    if old != new and not started:
        # A start that ended before its first checkpoint, by a mistake say, has nothing to protect.
        for record in (path / "resolved").glob("*.json"):
            record.unlink()
        atomic_write(path / "config.json", _dump(dataclasses.asdict(config)))
        return
    if changed := [f"{k}: {old[k]} -> {new[k]}" for k in new if old[k] != new[k]]:
        raise UserError(
            f"run_dir={path} holds another run ({', '.join(changed)}; recorded -> given); "
            "give another run_dir, or the recorded values to resume it"
        )
