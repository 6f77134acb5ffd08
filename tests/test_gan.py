"""Generators: networks, losses, the training loop, sources and their files, the command line."""

import copy
import dataclasses
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from advkit import spec
from advkit.cli import main
from advkit.course import Diverged
from advkit.data import from_source, from_tensors, load
from advkit.errors import UsageError
from advkit.gan import game as loop
from advkit.gan import pair as pairs
from advkit.gan.adversarial import Adversarial
from advkit.gan.collapse import ALARM, Bins
from advkit.gan.game import MATCHES, Match, Round, alarm, play
from advkit.gan.layers import ConditionalNorm, Dense, MinibatchDiscrimination, Noise, SelfAttention
from advkit.gan.losses import GAME_LOSSES, Hinge, LeastSquares, Minimax, NonSaturating, Wasserstein, matched, told_apart
from advkit.gan.pair import GANS, Pair, build
from advkit.gan.source import Own, check_source
from advkit.gan.ssgan import Classifier, SemiSupervised
from advkit.models import checkpoint, networks

SMALL = {
    "mlp": "mlp(d=8, width=16, maxout=8)",
    "dcgan": "dcgan(d=8, width=4, minibatch=3)",
    "biggan": "biggan(d=8, width=4, attention=True)",
    "ssgan": "ssgan(d=8, width=16)",
}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def digits(n=200, split="train"):
    return load("mnist-5k", split=split, limit=n)


def made(text, shape=(1, 28, 28), labels=10, low=0.0, high=1.0, names=()):
    settings, generator, discriminator = build(text, shape, labels)
    return Pair(settings, shape, low, high, names, labels, generator, discriminator)


def game_of(text, seed=0, **data):
    settings, generator, discriminator = build(text, (1, 28, 28), 10, seed)
    if text.startswith("ssgan"):
        some = digits(100)
        return SemiSupervised(settings, generator, discriminator, *some.batch(0, 100))
    return Adversarial(settings, generator, discriminator, spec.parse(settings.loss, GAME_LOSSES, "loss"))


def weights(game):
    return {
        f"{name}.{key}": value
        for name, net in (("g", game.generator), ("d", game.discriminator))
        for key, value in net.state_dict().items()
    }


def same(a, b):
    return all(torch.equal(value, b[key]) for key, value in a.items())


# Networks


def test_every_pair_of_the_table_is_tested_and_has_a_match():
    assert set(SMALL) == set(GANS) == set(MATCHES)
    for text in SMALL.values():
        assert spec.show(spec.parse(text, GANS, "generator"), GANS) == text


@pytest.mark.parametrize("text", [*SMALL.values(), 'biggan(d=8, width=4, judge="classifier")'])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_networks_draw_inputs_in_range_and_score_them(text, shape):
    pair = made(text, shape, low=-1.0, high=1.0)
    y = torch.arange(6) % 10
    x = pair.sample(6, y if pair.classes else None, rng())
    assert x.shape == (6, *shape)
    assert x.min() >= -1
    assert x.max() <= 1
    assert pair.score(x, y).shape == (6,)
    check_source(pair, "it", shape, (-1.0, 1.0))


@pytest.mark.parametrize(("text", "shape"), [("dcgan", (1, 27, 28)), ("biggan", (3, 4, 4)), ("dcgan", (784,))])
def test_images_that_cannot_be_halved_are_refused(text, shape):
    with pytest.raises(UsageError, match=r"images|even"):
        build(text, shape, 10)


def test_noise_is_there_in_training_only():
    layer, h = Noise(0.5), torch.zeros(1000, 4)
    assert abs(float(layer(h).std()) - 0.5) < 0.05
    assert torch.equal(layer.eval()(h), h)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_dense_layer_starts_with_units_of_mean_0_and_deviation_1(scaled):
    layer, h = Dense(5, 7, scaled), 3 + 2 * torch.randn(400, 5, generator=rng())
    layer.initialize(h)
    out = layer(h)
    assert torch.allclose(out.mean(0), torch.zeros(7), atol=1e-5)
    assert torch.allclose(out.std(0, unbiased=False), torch.ones(7), atol=1e-5)
    norms = (layer.v * (layer.scale / layer.v.norm(dim=1)).unsqueeze(1)).norm(dim=1)
    assert torch.allclose(norms, layer.scale.abs(), rtol=1e-4)


