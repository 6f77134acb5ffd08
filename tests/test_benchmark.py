"""Suites, cells and records: what a benchmark runs, what it does not run again, and what its numbers are made of."""

import dataclasses
import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from advkit import models
from advkit.attacks import FGSM, PGD
from advkit.benchmarks import cells, engines, runner, suitefile
from advkit.benchmarks.evaluate import evaluate
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.memory import Fit
from advkit.benchmarks.records import load
from advkit.benchmarks.store import Store
from advkit.cli.benchmark import _models
from advkit.data import from_tensors
from advkit.errors import ModelError, UsageError
from advkit.oracle import Access

SUITE = """
title = "small"
attacks = ["fgsm", "pgd(steps=4)"]
checks = false
block = 8

[[threats]]
threat = "linf"
radii = [0.02, "8/255", 0.1]
closest = ["fmn(steps=10)"]
"""


class Counting(nn.Module):
    """A small network that counts the rows it is shown, outside of what makes it the model it is."""

    shown = 0

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layer = nn.Linear(16, 4)

    def forward(self, x):
        type(self).shown += len(x)
        return 8 * self.layer(x.flatten(1))


@pytest.fixture
def data():
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    y = Counting()(x).argmax(1)
    # One in ten is wrong from the start.
    return x, torch.where(torch.arange(20) % 10 == 0, (y + 1) % 4, y)


def small(**changes):
    return dataclasses.replace(suitefile.parse(SUITE), **changes)


def go(data, suite=None, models=None, **options):
    return runner.run(suite or small(), models=models or {"a": Counting(), "b": Counting(1)}, data=data, **options)


def same(a, b):
    return a.clean.equals(b.clean) and a.tries.equals(b.tries)


# What a suite may say.


def test_shipped_suites_can_be_read():
    assert set(suitefile.shipped()) == {"quick", "demo", "digits", "standard-linf", "standard-l2", "black-box", "corruptions"}
    for name in suitefile.shipped():
        assert suitefile.read(name).title == name


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('title = "t"\nattaks = []', 2, "did you mean 'attacks'"),
        ('title = "t"', 1, "needs threats"),
        ('[[threats]]\nthreat = "linf"', 1, "needs title"),
        ('title = "t"\n[[threats]]\nthreat = "lin"', 3, "unknown threat 'lin'"),
        ('title = "t"\n[[threats]]\nthreat = "linf"\nradii = [0.1,\n 0]', 5, "greater than 0"),
        ('title = "t"\n[[threats]]\nthreat = "linf"\nradii = ["a/b"]', 4, "greater than 0"),
        ('title = "t"\n[[threats]]\nthreat = "linf(0.1)"', 3, "its radii in radii"),
        ('title = "t"\n[[threats]]\nthreat = "rotation"\nradii = [1]', 4, "has no radius"),
        ('title = "t"\n[[threats]]\nthreat = "rotation"\nclosest = ["fmn"]', 4, "linf, l2, l1, l0 only"),
        ('title = "t"\n[[threats]]\nthreat = "l2"\n[[threats]]\nthreat = "l2"', 5, "there twice"),
        ('title = "t"\n[[threats]]\nthreat = "l2"\nattacks = [\n"pgd",\n"pgdd"]', 6, "did you mean 'pgd'"),
        ('title = "t"\nattacks = ["pgd(step=-1)"]\n[[threats]]\nthreat = "l2"', 2, "step"),
        ('title = "t"\n[models]\na = { model = "b", second = 1 }\n[[threats]]\nthreat = "l2"', 3, "training-seconds"),
        ('title = "t"\n[models]\na = 3\n[[threats]]\nthreat = "l2"', 3, "a model's spec"),
        ('title = "t"\n[models.a]\nmodel = "b"\ntraining-seconds = "x"\n[[threats]]\nthreat = "l2"', 2, "at least 0"),
        ('title = "t"\nseeds = [1, 1]\n[[threats]]\nthreat = "l2"', 2, "different whole numbers"),
        ('title = "t"\nlimit = 0\n[[threats]]\nthreat = "l2"', 2, "at least 1"),
        ('title = "t"\nalone = "yes"\n[[threats]]\nthreat = "l2"', 2, "true or false"),
        ('title = "t"\naccess = "all"\n[[threats]]\nthreat = "l2"', 2, "gradients, scores or labels"),
        ('title = "t"\nthreats = 3', 2, "[[threats]]"),
        ("title = t", 1, "not TOML"),
        ('title = "t"\n[[threats]]\nthreat = "l2"\nradii = [1]\nclosest = [\n"ddn",\n"apgd"]', 7, "inside a fixed radius"),
        ('title = "t"\nattacks = ["fab", "rays"]\n[[threats]]\nthreat = "l2"\nradii = [1]', 2, "does not serve l_2"),
        ('title = "t"\n[[threats]]\nthreat = "l0"\nradii = [2,\n0.5]', 5, "at least 1"),
        ('title = "t"\n[[threats]]\nthreat = "l2"\nattacks = ["pgd"]\nclosest = ["ddn"]', 4, "give radii as well"),
        ('title = "t"\n[models]\n"a\\nb" = "b"\n[[threats]]\nthreat = "l2"', 2, "a text of one line"),
        ('title = "t"\n[models]\na = { model = "b", training-seconds = inf }\n[[threats]]\nthreat = "l2"', 3, "at least 0"),
    ],
)
def test_what_a_suite_may_not_say_is_told_with_its_line(text, line, says):
    with pytest.raises(UsageError) as error:
        suitefile.parse(text, "suite.toml")
    assert says in str(error.value)
    assert f"line {line}" in str(error.value)


