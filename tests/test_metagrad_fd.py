"""The engine's meta-gradients against central finite differences in float64: every inner optimizer, every learned thing."""

from __future__ import annotations

import pytest
import torch
from engine_cases import KINDS, NETS, engine, gradients_of, make, normal

# Adam's normalised step bends on the scale of eps * sqrt(1 - beta2): the error of a central difference falls by 100 for each
# tenth of the step (seen from 1e-4 to 1e-7), and at 1e-5 it is still 2e-3 for theta0 of LeNet. SGD is smoother.
H = {"sgd": 1e-5, "momentum": 1e-5, "adam": 2e-7}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_unroll_against_finite_differences(net: str, kind: str) -> None:
    case, h = make(net), H[kind]
    grads = gradients_of(case, engine, kind)
    parts = ["theta0", "pixels", "labels", "rates"] + ["momenta"] * (kind != "sgd")
    for i, name in enumerate(parts):
        g = grads[name]
        # Along the gradient, so that the derivative is large against rounding, plus a random part as long.
        random = normal("direction", g.shape, i)
        direction = (g / g.norm() + random / random.norm()) / 2
        ends = [case.meta_loss(engine(case, kind, case.params.moved(name, sign * h * direction))) for sign in (1, -1)]
        numeric = float(ends[0] - ends[1]) / (2 * h)
        exact = float((g * direction).sum())
        assert abs(numeric - exact) < 1e-6 * abs(exact), f"{name}: {numeric} against {exact}"


def test_the_check_can_fail() -> None:
    """A gradient that forgets one inner step is told apart: the tolerance is not what lets the engine pass."""
    case = make("mlp")
    whole, cut = (gradients_of(case, engine, "sgd", start=s)["pixels"] for s in (0, 1))
    assert float((whole - cut).norm() / whole.norm()) > 1e-2
    assert torch.equal(gradients_of(case, engine, "sgd", start=1)["theta0"], torch.zeros_like(case.params.theta0))
