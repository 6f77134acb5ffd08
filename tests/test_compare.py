"""Comparisons of two runs: the counts, the verdicts, what is announced, the command, and how often it is wrong."""

import argparse
import json
import math

import numpy as np
import pytest
import scipy.stats

import advkit
from advkit.benchmarks import coverage
from advkit.benchmarks.compare import HEADS, compare, verdicts
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.statistics import examples_needed, paired
from advkit.cli import compare as command
from advkit.data import load
from advkit.errors import UsageError
from advkit.models.networks import build
from tests.test_gates import distances, made

RADII = (0.5, 1.5)


def quantities(result):
    return [row.quantity for row in result.rows]


def by_name(result):
    return {row.quantity: row for row in result.rows}


def test_lost_and_gained_are_counted():
    old, new = [0, 0.2, 0.7, 1.0, 2.0, math.inf], [0.6, 0.7, 0.2, 1.1, math.inf, math.inf]
    rows = by_name(compare(made({"net": old}, radii=(0.5, None)), made({"net": new}, radii=(0.5, None))))
    assert list(rows) == ["clean", "robust[linf(0.5)]", "closest[linf]"]
    assert [(row.lost, row.gained, row.of) for row in rows.values()] == [(0, 1, 6), (1, 2, 6), (1, 4, 6)]
    assert (rows["clean"].before.count, rows["clean"].after.count) == (5, 6)
    assert rows["robust[linf(0.5)]"].difference == paired(1, 2, 6)
    # The greatest distance that was found is 2.
    closest = rows["closest[linf]"]
    assert (closest.before, closest.after) == pytest.approx((5.9 / 6, 6.6 / 6))
    assert closest.difference.value == pytest.approx(0.7 / 6)


def test_what_is_worse_better_and_neither():
    near, far = made({"net": distances(mean=1.4)}, radii=RADII), made({"net": distances(mean=1.6)}, radii=RADII)
    assert {row.verdict for row in compare(far, near).rows} == {"worse"}
    assert {row.verdict for row in compare(near, far).rows} == {"better"}
    assert compare(far, near).worse
    assert not compare(near, far).worse
    same = compare(near, near)
    assert {(row.verdict, row.p, row.needed) for row in same.rows} == {("no difference shown", 1.0, None)}
    assert not same.notes


def test_the_p_values_are_the_exact_ones_and_corrected():
    result = compare(made({"net": distances(seed=1)}, radii=RADII), made({"net": distances(seed=2)}, radii=RADII))
    p = [
        scipy.stats.binomtest(row.lost, row.lost + row.gained, alternative="greater").pvalue if row.lost + row.gained else 1
        for row in result.rows
    ]
    assert [row.p for row in result.rows] == pytest.approx(p)
    order = np.argsort(p)
    corrected = np.maximum.accumulate(np.minimum(1, np.array(p)[order] * [3, 2, 1]))
    assert [result.rows[i].corrected for i in order] == pytest.approx(list(corrected))


def test_so_many_examples_may_show_it():
    old, new = np.ones(200), np.ones(200)
    old[:4], new[:10] = 0, np.repeat([1, 0], [4, 6])
    row, _ = compare(made({"net": old}, radii=(0.5,)), made({"net": new}, radii=(0.5,))).rows
    assert (row.lost, row.gained, row.verdict) == (6, 4, "no difference shown")
    assert row.needed == examples_needed(0.03, 0.02, discordant=0.05, alpha=0.025, one_sided=True)
    assert f"{row.needed:,} examples" in row.cells()[-1]


def test_models_are_paired_by_name_or_as_told():
    base = made({"a": distances(), "b": distances(seed=1)})
    head = made({"b": distances(), "c": distances(seed=1)})
    result = compare(base, head)
    assert {(row.base, row.head) for row in result.rows} == {("b", "b")}
    assert result.notes == ("only in base, and not compared: a", "only in head, and not compared: c")
    told = compare(base, head, pairs={"a": "b", "b": "c"})
    assert {(row.base, row.head) for row in told.rows} == {("a", "b"), ("b", "c")}
    assert not told.notes
    assert all((row.lost, row.gained) == (0, 0) for row in told.rows)
    assert compare(base, head, pairs={}) == result
    one = compare(made({"old": distances()}), made({"new": distances()}))
    assert one.rows[0].cells()[0] == "old -> new"