def test_radii_are_sorted_and_read_as_fractions():
    assert suitefile.parse(SUITE).threats[0].radii == (0.02, 8 / 255, 0.1)


def test_without_radii_the_attacks_search_for_the_closest():
    suite = suitefile.parse('title = "t"\nattacks = ["ddn"]\n[[threats]]\nthreat = "l2"')
    assert suite.threats[0] == suitefile.Threat("l2", (), (), ("ddn",))


def test_no_such_suite():
    with pytest.raises(UsageError, match="did you mean 'quick'"):
        suitefile.read("quik")
    with pytest.raises(UsageError, match=r"there is no file none.toml"):
        suitefile.read("none.toml")


# What a run does.


def test_the_numbers_are_those_of_the_attacks_called_directly(data):
    records = go(data, small(threats=(suitefile.Threat("linf", (0.05,), ("fgsm", "pgd(steps=4)"), ()),)))
    direct = evaluate(Counting(), data, threat="linf(0.05)", attacks=["fgsm", "pgd(steps=4)"], quantize=False)
    assert records.robust("a", "linf", 0.05) == direct.robust_accuracy
    assert records.clean_accuracy("a") == direct.clean_accuracy
    closest = records.closest("a", "linf")
    for row in direct.rows:
        wanted = 0.0 if not row["correct"] else row["distance"] if row["success"] else math.inf
        assert closest[row["index"]] == pytest.approx(wanted, rel=1e-6)


def test_an_example_broken_within_a_radius_is_not_attacked_in_a_greater_one(data):
    records = go(data)
    for model in records.models:
        for eps in records.radii("linf"):
            tries = records.tries[(records.tries["model"] == model) & (records.tries["eps"] == eps)]
            before = records.tries[(records.tries["model"] == model) & records.tries["success"]]
            smaller = before[(before["eps"] < eps) | ((before["eps"] == math.inf) & (before["distance"] <= eps))]
            assert not set(tries["index"]) & set(smaller["index"])
    rates = [records.robust("a", "linf", eps).value for eps in (0.0, *records.radii("linf"))]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == records.clean_accuracy("a").value == 0.9
    assert rates[-1] < rates[0]


def test_alone_every_attack_meets_every_example_that_is_right(data):
    records = go(data, small(alone=True))
    counts = records.tries.groupby(["model", "eps", "attack"])["index"].count()
    right = {model: records.clean_accuracy(model).count for model in records.models}
    assert all(count == right[model] for (model, _, _), count in counts.items())
    assert len(counts) == 2 * 7


