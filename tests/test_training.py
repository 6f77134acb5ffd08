"""Training against an adversary: what is watched, what is kept, what is refused."""

import dataclasses
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from advkit import Lp, UsageError
from advkit.cli import main
from advkit.data import from_tensors, load
from advkit.defenses import (
    TRADES,
    FastTraining,
    Guard,
    PGDTraining,
    fresh,
    held_out,
    label,
    named,
    tensorboard,
    threats_of,
    train,
)
from advkit.defenses.training import check_radius, overfitting
from advkit.models import checkpoint, networks
from advkit.threat import Rotation
from advkit.train import Check, CrossEntropy, Diverged, Recipe

INF = math.inf
BALL = Lp(INF, 0.1)


@pytest.fixture(scope="module")
def digits():
    return load("mnist-5k", split="train", limit=1500)


def _linear(w, b=0.0):
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(w), 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * len(w), w]))
        model[1].bias.copy_(torch.tensor([0.0, b]))
    return model


def test_the_guard_measures_what_a_linear_model_withstands():
    # z = x_1 - x_2 moves by at most 2 eps = 0.2, so rows with |z| > 0.2 withstand it, and one step finds the worst.
    x = torch.tensor([[0.9, 0.1], [0.5, 0.4], [0.2, 0.6], [0.3, 0.4], [0.6, 0.5]])
    y = torch.tensor([1, 1, 0, 0, 0])
    data = from_tensors(x, y, low=0.0, high=1.0)
    check = Guard((BALL,), data)(_linear([1.0, -1.0]), 3, True)
    assert (check.epoch, check.of, check.full) == (3, 5, True)
    assert (check.clean, check.robust, check.one_step) == pytest.approx((0.8, 0.4, 0.4))
    # Several threat models: each must be withstood. In l_2 a radius of 0.6 moves z by 0.85.
    both = Guard((BALL, Lp(2.0, 0.6)), data)(_linear([1.0, -1.0]), 0, True)
    assert both.robust == pytest.approx(0.0)


def test_rotations_have_no_single_step():
    data = from_tensors(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1]), low=0.0, high=1.0)
    check = Guard((Rotation(10.0),), data)(_linear([0.1] * 64), 0, True)
    assert check.one_step is None
    assert 0 <= check.robust <= check.clean


def _history(*pairs):
    return [Check(i, 1.0, robust, one_step, 500, True) for i, (robust, one_step) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("history", "epoch"),
    [
        (_history((0.4, 0.6), (0.6, 0.8), (0.61, 0.8)), None),
        (_history((0.4, 0.6), (0.01, 0.95), (0.0, 0.99)), 2),  # withstands one step, not ten
        (_history((0.4, 0.6), (0.7, 0.8), (0.1, 0.1)), 3),  # forgets
        (_history((0.0, 0.1), (0.1, 0.3), (0.3, 0.5)), None),  # not robust yet
        (_history((0.0, 0.9)), 1),
        (_history((0.28, 0.63), (0.7, 0.8), (0.75, 0.8)), None),  # only begins to learn
        (_history((0.28, 0.63), (0.1, 0.8), (0.05, 0.9)), 1),
    ],
)
def test_catastrophic_overfitting_is_named_with_its_epoch(history, epoch):
    sentence = overfitting(history)
    assert (sentence is None) == (epoch is None)
    if epoch is not None:
        assert sentence.startswith(f"catastrophic overfitting began in epoch {epoch}: ")


def test_a_smaller_radius_on_the_way_is_not_overfitting():
    early = [dataclasses.replace(check, full=False) for check in _history((0.1, 0.9), (0.2, 0.9))]
    assert overfitting(early) is None


def test_the_best_weights_survive_overfitting(digits, capsys, tmp_path, monkeypatch):
    """A loss that turns to plain training halfway forgets what it learned, and the weights from before are kept."""

    class Forgetful:
        threat = BALL

        def __call__(self, model, x, y, rng, at=1.0):
            return PGDTraining(BALL, steps=3)(model, x, y, rng) if at < 0.6 else 3 * CrossEntropy()(model, 1 - x, 9 - y, rng)

    recipe = Recipe(epochs=5, batch_size=32, lr=0.05, schedule="constant")
    trained = train(networks.build("mnist-mlp(width=64)"), digits, Forgetful(), recipe)
    assert trained.warning.startswith("catastrophic overfitting began in epoch")
    assert trained.epoch <= 2
    assert len(trained.history) == 5
    again = Guard((BALL,), held_out(digits, None, 0)[1])(trained.model, trained.epoch, True)
    assert again == trained.history[trained.epoch]
    assert again.robust > 3 * trained.history[-1].robust


