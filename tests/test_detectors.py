"""Detectors: their scores in closed form, the curves, the attack that gets past them, the command."""

import json
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F

import advkit
from advkit import Lp, ModelError, UsageError, data, run, spec
from advkit.attacks import APGD, NES, PGD, DeepFool
from advkit.benchmarks.detect import auc, detect, roc, threshold_at
from advkit.benchmarks.folder import locked
from advkit.cli import main
from advkit.data import from_tensors
from advkit.defenses.detectors import DETECTORS, UNNOTICED, Evade, Likelihood, Mahalanobis, Rejecting, Selective, Squeezing
from advkit.defenses.detectors.evasion import merged, selective
from advkit.losses import ce, margin
from advkit.models import checkpoint, networks
from advkit.train import Recipe, train

NETWORK = "mnist-mlp(width=32)"
QUICK = {"attack": "pgd(steps=10)", "adaptive": "selective(steps=20)", "limit": 15, "fit_limit": 500}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small network in a file, trained for a moment."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    with torch.random.fork_rng(devices=[]):
        checkpoint.save(path, train(networks.build(NETWORK), data.load("mnist-5k", split="train"), Recipe(epochs=3)), NETWORK)
    return path


def features(n=400, size=3, classes=2, seed=0):
    """Points of Gaussian classes of one covariance, as data of the kind features in [0, 1]."""
    rng = generator(seed)
    y = torch.arange(n) % classes
    mix = torch.randn(size, size, generator=rng)
    x = torch.randn(n, size, generator=rng) @ mix + 3 * torch.randn(classes, size, generator=rng)[y]
    return ((x - x.min()) / (x.max() - x.min())), y


class Twice(nn.Module):
    """Two layers, of which the first gives the input itself."""

    def __init__(self, size=3, classes=2):
        super().__init__()
        self.first, self.second = nn.Linear(size, size, bias=False), nn.Linear(size, classes)
        nn.init.eye_(self.first.weight)

    def forward(self, x):
        return self.second(self.first(x))


def test_the_mahalanobis_distance_is_that_of_the_closest_class_and_standardized():
    x, y = features()
    fitted = Mahalanobis().fit(Twice(), from_tensors(x, y), generator())
    wide = x.double()
    mu = torch.stack([wide[y == c].mean(0) for c in (0, 1)])
    sigma = sum((wide[y == c] - mu[c]).T @ (wide[y == c] - mu[c]) for c in (0, 1)) / len(x)
    off = wide.unsqueeze(1) - mu
    d = torch.einsum("nci,ij,ncj->nc", off, sigma.inverse(), off).amin(1)
    assert torch.allclose(fitted(x).double(), (d - d.mean()) / d.std(), atol=1e-3)


def test_mahalanobis_is_blind_where_nothing_was_seen_and_averages_space_and_layers():
    x, y = features(size=2)
    maps = torch.stack([x, torch.zeros_like(x)], 2).view(-1, 2, 2, 1)
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    nn.init.dirac_(model[0].weight)
    with torch.no_grad():
        one, two = (Mahalanobis(layers).fit(model, from_tensors(maps, y), generator()) for layers in ("0", "0, 1"))
        flat = Mahalanobis("1").fit(model, from_tensors(maps, y), generator())
        plain = Mahalanobis("first").fit(Twice(2), from_tensors(x, y), generator())
    assert torch.allclose(one(maps), plain(x), atol=1e-3)
    assert torch.allclose(two(maps), (one(maps) + flat(maps)) / 2, atol=1e-5)
    assert bool(flat(maps).isfinite().all())


def test_features_that_differ_by_rounding_alone_tell_nothing():
    """Near 1234 neighbouring float32 are 1e-4 apart."""
    x, y = features()
    model = Twice()
    near = lambda x: 1234 + torch.stack([x[:, 0], 1e-4 * x[:, 1].round(), 1e-4 * x[:, 2].round()], 1)
    model.first.forward = near
    flat, fitted = (Mahalanobis("first").fit(model, from_tensors(z, y), generator()) for z in (torch.full_like(x, 0.4), x))
    assert torch.equal(flat(x), torch.zeros(len(x)))
    shifted = x.clone()
    shifted[:, 1:] = 1 - shifted[:, 1:].round()
    assert torch.equal(fitted(shifted), fitted(x))


