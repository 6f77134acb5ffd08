import dataclasses
import json
import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advkit import Lp, UsageError
from advkit.data import from_tensors
from advkit.defenses import FreeTraining, PGDTraining
from advkit.models import checkpoint, networks
from advkit.train import (
    RECIPES,
    SCHEDULES,
    Check,
    CrossEntropy,
    Diverged,
    Extra,
    Progress,
    Recipe,
    _augmented,
    accuracy,
    kept,
    train,
)


@pytest.fixture
def data():
    rng = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.zeros(60, 1, 28, 28)
    for i, label in enumerate(y.tolist()):
        x[i, 0, 8 * label + 2 : 8 * label + 8] = 1.0
    return from_tensors((x + 0.2 * torch.rand(x.shape, generator=rng)).clamp(0, 1), y, low=0.0, high=1.0)


NETWORK = "mnist-mlp(width=16)"
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05, shift=1)


def _weights(model):
    return torch.cat([value.flatten().float() for value in model.state_dict().values()])


def test_it_learns_and_is_deterministic(data):
    before = torch.get_rng_state()
    models = [train(networks.build(NETWORK), data, RECIPE, seed=1) for _ in range(2)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(_weights(models[0]), _weights(models[1]))
    assert accuracy(models[0], data) == (60, 60)
    other = train(networks.build(NETWORK), data, RECIPE, seed=2)
    assert not torch.equal(_weights(models[0]), _weights(other))


ADAM = dataclasses.replace(RECIPE, optimizer="adam", lr=0.005, average=0.9, schedule="cosine", clip=1.0)
BALL = Lp(float("inf"), 0.1)


def _best_in_the_second(model, epoch, full):
    return Check(epoch, 1.0, (0.2, 0.9, 0.3, 0.4)[epoch], None, 100, full)


@pytest.mark.parametrize(
    ("loss", "recipe", "check"),
    [
        (CrossEntropy(), RECIPE, None),
        (PGDTraining(BALL, steps=2, ramp=0.5), ADAM, None),
        (FreeTraining(BALL, replays=2), dataclasses.replace(RECIPE, epochs=8), None),
        (CrossEntropy(), ADAM, _best_in_the_second),
    ],
    ids=["plain", "pgd with adam", "free", "checked"],
)
@pytest.mark.parametrize("stop", [1, 5, 9, 15])
def test_a_run_that_was_stopped_ends_with_the_same_weights(data, tmp_path, loss, recipe, check, stop):
    per_epoch = 4 * getattr(loss, "replays", 1)
    partial = tmp_path / "run.partial"

    def run(**options):
        return train(networks.build(NETWORK), data, recipe, loss=loss, check=check, **options)

    def interrupt(progress: Progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(partial=partial, report=interrupt)
    done = (stop - 1) // per_epoch * per_epoch
    assert partial.exists() == (done > 0)
    steps = []
    model = run(partial=partial, report=lambda p: steps.append(p.step))
    assert next(step for step in steps if step > done) == done + 1
    assert min(steps) >= done
    assert torch.equal(_weights(model), _weights(whole))
    again = run(partial=partial, report=lambda p: steps.append(p.step))
    assert steps[-1] == 4 * per_epoch
    assert torch.equal(_weights(again), _weights(whole))


def test_the_weights_of_the_best_epoch_are_kept(data):
    seen = []
    check, report = _best_in_the_second, lambda p: seen.append(len(p.history))
    model = train(networks.build(NETWORK), data, RECIPE, check=check, report=report)
    after = []

    def remember(model, epoch, full):
        after.append(_weights(model).clone())
        return _best_in_the_second(model, epoch, full)

    train(networks.build(NETWORK), data, RECIPE, check=remember)
    assert torch.equal(_weights(model), after[1])
    assert not torch.equal(_weights(model), after[3])
    assert seen == [0] * 4 + [1] * 5 + [2] * 5 + [3] * 5 + [4]


def _history(*robust, full=True):
    return [Check(i, 1.0, value, None, 100, full) for i, value in enumerate(robust)]


def test_of_epochs_that_cannot_be_told_apart_the_last_is_kept():
    assert kept([]) is None
    assert kept(_history(0.5, 0.8, 0.77)).epoch == 2  # a standard error is 0.04
    assert kept(_history(0.5, 0.8, 0.75)).epoch == 1
    assert kept(_history(0.5, 0.8, 0.7, 0.79)).epoch == 3
    # A little worse each time is not compared with the last, but with the best.
    assert kept(_history(0.8, 0.77, 0.74, 0.71)).epoch == 1
    # Epochs before full strength do not count against later ones.
    assert kept([*_history(0.9, full=False), *(dataclasses.replace(c, epoch=1) for c in _history(0.2))]).epoch == 1


def test_an_average_follows_the_weights(data):
    still = train(networks.build(NETWORK), data, dataclasses.replace(ADAM, average=0.999, epochs=1))
    moved = train(networks.build(NETWORK), data, dataclasses.replace(ADAM, average=0.0, epochs=1))
    fresh = networks.build(NETWORK)
    # By hand: the share that is kept is (1 + n) / (10 + n) after n steps, while that is less than 0.999.
    weights, average = [], _weights(fresh)
    model = networks.build(NETWORK)
    recipe = dataclasses.replace(ADAM, average=0.0, epochs=1)
    train(model, data, recipe, report=lambda p: weights.append(_weights(model).clone()))
    for n, value in enumerate(weights, 1):
        share = (1 + n) / (10 + n)
        average = share * average + (1 - share) * value
    assert torch.allclose(_weights(still), average, atol=1e-6)
    assert torch.equal(_weights(moved), weights[-1])


@pytest.mark.parametrize(
    ("schedule", "points"),
    [
        ("triangle", {0.1: 0.5, 0.2: 1.0, 0.6: 0.5}),
        ("cyclic", {0.2: 0.5, 0.4: 1.0, 0.7: 0.5}),
        ("cosine", {0.0: 1.0, 0.5: 0.5, 1.0: 0.0}),
        ("steps", {0.49: 1.0, 0.5: 0.1, 0.75: 0.01}),
        ("constant", {0.0: 1.0, 0.99: 1.0}),
    ],
)
def test_schedules(schedule, points):
    for t, share in points.items():
        assert SCHEDULES[schedule](t) == pytest.approx(share)


def test_the_users_optimizer_is_scaled(data):
    model = networks.build(NETWORK)
    optimizer = torch.optim.RMSprop([{"params": model[2].parameters(), "lr": 0.1}, {"params": model[4].parameters()}], lr=0.01)
    rates = []
    recipe = dataclasses.replace(RECIPE, schedule="steps")
    train(model, data, recipe, optimizer=optimizer, report=lambda p: rates.append([g["lr"] for g in optimizer.param_groups]))
    assert rates[0] == pytest.approx([0.1, 0.01])
    assert rates[-1] == pytest.approx([0.001, 0.0001])


def test_extra_data_fill_their_share_of_each_batch(data):
    marked = from_tensors(torch.full((7, 1, 28, 28), 0.5), torch.full((7,), 2), low=0.0, high=1.0)
    batches = []

    def loss(model, x, y, rng, at):
        batches.append((len(x), int((x == 0.5).flatten(1).all(1).sum())))
        return CrossEntropy()(model, x, y, rng)

    train(networks.build(NETWORK), data, dataclasses.replace(RECIPE, epochs=1, shift=0), loss=loss, extra=Extra(marked, 0.25))
    assert batches == [(16, 4), (16, 4), (16, 4), (12, 3)]
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(UsageError, match="the share of extra data"):
            Extra(marked, share)


def test_a_run_that_diverges_leaves_the_last_good_weights(data, tmp_path):
    good = []

    def loss(model, x, y, rng, at):
        return CrossEntropy()(model, x, y, rng) * (float("nan") if at >= 0.5 else 1.0)

    model = networks.build(NETWORK)
    with pytest.raises(
        Diverged, match=r"NaN in epoch 3 and the weights after epoch 2 were kept; try a learning rate below 0\.05"
    ):
        train(model, data, RECIPE, loss=loss, report=lambda p: good.append(_weights(model).clone()))
    assert torch.equal(_weights(model), good[-1])
    assert not model.training


def test_gradients_are_clipped(data):
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(float(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm()))
            return super().step(closure)

    for clip in (0.0, 0.01):
        model = networks.build(NETWORK)
        train(model, data, dataclasses.replace(RECIPE, epochs=1, clip=clip), optimizer=Watched(model.parameters(), lr=0.1))
    assert min(norms[:4]) > 0.1
    assert max(norms[4:]) <= 0.01 + 1e-6


def test_a_loss_starts_each_epoch_afresh(data):
    class Counting:
        replays = 2

        def __init__(self):
            self.calls = 0

        def __call__(self, model, x, y, rng, at):
            self.calls += 1
            calls.append(self.calls)
            return CrossEntropy()(model, x, y, rng)

    calls = []
    train(networks.build(NETWORK), data, RECIPE, loss=Counting())
    assert calls == [*range(1, 9), *range(1, 9)]  # two epochs of four batches, each twice


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known are adam, sgd"),
        ({"schedule": "line"}, "unknown schedule 'line'"),
        ({"precision": "float16"}, "unknown precision 'float16'"),
        ({"average": 1.0}, "average is 1.0; it should be at least 0 and less than 1"),
        ({"clip": -1.0}, "clip is -1.0; it should be at least 0"),
        ({"weight_decay": float("nan")}, "weight decay is nan"),
    ],
)
def test_recipes_that_are_refused(settings, sentence):
    with pytest.raises(UsageError, match=sentence):
        Recipe(**settings)