@torch.no_grad()
def test_minibatch_discrimination_sees_examples_that_are_alike():
    layer = MinibatchDiscrimination(6, 4, 3)
    apart, alike = 100 * torch.randn(8, 6, generator=rng()), torch.ones(8, 6)
    assert torch.allclose(layer(alike), torch.full((8, 4), 7.0), atol=1e-5)
    assert float(layer(apart).max()) < 1.0


def test_self_attention_starts_as_the_identity_and_mixes_places_later():
    layer, h = SelfAttention(8).eval(), torch.randn(2, 8, 4, 4, generator=rng())
    assert torch.equal(layer(h), h)
    nn.init.ones_(layer.gamma)
    g = torch.autograd.grad(layer(z := h.clone().requires_grad_())[0, :, 0, 0].sum(), z)[0]
    assert float(g[0, :, 2:, 2:].abs().sum()) > 0
    assert float(g[1].abs().sum()) == 0


@torch.no_grad()
def test_a_conditional_norm_is_a_plain_one_for_the_code_0():
    layer, h = ConditionalNorm(3, 5), 4 + 3 * torch.randn(50, 3, 4, 4, generator=rng())
    out = layer(h, torch.zeros(50, 5))
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert not torch.allclose(layer(h, torch.ones(50, 5)), out)


@torch.no_grad()
def test_the_logits_of_a_semi_supervised_classifier_belong_to_one_input():
    model, x = Classifier(784, 10, kernels=5).eval(), torch.rand(6, 1, 28, 28, generator=rng())
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-6)
    f = model.features(x)
    assert not torch.allclose(model.real(f, model.logits(f))[:1], model.real(f[:1], model.logits(f[:1])))


# Losses


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6))
def test_minimax_is_a_game_of_zero_sum(scores):
    fake = torch.tensor(scores, dtype=torch.float64)
    real = fake.flip(0)
    of_fake = Minimax().discriminator(real, fake) - torch.nn.functional.softplus(-real).mean()
    assert math.isclose(float(of_fake), -float(Minimax().generator(fake)), abs_tol=1e-9)


def test_the_non_saturating_loss_is_steep_where_minimax_is_flat():
    slopes = {}
    for loss in (Minimax(), NonSaturating()):
        sure = torch.tensor([-10.0], requires_grad=True)
        loss.generator(sure).backward()
        slopes[type(loss)] = float(sure.grad)
    assert abs(slopes[Minimax]) < 1e-4
    assert slopes[NonSaturating] == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("name", [name for name in GAME_LOSSES if name != "feature-matching"])
def test_both_sides_of_a_loss_pull_the_right_way(name):
    loss = GAME_LOSSES[name]()
    real, fake = torch.tensor([0.3, 0.4], requires_grad=True), torch.tensor([0.2, 0.3], requires_grad=True)
    up, down = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    assert (up < 0).all(), "the discriminator should raise the scores of data"
    assert (down > 0).all(), "and lower those of drawings"
    (g,) = torch.autograd.grad(loss.generator(fake), fake)
    assert (g < 0).all(), "the generator should raise the scores of its drawings"
    assert spec.parse(spec.show(loss, GAME_LOSSES), GAME_LOSSES, "loss") == loss


def test_the_discriminator_tells_nothing_apart_where_scores_are_equal_in_law():
    scores = torch.randn(20_000, generator=rng())
    for loss, middle in ((NonSaturating(), 0.0), (Hinge(), 0.0), (LeastSquares(), 0.5), (Wasserstein(), 3.0)):
        real, fake = (scores[i::2] + middle for i in (0, 1))
        assert float(told_apart(loss, real, fake)) == pytest.approx(0.5, abs=0.02)
    assert float(told_apart(Hinge(), torch.ones(3), -torch.ones(3))) == 1.0


def test_matched_features_compare_means():
    a, b = torch.randn(5, 4, generator=rng()), torch.randn(7, 4, generator=rng(1))
    assert float(matched(a, a.flip(0))) == pytest.approx(0, abs=1e-12)
    assert float(matched(a + 2, a)) == pytest.approx(4, abs=1e-5)
    assert float(matched(a, b)) > 0


