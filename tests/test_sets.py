"""The sets that ship with the package do what the README says of them."""

from __future__ import annotations

import os

import pytest

import metadist
from metadist.synthetic.distilled import SETS, shipped

REAL = os.environ.get("METADIST_DATA")
needs_mnist = pytest.mark.skipif(REAL is None, reason="needs $METADIST_DATA, a folder with torchvision's MNIST")


def test_the_shipped_sets_are_small() -> None:
    assert shipped() == ("digits-10", "mnist-10", "mnist-100")
    assert all(path.stat().st_size < 200_000 for path in SETS.glob("*.safetensors"))


def test_digits_10() -> None:
    assert metadist.evaluate("digits-10", nets=20).mean > 0.86


@needs_mnist
def test_mnist_10_from_its_own_initialization() -> None:
    # One network: the initialization is drawn again by its recipe and must be the recorded one to the bit.
    assert metadist.evaluate("mnist-10", root=str(REAL), nets=1).mean > 0.938


@pytest.mark.slow
@needs_mnist
def test_mnist_100_from_fresh_initializations() -> None:
    assert metadist.evaluate("mnist-100", root=str(REAL), nets=5).mean > 0.795