@pytest.mark.parametrize(
    ("base", "head", "options", "says"),
    [
        (made({"a": [1.0]}), made({"a": [1.0]}), {"alpha": 0.5}, "alpha is 0.5"),
        (made({"a": [1.0]}), made({"a": [1.0]}), {"pairs": {"b": "a"}}, "known are a"),
        (made({"a": [1.0], "b": [1.0]}), made({"c": [1.0]}), {}, "--pair OLD=NEW"),
        (made({"a": [1.0]}), made({"a": [1.0]}, index=[7]), {}, "no example in common"),
    ],
)
def test_what_cannot_be_compared(base, head, options, says):
    with pytest.raises(UsageError, match=says):
        compare(base, head, **options)


def test_examples_with_other_labels_are_other_examples():
    head = made({"a": [1.0] * 5})
    head.clean["label"] += 1
    with pytest.raises(UsageError, match="label of example 0 is 0 in run and 1 in run"):
        compare(made({"a": [1.0] * 5}), head)


def test_examples_are_joined_by_their_numbers():
    found = distances(20)
    base = made({"a": found})
    head = made({"a": found[::-1][:12]}, index=range(19, 7, -1), data={"name": "data", "digest": "e"})
    result = compare(base, head)
    assert {(row.of, row.lost, row.gained) for row in result.rows} == {(12, 0, 0)}
    assert ["the data differ" in note for note in result.notes] == [True, False]
    assert "the 12 of both" in result.notes[1]


def test_a_search_and_a_radius_are_compared_at_the_radius():
    searched, inside = made({"a": distances()}), made({"a": distances()}, radii=RADII)
    assert quantities(compare(searched, inside)) == ["clean", "robust[linf(0.5)]", "robust[linf(1.5)]"]
    assert quantities(compare(inside, searched))[1:] == ["robust[linf(0.5)]", "robust[linf(1.5)]"]
    assert compare(searched, inside).notes == ("only in base, and not compared: closest[linf]",)
    rounded = made({"a": distances()}, radii=(0.5 * (1 + 1e-8), 2.0))
    result = compare(inside, rounded)
    assert quantities(result) == ["clean", "robust[linf(0.5)]"]
    assert result.notes[1] == "only in head, and not compared: robust[linf(2)]"


def test_other_threats_are_announced():
    result = compare(made({"a": distances()}, radii=RADII), made({"a": distances()}, family="l2"))
    assert quantities(result) == ["clean"]
    assert len(result.notes) == 2


def test_another_adversary_is_announced():
    base = made({"a": distances()}, access="gradients", seeds=[0], advkit="1")
    head = made({"a": distances()}, access="scores", seeds=[0, 1])
    head.about["families"]["linf"]["attacks"] = ["square"]
    notes = compare(base, head).notes
    assert [note.split(":")[0] for note in notes] == ["access", "seeds", "attacks in linf"]
    assert "gradients in base, scores in head" in notes[0]


def test_a_suspect_number_is_announced():
    finding = Finding("zero-gradients", "suspect", "a", "linf(0.5)", "e")
    (note,) = compare(made({"a": distances()}), made({"a": distances()}, findings=[finding, finding])).notes
    assert note == "a in head is suspect in linf: zero-gradients"


def test_a_run_that_stopped_is_announced():
    stopped = {"gates": {"require": ["clean >= 0.5"], "strict": False, "sequential": True}}
    fixed = {"gates": {"require": ["clean >= 0.5"], "strict": False, "sequential": False}}
    (note,) = compare(made({"a": distances()}, **fixed), made({"a": distances()}, **stopped)).notes
    assert note.startswith("head stopped when its gates were decided")


def test_where_nothing_was_broken_there_is_no_distance():
    unbroken = made({"a": [math.inf, math.inf, 0]})
    assert quantities(compare(unbroken, unbroken)) == ["clean"]
    assert quantities(compare(unbroken, made({"a": [math.inf, 2.0, 0]}))) == ["clean", "closest[linf]"]


def test_a_name_does_nothing_in_markdown():
    name = "a\n| <img src=x> @all [b](c)"
    lines = compare(made({name: [1.0]}, title=name), made({name: [1.0]}, title=name)).to_markdown().splitlines()
    assert len(lines) == 6
    assert lines[4].startswith("| a \\| \\<img src=x\\> @all \\[b\\](c) | clean |")


