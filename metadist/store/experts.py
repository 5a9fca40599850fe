"""Expert trajectories on disk: every network's weights after every epoch, in half the bytes of float32.

    store = ExpertStore("~/.cache/metadist/experts/mnist-convnet-1f0c...")
    store.weights(3, [0, 2])  # [2, P]: expert 3 at its start and after two epochs

Design choices
- A folder holds one recipe: everything that the weights depend on, in full, in manifest.json; each expert's file names it by
  its SHA-256. A file of another recipe, however it came there, is refused.
- A file holds snapshot 0 in float32 and a float16 difference for each epoch: metadist.store.coding.
- Files are mapped into memory; rows are read as they are asked for, by any number of processes at once. Sizes are checked when
  the store is opened; the SHA-256 of a file once a process, before its first row is used, and again if the file has changed.
- An expert's file appears whole or not at all. Those from number 0 on without a gap are the finished ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metadist.errors import RunError, UserError
from metadist.store.atomic import write_first
from metadist.store.coding import Trajectory
from metadist.store.files import Torn, prove, read_header, save_tensors

FORMAT = 1


def key_of(recipe: Mapping[str, Any]) -> str:
    """SHA-256 of a recipe, in hex. recipe: JSON-able."""
    return hashlib.sha256(json.dumps({"format": FORMAT, "recipe": recipe}, sort_keys=True).encode()).hexdigest()


def file_name(expert: int) -> str:
    """Of an expert's file in its store's folder."""
    return f"expert-{expert:05d}.safetensors"


def listing(folder: Path) -> set[str]:
    """Names in a folder. Network file systems cache that a single name is absent; a listing is fresh."""
    return {path.name for path in folder.iterdir()}


def check_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Raise UserError, which names what differs, if the folder is another recipe's; a folder without experts is anybody's."""
    if (folder / "manifest.json").exists():
        _compare(folder, _manifest(folder)["recipe"], json.loads(json.dumps(recipe)))


def prepare(folder: Path, recipe: Mapping[str, Any], parameters: Mapping[str, Sequence[int]]) -> str:
    """Make a store's folder, or check that it is this recipe's; returns the recipe's key.

    parameters: name -> shape of the net's, in the order of its weights.
    Raises UserError if it is another recipe's or another net's, RunError if it can't be made.
    """
    record = {"format": FORMAT, "key": key_of(recipe), "recipe": recipe, "parameters": dict(parameters)}
    plain: dict[str, Any] = json.loads(json.dumps(record))
    path = folder / "manifest.json"
    if not path.exists():
        write_first(path, (json.dumps(plain, indent=1) + "\n").encode())
    found = _manifest(folder)
    _compare(folder, found["recipe"], plain["recipe"])
    if list(found["parameters"].items()) != list(plain["parameters"].items()):
        raise UserError(f"the experts in {folder} were trained with another net of that name ({_size(found)} parameters, now "
                        f"{_size(plain)}); give experts.path=<another folder>")  # fmt: skip
    return str(plain["key"])


def write_expert(folder: Path, expert: int, key: str, trajectory: Trajectory, figures: Mapping[str, float]) -> None:
    """Put a finished expert into its store. figures: measured, kept beside it. Raises RunError if the disk refuses."""
    tensors = trajectory.tensors()
    about = {"expert": expert, "epochs": len(tensors["codes"]), "size": len(tensors["first"]), "key": key}
    save_tensors(folder / file_name(expert), tensors, {**about, "figures": dict(figures)})