def test_mixed_precision_learns(data):
    recipe = dataclasses.replace(RECIPE, precision="bfloat16")
    model = train(networks.build(NETWORK), data, recipe, loss=PGDTraining(BALL, steps=2))
    assert next(model.parameters()).dtype == torch.float32
    assert accuracy(model, data)[0] >= 58


class Numbers(torch.optim.SGD):
    """An optimizer that keeps numbers, also in its groups."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["scale"] = 0.9 * group["scale"]
            for p in group["params"]:
                self.state[p]["n"] = self.state[p].get("n", 0.1) + 0.1
                p.grad.mul_(group["scale"] * self.state[p]["n"])
        return super().step()


class Lists(torch.optim.SGD):
    """An optimizer that keeps a list of tensors."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["before"] = [p.detach().clone()]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.005, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.005),
    "rprop": lambda p: torch.optim.Rprop(p, 0.005),
    "numbers": lambda p: Numbers([{"params": p, "scale": 1.0}], 0.05),
}


def _normed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts = [nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)]
        return nn.Sequential(*parts)


def _stopped(data, partial, make, step=10):
    def interrupt(progress: Progress):
        if progress.step == step:
            raise KeyboardInterrupt

    model = _normed()
    with pytest.raises(KeyboardInterrupt):
        train(model, data, ADAM, optimizer=make and make(model.parameters()), partial=partial, report=interrupt)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_ones_own_optimizer_goes_on_where_it_was(data, tmp_path, make):
    _stopped(data, tmp_path / "run.partial", make)
    whole, parts, other = _normed(), _normed(), _normed()
    train(whole, data, ADAM, optimizer=make(whole.parameters()))
    train(parts, data, ADAM, optimizer=make(parts.parameters()), partial=tmp_path / "run.partial")
    assert torch.equal(_weights(whole), _weights(parts))
    with pytest.raises(UsageError, match="holds another run"):
        train(other, data, ADAM, optimizer=torch.optim.SGD(other.parameters(), 0.1), partial=tmp_path / "run.partial")