class Broken(nn.Module):
    """A layer of another kind than one of features, in front of a classifier that does not mind."""

    def __init__(self, odd):
        super().__init__()
        self.first, self.odd, self.second = nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 2)
        self.change = odd

    def forward(self, x):
        self.odd(self.change(self.first(x)))
        return self.second(self.first(x))


@pytest.mark.parametrize("odd", [lambda f: f * math.nan, lambda f: f.sum(1), lambda f: f[:1]], ids=["nan", "flat", "fewer"])
def test_layers_that_give_no_features_are_refused(odd):
    x, y = features()
    with pytest.raises(ModelError, match="layer 'odd' returned shape"):
        Mahalanobis("odd").fit(Broken(odd), from_tensors(x, y), generator())


def test_the_step_before_moves_the_input_closer_and_its_gradient_is_that_of_the_identity():
    x, y = features()
    plain, moved = (Mahalanobis(noise=noise).fit(Twice(), from_tensors(x, y), generator()) for noise in (0.0, 1e-3))
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(plain(z).sum(), z)
    assert torch.allclose(moved(x), plain(x - 1e-3 * g.sign()), atol=1e-4)
    assert (moved(x) < plain(x)).float().mean() > 0.95
    shifted = (x - 1e-3 * g.sign()).requires_grad_()
    expected = torch.autograd.grad(plain(shifted).sum(), shifted)[0]
    assert torch.allclose(torch.autograd.grad(moved(z).sum(), z)[0], expected, atol=1e-4)


