"""Attacks that change few entries."""

import math

import pytest
import torch

from advkit import Goal, Lp, run
from advkit.attacks import JSMA, SigmaZero, SparseRS


def fewest(model, w, x):
    """A linear model around the middle of [0, 1], its answers, and the fewest entries that change them."""
    x, centre = x.sigmoid(), torch.full_like(w, 0.5)
    score = (x - centre) @ w
    gain = torch.where((w > 0) == (score < 0).unsqueeze(1), 1 - x, x) * w.abs()
    reach = gain.sort(1, descending=True).values.cumsum(1)
    true = (reach < score.abs().unsqueeze(1)).sum(1) + 1
    return lambda z: model(z.flatten(1) - centre), x, (score > 0).long(), true


def test_sigma_zero_comes_close_to_the_fewest_entries(linear):
    model, w, x, _ = linear(20)
    model, x, y, true = fewest(model, w, x)
    result = run(SigmaZero(200), model, x, y, Lp(0.0))
    assert result.success.all()
    assert (result.distance >= true).all()
    assert float((result.distance / true).mean()) < 1.15


def test_sparse_rs_finds_what_the_radius_allows_and_nothing_else(linear):
    model, w, x, _ = linear(12)
    model, x, y, true = fewest(model, w, x)
    result = run(SparseRS(2000), model, x, y, Lp(0.0, 3.0))
    assert not result.success[true > 3].any()
    assert float(result.success[true <= 3].double().mean()) > 0.9


@pytest.mark.parametrize(("eps", "pixels"), [(3.0, 1), (8.0, 2), (2.0, 0)])
def test_sparse_rs_changes_whole_pixels(eps, pixels):
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    seen = []

    def model(z):
        seen.append(z - x)
        return torch.tensor([[1.0, 0.0]]).expand(len(z), 2)

    run(SparseRS(20), model, x, torch.zeros(4).long(), Lp(0.0, eps))
    for d in seen[1:]:
        changed = d != 0
        if pixels:
            assert (changed.all(1).flatten(1).sum(1) == pixels).all()
            assert torch.equal(changed.all(1), changed.any(1))
        else:
            assert (changed.flatten(1).sum(1) == eps).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.peer
def test_sigma_zero_is_as_close_as_adv_lib(linear):
    from advkit.benchmarks.peers import peer

    adv_lib = peer("adv_lib.attacks.sigma_zero")
    if adv_lib is None:
        pytest.skip("adv-lib is not installed")
    model, w, x, _ = linear(60)
    model, x, y, _ = fewest(model, w, x)
    ours = run(SigmaZero(100), model, x, y, Lp(0.0)).distance
    z = adv_lib.sigma_zero(model, x, y, num_steps=100)
    theirs = torch.where(model(z).argmax(1) != y, Lp(0.0).distance(z, x), math.inf)
    assert float(ours.mean()) <= float(theirs.mean()) * 1.02


@pytest.mark.parametrize("entries", [1, 2])
def test_jsma_finds_the_fewest_entries_of_a_linear_model(linear, entries):
    model, w, x, _ = linear(20)
    model, x, y, true = fewest(model, w, x)
    result = run(JSMA(20, entries), model, x, y, Lp(0.0))
    assert result.success.all()
    changed = (true / entries).ceil() * entries
    assert (result.distance == changed).all()
    assert (result.forwards <= changed / entries + 2).all()
    within = run(JSMA(20, entries), model, x, y, Lp(0.0, 3.0))
    assert torch.equal(within.success, true <= 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.peer
def test_jsma_changes_no_more_entries_than_torchattacks():
    from advkit.benchmarks.peers import peer

    torchattacks = peer("torchattacks")
    if torchattacks is None:
        pytest.skip("torchattacks is not installed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).eval()
    x = torch.rand(20, 1, 8, 8)
    target = model(x).argmin(1)
    ours = run(JSMA(64), model, x, target, Lp(0.0), goal=Goal(targeted=True)).distance
    attack = torchattacks.JSMA(model, theta=1.0, gamma=0.9)
    attack.set_mode_targeted_by_label(quiet=True)
    z = attack(x, target)
    theirs = torch.where(model(z).argmax(1) == target, Lp(0.0).distance(z, x), math.inf)
    assert float(ours.clamp(max=64).mean()) <= float(theirs.clamp(max=64).mean())
