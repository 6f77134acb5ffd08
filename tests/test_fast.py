"""The stand-in: close to the model, and never believed without it."""

import math
import shutil

import pytest
import torch
from torch import nn

from advkit import Lp, UsageError, evaluate, run
from advkit.attacks import FMN, PGD, Square
from advkit.cli import main
from advkit.data import load
from advkit.fast import fast
from advkit.models import checkpoint, networks
from advkit.streams import Streams
from advkit.testing import _Counting
from advkit.train import Recipe, train

NETWORK = "mnist-cnn(width=8, dense=32)"
THREAT = Lp(math.inf, 0.1)


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng(devices=[]):
        return train(networks.build(NETWORK), load("mnist-5k", split="train"), Recipe(epochs=2)).eval()


@pytest.fixture(scope="module")
def batch():
    return load("mnist-5k", split="test").batch(0, 100)


def fooled(model, x, y):
    with torch.no_grad():
        return model(x).argmax(1) != y


class Liar(nn.Module):
    """The model with its logits turned around: it says that nearly everything is a success, and pushes the wrong way."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return -self.model(x)


@pytest.mark.parametrize("text", [NETWORK, "mnist-mlp(width=32)", "cifar-resnet(width=8)"])
@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stand_in_is_close_in_answers_and_gradients(text, half, dtype):
    network = networks.build(text).to(dtype).eval()
    shape = (3, 32, 32) if "cifar" in text else (1, 28, 28)
    x = torch.rand(20, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    outputs, grads = [], []
    for f in (network, fast(network, half=half)):
        z = x.clone().requires_grad_()
        outputs.append(f(z))
        grads.append(torch.autograd.grad(outputs[-1][:, 0].sum() - outputs[-1][:, 1].sum(), z)[0].flatten())
    assert outputs[1].dtype == dtype
    assert torch.allclose(*outputs, atol=(2e-2 if half else 1e-4) * float(outputs[0].detach().abs().max()))
    assert torch.cosine_similarity(*grads, dim=0) > (0.98 if half else 0.9999)


def test_the_pooling_before_the_relu_changes_no_number():
    layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    x = torch.randn(5, 2, 9, 9)
    z, w = x.clone().requires_grad_(), x.clone().requires_grad_()
    quick = fast(layers, half=False, channels_last=False)
    assert type(quick.inner[1]) is nn.MaxPool2d
    assert torch.equal(layers(z), quick(w))
    (a,), (b,) = torch.autograd.grad(layers(z).square().sum(), z), torch.autograd.grad(quick(w).square().sum(), w)
    assert torch.equal(a, b)


def test_near_ties_keep_their_order():
    """Logits that are one to bfloat16: 5 and 5.001."""
    layer = nn.Linear(1, 2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([5.0, 5.001]))
    assert fast(nn.Sequential(nn.Flatten(), layer))(torch.zeros(1, 1)).argmax(1).item() == 1


def test_the_model_is_left_as_it_was():
    network = networks.build("cifar-resnet(width=8)").train()
    network[1].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    types = [type(module) for module in network.modules()]
    x = torch.rand(4, 3, 32, 32)
    run(PGD(3), network, x, torch.zeros(4).long(), THREAT, fast=fast(network))
    assert all(
        torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in network.state_dict().items()
    )
    assert [type(module) for module in network.modules()] == types
    assert all(module.training for module in network.modules())
    assert [parameter.requires_grad for parameter in network.parameters()] == [False] + [True] * (
        len(list(network.parameters())) - 1
    )


@pytest.mark.parametrize(
    ("attack", "threat"),
    [(PGD(10), THREAT), (Square(30), THREAT), (FMN(15), Lp(2.0)), (FMN(15), Lp(math.inf)), (PGD(10, loss="dlr"), Lp(2.0, 1.5))],
    ids=repr,
)
def test_every_success_is_the_models_own(model, batch, attack, threat):
    x, y = batch
    result = run(attack, model, x, y, threat, fast=fast(model))
    assert torch.equal(fooled(model, result.x_adv, y), result.success)
    assert int(result.success.sum()) > 0
    assert bool(threat.allows(result.x_adv, x).all())


@pytest.mark.parametrize(("attack", "threat"), [(PGD(10), THREAT), (FMN(15), Lp(2.0))], ids=repr)
def test_honest_counts(model, batch, attack, threat):
    x, y = batch
    exact, quick = _Counting(model), _Counting(fast(model))
    result = run(attack, exact, x, y, threat, fast=quick)
    assert quick.forwards > 0
    assert int((result.forwards + result.checks).sum()) == exact.forwards + quick.forwards
    assert int(result.backwards.sum()) == exact.backwards + quick.backwards
    assert int((result.forwards + result.backwards).max()) <= attack.cost + 1


def test_a_budget_holds(model, batch):
    x, y = batch
    assert int(run(PGD(10), model, x, y, THREAT, budget=4, fast=fast(model)).forwards.max()) <= 4


@pytest.mark.parametrize(("attack", "threat"), [(PGD(5), THREAT), (FMN(8), Lp(2.0))], ids=repr)
def test_a_stand_in_that_lies_is_found_out(model, batch, attack, threat):
    x, y = batch
    result = run(attack, model, x, y, threat, fast=Liar(model))
    assert torch.equal(fooled(model, result.x_adv, y), result.success)
    # After the first lie a row goes on with the model itself, so the attack does its work.
    honest = run(attack, model, x, y, threat)
    assert abs(int(result.success.sum()) - int(honest.success.sum())) <= 8
    assert int(result.checks.max()) <= int(honest.checks.max()) + attack.cost


def test_a_stand_in_that_keeps_quiet_leaves_the_last_word_to_the_model(model, batch):
    """It says the label whatever comes: only the look at the last iterate can find a success."""
    x, y = batch

    def quiet(z):
        known = torch.nn.functional.one_hot(y[: len(z)], 10).to(z.dtype)
        return 1e-3 * model(z) + 10 * known

    result = run(PGD(10, loss="margin"), model, x, y, THREAT, fast=quiet)
    assert torch.equal(fooled(model, result.x_adv, y), result.success)
    assert int(result.success.sum()) > int(fooled(model, x, y).sum())


def test_deterministic_and_independent_of_the_batch(model, batch):
    x, y = batch
    quick = fast(model)
    whole, again = (run(PGD(10), model, x, y, THREAT, rng=Streams.seeded(0, range(100)), fast=quick) for _ in range(2))
    assert torch.equal(whole.x_adv, again.x_adv)
    parts = [
        run(PGD(10), model, x[i : i + 25], y[i : i + 25], THREAT, rng=Streams.seeded(0, range(i, i + 25)), fast=quick)
        for i in range(0, 100, 25)
    ]
    # The order of a sum can tip a value that bfloat16 rounds.
    different = torch.cat([part.success for part in parts]) != whole.success
    assert int(different.sum()) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "apart"), [(PGD(20), 2), (PGD(20, loss="dlr"), 2), (Square(100), 15)], ids=repr)
def test_robust_accuracy_is_the_models(model, attack, apart):
    """Within 0.2 points; Square keeps gains that bfloat16 rounds away, so it gets 1.5."""
    x, y = load("mnist-5k", split="test").batch(0, 1000)
    counts = [int(run(attack, model, x, y, THREAT, fast=f).success.sum()) for f in (None, fast(model))]
    assert abs(counts[0] - counts[1]) <= apart


@pytest.mark.slow
def test_the_closest_examples_are_as_close(model, batch):
    x, y = batch
    a, b = (run(FMN(60), model, x, y, Lp(2.0), fast=f).distance.median() for f in (None, fast(model)))
    assert float(b / a) == pytest.approx(1.0, abs=0.01)


def test_other_kinds_of_network(batch):
    x = torch.rand(6, 5, 16)
    attention = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Flatten(), nn.Linear(80, 4))
    with torch.no_grad():
        y = attention.eval()(x).argmax(1)
        assert torch.allclose(fast(attention)(x), attention(x), atol=0.05)
    for shape in ((5, 7), (5, 2, 7), (5, 2, 3, 3)):
        network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape[1:]), 3))
        result = run(PGD(3), network, torch.rand(shape), torch.zeros(5).long(), THREAT, fast=fast(network))
        assert len(result.success) == 5
    assert run(PGD(3), attention, x, y, THREAT, fast=fast(attention)).success.shape == (6,)


def test_an_evaluation_with_a_stand_in(model):
    given = {"threat": "linf(0.1)", "attacks": ["fgsm", "pgd(steps=10)"], "quantize": True}
    data = load("mnist-5k", split="test", limit=60)
    slow, quick = evaluate(model, data, **given), evaluate(model, data, **given, fast=True)
    assert quick.run["fast"] is True
    assert slow.run["fast"] is False
    assert any("stand-in" in note for note in quick.notes)
    assert abs(slow.robust_accuracy.value - quick.robust_accuracy.value) <= 1 / 60
    tensors, rows = quick.examples(), quick.rows
    wrong = fooled(model, tensors["x_adv"], torch.tensor([row["label"] for row in rows]))
    assert wrong.tolist() == [row["success"] or not row["correct"] for row in rows]


def test_from_the_command_line(model, tmp_path, capsys):
    path = tmp_path / "m.safetensors"
    checkpoint.save(path, model, NETWORK)
    line = ["attack", "--model", str(path), "--data", "mnist-5k", "--threat", "linf(0.1)", "--attack", "fgsm", "--limit", "20"]
    assert main([*line, "--fast"]) == 0
    assert "note: a stand-in in bfloat16" in capsys.readouterr().out
    assert main([*line, "--compile"]) == 2
    assert "compile is for the stand-in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (lambda x: x.flatten(1), "of type function, of which there is no fast stand-in; it should be a torch module"),
        (3, "of type int"),
    ],
)
def test_what_is_no_module_is_refused(model, sentence):
    with pytest.raises(UsageError, match=sentence):
        fast(model)


def test_a_module_that_cannot_be_copied_is_refused():
    network = nn.Linear(3, 2)
    network.cache = network.weight * 2
    with pytest.raises(UsageError, match="the model Linear cannot be copied"):
        fast(network)


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="compiling needs a C\\+\\+ compiler"):
        fast(nn.Linear(3, 2), compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_compiled(model, batch):
    x, y = batch
    result = run(PGD(10), model, x, y, THREAT, fast=fast(model, compile=True))
    assert torch.equal(fooled(model, result.x_adv, y), result.success)
    assert abs(int(result.success.sum()) - int(run(PGD(10), model, x, y, THREAT).success.sum())) <= 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu(model, batch, compile):
    x, y = batch[0].cuda(), batch[1].cuda()
    network = networks.build(NETWORK)
    network.load_state_dict(model.state_dict())
    network = network.cuda().eval()
    for attack, threat in ((PGD(20), THREAT), (FMN(20), Lp(2.0))):
        result = run(attack, network, x, y, threat, fast=fast(network, compile=compile))
        assert torch.equal(fooled(network, result.x_adv, y), result.success)
        assert abs(int(result.success.sum()) - int(run(attack, network, x, y, threat).success.sum())) <= 2
