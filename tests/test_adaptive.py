import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from advkit import Access, AccessError, Lp, ModelError, Restarts, UsageError, evaluate, perturb, run
from advkit.adaptive import Adaptive, Straight, straighten, tap
from advkit.attacks import FGSM, FMN, PGD
from advkit.benchmarks import broken
from advkit.cli import main
from advkit.combine import Expect
from advkit.models.networks import Normalize, Residual
from advkit.norms import dual, lp_norm
from advkit.streams import Streams
from advkit.testing import _Counting

FREE = {"low": -math.inf, "high": math.inf}


class Scores(nn.Module):
    """The linear model of the fixture as a module."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        score = x @ self.w
        return torch.stack([-score / 2, score / 2], dim=1)


class Detach(nn.Module):
    def forward(self, x):
        return x.detach() + 0.0 * x


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Round(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return (x / self.step).round() * self.step


def test_straight_is_exact_forward_and_smooth_backward():
    x = torch.linspace(-3, 3, 50, dtype=torch.float64).requires_grad_()
    for smooth, slope in ((None, torch.ones_like), (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2)):
        y = Straight(lambda z: (1e9 * z).round(), smooth)(x)
        assert torch.equal(y, (1e9 * x).round())
        (g,) = torch.autograd.grad((y * torch.arange(50)).sum(), x)
        assert torch.allclose(g, slope(x.detach()) * torch.arange(50))


def test_straight_refuses_a_smooth_function_of_another_shape():
    with pytest.raises(ModelError, match=r"gives \(3, 1\) forward and \(3, 2\) backward"):
        Straight(lambda x: x[:, :1])(torch.zeros(3, 2, requires_grad=True))


def network():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    return nn.Sequential(Round(0.5), inner, nn.Linear(5, 3), nn.Softmax(1)).eval()


def test_straighten_replaces_layers_of_a_copy_with_the_same_weights():
    model, x = network(), torch.randn(6, 4)
    before, text = model(x), repr(model)
    stand_in = straighten(model, {"0": Straight, "1.2": nn.Identity()})
    assert isinstance(stand_in[0], Straight)
    assert stand_in[0].exact is model[0]
    assert isinstance(stand_in[1][2], nn.Identity)
    assert repr(model) == text
    assert torch.equal(model(x), before)
    assert [id(p) for p in stand_in.parameters()] == [id(p) for p in model.parameters()]
    assert stand_in[1][1].running_mean is model[1][1].running_mean
    with pytest.raises(UsageError, match=r"unknown layer '1.3'; known are 0, 1, 1.0"):
        straighten(model, {"1.3": Straight})


def test_tap_gives_the_outputs_of_a_layer():
    model, x = network(), torch.randn(6, 4)
    assert torch.equal(tap(model, "2")(x), model[:3](x))
    assert torch.equal(tap(model, "1.0")(x), model[1][0](model[0](x)))
    assert not model[2]._forward_hooks
    with pytest.raises(UsageError, match="unknown layer 'fc'"):
        tap(model, "fc")
    unused = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
    unused.forward = lambda z: unused["a"](z)
    with pytest.raises(ModelError, match="did not call its layer 'b'"):
        tap(unused, "b")(x)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_a_linear_model_without_its_gradient_falls_exactly_as_the_linear_model_does(linear, p):
    _model, w, x, y = linear(6)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    ordered = true.sort().values
    gap = int((ordered[9:24] / ordered[8:23]).argmax()) + 8
    threat = Lp(p, float((ordered[gap] + ordered[gap + 1]) / 2), **FREE)
    model = nn.Sequential(Detach(), Scores(w))
    # From x itself: a random start would be noise of the whole radius.
    attack = PGD(40, start=False)
    assert not run(attack, model, x, y, threat).success.any()
    adaptive = Adaptive(attack, straighten(model, {"0": Straight}))
    assert torch.equal(run(adaptive, model, x, y, threat).success, true < threat.eps)


def test_probabilities_that_saturate(linear):
    _model, w, x, y = linear(6)
    model = nn.Sequential(Scores(w), Scale(1e6), nn.Softmax(1))
    threat = Lp(2.0, 100.0, **FREE)
    for loss in ("ce", "margin"):
        attack = PGD(10, loss=loss, start=False)
        assert not run(attack, model, x, y, threat).success.any()
        assert run(Adaptive(attack, tap(model, "0")), model, x, y, threat).success.all()


def test_the_model_has_the_last_word(linear):
    """A stand-in that is fooled where the model is not makes no success, for an attack that trusts it most."""
    _model, w, x, y = linear(6)
    model, turned = Scores(w), Scores(-w)
    for attack in (FGSM(), PGD(5), FMN(10), Restarts(PGD(2), 2)):
        result = run(Adaptive(attack, turned), model, x, y, Lp(2.0, 1e-3, **FREE))
        with torch.no_grad():
            assert torch.equal(model(result.x_adv).argmax(1) != y, result.success)
        assert not result.success[(x @ w).abs() > 1e-3 * w.norm()].any()


def test_the_closest_example_is_that_of_the_model(linear):
    _model, w, x, y = linear(6)
    model = nn.Sequential(Detach(), Scores(w))
    result = run(Adaptive(FMN(100), straighten(model, {"0": Straight})), model, x, y, Lp(2.0, **FREE))
    assert result.success.all()
    assert float((result.distance / ((x @ w).abs() / w.norm())).max()) < 1.02


@pytest.mark.parametrize("wrapped", [False, True], ids=["inside", "outside"])
def test_with_the_mean_over_the_draws_of_a_random_model(linear, wrapped):
    """Either way round the gradients are the stand-in's, and the mean of n of them."""
    _model, w, x, y = linear(6)
    model = nn.Sequential(Detach(), Scores(w))
    stand_in = straighten(model, {"0": Straight})
    attack = PGD(10, start=False)
    both = Expect(Adaptive(attack, stand_in), 3) if wrapped else Adaptive(Expect(attack, 3), stand_in)
    threat = Lp(2.0, float(((x @ w).abs() / w.norm()).median()) * 1.01, **FREE)
    result = run(both, model, x, y, threat)
    assert torch.equal(result.success, run(Adaptive(attack, stand_in), model, x, y, threat).success)
    assert result.success.any()
    passes = result.forwards + result.backwards
    assert int(passes.max()) <= both.cost + 1


