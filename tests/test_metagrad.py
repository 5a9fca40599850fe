"""The engine against one plain autograd graph, and its two forms against each other, in float64."""

from __future__ import annotations

import pytest
import torch
from engine_cases import CLASSES, KINDS, NETS, ORDER, difference, engine, gradients_of, make, normal, plain
from torch import Tensor

from metadist.errors import UserError
from metadist.metagrad import FORMS, Inner, Optimizer, mixed

EXACT = 1e-10


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name, expected in b.items():
        if expected.norm() == 0:
            assert a[name].norm() == 0, name
        else:
            assert difference(a[name], expected) < EXACT, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", NETS)
def test_unroll_is_autograd(net: str, kind: str, form: str) -> None:
    case = make(net)
    expected = gradients_of(case, plain, kind)
    assert difference(engine(case, kind, case.params, form=form), plain(case, kind, case.params)) < EXACT
    assert_equal(gradients_of(case, engine, kind, form=form), expected)
    learned = ["theta0", "pixels", "labels", "rates"] + ["momenta"] * (kind != "sgd")
    assert all(expected[name].norm() > 0 for name in learned)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_meta_loss_at_every_kth_step(kind: str, form: str) -> None:
    case = make("convnet_instance")
    for at in ((1, 2, 3), (1, 3), (2,), (3, 1, 1)):
        a, b = engine(case, kind, case.params, at=at), plain(case, kind, case.params, at=at)
        assert a.shape[0] == len(at) and difference(a, b) < EXACT
        assert_equal(gradients_of(case, engine, kind, at=at, form=form), gradients_of(case, plain, kind, at=at))


@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_window_is_a_detached_warm_up(kind: str, start: int) -> None:
    case = make("convnet_batch")
    window = gradients_of(case, engine, kind, start=start, at=(start + 1, 3))
    expected = gradients_of(case, plain, kind, start=start, at=(start + 1, 3))
    assert expected["theta0"].norm() == 0
    if start == 2:  # batch 0 is used before the window only
        assert window["pixels"][0].norm() == 0 < window["pixels"][1].norm()
    assert_equal(window, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("net", ["lenet", "convnet_batch"])
def test_tasks_with_batches_of_their_own(net: str, form: str) -> None:
    case = make(net, shared=False)
    leaves, expected = case.params.leaves(), gradients_of(case, plain, "adam", shared=False)
    case.meta_loss(engine(case, "adam", leaves, form=form, shared=False)).backward()
    assert_equal(leaves.grads(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_one_theta0_expanded_over_the_tasks(form: str) -> None:
    case = make("mlp")
    one = case.params.theta0[:1].clone().requires_grad_()
    x, y = case.params.batches()
    h = Optimizer("adam").schedule(0.1 * case.params.rates, case.params.momenta)
    grads = []
    for theta0 in (one.expand(2, -1), one.repeat(2, 1)):
        thetas = Inner(case.loss, Optimizer("adam"), form).unroll(theta0, (x, y), ORDER, h)
        grads += torch.autograd.grad(case.meta_loss(thetas), one)
    assert torch.equal(*grads) and grads[0].norm() > 0


def test_hard_labels_get_no_gradient_and_pixels_the_exact_one() -> None:
    case = make("mlp")
    y = torch.arange(12).reshape(2, 6) % CLASSES
    optimizer, h = Optimizer("sgd"), case.params.rates[:, None]
    x, twin = (case.params.pixels.clone().requires_grad_() for _ in range(2))
    case.meta_loss(Inner(case.loss, optimizer).unroll(case.params.theta0, (x, y), ORDER, h)).backward()
    loss, theta = torch.zeros(()).double(), case.params.theta0.clone().requires_grad_()
    for t, s in enumerate(ORDER):
        (g,) = torch.autograd.grad(sum(case.loss(th, (twin[s], y[s])) for th in theta), theta, create_graph=True)
        theta = theta - case.params.rates[t] * g
    loss = case.meta_loss(theta[None])
    loss.backward()
    assert difference(x.grad, twin.grad) < EXACT


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("net", NETS)
def test_the_two_forms_of_mixed_agree(net: str, shared: bool) -> None:
    case = make(net, shared)
    x, y = case.params.batches()
    batch = (x[0], y[0]) if shared else (x[:, 0], y[:, 0])
    lam = normal("lambda", case.params.theta0.shape)
    a, b = (mixed(case.loss, case.params.theta0, batch, lam, form, shared) for form in FORMS)
    for one, two in zip((a.gradient, a.hessian_lambda, *a.batch), (b.gradient, b.hessian_lambda, *b.batch)):
        assert difference(one, two) < EXACT


def test_mixed_leaves_integers_out() -> None:
    case = make("mlp")
    x, y = case.params.pixels[0], torch.arange(6) % CLASSES
    for form in FORMS:
        product = mixed(case.loss, case.params.theta0, (x, y), torch.ones_like(case.params.theta0), form)
        assert product.batch[0].shape == x.shape and product.batch[1] is None
    with pytest.raises(UserError, match=r"engine.mixed=revers is unknown; did you mean reverse"):
        mixed(case.loss, case.params.theta0, (x, y), case.params.theta0, "revers")


@pytest.mark.parametrize("form", FORMS)
def test_a_second_derivative_is_refused(form: str) -> None:
    case = make("mlp")
    leaves = case.params.leaves()
    loss = case.meta_loss(engine(case, "sgd", leaves, form=form))
    (g,) = torch.autograd.grad(loss, leaves.pixels, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_second_backward_says_what_to_do() -> None:
    case = make("mlp")
    loss = case.meta_loss(engine(case, "sgd", case.params.leaves()))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call unroll again"):
        loss.backward()


@pytest.mark.parametrize("at, start", [((4,), 0), ((0,), 0), ((1,), 1), ((2,), -1)])
def test_steps_that_do_not_exist_are_refused(at: tuple[int, ...], start: int) -> None:
    case = make("mlp")
    with pytest.raises(ValueError, match="must lie in"):
        engine(case, "sgd", case.params, at=at, start=start)


def test_train_is_unroll_without_gradients() -> None:
    case = make("convnet_batch")
    optimizer = Optimizer("adam")
    h = optimizer.schedule(case.params.rates, case.params.momenta)
    inner = Inner(case.loss, optimizer)
    trained = inner.train(case.params.theta0, case.params.batches(), ORDER, h)
    assert torch.equal(trained, inner.unroll(case.params.theta0, case.params.batches(), ORDER, h)[0])
    assert difference(trained, plain(case, "adam", case.params.moved("rates", 9 * case.params.rates))[0]) < EXACT
