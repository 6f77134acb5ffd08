import dataclasses

import pytest
import torch

from advkit import Lp, UsageError
from advkit.data import from_tensors
from advkit.defenses import PGDTraining
from advkit.models import checkpoint, networks
from advkit.train import RECIPES, CrossEntropy, Progress, Recipe, _augmented, accuracy, train


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


@pytest.mark.parametrize("loss", [CrossEntropy(), PGDTraining(Lp(float("inf"), 0.1), steps=2)])
@pytest.mark.parametrize("stop", [1, 5, 9, 15])
def test_a_run_that_was_stopped_ends_with_the_same_weights(data, tmp_path, loss, stop):
    whole = train(networks.build(NETWORK), data, RECIPE, loss=loss)
    partial = tmp_path / "run.partial"

    def interrupt(progress: Progress):
        if progress.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(networks.build(NETWORK), data, RECIPE, loss=loss, partial=partial, report=interrupt)
    assert partial.exists() == (stop > 4)
    steps = []
    model = train(networks.build(NETWORK), data, RECIPE, loss=loss, partial=partial, report=lambda p: steps.append(p.step))
    assert steps[0] == 1 + (stop - 1) // 4 * 4
    assert torch.equal(_weights(model), _weights(whole))
    again = train(networks.build(NETWORK), data, RECIPE, loss=loss, partial=partial, report=lambda p: steps.append(p.step))
    assert steps[-1] == 16
    assert torch.equal(_weights(again), _weights(whole))


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
    with pytest.raises(UsageError, match="the loss became NaN in epoch 1; try a learning rate below 1e"):
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