def test_squeezing_is_the_greatest_change_of_the_probabilities():
    """Logits that are ten times the first two pixels: rounding moves 0.3 to 0 and 0.6 to 1, the median only 0.6 to 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(9, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(10 * torch.eye(9)[:2])
    x = torch.tensor([[0.3, 0.6, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]).view(1, 1, 3, 3)
    clean = from_tensors(x.repeat(2, 1, 1, 1), torch.tensor([0, 1]))
    fitted = Squeezing(bits=1, median=3).fit(model, clean, generator())
    f, rounded, filtered = (torch.tensor(z).softmax(0) for z in ([3.0, 6.0], [0.0, 10.0], [3.0, 0.0]))
    assert torch.allclose(fitted(x), torch.stack([(f - rounded).abs().sum(), (f - filtered).abs().sum()]).max().view(1))


def test_squeezing_has_a_gradient_where_probabilities_are_0_and_1():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(1e4 * torch.tensor([[1.0, 0, 0, 0], [0, 0.8, 0, 0]]))
    x = torch.tensor([[[[0.55, 0.8], [0.2, 0.9]]]], requires_grad=True)
    score = Squeezing(bits=1).fit(model, from_tensors(x.detach().repeat(2, 1, 1, 1), torch.tensor([0, 1])), generator())(x)
    assert score.item() == pytest.approx(2.0)
    (g,) = torch.autograd.grad(score.sum(), x)
    assert bool(g.isfinite().all())
    assert float(g.abs().max()) > 0


def test_the_likelihood_ratio_is_that_of_two_gaussians():
    x, y = features(500, 4)
    fitted = Likelihood(mu=0.3, sigma=0.05).fit(nn.Identity(), from_tensors(x, y, low=0.0, high=1.0), generator(3))
    rng = generator(3)
    noise = torch.rand(x.shape, generator=rng)
    mutated = torch.where(torch.rand(x.shape, generator=rng) < 0.3, noise, x)

    def log_density(seen):
        wide = seen.double().numpy()
        cov = np.cov(wide, rowvar=False, bias=True) + 0.05**2 * np.eye(4)
        return stats.multivariate_normal(wide.mean(0), cov).logpdf(x.double().numpy())

    assert np.allclose(fitted(x).numpy(), log_density(mutated) - log_density(x), atol=1e-3)


def pairs(scores):
    return st.lists(scores, min_size=2, max_size=30)


@settings(max_examples=40, deadline=None)
@given(pairs(st.integers(0, 5)), pairs(st.integers(0, 5)))
def test_the_area_is_the_share_of_pairs_and_that_under_the_curve(clean, adversarial):
    area = auc(clean, adversarial)
    expected = np.mean([(a > c) + 0.5 * (a == c) for a in adversarial for c in clean])
    assert area.value == pytest.approx(expected)
    assert area.value == pytest.approx(stats.mannwhitneyu(adversarial, clean).statistic / len(clean) / len(adversarial))
    assert 0 <= area.low <= area.value <= area.high <= 1
    fpr, tpr = roc(clean, adversarial)
    assert area.value == pytest.approx(np.trapezoid(tpr, fpr))
    assert auc(adversarial, clean).value == pytest.approx(1 - area.value)


def test_intervals_of_the_area_hold_it():
    """Scores from N(0, 1) and N(shift, 1), whose true area is Phi(shift / sqrt 2); far apart, many samples do not overlap."""
    rng = np.random.default_rng(0)
    for n, m, shift in ((60, 40, 1.0), (60, 40, 0.0), (15, 10, 3.0)):
        true = stats.norm.cdf(shift / math.sqrt(2))
        found = [auc(rng.normal(size=n), rng.normal(shift, size=m)) for _ in range(300)]
        assert 0.90 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.99


def test_an_area_of_few_scores_is_uncertain():
    one = auc([1], [2])
    # With one score of each kind the area is 0 or 1, a share of one trial: Wilson's interval.
    z = stats.norm.isf(0.025)
    assert (one.value, one.high) == (1, 1)
    assert one.low == pytest.approx(1 / (1 + z**2))
    same = auc([0, 0, 0], [0, 0])
    assert same.value == 0.5
    assert same.high - same.low > 0.5
    apart = auc(range(20), range(20, 40))
    assert 0.85 < apart.low < 0.95
    with pytest.raises(UsageError, match="NaN"):
        auc([1, math.nan], [2])
    with pytest.raises(UsageError, match="0 adversarial scores"):
        auc([1], [])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_no_more_clean_inputs_are_rejected_than_said(scores, fpr):
    threshold = threshold_at(scores, fpr)
    assert sum(score > threshold for score in scores) <= fpr * len(scores) + 1e-9
    below = max((score for score in scores if score < threshold), default=None)
    assert below is None or sum(score > below for score in scores) > fpr * len(scores) - 1e-9


class Score(nn.Module):
    """The first entry of the input."""

    def forward(self, x):
        return x.flatten(1)[:, 0]


def test_the_rejecting_model_says_the_classifiers_class_or_rejects():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.rand(50, 4)
    outputs = Rejecting(model, Score(), 0.5, scale=7.0)(x)
    expected = torch.where(x[:, 0] > 0.5, 3, model(x).argmax(1))
    assert torch.equal(outputs.argmax(1), expected)
    y = torch.randint(3, (50,))
    assert torch.equal(UNNOTICED.met(outputs, y), (expected != y) & (expected != 3))
    assert torch.equal(margin(merged(outputs, y), y) > 0, UNNOTICED.met(outputs, y))


@pytest.mark.parametrize("attack", [PGD(20, loss="margin"), APGD(20), DeepFool(), NES(200), Selective(20)], ids=repr)
def test_attacks_get_past_a_detector_that_forbids_the_easy_way(attack):
    """The boundary of two classes is reached along x_0, which is watched, or twice as far along x_1, which is not."""
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [2.0, 1.0]]))
    bias = nn.Module()
    bias.forward = lambda x: model(x - torch.tensor([0.5, 0.75]))
    x = torch.tensor([[0.2, 0.2], [0.3, 0.5]], dtype=torch.float64)
    y, threat = torch.tensor([0, 0]), Lp(math.inf, 0.7)
    naive = run(PGD(20), bias, x, y, threat)
    assert bool(naive.success.all())
    guarded = Rejecting(bias, Score(), 0.55, scale=2.0)
    result = run(Evade(attack), guarded, x, y, threat, goal=UNNOTICED)
    assert bool(result.success.all())
    assert bool((bias(result.x_adv).argmax(1) == 1).all())
    assert bool((Score()(result.x_adv) <= 0.55).all())


def test_selective_gradients_are_of_the_classifier_or_of_the_score():
    model, x, y = nn.Linear(4, 3), torch.rand(50, 4, generator=generator()), torch.arange(50) % 3
    z = x.clone().requires_grad_()
    outputs = Rejecting(model, Score(), 0.5, scale=7.0)(z)
    values = selective(outputs, y)
    (g,) = torch.autograd.grad(values.sum(), z)
    wrong = model(x).argmax(1) != y
    assert 5 < int(wrong.sum()) < 45
    assert torch.allclose(values[wrong], 7 * (0.5 - x[wrong, 0]), atol=1e-5)
    assert torch.allclose(g[wrong], torch.tensor([-7.0, 0, 0, 0]), atol=1e-5)
    assert bool((values[~wrong] == -math.inf).all())
    (plain,) = torch.autograd.grad(margin(model(z), y).sum(), z)
    assert torch.allclose(g[~wrong], plain[~wrong])


@pytest.mark.parametrize("threat", [Lp(math.inf, 0.7), Lp(2, 1.0), Lp(1, 1.2), Lp(0, 2)], ids=str)
def test_the_selective_attack_returns_the_wrong_answer_of_the_least_score(threat):
    """The class is wrong above x_1 = 0.5, and the score is x_0: the least is at 0, in l_2 where the ball and the line meet."""
    model = lambda x: torch.stack([torch.zeros(len(x)), 10 * (x[:, 1] - 0.5)], 1)
    x, y = torch.full((5, 2), 0.3), torch.zeros(5, dtype=torch.int64)
    guarded = Rejecting(model, Score(), -1.0)
    x_adv = advkit.perturb(Evade(Selective(200)), guarded, x, y, threat, rng=generator(), goal=UNNOTICED)
    assert bool((model(x_adv).argmax(1) == 1).all())
    assert bool((x_adv[:, 0] < 0.06).all())
    assert bool(threat.allows(x_adv, x).all())


def test_an_attack_crosses_the_plateau_of_a_score():
    """The score is 1 but in a valley far from where the class is wrong first; on the plateau the gradient points there."""

    class Valley(nn.Module):
        def forward(self, x):
            return advkit.adaptive.Straight(lambda far: (far > 0.05).float(), None)((x[:, 0] - 0.9).abs())

    model = lambda x: torch.stack([torch.zeros(len(x)), x[:, 1] - 0.5], 1)
    x, y, threat = torch.full((8, 2), 0.2), torch.zeros(8, dtype=torch.int64), Lp(math.inf, 0.8)
    guarded = Rejecting(model, Valley(), 0.5)
    result = run(Evade(Selective(30)), guarded, x, y, threat, goal=UNNOTICED)
    assert bool(result.success.all())


@pytest.mark.parametrize("attack", [Selective(2), Evade(PGD(2))], ids=repr)
def test_to_be_rejected_is_no_success(attack):
    guarded = Rejecting(nn.Linear(4, 3), Score(), 0.5)
    with pytest.raises(UsageError, match="it should be UNNOTICED"):
        run(attack, guarded, torch.rand(2, 4), torch.tensor([0, 1]), Lp(math.inf, 0.1))
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(UsageError, match="scale is"):
            Rejecting(nn.Linear(4, 3), Score(), 0.5, scale)
    with pytest.raises(UsageError, match="steps is 0"):
        Selective(0)


def test_a_jacobian_is_that_of_the_margin_to_right_or_rejected():
    classifier = nn.Linear(4, 3)
    guarded = Rejecting(classifier, Score(), 0.5)
    x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    x[:, 0] = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9])
    seen, passes = {}, []
    classifier.register_forward_hook(lambda *_: passes.append(1))

    class Probe:
        access, norms, minimum, paper, cost = advkit.Access.GRADIENTS, (math.inf,), False, "probe", 9

        def __call__(self, oracle, x, threat, rng):
            others = torch.stack([(y + 1) % 3, (y + 2) % 3], 1)
            seen["first"] = oracle.jacobian(x, others)
            before = len(passes)
            seen["jacobian"] = oracle.jacobian(x, others)
            assert len(passes) == before + 1
            seen["outputs"], seen["loss"] = oracle.outputs(x), oracle.loss(x, ce)
            seen["part"] = oracle.outputs(x[4:], torch.tensor([4, 5]))
            return x

    advkit.perturb(Evade(Probe()), guarded, x, y, Lp(math.inf, 0.1), rng=generator(), goal=UNNOTICED)
    z = x.clone().requires_grad_()
    k = merged(guarded(z), y)
    assert torch.allclose(seen["outputs"], k.detach())
    assert torch.allclose(seen["part"], k.detach()[4:])
    assert torch.allclose(seen["loss"], F.cross_entropy(k, y, reduction="none").detach())
    first = k.gather(1, ((y + 1) % 3).unsqueeze(1)) - k.gather(1, y.unsqueeze(1))
    values, g = seen["jacobian"]
    assert all(torch.equal(one, other) for one, other in zip(seen["first"], seen["jacobian"], strict=True))
    assert values.shape == (6, 2)
    assert torch.allclose(values[:, 0], first.detach().squeeze(1), atol=1e-6)
    assert torch.allclose(g[:, 0], torch.autograd.grad(first.sum(), z)[0], atol=1e-6)


@pytest.fixture(scope="module")
def found(trained):
    """An evaluation of all three, in memory."""
    return detect(str(trained), "mnist-5k", detectors=list(DETECTORS), threat="linf(0.1)", **QUICK | {"fit_limit": 2000})


def test_the_adaptive_attack_does_at_least_what_the_naive_one_does(found):
    for row in found.rows:
        if row["naive"] is not None:
            assert row["fooled"]
            assert row["adaptive"] <= row["naive"]
    for one in found.found():
        assert one.robust_adaptive.count <= one.robust_naive.count
        assert one.auc_adaptive.value <= one.auc_naive.value
        assert one.accuracy.count >= one.robust_naive.count
        assert one.robust_adaptive.count <= found.undefended()[1].count + 3
    likelihood = found.found()[2]
    assert likelihood.auc_naive.value > 0.9
    assert likelihood.robust_naive.count > 10


class Remembering:
    """A detector that keeps what it is shown; the score is the mean of the pixels."""

    def __init__(self):
        self.seen = []

    def fit(self, model, data, rng):
        self.seen.append(data)
        mean = nn.Module()
        mean.forward = lambda x: x.flatten(1).mean(1)
        return mean


def test_the_threshold_is_set_on_examples_that_nobody_learned_from_or_attacks(trained):
    one = Remembering()
    found = detect(str(trained), "mnist-5k", detectors=one, threat="linf(0.1)", **QUICK)
    learned = set(one.seen[0].index.tolist())
    clean = data.load("mnist-5k", split="train", limit=500)
    held = [i for i, index in enumerate(clean.index.tolist()) if index not in learned]
    assert (len(learned), len(held)) == (400, 100)
    assert set(clean.y[held].bincount(minlength=10).tolist()) == {10}
    scores = clean.batch(0, 500)[0][held].flatten(1).mean(1).tolist()
    assert found.found()[0].threshold == pytest.approx(threshold_at(scores, 0.05), abs=1e-6)
    assert found.found()[0].fpr.of == 15


def test_every_number_is_that_of_the_rows(found):
    clean, robust = found.undefended()
    for one in found.found():
        rows = found.of(one.detector)
        assert [row["index"] for row in rows] == [row["index"] for row in found.of("squeezing")]
        assert clean.count == sum(row["correct"] for row in rows)
        assert robust.count == sum(row["correct"] and not row["fooled"] for row in rows)
        for kind, tpr, lost in (
            ("naive", one.tpr_naive, one.robust_naive),
            ("adaptive", one.tpr_adaptive, one.robust_adaptive),
        ):
            assert (tpr.count, tpr.of) == (
                sum(row[f"{kind}_detected"] is True for row in rows),
                sum(row[kind] is not None for row in rows),
            )
            kept = [row["correct"] and row["clean"] <= one.threshold and row[f"{kind}_detected"] is not False for row in rows]
            assert lost.count == sum(kept)


def test_the_command_writes_rows_numbers_and_curves_and_goes_on(trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = ["detect", "--model", str(trained), "--data", "mnist-5k", "--threat", "linf(0.1)", "--attack", "pgd(steps=3)"]
    command += ["--adaptive", "pgd(steps=3)", "--limit", "12", "--fit-limit", "200", "--out", str(out)]
    command += ["--detector", "squeezing(bits=1)", "--detector", "mahalanobis"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "squeezing(bits=1)" in said
    assert "adaptive" in said
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    summary = json.loads((out / "summary.json").read_text())
    assert [one["detector"] for one in summary["detectors"]] == ["squeezing(bits=1)", "mahalanobis"]
    assert summary["undefended"]["accuracy"]["of"] == 12
    assert (out / "roc.png").read_bytes()[:4] == b"\x89PNG"

    text = (out / "rows.jsonl").read_text()
    (out / "rows.jsonl").write_text("".join(line + "\n" for line in text.splitlines()[:20]))
    monkeypatch.setattr(Squeezing, "fit", lambda *_: pytest.fail("it was done"))
    assert main(command) == 0
    assert (out / "rows.jsonl").read_text() == text
    assert main([*command, "--seed", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_hostile_folders_are_refused_and_cut_off_rows_are_done_again(trained, tmp_path):
    """A folder in which no row is yet is anybody's."""
    out = tmp_path / "run"
    given = {"threat": "linf(0.1)", "attack": "pgd(steps=2)", "adaptive": "selective(steps=2)", "limit": 3, "fit_limit": 50}
    work = lambda **more: detect(str(trained), "mnist-5k", detectors=["squeezing", "likelihood"], out=out, **given | more)
    out.mkdir()
    (out / "run.json.tmp").write_text("{")
    work(seed=1).found()
    (out / "rows.jsonl").unlink()
    told = work()
    rows = out / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text[:-9])
    assert work().rows == told.rows
    assert rows.read_text() == text
    lines = text.splitlines()
    first = json.loads(lines[0])
    for row, message in (
        (first | {"clean": "low"}, "another type"),
        (first | {"clean": math.nan}, "another type"),
        (first | {"index": -5}, "not those of this run"),
        (first | {"detector": "mahalanobis"}, "not those of this run"),
        ({}, "lacks one of"),
        ([], "lacks one of"),
    ):
        rows.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n")
        with pytest.raises(UsageError, match=message):
            work()
    rows.write_text(text + lines[0] + "\n")
    with pytest.raises(UsageError, match="not those of this run"):
        work()
    (out / "run.json").write_text("[]")
    with pytest.raises(UsageError, match=r"run.json is damaged"):
        work()
    lock = locked(out)
    with pytest.raises(UsageError, match="another process"):
        work()
    os.close(lock)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("")
    with pytest.raises(UsageError, match="holds other files"):
        detect(str(trained), "mnist-5k", detectors="squeezing", out=tmp_path / "mine", **given)


