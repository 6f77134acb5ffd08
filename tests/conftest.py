"""What the tests share."""

from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _quiet_machine():
    """One thread, which is faster for small tensors, and the global random state as it was."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.fixture
def linear():
    """A linear model of two classes with a known closest example: weights (D,), offset, in float64."""

    def make(size, seed=0):
        rng = torch.Generator().manual_seed(seed)
        w = torch.randn(size, generator=rng, dtype=torch.float64)
        x = torch.randn(32, size, generator=rng, dtype=torch.float64)

        def model(z):
            score = z @ w
            return torch.stack([-score / 2, score / 2], dim=1)

        return model, w, x, (x @ w > 0).long()

    return make
