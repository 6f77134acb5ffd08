"""The doctor: every check fires on the failure it is for, and none on networks that are attacked well."""

import contextlib
import io
import json
import math
import shlex
from dataclasses import replace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import advkit
from advkit import Access, Lp, UsageError, spec
from advkit.attacks import ATTACKS, FGSM, PGD, Expect, RayS, Restarts, Square, Uniform, Worst
from advkit.benchmarks import doctor
from advkit.benchmarks.alarms import NoGraph, alarms, planted
from advkit.benchmarks.broken import Noisy, Quantized, winners
from advkit.benchmarks.checking import leading
from advkit.benchmarks.doctor import diagnose
from advkit.benchmarks.findings import SEVERITIES, Finding
from advkit.benchmarks.probe import leaves, longer, rebuilt, surely
from advkit.benchmarks.records import of_evaluation
from advkit.benchmarks.rows import from_records
from advkit.benchmarks.suites import SUITES
from advkit.cli import doctor as command
from advkit.cli import parser
from advkit.data import load
from advkit.defenses import DEFENSES
from advkit.models import checkpoint, networks, wrap
from advkit.threat import THREATS, Rotation
from advkit.train import Recipe, train

LINF = Lp(math.inf, 0.1)
NETWORK = "mnist-mlp(width=32)"


@pytest.fixture(scope="module")
def digits():
    return load("mnist-5k", split="test")


@pytest.fixture(scope="module")
def plain():
    with torch.random.fork_rng(devices=[]):
        return train(networks.build(NETWORK), load("mnist-5k", split="train"), Recipe(epochs=3))


@pytest.fixture(scope="module")
def robust():
    """A little adversarial training."""
    loss = spec.parse("pgd(steps=3)", DEFENSES, "defense", defaults={"threat": LINF})
    with torch.random.fork_rng(devices=[]):
        return train(networks.build(NETWORK), load("mnist-5k", split="train"), Recipe(epochs=2), loss=loss)


def batch(data, n=32, seed=0):
    return data.limited(n, seed).batch(0, n)


def fired(found):
    return {f.check: f.severity for f in found if f.severity != "fine"}


def assert_commands_parse(found):
    for finding in found:
        if not finding.command:
            assert finding.severity == "fine"
            continue
        program, *words = shlex.split(finding.command)
        assert program == "advkit"
        known = parser().parse_args(words)
        spec.parse(known.threat, THREATS, "threat")
        for attack in known.attack or []:
            if attack not in SUITES:
                spec.parse(attack, ATTACKS, "attack")


@pytest.mark.parametrize("network", ["plain", "robust"])
def test_nothing_is_suspect_where_nothing_is_wrong(network, digits, request):
    x, y = batch(digits)
    found = diagnose(request.getfixturevalue(network), x, y, LINF, attack=PGD(steps=10))
    assert fired(found) == {}
    assert {f.check for f in found} == set(doctor.OF_THE_MODEL | doctor.OF_THE_ATTACK) - {
        "transfer-failure",
        "transfer-beats-attack",
    }
    assert all(f.numbers and f.evidence and not f.command for f in found)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["plain", "robust"])
def test_under_one_false_alarm_in_twenty_runs(network, digits, request):
    model = wrap(request.getfixturevalue(network))
    found = [f for seed in range(10) for f in alarms(model, digits, LINF, seed)[0]]
    assert [f.check for f in found if f.severity == "suspect"] == []
    assert len(found) <= 2


