"""Measures of generators: closed forms, planted copiers and collapses, the command."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats
from torch import nn

from advkit import UsageError, data
from advkit.cli import gan_score
from advkit.data import from_tensors
from advkit.errors import ModelError
from advkit.gan import pair as pairs
from advkit.gan.measures import neighbours
from advkit.gan.measures.birthday import birthday, collisions, scale, thumbnails
from advkit.gan.measures.coverage import coverage
from advkit.gan.measures.discriminator import scores, told_apart
from advkit.gan.measures.features import features
from advkit.gan.measures.fid import fid
from advkit.gan.measures.kid import kid
from advkit.gan.measures.memory import Memory, Near, beyond, copies, memory
from advkit.gan.measures.neighbours import nearest
from advkit.gan.measures.precision_recall import precision_recall
from advkit.gan.score import score
from advkit.gan.source import Own
from advkit.models import checkpoint, networks
from advkit.train import Recipe, train

NETWORK = "mnist-mlp(width=32)"
double = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=double)


def moments(mean, cov, n=200, seed=0):
    """Features with exactly this mean and covariance."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (n - 1)), x.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def covariance(size, seed):
    a = normal(size, size + 2, seed=seed)
    return a @ a.T / size


def test_the_frechet_distance_is_that_of_gaussians():
    means, covs = (normal(2, 6), (covariance(6, 1), covariance(6, 2)))
    root = linalg.sqrtm((covs[0] @ covs[1]).numpy()).real
    expected = float((means[0] - means[1]).square().sum() + covs[0].trace() + covs[1].trace() - 2 * root.trace())
    f, g = (moments(mean, cov, seed=i) for i, (mean, cov) in enumerate(zip(means, covs, strict=True)))
    assert fid(f, g) == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_fewer_images_than_features():
    """Features in two planes that share one line: of the covariances diag(4, 1, 0, ...) and diag(9, 0, 1, ...)."""
    f, g = torch.zeros(4, 50, dtype=double), torch.zeros(4, 50, dtype=double)
    corners = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=double) * math.sqrt(3 / 4)
    f[:, [0, 1]], g[:, [0, 2]] = corners * torch.tensor([2.0, 1]), corners * torch.tensor([3.0, 1])
    assert fid(f, g) == pytest.approx((3 - 2) ** 2 + 1 + 1, abs=1e-9)
    assert fid(f, f + 0.5) == pytest.approx(50 * 0.25, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 8), st.integers(0, 10**6))
def test_the_frechet_distance_is_symmetric_and_does_not_see_rotations(n, m, size, seed):
    f, g = normal(n, size, seed=seed), 2 * normal(m, size, seed=seed + 1) + 1
    rotation = torch.linalg.qr(normal(size, size, seed=seed + 2)).Q
    distance = fid(f, g)
    assert distance == pytest.approx(fid(g, f), abs=1e-8)
    assert distance == pytest.approx(fid(f @ rotation + 3, g @ rotation + 3), abs=1e-7)
    assert distance >= 0
    assert fid(f, f) == pytest.approx(0, abs=1e-8)


def test_the_kernel_distance_is_the_mean_over_blocks():
    f, g = normal(45, 3), normal(60, 3, seed=1) + 0.3
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    values = []
    for first in range(0, 44, 4):
        a, b = f[first : first + 4], g[first : first + 4]
        within = sum(k(s[i], s[j]) for s in (a, b) for i in range(4) for j in range(4) if i != j) / 12
        values.append(within - 2 * sum(k(p, q) for p in a for q in b) / 16)
    found = kid(f, g)
    assert (found.blocks, found.size) == (11, 4)
    assert found.value == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(np.std(values, ddof=1) / math.sqrt(11))


def test_the_kernel_distance_has_no_bias():
    found = [kid(normal(200, 3, seed=2 * i), normal(200, 3, seed=2 * i + 1)) for i in range(150)]
    values = np.array([one.value for one in found])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))
    assert np.mean([one.error for one in found]) == pytest.approx(values.std(), rel=0.25)
    shifted = kid(normal(200, 3), normal(200, 3, seed=1) + 1)
    assert shifted.value > 5 * shifted.error


