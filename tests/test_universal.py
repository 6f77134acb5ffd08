"""Universal perturbations: the optimum of a linear model, unseen inputs, and the command."""

import json
import math

import pytest
import torch

from advkit import Goal, Lp, UsageError
from advkit.attacks.universal import Universal
from advkit.cli import main
from advkit.models import checkpoint
from advkit.norms import lp_norm, steepest

FREE = {"low": -math.inf, "high": math.inf}


def rng():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("targeted", [False, True])
def test_on_a_linear_model_it_is_the_steepest_direction(linear, p, targeted):
    """All inputs of class 0 of a linear model are pushed along the same direction, to the edge of the ball."""
    model, w, x, y = linear(12)
    some, threat = x[y == 0], Lp(p, 0.7, **FREE)
    labels = torch.full((len(some),), int(targeted), dtype=torch.int64)
    delta = Universal(200, 8).fit(model, some, labels, threat, goal=Goal(targeted), rng=rng())
    best = 0.7 * steepest(w.unsqueeze(0), p)[0]
    assert float(lp_norm(delta.unsqueeze(0), p)) <= 0.7 * (1 + 1e-9)
    assert float(delta @ w) > (0.98 if p == 2 else 0.999) * float(best @ w)


@pytest.mark.parametrize("threat", [Lp(math.inf, 0.1), Lp(2.0, 0.5), Lp(2.0, 0.5, -1.0, 2.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_applied_is_inside_the_threat_model(threat, dtype):
    x = torch.rand((20, 3, 4, 4), generator=rng(), dtype=torch.float64).to(dtype)
    model = lambda z: z.flatten(1)[:, :5] * 3
    attack, y = Universal(10, 8), model(x).argmax(1)
    delta = attack.fit(model, x, y, threat, rng=rng())
    z = attack.apply(x, delta, threat)
    assert (delta.dtype, delta.shape) == (dtype, x.shape[1:])
    assert bool(threat.allows(z, x).all())
    assert not torch.equal(z, x)


def test_it_fools_inputs_that_it_has_not_seen():
    """Two classes around two centres: towards the middle and past it fools most of one, so half of all."""
    draw = rng()
    y = torch.arange(400) % 2
    x = torch.randn((400, 30), generator=draw) * 0.3 + (2 * y.unsqueeze(1) - 1) * 0.2
    model = lambda z: torch.stack([-z.sum(1), z.sum(1)], 1)
    attack, threat = Universal(60, 32), Lp(math.inf, 0.5, **FREE)
    delta = attack.fit(model, x[:200], torch.ones(200, dtype=torch.int64), threat, goal=Goal(True), rng=draw)
    before, after = (model(z).argmax(1) for z in (x[200:], attack.apply(x[200:], delta, threat)))
    assert float((before == 1).double().mean()) < 0.6
    assert float((after == 1).double().mean()) > 0.95


def test_the_cap_leaves_alone_what_is_fooled_well():
    """Half of the inputs gain without end along one entry, the other half are fooled along another only."""
    x = torch.zeros(40, 2)
    x[20:, 0] = 1.0
    y = torch.zeros(40, dtype=torch.int64)

    def model(z):
        first, second = 50 * z[:, 0], 2 * z[:, 1] - 1
        return torch.stack(
            [torch.zeros(len(z)), torch.where(x.new_ones(len(z)) * z[:, 0] > 0.5, first, second - 3 * z[:, 0])], 1
        )

    threat = Lp(math.inf, 1.0, **FREE)
    capped, free = (Universal(200, 40, loss="margin", beta=beta).fit(model, x, y, threat, rng=rng()) for beta in (0.5, 1e6))
    assert float((model(x + capped).argmax(1) != y).double().mean()) == 1.0
    assert float(capped[0]) < float(free[0])


@pytest.mark.parametrize("threat", [Lp(1.0, 1.0), Lp(0.0, 3.0), Lp(math.inf)], ids=repr)
def test_a_threat_model_that_is_not_served_is_refused(threat):
    with pytest.raises(UsageError, match="universal serves l_inf and l_2 with a radius"):
        Universal(2).fit(lambda z: z, torch.rand(4, 3), torch.zeros(4, dtype=torch.int64), threat, rng=rng())


@pytest.mark.parametrize("given", [{"steps": 0}, {"batch_size": 0}, {"alpha": 0.0}, {"loss": "no"}, {"beta": -1.0}])
def test_a_wrong_setting_is_refused(given):
    with pytest.raises(UsageError):
        Universal(**given)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of a small network, trained by the command."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    assert main(["train", "--model", "mnist-mlp(width=32)", "--data", "mnist-5k", "--epochs", "3", "--out", str(path)]) == 0
    return path


def command(model, *more, threat="linf(0.2)"):
    words = ["universal", "--model", str(model), "--data", "mnist-5k", "--threat", threat, "--steps", "60"]
    return [*words, "--fit-limit", "400", "--limit", "200", *more]


@pytest.mark.parametrize("target", [None, 3])
def test_the_command_learns_tries_and_keeps(digits, tmp_path, target, capsys):
    more = [] if target is None else ["--target", str(target)]
    assert main(command(digits, *more, "--out", str(tmp_path))) == 0
    assert ("fooled, of those right" if target is None else "says 3, of other classes") in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    (found,) = summary["models"]
    assert summary["schema"] == "advkit/universal/1"
    assert found["success"]["value"] > found["before"]["value"] + 0.4
    assert found["success"]["of"] == (found["accuracy_before"]["count"] if target is None else 180)
    delta = checkpoint.read(tmp_path / "universal.safetensors")[0]["universal"]
    assert float(delta.abs().max()) == pytest.approx(0.2)
    assert (tmp_path / "universal.png").is_file()
    assert len(list((tmp_path / "pictures").iterdir())) == 8


@pytest.mark.parametrize(
    ("threat", "said"), [("l1(3)", "l_inf and l_2"), ("linf", "with a radius"), ("square", "unknown threat")]
)
def test_what_is_wrong_is_one_sentence(digits, threat, said, capsys):
    assert main(command(digits, threat=threat)) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
