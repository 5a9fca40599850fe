"""Can this module be trained by meta-gradients? Each refusal names the layer and the reason.

Design choices
- Nothing is guessed from a layer's type: the net runs once as it is and once under the transforms, and what happens is watched
  (random generators, buffers, the input), so layers of the user's own are judged by the same rule.
- Errors are not enough: some operations give wrong second derivatives without a word. Those under ``torch.func`` are compared
  with PyTorch's plain double backward of the untouched module, and these with central differences of its gradient (a
  ``detach()`` or a ``once_differentiable`` backward shows only there). In float64, where the module allows it.
- A failure inside a forward pass belongs to the innermost layer that was running; one in a derivative to the first layer, in
  order of completion, that fails alone on the input it had.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from metadist import draw
from metadist.errors import UserError
from metadist.nets import layers
from metadist.nets.init import rebuild
from metadist.nets.watch import Call, Watch, describe, first_line, named, same_generators
from metadist.nets.weight_norm import is_gain

if TYPE_CHECKING:
    from metadist.nets.learner import Learner

Form = Literal["reverse", "forward"]
Loss = Callable[..., Tensor]


def _product(f: Loss, args: tuple[Tensor, ...], v: tuple[Tensor, ...], form: Form) -> tuple[Tensor, ...]:
    """The second derivative of f at args [...] along v, as the engine computes it: over a vmapped axis, here of two equals."""
    first = vmap(grad(f, argnums=tuple(range(len(args)))))  # gradients of every argument, as a tuple
    two, lam = (tuple(torch.stack((t, t)) for t in ts) for ts in (args, v))
    if form == "forward":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own forward-mode rules are jit scripts
            warnings.simplefilter("ignore", DeprecationWarning)
            out = jvp(first, two, lam)[1]
    else:
        out = vjp(first, *two)[1](lam)
    return tuple(o[1].detach() for o in out)


def _double_backward(f: Loss, args: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same by PyTorch's ordinary autograd."""
    leaves = tuple(a.detach().requires_grad_() for a in args)
    with torch.enable_grad():
        g = torch.autograd.grad(f(*leaves), leaves, create_graph=True, materialize_grads=True)
        along = torch.stack([(a * b).sum() for a, b in zip(g, v)]).sum()
        if not along.requires_grad:
            return tuple(torch.zeros_like(a) for a in args)
        return torch.autograd.grad(along, leaves, materialize_grads=True)


def _gradient(f: Loss, args: tuple[Tensor, ...], v: tuple[Tensor, ...], h: float) -> Tensor:
    """The plain gradient of f at args + h v, flat."""
    leaves = tuple((a + h * b).detach().requires_grad_() for a, b in zip(args, v))
    with torch.enable_grad():
        g = torch.autograd.grad(f(*leaves), leaves, materialize_grads=True)
    return torch.cat([t.flatten() for t in g])


def _confirmed(f: Loss, args: tuple[Tensor, ...], v: tuple[Tensor, ...], want: Tensor) -> bool:
    """Is ``want`` [all of args, flat] the change of the gradient along v? One of four steps must say so (kinks spoil some)."""
    for h in (1e-6, 1e-7, 1e-8, 1e-9):
        above, below = _gradient(f, args, v, h), _gradient(f, args, v, -h)
        rounding = 1e-14 * float(above.abs().max()) / h
        if float(((above - below) / (2 * h) - want).abs().max()) <= 1e-3 * float(want.abs().max()) + rounding:
            return True
    return False


