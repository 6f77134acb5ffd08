"""The same numbers as foolbox, torchattacks and adv-lib, where they are installed (``make peers``)."""

import math

import pytest
import torch

from advkit import Lp, data, run
from advkit.attacks import BIM, FGSM, FMN, PGD
from advkit.benchmarks import peers
from advkit.engine import frozen
from advkit.models import networks
from advkit.train import RECIPES, train

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def problem():
    digits = data.load("mnist-5k", split="train")
    model = train(networks.build("mnist-cnn(width=8, dense=32)"), digits, RECIPES["mnist-cnn"].for_examples(len(digits)))
    x, y = data.load("mnist-5k", limit=200).batch(0, 200)
    return model, x, y


def _needs(name):
    if peers.peer(name) is None:
        pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("name", ["foolbox", "torchattacks"])
@pytest.mark.parametrize(("kind", "attack"), [("fgsm", FGSM()), ("bim", BIM(10))])
def test_the_same_adversarial_examples(problem, name, kind, attack):
    _needs(name)
    model, x, y = problem
    theirs = dict(peers.fixed_peers(kind))[name](model, x, y)
    assert float((peers.ours(attack)(model, x, y) - theirs).abs().max()) < 1e-6


@pytest.mark.parametrize("name", ["foolbox", "torchattacks", "adv_lib"])
def test_the_same_robust_accuracy_under_pgd(problem, name, monkeypatch):
    _needs(name)
    model, x, y = problem
    monkeypatch.setattr(peers, "EPS", 0.1)
    theirs = dict(peers.fixed_peers("pgd"))[name.replace("_", "-")]
    mine, other = peers.mean_accuracy(peers.ours, model, x, y), peers.mean_accuracy(lambda *_: theirs, model, x, y)
    # The random starts differ, and with them some of the 200 examples.
    assert abs(mine - other) <= 1.5
    # As an evaluation, every iterate counts and not only the last.
    result = run(PGD(peers.STEPS, peers.STEP), model, x, y, Lp(math.inf, 0.1), rng=torch.Generator().manual_seed(0))
    last = peers.ours(PGD(peers.STEPS, peers.STEP))(model, x, y)
    assert 100 - 100 * float(result.success.float().mean()) <= peers.robust_accuracy(model, x, y, last) + 1e-4


def test_fmn_is_as_close_as_adv_lib(problem):
    _needs("adv_lib")
    model, x, y = problem
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    mine = run(FMN(100), model, x, y, Lp(math.inf))
    with frozen(model):
        z = peers.peer("adv_lib.attacks").fmn(model, x, y, norm=math.inf, steps=100)
    theirs = (z - x).abs().flatten(1).amax(1)
    assert mine.success.all()
    assert float(mine.distance.median() / theirs.median()) < 1.01