@pytest.mark.parametrize("attack", [FGSM(), PGD(4), FMN(4), Restarts(PGD(2), 2)], ids=repr)
def test_passes_of_both_models_are_counted_and_the_cost_is_kept(linear, attack):
    _model, w, x, y = linear(6)
    x, w = x.float(), w.float()
    model, stand_in = _Counting(Scores(w)), _Counting(Scores(w))
    adaptive = Adaptive(attack, stand_in)
    threat = Lp(2.0, 0.3, **FREE)
    result = run(adaptive, model, x, y, threat)
    assert int((result.forwards + result.checks).sum()) == model.forwards + stand_in.forwards
    assert int(result.backwards.sum()) == stand_in.backwards
    assert model.backwards == 0
    assert int((result.forwards + result.backwards).max()) <= adaptive.cost + 1
    limited = run(adaptive, model, x, y, threat, budget=3)
    assert int(limited.forwards.max()) <= 3


def test_a_row_does_not_depend_on_its_batch(linear):
    _model, w, x, y = linear(6)
    model, threat = nn.Sequential(Detach(), Scores(w)), Lp(2.0, 0.5, **FREE)
    attack = Adaptive(PGD(5), straighten(model, {"0": Straight}))
    keys = Streams.seeded(0, range(len(x))).keys
    whole = run(attack, model, x, y, threat, rng=Streams(keys))
    part = run(attack, model, x[3:9], y[3:9], threat, rng=Streams(keys[3:9]))
    assert torch.equal(whole.x_adv[3:9], part.x_adv)
    assert torch.equal(whole.forwards[3:9], part.forwards)