def test_a_millionth_is_no_difference():
    found = distances()
    result = compare(made({"a": found}), made({"a": found * (1 - 1e-8)}))
    assert {(row.lost, row.gained) for row in result.rows} == {(0, 0)}


def test_as_json_table_and_markdown():
    result = compare(made({"a|b": distances(mean=1.6)}, title="old"), made({"a|b": distances()}, title="new"))
    again = json.loads(json.dumps(result.to_json()))
    assert again["worse"]
    assert [row["lost"] for row in again["rows"]] == [row.lost for row in result.rows]
    assert again["rows"][0]["before"]["count"] == result.rows[0].before.count
    table = result.to_pandas()
    assert list(table["quantity"]) == quantities(result)
    assert table["low"].lt(table["difference"]).all()
    assert table["before"].dtype == float
    lines = result.to_markdown().splitlines()
    assert lines[0] == "**new** (head) beside **old** (base)"
    assert lines[2] == "| " + " | ".join(HEADS) + " |"
    assert lines[4].startswith("| a\\|b | clean | ")
    assert len(lines) == 4 + len(result.rows)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run of a network, and one of a network that answers worse."""
    root = tmp_path_factory.mktemp("runs")
    data = load("mnist-5k", limit=60)
    x, _ = data.batch(0, 60)
    model = build("mnist-mlp(width=16)")
    labels = model(x).argmax(1)
    noisy = lambda z: model(z + (z.mean((1, 2, 3), keepdim=True) > 0.12) * 5)
    for name, one in (("base", model), ("head", noisy)):
        options = {"threat": "linf(0.002)", "attacks": "fgsm", "quantize": False}
        advkit.evaluate(one, (x, labels), out=root / name, **options)
    return root


def main(*arguments):
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    given = parser.parse_args(["compare", *map(str, arguments)])
    return given.run(given)


def test_the_command(folders, capsys):
    base, head = folders / "base", folders / "head"
    assert main(base, base, "--fail-if-worse") == 0
    assert "nothing is shown to be worse" in capsys.readouterr().out
    assert main(base, head) == 0
    assert main(base, head, "--fail-if-worse", "--markdown", folders / "table.md") == 1
    said = capsys.readouterr().out
    assert "is worse than" in said
    assert "robust[linf(0.002)]" in said
    assert main(head, base, "--fail-if-worse", "--markdown", "-") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[2].split(" | ")[1:3] == ["quantity", "base"]
    written = (folders / "table.md").read_text(encoding="utf-8")
    assert written.count("| worse |") == 2


def test_a_model_of_the_same_name_is_named_once(capsys):
    far, near = made({"net": distances(mean=1.6)}, radii=RADII), made({"net": distances()}, radii=RADII)
    command.show(compare(far, near))
    assert capsys.readouterr().out.splitlines()[-1].startswith("net is worse in robust[linf(0.5)]; net is worse in")


def test_the_command_pairs_names_that_hold_equals_signs():
    base, head = made({"a=b": [1.0], "c": [1.0]}), made({"b=a": [1.0], "d": [1.0]})
    assert command.pairs(["a=b=b=a", "c=d"], base, head) == {"a=b": "b=a", "c": "d"}
    assert command.pairs(None, base, head) is None
    for given, says in ((["a=d"], "OLD=NEW"), (["c=d", "c=d"], "twice"), (["c"], "OLD=NEW")):
        with pytest.raises(UsageError, match=says):
            command.pairs(given, base, head)


def test_equal_models_are_seldom_called_worse():
    for correlation in (0.95, 0.999):
        corrected, single = coverage.alarms(120, 1000, correlation)
        assert corrected <= 120 * 0.1
        assert corrected < single


@pytest.mark.slow
def test_equal_models_are_called_worse_as_often_as_alpha_says():
    for alpha in (0.05, 0.2):
        corrected, _ = coverage.alarms(2000, 1000, 0.95, alpha=alpha)
        assert 0.4 * alpha <= corrected / 2000 <= 1.15 * alpha


def test_more_lines_need_more_evidence():
    assert verdicts([(12, 3)]) == ["worse"]
    assert verdicts([(12, 3), *[(0, 0)] * 4]) == ["no difference shown"] * 5
