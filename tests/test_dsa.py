"""Differentiable siamese augmentation: what each operation does, that it is affine, its adjoint, its draws, its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from metadist import draw
from metadist.data import dsa
from metadist.errors import UserError
from metadist.run.compose import compose

F64 = torch.float64
SIZES = (7, 12)  # odd sides and even ones have different middles
NAMED = [*dsa.OPERATIONS, dsa.ALL]
pytestmark = pytest.mark.usefixtures("one_thread")


def keys(count: int, stream: str = "dsa") -> Tensor:
    return draw.key(5, stream, 0, torch.arange(count))


def made(strategy: str, batches: int = 8, images: int = 4, size: int = 12) -> Tensor:
    return dsa.parameters(strategy, keys(batches), images, size, F64)


def pixels(*shape: int, stream: str = "pixels") -> Tensor:
    return draw.normal(draw.key(6, stream), shape, F64)


def sampled_by_hand(x: Tensor, a: float, b: float, s: float, c: float, d: float, t: float) -> Tensor:
    """Pixel (i, j) of the result is the source [C, H, W] at (a i + b j + s, c i + d j + t) from its centre; 0 outside."""
    size, middle, out = x.shape[-1], (x.shape[-1] - 1) / 2, torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            u, v = i - middle, j - middle
            row, column = a * u + b * v + s + middle, c * u + d * v + t + middle
            for p in (math.floor(row), math.floor(row) + 1):
                for q in (math.floor(column), math.floor(column) + 1):
                    if 0 <= p < size and 0 <= q < size:
                        out[:, i, j] += (1 - abs(row - p)) * (1 - abs(column - q)) * x[:, p, q]
    return out


# ---------------------------------------------------------------- each operation


def test_none_is_the_identity() -> None:
    x, p = pixels(8, 4, 3, 12, 12), made("none")
    assert p.shape == (8, 4, dsa.WIDTH) and torch.equal(p, p[0, 0].expand_as(p))
    torch.testing.assert_close(dsa.apply(p, x), x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("channels", [1, 3])
def test_color_is_brightness_then_saturation_then_contrast(channels: int) -> None:
    """As published: one after the other, each from what the one before gave."""
    x, p = pixels(8, 4, channels, 7, 7), made("color", size=7)
    brightness, saturation, contrast = (v.view(8, 4, 1, 1, 1) for v in p[..., :3].unbind(-1))
    assert torch.equal(p[..., 3:], made("none")[..., 3:])
    want = x + brightness
    if channels == 3:
        gray = want.mean(2, keepdim=True)
        want = (want - gray) * saturation + gray
    level = want.mean((2, 3, 4), keepdim=True)
    want = (want - level) * contrast + level
    torch.testing.assert_close(dsa.apply(p, x), want, rtol=1e-12, atol=1e-12)
    assert float((want - x).abs().max()) > 0.3
    many = made("color", 200, 5)
    for column, (low, high) in enumerate(((-0.5, 0.5), (0.0, 2.0), (0.5, 1.5))):
        values = many[..., column]
        assert low <= float(values.min()) < low + 0.01 * (high - low) + 1e-9
        assert high - 0.01 * (high - low) < float(values.max()) < high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.04 * (high - low))


@pytest.mark.parametrize("size", SIZES)
def test_crop_is_a_window_of_the_padded_image(size: int) -> None:
    reach = round(size / 8)
    x, p = pixels(30, 2, 3, size, size), made("crop", 30, 2, size)
    found = dsa.apply(p, x)
    padded = torch.nn.functional.pad(x, (reach,) * 4)
    seen = set()
    for b in range(30):
        for n in range(2):
            row, column = (int(v) + reach for v in p[b, n, [5, 8]])
            seen.add((row, column))
            want = padded[b, n, :, row : row + size, column : column + size]
            torch.testing.assert_close(found[b, n], want, rtol=1e-12, atol=1e-12)
    assert {v for pair in seen for v in pair} == set(range(2 * reach + 1))  # every shift up to an eighth, and no other


def test_flip_mirrors_half_of_the_images() -> None:
    x, p = pixels(200, 5, 1, 7, 7), made("flip", 200, 5, 7)
    mirrored = p[..., 7] == -1
    assert 430 < int(mirrored.sum()) < 570  # 1,000 draws, sd 16
    want = torch.where(mirrored.view(200, 5, 1, 1, 1), tv.hflip(x), x)
    torch.testing.assert_close(dsa.apply(p, x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_scale_is_bilinear(size: int) -> None:
    x, p = pixels(6, 1, 2, size, size), made("scale", 6, 1, size)
    found = dsa.apply(p, x)
    for b in range(6):
        a, _, s, c, d, t = p[b, 0, 3:9].tolist()
        assert s == t == c == 0 and a != d  # rows and columns by factors of their own
        torch.testing.assert_close(found[b, 0], sampled_by_hand(x[b, 0], a, 0, 0, 0, d, 0), rtol=1e-11, atol=1e-11)
    many = made("scale", 400, 2)[..., [3, 7]]
    assert 1 / 1.2 <= float(many.min()) < 0.84 and 1.19 < float(many.max()) < 1.2


@pytest.mark.parametrize("size", SIZES)
def test_rotate_is_torchvisions(size: int) -> None:
    x, p = pixels(6, 1, 3, size, size), made("rotate", 6, 1, size)
    found = dsa.apply(p, x)
    for b in range(6):
        angle = math.degrees(math.atan2(float(p[b, 0, 4]), float(p[b, 0, 3])))
        want = tv.rotate(x[b, 0], angle, InterpolationMode.BILINEAR)
        torch.testing.assert_close(found[b, 0], want, rtol=1e-5, atol=1e-5)  # torchvision works in float32
        torch.testing.assert_close(found[b, 0], sampled_by_hand(x[b, 0], *p[b, 0, 3:9].tolist()), rtol=1e-11, atol=1e-11)
    many = made("rotate", 400, 2)
    angles = torch.rad2deg(torch.atan2(many[..., 4], many[..., 3]))
    assert -15 <= float(angles.min()) < -14.8 and 14.8 < float(angles.max()) < 15 and abs(float(angles.mean())) < 1


@pytest.mark.parametrize("size", SIZES)
def test_cutout_is_a_square_of_half_a_side_clipped_at_the_border(size: int) -> None:
    side = int(size / 2 + 0.5)
    p = made("cutout", 600, 2, size)
    gone = dsa.apply(p, torch.ones(600, 2, 1, size, size, dtype=F64))[:, :, 0] == 0
    rows, columns = gone.any(-1), gone.any(-2)
    torch.testing.assert_close(gone, rows[..., None] & columns[..., None, :])  # a rectangle
    heights = rows.sum(-1)
    assert bool((gone.sum((-2, -1)) == heights * columns.sum(-1)).all())
    inner = (rows[..., 0] | rows[..., -1]).logical_not()
    assert bool((heights[inner] == side).all()) and int(heights.max()) == side
    # Its middle is uniform over the rows, both borders' ends included: as many heights as the clipping leaves.
    places = size + 1 - side % 2
    clipped = [min(first + side, size) - max(first, 0) for first in range(-(side // 2), places - side // 2)]
    expected = [clipped.count(h) for h in range(side + 1)]
    counts = torch.bincount(heights.flatten(), minlength=side + 1)
    for height, number in enumerate(expected):
        share = number / places
        assert abs(int(counts[height]) - 1200 * share) <= 5 * math.sqrt(1200 * share * (1 - share)) + 1e-9, height
    x = pixels(600, 2, 3, size, size)
    kept = dsa.apply(p, x)
    torch.testing.assert_close(kept, x.masked_fill(gone[:, :, None], 0), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------- derivatives


@pytest.mark.parametrize("strategy", NAMED)
def test_it_is_affine_in_the_pixels_and_autograd_knows_its_slope(strategy: str) -> None:
    shape = (8, 4, 3, 12, 12)
    x, v, lam, p = pixels(*shape), pixels(*shape, stream="v"), pixels(*shape, stream="lam"), made(strategy)
    at = [dsa.apply(p, x + step * v) for step in (-1.0, 0.0, 1.0)]
    torch.testing.assert_close(at[0] + at[2], 2 * at[1], rtol=1e-11, atol=1e-11)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad((dsa.apply(p, leaf) * lam).sum(), leaf)
    want = float(((at[2] - at[0]) * lam).sum()) / 2  # an affine map's difference quotient is exact
    assert float((g * v).sum()) == pytest.approx(want, rel=1e-11) and abs(want) > 1
    assert torch.autograd.gradcheck(lambda y: dsa.apply(p[:2, :1], y), (pixels(2, 1, 2, 5, 5).requires_grad_(),))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", ["crop", "flip", "scale", "rotate", "extremes"])
def test_spread_is_the_adjoint_of_sampled(operation: str, size: int) -> None:
    if operation == "extremes":  # corners of what can be drawn
        c, s = math.cos(math.radians(15)), math.sin(math.radians(15))
        scales = [[a, 0, 0, 0, d, 0] for a in (1 / 1.2, 1.2) for d in (1 / 1.2, 1.2)]
        warp = torch.tensor([*scales, [c, s, 0, -s, c, 0], [c, -s, 0, s, c, 0]], dtype=F64)
    else:
        warp = made(operation, 40, 1, size)[:, 0, 3:9]
    x, lam = (pixels(len(warp), 2, size, size, stream=name) for name in ("x", "lam"))
    found, spread = dsa._sampled(x, warp), dsa._spread(lam, warp)
    left, right = ((a * b).sum((1, 2, 3)) for a, b in ((found, lam), (x, spread)))
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-10)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(spread, torch.autograd.grad(found_of(leaf, warp), leaf, lam)[0], rtol=1e-11, atol=1e-12)
    # The function that a GPU runs, here on a CPU.
    ours = dsa._Resample.apply(leaf, warp)
    assert torch.equal(ours, found) and torch.equal(torch.autograd.grad(ours, leaf, lam)[0], spread)


def found_of(x: Tensor, warp: Tensor) -> Tensor:
    return dsa._sampled(x, warp)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_a_gpu_gives_the_same_numbers_twice() -> None:
    x, lam, p = (v.cuda().float() for v in (pixels(8, 4, 3, 32, 32), pixels(8, 4, 3, 32, 32, stream="lam"), made("rotate")))
    runs = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        out = dsa.apply(p, leaf)
        runs.append((out.detach(), torch.autograd.grad(out, leaf, lam)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    torch.testing.assert_close(runs[0][0].cpu(), dsa.apply(p.cpu(), x.cpu()), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- draws


def chosen(p: Tensor) -> list[str | None]:
    """Which operation each batch [G, n, WIDTH] got, by what is not the identity; None: none that shows."""
    moved = (p != made("none")[0, 0]).any(1)
    marks: dict[str, Callable[[Tensor], bool]] = {
        "color": lambda m: bool(m[:3].any()),
        "cutout": lambda m: bool(m[9:].any()),
        "rotate": lambda m: bool(m[4]),
        "scale": lambda m: bool(m[3]),
        "flip": lambda m: bool(m[7]),
        "crop": lambda m: bool(m[[5, 8]].any()),
    }
    return [next((name for name, shows in marks.items() if shows(m)), None) for m in moved]


def test_each_batch_gets_one_operation_and_all_are_as_frequent() -> None:
    p = made(dsa.ALL, 3000, 40)
    found = chosen(p)
    assert None not in found
    for name in dsa.OPERATIONS:
        assert abs(found.count(name) - 500) < 100  # sd 20
    alone = {name: made(name, 3000, 40) for name in dsa.OPERATIONS}
    for i in range(0, 3000, 100):
        assert torch.equal(p[i], alone[str(found[i])][i])  # and that one is done whole
    two = chosen(made("scale_color", 1000, 3))
    assert set(two) == {"scale", "color"} and abs(two.count("scale") - 500) < 80


def test_one_image_stands_for_the_whole_batch() -> None:
    """Siamese: both sides of a comparison, of whatever size, get the very same."""
    p = made(dsa.ALL, 20, 1)
    one = pixels(20, 1, 3, 12, 12)
    out = dsa.apply(p, one.expand(20, 6, 3, 12, 12))
    assert torch.equal(out, out[:, :1].expand_as(out))
    torch.testing.assert_close(out[:, :1], dsa.apply(p, one), rtol=1e-12, atol=1e-12)
    own = made("scale", 20, 6)[..., 3]
    assert all(len(set(row.tolist())) == 6 for row in own)  # otherwise each image its own


def test_draws_depend_on_their_own_key_alone() -> None:
    every = dsa.parameters(dsa.ALL, keys(12), 5, 12, F64)
    some = torch.tensor([7, 2])
    assert torch.equal(dsa.parameters(dsa.ALL, keys(12)[some], 5, 12, F64), every[some])
    nested = dsa.parameters(dsa.ALL, keys(12).view(3, 4, 2), 5, 12, F64)
    assert torch.equal(nested.flatten(0, 1), every)
    assert torch.equal(dsa.parameters(dsa.ALL, keys(12), 5, 12), every.float())  # one draw for all dtypes
    assert not torch.equal(dsa.parameters(dsa.ALL, keys(12, "another"), 5, 12, F64), every)
    x = pixels(12, 5, 3, 12, 12)
    torch.testing.assert_close(dsa.apply(every, x)[some], dsa.apply(every[some], x[some]), rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["method=dsa", "dsa=color_crp"],
            "augmentation=crp is unknown; did you mean crop? (allowed: color, crop, cutout, flip,",
        ),
        (["method=dsa", "dsa=color_crop_color"], "the augmentation color_crop_color names an operation twice; name each once"),
        (["method=dm", f"dsa={dsa.ALL}"], "a mirrored digit of digits is no digit; use color_crop_cutout_scale_rotate"),
        (["method=dsa", "data=mnist", "dsa=flip"], "dsa=flip mirrors images, and a mirrored digit of mnist is no digit"),
        (
            ["method=dsa", "data=usps", "dsa=crop_flip"],
            "a mirrored digit of usps is no digit; use color_crop_cutout_scale_rotate",
        ),
        (
            ["method=dsa", "data=svhn", "dsa=crop_flip"],
            "a mirrored digit of svhn is no digit; use color_crop_cutout_scale_rotate",
        ),
        (["method=dd_random_init", "dsa=crop"], "dsa is not read by this run: it belongs to method.match=class"),
        (["method=dsa", "dsa=none"], "dsa=none contradicts method=dsa; choose method=dc"),
        (["method=dc", "dsa=crop"], "dsa=crop contradicts method=dc; choose method=dsa"),
    ],
)
def test_refusals_are_one_line(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(words)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_has_a_mirror_image_may_be_mirrored() -> None:
    for data in ("cifar10", "fashion_mnist"):
        assert compose(["method=dsa", f"data={data}", f"dsa={dsa.ALL}"]).dsa == dsa.ALL
    assert compose(["method=dsa", "data=mnist"]).dsa == dsa.MIRROR_FREE == compose(["method=dm"]).dsa
    assert set(dsa.operations(dsa.ALL)) - set(dsa.operations(dsa.MIRROR_FREE)) == {"flip"}
    with pytest.raises(UserError, match=r"^augmentation= is unknown"):
        dsa.operations("color__crop")