@pytest.mark.parametrize("measure", [fid, kid, precision_recall])
def test_sets_that_cannot_be_compared_are_refused(measure):
    f = normal(30, 4)
    with pytest.raises(UsageError, match="of one network"):
        measure(f, f[:, :3])
    with pytest.raises(UsageError, match="at least"):
        measure(f, f[:1])
    with pytest.raises(UsageError, match="finite"):
        measure(f, f * math.nan)


def test_neighbours_are_those_of_all_distances(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 64)
    x, a = normal(30, 2, 3), normal(17, 2, 3, seed=1)
    a[3] = x[5]
    told = []
    distances, index = nearest(x, a, 4, tell=told.append)
    expected = torch.cdist(x.flatten(1), a.flatten(1)).sort()
    assert torch.allclose(distances, expected.values[:, :4], atol=1e-7)
    assert torch.equal(index, expected.indices[:, :4])
    assert float(distances[5, 0]) == 0
    assert told[-1] == 1
    own, others = nearest(x, x, 2, own=True)
    every = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(math.inf).sort()
    assert torch.allclose(own, every.values[:, :2])
    assert torch.equal(others, every.indices[:, :2])
    with pytest.raises(UsageError, match="17 neighbours are sought among 16"):
        nearest(a, a, 17, own=True)


def test_copies_have_distance_0_in_single_precision_far_from_the_origin():
    a = torch.rand(500, 784, generator=generator()) + 50
    distances, index = nearest(a[:100], a)
    assert float(distances.max()) == 0
    assert torch.equal(index[:, 0], torch.arange(100))


def test_precision_and_recall_of_the_same_and_of_half():
    rng = generator()
    mode = torch.tensor([[0.0, 0.0], [20.0, 0.0]], dtype=double)
    f = normal(400, 2) + mode[torch.randint(2, (400,), generator=rng)]
    same = precision_recall(f, f)
    assert (same.precision, same.recall) == (1, 1)
    half = precision_recall(f, normal(400, 2, seed=1))
    assert half.precision > 0.9
    assert 0.4 < half.recall < 0.6
    far = precision_recall(f, normal(400, 2, seed=1) + 500)
    assert (far.precision, far.recall, far.realistic) == (0, 0, 0)


def test_an_outlier_gives_precision_and_no_realism():
    f = torch.cat([normal(200, 2), torch.tensor([[100.0, 0.0]], dtype=double)])
    noise = normal(200, 2, seed=1) + torch.tensor([50.0, 40.0])
    found = precision_recall(f, noise)
    assert (found.precision, found.realistic) == (1, 0)
    r = torch.cdist(f, f).sort().values[:, 3]
    inside = torch.cdist(f[:50] + 0.3, f) <= r
    assert precision_recall(f, f[:50] + 0.3).precision == pytest.approx(float(inside.any(1).double().mean()))


def test_classes_are_covered_missing_or_too_few_to_say():
    known = torch.arange(1000) % 10
    named = torch.cat([torch.arange(960) % 8, torch.full((3,), 8)])
    found = coverage(named, known, 11)
    assert (found.present, found.covered, found.missing) == (10, 8, (8, 9))
    assert found.shares[8] == pytest.approx(3 / 963)
    assert found.distance == pytest.approx(0.2 - 3 / 963)
    assert found.p_value < 1e-9
    assert coverage(named[:30], known, 11).missing == ()
    same = coverage(known, known, 11)
    assert (same.covered, same.missing, same.distance) == (10, (), 0)
    assert same.p_value == pytest.approx(1)
    assert coverage(named * 0, known * 0, 1).p_value == 1
    with pytest.raises(UsageError, match="0 samples"):
        coverage(named[:0], known, 11)


def shown(pictures):
    """With how many others each sample shares its picture."""
    return pictures.bincount()[pictures] - 1