def test_the_gradient_penalty_of_a_critic_with_slope_1_is_0():
    class Critic(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.w = nn.Parameter(slope * torch.ones(4) / 2)

        def features(self, x):
            return x.flatten(1)

        def score(self, f, y=None):
            return f @ self.w

        def forward(self, x, y=None):
            return self.score(self.features(x), y)

    x, y = torch.rand(6, 4, generator=rng()), torch.zeros(6, dtype=torch.int64)
    settings = spec.parse("mlp(d=3)", GANS, "generator")
    values = []
    for slope in (1.0, 3.0):
        generator = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid())
        game = Adversarial(settings, generator, Critic(slope), Wasserstein(penalty=1.0))
        plain = Adversarial(settings, generator, game.discriminator, Wasserstein(penalty=0.0))
        values.append((game.discriminate(x, y, rng())[0] - plain.discriminate(x, y, rng())[0]).item())
    assert values == pytest.approx([0.0, 4.0], abs=1e-4)


def test_a_penalty_does_not_go_with_batch_normalization():
    with pytest.raises(UsageError, match="batch normalization"):
        game_of('dcgan(width=4, loss="wasserstein")')


# The loop

QUICK = Match(epochs=2, batch_size=50, average=0.9)


@pytest.mark.parametrize("text", SMALL.values())
def test_a_game_is_deterministic_and_leaves_the_global_state_alone(text):
    state = torch.get_rng_state()
    games = [game_of(text), game_of(text)]
    rounds = [play(game, digits(), QUICK, seed=3) for game in games]
    assert torch.equal(torch.get_rng_state(), state)
    assert rounds[0] == rounds[1]
    assert same(*map(weights, games))
    assert not same(weights(games[0]), weights(game_of(text)))
    assert not games[0].generator.training
    assert [entry.epoch for entry in rounds[0]] == [0, 1]
    assert all(p.requires_grad for p in games[0].discriminator.parameters())


@pytest.mark.parametrize("text", [SMALL["dcgan"], SMALL["biggan"], SMALL["ssgan"]])
def test_a_game_that_was_stopped_goes_on_to_the_same_weights(text, tmp_path):
    whole, partial = game_of(text), tmp_path / "partial"
    rounds = play(whole, digits(), dataclasses.replace(QUICK, epochs=3))

    class Stop(Exception):
        pass

    def stop(at):
        if at.epoch == 1 and at.step % 4 == 3:
            raise Stop

    match, broken = dataclasses.replace(QUICK, epochs=3), game_of(text)
    with pytest.raises(Stop):
        play(broken, digits(), match, partial=partial, report=stop)
    resumed = game_of(text, seed=1)
    assert play(resumed, digits(), match, partial=partial) == rounds
    assert same(weights(whole), weights(resumed))


def test_another_game_is_not_gone_on_with(tmp_path):
    partial = tmp_path / "partial"
    play(game_of(SMALL["mlp"]), digits(), QUICK, partial=partial)
    with pytest.raises(UsageError, match="holds another run"):
        play(game_of(SMALL["mlp"]), digits(), QUICK, seed=1, partial=partial)
    partial.write_bytes(partial.read_bytes()[:-100])
    with pytest.raises(UsageError, match="cut off"):
        play(game_of(SMALL["mlp"]), digits(), QUICK, partial=partial)


class Planted:
    """A game that is what a test makes it."""

    evenly = True

    def __init__(self, told=0.5, drawn=None, breaks_at=math.inf):
        self.generator, self.discriminator = nn.Linear(1, 1), nn.Linear(1, 1)
        self.told, self.drawn, self.breaks_at, self.steps = told, drawn, breaks_at, 0

    def begin(self, x):
        pass

    def draw(self, n, y, rng):
        return self.drawn[torch.randint(len(self.drawn), (n,), generator=rng)]

    def discriminate(self, x, y, rng):
        self.steps += 1
        value = self.discriminator(x.flatten(1)[:, :1]).mean()
        return value * (math.nan if self.steps > self.breaks_at else 1.0), torch.tensor(self.told)

    def generate(self, x, y, rng):
        return self.generator(x.flatten(1)[:, :1]).square().mean()


def pictures(keep):
    x, y = digits(2000, "train").batch(0, 2000)
    return x[torch.isin(y, torch.tensor(keep))]