def test_training_learns_from_the_stand_in(linear):
    _model, w, x, y = linear(6)
    model = _Counting(nn.Sequential(Detach(), Scores(w)))
    stand_in, threat = Scores(w).train(), Lp(2.0, 0.5, **FREE)
    x_adv = perturb(Adaptive(FGSM(), stand_in), model, x, y, threat, rng=torch.Generator())
    expected = x - 0.5 * torch.where(y == 1, 1.0, -1.0).unsqueeze(1) * w / w.norm()
    assert torch.allclose(x_adv, expected)
    assert model.forwards == 0
    assert stand_in.training
    assert stand_in.w.requires_grad


def test_names_and_comparisons_go_by_the_digest():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(4, generator=rng)
    a, b, c = (Adaptive(PGD(3), Scores(weights)) for weights in (w, w.clone(), w + 1))
    assert a == b
    assert hash(a) == hash(b)
    assert a != c
    assert repr(a).startswith("Adaptive(attack=PGD(steps=3")
    assert "Scores" not in repr(a)
    assert pickle.loads(pickle.dumps(a)) == a
    assert copy.copy(a) == a


def test_bad_stand_ins_get_a_sentence(linear):
    _model, w, x, y = linear(6)
    with pytest.raises(UsageError, match="adaptive: model is of type function; it should be a module"):
        Adaptive(PGD(3), lambda z: z)
    wide = nn.Linear(6, 128, dtype=torch.float64)
    with pytest.raises(ModelError, match="the stand-in returned 128 outputs an example and the model 2"):
        run(Adaptive(PGD(3), wide), Scores(w), x, y, Lp(2.0, 0.5, **FREE))
    with pytest.raises(AccessError, match="asked for gradients"):
        run(Adaptive(PGD(3), Scores(w)), Scores(w), x, y, Lp(2.0, 0.5, **FREE), access=Access.SCORES)


class Coin(nn.Module):
    """Wrong with probability p, whatever it is shown; says class 0 where it is right."""

    def __init__(self, p):
        super().__init__()
        self.p, self.seen = p, 0

    def forward(self, x):
        self.seen += len(x)
        wrong = torch.rand(len(x)) < self.p
        return 3 * torch.stack([~wrong, wrong], 1).float()


def evaluated(p, **options):
    torch.manual_seed(0)
    model, n = Coin(p), 1000
    data = torch.full((n, 4), 0.5), torch.zeros(n, dtype=torch.int64)
    return model, evaluate(model, data, threat="linf(0.1)", attacks="uniform(n=1)", quantize=False, **options)


def most(p, n):
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n // 2 + 1, n + 1))


@pytest.mark.parametrize("votes", [1, 9])
def test_most_of_the_votes_decide_what_is_right(votes):
    p = 0.3
    model, result = evaluated(p, votes=votes)
    assert result.clean_accuracy.value == pytest.approx(most(1 - p, votes), abs=0.04)
    # The passes before the first attack: two looks at four examples.
    assert model.seen == 8 + sum(row["forwards"] + row["checks"] for row in result.rows)
    for row in result.rows:
        assert row["once"] >= row["success"]
        assert (row["share"] is not None) == row["success"]
        assert not row["success"] or row["share"] > 0.5
    assert result.run["votes"] == votes


def test_fooled_once_and_fooled_in_most_answers_are_two_figures():
    _model, one = evaluated(0.2)
    assert one.robust_accuracy_once is None
    assert one.summary()["robust_accuracy_once"] is None
    _model, several = evaluated(0.2, votes=9)
    once, most_of_all = several.robust_accuracy_once.value, several.robust_accuracy.value
    assert most_of_all > 0.97
    # The clean input of the run and the two candidates of the attack each get an answer, each wrong with probability p.
    assert once == pytest.approx(0.8**3, abs=0.05)
    assert several.summary()["robust_accuracy_once"]["value"] == once