def test_the_same_seed_says_the_same_and_the_global_state_is_left(plain, digits):
    x, y = batch(digits, 8)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (diagnose(Noisy(plain), x, y, LINF, attack=PGD(steps=5), seed=1) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def failures(plain):
    with torch.random.fork_rng(devices=[]):
        other = networks.build(NETWORK, seed=1).eval()
        return {failure.name: failure for failure in planted(plain, LINF, other)}


NAMES = (
    "input detached",
    "no graph at all",
    "input rounded to 32 levels",
    "softmax at temperature 0.01",
    "logits times 1000",
    "exploding gradients",
    "noise of 0.05",
    "back at the end",
    "three short steps",
    "a fifth of the radius",
    "another surrogate",
)


@pytest.mark.parametrize("name", NAMES)
def test_each_planted_failure_is_seen_by_its_check(name, failures, digits):
    failure = failures[name]
    x, y = batch(digits, 32)
    found = diagnose(
        failure.model, x, y, LINF, attack=failure.attack or PGD(steps=8), surrogate=failure.surrogate, data="mnist-5k"
    )
    assert failure.check in fired(found)
    assert_commands_parse(found)


def test_all_failures_are_tried(failures):
    assert set(failures) == set(NAMES)


@pytest.mark.slow
def test_winners_take_all_are_seen(digits):
    model = train(winners(networks.build("mnist-cnn"), 0.05), load("mnist-5k", split="train"), Recipe(epochs=2, lr=0.02))
    x, y = batch(digits, 64)
    assert fired(diagnose(model, x, y, Lp(math.inf, 0.15)))["unstable-predictions"] == "suspect"


def test_noise_is_a_warning_where_the_attack_takes_means(plain, digits):
    x, y = batch(digits, 16)
    attack = Restarts(Expect(PGD(steps=3), n=3), n=1)
    assert fired(diagnose(Noisy(plain), x, y, LINF, attack=attack))["answers-change"] == "warning"


def test_a_surrogate_that_is_the_model_transfers(plain, digits):
    x, y = batch(digits)
    found = {f.check: f for f in diagnose(plain, x, y, LINF, surrogate=plain, others={"itself": plain}, attack=PGD(steps=5))}
    assert found["transfer-failure"].severity == "fine"
    assert found["transfer-failure"].numbers["fooled"] > 0
    assert found["transfer-beats-attack"].severity == "fine"


def test_examples_of_an_undefended_copy_beat_masked_gradients(plain, digits):
    x, y = batch(digits, 48)
    found = fired(diagnose(Quantized(plain), x, y, Lp(math.inf, 0.15), others={"copy": plain}, attack=PGD(steps=10)))
    assert found["transfer-beats-attack"] == "suspect"


def test_noise_is_not_compared_with_noise_nor_asked_for_gradients(plain, digits):
    x, y = batch(digits)
    found = {f.check: f for f in diagnose(plain, x, y, LINF, attack=Uniform(3))}
    assert "random-beats-attack" not in found
    assert "unavailable-gradients" not in found


@pytest.mark.parametrize(("access", "attack", "n"), [(Access.SCORES, None, 2), (Access.LABELS, RayS(queries=20), 4)])
def test_less_access_leaves_the_checks_of_gradients_out(access, attack, n, plain, digits):
    x, y = batch(digits, n)
    found = diagnose(NoGraph(plain), x, y, LINF, attack=attack, access=access)
    assert not {f.check for f in found} & {"unavailable-gradients", "unstable-predictions", "one-step-beats-many"}
    assert "attack-raises" not in fired(found)


@pytest.mark.parametrize("threat", [Lp(2, 1.0), Lp(1, 5.0), Lp(0, 10), Rotation(angle=20)])
def test_other_threat_models_are_looked_at_too(threat, plain, digits):
    x, y = batch(digits, 4)
    found = diagnose(plain, x, y, threat, attack=PGD(steps=8))
    assert {"not-converged", "unstable-predictions"} <= {f.check for f in found}
    assert all("could not be run" not in f.evidence for f in found)
    assert_commands_parse(found)


def test_without_a_range_there_is_no_radius_that_reaches_it(plain, digits):
    x, y = batch(digits, 4)
    found = diagnose(plain, x, y, Lp(math.inf, 0.1, low=-math.inf, high=math.inf), attack=PGD(steps=3))
    assert "more-radius-does-not-help" in {f.check for f in found}
    assert all(f.check != "unbounded-attack-fails" and "could not be run" not in f.evidence for f in found)


class Raising(nn.Module):
    """A model whose calls begin to fail."""

    def __init__(self, model, calls):
        super().__init__()
        self.model, self.calls = model, calls

    def forward(self, x):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("out of order")
        return self.model(x)


@pytest.mark.parametrize("calls", [1, 5, 60, 200])
def test_a_model_that_raises_is_a_warning(calls, plain, digits):
    x, y = batch(digits, 8)
    found = diagnose(Raising(plain, calls), x, y, LINF, attack=PGD(steps=5))
    assert any("out of order" in f.evidence for f in found if f.severity == "warning")


def test_a_model_that_is_never_right_is_a_warning(plain, digits):
    x, _ = batch(digits, 8)
    wrong = (plain(x).argmax(1) + 1) % 10
    assert fired(diagnose(plain, x, wrong, LINF)) == {"nothing-right": "warning"}


class Nameless:
    access, norms, minimum, paper, cost = Access.SCORES, (math.inf,), False, "none", 1

    def __call__(self, oracle, x, threat, rng):
        return x


def test_what_cannot_be_looked_at_is_refused(plain, digits):
    x, y = batch(digits, 4)
    with pytest.raises(UsageError, match=r"linf; the checks look at an attack in a radius"):
        diagnose(plain, x, y, Lp(math.inf))
    with pytest.raises(UsageError, match="the attack needs gradients; the adversary sees scores"):
        diagnose(plain, x, y, LINF, attack=PGD(), access=Access.SCORES)
    with pytest.raises(UsageError, match="the attack Nameless is not a dataclass"):
        diagnose(plain, x, y, LINF, attack=Nameless())
    with pytest.raises(UsageError, match="the seed is -1"):
        diagnose(plain, x, y, LINF, seed=-1)


@given(st.integers(0, 80), st.integers(0, 80), st.floats(0, 1))
def test_the_rule_is_the_binomial_tail(count, more, share):
    from scipy.stats import binom

    of = count + more
    # As likely a count, or a greater one, with just this share: at most 1 in 100 exactly where the rule is sure.
    tail = binom.sf(count - 1, of, share)
    assert surely(count, of, share) == (count > 0 and tail < 0.01) or abs(tail - 0.01) < 1e-6


def test_settings_are_changed_below_wrappers():
    nested = Worst((Restarts(PGD(steps=3), n=2), Square(queries=5), FGSM()))
    assert leaves(nested) == [PGD(steps=3), Square(queries=5), FGSM()]
    assert longer(nested, 2) == Worst((Restarts(PGD(steps=6), n=2), Square(queries=10), FGSM()))
    assert longer(FGSM(), 2) is None
    assert rebuilt(PGD(step=0.1), lambda leaf: {"step": 2 * leaf.step}) == PGD(step=0.2)


# What the rows show.


def records(rows, *, family="linf", attacks=("pgd", "square"), radii=(0.1,), n=32):
    """Records of one model, right on n examples; a row is (attack, eps, index, success)."""
    x = torch.arange(5 * n).view(n, 1, 1, 5) / (5 * n)
    made = of_evaluation(advkit.evaluate(nn.Flatten(), (x, torch.full((n,), 4)), threat="linf(0.001)", attacks="fgsm"))
    name = made.models[0]
    tries = pd.DataFrame(
        [
            {"model": name, "family": family, "attack": attack, "eps": eps, "seed": 0, "start": 0, "index": i}
            | {"success": success, "distance": min(eps, 9) if success else math.inf, "adversarial": 0 if success else -1}
            for attack, eps, i, success in rows
        ]
    )
    about = {**made.about, "families": {family: {"radii": list(radii), "attacks": list(attacks)}}}
    return replace(made, about=about, tries=tries)


def seen(*arguments, **options):
    found = from_records(records(*arguments, **options))
    assert_commands_parse(found)
    return fired(found)


def both(first, second, k, n=32, eps=0.1):
    """Rows on which the second attack was run after the first had failed, and broke k of n."""
    return [(first, eps, i, False) for i in range(n)] + [(second, eps, i, i < k) for i in range(n)]


@pytest.mark.parametrize(("k", "verdict"), [(0, {}), (1, {}), (20, {"search-wins": "suspect"})])
def test_rows_that_only_scores_broke(k, verdict):
    assert seen(both("pgd", "square", k)) == verdict


def test_rows_that_only_one_step_broke():
    rows = both("pgd", "fgsm", 20)
    assert seen(rows, attacks=("pgd", "fgsm")) == {"one-step-wins": "suspect"}
    # A stronger one broke them too.
    rows += [("apgd", 0.1, i, True) for i in range(32)]
    assert seen(rows, attacks=("pgd", "fgsm", "apgd")) == {}


def test_rows_that_were_broken_at_a_smaller_radius():
    rows = [("pgd", eps, i, (eps == 0.1) == (i < 16)) for eps in (0.1, 0.15) for i in range(32)]
    assert seen(rows, radii=(0.1, 0.15)) == {"greater-radius-misses": "suspect"}


def test_a_curve_that_does_not_fall():
    rows = [("pgd", eps, i, i < 8) for eps in (0.1, 0.3) for i in range(32)]
    assert seen(rows, radii=(0.1, 0.3)) == {"radius-does-not-help": "warning"}
    rows = [("pgd", eps, i, i < 80 * eps) for eps in (0.1, 0.3) for i in range(32)]
    assert seen(rows, radii=(0.1, 0.3)) == {}


def test_half_of_the_range_breaks_everything():
    assert seen(both("pgd", "square", 0, eps=0.5), radii=(0.5,)) == {"robust-to-anything": "suspect"}


def test_a_search_for_the_closest_that_finds_nothing():
    rows = [("fmn", math.inf, i, i < 16) for i in range(32)]
    assert seen(rows, attacks=("fmn",), radii=(math.inf,)) == {"closest-not-found": "suspect"}


@pytest.mark.parametrize(("k", "verdict"), [(0, {}), (1, {}), (20, {"not-the-closest": "warning"})])
def test_a_search_that_misses_what_attacks_find(k, verdict):
    rows = [("fmn(steps=5)", math.inf, i, i >= k) for i in range(32)] + [("pgd", 0.1, i, i < 20) for i in range(32)]
    made = records(rows, attacks=("fmn(steps=5)", "pgd"), radii=(0.1, None))
    # What the search found is in the radius.
    made = replace(made, tries=made.tries.replace({"distance": 9.0}, 0.1))
    found = [f for f in from_records(made) if f.check == "not-the-closest"]
    assert fired(found) == verdict
    assert [f.numbers["count"] for f in found] == [k]
    assert all("'fmn(steps=20)'" in f.command and "--threat linf " in f.command for f in found if f.command)


def test_noise_alone():
    rows = [("uniform", 0.1, i, False) for i in range(32)]
    assert seen(rows, attacks=("uniform", "gaussian(n=3)")) == {"only-noise": "suspect"}


def test_real_rows_of_a_plain_network_show_nothing(plain, digits):
    attacks = ["fgsm", "pgd(steps=10)", "square(queries=50)"]
    made = of_evaluation(advkit.evaluate(plain, digits, threat="linf(0.1)", attacks=attacks, limit=32, alone=True))
    found = from_records(made)
    assert fired(found) == {}
    assert {f.check for f in found} == {"only-noise", "one-step-wins", "search-wins"}


# The command.


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    checkpoint.save(path, plain, NETWORK)
    return str(path)


def run(*words):
    import argparse

    top = argparse.ArgumentParser()
    command.add(top.add_subparsers())
    arguments = top.parse_args(["doctor", *words])
    return arguments.run(arguments)


def test_the_command_prints_a_table(saved, capsys):
    words = ["--data", "mnist-5k", "--threat", "linf(0.1)", "--limit", "16", "--attack", "pgd(steps=8)"]
    assert run(saved, *words) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("not-converged", "unbounded-attack-fails"))


