"""Counter-based draws: the published cipher, the distributions, and the same bits however the work is split or compiled."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from metadist import draw

ONES = 0xFFFFFFFF


def keys(count: int, stream: str = "test") -> torch.Tensor:
    return draw.key(3, stream, 7, torch.arange(count))


def test_threefry_known_answers() -> None:
    """Threefry-2x32, 20 rounds: the vectors of Random123's kat_vectors."""
    vectors = [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ]
    for key, counter, answer in vectors:
        words = draw.threefry(torch.tensor(key), torch.tensor(counter[0]), torch.tensor(counter[1]))
        assert tuple(int(w) for w in words) == answer
    # All at once: keys broadcast against counters.
    many = draw.threefry(torch.tensor([v[0] for v in vectors]), *torch.tensor([v[1] for v in vectors]).T)
    assert torch.stack(many, 1).tolist() == [list(v[2]) for v in vectors]


def test_bits_of_every_kind_stand_for_ever() -> None:
    """A changed bit would change every run: resumes and published sets rest on these."""
    draws = (
        draw.bits(keys(3), 7),
        draw.split(keys(3), torch.arange(3)),
        draw.uniform(keys(2), (5,)),
        draw.uniform(keys(2), (5,), torch.float64),
        draw.normal(keys(2), (4099,)),
        draw.integers(keys(2), (9,), 1797),
        draw.permutation(keys(2), 50),
    )
    found = [hashlib.sha256(d.contiguous().numpy().tobytes()).hexdigest()[:16] for d in draws]
    assert found == [
        "3fe7ba720ef34759",
        "e8edc5a0d30b46a6",
        "732097d0147217b3",
        "616b442f0d7ee2be",
        "4cb2b0b4df88e4c2",
        "2a212c16c2238120",
        "e6faa45e602dc92b",
    ]


def test_each_part_of_a_key_counts() -> None:
    seeds = [draw.key(s, "a") for s in (0, 1, 2**32, 2**62 + 1)]
    streams = [draw.key(0, name) for name in ("b", "c")]
    steps = [draw.key(0, "a", s) for s in (1, 2, 2**31)]
    tasks = [draw.key(0, "a", 0, t) for t in (1, 2)]
    splits = [draw.split(draw.key(0, "a"), i) for i in range(3)]
    every = [tuple(k.tolist()) for k in (*seeds, *streams, *steps, *tasks, *splits)]
    assert len(set(every)) == len(every)
    assert all(0 <= w < 2**32 for k in every for w in k)
    assert draw.key(0, "a", 1, 2).tolist() != draw.key(0, "a", 2, 1).tolist()


def test_a_task_draws_the_same_in_any_group() -> None:
    whole, shape = keys(6), (3, 5)
    for kind in (
        lambda k: draw.uniform(k, shape),
        lambda k: draw.uniform(k, shape, torch.float64),
        lambda k: draw.normal(k, shape),
        lambda k: draw.integers(k, shape, 10),
        lambda k: draw.permutation(k, 12),
        lambda k: draw.bits(draw.split(k, 4), 9),
    ):
        together = kind(whole)
        assert torch.equal(together, torch.cat([kind(whole[:1]), kind(whole[1:5]), kind(whole[5:])]))
        assert torch.equal(together[2], kind(whole[2]))
        assert len({row.numpy().tobytes() for row in together}) == 6  # and differently from task to task


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform(dtype: torch.dtype) -> None:
    n = 200_000
    u = draw.uniform(keys(1), (n,), dtype)[0].double()
    assert 0 <= float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=5 / math.sqrt(12 * n))
    assert float(u.var()) == pytest.approx(1 / 12, abs=5 / math.sqrt(180 * n))
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - n / 64) ** 2 / (n / 64)).sum()) < 63 + 5 * math.sqrt(126)  # chi-squared
    scaled = u * 2 ** (24 if dtype == torch.float32 else 53)
    assert torch.equal(scaled, scaled.round())
    assert bool((scaled % 2 == 1).any())  # the last bit is drawn too


def test_normal() -> None:
    n = 400_000
    z = draw.normal(keys(1), (n,))[0].double()
    error = 5 / math.sqrt(n)
    assert float(z.mean()) == pytest.approx(0, abs=error)
    assert float(z.var()) == pytest.approx(1, abs=math.sqrt(2) * error)
    assert float((z**3).mean()) == pytest.approx(0, abs=math.sqrt(15) * error)
    assert float((z**4).mean()) == pytest.approx(3, abs=math.sqrt(96) * error)
    assert 4 < float(z.abs().max()) < 5.4
    for x in (-2.0, -1.0, 0.0, 0.5, 1.5):
        expected = 0.5 * (1 + math.erf(x / math.sqrt(2)))
        assert float((z < x).double().mean()) == pytest.approx(expected, abs=error / 2)
    assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0, abs=error)
    one, other = draw.normal(keys(2), (n // 2,)).double()
    assert float((one * other).mean()) == pytest.approx(0, abs=error * math.sqrt(2))


def test_normal_of_float64_is_that_of_float32() -> None:
    narrow, wide = draw.normal(keys(2), (99,)), draw.normal(keys(2), (99,), torch.float64)
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    assert torch.equal(narrow.double(), wide)


@pytest.mark.parametrize("high", [1, 2, 10, 1437, 2**31 - 1])
def test_integers(high: int) -> None:
    n = 20_000
    values = draw.integers(keys(2), (n,), high)
    assert values.dtype == torch.int64 and values.shape == (2, n)
    assert int(values.min()) >= 0 and int(values.max()) < high
    mean = float(values.double().mean())
    assert mean == pytest.approx((high - 1) / 2, abs=5 * high / math.sqrt(12 * 2 * n) if high > 1 else 0)
    if high <= 10:
        assert len(values.unique()) == high


def test_permutation() -> None:
    n = 257
    orders = draw.permutation(keys(4), n)
    assert torch.equal(orders.sort(dim=-1).values, torch.arange(n).expand(4, n))
    assert len({tuple(o.tolist()) for o in orders}) == 4
    first = draw.permutation(keys(6000), 3)
    counts = torch.stack([(first[:, 0] * 3 + first[:, 1] == 3 * a + b).sum() for a in range(3) for b in range(3) if a != b])
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 25  # all six orders alike: chi-squared with 5 degrees


def test_counters_do_not_repeat() -> None:
    words = draw.bits(keys(1), 4001)[0]
    pairs = set(zip(words[:2001].tolist(), words[2001:].tolist()))
    assert len(pairs) == 2000
    assert draw.bits(keys(1), 0).shape == (1, 0)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # the tables of normal
def test_vmap_and_compiled_draws_are_the_same_bits() -> None:
    def every(k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            draw.uniform(k, (5,)),
            draw.uniform(k, (5,), torch.float64),
            draw.normal(k, (2, 3)),
            draw.integers(draw.split(k, 3), (4,), 1000),
            draw.permutation(k, 11),
        )

    k = keys(3)
    eager = every(k)
    for name, other in (
        ("compiled", torch.compile(every, backend="aot_eager", fullgraph=True)(k)),
        ("vmap", torch.func.vmap(every)(k)),
    ):
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(eager, other, strict=True)), name


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw.normal(keys(2), (10,))
    draw.permutation(keys(2), 10)
    assert torch.equal(before, torch.get_rng_state())


def test_a_key_lies_where_its_task_lies() -> None:
    task = torch.zeros((), dtype=torch.int64, device="meta")
    assert draw.key(0, "x", 0, task).device.type == "meta"
    assert draw.key(0, "x", 0, task[None]).device.type == "meta"