def test_optimizers_that_cannot_be_used(data, tmp_path):
    model = _normed()
    with pytest.raises(UsageError, match="a step of LBFGS needs a closure"):
        train(model, data, RECIPE, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UsageError, match="Lists keeps more than tensors, numbers and text"):
        train(model, data, RECIPE, optimizer=Lists(model.parameters(), 0.1), partial=tmp_path / "run.partial")


def _forged(partial, tensors=None, **progress):
    had, metadata = checkpoint.read(partial)
    about = json.loads(metadata["progress"]) | progress
    wanted = {name: value for name, value in (had | (tensors or {})).items() if value is not None}
    checkpoint.write(partial, wanted, metadata | {"progress": json.dumps(about)})


CHECK = asdict(Check(0, 0.5, 0.5, None, 10, True))


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": {"good.1.weight": None}},
        {"tensors": {"good.1.weight": torch.zeros(3)}},
        {"tensors": {"average.1.weight": None}},
        {"tensors": {"other.1.weight": torch.zeros(3)}},
        {"tensors": {"optimizer.0.exp_avg": torch.zeros(7)}},
        {"tensors": {"optimizer.0.exp_avg": None}},
        {"tensors": {"optimizer.99.exp_avg": torch.zeros(7)}},
        {"epoch": -1},
        {"epoch": 99},
        {"epoch": "2"},
        {"taken": None},
        {"history": 5},
        {"history": [CHECK | {"robust": 5.0}]},
        {"history": [CHECK | {"of": 0}]},
        {"history": [CHECK | {"epoch": 7}]},
        {"state": []},
        {"groups": [{}]},
    ],
    ids=str,
)
def test_a_run_that_was_tampered_with_is_refused(data, tmp_path, change):
    partial = tmp_path / "run.partial"
    _stopped(data, partial, None)
    _forged(partial, **change)
    with pytest.raises(UsageError, match=r"run.partial is damaged, or does not fit the network; delete it to start anew"):
        train(_normed(), data, ADAM, partial=partial)


