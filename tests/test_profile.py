"""Profiles: what a model costs, measured, and what attacks on it will cost, foretold."""

import argparse
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from advkit import UsageError, evaluate
from advkit.benchmarks import profile as module
from advkit.benchmarks.profile import FULL, HALF, Forecast, Profile, Speed, in_words, profile
from advkit.benchmarks.statistics import rate
from advkit.cli.profile import add, sentences, show
from advkit.models import Model
from advkit.oracle import Access

SIZES = module._Timing.sizes


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    """Each figure from two rounds, however slow, and small batches."""
    monkeypatch.setattr(module, "ROUNDS", 2)
    monkeypatch.setattr(module, "SLOWEST", math.inf)
    monkeypatch.setattr(module._Timing, "sizes", lambda self: iter((1, 8, 32)))


@pytest.fixture
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 5))
    x = torch.rand(60, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return net, (x, net(x).argmax(1))


def test_every_speed_is_there(problem):
    net, data = problem
    result = profile(net, data)
    for name in (FULL, HALF):
        rows = [speed for speed in result.speeds if speed.precision == name]
        assert [speed.batch_size for speed in rows] == [1, 8, 32]
        assert all(speed.forwards > 0 and speed.gradients > 0 and speed.memory == 0 for speed in rows)
    assert result.best in {speed.batch_size for speed in result.speeds}
    assert result.agreement.of == 60
    assert result.agreement.count >= 55
    assert result.forecast is None
    assert list(result.to_pandas().columns) == ["precision", "batch_size", "forwards", "gradients", "memory"]


def test_batches_grow_up_to_eight_times_the_default(problem, monkeypatch):
    net, data = problem
    monkeypatch.setattr(module._Timing, "sizes", SIZES)
    sizes = [speed.batch_size for speed in profile(net, data).speeds if speed.precision == FULL]
    assert sizes == [1, 8, 32, 128, 256, 512, 2048]


def test_no_greater_batch_than_one_that_is_too_slow(problem, monkeypatch):
    net, data = problem
    monkeypatch.setattr(module, "SLOWEST", 0.05)
    monkeypatch.setattr(module._Timing, "_speed", lambda self, name, _, size: Speed(name, size, 100.0, 100.0, 0))
    monkeypatch.setattr(module._Timing, "sizes", SIZES)
    assert [speed.batch_size for speed in profile(net, data).speeds] == [1, 8] * 2


def test_no_greater_batch_where_there_is_no_memory(problem, monkeypatch):
    net, data = problem
    monkeypatch.setattr(module._Timing, "sizes", SIZES)

    class Small(nn.Module):
        def forward(self, x):
            if len(x) > 100:
                raise torch.OutOfMemoryError("none left")
            return net(x)

    result = profile(Small(), data)
    assert [speed.batch_size for speed in result.speeds if speed.precision == FULL] == [1, 8, 32]
    assert f"{FULL}: no memory for 128 examples at a time" in result.notes


def test_another_error_is_not_taken_for_too_little_memory(problem, monkeypatch):
    net, data = problem

    def wrong(x):
        if len(x) > 20:
            raise RuntimeError("a bug")
        return net(x)

    with pytest.raises(UsageError, match="a bug"):
        profile(wrong, data)


def test_the_best_batch_is_the_smallest_that_is_nearly_as_fast(problem, monkeypatch):
    net, data = problem
    speeds = {1: 10.0, 8: 50.0, 32: 96.0, 128: 100.0, 256: 99.0, 512: 60.0, 2048: 60.0}
    monkeypatch.setattr(module._Timing, "sizes", SIZES)
    monkeypatch.setattr(module._Timing, "_speed", lambda self, name, _, size: Speed(name, size, 1.0, speeds[size], 0))
    result = profile(net, data)
    assert result.best == 32
    assert result.default == 256


@pytest.mark.parametrize(("b", "expected"), [(1, 1 / 10), (8, 1 / 40), (0.5, 1 / 10), (500, 1 / 40), (8**0.5, 1 / 20)])
def test_the_time_of_a_pass_between_what_was_measured(b, expected, problem):
    _, data = problem
    timing = module._Timing(None, module.examples_of(data, "test", None, 0), argparse.Namespace(device="cpu", dtype=None), None)
    timing.speeds = [Speed(FULL, 1, 1.0, 10.0, 0), Speed(FULL, 8, 1.0, 40.0, 0), Speed(HALF, 16, 1.0, 999.0, 0)]
    assert timing.seconds(b) == pytest.approx(expected)


def test_the_bound_is_the_cost_of_every_attack_on_every_example(problem):
    net, data = problem
    forecast = profile(net, data, threat="linf(0.05)", attacks=["pgd(steps=10)", "fgsm"]).forecast
    assert forecast.examples == 60
    assert forecast.passes == 60 * sum(
        module.plan(*planned(net, data), threat="linf(0.05)", attacks=[a]).attacks[0][1].cost for a in ("pgd(steps=10)", "fgsm")
    )
    assert 0 < forecast.low <= forecast.seconds <= forecast.high <= 1.2 * forecast.bound
    assert forecast.pilot == 32
    assert profile(net, data, threat="linf(0.05)", attacks="fgsm", limit=40).forecast.examples == 40


def planned(net, data):
    return module.models_by_name.wrap(net), module.examples_of(data, "test", None, 0)


def carried(net, data, monkeypatch, seconds, **given):
    """The forecast where each pass takes, at batch b, ``seconds(b)``, and the pilot took exactly that."""
    real = module._works

    def works(result):
        found = real(result)
        return {name: module._Work(w.passes, sum(w.passes) * seconds(w.in_flight) / 2) for name, w in found.items()}

    monkeypatch.setattr(module, "_works", works)
    monkeypatch.setattr(module, "PILOT_SECONDS", math.inf)
    plan = module.plan(*planned(net, data), **given)
    return module._forecast(plan, 0, seconds)


def test_at_a_constant_speed_the_forecast_counts_passes(problem, monkeypatch):
    net, data = problem
    given = {"threat": "linf(0.02)", "attacks": "pgd(steps=20)"}
    forecast = carried(net, data, monkeypatch, lambda b: 2.0, **given)
    summary = evaluate(net, data, **given).summary()
    true = summary["forwards"] + summary["backwards"]
    assert forecast.low <= true <= forecast.high
    assert forecast.bound == forecast.passes


def test_a_pilot_of_all_examples_is_exact(problem, monkeypatch):
    net, (x, y) = problem
    given = {"threat": "linf(0.02)", "attacks": ["pgd(steps=20)", "fgsm"]}
    data = x[:20], y[:20]
    forecast = carried(net, data, monkeypatch, lambda b: 2.0, **given)
    result = evaluate(net, data, **given)
    summary = result.summary()
    assert forecast.pilot == 20
    assert forecast.to_the_end == result.robust_accuracy.count
    assert forecast.seconds == pytest.approx(summary["forwards"] + summary["backwards"])


def test_a_faster_great_batch_shortens_the_forecast(problem, monkeypatch):
    net, data = problem
    given = {"threat": "linf(0.000001)", "attacks": "pgd(steps=20)"}
    slow = carried(net, data, monkeypatch, lambda b: 2.0, **given)
    quick = carried(net, data, monkeypatch, lambda b: 2.0 * 32 / b, **given)
    assert quick.seconds == pytest.approx(slow.seconds * 32 / 60)


def test_where_every_example_of_the_pilot_broke_the_upper_end_allows_for_one_that_does_not(problem, monkeypatch):
    net, data = problem
    forecast = carried(net, data, monkeypatch, lambda b: 2.0, threat="linf(1)", attacks=["fgsm", "pgd(steps=100)"])
    assert forecast.to_the_end == 0
    assert forecast.high > 5 * forecast.seconds
    assert forecast.high == pytest.approx(
        1.15 * (rate(0, 32).high * forecast.bound + (1 - rate(0, 32).high) * forecast.seconds)
    )


def test_a_search_without_a_radius_takes_the_same_for_all(problem, monkeypatch):
    net, data = problem
    forecast = carried(net, data, monkeypatch, lambda b: 2.0, threat="l2", attacks="fmn(steps=20)")
    assert forecast.to_the_end == forecast.pilot
    assert forecast.seconds == pytest.approx(60 * 40, rel=0.1)


def test_what_is_wrong_from_the_start_takes_nothing(problem, monkeypatch):
    net, (x, y) = problem
    wrong = (y + 1) % 5
    forecast = carried(net, (x, wrong), monkeypatch, lambda b: 2.0, threat="linf(0.1)", attacks="fgsm")
    assert forecast.seconds == 0
    assert forecast.to_the_end == 0


def test_a_model_without_gradients(problem):
    net, data = problem
    scores = Model(lambda x: net(x).detach(), "scores", Access.SCORES, "0")
    result = profile(scores, data, threat="linf(0.1)", attacks="square(queries=20)")
    assert all(speed.gradients is None for speed in result.speeds)
    assert result.agreement is None
    assert "there is no stand-in in bfloat16" in result.notes[-1]
    assert result.forecast.seconds > 0
    show(result)


def test_the_model_is_left_as_it_was(problem):
    net, data = problem
    net.train()
    profile(net, data)
    assert net.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


REFUSED = [
    ({"attacks": "fgsm"}, "attacks are given and no threat model"),
    ({"threat": "linf", "attacks": "pgd"}, "fixed radius"),
    ({"limit": 0}, "the limit is 0"),
    ({"device": "abacus"}, "cannot use the device"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_what_cannot_be_timed_is_refused(problem, given, sentence):
    net, data = problem
    with pytest.raises(UsageError, match=sentence):
        profile(net, data, **given)


def test_compiling_what_is_no_module_is_refused(problem):
    net, data = problem
    with pytest.raises(UsageError, match="torch module"):
        profile(lambda x: net(x), data, compile=True)


WORDS = [
    (0.1, 0.9, "less than a second"),
    (0.1, 1.0, "between 0 and 1 second"),
    (2, 2.3, "about 2 seconds"),
    (30, 90, "between 30 seconds and 1.5 minutes"),
    (170, 430, "between 3 and 7 minutes"),
    (60, 60, "about 1 minute"),
    (3600, 3 * 3600, "between 1 and 3 hours"),
    (86400, 10 * 86400, "between 1 and 10 days"),
]


@pytest.mark.parametrize(("low", "high", "words"), WORDS)
def test_times_in_words(low, high, words):
    assert in_words(low, high) == words


@given(st.floats(0, 1e7), st.floats(1, 10))
def test_words_say_no_more_than_the_numbers(low, factor):
    """Each number that is said, in its unit, is within a tenth of a unit step of what was given."""
    high = low * factor
    words = in_words(low, high)
    if words == "less than a second":
        assert high < 1
        return
    size = dict(module.UNITS)
    unit = re.findall("second|minute|hour|day", words)
    numbers = [float(number) for number in re.findall(r"[\d.]+", words)]
    units = unit if len(unit) == len(numbers) else unit * len(numbers)
    for said, name, true in zip((numbers[0], numbers[-1]), (units[0], units[-1]), (low, high), strict=True):
        assert abs(said * size[name] - true) <= 0.5 * size[name] + 1e-6 * true


def command(*words):
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    arguments = parser.parse_args(["profile", *words])
    return arguments.run(arguments)


def test_the_command(tmp_path, monkeypatch, capsys):
    (tmp_path / "there.py").write_text(
        "import torch\n"
        "def model():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(9, 3))\n"
        "def data():\n    return torch.rand(20, 1, 3, 3), torch.arange(20) % 3\n"
    )
    monkeypatch.chdir(tmp_path)
    given = ("--model", "there.py:model", "--data", "there.py:data", "--threat", "linf(0.1)", "--attack", "fgsm")
    assert command(*given) == 0
    said = capsys.readouterr().out
    assert "best batch size" in said
    assert "1 attacks in linf(eps=0.1) on 20 examples will take" in said
    assert command(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "advkit/profile/1"
    assert found["forecast"]["pilot"] == 20
    assert found["forecast"]["words"]


def test_the_sentences():
    forecast = Forecast("linf(eps=0.1)", ("a", "b"), 500, 256, 1_819_500, 360.0, 300.0, 170.0, 430.0, 32, 26)
    said = sentences(Profile("m", "d", "cpu", (), rate(254, 256), 32, 256, forecast))
    assert said == [
        "best batch size: 32 (an evaluation takes 256 where none is given)",
        "the stand-in in bfloat16 says the same class for 254 of 256 examples",
        "2 attacks in linf(eps=0.1) on 500 examples will take between 3 and 7 minutes; about 5 minutes if the pilot is typical",
        "a pilot of 32 examples, 26 of which met every attack, says so",
        "at most 1,819,500 passes, which take about 6 minutes",
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_memory_is_said(problem):
    net, data = problem
    result = profile(net.cuda(), data, device="cuda", threat="linf(0.1)", attacks="fgsm")
    assert all(speed.memory > 0 for speed in result.speeds)
    assert result.device == "cuda"
    assert result.forecast.seconds > 0
