"""The cross-check: what other libraries return is checked here, and what only they break is explained."""

import dataclasses
import importlib.util
import json
import math
import sys
from dataclasses import fields

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from advkit import Lp, UsageError, spec
from advkit.attacks import ATTACKS
from advkit.benchmarks import crosscheck as module
from advkit.benchmarks.crosscheck import EXPLANATIONS, LIBRARIES, CrossCheck, Library, Peer, Unit, crosscheck
from advkit.benchmarks.peers import peer
from advkit.benchmarks.probe import longer
from advkit.cli.crosscheck import add, show, verdict
from advkit.data import from_tensors
from advkit.errors import AccessError
from advkit.models import Model
from advkit.oracle import Access

THREAT = Lp(math.inf, 0.1, -1.0, 1.0)


def line(z):
    """Class 1 where the mean is over 0."""
    score = 50 * z.flatten(1).mean(1)
    return torch.stack([-score, score], 1)


@pytest.fixture
def data():
    """Six examples: three close enough to the boundary to be broken at 0.1, three that are not."""
    x = torch.tensor([-0.05, 0.05, -0.08, 0.3, -0.4, 0.5]).view(6, 1).expand(6, 4).clone()
    return from_tensors(x, (x[:, 0] > 0).long(), low=-1.0, high=1.0)


def fake(monkeypatch, *calls, closest=False, p=math.inf):
    """A library of these calls, (model, x, y, threat) to x_adv, and no other."""
    peers = tuple(Peer(f"call{k}()", lambda _, *rest, call=call: call(*rest[:4]), closest) for k, call in enumerate(calls))
    monkeypatch.setattr(module, "LIBRARIES", {"fake": Library(object, {p: peers})})


def perfect(model, x, y, threat):
    """The closed form for ``line``, in the unit range."""
    step = torch.where(y == 1, -threat.eps, threat.eps).unsqueeze(1)
    return (x + step).clamp(0, 1)


def nothing(model, x, y, threat):
    return x


def checked(data, model=line, attacks="fgsm", **given):
    return crosscheck(model, data, threat=THREAT, attacks=attacks, **given)


def test_two_that_break_the_same_agree(monkeypatch, data):
    fake(monkeypatch, perfect)
    result = checked(data)
    (tally,) = result.libraries
    assert (result.right, result.ours.broke) == (6, 3)
    assert (tally.broke, tally.invalid, tally.only_they, tally.only_we, tally.failures) == (3, 0, 0, 0, ())
    assert result.rows == ()
    assert verdict(result) == "no other library broke an example that advkit did not"


def test_what_the_model_gets_wrong_is_not_attacked(monkeypatch, data):
    seen = []

    def spy(model, x, y, threat):
        seen.append(len(x))
        return x

    fake(monkeypatch, spy)
    wrong = from_tensors(data.batch(0, 6)[0], torch.tensor([0, 1, 0, 0, 1, 1]), low=-1.0, high=1.0)
    assert checked(wrong).right == 4
    assert seen == [4]


def test_a_library_that_finds_nothing(monkeypatch, data):
    fake(monkeypatch, nothing)
    (tally,) = checked(data).libraries
    assert (tally.broke, tally.invalid, tally.only_we) == (0, 0, 3)


def test_a_later_attack_gets_what_the_earlier_left(monkeypatch, data):
    seen = []

    def first(model, x, y, threat):
        z = perfect(model, x, y, threat)
        z[1:] = x[1:]
        return z

    def second(model, x, y, threat):
        seen.append(len(x))
        return perfect(model, x, y, threat)

    fake(monkeypatch, first, second)
    assert checked(data).libraries[0].broke == 3
    assert seen == [5]


BAD = {
    "beyond the ball": lambda model, x, y, threat: perfect(model, x, y, Lp(math.inf, 1.01 * threat.eps)),
    "beyond the range": lambda model, x, y, threat: x - 2,
    "not a number": lambda model, x, y, threat: x * math.nan,
    "infinite": lambda model, x, y, threat: x + math.inf,
}


@pytest.mark.parametrize("kind", BAD)
def test_points_that_do_not_hold_are_counted_and_break_nothing(monkeypatch, data, kind):
    fake(monkeypatch, BAD[kind])
    (tally,) = checked(data).libraries
    assert (tally.broke, tally.invalid) == (0, 6)


def test_a_search_for_the_closest_may_end_beyond_the_radius_but_not_beyond_the_range(monkeypatch, data):
    far = lambda model, x, y, threat: torch.where(y.unsqueeze(1) == 1, 0.0, 1.0).expand_as(x)
    fake(monkeypatch, far, closest=True)
    (tally,) = checked(data).libraries
    assert (tally.broke, tally.invalid) == (0, 0)
    fake(monkeypatch, BAD["beyond the range"], closest=True)
    assert checked(data).libraries[0].invalid == 6


