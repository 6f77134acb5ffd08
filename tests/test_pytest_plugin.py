"""The fixture, in test suites of its own."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pandas  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch

from advkit import UsageError
from advkit.benchmarks import gates, records  # noqa: F401
from advkit.benchmarks.result import Evaluation
from advkit.pytest_plugin import Robustness

# A suite inside forgets what it imports, and numpy cannot be imported twice; so all that it needs is imported above.
pytest_plugins = ["pytester"]

HEAD = """
import pytest, torch

calls = []

def net(z):
    calls.append(len(z))
    score = 10 * (z.flatten(1).mean(1) - 0.5)
    return torch.stack([-score, score], 1)

x = torch.linspace(0.2, 0.8, 101)[torch.arange(101) != 50].view(-1, 1).expand(-1, 4).clone()
data = x, (x[:, 0] > 0.5).long()
"""
PLUGIN = (
    [] if any(one.value == "advkit.pytest_plugin" for one in entry_points(group="pytest11")) else ["-p", "advkit.pytest_plugin"]
)


QUICK = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]


@pytest.fixture
def suite(pytester):
    def run(text, *words):
        pytester.makepyfile(HEAD + text)
        return pytester.runpytest_inprocess(*PLUGIN, *QUICK, *words)

    return run


def test_a_test_asserts_on_the_result(suite):
    suite(
        """
def test_it(robustness):
    result = robustness(net, data, threat="linf(0.1)", attacks="fgsm")
    assert result.clean_accuracy.value == 1
    assert 0.6 < result.robust_accuracy.value < 0.7

def test_that_fails(robustness):
    assert robustness(net, data, threat="linf(0.2)", attacks="fgsm").robust_accuracy.low > 0.9
"""
    ).assert_outcomes(passed=1, failed=1)


GATES = [
    ("robust[linf(0.1)] >= 0.4", 0, "passed"),
    ("robust[linf(0.1)] >= 0.62", 0, "undecided"),
    ("robust[linf(0.1)] >= 0.9", 1, "failed"),
    ("robust[linf(0.1)] <= 0.2", 1, "failed"),
    ("clean >= 90 %", 0, "passed"),
    ("median[linf] >= 0.05", 0, "passed"),
    ("median[linf] >= 0.25", 1, "failed"),
]


def test_a_requirement_fails_only_where_it_is_surely_missed(suite):
    tests = []
    for k, (gate, *_) in enumerate(GATES):
        attacks = "" if gate.startswith("clean") else ', attacks="fmn(steps=30)"' if "median" in gate else ', attacks="fgsm"'
        tests.append(f"def test_{k}(robustness):\n    robustness.require(net, data, {gate!r}{attacks})\n")
    result = suite("\n".join(tests), "-v")
    text = result.stdout.str()
    said = text.split("= robustness =")[1].splitlines()
    for k, (gate, failed, word) in enumerate(GATES):
        assert f"test_{k} {'FAILED' if failed else 'PASSED'}" in text, gate
        assert f": {word}" in said[k + 1], gate


def test_a_failure_says_what_was_found_and_by_whom(suite):
    result = suite('def test_it(robustness):\n    robustness.require(net, data, "robust[linf(0.1)] >= 0.9", attacks="fgsm")\n')
    text = result.stdout.str()
    assert "robust[linf(0.1)] of net is" in text
    assert "fgsm broke" in text
    assert "clean accuracy 100.00 %" in text
    assert "--robustness-out DIR" in text
    assert "decide(" not in text, "the traceback of the plugin is of no use"


def test_the_same_evaluation_is_made_once(suite):
    suite(
        """
def count(robustness, **given):
    before = sum(calls)
    robustness(net, data, **{"threat": "linf(0.1)", "attacks": "pgd(steps=20)", **given})
    return sum(calls) - before

def test_first(robustness):
    assert count(robustness) > 500

def test_second(robustness):
    assert count(robustness) < 20
    assert count(robustness, threat="linf(0.05)") > 500
    assert count(robustness, seed=1) > 500
    assert count(robustness, limit=50) > 250

def test_another_model(robustness):
    first = robustness(torch.nn.Linear(4, 2), data, threat="linf(0.1)", attacks="fgsm")
    second = robustness(torch.nn.Linear(4, 2), data, threat="linf(0.1)", attacks="fgsm")
    assert first is not second
"""
    ).assert_outcomes(passed=3)


def test_the_folders_are_kept_and_serve_the_next_session(suite, pytester):
    text = """
def test_it(robustness):
    result = robustness(net, data, threat="linf(0.1)", attacks="pgd(steps=20)")
    assert result.folder.parent.name == "kept"
    print("passes", sum(calls))

def test_gate(robustness):
    robustness.require(net, data, "robust[linf(0.1)] >= 0.9", attacks="fgsm")