def test_weights_of_another_type_in_a_run_become_the_networks(data, tmp_path):
    _stopped(data, tmp_path / "run.partial", None)
    _forged(tmp_path / "run.partial", {"average.1.weight": torch.zeros(8, 784, dtype=torch.int32)})
    assert train(_normed(), data, ADAM, partial=tmp_path / "run.partial")[1].weight.dtype == torch.float32


def test_a_last_batch_of_one_joins_the_one_before(data):
    sizes = []

    def loss(model, x, y, rng, at):
        sizes.append(len(x))
        return CrossEntropy()(model, x, y, rng)

    train(_normed(), data, dataclasses.replace(RECIPE, epochs=1, batch_size=59), loss=loss)
    train(_normed(), data.select(torch.arange(41)), dataclasses.replace(RECIPE, epochs=1, batch_size=20), loss=loss)
    train(networks.build(NETWORK), data.select(torch.arange(3)), Recipe(epochs=1, batch_size=1), loss=loss)
    assert sizes == [60, 20, 21, 1, 1, 1]


def _points(n=20, size=784, label=0, low=0.0):
    return from_tensors(torch.rand(n, 1, size // 28, 28), torch.full((n,), label), low=low, high=1.0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"model": nn.Flatten()}, "the model has no parameters"),
        ({"model": networks.build(NETWORK).requires_grad_(False)}, "the loss has no gradient"),
        ({"data": _points().select(torch.arange(0))}, "data holds no examples"),
        ({"data": _points(label=10)}, "the labels are between 10 and 10; the model has classes 0 to 9"),
        ({"extra": Extra(_points().select(torch.arange(0)))}, "data holds no examples"),
        ({"extra": Extra(_points(label=10))}, "the labels are between 10 and 10"),
        ({"extra": Extra(_points(size=28 * 7))}, "takes 784 features and got 196"),
        ({"extra": Extra(_points(low=-1.0))}, r"shape \(1, 28, 28\) in \[-1, 1\] and the data \(1, 28, 28\) in \[0, 1\]"),
        ({"extra": Extra(_points()), "recipe": Recipe(batch_size=1)}, "the batch size is 1, which leaves no room"),
        ({"model": _normed(), "recipe": Recipe(batch_size=1)}, "a batch would be one example"),
        ({"loss": lambda model, x, y, rng, at: F.cross_entropy(model(x), y, reduction="none")}, r"a tensor of shape \(16,\)"),
        ({"loss": lambda model, x, y, rng, at: 1.0}, "the loss returned float"),
        ({"device": "gpu"}, "cannot use the device 'gpu'"),
    ],
)
def test_what_cannot_be_trained_with(data, options, sentence):
    given = {"model": networks.build(NETWORK), "data": data, "recipe": RECIPE, **options}
    with pytest.raises(UsageError, match=sentence):
        train(**given)