def test_one_that_raises_is_said_and_the_next_goes_on(monkeypatch, data):
    def broken(model, x, y, threat):
        raise RuntimeError("out of luck.\nmore")

    fake(monkeypatch, broken, lambda model, x, y, threat: x[:1], perfect)
    (tally,) = checked(data).libraries
    assert tally.failures == (
        "call0() raised RuntimeError: out of luck",
        "call1() returned shape (1, 4) for inputs of shape (6, 4)",
    )
    assert tally.broke == 3


def test_one_that_ends_the_program_is_said_too(monkeypatch, data):
    fake(monkeypatch, lambda *_: sys.exit("enough"), perfect)
    (tally,) = checked(data).libraries
    assert tally.failures == ("call0() raised SystemExit: enough",)
    assert tally.broke == 3


def test_what_it_prints_and_draws_stays_with_it(monkeypatch, data, capsys):
    def loud(model, x, y, threat):
        print("loud", torch.rand(1))
        return x

    fake(monkeypatch, loud)
    before = torch.random.get_rng_state()
    checked(data)
    assert capsys.readouterr().out == ""
    assert torch.equal(before, torch.random.get_rng_state())


def test_it_sees_the_unit_range(monkeypatch, data):
    seen = {}

    def spy(model, x, y, threat):
        seen.update(x=x, eps=threat.eps, logits=model(x), classes=model.classes)
        return x

    fake(monkeypatch, spy)
    checked(data)
    x, _ = data.batch(0, 6)
    assert torch.allclose(seen["x"], (x + 1) / 2)
    assert torch.allclose(seen["logits"], line(x), atol=1e-4)
    assert seen["eps"] == pytest.approx(0.05)
    assert seen["classes"] == 2


class Masked(nn.Module):
    """``line``, whose gradients say nothing, so that only what guesses breaks it."""

    def forward(self, z):
        return line(z).detach() + 0 * z.flatten(1).sum(1, keepdim=True)


def test_effort_explains_what_a_weak_attack_missed(monkeypatch, data):
    fake(monkeypatch, perfect)
    result = checked(data, Masked())
    assert result.ours.broke == 0
    assert [row.index for row in result.rows] == [0, 1, 2]
    assert {row.why for row in result.rows} == {"effort"}
    assert all("breaks it too, after" in row.sentence for row in result.rows)
    assert all(row.distance == pytest.approx(0.1, rel=1e-4) and row.attack == "call0()" for row in result.rows)
    assert result.unexplained == ()


