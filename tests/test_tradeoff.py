"""Families of networks: what is trained, kept, compared and drawn."""

import json
import math

import pandas as pd
import pytest

from advkit import UsageError
from advkit.benchmarks.statistics import student
from advkit.benchmarks.tradeoff import Member, Tradeoff, draw, family, tradeoff
from advkit.cli import main
from advkit.data import load
from advkit.train import Recipe

NETWORK = "mnist-mlp(width=8)"


def _row(member, seed, clean, robust):
    return {"member": member, "seed": seed, "clean": [clean, 100], "robust": {"linf(eps=0.1)": [robust, 50]}, "seconds": 2.0}


@pytest.fixture
def result():
    rows = [_row("plain", 0, 90, 5), _row("a", 0, 92, 25), _row("plain", 1, 80, 6), _row("a", 1, 84, 30)]
    return Tradeoff({}, ("plain", "a"), ("linf(eps=0.1)",), tuple(rows))


def test_students_interval():
    # The 97.5 % point of Student's t with four degrees of freedom is 2.776.
    found = student([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764 * math.sqrt(2.5 / 5)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0 - half, 3.0 + half), abs=1e-3)
    assert student([0.5]).high == math.inf
    with pytest.raises(UsageError, match="there are no numbers"):
        student([])


def test_members_are_compared_seed_by_seed(result):
    assert result.accuracy("plain").value == pytest.approx(0.85)
    assert result.accuracy("a", "linf(eps=0.1)").value == pytest.approx(0.55)
    # Seeds differ by 10 points, and the members by 2 and 4: the paired interval is the narrower one.
    difference = result.difference("a")
    assert difference.value == pytest.approx(0.03)
    assert difference.high - difference.low == pytest.approx(2 * 12.706 * 0.01, rel=1e-3)
    assert result.accuracy("a").high - result.accuracy("a").low > 3 * (difference.high - difference.low)


def test_a_seed_that_only_one_has_is_not_compared(result):
    rows = (*result.rows, _row("a", 2, 10, 0))
    assert Tradeoff({}, result.members, result.at, rows).difference("a").value == pytest.approx(0.03)


def test_the_table_and_the_picture(result, tmp_path):
    table = result.table()
    assert table["linf(eps=0.1)"].tolist() == [0.1, 0.5, 0.12, 0.6]
    draw(result, tmp_path / "t.svg")
    text = (tmp_path / "t.svg").read_text()
    assert text.startswith("<?xml")
    assert len(text) > 10_000


def test_a_family_is_every_loss_with_every_threat():
    data = load("mnist-5k", split="train", limit=20)
    members = family(["plain", "fgsm", "gaussian(sigma=0.1)"], ["linf(0.1)", "linf(0.2)"], data)
    assert members == (
        Member("plain", None),
        Member("fgsm", "linf(0.1)"),
        Member("fgsm", "linf(0.2)"),
        Member("gaussian(sigma=0.1)", None),
    )
    assert family(["pgd(steps=3) linf(0.3)", "fgsm"], ["linf(0.1)"], data) == (
        Member("pgd(steps=3)", "linf(0.3)"),
        Member("fgsm", "linf(0.1)"),
    )
    assert family(["plain", "fgsm  l2(eps=1)"], [], data) == (Member("plain", None), Member("fgsm", "l2(eps=1)"))
    with pytest.raises(UsageError, match="the defense fgsm needs a threat model"):
        family(["plain", "fgsm"], [], data)
    assert [str(member) for member in members[:2]] == ["plain", "fgsm linf(0.1)"]


GIVEN = [
    "tradeoff",
    "--model",
    NETWORK,
    "--data",
    "mnist-5k",
    "--defense",
    "plain",
    "--defense",
    "fgsm",
    "--threat",
    "linf(0.05)",
]
QUICK = [*GIVEN, "--attack", "fgsm", "--limit", "20", "--epochs", "1"]