def test_ten_lines_with_ones_own_network_data_and_optimizer():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=rng)
    y = (x[:, 0] > x[:, 1]).long()
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = torch.get_rng_state()
    trained = train(model, (x, y), TRADES(Lp(INF, 0.02), steps=3), Recipe(epochs=20, batch_size=40), optimizer=optimizer)
    assert torch.equal(before, torch.get_rng_state())
    assert trained.model is model
    assert trained.history[trained.epoch].robust > 0.8
    assert trained.history[trained.epoch].of == 40


def test_what_is_held_out_is_not_learned(digits):
    rest, held = held_out(digits, 100, 3)
    assert len(held) == 100
    assert sorted([*rest.index.tolist(), *held.index.tolist()]) == digits.index.tolist()
    assert held.index.tolist() == held_out(digits, 100, 3)[1].index.tolist()
    given = load("mnist-5k", split="test", limit=20)
    assert held_out(digits, given, 0) == (digits, given)
    seen = []

    def loss(model, x, y, rng, at):
        seen.append(len(x))
        return CrossEntropy()(model, x, y, rng)

    trained = train(networks.build("mnist-mlp(width=8)"), digits, loss, Recipe(epochs=1), threat=BALL, validation=200)
    assert sum(seen) == 1300
    assert trained.history[0].of == 200
    for n in (0, 1500):
        with pytest.raises(UsageError, match=f"{n} of 1500 examples would be held out"):
            train(networks.build("mnist-mlp(width=8)"), digits, loss, Recipe(epochs=1), threat=BALL, validation=n)


POINTS = (torch.rand(60, 2, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2)


def _dense():
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))