def test_alone_the_worst_case_is_no_better_than_each_attack(data):
    alone = go(data, small(alone=True))
    for eps in alone.radii("linf"):
        worst = alone.robust("a", "linf", eps).count
        each = [int((alone.closest("a", "linf", attack=name) > eps).sum()) for name in alone.attacks("linf")]
        assert worst <= min(each)


def test_what_is_there_is_not_run_again(data, tmp_path):
    Counting.shown = 0
    first = go(data, out=tmp_path / "run")
    whole = Counting.shown
    Counting.shown = 0
    again = go(data, out=tmp_path / "run")
    # Only the look at each model before a run.
    looks = Counting.shown
    assert same(first, again)
    go(data, small(threats=(*small().threats, suitefile.Threat("l2", (0.1,), ("fgsm",), ()))), out=tmp_path / "run")
    assert looks < Counting.shown - looks < whole / 2


@pytest.mark.parametrize("change", ["model", "data", "setting", "budget", "seed"])
def test_a_stale_result_is_never_reused(change, data, tmp_path):
    go(data, out=tmp_path / "run")
    suite, models, other = small(), {"a": Counting(), "b": Counting(1)}, data
    if change == "model":
        models = {"a": Counting(2), "b": Counting(3)}
    elif change == "data":
        other = (data[0].flip(3), data[1])
    elif change == "setting":
        suite = small(threats=(dataclasses.replace(suite.threats[0], attacks=("fgsm", "pgd(steps=5)")),))
    elif change == "budget":
        suite = small(budget=3)
    else:
        suite = small(seeds=(1,))
    changed, fresh = go(other, suite, models, out=tmp_path / "run"), go(other, suite, models)
    assert same(changed, fresh)


def test_an_attack_whose_code_changed_is_run_again(data):
    from advkit.benchmarks.cells import prepare

    class Changed(PGD):
        pass

    def keys(attack):
        suite = small(threats=(suitefile.Threat("linf", (0.1,), ("pgd",), ()),))
        prepared = prepare(suite, models={"a": Counting()}, data=data)
        plan = prepared.plans["a", "linf", 0.1]
        from advkit.benchmarks.cells import _cells

        plans = {("a", "linf", 0.1): dataclasses.replace(plan, attacks=(("pgd", attack),))}
        return [cell.key for cell in _cells(suite, "a", prepared.models["a"], plans, prepared.digest, 8)]

    assert keys(PGD()) == keys(PGD())
    assert keys(PGD())[0] == keys(Changed())[0]
    assert keys(PGD())[1] != keys(Changed())[1]


@pytest.mark.parametrize("what", ["code", "device"])
def test_what_all_attacks_share_is_part_of_every_key(what, data, monkeypatch):
    before = cells.prepare(small(), models={"a": Counting()}, data=data)
    if what == "code":
        monkeypatch.setattr(cells, "_code", lambda: "changed")
        after = cells.prepare(small(), models={"a": Counting()}, data=data).cells["a"]
    else:
        plans = {name: dataclasses.replace(plan, device=torch.device("meta")) for name, plan in before.plans.items()}
        after = cells._cells(small(), "a", before.models["a"], plans, before.digest, 8)
    assert not {cell.key for cell in before.cells["a"]} & {cell.key for cell in after}


def test_a_search_does_not_depend_on_the_searches_before_it(data):
    def keys(*closest):
        suite = small(threats=(suitefile.Threat("linf", (0.1,), ("fgsm",), closest),))
        return {
            (cell.eps, cell.attack): cell.key for cell in cells.prepare(suite, models={"a": Counting()}, data=data).cells["a"]
        }

    one, two = keys("fmn(steps=10)"), keys("fab(steps=2)", "fmn(steps=10)")
    assert one[None, "fmn(steps=10)"] == two[None, "fmn(steps=10)"]
    assert one[0.1, "fgsm"] != two[0.1, "fgsm"]


def test_what_is_run_is_prepared_in_as_few_looks_as_there_are_sets_of_attacks(data):
    Counting.shown = 0
    cells.prepare(small(), models={"a": Counting()}, data=data)
    two = Counting.shown
    Counting.shown = 0
    cells.prepare(
        small(threats=(dataclasses.replace(small().threats[0], radii=(0.01, 0.02, 0.03, 0.04)),)),
        models={"a": Counting()},
        data=data,
    )
    assert Counting.shown == two