def _run(*arguments, capsys):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_extends_what_is_there(tmp_path, capsys):
    out = tmp_path / "family"
    code, said, _ = _run(*QUICK, "--seeds", 1, "--out", out, capsys=capsys)
    assert code == 0
    assert "fgsm linf(0.05)" in said
    first = (out / "rows.jsonl").read_text()
    assert len(first.splitlines()) == 2
    code, said, _ = _run(*QUICK, "--seeds", 2, "--out", out, capsys=capsys)
    rows = (out / "rows.jsonl").read_text()
    assert rows.startswith(first)
    assert len(rows.splitlines()) == 4
    assert "mean of 2 seeds" in said
    assert (out / "tradeoff.png").stat().st_size > 5000
    assert len(pd.read_csv(out / "tradeoff.csv")) == 4
    summary = json.loads((out / "summary.json").read_text())
    assert [member["member"] for member in summary["members"]] == ["plain", "fgsm linf(0.05)"]
    # A row that was lost is measured again from its checkpoint, and is the same but for nothing.
    (out / "rows.jsonl").write_text(first)
    _run(*QUICK, "--seeds", 2, "--out", out, capsys=capsys)
    again = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    for new, old in zip(again, map(json.loads, rows.splitlines()), strict=True):
        assert {**new, "seconds": None} == {**old, "seconds": None}
    code, _, err = _run(*QUICK, "--lr", 0.01, "--out", out, capsys=capsys)
    assert (code, "holds another run (other recipe)" in err) == (2, True)


def test_a_stopped_family_goes_on(tmp_path):
    data, test = load("mnist-5k", split="train", limit=600), load("mnist-5k", limit=20)
    given = {"defenses": ["plain", "fgsm"], "threats": ["linf(0.05)"], "attack": "fgsm", "seeds": [0]}
    whole = tradeoff(NETWORK, data, test, out=tmp_path / "whole", **given)

    def stop(share, text):
        if "fgsm linf(0.05), seed 0: epoch 2" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tradeoff(NETWORK, data, test, out=tmp_path / "parts", report=stop, **given)
    assert len((tmp_path / "parts" / "rows.jsonl").read_text().splitlines()) == 1
    parts = tradeoff(NETWORK, data, test, out=tmp_path / "parts", **given)
    assert [{**row, "seconds": 0} for row in parts.rows] == [{**row, "seconds": 0} for row in whole.rows]
    assert parts.rows[1]["seconds"] is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seeds", "0"], "--seeds is 0; it should be at least 1, a whole number"),
        (["--defense", "nothing"], "unknown defense 'nothing'"),
        (["--at", "linf"], "searches inside a fixed radius"),
        (["--model", "resnet"], "unknown network 'resnet'"),
        (["--threat", "linf(3)"], "no two inputs are further apart than 1"),
        (["--attack", "nothing"], "unknown attack 'nothing'"),
        (["--limit", "0"], "the limit is 0; it should be at least 1"),
        (["--device", "gpu"], "cannot use the device 'gpu'"),
        (["--defense", "plain linf(0.1)"], "plain linf(0.1) names a threat model and plain knows no adversary"),
        (["--lr", "1e30"], "plain, seed 0: the loss became NaN in epoch 1"),
    ],
)
def test_bad_input_is_one_sentence(options, sentence, tmp_path, capsys):
    code, out, err = _run(*QUICK, *options, "--out", tmp_path / "family", capsys=capsys)
    assert (code, out) == (2, "")
    assert sentence in err.replace("\n", " ")


@pytest.mark.parametrize(
    "change",
    [
        {"robust": 5},
        {"robust": ["linf(eps=0.05)"]},
        {"robust": {"linf(eps=0.05)": None}},
        {"robust": {"linf(eps=0.3)": [1, 2]}},
        {"clean": "ab"},
        {"clean": [0, 0]},
        {"clean": [20, 10]},
        {"member": ["plain"]},
        {"seed": "0"},
        {"seconds": "1"},
        {"seconds": math.nan},
    ],
    ids=str,
)
def test_rows_that_nobody_wrote_are_refused(change, tmp_path):
    given = {"network": NETWORK, "data": load("mnist-5k", split="train", limit=20), "test": load("mnist-5k", limit=5)}
    more = {"defenses": ["plain"], "threats": ["linf(0.05)"], "attack": "fgsm", "seeds": [0], "recipe": Recipe(epochs=1)}
    result = tradeoff(**given, **more, out=tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(result.rows[0] | change) + "\n")
    with pytest.raises(UsageError, match=r"rows.jsonl is damaged \(a row is of other threat models, or holds no counts\)"):
        tradeoff(**given, **more, out=tmp_path)
    (tmp_path / "rows.jsonl").write_text(2 * (json.dumps(result.rows[0]) + "\n"))
    with pytest.raises(UsageError, match=r"rows.jsonl is damaged \(a network has two rows\)"):
        tradeoff(**given, **more, out=tmp_path)


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = _run(*QUICK, "--out", tmp_path, capsys=capsys)
    assert (code, "holds other files" in err) == (2, True)
    (tmp_path / "file").write_text("")
    code, _, err = _run(*QUICK, "--out", tmp_path / "file", capsys=capsys)
    assert (code, "is a file; --out should be a folder" in err) == (2, True)
