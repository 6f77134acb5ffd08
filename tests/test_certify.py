"""``advkit certify``: rows that survive a kill, the interval, and the report that shows it."""

import json
import re
from dataclasses import dataclass

import jsonschema
import pandas as pd
import pytest
import torch
from torch import nn

import advkit
from advkit import UsageError
from advkit.benchmarks import certify as module
from advkit.benchmarks.certify import Certification, certify
from advkit.benchmarks.records import load, with_certificates
from advkit.benchmarks.report import report, summary
from advkit.cli import main
from advkit.defenses.certificates import CERTIFICATES, Certified
from advkit.models import checkpoint, networks
from tests.test_report import schema

SMOOTHING = "smoothing(sigma=0.2, n=100)"


@dataclass(frozen=True)
class Sure:
    """A certificate that is certain of everything, and so is wrong."""

    def __call__(self, model, x, y, threat, rng):
        eps = torch.full(y.shape, threat.eps)
        return Certified(torch.ones_like(y, dtype=torch.bool), model(x).argmax(1), eps, eps)


@pytest.fixture
def model():
    """(x_0 - x_1) / 2 decides: with l_inf, an example is robust at eps where |x_0 - x_1| > 2 eps."""
    network = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))
    return network.eval()


@pytest.fixture
def data():
    x = torch.rand(50, 2, generator=torch.Generator().manual_seed(0))
    y = (x[:, 1] > x[:, 0]).long()
    y[:4] = 1 - y[:4]
    return x, y


def robust(data, eps):
    x, y = data
    return ((x[:, 1] - x[:, 0]) * (2 * y - 1)) > 2 * eps


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# What is certified.


@pytest.mark.parametrize("method", ["ibp", "crown", "crown-ibp", "alpha-crown", "complete"])
def test_bounds_of_a_linear_model_are_exact(model, data, method):
    result = certify(model, data, threat="linf(0.1)", method=method)
    assert [row["certified"] for row in result.rows] == robust(data, 0.1).tolist()
    assert result.certified_accuracy.count == int(robust(data, 0.1).sum())
    assert result.accuracy.count == 46
    # Only complete verification looks for what breaks an example.
    assert (result.attacked_accuracy == result.certified_accuracy) == (method == "complete")
    assert (result.attacked_accuracy is None) == (method != "complete")
    assert result.violations == []
    assert {row["method"] for row in result.rows} == {method}


def test_the_interval_is_closed_where_bounds_and_attack_are_exact(model, data):
    result = certify(model, data, threat="linf(0.1)", attacks="pgd(steps=10)")
    assert result.attacked_accuracy == result.certified_accuracy
    assert result.robust_interval == (result.certified_accuracy.low, result.attacked_accuracy.high)
    assert result.table()["broken"].tolist() == (~robust(data, 0.1)).tolist()


def test_a_wrong_certificate_is_told_by_the_example(model, data):
    result = certify(model, data, threat="linf(0.1)", method=Sure(), attacks=["fgsm", "pgd(steps=5)"])
    assert result.violations == (~robust(data, 0.1)).nonzero().squeeze(1).tolist()
    assert result.run["method"] == "Sure()"


def test_smoothing_has_a_curve_and_a_mean_radius(model, data):
    result = certify(model, data, threat="l2(0.1)", method=SMOOTHING)
    radii = [row["radius"] if row["predicted"] == row["label"] else 0.0 for row in result.rows]
    assert result.mean_radius == pytest.approx(sum(radii) / 50)
    assert [row["eps"] for row in result.curve()][:2] == [0.05, 0.1]
    for row in result.curve():
        assert row["count"] == sum(radius >= row["eps"] for radius in radii)
    assert result.curve()[-1]["count"] == 0 < result.curve()[-2]["count"]
    assert result.curve()[1]["count"] == result.certified_accuracy.count
    assert result.abstained.count == sum(row["predicted"] == -1 for row in result.rows) > 0


def test_a_small_radius_does_not_make_a_long_curve(model, data):
    assert len(certify(model, data, threat="l2(0.001)", method=SMOOTHING).curve()) <= module.MOST_RADII


def test_certificates_without_radii_have_no_curve(model, data):
    result = certify(model, data, threat="linf(0.1)")
    assert result.curve() == []
    assert result.mean_radius is None


def test_an_attack_on_a_smoothed_model_is_judged_by_its_vote(model, data):
    result = certify(model, data, threat="l2(0.1)", method="smoothing(sigma=0.2, n=1000)", attacks="pgd(steps=10)")
    assert result.violations == []
    assert result.certified_accuracy.count < result.attacked_accuracy.count < 46
    x, y = data
    # g is the linear model itself, so its robust accuracy is known.
    exact = int((((x[:, 1] - x[:, 0]) * (2 * y - 1)) > 0.1 * 2**0.5).sum())
    assert result.certified_accuracy.count <= exact <= result.attacked_accuracy.count