class ExpertStore:
    """The finished experts in a folder.

    folder: of one recipe. recipe: JSON-able; what they must have been made with; None: whatever they were.
    Attributes: ``count``: finished trajectories; ``epochs``: E, snapshots are 0 to E; ``size``: P; ``recipe``; ``folder``.
    Raises UserError if there is no store or it is another recipe's, RunError (Torn) that names a file which is missing, cut
    short or foreign.
    """

    def __init__(self, folder: Path | str, recipe: Mapping[str, Any] | None = None) -> None:
        """Look at every file's name, size and header."""
        self.folder = Path(folder).expanduser()
        found = _manifest(self.folder)
        self.recipe: dict[str, Any] = found["recipe"]
        if recipe is not None:
            _compare(self.folder, self.recipe, json.loads(json.dumps(recipe)))
        self.key, self.epochs, self.size = str(found["key"]), int(self.recipe["experts"]["epochs"]), _size(found)
        self._proven: dict[int, tuple[tuple[int, ...], Any]] = {}  # expert -> (what stat said, mapped file)
        names = listing(self.folder)
        self.count = 0
        while file_name(self.count) in names:
            self._check(self.count)
            self.count += 1
        if (known := _known(self.folder)) > self.count:
            raise RunError(f"{self.folder / file_name(self.count)} is missing ({known} experts were finished there); "
                           "restore it, or have launch/experts.py make it again")  # fmt: skip

    def require(self, count: int = 0, epochs: int = 0) -> None:
        """Raise UserError unless there are ``count`` finished experts with ``epochs`` epochs or more each."""
        if self.count < count:
            raise UserError(f"{self.folder} holds {self.count} finished experts, experts.count={count} asks for more; let "
                            "launch/experts.py finish them, or ask for fewer")  # fmt: skip
        if self.epochs < epochs:
            raise UserError(f"the experts in {self.folder} have {self.epochs} epochs, and snapshots up to epoch {epochs} are "
                            f"asked for; allowed: 0 to {self.epochs}")  # fmt: skip

    def weights(self, expert: int, epochs: Sequence[int]) -> Tensor:
        """Weights [len(epochs), P] float32 on the CPU of one expert after so many epochs each (0: its start).

        Raises UserError for an expert or an epoch that is not there, Torn for a file that was altered.
        """
        if not 0 <= expert < self.count:
            raise UserError(f"{self.folder} has no expert {expert}; allowed: 0 to {self.count - 1}")
        if wrong := [e for e in epochs if not 0 <= e <= self.epochs]:
            raise UserError(f"expert {expert} has no snapshot after epoch {wrong[0]}; allowed: 0 to {self.epochs}")
        file = self._open(expert)
        # A copy: what safetensors gives is the mapped memory itself.
        theta, exponents = file.get_tensor("first").clone(), file.get_tensor("exponents").tolist()
        codes, out = file.get_slice("codes"), torch.empty(len(epochs), self.size)
        for epoch in range(max(epochs, default=0) + 1):
            if epoch:
                theta.add_(codes[epoch - 1 : epoch][0].float(), alpha=2.0 ** exponents[epoch - 1])
            for i, wanted in enumerate(epochs):
                if wanted == epoch:
                    out[i] = theta
        return out

    def figures(self, expert: int) -> dict[str, float]:
        """What was measured of it when it was finished."""
        figures: dict[str, float] = self._check(expert)["figures"]
        return figures

    def _check(self, expert: int) -> dict[str, Any]:
        """The file's metadata. Raises Torn if its size or its origin are wrong."""
        path = self.folder / file_name(expert)
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                file.seek(0)
                size, about = read_header(file.read(8 + min(length, 1 << 20)), path)
                if (found := os.fstat(file.fileno()).st_size) != size:
                    raise Torn(path, f"it has {found} bytes instead of {size} (cut short); delete it and have "
                                     "launch/experts.py make it again")  # fmt: skip
        except OSError as e:
            raise RunError(f"cannot read {path}: {e.strerror}") from e
        mine = {"expert": expert, "epochs": self.epochs, "size": self.size, "key": self.key}
        if wrong := next((k for k, v in mine.items() if about.get(k) != v), None):
            what = (
                "another recipe" if wrong == "key" else f"another store: its {wrong} is {about.get(wrong)}, not {mine[wrong]}"
            )
            raise Torn(path, f"it belongs to {what}")
        return about

    def _open(self, expert: int) -> Any:
        """The file, mapped and proven."""
        path = self.folder / file_name(expert)
        try:
            seen = path.stat()
            now = (seen.st_ino, seen.st_size, seen.st_mtime_ns)
            if self._proven.get(expert, (None,))[0] != now:
                self._check(expert)
                with path.open("rb") as plain, mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    prove(data, path)
                file = safe_open(str(path), framework="pt")
                self._shapes(file, path)
                self._proven[expert] = now, file
        except SafetensorError as e:
            raise Torn(path, "its header is not one of metadist's") from e
        except OSError as e:
            raise RunError(f"cannot read {path}: {e.strerror or e}") from e
        return self._proven[expert][1]

    def _shapes(self, file: Any, path: Path) -> None:
        """Raise Torn unless the file's tensors are those of ``Trajectory.tensors``."""
        wanted = {
            "first": ([self.size], "F32"),
            "codes": ([self.epochs, self.size], "F16"),
            "exponents": ([self.epochs], "I16"),
        }
        for name, (shape, dtype) in wanted.items():
            part = file.get_slice(name)
            if (list(part.get_shape()), part.get_dtype()) != (shape, dtype):
                raise Torn(path, f"its {name} are {part.get_dtype()} {list(part.get_shape())}, not {dtype} {shape}")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"there are no experts in {folder} (no manifest.json); make them with launch/experts.py") from None
    except (OSError, ValueError, RecursionError) as e:
        raise Torn(path, f"it can't be read ({type(e).__name__})") from None
    if not isinstance(found, dict) or found.get("key") != key_of(found.get("recipe", {})):
        raise Torn(path, "its key does not fit its recipe (altered, or of another version of metadist)")
    try:
        if int(found["recipe"]["experts"]["epochs"]) < 1 or _size(found) < 1:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise Torn(path, "its epochs or parameters are none (altered, or of another version of metadist)") from None
    return found


def _known(folder: Path) -> int:
    """How many experts a finished job left here."""
    try:
        return int(json.loads((folder / "summary.json").read_text())["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _size(manifest: Mapping[str, Any]) -> int:
    return sum(math.prod(shape) for shape in manifest["parameters"].values())


def _leaves(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for k, v in recipe.items():
        out |= _leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else {f"{prefix}{k}": v}
    return out


def _compare(folder: Path, found: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise UserError if two recipes differ."""
    old, new = _leaves(found), _leaves(given)
    if changed := [f"{k}: {old.get(k)} -> {new.get(k)}" for k in sorted({*old, *new}) if old.get(k) != new.get(k)]:
        raise UserError(f"the experts in {folder} were made otherwise ({', '.join(changed)}; recorded -> given); give the "
                        "recorded values, or another experts.path")  # fmt: skip