@pytest.mark.parametrize("slope", [0.0, 1.0], ids=["equal", "unequal"])
def test_the_interval_of_the_support_holds_it(slope):
    p = (1 + torch.arange(1000, dtype=double)).pow(-slope)
    p = p / p.sum()
    true = 1 / float(p.square().sum())
    none = torch.zeros(300, dtype=torch.int64)
    rng = generator()
    found = [birthday(shown(torch.multinomial(p, 300, replacement=True, generator=rng)), none) for _ in range(300)]
    assert np.mean([one.low <= true <= one.high for one in found]) >= 0.93
    assert np.median([one.support for one in found]) == pytest.approx(true, rel=0.1)
    assert np.mean([math.isfinite(one.high) for one in found]) > 0.95


def test_without_collisions_the_support_is_only_bounded():
    none = torch.zeros(1000, dtype=torch.int64)
    found = birthday(none, none)
    assert (found.support, found.high, found.batch) == (math.inf, math.inf, math.inf)
    # A count of 0 has a mean of at most -log 0.025.
    assert found.low == pytest.approx(499500 / -math.log(0.025))
    few = shown(torch.cat([torch.arange(990), torch.arange(10)]))
    assert birthday(few, none).high < math.inf
    assert birthday(few, few).support == math.inf
    with pytest.raises(UsageError, match="at least two"):
        birthday(none[:1], none)