def test_a_loss_that_is_nan_ends_the_game_with_the_last_good_weights():
    game, kept = Planted(drawn=pictures(range(10)), breaks_at=6), {}

    def keep(at):
        if at.samples is not None:
            kept.update(copy.deepcopy(weights(game)))

    with pytest.raises(
        Diverged, match="discriminator's loss became NaN in epoch 2, and the weights after epoch 1 were kept; try"
    ):
        play(game, digits(), dataclasses.replace(QUICK, average=0.0), report=keep)
    assert same(kept, weights(game))


def test_a_discriminator_without_a_mistake_ends_the_game(monkeypatch):
    monkeypatch.setattr(loop, "HOPELESS", 6)
    with pytest.raises(Diverged, match="made no mistake in 6 steps in epoch 2"):
        play(Planted(told=1.0, drawn=pictures(range(10))), digits(), QUICK)
    game = Planted(told=1.0, drawn=pictures(range(10)))
    game.evenly = False
    assert len(play(game, digits(), QUICK)) == 2


def test_a_generator_of_two_digits_raises_the_alarm_and_one_of_ten_does_not():
    data = digits(2000)
    collapsed = play(Planted(drawn=pictures([3, 7])), data, QUICK)
    assert all(entry.lost > ALARM for entry in collapsed)
    assert "mode collapse" in alarm(collapsed)
    healthy = play(Planted(drawn=digits(1000, "test").batch(0, 1000)[0]), data, QUICK)
    assert all(entry.lost < 0.05 for entry in healthy)
    assert alarm(healthy) == ""
    assert alarm([*collapsed, healthy[0]]) == ""


def test_bins_of_the_data_hold_the_data():
    x = pictures(range(10))
    bins = Bins.of(x, rng())
    assert float(bins.shares.sum()) == pytest.approx(1)
    assert bins.lost(x) == 0.0
    assert bins.lost(torch.zeros_like(x)) > ALARM


def test_too_few_examples_and_odd_settings_are_refused():
    with pytest.raises(UsageError, match="at least 10"):
        play(game_of(SMALL["mlp"]), digits(9), QUICK)
    for name, value in (("lr", 0.0), ("beta_1", 1.0), ("batch_size", 1), ("schedule", "x"), ("turns", 0)):
        with pytest.raises(UsageError):
            Match(**{name: value})


@pytest.mark.slow
def test_two_processes_play_one_game(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611", "-m", "advkit"]
    out = tmp_path / "g.safetensors"
    options = ["--model", SMALL["biggan"], "--data", "mnist-5k", "--limit", "200", "--epochs", "2", "--out", str(out)]
    done = subprocess.run(
        [*run, "gan", "train", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("g.safetensors: ") == 1
    assert pairs.read(out)[0].sample(4, None, rng()).isfinite().all()


def test_bfloat16_trains_too():
    game = game_of(SMALL["biggan"])
    rounds = play(game, digits(), dataclasses.replace(QUICK, precision="bfloat16"))
    assert all(math.isfinite(entry.g_loss) for entry in rounds)
    assert next(game.generator.parameters()).dtype == torch.float32


# Sources and files


def own(**changes):
    settings = {"generator": lambda z: z.sigmoid().view(-1, 1, 2, 2), "d": 4, "shape": (1, 2, 2)} | changes
    return Own(**settings)


def test_a_source_draws_the_same_from_the_same_generator():
    pair = made(SMALL["biggan"])
    assert torch.equal(pair.sample(7, None, rng(3)), pair.sample(7, None, rng(3)))
    assert not torch.equal(pair.sample(7, None, rng(3)), pair.sample(7, None, rng(4)))
    y = torch.tensor([1, 2, 3])
    z = pair.latent(3, rng())
    assert torch.equal(pair.decode(z, y), pair.sample(3, y, rng()))
    z.requires_grad_()
    assert torch.autograd.grad(pair.decode(z, y).sum(), z)[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("asked", "says"),
    [(12, "class asked for is 12; the generator has classes 0 to 9"), (-1, "-1"), (torch.tensor([0.0, 1.0]), "integers")],
)
def test_a_class_that_there_is_not_is_refused(asked, says):
    with pytest.raises(UsageError, match=says):
        made(SMALL["biggan"]).sample(2, asked, rng())
    with pytest.raises(UsageError, match="has no classes"):
        own().sample(2, asked, rng())


def raises(z):
    raise RuntimeError("no")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"generator": lambda z: 2 * z.sigmoid().view(-1, 1, 2, 2)}, r"drew values in .* says \[0, 1\]"),
        ({"generator": lambda z: z.sigmoid()}, r"shape \(4,\) and says \(1, 2, 2\)"),
        ({"generator": lambda z: z.view(-1, 1, 2, 2) * math.nan}, "NaN"),
        ({"generator": raises}, "raised RuntimeError when it was asked for samples: no"),
    ],
)
def test_a_source_that_is_not_what_it_says_is_refused(changes, says):
    with pytest.raises(UsageError, match=says):
        check_source(own(**changes), "mine")


