"""Compiled and uncompiled training give the same numbers in float64."""

from __future__ import annotations

import pytest
import torch
from engine_cases import KINDS, difference, engine, gradients_of, make, plain

from metadist.metagrad.execution import Captured, accelerate, compiler_at_hand

needs_compiler = pytest.mark.skipif(not compiler_at_hand(), reason="torch.compile on a CPU needs a C++ compiler (g++)")


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(
    "net, kind, form",
    [("mlp", kind, "reverse") for kind in KINDS]
    + [("lenet", "sgd", "reverse"), ("lenet", "momentum", "forward"), ("convnet_batch", "adam", "forward")],
)
def test_compiled_is_uncompiled(net: str, kind: str, form: str) -> None:
    torch._dynamo.reset()
    case, leaves = make(net), make(net).params.leaves()
    thetas = engine(case, kind, leaves, at=(2, 3), form=form, compile=True)
    assert difference(thetas, plain(case, kind, case.params, at=(2, 3))) < 1e-10
    case.meta_loss(thetas).backward()
    for name, expected in gradients_of(case, engine, kind, at=(2, 3), form=form).items():
        if expected.norm() > 0:
            assert difference(leaves.grads()[name], expected) < 1e-10, name


def test_captured_on_a_cpu_just_calls() -> None:
    calls = []

    def double(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return 2 * x

    captured = accelerate(double, compile=False, graph=True)
    assert isinstance(captured, Captured)
    assert [float(captured(torch.tensor(v))) for v in (1.0, 4.0)] == [2.0, 8.0] and len(calls) == 2
    assert accelerate(double, compile=False, graph=False) is double


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_replays_with_new_arguments() -> None:
    captured = Captured(lambda x, y: (x @ y, {"sum": (x + y).sum()}))
    for seed in range(3):
        x, y = (torch.full((4, 4), float(seed + i), device="cuda") for i in range(2))
        product, rest = captured(x, y)
        assert torch.equal(product, x @ y) and torch.equal(rest["sum"], (x + y).sum())
    kept = captured(torch.eye(4, device="cuda"), torch.eye(4, device="cuda"))[0]
    captured(torch.zeros(4, 4, device="cuda"), torch.eye(4, device="cuda"))
    assert torch.equal(kept, torch.eye(4, device="cuda"))