def test_the_batch_holds_two_of_the_same_in_half_of_all_cases():
    rng = generator()
    batch = round(birthday(torch.full((500,), 1), torch.zeros(500, dtype=torch.int64)).batch)
    draws = torch.randint(499, (4000, batch), generator=rng).sort(1).values
    assert float((draws.diff(dim=1) == 0).any(1).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_the_scale_is_the_lesser_of_two_and_not_0_at_a_double():
    held = torch.tensor([[0.0], [0.0], [10.0], [20.0], [40.0], [80.0]])
    x = torch.tensor([[0.0], [12.0], [1000.0]])
    # Third nearest: 10, 12, 960; those of the nearest held-out examples 0, 10 and 80: 20, 10, 70.
    assert torch.allclose(scale(x, held), 0.4 * torch.tensor([10.0, 10.0, 70.0]))
    assert torch.allclose(scale(x, held, 5.0), torch.tensor([5.0, 5.0, 28.0]))
    near = torch.tensor([[0.0], [3.0], [9.0], [9.0]])
    assert collisions(near, torch.tensor([3.5, 2.0, 1.0, 7.0])).tolist() == [0, 0, 1, 1]
    assert thumbnails(torch.rand(2, 3, 5, 32)).shape == (2, 3 * 5 * 7)
    assert thumbnails(torch.rand(2, 3, 4)).shape == (2, 12)


def test_copies_are_much_closer_to_one_training_example():
    d = torch.tensor([[0.0, 0.0], [1.0, 3.0], [2.0, 3.0], [0.4, 0.5]])
    assert copies(d).tolist() == [True, True, False, False]
    assert copies(d, 0.45).tolist() == [True, True, False, True]


def test_training_examples_are_sought_among_the_others():
    train = torch.cat([normal(20, 3), normal(20, 3)[:1]])
    own = torch.tensor([4, 0, 20])
    near = Near.of(train[own], train, normal(10, 3, seed=1), own)
    every = torch.cdist(train, train).fill_diagonal_(math.inf)[own].sort()
    assert torch.allclose(near.trained, every.values[:, :2])
    assert torch.equal(near.trained_index, every.indices[:, :2])
    assert near.trained_index[1, 0] == 20
    assert near.trained_index[2, 0] == 0


def test_the_error_is_that_of_names_drawn_anew():
    rng = generator()
    real, x = normal(50, 2), normal(4, 2, seed=1).repeat(25, 1) + 0.02 * normal(100, 2, seed=2)
    cells, control = torch.zeros(100, dtype=torch.int64), torch.rand(30, generator=rng)
    near = Near.of(x, real[:30], real[30:])
    found = memory(near, cells, control, cells[:30])
    assert found.chance == 0.6
    drawn = []
    for _ in range(2000):
        order = torch.randperm(50, generator=rng)
        drawn.append((torch.cdist(x, real).argmin(1).unsqueeze(1) == order[:30]).any(1).double().mean())
    assert found.error == pytest.approx(float(torch.stack(drawn).std()), rel=0.05)
    assert float(torch.stack(drawn).mean()) == pytest.approx(0.6, abs=0.02)


def test_few_pictures_near_the_training_data_by_chance_are_no_evidence():
    """Samples of two pictures whose neighbours are training examples, out of as many held-out ones, as one time in four."""
    near = Near(
        torch.rand(500, 2), torch.arange(500).unsqueeze(1).expand(-1, 2) % 2, torch.ones(500), torch.arange(500), 50, 50
    )
    usual = Memory(0, 1000, 500, 0.5, 0.01, 0.5, 0.0)
    cells = torch.zeros(500, dtype=torch.int64)
    share, p = beyond(memory(near, cells, torch.rand(50), cells[:50]), usual)
    assert share == 1
    assert p > 0.01
    many = Near(near.trained, torch.arange(500).unsqueeze(1).expand(-1, 2), near.held, near.held_index, 500, 500)
    assert beyond(memory(many, cells, torch.rand(50), cells[:50]), usual)[1] < 1e-9
    fewer = Memory(0, 1000, 400, 0.5, 0.01, 0.5, 0.0)
    assert beyond(fewer, usual) == (0, 1)


def test_ranks_are_those_of_scipy_in_each_cell():
    rng = np.random.default_rng(0)
    d, control = torch.tensor(rng.gamma(2, size=300)), torch.tensor(rng.gamma(3, size=150))
    cells, theirs = torch.arange(300) % 3, torch.arange(150) % 3
    cells[:90], theirs[:60] = 0, 0
    near = Near(
        d.unsqueeze(1).expand(-1, 2), torch.zeros(300, 2, dtype=torch.int64), d, torch.zeros(300, dtype=torch.int64), 5, 5
    )
    found = memory(near, cells, control, theirs)
    shares, z, w = [], [], []
    for cell in range(3):
        a, b = d[cells == cell].numpy(), control[theirs == cell].numpy()
        u = sum((p > q) + 0.5 * (p == q) for p in a for q in b)
        w.append(len(b) / 150)
        shares.append(1 - u / len(a) / len(b))
        z.append((u - len(a) * len(b) / 2) / math.sqrt(len(a) * len(b) * (len(a) + len(b) + 1) / 12))
    assert found.closer == pytest.approx(np.dot(w, shares))
    assert found.c_t == pytest.approx(np.dot(w, z))
    assert stats.norm.cdf(z[0]) * 2 == pytest.approx(
        stats.mannwhitneyu(d[cells == 0], control[theirs == 0], method="asymptotic", use_continuity=False).pvalue, rel=1e-6
    )
    few = memory(near, cells, control[:10], theirs[:10])
    whole = stats.mannwhitneyu(d, control[:10]).statistic
    assert few.closer == pytest.approx(1 - whole / 3000)
    with pytest.raises(UsageError, match="300 samples and 0 held-out"):
        memory(near, cells, control[:0], theirs[:0])


class Hidden(nn.Module):
    """Two dense layers, of which the one that is called last is registered first."""

    def __init__(self):
        super().__init__()
        self.last, self.first, self.drop = nn.Linear(3, 2), nn.Linear(4, 3), nn.Dropout(0.9)

    def forward(self, x):
        return self.last(self.drop(self.first(x.flatten(1)).relu()))


class Broken(Hidden):
    def forward(self, x):
        raise RuntimeError("no")


class Unused(Hidden):
    def forward(self, x):
        return x.flatten(1)


class Tokens(Hidden):
    def forward(self, x):
        return self.first(x.view(len(x), 1, 4).expand(-1, 5, -1)).mean(1)


def test_features_are_what_the_last_dense_layer_is_given():
    module = Hidden().train()
    x = torch.rand(11, 1, 2, 2, generator=generator())
    f, logits = features(module, x, batch=4)
    hidden = module.first(x.flatten(1)).relu()
    assert torch.allclose(f, hidden.double(), atol=1e-6)
    assert torch.allclose(logits, module.last(hidden).double(), atol=1e-6)
    assert f.dtype == logits.dtype == double
    assert module.training
    assert module.drop.training
    assert all(p.requires_grad for p in module.parameters())
    assert not any(layer._forward_pre_hooks for layer in module.modules())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda x: x, "is of type function"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "has no nn.Linear"),
        (Unused(), "never calls it"),
        (Tokens(), r"shape \(2, 5, 4\) for 2 images"),
        (Broken(), "raised RuntimeError"),
    ],
    ids=["function", "none", "unused", "tokens", "broken"],
)
def test_networks_without_features_are_refused(module, message):
    with pytest.raises((UsageError, ModelError), match=message) as error:
        features(module, torch.rand(2, 1, 2, 2))
    assert "\n" not in str(error.value)
    if isinstance(module, nn.Module):
        assert not any(layer._forward_pre_hooks for layer in module.modules())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20))