def test_a_source_that_does_not_fit_the_data_is_refused():
    with pytest.raises(UsageError, match=r"draws samples of shape \(1, 2, 2\) and the data have \(3, 32, 32\)"):
        check_source(own(), "mine", (3, 32, 32))
    with pytest.raises(UsageError, match=r"in \[0, 1\] and the data are in \[-1, 1\]"):
        check_source(own(), "mine", (1, 2, 2), (-1.0, 1.0))
    with pytest.raises(UsageError, match="no source of samples: it has no shape"):
        check_source(nn.Linear(2, 2), "mine")


def test_a_file_holds_a_pair(tmp_path):
    path, pair = tmp_path / "g.safetensors", made(SMALL["biggan"], low=-1.0, names=tuple("0123456789"))
    pair.generator.eval(), pair.discriminator.eval()
    pairs.save(path, pair, data="mine")
    read, metadata = pairs.read(path)
    y = torch.arange(5)
    x = pair.sample(5, y, rng())
    assert torch.equal(read.sample(5, y, rng()), x)
    assert torch.equal(read.score(x, y), pair.score(x, y))
    assert (read.settings, read.shape, read.low, read.names) == (pair.settings, pair.shape, -1.0, pair.names)
    assert metadata["data"] == "mine"
    assert pairs.load(str(path)).digest == read.digest
    with torch.no_grad():
        next(pair.generator.parameters()).add_(1)
    pairs.save(path, pair)
    assert pairs.load(str(path)).digest != read.digest


def test_files_that_are_no_generators_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(UsageError, match="there is no file"):
        pairs.load(str(path))
    checkpoint.save(path, networks.build("mnist-mlp(width=8)"), "mnist-mlp(width=8)")
    with pytest.raises(UsageError, match="holds no generator of advkit's"):
        pairs.load(str(path))
    with pytest.raises(UsageError, match="names no generator"):
        pairs.load("dcgan")
    pair = made(SMALL["dcgan"])
    pairs.save(path, pair)
    tensors, metadata = checkpoint.read(path)
    huge = {"shape": [1, 10**9, 10**9], "labels": 1, "low": 0, "high": 1, "names": []}
    for changed, says in (
        ({"gan": "dcgan(d=9, width=4, minibatch=3)"}, "do not fit"),
        ({"gan": "nogan"}, "does not have"),
        ({"draws": "[]"}, "do not fit"),
        ({"draws": json.dumps(huge)}, r"memory|fit|have"),
    ):
        checkpoint.write(path, tensors, metadata | changed)
        with pytest.raises(UsageError, match=says):
            pairs.read(path)


def test_a_semi_supervised_pair_is_a_model_too(tmp_path):
    path, pair = tmp_path / "s.safetensors", made(SMALL["ssgan"])
    pairs.save(path, pair)
    model, metadata = checkpoint.load(path)
    x = torch.rand(4, 1, 28, 28, generator=rng())
    assert metadata["architecture"].startswith("mnist-ssl")
    assert torch.equal(model.eval()(x), pair.discriminator.eval()(x))


def test_what_a_generator_draws_is_data(tmp_path):
    path = tmp_path / "g.safetensors"
    pairs.save(path, made(SMALL["biggan"], names=tuple("abcdefghij")))
    data, again = (load(str(path), split="test", limit=30) for _ in range(2))
    x, y = data.batch(0, 30)
    assert data.classes[3] == "d"
    assert data.levels == 255
    assert torch.equal((255 * x).round(), 255 * x)
    assert y.bincount().tolist() == [3] * 10
    assert data.digest() == again.digest() != load(str(path), split="train", limit=30).digest()
    with pytest.raises(UsageError, match=r"draws in \[0, 1\]"):
        load(str(path), low=-1.0, high=1.0)
    with pytest.raises(UsageError, match="no split"):
        load(str(path), split="other")
    assert "every label is 0" in from_source(own(), "mine", n=4).notes[0]