def test_an_example_has_its_own_noise_whatever_comes_before(model, data):
    x, y = data
    whole = certify(model, data, threat="l2(0.1)", method=SMOOTHING)
    alone = advkit.data.from_tensors(x, y).select(torch.tensor([7, 30]))
    part = certify(model, alone, threat="l2(0.1)", method=SMOOTHING)
    assert without_seconds(part.rows) == without_seconds([whole.rows[7], whole.rows[30]])
    other = certify(model, alone, threat="l2(0.1)", method=SMOOTHING, seed=1)
    assert without_seconds(other.rows) != without_seconds(part.rows)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threat": "linf"}, "for a radius"),
        ({"threat": "rotation(10)"}, "l_p ball"),
        ({"threat": "l0(1)"}, "l_0"),
        ({"method": "crwn"}, "did you mean 'crown'"),
        ({"method": "smoothing(sigma=0)"}, "sigma"),
        ({"seed": -1}, "seed"),
        ({"limit": 0}, "limit"),
        ({"attacks": "pgdd"}, "pgd"),
        ({"device": "tpu"}, "device"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(model, data, given, says, tmp_path):
    x, y = data
    pictures = x.view(-1, 1, 1, 2), y
    with pytest.raises(UsageError, match=says):
        certify(nn.Sequential(nn.Flatten(), model), pictures, **{"threat": "linf(0.1)", "out": tmp_path / "run", **given})
    rows = tmp_path / "run" / "certificates.jsonl"
    assert not rows.exists() or not rows.read_text()


def test_bounds_need_a_network(data):
    with pytest.raises(UsageError, match="smoothing serves any model"):
        certify(lambda x: x, data, threat="linf(0.1)")
    assert len(certify(lambda x: x, data, threat="l2(0.1)", method=SMOOTHING).rows) == 50


# The folder.


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", ["crown", SMOOTHING])
def test_a_run_that_was_stopped_goes_on(model, data, tmp_path, method):
    threat = "l2(0.1)"
    whole = certify(model, data, threat=threat, method=method)
    asked = []

    def stop(share, text):
        asked.append(share)
        if share > 0.3:
            raise Killed

    with pytest.raises(Killed):
        certify(model, data, threat=threat, method=method, out=tmp_path, report=stop)
    path = tmp_path / "certificates.jsonl"
    kept = path.read_text().count("\n")
    assert 15 <= kept < 50
    path.write_text(path.read_text() + '{"index": 4')
    first = path.read_text().split("\n")[0]
    assert len(Certification.load(tmp_path).rows) == kept
    done = certify(model, data, threat=threat, method=method, out=tmp_path)
    assert path.read_text().split("\n")[0] == first
    assert without_seconds(done.rows) == without_seconds(whole.rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == done.rows == Certification.load(tmp_path).rows
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(done.summary()))
    # Once more computes nothing.
    asked.clear()
    certify(model, data, threat=threat, method=method, out=tmp_path, report=lambda *_: asked.append(1))
    assert asked == []


@pytest.mark.parametrize("change", [{"threat": "l2(0.2)"}, {"method": "ibp"}, {"seed": 1}, {"limit": 20}])
def test_another_run_in_the_folder_is_refused(model, data, tmp_path, change):
    certify(model, data, threat="l2(0.1)", method="crown", out=tmp_path)
    before = (tmp_path / "certificates.jsonl").read_text()
    with pytest.raises(UsageError, match="holds another run"):
        certify(model, data, **{"threat": "l2(0.1)", "method": "crown", "out": tmp_path, **change})
    assert (tmp_path / "certificates.jsonl").read_text() == before


def test_a_folder_of_something_else_is_refused(model, data, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="holds other files"):
        certify(model, data, threat="l2(0.1)", out=tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        certify(model, data, threat="l2(0.1)", out=tmp_path / "letter.txt")


def test_rows_of_the_wrong_kind_are_refused(model, data, tmp_path):
    certify(model, data, threat="l2(0.1)", out=tmp_path)
    path = tmp_path / "certificates.jsonl"
    path.write_text(path.read_text().replace('"certified": true', '"certified": "yes"', 1))
    with pytest.raises(UsageError, match="the certified of a row"):
        Certification.load(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1e999", "1" + 400 * "0"])
def test_numbers_that_are_none_are_refused(model, data, tmp_path, value):
    certify(model, data, threat="l2(0.1)", method=SMOOTHING, out=tmp_path)
    path = tmp_path / "certificates.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    rows[5] = re.sub(r'"radius": [^,]*', f'"radius": {value}', rows[5])
    path.write_text("".join(rows))
    with pytest.raises(UsageError, match="the radius of a row"):
        certify(model, data, threat="l2(0.1)", method=SMOOTHING, out=tmp_path)


def test_a_radius_that_is_missing_counts_as_none(model, data, tmp_path):
    certify(model, data, threat="l2(0.1)", method=SMOOTHING, out=tmp_path)
    path = tmp_path / "certificates.jsonl"
    path.write_text(re.sub(r'"radius": [^,]*', '"radius": null', path.read_text()))
    assert certify(model, data, threat="l2(0.1)", method=SMOOTHING, out=tmp_path).mean_radius == 0.0


def test_a_folder_in_which_nothing_was_done_takes_another_run(data, tmp_path):
    gelu = nn.Sequential(nn.Linear(2, 2), nn.GELU()).eval()
    with pytest.raises(UsageError, match="GELU"):
        certify(gelu, data, threat="l2(0.1)", out=tmp_path)
    assert len(certify(gelu, data, threat="l2(0.1)", method=SMOOTHING, out=tmp_path).rows) == 50


@pytest.mark.parametrize("line", ["{", "[]", '{"index": 0}', "[" * 100_000], ids=["cut", "list", "lacks", "deep"])
def test_damaged_rows_are_refused(model, data, tmp_path, line):
    certify(model, data, threat="l2(0.1)", out=tmp_path)
    path = tmp_path / "certificates.jsonl"
    path.write_text(line + "\n" + path.read_text())
    with pytest.raises(UsageError, match="damaged"):
        certify(model, data, threat="l2(0.1)", out=tmp_path)
    with pytest.raises(UsageError, match="damaged"):
        Certification.load(tmp_path)


# The report.


@pytest.fixture
def attacked(model, data, tmp_path):
    advkit.evaluate(model, data, threat="linf(0.1)", attacks="pgd(steps=5)", out=tmp_path / "run")
    return load(tmp_path / "run")


def test_a_report_shows_what_is_certified(model, data, attacked, tmp_path):
    certify(model, data, threat="linf(0.1)", out=tmp_path / "proof")
    both = with_certificates(attacked, [tmp_path / "proof"])
    exact = int(robust(data, 0.1).sum())
    assert both.certified("Sequential", "linf", 0.1).count == exact
    found = summary(both)
    jsonschema.validate(found, schema())
    (result,) = found["results"]
    assert result["certified"]["count"] == result["robust"]["count"] == exact
    report(both, tmp_path / "report")
    shown = f"certified {200 * exact / 100:.2f} %"
    assert shown in (tmp_path / "report" / "report.md").read_text()
    assert shown in (tmp_path / "report" / "report.html").read_text()
    assert pd.read_csv(tmp_path / "report" / "results.csv")["certified"].tolist() == [exact / 50]


def test_a_benchmark_has_the_same_examples_in_another_order(saved, tmp_path):
    suite = tmp_path / "suite.toml"
    suite.write_text('title = "small"\nlimit = 12\nattacks = ["fgsm"]\n[[threats]]\nthreat = "linf"\nradii = [0.01]\n')
    given = ["--model", saved, "--data", "mnist-5k"]
    assert main(["benchmark", str(suite), *given, "--out", str(tmp_path / "bench")]) == 0
    assert main(["certify", *given, "--threat", "linf(0.01)", "--limit", "12", "--out", str(tmp_path / "proof")]) == 0
    assert main(["report", str(tmp_path / "bench"), "--certificates", str(tmp_path / "proof")]) == 0
    found = json.loads((tmp_path / "bench" / "report" / "summary.json").read_text())
    proven = sum(row["certified"] for row in Certification.load(tmp_path / "proof").rows)
    assert [result["certified"]["count"] for result in found["results"]] == [proven]
    assert found["results"][0]["certified"]["of"] == 12


def test_a_report_without_certificates_says_nothing_of_them(attacked, tmp_path):
    report(attacked, tmp_path / "report")
    assert summary(attacked)["results"][0]["certified"] is None
    assert "certified" not in (tmp_path / "report" / "report.md").read_text()


def test_a_certificate_of_a_greater_radius_counts(model, data, attacked, tmp_path):
    certify(model, data, threat="linf(0.2)", out=tmp_path / "far")
    far = with_certificates(attacked, [tmp_path / "far"])
    assert far.certified("Sequential", "linf", 0.1).count == int(robust(data, 0.2).sum())
    certify(model, data, threat="linf(0.1)", out=tmp_path / "near")
    both = with_certificates(attacked, [tmp_path / "far", tmp_path / "near"])
    assert both.certified("Sequential", "linf", 0.1).count == int(robust(data, 0.1).sum())


def test_a_certified_example_that_was_broken_makes_the_number_suspect(model, data, attacked, tmp_path):
    certify(model, data, threat="linf(0.1)", method=Sure(), out=tmp_path / "proof")
    found = with_certificates(attacked, [tmp_path / "proof"]).suspect("Sequential", "linf")
    assert [finding.check for finding in found] == ["certificate"]
    assert f"{int((~robust(data, 0.1)).sum())} examples are certified and were broken: 0, 1, 2, 3," in found[0].evidence


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": SMOOTHING, "threat": "linf(0.01)"}, "under noise"),
        ({"limit": 20}, "other examples"),
        ({"threat": "linf(0.05)"}, "measured are linf\\(0.1\\)"),
        ({"threat": "l2(0.1)"}, "measured are linf\\(0.1\\)"),
        ({"threat": "linf(0.1, low=0.0, high=0.9995)"}, "less than the data's range"),
    ],
)
def test_certificates_of_something_else_are_refused(model, data, tmp_path, change, says):
    data[0].clamp_(max=0.999)
    advkit.evaluate(model, data, threat="linf(0.1)", attacks="pgd(steps=5)", out=tmp_path / "run")
    certify(model, data, **{"threat": "linf(0.1)", "out": tmp_path / "proof", **change})
    with pytest.raises(UsageError, match=says):
        with_certificates(load(tmp_path / "run"), [tmp_path / "proof"])


def test_certificates_of_another_model_are_refused(model, data, attacked, tmp_path):
    certify(nn.Sequential(*model, nn.Identity()), data, threat="linf(0.1)", method=Sure(), out=tmp_path / "proof")
    with pytest.raises(UsageError, match="another model"):
        with_certificates(attacked, [tmp_path / "proof"])


def test_a_folder_without_certificates_is_refused(attacked, tmp_path):
    with pytest.raises(UsageError, match="holds no certificates"):
        with_certificates(attacked, [tmp_path / "run"])
    certify_run = {"method": "crown", "threat": "linf(0.1)", "model": "m", "data": {"digest": "d"}}
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text(json.dumps(certify_run))
    (tmp_path / "odd" / "certificates.jsonl").write_text("")
    with pytest.raises(UsageError, match="damaged"):
        with_certificates(attacked, [tmp_path / "odd"])


# The command.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    checkpoint.save(path, networks.build("mnist-mlp(width=8)"), "mnist-mlp(width=8)")
    return str(path)


def test_the_command_prints_the_interval_and_the_report_takes_it(saved, tmp_path, capsys):
    out = str(tmp_path / "proof")
    given = ["--model", saved, "--data", "mnist-5k", "--threat", "linf(0.001)", "--limit", "20"]
    assert main(["certify", *given, "--attack", "fgsm", "--out", out]) == 0
    said = capsys.readouterr().out
    for part in ("crown", "certified accuracy", "not known to be broken", "(certified) to"):
        assert part in said
    assert main(["report", out + "/attack", "--certificates", out]) == 0
    assert "certified" in (tmp_path / "proof" / "attack" / "report" / "report.md").read_text()
    assert main(["certify", *given, "--method", "ibp", "--out", out]) == 2
    assert "holds another run (other method)" in capsys.readouterr().err


def test_the_command_draws_the_curve_of_smoothing(saved, tmp_path, capsys):
    given = ["--model", saved, "--data", "mnist-5k", "--threat", "l2(0.1)", "--limit", "10", "--out", str(tmp_path / "proof")]
    assert main(["certify", *given, "--method", "smoothing(n=50)"]) == 0
    said = capsys.readouterr().out
    for part in ("abstained", "mean certified radius", "certified accuracy over the radius"):
        assert part in said
    assert (tmp_path / "proof" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_is_loud_about_a_wrong_certificate(saved, monkeypatch, capsys):
    monkeypatch.setitem(CERTIFICATES, "sure", Sure)
    given = ["--model", saved, "--data", "mnist-5k", "--threat", "linf(0.3)", "--limit", "3", "--method", "sure"]
    assert main(["certify", *given, "--attack", "pgd(steps=5)"]) == 1
    said = capsys.readouterr().err
    assert said.count("is certified and was broken; this is an error of the program") == 3