def test_the_attacks_of_a_family_are_those_of_all_models(data):
    seen = models.Model(Counting(1), "seen", Access.SCORES, "digest")
    suite = small(threats=(suitefile.Threat("linf", (0.05,), ("fast",), ()),))
    records = go(data, suite, {"a": Counting(), "b": seen})
    assert set(records.attacks("linf")) == set(records.tries["attack"])
    assert "square(queries=300)" in records.attacks("linf")
    assert records.about["access"] == "scores, gradients"


def test_one_model_under_two_names_is_attacked_once(data):
    once, twice = go(data, models={"a": Counting()}), go(data, models={"a": Counting(), "b": Counting()})
    Counting.shown = 0
    go(data, models={"a": Counting()})
    alone = Counting.shown
    Counting.shown = 0
    go(data, models={"a": Counting(), "b": Counting()})
    assert Counting.shown < 1.5 * alone
    assert once.robust("a", "linf", 0.02) == twice.robust("a", "linf", 0.02) == twice.robust("b", "linf", 0.02)


def test_what_does_not_fit_together_is_refused_before_the_run(data, tmp_path):
    named = small(models=(suitefile.Entry("a", "m.safetensors"),))
    for suite, given, says in (
        (named, {"a": Counting()}, "has a model a already"),
        (small(), {"": Counting()}, "a text of one line"),
        (small(), {"a\nb": Counting()}, "a text of one line"),
        (small(compile=True), {"a": Counting()}, "give fast as well"),
    ):
        with pytest.raises(UsageError, match=says):
            go(data, suite, given, out=tmp_path / "run")
    whole = from_tensors(*data)
    with pytest.raises(UsageError, match="have the same number"):
        go(whole.select(torch.tensor([0, 1, 1])))
    with pytest.raises(UsageError, match="no examples"):
        go(whole.select(torch.tensor([], dtype=torch.int64)))
    assert not (tmp_path / "run").exists()


def test_the_rows_do_not_depend_on_the_block(data):
    assert same_numbers(go(data, small(block=8)), go(data, small(block=20)))


def same_numbers(a, b):
    return all(
        torch.allclose(
            torch.tensor(a.closest(m, "linf").sort_index().to_numpy()),
            torch.tensor(b.closest(m, "linf").sort_index().to_numpy()),
            atol=1e-5,
        )
        for m in a.models
    )


def test_seeds_are_runs_of_their_own_and_count_together(data):
    records = go(data, small(seeds=(0, 1, 2), threats=(suitefile.Threat("linf", (0.03,), ("uniform(n=2)",), ()),)))
    each = records.spread("a", "linf", 0.03)
    assert len(each) == 3
    assert records.robust("a", "linf", 0.03).count <= min(rate.count for rate in each)
    one = go(data, small(seeds=(1,), threats=(suitefile.Threat("linf", (0.03,), ("uniform(n=2)",), ()),)))
    assert one.robust("a", "linf", 0.03) == each[1]


def test_the_closest_examples_are_kept_and_are_what_the_rows_say(data):
    records = go(data, small(keep=3))
    shown = records.shown("a", "linf")
    assert shown
    assert [one.distance for one in shown] == sorted(one.distance for one in shown)
    model = Counting()
    for one in shown:
        assert int(model(one.x_adv[None]).argmax()) == one.adversarial != one.label
        assert float((one.x_adv - one.x).abs().max()) == pytest.approx(one.distance, abs=1e-6)
        assert torch.equal(one.x, data[0][one.index])


def test_the_records_of_an_evaluation(data, tmp_path):
    direct = evaluate(
        Counting(), data, threat="linf(0.05)", attacks=["fgsm", "pgd(steps=4)"], out=tmp_path / "e", quantize=False
    )
    records = load(tmp_path / "e")
    assert records.models == ("Counting",)
    assert records.robust("Counting", "linf", 0.05) == direct.robust_accuracy
    assert {one.index for one in records.shown("Counting", "linf")} <= {r["index"] for r in direct.rows if r["success"]}
    with pytest.raises(UsageError, match=r"linf\(0.2\) was not measured; measured are linf\(0.05\)"):
        records.robust("Counting", "linf", 0.2)
    with pytest.raises(UsageError, match="'x' is not a model"):
        records.clean_accuracy("x")