def test_the_command_says_what_to_do_next(saved, capsys):
    words = ["--data", "mnist-5k", "--threat", "linf(0.2)", "--limit", "32", "--attack", "pgd(steps=1, step=0.001)"]
    assert run(saved, *words) == 1
    last = capsys.readouterr().out.splitlines()
    commands = [line.strip() for line in last if line.startswith("  advkit attack")]
    assert commands
    for line in commands:
        known = parser().parse_args(shlex.split(line)[1:])
        assert (known.model, known.data) == (saved, "mnist-5k")


def test_the_command_writes_json(saved, capsys):
    words = ["--data", "mnist-5k", "--threat", "linf(0.1)", "--limit", "8", "--attack", "pgd(steps=3)", "--json"]
    run(saved, *words)
    found = [Finding.from_json(one) for one in json.loads(capsys.readouterr().out)]
    assert {f.severity for f in found} <= set(SEVERITIES)


FLAT = """
import torch


def flat():
    return lambda x: (x - x.detach()).flatten(1)[:, :10] + 2 * torch.eye(10)[0]


def constant():
    return lambda x: 2 * torch.eye(10)[0] + 0 * x.flatten(1)[:, :10]
"""


@pytest.mark.parametrize(("name", "median"), [("flat", [None]), ("constant", [])])
def test_the_json_of_a_model_that_never_changes_is_json(name, median, tmp_path, capsys):
    (tmp_path / "m.py").write_text(FLAT)
    words = ["--data", "mnist-5k", "--threat", "linf(0.1)", "--limit", "20", "--attack", "pgd(steps=3)", "--json"]
    run(f"{tmp_path / 'm.py'}:{name}", *words)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [f["numbers"]["median"] for f in found if f["check"] == "unstable-predictions"] == median