def test_a_detector_that_cannot_be_fitted_is_refused_before_anything_is_attacked(trained):
    told = []
    with pytest.raises(UsageError, match="unknown layer"):
        detect(
            str(trained),
            "mnist-5k",
            detectors=["squeezing", 'mahalanobis(layers="77")'],
            threat="linf(0.1)",
            report=lambda *what: told.append(what),
            **QUICK,
        )
    assert not told


@pytest.mark.parametrize("threat", ["l1(5)", "l0(10)", "l2(1)"])
def test_one_example_and_every_norm(trained, threat):
    found = detect(str(trained), "mnist-5k", detectors="likelihood", threat=threat, **QUICK | {"limit": 1}).found()[0]
    assert found.fpr.of == 1


BAD = {
    "unknown detector 'squeezin'": {"detectors": "squeezin"},
    "unknown layer '77'": {"detectors": 'mahalanobis(layers="77")'},
    "fewer than|has 1 examples|has 0 examples": {"detectors": "mahalanobis", "fit_limit": 10},
    "it needs at least two": {"detectors": "likelihood", "fit_limit": 2},
    "there are 1 examples .* one of them for the threshold": {"fit_limit": 1},
    "there are 0 examples": {"fit": from_tensors(torch.rand(2, 1, 28, 28), torch.arange(2)).select(torch.arange(0))},
    "of shape .1, 8, 8.*they should be of one form": {"fit": (torch.rand(20, 1, 8, 8), torch.arange(20) % 10)},
    "one form": {"fit": from_tensors(torch.rand(20, 1, 28, 28), torch.arange(20) % 10, low=-1.0, high=1.0)},
    "sigma is so small": {"detectors": "likelihood(sigma=1e-12)"},
    "unknown attack 'selective'": {"attack": "selective"},
    "false positive rate is 1.5": {"fpr": 1.5},
    "false positive rate is nan": {"fpr": math.nan},
    "should have a radius": {"threat": "l2", "attack": "ddn", "adaptive": "ddn"},
    "does not serve": {"threat": "l1(1)", "adaptive": "apgd"},
    "name at least one, and each once": {"detectors": ["squeezing", "squeezing"]},
    "bits is 0": {"detectors": "squeezing(bits=0)"},
    "size is 1": {"detectors": "squeezing(median=1)"},
    "noise is -1": {"detectors": "mahalanobis(noise=-1)"},
    "mu is 1.0": {"detectors": "likelihood(mu=1.0)"},
    "sigma is 0": {"detectors": "likelihood(sigma=0)"},
    "same examples to learn from": {"split": "train", "limit": 50},
    "should be a detector or a spec": {"detectors": [3]},
    "the detector is <class": {"detectors": Squeezing},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_sentence(trained, message):
    given = {"detectors": "squeezing", "threat": "linf(0.1)", **QUICK, **BAD[message]}
    with pytest.raises(UsageError, match=message) as error:
        detect(str(trained), "mnist-5k", **given)
    assert "\n" not in str(error.value)


def test_data_of_another_kind_and_models_of_another_form_are_refused(trained, tmp_path):
    x, y = features()
    with pytest.raises(UsageError, match="squeezing is for images"):
        Squeezing().fit(Twice(), from_tensors(x, y), generator())
    with pytest.raises(UsageError, match="at most 12288"):
        Likelihood().fit(nn.Identity(), from_tensors(torch.rand(2, 12289), torch.tensor([0, 1])), generator())
    with pytest.raises(UsageError, match="fewer than two parts"):
        Mahalanobis().fit(nn.Linear(3, 2), from_tensors(x, y), generator())
    with pytest.raises(UsageError, match="no split train"):
        detect(Twice(), (x, y), detectors="mahalanobis", threat="linf(0.1)")
    with pytest.raises(UsageError, match="look into an nn"):
        detect(lambda z: z, (x, y), fit=features(seed=1), detectors="mahalanobis", threat="linf(0.1)")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="should be a folder"):
        detect(str(trained), "mnist-5k", detectors="squeezing", threat="linf(0.1)", out=tmp_path / "file", **QUICK)


@pytest.mark.parametrize("name", DETECTORS)
def test_fitting_and_asking_leave_the_model_as_it_was(name):
    model = networks.build(NETWORK)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    clean = data.load("mnist-5k", split="train", limit=100)
    fitted = spec.parse(name, DETECTORS, "detector").fit(model, clean, generator())
    x, _ = clean.batch(0, 5)
    z = x.clone().requires_grad_()
    scores = fitted(z)
    assert scores.shape == (5,)
    assert torch.equal(z, x)
    assert float(torch.autograd.grad(scores.sum(), z)[0].abs().sum()) > 0
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