def test_the_curve_of_a_search_is_that_of_its_distances(data):
    records = go(data, small(threats=(suitefile.Threat("l2", (), (), ("ddn(steps=20)",)),)))
    closest = records.closest("a", "l2")
    for eps, rate in records.curve("a", "l2"):
        assert rate.count == int((closest > eps).sum())
    # The area under the curve of a step function, between its lower and upper sums.
    steps = (0.0, *records.steps("l2"))
    width = steps[1] / steps[-1]
    share = float(closest.clip(upper=steps[-1]).mean()) / steps[-1]
    assert share - width <= records.area("a", "l2") <= share + width


def test_sequential_stops_as_soon_as_the_gate_is_decided(data, tmp_path):
    x, y = data[0].repeat(20, 1, 1, 1), data[1].repeat(20)
    suite = small(block=20, threats=(suitefile.Threat("linf", (0.02,), ("fgsm",), ()),))
    records = runner.run(
        suite, models={"a": Counting()}, data=(x, y), require=["clean >= 0.5"], sequential=True, out=tmp_path / "run"
    )
    seen = len(records.clean)
    assert 20 <= seen < 400
    assert runner.run(
        suite, models={"a": Counting()}, data=(x, y), require=["clean >= 0.5"], sequential=True, out=tmp_path / "run"
    ).clean.equals(records.clean)
    assert any("stopped when its gates were decided" in note for note in records.notes)
    hard = runner.run(suite, models={"a": Counting()}, data=(x, y), require=["clean >= 0.9"], sequential=True)
    assert len(hard.clean) == 400
    assert not any("stopped" in note for note in hard.notes)


def test_a_gate_on_what_is_not_measured_is_refused_before_the_run(data, tmp_path):
    for gate, says in (
        ("robust[linf(0.5)] >= 0.1", "measured"),
        ("robust[l2(1)] >= 0.1", "measured"),
        ("clean[c] > 0", "model"),
    ):
        suite = small(threats=(suitefile.Threat("linf", (0.02,), ("fgsm",), ()),))
        with pytest.raises(UsageError, match=says):
            go(data, suite, require=[gate], out=tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="nothing to decide"):
        go(data, sequential=True)


def test_without_models_or_data_a_suite_says_so(data):
    with pytest.raises(UsageError, match="names no models"):
        runner.run(small(), data=data)
    with pytest.raises(UsageError, match="names no data"):
        runner.run(small(), models={"a": Counting()})


def test_a_model_that_answers_nan_in_the_middle_keeps_what_was_done(data, tmp_path):
    class Breaking(Counting):
        left = 10**9

        def forward(self, x):
            type(self).left -= len(x)
            return super().forward(x) * (math.nan if self.left < 0 else 1.0)

    go(data, models={"a": Breaking()}, out=tmp_path / "whole")
    Breaking.left = 400
    with pytest.raises(ModelError, match="NaN"):
        go(data, models={"a": Breaking()}, out=tmp_path / "run")
    kept = set((tmp_path / "run" / "rows").rglob("*.jsonl"))
    assert kept
    before = {path: path.read_bytes() for path in kept}
    Breaking.left = 10**9
    assert same(go(data, models={"a": Breaking()}, out=tmp_path / "run"), load(tmp_path / "whole"))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_on_a_full_disk_what_was_done_is_kept_and_the_same_call_goes_on(data, tmp_path, monkeypatch):
    whole = go(data, out=tmp_path / "whole")
    rows, replace = [], os.replace

    def full(source, target):
        rows.append(target)
        if len(rows) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        UsageError, match=r"^No space left on device; what was finished before is kept, and the same command goes on$"
    ):
        go(data, out=tmp_path / "run")
    monkeypatch.undo()
    kept = [path for path in rows[:9] if "rows" in path.parts]
    assert kept
    assert all(path.exists() for path in kept)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert same(go(data, out=tmp_path / "run"), whole)