def test_several_threats_may_be_a_list_and_validation_a_pair():
    given = (torch.rand(7, 2), torch.arange(7) % 2)
    trained = train(_dense(), POINTS, PGDTraining(BALL, 1), Recipe(epochs=1), threat=[BALL, Lp(2.0, 0.1)], validation=given)
    assert trained.history[0].of == 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"threat": "linf(0.1)"}, "the threat model is 'linf.0.1.'; it should be one"),
        ({"threat": ()}, "the threat model is ..; it should be one"),
        ({"validation": (torch.rand(7, 3), torch.zeros(7))}, "takes 2 features and got 3"),
        ({"validation": (torch.rand(7, 2), torch.full((7,), 5))}, "the labels are between 5 and 5"),
        ({"validation": from_tensors(*POINTS).select(torch.arange(0))}, "holds no examples"),
        ({"validation": 0.1}, "the data are of type float"),
        ({"data": torch.utils.data.TensorDataset(*POINTS)}, "the data are of type TensorDataset"),
        ({"data": (POINTS[0], POINTS[1] + 1)}, "the labels are between 1 and 2"),
        ({"loss": CrossEntropy(), "data": from_tensors(*POINTS), "validation": 5}, "given without a threat model"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_first_step(options, sentence):
    seen = []
    given = {"data": POINTS, "loss": PGDTraining(BALL, 1), "recipe": Recipe(epochs=1), **options}
    with pytest.raises(UsageError, match=sentence):
        train(_dense(), report=seen.append, **given)
    assert not seen


@pytest.mark.parametrize("loss", [PGDTraining(BALL, 1), TRADES(BALL, steps=1)], ids=["pgd", "trades"])
def test_weights_that_are_so_large_that_answers_are_nan_have_diverged(loss):
    # The weights themselves stay finite, and it is the attack that meets the answers first.
    with pytest.raises(Diverged, match=r"became NaN in epoch 1 and no epoch was done; try a learning rate below 1e\+19"):
        train(_dense(), POINTS, loss, Recipe(epochs=2, batch_size=20, lr=1e19, schedule="constant"))


def test_without_an_adversary_nothing_is_watched(digits):
    trained = train(networks.build("mnist-mlp(width=8)"), digits, CrossEntropy(), Recipe(epochs=1))
    assert (trained.history, trained.epoch, trained.warning) == ((), None, None)


@pytest.mark.parametrize(
    ("threat", "widest"), [(Lp(INF, 1.0), "1"), (Lp(2.0, 28.5), "28"), (Lp(1.0, 800.0), "784"), (Lp(0.0, 784.0), "784")]
)
def test_a_ball_that_holds_everything_is_refused(digits, threat, widest):
    with pytest.raises(UsageError, match=f"no two inputs are further apart than {widest}; give a smaller radius"):
        train(networks.build("mnist-mlp(width=8)"), digits, CrossEntropy(), Recipe(epochs=1), threat=threat)
    check_radius(dataclasses.replace(threat, eps=threat.eps / 2), digits)
    check_radius(Rotation(10.0), digits)


def test_losses_by_name():
    assert named("trades(beta=3)", BALL) == TRADES(BALL, beta=3.0)
    assert named("plain") == CrossEntropy()
    assert threats_of(named("awp(pgd(steps=2))", BALL)) == (BALL,)
    assert threats_of(CrossEntropy()) == ()
    assert threats_of(named("multi", (BALL, Lp(2.0, 1.0)))) == (BALL, Lp(2.0, 1.0))
    with pytest.raises(UsageError, match=r"the defense trades needs a threat model to withstand, as in linf\(0\.3\)"):
        named("trades")
    with pytest.raises(UsageError, match="threat models were given: 2; the defense pgd takes one; multi takes several"):
        named("pgd", (BALL, BALL))
    with pytest.raises(UsageError, match=r"unknown defense .trade.; .* did you mean .trades."):
        named("trade", BALL)


def test_certified_training_begins_with_weights_of_its_own():
    loss = named("ibp", BALL)
    ours, again, plain = fresh("mnist-small", loss, 3), fresh("mnist-small", loss, 3), networks.build("mnist-small", 3)
    first = [next(model.parameters()) for model in (ours, again, plain)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    same = zip(fresh("mnist-small", CrossEntropy(), 3).parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_ramp_is_over_when_the_loss_says_so(digits):
    recipe = Recipe(epochs=4, batch_size=500, lr=0.01)
    for text, first in (("awp(pgd(steps=1, ramp=0.5))", 1), ("ibp(warm=0.25, ramp=0.5)", 2)):
        trained = train(networks.build("mnist-mlp(width=8)"), digits, named(text, BALL), recipe, validation=20)
        assert [check.full for check in trained.history] == [epoch >= first for epoch in range(4)]


def test_pseudo_labels_are_the_networks(digits):
    model = networks.build("mnist-mlp(width=8)")
    labelled = label(model, digits.select(torch.arange(30)), batch_size=7)
    x, y = labelled.batch(0, 30)
    assert torch.equal(y, model.eval()(x).argmax(1))


def test_tensorboard_files_hold_the_curves(digits, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trained = train(
        networks.build("mnist-mlp(width=8)"), digits, PGDTraining(BALL, steps=1), Recipe(epochs=2), report=tensorboard(tmp_path)
    )
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    robust = events.Scalars("accuracy/robust")
    assert [(event.step, event.value) for event in robust] == [
        (check.epoch + 1, pytest.approx(check.robust)) for check in trained.history
    ]
    assert len(events.Scalars("loss")) >= 2 * len(trained.history)


# The command


def run(*arguments, capsys):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


FEW = ("--data", "mnist-5k", "--limit", 600, "--epochs", 2)


def test_the_command_keeps_its_history(tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    given = ("train", "--model", "mnist-mlp(width=16)", *FEW, "--defense", "awp(trades(steps=2))", "--threat", "linf(0.05)")
    code, said, _ = run(*given, "--validation", 50, "--log", tmp_path / "log", "--out", out, capsys=capsys)
    assert code == 0
    assert said.startswith("epoch 1: of 50 held out ")
    assert "the weights of epoch 2 of 2 were kept" in said or "the weights of epoch 1 of 2 were kept" in said
    assert any((tmp_path / "log").iterdir())
    _, metadata = checkpoint.load(out)
    assert metadata["loss"] == "awp(trades(steps=2)) linf(0.05)"
    assert [check["of"] for check in json.loads(metadata["history"])] == [50, 50]
    assert float(metadata["seconds"]) > 0


def test_training_goes_on_from_a_checkpoint_of_the_same_network(tmp_path, capsys):
    small, wide = tmp_path / "s.safetensors", tmp_path / "w.safetensors"
    checkpoint.save(small, networks.build("mnist-mlp(width=16)", 5), "mnist-mlp(width=16)")
    given = ("train", *FEW, "--start", small, "--lr", 1e-9, "--out", wide)
    assert run(*given, "--model", "mnist-mlp(width=16)", capsys=capsys)[0] == 0
    began, ended = (torch.cat([p.flatten() for p in checkpoint.load(f)[0].parameters()]) for f in (small, wide))
    assert torch.allclose(began, ended, atol=1e-5)
    code, _, err = run(*given, "--model", "mnist-mlp(width=8)", capsys=capsys)
    assert code == 2
    assert f"{small} is a checkpoint of mnist-mlp(width=16), and --model is mnist-mlp(width=8)" in err


def test_extra_data_with_pseudo_labels(tmp_path, capsys):
    teacher, out = tmp_path / "t.safetensors", tmp_path / "m.safetensors"
    checkpoint.save(teacher, networks.build("mnist-mlp(width=16)", 5), "mnist-mlp(width=16)")
    given = ("train", "--model", "mnist-mlp(width=8)", *FEW, "--extra", "mnist-5k", "--out", out)
    assert run(*given, "--pseudo-labels", teacher, "--extra-share", 0.5, capsys=capsys)[0] == 0
    code, _, err = run("train", "--model", "mnist-mlp", *FEW, "--pseudo-labels", teacher, "--out", out, capsys=capsys)
    assert (code, "--pseudo-labels was given without --extra" in err) == (2, True)


def test_a_run_that_diverges_leaves_a_checkpoint(tmp_path, capsys, monkeypatch):
    out = tmp_path / "m.safetensors"
    calls = [0]

    def diverging(self, model, x, y, rng, at=1.0):
        calls[0] += 1
        return CrossEntropy()(model, x, y, rng) * (float("nan") if at >= 0.5 else 1.0)

    monkeypatch.setattr(FastTraining, "__call__", diverging)
    given = ("train", "--model", "mnist-mlp(width=8)", *FEW, "--defense", "fast", "--threat", "linf(0.1)", "--out", out)
    code, _, err = run(*given, capsys=capsys)
    assert code == 2
    assert (
        f"the loss became NaN in epoch 2 and the weights after epoch 1 were kept; try a learning rate below 0.1; {out} " in err
    )
    assert checkpoint.load(out)[1]["ended"] == "diverged"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--threat", "linf(0.1)"), "--threat was given without --defense"),
        (("--defense", "pgd"), "the defense pgd needs a threat model to withstand"),
        (("--defense", "pgd", "--threat", "linf(2)"), "so that no two inputs are further apart than 1; give a smaller radius"),
        (("--defense", "pgd", "--threat", "linf(0.1)", "--threat", "l2(1)"), "threat models were given: 2; the defense pgd"),
        (("--defense", "multi", "--threat", "linf(0.1)"), "threat models were given: 1; the defense multi takes several"),
        (("--validation", "50"), "examples to check on were given without a threat model"),
        (("--device", "gpu"), "cannot use the device 'gpu'"),
        (("--extra", "EXTRA"), "takes 784 features and got 64"),
        (("--validation", "0", "--defense", "pgd", "--threat", "linf(0.1)"), "0 of 600 examples would be held out"),
        (("--optimizer", "lion"), "unknown optimizer 'lion'"),
        (("--start", "nothing.safetensors"), "there is no file nothing.safetensors"),
        (("--extra", "mnist-5k", "--extra-share", "1.5"), "the share of extra data is 1.5"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, tmp_path, capsys):
    np.savez(tmp_path / "extra.npz", x=np.zeros((9, 1, 8, 8), np.uint8), y=np.arange(9))
    options = [str(tmp_path / "extra.npz") if option == "EXTRA" else option for option in options]
    given = ("train", "--model", "mnist-mlp(width=8)", *FEW, *options, "--out", tmp_path / "m.safetensors")
    code, out, err = run(*given, capsys=capsys)
    assert (code, out) == (2, "")
    assert sentence in err.replace("\n", " ")
    assert not (tmp_path / "m.safetensors").exists()


# Many processes, kills, and the collapse of fast training


def _command(tmp_path, name, *options, processes=1):
    python = [sys.executable, "-m"]
    if processes > 1:
        python += ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "29517", "-m"]
    given = [
        "advkit",
        "train",
        "--model",
        "mnist-mlp(width=16)",
        *map(str, FEW),
        "--out",
        str(tmp_path / f"{name}.safetensors"),
    ]
    return [*python, *given, *options]


def _weights(path):
    return torch.cat([p.flatten() for p in checkpoint.load(path)[0].parameters()])


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        subprocess.run(_command(tmp_path, name, processes=processes), check=True)
    assert torch.allclose(_weights(tmp_path / "one.safetensors"), _weights(tmp_path / "two.safetensors"), atol=1e-4)
    # A defense draws in each process for itself, and all end with the same weights.
    options = ("--defense", "pgd(steps=2)", "--threat", "linf(0.1)")
    done = subprocess.run(_command(tmp_path, "pgd", *options, processes=2), check=True, capture_output=True, text=True)
    assert done.stdout.count("epoch 2: of 60 held out") == 1
    assert checkpoint.load(tmp_path / "pgd.safetensors")[1]["loss"] == "pgd(steps=2) linf(0.1)"


FROM_PYTHON = """
import math, sys, torch
from pathlib import Path
from torch import nn
from advkit import Lp, processes
from advkit.defenses import PGDTraining, train
from advkit.train import Recipe

x = torch.rand(203, 2, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > x[:, 1]).long()
torch.manual_seed(processes.group()[0])
parts = [nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)]
recipe = Recipe(epochs=3, batch_size=20, lr=0.05, average=0.9)
trained = train(nn.Sequential(*parts), (x, y), PGDTraining(Lp(math.inf, 0.02), 2), recipe)
total = sum(float(value.double().sum()) for value in trained.model.state_dict().values())
Path(sys.argv[1], f"said-{processes.group()[0]}").write_text(f"{total} {trained.history}")
"""


@pytest.mark.slow
def test_from_python_all_processes_end_with_the_same_network(tmp_path):
    # Each begins with weights of its own, and with 183 examples the last batch leaves one for a process.
    (tmp_path / "own.py").write_text(FROM_PYTHON)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29519", str(tmp_path / "own.py")]
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True)
    said = [path.read_text() for path in sorted(tmp_path.glob("said-*"))]
    assert len(said) == 2
    assert said[0] == said[1]
    assert "Check(epoch=2" in said[0]


@pytest.mark.slow
def test_killed_and_resumed_training_ends_in_the_same_weights(tmp_path):
    options = ("--defense", "awp(trades(steps=2, ramp=0.3))", "--threat", "linf(0.1)", "--epochs", "6", "--average", "0.99")
    subprocess.run(_command(tmp_path, "whole", *options), check=True)
    partial = tmp_path / "parts.safetensors.partial"
    kills, seen = 0, 0.0
    while not (tmp_path / "parts.safetensors").exists():
        process = subprocess.Popen(_command(tmp_path, "parts", *options))
        while process.poll() is None:
            changed = partial.stat().st_mtime if partial.exists() else 0.0
            if changed > seen and kills < 4:
                seen, kills = changed, kills + 1
                process.kill()
            time.sleep(0.01)
    assert kills >= 3
    assert torch.equal(_weights(tmp_path / "whole.safetensors"), _weights(tmp_path / "parts.safetensors"))


@pytest.mark.slow
def test_fast_training_without_a_random_start_collapses_and_the_guard_says_so():
    digits = load("mnist-5k", split="train")
    recipe = Recipe(epochs=8, batch_size=50, lr=2e-3, weight_decay=0.0, optimizer="adam")
    trained = train(networks.build("mnist-small"), digits, FastTraining(Lp(INF, 0.3), start=False, alpha=1.0), recipe)
    assert trained.warning.startswith("catastrophic overfitting began in epoch")
    last = trained.history[-1]
    assert last.one_step > 0.5
    assert last.robust < 0.05
    assert trained.history[trained.epoch].robust >= max(check.robust for check in trained.history) - 0.01