class Needle(nn.Module):
    """Fooled at one point only, which nobody can guess."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, z):
        there = (z - self.where).abs().flatten(1).amax(1) < 1e-5
        return torch.stack([3 - 2 * there.float(), 2 + torch.zeros(len(z))], 1) + 0 * z.flatten(1).sum(1, keepdim=True)


@pytest.fixture
def needle():
    x = torch.zeros(2, 4)
    where = torch.tensor([0.031, -0.077, 0.012, 0.054])
    data = from_tensors(x, torch.zeros(2, dtype=torch.int64), low=-1.0, high=1.0)
    return Needle(where), data, lambda model, x, y, threat: ((where + 1) / 2).expand_as(x)


def small(monkeypatch):
    monkeypatch.setattr(module, "LADDER", ((2, 2),))
    monkeypatch.setattr(module, "standard", lambda threat: (spec.parse("pgd(steps=2)", ATTACKS, "attack"),))


def test_what_nothing_explains_stays_unexplained(monkeypatch, needle, tmp_path, capsys):
    small(monkeypatch)
    model, data, call = needle
    fake(monkeypatch, call)
    result = checked(data, model)
    assert [row.why for row in result.rows] == ["unexplained"] * 2
    assert len(result.unexplained) == 2
    assert torch.allclose(result.points["x_adv"], model.where.expand(2, 4), atol=1e-6)
    show(result)
    said = capsys.readouterr().out
    assert "2 rows are unexplained" in said
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/crosscheck.json").read_text())["unexplained"] == 2
    assert pd.read_csv(tmp_path / "out/rows.csv")["index"].tolist() == [0, 1]


def test_a_model_that_changes_its_mind_is_random(monkeypatch, needle):
    small(monkeypatch)
    model, data, call = needle
    calls = []

    def moody(z):
        there = (z - model.where).abs().flatten(1).amax(1) < 1e-5
        calls.extend([1] * bool(there.any()))
        return model(z) * (1 - 2 * (len(calls) % 2 == 0 and bool(there.any())))

    fake(monkeypatch, call)
    (one, _) = checked(data, moody).rows
    assert one.why == "random"
    assert "of 5 answers" in one.sentence


def test_a_model_whose_answer_depends_on_the_batch_is_random(monkeypatch, needle):
    small(monkeypatch)
    model, data, call = needle
    fake(monkeypatch, call)
    result = checked(data, lambda z: model(z) if len(z) > 1 else line(z - 9))
    assert {row.why for row in result.rows} == {"random"}


def test_a_point_that_works_only_outside_by_rounding_is_invalid(monkeypatch):
    small(monkeypatch)
    eps = 0.1
    x = torch.full((1, 4), 0.5)
    over = x + eps + 3e-7
    cliff = lambda z: torch.stack([z[:, 0] * 0 + 0.5, (z[:, 0] > over[0, 0] - 1e-7).float() + 0 * z[:, 0]], 1)
    fake(monkeypatch, lambda model, x, y, threat: over)
    data = from_tensors(x, torch.zeros(1, dtype=torch.int64))
    result = crosscheck(cliff, data, threat=Lp(math.inf, eps), attacks="fgsm")
    assert [row.why for row in result.rows] == ["invalid"]
    assert "outside by rounding" in result.rows[0].sentence


def test_nothing_random_but_the_seed(monkeypatch, data):
    noisy = lambda model, x, y, threat: x + (perfect(model, x, y, threat) - x) * (0.9 + 0.1 * torch.rand(len(x), 1))
    fake(monkeypatch, noisy)
    first, second, third = (checked(data, Masked(), seed=seed) for seed in (0, 0, 1))
    assert first.rows == second.rows
    assert first.rows != third.rows
    assert torch.equal(first.points["x_adv"], second.points["x_adv"])


REFUSED = [
    ({"threat": "linf"}, "inside a radius and none was given"),
    ({"threat": "rotation(10)"}, "should be an l_p ball"),
    ({"threat": Lp(math.inf, 0.1, -math.inf, math.inf)}, "need a finite one"),
    ({"libraries": ["foolbocks"]}, "unknown library 'foolbocks'"),
    ({"libraries": ["none"]}, "no library to compare with: none is not installed"),
    ({"threat": Lp(2, 1.0)}, "fake has no attack for l_2 and is left out"),
    ({"limit": 0}, "the limit is 0"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_what_cannot_be_compared_is_refused(monkeypatch, data, given, sentence):
    fake(monkeypatch, perfect)
    module.LIBRARIES["none"] = Library(lambda: None, {math.inf: ()})
    images = from_tensors(torch.rand(2, 1, 5, 5), torch.tensor([0, 1]))
    with pytest.raises(UsageError, match=sentence):
        crosscheck(line, images if given.get("threat") == "rotation(10)" else data, **{"threat": THREAT, **given})


def test_a_model_without_gradients_is_refused(monkeypatch, data):
    fake(monkeypatch, perfect)
    with pytest.raises(AccessError, match="gives no gradients"):
        checked(data, Model(line, "scores", Access.SCORES, "0"))


def test_a_model_that_is_always_wrong_is_refused(monkeypatch, data):
    fake(monkeypatch, perfect)
    with pytest.raises(UsageError, match="gets none of the 6 examples right"):
        checked(data, lambda z: -line(z))


def test_absent_libraries_are_named(monkeypatch, data):
    fake(monkeypatch, perfect)
    module.LIBRARIES["none"] = Library(lambda: None, {math.inf: ()})
    assert "none is not installed and is left out" in checked(data).notes


def test_a_library_that_cannot_be_imported_is_left_out(monkeypatch, data):
    def load():
        raise ImportError("cannot import name 'gone'.\nmore")

    fake(monkeypatch, perfect)
    module.LIBRARIES["broken"] = Library(load, {math.inf: ()})
    assert "broken cannot be imported (ImportError: cannot import name 'gone') and is left out" in checked(data).notes


def test_what_a_library_imports_is_stood_in_for_only_meanwhile(monkeypatch, tmp_path):
    (tmp_path / "library_of_mine.py").write_text("import visdom\nshown = visdom.show()\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("visdom") is None
    package = peer("library_of_mine")
    monkeypatch.delitem(sys.modules, "library_of_mine")
    assert package.shown is not None
    assert "visdom" not in sys.modules
    assert importlib.util.find_spec("visdom") is None


def test_no_more_points_at_a_time_than_a_batch(monkeypatch, needle):
    small(monkeypatch)
    model, data, call = needle
    fake(monkeypatch, call)
    sizes, real = set(), module.ask
    monkeypatch.setattr(module, "ask", lambda model, z: sizes.add(len(z)) or real(model, z))
    assert len(checked(data, model, batch_size=1).unexplained) == 2
    assert sizes == {1}


def test_a_folder_with_something_else_is_refused(monkeypatch, data, tmp_path):
    fake(monkeypatch, perfect)
    (tmp_path / "mine").write_text("")
    result = checked(data)
    with pytest.raises(UsageError, match="holds other files"):
        result.save(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        result.save(tmp_path / "mine")


def test_saving_again_leaves_no_rows_of_before(monkeypatch, needle, data, tmp_path):
    small(monkeypatch)
    model, hidden, call = needle
    fake(monkeypatch, call)
    checked(hidden, model).save(tmp_path / "out")
    fake(monkeypatch, perfect)
    checked(data).save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["crosscheck.json"]


def command(*words):
    import argparse

    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    arguments = parser.parse_args(["crosscheck", *words])
    return arguments.run(arguments)


@pytest.fixture
def files(tmp_path, monkeypatch, needle):
    (tmp_path / "here.py").write_text(
        "import torch\n"
        "def model():\n    return lambda z: torch.stack([z.flatten(1).mean(1) * 0 + 1, 4 * z[:, 0]], 1)\n"
        "def data():\n    return torch.full((3, 4), 0.2), torch.zeros(3, dtype=torch.int64)\n"
    )
    monkeypatch.chdir(tmp_path)
    return ("--model", "here.py:model", "--data", "here.py:data", "--threat", "linf(0.1)", "--attack", "fgsm")


def test_the_command_prints_json_and_ends_with_0(monkeypatch, files, capsys):
    fake(monkeypatch, perfect)
    assert command(*files, "--json", "--out", "out") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "advkit/crosscheck/1"
    assert [tally["library"] for tally in said["libraries"]] == ["fake"]


def test_a_command_that_is_stopped_does_not_say_that_it_goes_on(monkeypatch, files):
    def stopped(*_):
        raise KeyboardInterrupt

    fake(monkeypatch, stopped)
    with pytest.raises(UsageError, match="stopped; nothing is kept of a cross-check that is not finished"):
        command(*files, "--out", "out")


def test_the_command_says_what_it_cannot_keep_and_refuses_a_bad_folder_first(monkeypatch, files, capsys):
    fake(monkeypatch, perfect)
    with pytest.raises(NotADirectoryError):
        command(*files, "--out", "here.py/out")
    assert capsys.readouterr().out == ""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write", full)
    with pytest.raises(OSError, match="No space left"):
        command(*files, "--json", "--out", "out")
    assert json.loads(capsys.readouterr().out)["right"] == 3


def test_the_command_ends_with_1_where_something_is_unexplained(monkeypatch, files, capsys):
    fake(monkeypatch, perfect)
    small(monkeypatch)
    monkeypatch.setattr(CrossCheck, "unexplained", (1,))
    assert command(*files) == 1
    said = capsys.readouterr().out
    assert "broke" in said
    assert "call0()" in said


PLAIN = sorted(name for name, make in ATTACKS.items() if not any(one.default is dataclasses.MISSING for one in fields(make)))


@given(st.sampled_from(PLAIN), st.integers(2, 5))
def test_longer_has_more_steps_and_nothing_else(name, times):
    attack = spec.parse(name, ATTACKS, "attack")
    harder = longer(attack, times) or attack
    assert type(harder) is type(attack)
    for one in ("steps", "queries"):
        assert getattr(harder, one, 0) == times * getattr(attack, one, 0)


def test_longer_reaches_inside():
    text = "worst([if-masked(square(queries=30), climb=apgd(steps=10), search=square(queries=7)), restarts(pgd(steps=4), n=3)])"
    harder = spec.show(longer(spec.parse(text, ATTACKS, "attack"), 2), ATTACKS)
    assert all(part in harder for part in ("queries=60", "steps=20", "queries=14", "steps=8", "n=3"))


def test_every_explanation_can_be_given():
    assert set(EXPLANATIONS) == {"invalid", "random", "effort", "unexplained"}


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_unit_range_and_back(low):
    model = Unit(lambda z: z, low, 1.0, 2)
    x = torch.linspace(low, 1, 9).view(1, 9)
    assert torch.allclose(model.back(model.to_unit(x)), x, atol=1e-6)
    assert not model.training


P = {"linf": math.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}
RADII = {"linf": 0.2, "l2": 2.0, "l1": 12.0, "l0": 20}


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", P)
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_real_library_runs_at_every_norm_that_it_serves(name, family):
    if LIBRARIES[name].load() is None:
        pytest.skip(f"{name} is not installed")
    if P[family] not in LIBRARIES[name].attacks:
        pytest.skip(f"{name} serves no {family}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 10))
        x = torch.rand(12, 1, 6, 6)
    y = net(x).argmax(1)
    result = crosscheck(net, (x, y), threat=Lp(P[family], RADII[family]), attacks="fast", libraries=[name])
    (tally,) = result.libraries
    assert tally.failures == ()
    assert tally.invalid == 0
    assert tally.broke > 0
    assert result.unexplained == ()
