"""``advkit benchmark``, ``advkit report`` and ``advkit compare``, end to end in a folder of their own."""

import json

import pytest

from advkit.cli import main

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(784, 10)
    def forward(self, x):
        return 4 * self.layer(x.flatten(1))

def a(): return Net(0)
def b(): return Net(1)
"""

SUITE = """
title = "small"
data = "mnist-5k"
limit = 60
attacks = ["fgsm", "pgd(steps=3)"]
checks = false
[models]
a = "nets.py:a"
[[threats]]
threat = "linf"
radii = [0.01, 0.05]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETWORK)
    (tmp_path / "suite.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return tmp_path


def test_a_run_prints_a_table_and_writes_its_report(folder, capsys):
    assert main(["benchmark", "suite.toml", "--model", "other=nets.py:b", "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "linf(0.05)" in said
    summary = json.loads((folder / "run/report/summary.json").read_text())
    assert [model["name"] for model in summary["models"]] == ["a", "other"]
    assert summary["run"]["command"] == "advkit benchmark suite.toml --model other=nets.py:b --out run"
    rates = [result["robust"]["value"] for result in summary["results"] if result["model"] == "a"]
    assert rates == sorted(rates, reverse=True)
    before = summary
    assert main(["report", "run", "--out", "again"]) == 0
    after = json.loads((folder / "again/summary.json").read_text())
    assert {**after, "time": None} == {**before, "time": None}


def test_the_exit_code_says_what_the_gates_say(folder, capsys):
    common = ["benchmark", "suite.toml", "--out", "run"]
    assert main([*common, "--require", "clean <= 0.9", "--require", "robust[linf(0.05)] <= 0.5"]) == 0
    assert main([*common, "--require", "robust[linf(0.05)] >= 0.9"]) == 1
    assert "gate failed" in capsys.readouterr().out
    rate = json.loads((folder / "run/report/summary.json").read_text())["models"][0]["clean"]["value"]
    undecided = f"clean >= {rate}"
    assert main([*common, "--require", undecided]) == 0
    assert "gate undecided" in capsys.readouterr().out
    assert main([*common, "--require", undecided, "--strict"]) == 1
    # The report of a run keeps its gates.
    assert main(["report", "run"]) == 0
    (gate,) = json.loads((folder / "run/report/summary.json").read_text())["gates"]
    assert (gate["gate"], gate["verdict"], gate["ok"]) == (undecided, "undecided", False)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["nothing.toml"], "there is no file nothing.toml"),
        (["quik"], "did you mean 'quick'"),
        (["suite.toml", "--model", "missing.safetensors"], "there is no file missing.safetensors"),
        (["suite.toml", "--data", "mnist-5000"], "unknown data"),
        (["suite.toml", "--limit", "0"], "--limit is 0"),
        (["suite.toml", "--require", "robust[linf(0.3)] >= 0.1"], "measured are linf(0.01), linf(0.05)"),
        (["suite.toml", "--require", "robust >= 0.1"], "lacks a name inside the brackets"),
        (["suite.toml", "--sequential"], "nothing to decide"),
        (["suite.toml", "--compile"], "compile"),
        (["suite.toml", "--device", "cuda:99"], "cannot use the device"),
    ],
)
def test_misuse_is_one_sentence_and_exit_code_2(changes, says, folder, capsys):
    assert main(["benchmark", *changes, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_compare_fails_only_on_a_significant_loss(folder, capsys):
    # The second is right on fewer digits by far: it has never seen one.
    trained = ["train", "--model", "mnist-mlp(width=16)", "--data", "mnist-5k", "--epochs", "2", "--out", "m.safetensors"]
    assert main(trained) == 0
    for name, model in (("base", "m.safetensors"), ("head", "nets.py:b")):
        (folder / "suite.toml").write_text(SUITE.replace("nets.py:a", model))
        assert main(["benchmark", "suite.toml", "--out", name]) == 0
    assert main(["compare", "base", "base", "--fail-if-worse"]) == 0
    assert main(["compare", "head", "base", "--fail-if-worse"]) == 0
    assert main(["compare", "base", "head"]) == 0
    assert main(["compare", "base", "head", "--fail-if-worse"]) == 1
    capsys.readouterr()
    assert main(["compare", "base", "missing", "--fail-if-worse"]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_the_summary_of_a_step_gets_the_text(folder, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "step.md"))
    assert main(["benchmark", "suite.toml", "--out", "run"]) == 0
    assert "linf(0.05)" in (folder / "step.md").read_text()


def test_a_page_is_kept_current(folder):
    for _ in range(2):
        assert main(["benchmark", "suite.toml", "--out", "run", "--markdown", "page.md"]) == 0
    assert (folder / "page.md").read_text().count("| a |") == 1