def _directions(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A random direction of length 1 over all of args, drawn by counter (and repeated: large nets would take seconds)."""
    pattern = draw.normal(draw.key(0, "direction"), (65_521,), args[0].dtype).to(args[0].device)
    sizes = [a.numel() for a in args]
    v = pattern.repeat(sum(sizes) // len(pattern) + 1)[: sum(sizes)]
    parts = torch.split(v / v.square().sum().sqrt(), sizes)
    return tuple(part.view(a.shape) for part, a in zip(parts, args))


def _verdict(pure: Loss, plain: Loss, args: tuple[Tensor, ...], form: Form) -> str | None:
    """Why these functions, which should be one, have no sound second derivative; None if they have."""
    v, wide = _directions(args), args[0].dtype == torch.float64
    try:
        want, got = (
            torch.cat([t.flatten() for t in p]) for p in (_double_backward(plain, args, v), _product(pure, args, v, form))
        )
        confirmed = not wide or _confirmed(plain, args, v, want)
    except UserError:
        raise
    except Exception as e:
        if "data-dependent control flow" in str(e) or ".item()" in str(e):
            return "branches on the values of a tensor; write the choice with torch.where"
        return f"can't be differentiated twice over several networks at once: {first_line(e)}"
    if not confirmed:
        return "gives second derivatives that are not those of its gradient (a detach(), or a backward not meant for it)"
    if not float((want - got).abs().max()) <= (1e-4 if wide else 5e-2) * float(want.abs().max()) + 1e-12:
        return "gets wrong second derivatives from torch.func over several networks at once; write it in elementary operations"
    return None


def _alone(call: Call, pure: nn.Module, form: Form) -> str | None:
    """The verdict on this one layer with the inputs it had."""
    weights = {n: p.detach() for n, p in call.layer.named_parameters()}
    inputs = [i for i, a in enumerate(call.args) if isinstance(a, Tensor) and a.is_floating_point()]
    values = (*weights.values(), *[call.args[i] for i in inputs])

    def f(layer: nn.Module) -> Loss:
        def run(*flat: Tensor) -> Tensor:
            given = list(call.args)
            for i, value in zip(inputs, flat[len(weights) :]):
                given[i] = value.clone()  # the layer may work in place
            out = tree_leaves(functional_call(layer, dict(zip(weights, flat)), tuple(given), call.kwargs))
            floats = [o for o in out if isinstance(o, Tensor) and o.is_floating_point()]
            return torch.stack([0 * flat[0].sum(), *[o.square().sum() for o in floats]]).sum()

        return run

    return _verdict(f(pure), f(call.layer), values, form) if values else None


def _plain(learner: Learner, theta: Tensor, x: Tensor) -> tuple[Tensor, Watch]:
    """One ordinary forward pass in training mode, watched: its logits and the calls."""
    module = learner.module(theta)
    watch, given, size = Watch(module, draws=True), x.clone(), "x".join(str(n) for n in x.shape[1:])
    before = {n: b.clone() for n, b in module.named_buffers()}
    try:
        with same_generators(), watch(), torch.no_grad():
            out = module(given)
    except Exception as e:
        what = describe(watch.running[-1]) if watch.running else "the net"
        raise UserError(
            f"{what} can't take a batch of {len(x)} images {size}: {first_line(e)} (data.size resizes images)"
        ) from e
    if watch.drawn is not None:
        what = describe(watch.drawn)
        raise UserError(f"{what} draws random numbers in its forward pass; set its probability to 0 or take it out of the net")
    if not torch.equal(given, x):
        raise UserError("the net changes its input in place; make its first operation work on a copy")
    _buffers(module, before)
    _alive(watch.finished)
    return _output(learner, out, x), watch


def _alive(calls: list[Call]) -> None:
    """Refuses a group normalization over a single value: it would give zeros, whatever the weights."""
    for call in calls:
        shape = call.args[0].shape if call.args and isinstance(call.args[0], Tensor) else torch.Size()
        if isinstance(call.layer, nn.GroupNorm) and shape[1:].numel() == call.layer.num_groups:
            what = f"normalizes groups of one value each (maps of {list(shape[2:])}) to zero"
            raise UserError(f"{describe(call)} {what}; take larger images (data.size) or fewer groups")


def _buffers(module: nn.Module, before: dict[str, Tensor]) -> None:
    owners = dict(module.named_modules())
    for name, value in module.named_buffers():
        owner = owners[name.rpartition(".")[0]]
        same = name in before and value.shape == before[name].shape and torch.equal(value, before[name])
        if not same and not layers.is_batch_norm(owner):
            what = named(name.rpartition(".")[0], owner)
            raise UserError(f"{what} changes its buffer {name} in the forward pass; only BatchNorm may keep statistics there")


def _output(learner: Learner, out: object, x: Tensor) -> Tensor:
    want = f"[{len(x)}, {learner.classes or 'classes'}]"
    if not isinstance(out, Tensor):
        raise UserError(f"the net returns a {type(out).__name__}; it must return one tensor of logits {want}")
    if out.dim() != 2 or len(out) != len(x) or learner.classes not in (None, out.shape[1]):
        raise UserError(f"the net returns a tensor of shape {list(out.shape)}; it must return logits {want}")
    return out


def _derivatives(learner: Learner, net: nn.Module, theta: Tensor, x: Tensor, calls: list[Call], form: Form) -> None:
    """The second-order product of the whole net; a failure is traced to its layer."""
    watch, module = Watch(net), learner.module(theta)

    def plain(flat: Tensor, images: Tensor) -> Tensor:
        out: Tensor = functional_call(module, learner.views(flat), (images,))
        return out.square().mean()

    with watch():
        why = _verdict(lambda flat, images: learner(flat, images).square().mean(), plain, (theta, x), form)
    if why is None:
        return
    if watch.running:
        raise UserError(f"{describe(watch.running[-1])} {why}")
    pure = dict(net.named_modules())
    for call in calls:
        reason = _alone(call, pure[call.name], form)
        if reason is not None:
            raise UserError(f"{describe(call)} {reason}")
    raise UserError(f"the net {why}")


def _reproducible(learner: Learner, key: Tensor) -> None:
    """The same key must give the same weights, or workers would disagree."""
    first, second = (rebuild(learner.template, learner.factory, key) for _ in range(2))
    if not all(torch.equal(first[n], second[n]) for n in learner.names):
        raise UserError("the net draws its initial weights outside PyTorch's generator; use torch.nn.init or torch's functions")


def _widened(learner: Learner, x: Tensor) -> Learner:
    """The same learner in float64, or itself where the module insists on another precision."""
    wide = type(learner)(learner.template, learner.kind, learner.factory, torch.float64, learner.device, learner.classes)
    try:
        with same_generators(), torch.no_grad():
            copy.deepcopy(wide.template)(x.to(torch.float64, copy=True))
    except Exception:
        return learner
    return wide


def _not_zero(learner: Learner, theta: Tensor) -> None:
    """Normalized weights need a direction: an output whose weights all start at zero has none."""
    modules = dict(learner.template.named_modules())
    for name, value in learner.views(theta).items():
        path, _, local = name.rpartition(".")
        if is_gain(modules[path], local) and bool((value == 0).any()):
            raise UserError(f"net.weight_norm=true: layer {path} has outputs whose weights start at zero: no direction; "
                            "start them elsewhere (net.init=kaiming), or leave it out")  # fmt: skip


def check(learner: Learner, x: Tensor, form: Form) -> None:
    """See ``Learner.check``."""
    if x.dim() != 4 or len(x) < 2:
        raise ValueError(f"check needs two images or more, [B, C, H, W]; got {list(x.shape)}")
    keys = draw.key(0, "check", 0, torch.arange(1)).to(learner.device)
    _reproducible(learner, keys[0])
    learner = _widened(learner, x)
    theta, x = learner.init(keys)[0], x.to(learner.device, learner.dtype)
    _not_zero(learner, theta)
    logits, watch = _plain(learner, theta, x)
    if not torch.allclose(learner(theta, x), logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise UserError("the net uses tensors that are neither its parameters nor its buffers; register them in the module")
    with sdpa_kernel(SDPBackend.MATH):  # as the learner does
        _derivatives(learner, learner.net, theta, x, watch.finished, form)