def test_a_folder_of_its_own_is_gone_after_an_error(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def stop(status):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(data, report=stop)
    assert not list(tmp_path.iterdir())


def test_models_are_compared_on_the_blocks_that_all_have_finished(data, tmp_path):
    go(data, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    keys = {model: [cell["key"] for cell in about["cells"] if cell["model"] == model] for model in "ab"}
    (tmp_path / "run" / "rows" / keys["b"][2] / "00000008.jsonl").unlink()
    records = load(tmp_path / "run")
    seen = {model: set(records.clean[records.clean["model"] == model]["index"]) for model in "ab"}
    assert seen["a"] == seen["b"]
    assert len(seen["a"]) == 12
    assert any("2 of 6 blocks of examples are not finished for every model" in note for note in records.notes)
    # A model that has not begun takes nothing from the others.
    for key in keys["b"]:
        shutil.rmtree(tmp_path / "run" / "rows" / key)
    records = load(tmp_path / "run")
    assert (records.clean_accuracy("a").of, records.clean_accuracy("b").of) == (20, 0)


def test_what_the_checks_found_is_of_the_model_by_its_name_now(data, tmp_path):
    suite = small(checks=True, threats=(suitefile.Threat("linf", (0.05,), ("pgd(steps=4)",), ()),))
    go(data, suite, {"a": Counting()}, out=tmp_path / "run")
    path = next((tmp_path / "run" / "checks").iterdir())
    path.write_text(path.read_text().replace('"model": "a"', '"model": "old"'))
    assert {finding.model for finding in load(tmp_path / "run").findings} == {"a"}
    go(data, suite, {"a": Counting(), "b": Counting(1)}, out=tmp_path / "run")
    # What other models there are is part of what is checked.
    assert len(list((tmp_path / "run" / "checks").iterdir())) == 3


# Several processes.


def test_a_process_that_lost_the_others_says_so(monkeypatch):
    def lost():
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "barrier", lost)
    with pytest.raises(UsageError, match="another process of this run stopped"):
        engines.barrier()


def test_several_processes_need_a_folder_and_no_other_engine(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"give one \(out=\)"):
        go(data)
    with pytest.raises(UsageError, match="divided by one of them"):
        go(data, engine="ray", out=tmp_path / "run")


# What is in the files.


def some_rows(folder):
    return sorted((folder / "rows").rglob("*.jsonl"))[0]


def test_a_file_that_was_cut_is_computed_anew(data, tmp_path):
    whole = go(data, out=tmp_path / "run")
    for cut in (1, 40, None):
        path = some_rows(tmp_path / "run")
        content = path.read_bytes()
        path.write_bytes(content[:-cut] if cut else b"")
        notes = load(tmp_path / "run").notes
        assert any("not finished" in note for note in notes)
        assert same(go(data, out=tmp_path / "run"), whole)


def test_a_file_of_a_newer_version_and_a_damaged_one_are_told(data, tmp_path):
    go(data, out=tmp_path / "run")
    path = some_rows(tmp_path / "run")
    head, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(head), "format": 99}) + "\n" + rest)
    with pytest.raises(UsageError, match="has format 99"):
        load(tmp_path / "run")
    path.write_text("hello\nyou\n")
    with pytest.raises(UsageError, match="damaged"):
        load(tmp_path / "run")
    about = tmp_path / "run" / "benchmark.json"
    about.write_text(about.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UsageError, match="has format 2"):
        load(tmp_path / "run")
    with pytest.raises(UsageError, match="has format 2"):
        go(data, out=tmp_path / "run")


ROW = {"index": 3, "success": True, "distance": 0.1, "adversarial": 1, "forwards": 1, "backwards": 1, "checks": 1}


