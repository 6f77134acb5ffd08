import dataclasses

import pytest
import torch

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
        ({"schedule": "linear"}, "unknown schedule 'linear'"),
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


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"lr": -1.0}])
def test_bad_recipes(change):
    with pytest.raises(UsageError, match="it should be"):
        Recipe(**change)
