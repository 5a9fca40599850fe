"""The house rules that a program can check: imports run one way, files and functions stay short, no key is ignored."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from metadist.config import Config
from metadist.identity import flatten

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "metadist"
FILES = sorted(PACKAGE.rglob("*.py"))
FILE_LINES, FUNCTION_LINES = 275, 60

# From the ground up: a room imports itself and rooms to its left.
ROOMS = (
    "draw", "errors", "config_machine", "config_search", "config_train", "config_trajectory", "config", "identity", "metagrad",
    "store", "nets", "data", "synthetic", "methods", "exchange", "evaluate", "search", "run", "api",
)  # fmt: skip
# metadist.evaluate is a package and a function at once: its __call__ fetches the function when it is called.
ALLOWED = {("evaluate/__init__.py", "api")}


def room_of(file: Path) -> str:
    """The room a file belongs to; "" for the package itself, which stands on the ground and imports nothing by a statement."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """The rooms that import statements name, inside functions too; those for type checkers alone are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{a.name}" for a in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "metadist" and len(parts) > 1:
                yield parts[1]
        yield from imported(node)


def upward(room: str, tree: ast.AST) -> list[str]:
    """The rooms above ``room`` that the module imports."""
    height = ROOMS.index(room) if room else -1
    return [other for other in imported(tree) if other in ROOMS and ROOMS.index(other) > height]


def test_every_room_has_its_place() -> None:
    found = {room_of(f) for f in FILES} - {""}
    assert found == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    name = file.relative_to(PACKAGE).as_posix()
    wrong = [other for other in upward(room_of(file), ast.parse(file.read_text())) if (name, other) not in ALLOWED]
    assert not wrong, f"{name} imports {wrong}, which stand above it"


def test_the_direction_test_can_fail() -> None:
    tree = ast.parse(
        "def f():\n    from metadist.run import trainer\nfrom metadist import exchange, draw\nimport metadist.api.x\n"
    )
    assert upward("nets", tree) == ["run", "exchange", "api"]
    assert upward("run", tree) == ["api"]
    assert upward("", tree) == ["run", "exchange", "draw", "api"]


def test_launchers_import_only_run() -> None:
    for file in (ROOT / "launch").glob("*.py"):
        assert set(imported(ast.parse(file.read_text()))) == {"run"}, file.name


def test_files_are_short() -> None:
    long = {f.relative_to(ROOT).as_posix(): n for f in FILES if (n := len(f.read_text().splitlines())) > FILE_LINES}
    assert not long


def test_functions_are_short() -> None:
    long = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long[f"{file.relative_to(ROOT).as_posix()}:{node.name}"] = lines
    assert not long


def sections(tree: ast.AST) -> set[str]:
    """The sections of Config that a module handles: read as an attribute, or typed by their class."""
    classes = {type(getattr(Config(), f.name)).__name__: f.name for f in dataclasses.fields(Config)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    return {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {s for c, s in classes.items() if c in names}


def reads(tree: ast.AST) -> set[str]:
    """Keys by their dotted names that a module reads, as far as can be told without running it."""
    found: set[str] = set()
    attributes = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)]
    # getattr(cfg, key) over a tuple of names, as the nets do.
    words = {n.attr for n in attributes} | {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    for section in sections(tree):
        found |= {f"{section}.{word}" for word in words}
    return found | {n.attr for n in attributes if ast.unparse(n.value).split(".")[-1] in ("config", "schema")}


def test_every_key_is_read() -> None:
    """A key that only its declaration and its check mention would be silently ignored."""
    configs = ("config.py", "config_machine.py", "config_search.py", "config_train.py", "config_trajectory.py")
    parts = ("", "_machine", "_method", "_search", "_train")
    judges = tuple(f"run/validate{part}.py" for part in parts)
    judged = {PACKAGE / name for name in (*configs, *judges)}
    read = set().union(*(reads(ast.parse(f.read_text())) for f in FILES if f not in judged))
    # A section inside a section (teacher.net) is read whole; its leaves where sections of its kind are.
    inner = {key for key in flatten(Config()) if key.count(".") == 2 and key.rpartition(".")[0] in read}
    read |= {key for key in inner if key.partition(".")[2] in read}
    assert not {key for key in flatten(Config()) if key not in read}


def test_the_key_test_can_fail() -> None:
    tree = ast.parse("def f(config: Config, c: DataConfig): return config.eval.every + config.steps + c.size")
    assert {"eval.every", "steps", "data.size"} <= reads(tree)
    assert not {"tasks", "eval.nets", "run.keep", "inner.steps", "data.root"} & reads(tree)


def test_nothing_is_pickled() -> None:
    for file in FILES:
        tree = ast.parse(file.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, file
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert not calls & {"torch.load", "torch.save", "eval", "exec"}, file


def test_nothing_draws_from_a_global_generator() -> None:
    """Draws go through metadist.draw; where a user's module must draw itself, a forked generator is seeded from a key."""
    forbidden = {"torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.normal", "torch.bernoulli"}
    for file in FILES:
        calls = {ast.unparse(n.func) for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)}
        assert not calls & forbidden, file
        assert not any(c.startswith(("np.random.", "numpy.random.")) for c in calls), file