def test_a_loss_that_cannot_be_copied(data):
    class Holding:
        def __init__(self):
            self.tensor = torch.ones(1, requires_grad=True) * 2

        def __call__(self, model, x, y, rng, at):
            return CrossEntropy()(model, x, y, rng)

    with pytest.raises(UsageError, match="the loss Holding cannot be copied for each epoch"):
        train(networks.build(NETWORK), data, RECIPE, loss=Holding())


def test_an_infinite_loss_is_called_so(data):
    def loss(model, x, y, rng, at):
        return CrossEntropy()(model, x, y, rng) + math.inf

    model = networks.build(NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), 3.0)
    with pytest.raises(
        Diverged, match="the loss became infinite in epoch 1 and no epoch was done; try a learning rate below 3"
    ):
        train(model, data, RECIPE, loss=loss, optimizer=optimizer)


def test_another_run_is_not_resumed(data, tmp_path):
    partial = tmp_path / "run.partial"

    def interrupt(progress: Progress):
        if progress.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(networks.build(NETWORK), data, RECIPE, partial=partial, report=interrupt)
    with pytest.raises(UsageError, match="holds another run"):
        train(networks.build(NETWORK), data, dataclasses.replace(RECIPE, lr=0.1), partial=partial)
    partial.write_bytes(b"no")
    with pytest.raises(UsageError, match="not a readable safetensors file"):
        train(networks.build(NETWORK), data, RECIPE, partial=partial)


def test_adversarial_training_withstands_what_plain_training_does_not(data):
    from advkit import evaluate

    threat = Lp(float("inf"), 0.25)
    plain = train(networks.build(NETWORK), data, RECIPE)
    robust = train(networks.build(NETWORK), data, dataclasses.replace(RECIPE, epochs=12), loss=PGDTraining(threat, steps=5))
    a, b = (
        evaluate(model, data, threat="linf(0.3)", attacks="pgd(steps=20)").robust_accuracy.value for model in (plain, robust)
    )
    assert b > a + 0.2


def test_a_loss_that_diverges_gets_a_sentence(data):
    with pytest.raises(UsageError, match="the loss became NaN in epoch 1 and no epoch was done; try a learning rate below 1e"):
        train(networks.build(NETWORK), data, dataclasses.replace(RECIPE, lr=1e9))


def test_augmentation_moves_whole_images():
    rng = torch.Generator().manual_seed(0)
    x = torch.zeros(50, 2, 5, 7)
    x[:, :, 2, 3] = 1.0
    moved = _augmented(x, Recipe(shift=2), rng)
    assert moved.shape == x.shape
    assert (moved.sum((2, 3)) == 1).all()
    assert torch.equal(moved[:, 0], moved[:, 1])
    places = moved[:, 0].flatten(1).argmax(1)
    assert len(places.unique()) > 15
    assert set((places // 7 - 2).tolist()) == set((places % 7 - 3).tolist()) == {-2, -1, 0, 1, 2}
    x[:, :, 2, 3], x[:, :, 0, 0] = 0.0, 1.0
    flipped = _augmented(x, Recipe(flip=True), rng)
    assert {0, 6} == set(flipped[:, 0].flatten(1).argmax(1).tolist())


def test_few_examples_get_more_epochs():
    recipe = RECIPES["mnist-cnn"]
    assert recipe.for_examples(60000) == recipe
    assert recipe.for_examples(4000).epochs * 4000 // recipe.batch_size >= 500


def test_every_network_has_a_recipe_and_survives_a_checkpoint(tmp_path):
    assert set(RECIPES) == set(networks.NETWORKS)
    for name, shape in (("mnist-cnn", (2, 1, 28, 28)), ("mnist-mlp", (2, 1, 28, 28)), ("cifar-resnet", (2, 3, 32, 32))):
        model = networks.build(name, seed=3).eval()
        checkpoint.save(tmp_path / "m.safetensors", model, name)
        x = torch.rand(shape)
        with torch.no_grad():
            assert torch.equal(checkpoint.load(tmp_path / "m.safetensors")[0].eval()(x), model(x))


@pytest.mark.parametrize("change", [{"momentum": -1.0}, {"momentum": 1.0}, {"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}])
def test_bad_recipes(change):
    with pytest.raises(UsageError, match="it should be"):
        Recipe(**change)