# In a benchmark.

MASKED = ("quantized", "detached")

DEFENDED = """
from advkit.benchmarks.broken import Detached, Quantized
from advkit.models import checkpoint


def quantized():
    return Quantized(checkpoint.load("{network}")[0], 8)


def detached():
    return Detached(checkpoint.load("{network}")[0])
"""

SUITE = """
title = "planted"
data = "mnist-5k"
limit = 48
attacks = ["fgsm", "pgd(steps=3)"]

[[threats]]
threat = "linf"
radii = [0.1]
"""


@pytest.fixture(scope="module")
def benched(saved, tmp_path_factory):
    """What ``advkit benchmark`` prints and writes for a network, and for two defenses that take its gradient away."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "suite.toml").write_text(SUITE)
    (folder / "defended.py").write_text(DEFENDED.format(network=saved))
    words = [str(folder / "suite.toml"), "--out", str(folder / "run"), "--model", f"plain={saved}"]
    words += [f"--model={name}={folder / 'defended.py'}:{name}" for name in MASKED]
    words += ["--require", "robust[linf(0.1), quantized] >= 1 %", "--require", "clean[quantized] >= 50 %"]
    arguments = parser().parse_args(["benchmark", *words])
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert arguments.run(arguments) == 0
    return said.getvalue(), folder / "run" / "report"


def test_a_benchmark_marks_what_masked_gradients_overstate(benched):
    said, folder = benched
    found = json.loads((folder / "summary.json").read_text())
    assert {row["model"]: row["suspect"] for row in found["results"]} == {"plain": False, "quantized": True, "detached": True}
    seen = {(f["model"], f["check"]) for f in found["findings"] if f["severity"] == "suspect"}
    assert {(model, "unavailable-gradients") for model in MASKED} <= seen
    assert [(gate["gate"][:5], gate["suspect"]) for gate in found["gates"]] == [("robus", True), ("clean", False)]
    table = [line for line in said.splitlines() if line.startswith("│")]
    for model in ("plain", *MASKED):
        (line,) = [line for line in table if f" {model} " in line]
        assert ("suspect" in line) == (model in MASKED)
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count(">suspect</span>") > len(MASKED)
    assert "unavailable-gradients" in page
    # The sentence, the table with its area, two attacks alone, and the gate.
    assert text.count("(**suspect**)") == 2 * 5 + 1
    for log, sign in (("junit.xml", "cannot be trusted"), ("report.sarif", "unavailable-gradients"), ("results.csv", "True")):
        assert sign in (folder / log).read_text()


@pytest.mark.parametrize(
    ("suite", "led"),
    [
        (("fgsm", "pgd(steps=3)", "restarts(pgd)"), "pgd(steps=3)"),
        (("fgsm", "restarts(pgd(steps=5), n=2)", "expect(pgd, n=5)"), "expect(pgd, n=5)"),
        (("fgsm",), "fgsm"),
        (("fgsm", "square(queries=9)"), "square(queries=9)"),
    ],
)
def test_an_attack_of_the_suite_is_checked(suite, led):
    attacks = [spec.parse(attack, ATTACKS, "attack") for attack in suite]
    assert leading(attacks) == attacks[suite.index(led)]