# The command line


def run(capsys, *arguments):
    code = main([*map(str, arguments)])
    return code, capsys.readouterr()


TRAIN = ("gan", "train", "--data", "mnist-5k", "--limit", 200, "--epochs", 1)


def test_train_sample_and_use_as_data(tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    code, said = run(capsys, *TRAIN, "--model", SMALL["biggan"], "--out", out)
    assert code == 0
    assert "epoch 1: losses" in said.out
    assert "mode collapse" in said.err
    assert (tmp_path / "g-samples" / "epoch-001.png").is_file()
    assert not out.with_name("g.safetensors.partial").exists()
    assert json.loads(pairs.read(out)[1]["history"])[0]["epoch"] == 0
    for name in ("grid.png", "samples.npz", "images"):
        assert run(capsys, "gan", "sample", "--generator", out, "--n", 12, "--out", tmp_path / name)[0] == 0
    for name in ("samples.npz", "images"):
        data = load(str(tmp_path / name))
        assert data.batch(0, 12)[0].shape == (12, 1, 28, 28)
        assert sorted(data.y.tolist()) == sorted(i % 10 for i in range(12))
    code, said = run(
        capsys, "train", "--model", "mnist-mlp(width=8)", "--data", "mnist-5k", "--limit", 100, "--epochs", 1,
        "--extra", out, "--extra-ratio", 0.7, "--out", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert code == 0


def test_few_labels(tmp_path, capsys):
    out = tmp_path / "s.safetensors"
    code, said = run(capsys, *TRAIN, "--model", SMALL["ssgan"], "--labels", 20, "--out", out)
    assert code == 0
    assert "its classifier" in said.out
    code, said = run(
        capsys, "attack", "--model", out, "--data", "mnist-5k", "--threat", "linf(0.1)", "--attack", "fgsm", "--limit", 10
    )
    assert code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*TRAIN, "--model", "dcgan", "--out", "g.pt"), "ends in .safetensors"),
        ((*TRAIN, "--model", "dcgn", "--out", "g.safetensors"), "did you mean 'dcgan'"),
        ((*TRAIN, "--model", "dcgan", "--labels", 10, "--out", "g.safetensors"), "only ssgan learns from few labels"),
        ((*TRAIN, "--model", "ssgan", "--labels", 5, "--out", "g.safetensors"), "between 10, one for each class, and 200"),
        ((*TRAIN, "--model", 'dcgan(loss="x")', "--out", "g.safetensors"), "unknown loss 'x'"),
        (("gan", "sample", "--generator", "none.safetensors", "--out", "x.png"), "there is no file"),
        (("gan", "sample", "--generator", "g", "--out", "x.png"), "names no generator"),
    ],
)
def test_misuse_is_one_sentence(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = run(capsys, *arguments)
    assert code == 2
    assert says in said.err
    assert said.err.count("\n") == 1


def test_a_class_out_of_range_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    pairs.save(path, made(SMALL["biggan"]))
    code, said = run(capsys, "gan", "sample", "--generator", path, "--class", 12, "--out", tmp_path / "x.png")
    assert (code, said.err) == (2, "advkit: the class asked for is 12; the generator has classes 0 to 9\n")


def test_a_game_that_diverges_keeps_the_last_good_weights(tmp_path, capsys):
    out = tmp_path / "g.safetensors"
    code, said = run(capsys, *TRAIN, "--model", SMALL["mlp"], "--lr", 1e20, "--lr-discriminator", 1e20, "--out", out)
    assert code == 2
    assert "lower learning rates" in said.err


def test_rounds_say_when_they_collapsed():
    assert Round(0, 1.0, 1.0, 0.5, 0.5).collapsed
    assert not Round(0, 1.0, 1.0, 0.5, 0.1).collapsed


def test_generated_data_must_be_like_the_data(tmp_path, capsys):
    path = tmp_path / "g.safetensors"
    pairs.save(path, made(SMALL["biggan"], shape=(3, 32, 32)))
    code, said = run(
        capsys, "train", "--model", "mnist-mlp(width=8)", "--data", "mnist-5k", "--limit", 100, "--epochs", 1,
        "--extra", path, "--out", tmp_path / "m.safetensors",
    )  # fmt: skip
    assert code == 2
    assert "features" in said.err or "shape" in said.err
    assert from_tensors(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)).kind == "image"