def test_a_random_model_is_noted_with_advice_where_one_answer_decides():
    notes = evaluated(0.5)[1].notes
    assert any("answers to the same input change" in note for note in notes)
    assert any("--votes 5" in note and "expect(...)" in note for note in notes)
    notes = evaluated(0.5, votes=3)[1].notes
    assert any("answers to the same input change" in note for note in notes)
    assert not any("--votes" in note for note in notes)


def test_votes_on_the_command_line(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model():\n    return lambda x: torch.stack([x.sum(1), torch.rand(len(x))], 1)\n"
        "def data(split):\n    return torch.full((6, 2), 0.5), torch.zeros(6, dtype=torch.int64)\n"
    )
    words = ["attack", "--model", f"{tmp_path}/mine.py:model", "--data", f"{tmp_path}/mine.py:data", "--attack", "pgd(steps=2)"]
    words += ["--threat", "linf(0.1, low=0, high=1)", "--range", "0", "1"]
    assert main([*words, "--votes", "3", "--out", str(tmp_path / "run")]) == 0
    assert "never fooled once" in capsys.readouterr().out
    assert main([*words, "--votes", "5", "--out", str(tmp_path / "run")]) == 2
    assert "votes was 3, now 5" in capsys.readouterr().err
    assert main([*words, "--votes", "0"]) == 2
    assert "votes is 0; it should be at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def image_network():
    """A network of random weights whose own answers are the labels, and a radius at which half of them fall."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        Residual(4, 8, 2),
        nn.Flatten(),
        nn.Linear(8 * 25, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    network, x = nn.Sequential(Normalize((0.5,), (0.2,)), *layers).eval(), torch.rand(40, 1, 12, 12)
    with torch.no_grad():
        y = network(x).argmax(1)
    closest = run(FMN(50), network, x, y, Lp(math.inf)).distance
    return network, x, y, Lp(math.inf, float(closest.median()))


@pytest.mark.parametrize("defense", [partial(broken.Saturated, temperature=1e-5), broken.Quantized, broken.Detached])
def test_a_broken_defense_is_overrated_by_pgd_and_not_by_its_adaptive_attack(image_network, defense):
    network, x, y, threat = image_network
    if defense is broken.Quantized:
        x, defense = (255 * x).round() / 255, partial(defense, levels=256)
        y = network(x).argmax(1)
    model, attack = defense(network), PGD(30, start=False)
    undefended = int(run(attack, network, x, y, threat).success.sum())
    assert undefended >= 10
    assert int(run(attack, model, x, y, threat).success.sum()) < undefended / 2
    assert abs(int(run(broken.adaptive(model, attack), model, x, y, threat).success.sum()) - undefended) <= 2


def test_winners_take_the_place_of_every_relu(image_network):
    network, x, _y, _threat = image_network
    model = broken.winners(network, 0.25)
    assert [name for name, part in model.named_modules() if isinstance(part, broken.KWTA)] == [f"kwta_{i}" for i in range(4)]
    assert not any(isinstance(part, nn.ReLU) for part in model.modules())
    z = torch.randn(5, 3, 4)
    winners = broken.KWTA(0.25)(z)
    assert (winners.flatten(1) != 0).sum(1).tolist() == [3] * 5
    assert torch.equal(winners.flatten(1).sort(1).values[:, -3:], z.flatten(1).sort(1).values[:, -3:])
    attack = broken.adaptive(model, PGD(2))
    assert torch.equal(attack.model(x), model(x))


def test_a_noisy_model_is_attacked_by_the_mean(image_network):
    network, *_ = image_network
    assert broken.adaptive(broken.Noisy(network), PGD(2)) == Expect(PGD(2), broken.DRAWS)