"""
    suite(text, "--robustness-out", "kept").assert_outcomes(passed=1, failed=1)
    folders = sorted(Path(pytester.path, "kept").glob("net-*"))
    assert len(folders) == 2
    assert {Evaluation.load(folder).run["attacks"][0] for folder in folders} == {"pgd(steps=20)", "fgsm"}
    again = suite(text, "--robustness-out", "kept", "-s")
    (passes,) = [int(line.split()[-1]) for line in again.outlines if "passes " in line]
    assert passes < 20
    assert f"rows and examples: {pytester.path / 'kept'}" in again.stdout.str()
    assert sorted(Path(pytester.path, "kept").glob("net-*")) == folders


def test_the_folder_is_where_pytest_was_started(suite, pytester):
    text = """
def test_it(robustness, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    robustness(net, data, threat="linf(0.1)", attacks="fgsm")
"""
    suite(text, "--robustness-out", "kept").assert_outcomes(passed=1)
    assert list(Path(pytester.path, "kept").glob("net-*"))


def test_a_file_is_no_folder(suite, pytester):
    pytester.makefile(".txt", kept="")
    result = suite("def test_it():\n    pass\n", "--robustness-out", "kept.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "is a file; it should be a folder" in result.stderr.str()


def test_those_that_make_the_same_evaluation_take_turns(tmp_path):
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    data = x, x.flatten(1).argmax(1)
    ready = threading.Barrier(2)

    def slow(z):
        time.sleep(0.02)
        return z.flatten(1)

    def attacked(_):
        robustness = Robustness(tmp_path)
        ready.wait()
        return robustness(slow, data, threat="linf(0.1)", attacks="fgsm", batch_size=10).robust_accuracy

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(attacked, range(2))
    assert first == second
    assert len(list(tmp_path.glob("slow-*"))) == 1


def test_what_a_requirement_came_to_is_in_the_report_of_its_test(suite, pytester):
    pytester.makeconftest(
        """
def pytest_runtest_logreport(report):
    for name, text in report.user_properties:
        print("\\nproperty", report.when, report.nodeid.split("::")[1], name, text.split(" of ")[0])
"""
    )
    result = suite(
        """
@pytest.fixture(scope="module")
def checked(robustness):
    return robustness.require(net, data, "robust[linf(0.1)] >= 0.4", attacks="fgsm")

def test_one(robustness, checked):
    robustness.require(net, data, "clean >= 0.9")

def test_two(checked):
    pass
""",
        "-s",
    )
    properties = [line for line in result.outlines if line.startswith("property")]
    assert properties == [
        "property setup test_one robustness robust[linf(0.1)]",
        "property call test_one robustness clean",
    ]


def test_what_is_wrong_is_said(suite):
    result = suite('def test_it(robustness):\n    robustness.require(net, data, "robust >= many")\n')
    result.assert_outcomes(failed=1)
    text = result.stdout.str()
    assert "UsageError: the gate 'robust >= many' lacks a name" in text
    assert "gates.py" not in text, "the way to the sentence is of no use"


def test_without_a_requirement_nothing_is_said(suite):
    assert "robustness =" not in suite("def test_it():\n    pass\n").stdout.str()


@pytest.mark.parametrize("gate", ["robust[linf]  >= 0.5", "robust[linf(0.1), other] >= 0.5", "speed >= 1"])
def test_a_gate_that_does_not_fit_is_refused(gate):
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError):
        Robustness().require(lambda z: z.flatten(1), (x, x.flatten(1).argmax(1)), gate, attacks="fgsm")


def test_importing_and_collecting_costs_nothing(pytester):
    pytester.makeconftest(
        """
import sys

def pytest_collection_finish(session):
    heavy = {"torch", "numpy", "pandas", "scipy", "advkit.benchmarks"} & set(sys.modules)
    assert "advkit.pytest_plugin" in sys.modules
    assert not heavy, heavy
"""
    )
    pytester.makepyfile("def test_it(request):\n    pass\n\ndef test_uses(robustness):\n    assert robustness.out is None\n")
    command = [sys.executable, "-m", "pytest", *PLUGIN, *QUICK]
    done = subprocess.run(command, cwd=pytester.path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


def test_a_gate_names_its_own_threat_model_and_clean_answers_need_no_attack():
    x = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    data = x, x.flatten(1).argmax(1)
    with pytest.raises(UsageError, match="names its own"):
        Robustness().require(lambda z: z.flatten(1), data, "clean >= 0.5", threat="linf(0.1)")
    result = Robustness().require(lambda z: z.flatten(1), data, "clean >= 0.5", attacks="pgd")
    assert result.run["attacks"] == ["uniform(n=1)"]