@pytest.mark.parametrize(
    "row",
    [
        {**ROW, "index": 10**30},
        {**ROW, "index": "3"},
        {**ROW, "index": 10**6},
        {**ROW, "success": 1},
        {**ROW, "distance": math.nan},
        {**ROW, "distance": math.inf},
        {**ROW, "forwards": 1.5},
        {"index": 3},
        [1, 2],
        7,
        None,
    ],
)
def test_a_row_that_no_attack_wrote_is_told(row, data, tmp_path):
    go(data, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    path = tmp_path / "run" / "rows" / about["cells"][1]["key"] / "00000000.jsonl"
    head = {**json.loads(path.read_text().split("\n", 1)[0]), "rows": 1}
    path.write_text(f"{json.dumps(head)}\n{json.dumps(row)}\n")
    # What is missing counts on what is there.
    last = [cell["key"] for cell in about["cells"] if cell["model"] == "a"][-1]
    for use in (load, lambda folder: go(data, out=folder)):
        with pytest.raises(UsageError, match="damaged") as error:
            use(tmp_path / "run")
        assert "\n" not in str(error.value)
        shutil.rmtree(tmp_path / "run" / "rows" / last, ignore_errors=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("cells", 1, "key"), "../../../etc"),
        (("models", 0, "checks"), "../../secret"),
        (("models", 0, "name"), 3),
        (("models",), {}),
        (("cells",), [1]),
        (("blocks",), ["0"]),
        (("families", "linf"), {"radii": ["a"], "attacks": []}),
        (("families",), []),
        (("gates",), {}),
        (("notes",), [None]),
        (("data", "high"), None),
        (("title",), None),
        (("seeds",), 0),
    ],
)
def test_a_description_that_no_run_wrote_is_told(path, value, data, tmp_path):
    go(data, out=tmp_path / "run")
    about = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    inner = about
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (tmp_path / "run" / "benchmark.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=f"damaged .its {path[0]} are not"):
        load(tmp_path / "run")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "{"])
def test_json_that_cannot_be_read_is_told(text, data, tmp_path):
    go(data, out=tmp_path / "run")
    some_rows(tmp_path / "run").write_text(f"{text}\n")
    with pytest.raises(UsageError, match="damaged"):
        load(tmp_path / "run")
    (tmp_path / "run" / "benchmark.json").write_text(text)
    with pytest.raises(UsageError, match="damaged"):
        load(tmp_path / "run")