def test_as_many_samples_as_data_are_on_the_right_side(both):
    real, fake = (torch.tensor(side, dtype=torch.float32) for side in zip(*both, strict=True))
    right, n = told_apart(real, fake)
    middle = torch.cat([real, fake]).sort(descending=True).values[n - 1]
    assert int((real > middle).sum()) <= right <= int((real >= middle).sum())
    assert told_apart(real + 10, fake) == (n, n)
    assert told_apart(real, fake + 10) == (0, n)
    assert told_apart(real, real) == (n // 2, n)


def test_a_conditional_discriminator_is_told_the_class():
    settings_, g, d = pairs.build("biggan(d=2, width=2)", (1, 8, 8), 3)
    pair = pairs.Pair(settings_, (1, 8, 8), 0.0, 1.0, (), 3, g.eval(), d.eval())
    x, y = torch.rand(7, 1, 8, 8), torch.arange(7) % 3
    assert torch.allclose(scores(pair, x, y), pair.score(x, y))
    assert not torch.allclose(scores(pair, x, y), scores(pair, x, (y + 1) % 3))
    with pytest.raises(UsageError, match="as many of each"):
        told_apart(torch.zeros(3), torch.zeros(2))


class Planted:
    """Emits pictures: with replacement, or each at most once; perhaps with noise."""

    shape, low, high, classes = (1, 28, 28), 0.0, 1.0, 0

    def __init__(self, pictures, once=False, noise=0.0):
        self.pictures, self.once, self.noise = pictures, once, noise

    def latent(self, n, rng):
        return torch.randn(n, 1, generator=rng)

    def decode(self, z, y=None):
        return self.pictures[: len(z)]

    def sample(self, n, y, rng):
        size = len(self.pictures)
        x = self.pictures[torch.randperm(size, generator=rng)[:n] if self.once else torch.randint(size, (n,), generator=rng)]
        return (x + self.noise * torch.randn(x.shape, generator=rng)).clamp(0, 1)


class Asked(Planted):
    """Emits pictures of the class that is asked for."""

    classes = 10

    def __init__(self, pictures, y):
        super().__init__(pictures)
        self.y = y

    def sample(self, n, y, rng):
        y = torch.randint(10, (n,), generator=rng) if y is None else y
        return torch.stack([self.pictures[self.y == k][int(torch.randint(50, (), generator=rng))] for k in y])


@pytest.fixture(scope="module")
def digits():
    """Training examples, held-out ones, others like the training examples, and a network that knows them."""
    full, test = (data.load("mnist-5k", split=split) for split in ("train", "test"))
    order = torch.randperm(len(full), generator=generator())
    learned, others = full.select(order[:2500]), full.select(order[2500:3500])
    with torch.random.fork_rng(devices=[]):
        network = train(networks.build(NETWORK), learned, Recipe(epochs=5))
    return learned, test, others, network


def images(of):
    return of.batch(0, len(of))[0]


def test_real_pictures_that_were_not_learned_are_good_and_diverse_and_no_copies(digits):
    learned, test, others, network = digits
    found = score(Planted(images(others), once=True), learned, test, network)
    assert found.warnings == ()
    assert (found.n, found.train, found.held_out) == (1000, 2500, 1000)
    assert found.fid.samples < 0.1 * found.fid.noise
    assert found.fid.samples == pytest.approx(found.fid.real, rel=0.5)
    assert found.kid.samples.value < 0.1 * found.kid.noise.value
    assert found.neighbourhoods.samples.precision > 0.8
    assert found.neighbourhoods.noise.recall < 0.1
    assert found.coverage.samples.covered == 10
    assert found.birthday.high == math.inf
    assert found.birthday.low > 30_000
    assert found.memory.samples.copies / 1000 < 0.01
    assert 0.4 < found.memory.samples.closer < 0.6
    assert found.agreement is None
    assert found.told is None
    assert found.pictures.shape == found.closest.shape == (40, 2, 1, 28, 28)


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_thousand_copies_are_found_and_counted(digits, noise):
    learned, test, _, network = digits
    found = score(Planted(images(learned)[:1000], noise=noise), learned, test, network)
    assert 500 < found.birthday.support < 2000
    assert 500 < found.birthday.low < found.birthday.high < 2000
    assert found.memory.samples.copies > 500
    assert found.memory.samples.near == 1000
    assert found.memory.samples.c_t < -5
    told = " ".join(found.warnings)
    assert "are copies of training examples" in told
    assert "small support" in told
    assert "few modes" not in told
    if not noise:
        assert torch.equal(found.closest[:, 0], found.closest[:, 1])


def test_copies_under_much_noise_are_closer_to_training_examples(digits):
    learned, test, _, network = digits
    found = score(Planted(images(learned), noise=0.2), learned, test, network)
    assert found.memory.samples.copies < 200
    assert "closer to a training example than to any held-out one" in found.warnings[0]


def test_what_emits_the_held_out_examples_is_no_copier(digits):
    learned, test, _, network = digits
    found = score(Planted(images(test), once=True), learned, test, network)
    assert found.warnings == ()
    assert found.memory.samples.near == 0
    assert found.fid.samples == pytest.approx(found.fid.real)


def test_smooth_pictures_are_neither_few_nor_copies(digits):
    learned, test, others, network = digits
    smooth = nn.functional.avg_pool2d(images(others), 3, 1, 1)
    assert score(Planted(smooth, once=True), learned, test, network).warnings == ()


def test_two_digits_are_few_modes(digits):
    learned, test, others, network = digits
    three_and_eight = (others.y == 3) | (others.y == 8)
    n = int(three_and_eight.sum())
    found = score(Planted(images(others)[three_and_eight], once=True), learned, test, network, n=n)
    assert found.coverage.samples.covered < 7
    lost = found.coverage.samples.missing
    assert len(lost) >= 3
    assert not {3, 8} & set(lost)
    assert found.neighbourhoods.samples.recall < 0.7 * found.neighbourhoods.real.recall
    (warning,) = found.warnings
    assert warning == f"few modes: {len(lost)} of 10 classes are all but left out: {', '.join(map(str, lost))}"


def test_a_source_with_classes_is_asked_for_those_of_the_data(digits):
    learned, test, others, network = digits
    found = score(Asked(images(others), others.y), learned, test, network, n=300)
    right, of = found.agreement
    assert of == 300
    assert right / of == pytest.approx(found.accuracy[0] / found.accuracy[1], abs=0.1)
    assert found.coverage.samples.p_value > 1e-3


def test_scores_repeat_and_leave_the_global_generator_alone(digits):
    learned, test, others, network = digits
    source, state, told = Planted(images(others)), torch.random.get_rng_state(), []
    first = score(source, learned, test, network, n=150, seed=3, report=lambda share, text: told.append(share))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first.as_dict() == score(source, learned, test, network, n=150, seed=3).as_dict()
    assert first.as_dict() != score(source, learned, test, network, n=150, seed=4).as_dict()
    assert told == sorted(told)
    assert told[-1] == 1
    numbers = json.loads(json.dumps(first.as_dict(), allow_nan=False))
    assert numbers["n"] == 150
    assert numbers["fid"]["noise"] == first.fid.noise


def like(low=0.0, high=1.0, shape=(1, 28, 28), classes=0):
    return Own(lambda z, *_: torch.full((len(z), *shape), low), 2, shape, low, high, classes)


BAD = {
    "draws samples of shape": ({}, like(shape=(1, 8, 8))),
    r"in \[-1, 1\] and the data are in \[0, 1\]": ({}, like(-1.0)),
    "is no source": ({}, 3),
    "has classes 0 to 4 and mnist-5k 0 to 9": ({}, like(classes=5)),
    "2000 samples are asked for": ({"n": 2000}, like()),
    "samples is 10; it should be at least 100": ({"n": 10}, like()),
    "the seed is -1": ({"seed": -1}, like()),
    "cannot use the device": ({"device": "gpu7"}, like()),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_compared_is_refused(digits, message):
    given, source = BAD[message]
    learned, test, _, network = digits
    with pytest.raises(UsageError, match=message) as error:
        score(source, learned, test, network, **given)
    assert "\n" not in str(error.value)


def test_a_generator_that_draws_nan_late_is_refused(digits):
    learned, test, _, network = digits
    source = Planted(torch.full((200, 1, 28, 28), 0.5))
    # The first look takes eight samples.
    source.sample = lambda n, y, rng: torch.full((n, 1, 28, 28), 0.5 if n == 8 else math.nan)
    with pytest.raises(UsageError, match="the generator drew NaN"):
        score(source, learned, test, network, n=100)


def test_splits_that_cannot_be_compared_are_refused(digits):
    learned, test, _, network = digits
    with pytest.raises(UsageError, match="are the training examples themselves"):
        score(like(), learned, learned, network)
    with pytest.raises(UsageError, match="2500 training and 20 held-out"):
        score(like(), learned, test.select(torch.arange(20)), network)
    other = from_tensors(torch.rand(200, 1, 8, 8), torch.arange(200) % 10, low=0.0, high=1.0)
    with pytest.raises(UsageError, match="both should be alike"):
        score(like(), learned, other, network)
    with pytest.raises(UsageError, match="has no nn"):
        score(like(), learned, test, nn.Flatten())


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A small pair that was not trained, a network, and a module of the user's own."""
    path = tmp_path_factory.mktemp("gan")
    made, g, d = pairs.build("dcgan(d=4, width=2)", (1, 28, 28), 10)
    pairs.save(path / "g.safetensors", pairs.Pair(made, (1, 28, 28), 0.0, 1.0, (), 10, g, d))
    checkpoint.save(path / "m.safetensors", digits[3], NETWORK)
    (path / "mine.py").write_text(
        "import torch\nfrom torch import nn\nfrom advkit.gan.source import Own\n"
        "def source():\n    return Own(lambda z: z.sigmoid().view(-1, 1, 28, 28), 784, (1, 28, 28))\n"
        "def network():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Linear(12, 10))\n"
        "def wide():\n    return Own(lambda z: 2 * z.sigmoid().view(-1, 1, 28, 28) - 1, 784, (1, 28, 28), -1.0)\n"
        "def blind():\n    return nn.Flatten()\n"
        "def sounds():\n    return {'x': torch.zeros(300, 50) - 0.5, 'y': torch.arange(300) % 2, 'low': -1, 'high': 1}\n"
        "def small(split):\n    x = torch.arange(300).view(-1, 1, 1, 1) / 600 + (split == 'test') / 2\n"
        "    return x.expand(-1, 1, 8, 8), torch.arange(300) % 2\n"
        "def same():\n    return torch.full((300, 1, 8, 8), 0.5), torch.arange(300) % 2\n"
        "def eight():\n    return Own(lambda z: z.sigmoid().view(-1, 1, 8, 8), 64, (1, 8, 8))\n"
    )
    return path


def command(*words):
    """Run the command as the command line will."""
    parser = argparse.ArgumentParser()
    gan_score.add(parser.add_subparsers())
    arguments = parser.parse_args(["score", *map(str, words)])
    return arguments.run(arguments)


def test_the_command_prints_a_table_and_writes_numbers_and_pictures(folder, tmp_path, capsys):
    out = tmp_path / "new" / "score"
    given = ["--generator", folder / "g.safetensors", "--data", "mnist-5k", "--features", folder / "m.safetensors"]
    assert command(*given, "--samples", 200, "--limit", 400, "--out", out) == 0
    said = capsys.readouterr()
    for word in ("FID", "KID", "precision", "classes", "told apart", "support", "copies", "C_T"):
        assert word in said.out
    assert "advkit: warning: few modes" in said.err
    written = json.loads((out / "score.json").read_text())
    assert written["schema"] == "advkit/gan-score/1"
    assert (written["n"], written["train"], written["held_out"], written["features"]) == (200, 400, 400, 32)
    assert written["told"]["of"] == written["accuracy"]["of"] == 200
    assert 0 <= written["told"]["low"] <= written["told"]["value"] <= written["told"]["high"] <= 1
    assert written["fid"]["real"] < written["fid"]["samples"]
    assert written["agreement"] is None
    assert written["warnings"]
    assert written["generator"]["digest"] == pairs.read(folder / "g.safetensors")[0].digest
    assert not (out / "features.safetensors").exists()
    for name in ("nearest.png", "closest.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_the_network_is_trained_once(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gan_score, "NETWORKS", {(1, 28, 28): "mnist-mlp(width=16)"})
    given = ["--generator", f"{folder}/mine.py:source", "--data", "mnist-5k", "--limit", 150, "--out", tmp_path]
    assert command(*given) == 0
    first = (tmp_path / "score.json").read_text()
    assert "told apart" not in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "features.safetensors")[1]["architecture"] == "mnist-mlp(width=16)"
    monkeypatch.setattr("advkit.train.train", lambda *_, **__: pytest.fail("it was trained"))
    assert command(*given) == 0
    again = (tmp_path / "score.json").read_text()
    assert json.loads(first)["fid"] == json.loads(again)["fid"]
    assert json.loads(first)["network"]["digest"] == json.loads(again)["network"]["digest"]
    with pytest.raises(UsageError, match="was trained on other examples or with another seed"):
        command(*given, "--seed", 1)


def test_generators_and_networks_of_ones_own_serve(folder, capsys):
    given = ["--generator", f"{folder}/mine.py:source", "--data", "mnist-5k", "--features", f"{folder}/mine.py:network"]
    assert command(*given, "--limit", 120) == 0
    assert "mine.py:network" in capsys.readouterr().out.replace("\n", "")


WRONG = {
    "there is no file": {"--generator": "none.safetensors"},
    "names no generator": {"--generator": "dcgan"},
    "data are in": {"--generator": "{}/mine.py:wide"},
    "of kind waveform": {"--data": "{}/mine.py:sounds"},
    "are the training examples themselves": {"--data": "{}/mine.py:same", "--generator": "{}/mine.py:eight"},
    "unknown data": {"--data": "mnist-6k"},
    "samples is 5;": {"--samples": "5"},
    "500 samples are asked for": {"--samples": "500"},
    "a score needs at least 100": {"--limit": "50"},
    "the limit is 0": {"--limit": "0"},
    "cannot use the device": {"--device": "nope"},
    "the seed is -1": {"--seed": "-1"},
    "has no nn": {"--features": "{}/mine.py:blind"},
    "there is no file m": {"--features": "m.safetensors"},
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_one_sentence(folder, message):
    given = {"--generator": "{}/g.safetensors", "--data": "mnist-5k", "--features": "{}/m.safetensors", "--limit": "200"}
    words = [word.format(folder) for pair in (given | WRONG[message]).items() for word in pair]
    with pytest.raises(UsageError, match=message) as error:
        command(*words)
    assert "\n" not in str(error.value)


def test_no_network_is_trained_for_images_of_another_shape(folder):
    given = ["--generator", f"{folder}/mine.py:eight", "--data", f"{folder}/mine.py:small"]
    with pytest.raises(UsageError, match="without --features a network is trained for"):
        command(*given)