def test_a_folder_of_something_else_is_refused(data, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        go(data, out=tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        go(data, out=tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="holds no run"):
        load(tmp_path)


def test_checks_are_kept(tmp_path):
    store = Store(tmp_path)
    finding = Finding(
        "zero-gradients", "suspect", "m", "linf(0.1)", "3 of 64 are zero.", "Look.", "advkit list attacks", {"n": 3}
    )
    assert store.read_checks("k") is None
    store.write_checks("k", [finding.to_json()])
    assert [Finding.from_json(one) for one in store.read_checks("k") or []] == [finding]
    with pytest.raises(UsageError, match="severity"):
        Finding.from_json({**finding.to_json(), "severity": "bad"})
    with pytest.raises(UsageError, match="field"):
        Finding.from_json({"check": "x"})
    for wrong in ({"model": 3}, {"numbers": []}, {"numbers": {"n": "3"}}):
        with pytest.raises(UsageError, match="texts and numbers"):
            Finding.from_json({**finding.to_json(), **wrong})


def test_models_on_the_command_line_have_a_name_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _models(["x=a.onnx", "lr=0.1/m.safetensors", "net.py:load"]) == {
        "x": "a.onnx",
        "lr": "0.1/m.safetensors",
        "net": "net.py:load",
    }
    (tmp_path / "lr=0.1").mkdir()
    assert _models(["lr=0.1"]) == {"lr=0": "lr=0.1"}
    with pytest.raises(UsageError, match=r"a/m.onnx and b/m.onnx are both called m; give each a name"):
        _models(["a/m.onnx", "b/m.onnx"])


# What does not fit.


class Narrow(Counting):
    """A network whose device has room for few rows."""

    room = 4

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved_and_no_row_is_lost(data):
    narrow = go(data, small(block=16), models={"a": Narrow()})
    wide = go(data, small(block=16), models={"a": Counting()})
    assert same_numbers(narrow, wide)
    direct = evaluate(Narrow(), data, threat="linf(0.05)", attacks=FGSM(), batch_size=4)
    assert evaluate(Narrow(), data, threat="linf(0.05)", attacks=FGSM(), batch_size=16).rows == direct.rows


def test_a_cpu_without_memory_is_a_lack_of_memory(data):
    class Greedy(Narrow):
        def forward(self, x):
            return super().forward(x) if len(x) <= self.room else torch.empty(10**15)

    assert same_numbers(go(data, models={"a": Greedy()}), go(data, models={"a": Counting()}))


def test_a_single_row_that_does_not_fit_is_told():
    def never(rows):
        raise torch.OutOfMemoryError("CUDA out of memory")

    fit = Fit(8)
    with pytest.raises(UsageError, match="single example"):
        fit.parts(torch.arange(5), never)
    assert fit.size == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def broken(rows):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        Fit(8).parts(torch.arange(5), broken)


# Killed, and divided.

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(784, 10)
    def forward(self, x):
        return 4 * self.layer(x.flatten(1))

def a(): return Net(0)
def b(): return Net(1)
"""


@pytest.fixture
def suite_file(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    text = (
        SUITE.replace("block = 8", 'block = 16\ndata = "mnist-5k"\nlimit = 96') + '[models]\na = "nets.py:a"\nb = "nets.py:b"\n'
    )
    (tmp_path / "suite.toml").write_text(text)
    return tmp_path


def command(*given):
    return [sys.executable, "-m", "advkit", "benchmark", "suite.toml", "--out", *given]


def start(folder, argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(argv, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def contents(folder):
    """Rows without times, examples, and the summary without times."""
    found = {}
    for path in sorted((folder / "rows").rglob("*.jsonl")):
        head, rows = path.read_text().split("\n", 1)
        timeless = {key: value for key, value in json.loads(head).items() if key not in ("seconds", "memory")}
        found[path.relative_to(folder)] = (timeless, rows)
    found |= {path.relative_to(folder): path.read_bytes() for path in sorted((folder / "examples").rglob("*.safetensors"))}
    summary = json.loads((folder / "report" / "summary.json").read_text())
    summary.pop("time")
    summary["run"].pop("command", None)
    return found | {"summary": json.dumps(summary)}


@pytest.mark.slow
def test_killed_twenty_times_and_resumed_the_result_is_the_same(suite_file):
    assert start(suite_file, command("whole")).wait() == 0
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        process = start(suite_file, command("killed"))
        time.sleep(rng.uniform(2.0, 6.0) if kills < 18 else rng.uniform(0.0, 3.0))
        if process.poll() is not None:
            # Finished before it could be killed: start over, so that every kill is of a run at work.
            subprocess.run(["rm", "-rf", "killed"], cwd=suite_file, check=True)
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert start(suite_file, command("killed")).wait() == 0
    assert contents(suite_file / "killed") == contents(suite_file / "whole")


@pytest.mark.slow
def test_two_processes_leave_the_rows_of_one(suite_file):
    assert start(suite_file, command("one")).wait() == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29511"]
    assert start(suite_file, [*launcher, *command("two")[1:]]).wait() == 0
    assert contents(suite_file / "two") == contents(suite_file / "one")


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_loses_nothing(data, tmp_path, monkeypatch):
    cluster = pytest.importorskip("ray", reason="Ray is not installed")
    flag = tmp_path / "died"

    class Dying(Counting):
        """Kills the first worker that is at work on it."""

        home = os.getpid()

        def forward(self, x):
            if os.getpid() != self.home and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(x)

    one = go(data, models={"a": Dying(), "b": Counting(1)})
    assert not flag.exists()
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    many = go(data, models={"a": Dying(), "b": Counting(1)}, engine="ray")
    assert flag.exists()
    assert not cluster.is_initialized()
    assert same(one, many)


@pytest.mark.slow
def test_what_goes_wrong_in_ray_is_said_in_a_sentence(data):
    pytest.importorskip("ray", reason="Ray is not installed")

    class Away(Counting):
        """Answers at home only."""

        home = os.getpid()

        def forward(self, x):
            return super().forward(x) * (1.0 if os.getpid() == self.home else math.nan)

    with pytest.raises(ModelError, match=r"^the model returned NaN for 8 of 8 examples; logits must be numbers$"):
        go(data, models={"a": Away()}, engine="ray")
    locked = Counting()
    locked.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"cannot be sent to workers \(cannot pickle '_thread.lock' object\)"):
        go(data, models={"a": locked}, engine="ray")
