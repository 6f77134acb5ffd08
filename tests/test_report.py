"""The report: every format parsed back says what the records say, whatever the names are."""

import argparse
import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
import wave
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advkit.benchmarks import ci, gallery, plots
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.gates import Decision
from advkit.benchmarks.ledger import alone, ledger, plan_order
from advkit.benchmarks.records import Records, Shown
from advkit.benchmarks.report import FILES, _markdown, append_step_summary, headline, marked_down, page, report, summary
from advkit.benchmarks.statistics import Estimate, rate
from advkit.cli import report as command
from advkit.errors import UsageError

ROOT = Path(__file__).parents[1]
HOSTILE = '<script>alert("x")</script> | `a` \x07 $\\pm$ _b_'
NAMES = ("plain", HOSTILE)
N, ATTACKS, RADII, SEEDS = 12, ("fgsm", 'pgd(loss="dlr")', "square"), (0.1, 0.2), (0, 1)


def rows(together, rng):
    """Attempts inside two radii of l_inf and in a search in l_2; robust accuracy falls with the radius."""
    tries, costs = [], []
    for m, model in enumerate(NAMES):
        hardness = rng.uniform(0.02 + 0.05 * m, 0.3, N)
        for family, eps, attacks in [("linf", e, ATTACKS) for e in RADII] + [("l2", math.inf, ATTACKS[1:])]:
            for seed in SEEDS:
                left = set(range(1, N))
                for a, attack in enumerate(attacks):
                    at = {"model": model, "family": family, "eps": eps, "attack": attack, "seed": seed, "start": 0}
                    for i in sorted(left):
                        distance = hardness[i] + 0.1 * ((i + a) % 3) + 0.01 * seed
                        won = bool(distance <= eps)
                        passes = {"forwards": 3 + 10 * a - won, "backwards": 2 * a, "checks": 1}
                        found = {"success": won, "distance": distance if won else math.inf, "adversarial": 7 if won else -1}
                        tries.append({**at, "index": i, **found, **passes})
                        if won and not together and eps < math.inf:
                            left.remove(i)
                    costs.append({**at, "examples": N - 1, "seconds": 0.5 + a, "memory": 2**21})
    return pd.DataFrame(tries), pd.DataFrame(costs)


def make(*, together=True, kind="image"):
    """Records of two models, l_inf with two radii and l_2 searched, two seeds; the first example is wrong."""
    rng = np.random.default_rng(0)
    tries, costs = rows(together, rng)
    clean = [
        {"model": m, "start": 0, "index": i, "label": 3, "clean": 3 * (i > 0), "correct": i > 0}
        for m in NAMES
        for i in range(N)
    ]
    shape = {"image": (1, 5, 5), "waveform": (400,), "features": (6,)}[kind]

    def kept(model, family):
        won = tries[(tries["model"] == model) & (tries["family"] == family) & tries["success"]]
        x = torch.linspace(-0.5, 0.5, math.prod(shape)).reshape(shape) if kind == "waveform" else torch.full(shape, 0.5)
        return [Shown(model, family, r.attack, r.index, 3, 7, r.distance, x, x + 0.1 * x.sign()) for r in won.itertuples()]

    models = [
        {"name": n, "spec": f"{n}.safetensors", "digest": f"{i}" * 64, "training_seconds": 60.0 * i}
        for i, n in enumerate(NAMES)
    ]
    about = {
        "data": {
            "name": "digits",
            "digest": "d" * 64,
            "examples": N,
            "kind": kind,
            "low": -1.0 if kind == "waveform" else 0.0,
            "high": 1.0,
        },
        "models": models,
        "families": {
            "linf": {"radii": [*RADII], "attacks": [*ATTACKS]},
            "l2": {"radii": [None], "attacks": [*ATTACKS[1:]]},
        },
        "seeds": [*SEEDS],
        "alone": together,
        "advkit": "0.2.0",
        "torch": "2.9.0",
        "command": "advkit benchmark s.toml --out run",
    }
    findings = (
        Finding(
            "zero-gradients",
            "suspect",
            HOSTILE,
            "linf(0.2)",
            "9 of 12 are 0",
            "It masks.",
            "advkit attack x",
            {"zero": 9, "ratio": math.inf},
        ),
        Finding("converged", "warning", "plain", "l2", "still falling", "Take more steps."),
        Finding("same-answers", "fine", "plain", "linf(0.1)", "all agree"),
    )
    return Records("A <b>bold</b> title", about, pd.DataFrame(clean), tries, costs, findings, ("a note",), gallery=kept)


DECISIONS = (
    Decision("robust[linf(0.2)] >= 0.45", HOSTILE, rate(1, 12), "failed", True, None, False, "it is <too> low"),
    Decision("median[l2] >= 0.1", "plain", Estimate(0.3, 0.2, math.inf), "passed", False, None, True, "it is far"),
    Decision("clean >= 0.9", "plain", rate(11, 12), "undecided", False, 900, True, "900 examples would decide it"),
)


@pytest.fixture(scope="module")
def records():
    return make()


@pytest.fixture(scope="module")
def out(records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    report(records, folder, DECISIONS)
    return folder


@pytest.fixture(scope="module")
def found(out):
    return json.loads((out / "summary.json").read_text())


def schema():
    return json.loads((ROOT / "benchmarks/summary.schema.json").read_text())


def as_rate(row):
    return rate(row["count"], row["of"])


def test_summary_says_what_the_records_say(records, found):
    assert [as_rate(m["clean"]) for m in found["models"]] == [records.clean_accuracy(m) for m in records.models]
    expected = {(m, f, eps) for f in records.families for eps in records.steps(f) for m in records.models}
    assert {(r["model"], r["family"], r["eps"]) for r in found["results"]} == expected
    for row in found["results"]:
        place = row["model"], row["family"], row["eps"]
        assert as_rate(row["robust"]) == records.robust(*place)
        assert [as_rate(seed) for seed in row["seeds"]] == list(records.spread(*place))
        assert row["suspect"] == (place[:2] == (HOSTILE, "linf"))
    for family in found["families"]:
        for area in family["areas"]:
            assert area["value"] == pytest.approx(records.area(area["model"], family["family"]))
    assert [r["threat"] for r in found["results"] if r["family"] == "linf" and r["headline"]] == ["linf(0.2)"] * 2
    assert [gate["verdict"] for gate in found["gates"]] == ["failed", "passed", "undecided"]
    assert [gate["value"] for gate in found["gates"]] == pytest.approx([1 / 12, 0.3, 11 / 12])
    assert found["gates"][1]["high"] is None


def test_summary_is_valid_and_another_is_not(found, records):
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(found, schema())
    jsonschema.validate(summary(make(together=False)), schema())
    for wrong in (
        {**found, "more": 1},
        {**found, "schema": "advkit/benchmark/2"},
        {name: part for name, part in found.items() if name != "time"},
        {**found, "models": [{**found["models"][0], "clean": {**found["models"][0]["clean"], "value": 1.5}}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())


def test_docs_describe_every_field_of_the_summary():
    page = (ROOT / "docs/report.md").read_text(encoding="utf-8")
    said = set(re.findall(r"^\| `([^`]+)` \|", page.split("## summary.json")[1].split("\n## ")[0], re.MULTILINE))
    assert said == set(fields(schema())) | {f"rate.{name}" for name in schema()["$defs"]["rate"]["properties"]}


def fields(part, prefix=""):
    """The dotted paths of the values in a schema."""
    part = next((kind for kind in part.get("anyOf", [part]) if kind.get("type") != "null"), part)
    if "properties" in part:
        return [path for name, inner in part["properties"].items() for path in fields(inner, f"{prefix}.{name}".lstrip("."))]
    inner = part.get("items", {})
    return fields(inner, f"{prefix}[]") if "properties" in inner else [prefix]


def test_only_time_depends_on_time(records):
    slower = dataclasses.replace(records, costs=records.costs.assign(seconds=99.0, memory=1))
    a, b = summary(records, DECISIONS), summary(slower, DECISIONS)
    assert a.pop("time") != b.pop("time")
    assert json.dumps(a) == json.dumps(b)


def test_the_same_run_gives_the_same_files(records, out, tmp_path):
    again = report(make(), tmp_path, DECISIONS)
    assert [path.read_bytes() for path in again] == [(out / path.name).read_bytes() for path in again]


def test_results_csv(records, out):
    table = pd.read_csv(out / "results.csv")
    assert list(table["model"].unique()) == list(NAMES)
    for row in table.to_dict("records"):
        robust = records.robust(row["model"], row["family"], row["eps"])
        assert (row["count"], row["of"], row["robust"]) == (robust.count, robust.of, pytest.approx(robust.value))
        assert (row["robust_low"], row["robust_high"]) == pytest.approx((robust.low, robust.high))
        assert row["clean"] == pytest.approx(records.clean_accuracy(row["model"]).value)
        assert row["suspect"] == bool(records.suspect(row["model"], row["family"]))
        by_attack = [row[f"robust to {a} alone"] for a in records.attacks(row["family"])]
        assert min(by_attack) >= row["robust"]
    assert table[table["family"] == "l2"]["robust to fgsm alone"].isna().all()


def test_examples_csv_has_a_row_an_attempt(records, out):
    table = pd.read_csv(out / "examples.csv")
    assert len(table) == len(records.tries)
    assert (table["label"] == 3).all()
    assert table["distance"].isna().equals(~table["success"])
    assert table["forwards"].sum() == records.tries["forwards"].sum()
    assert set(table["eps"]) == {0.1, 0.2, math.inf}


def test_junit(records, out, found):
    root = ElementTree.parse(out / "junit.xml").getroot()
    gates, robustness = root.findall("testsuite")
    assert (gates.get("tests"), gates.get("failures"), robustness.get("failures")) == ("3", "1", "0")
    failed = [case for case in root.iter("testcase") if case.find("failure") is not None]
    assert [case.get("name") for case in failed] == ["robust[linf(0.2)] >= 0.45"]
    assert "suspect" in failed[0].find("system-out").text
    assert len(robustness) == len(found["results"])
    for case, row in zip(robustness, found["results"], strict=True):
        assert case.get("name") == row["threat"]
        said = case.find("system-out").text
        assert str(records.robust(row["model"], row["family"], row["eps"])) in said
        assert ("suspect" in said) == row["suspect"]
    assert "\x07" not in (out / "junit.xml").read_text()


def test_sarif(out):
    log = json.loads((out / "report.sarif").read_text())
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert log["version"] == "2.1.0"
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("zero-gradients", "error"),
        ("converged", "warning"),
        ("gate", "error"),
    ]
    assert all(rules[r["ruleIndex"]]["id"] == r["ruleId"] for r in run["results"])
    assert rules[0]["help"]["text"] == "It masks."
    assert "9 of 12 are 0; It masks.; next: advkit attack x" in run["results"][0]["message"]["text"]
    assert len({r["partialFingerprints"]["advkit/v1"] for r in run["results"]}) == 3
    uri = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
    assert re.fullmatch(r"[A-Za-z0-9%./_~-]+", uri)


def markdown_rows(text):
    """The cells of the tables of a Markdown text, unescaped."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_markdown(records, out):
    text = (out / "report.md").read_text()
    assert "<script" not in text.replace("\\<", "")
    cells = markdown_rows(text)
    name = ci.printable(" ".join(HOSTILE.split()))
    (row,) = [row for row in cells if row[0] == name and len(row) == 6 and "%" in row[1]][:1]
    for cell, eps in zip(row[2:4], RADII, strict=True):
        assert cell == f"{records.robust(HOSTILE, 'linf', eps)} (**suspect**)"
    assert row[1] == str(records.clean_accuracy(HOSTILE))
    heads = [row for row in cells if row[0] in ("model", "gate", "attack")]
    assert [len(cells[cells.index(head) + 1]) for head in heads] == [len(head) for head in heads]


@settings(max_examples=40)
@given(st.text(max_size=40))
def test_marked_down_text_says_the_same_and_is_inert(text):
    safe = marked_down(text)
    assert re.sub(r"\\(.)", r"\1", safe) == ci.printable(" ".join(text.split()))
    assert not re.search(r"(?<!\\)(?:\\\\)*[<|`\[]", safe)


class Reader(HTMLParser):
    """What a page has: its tags, its text, and what it would load."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.loads = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "poster", "data") or (k.endswith("href") and tag != "a")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_fetches_nothing_and_runs_only_its_own_script(out):
    text = (out / "report.html").read_text()
    parts = Reader(text)
    assert all(link.startswith(("data:", "#")) for link in parts.loads)
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert [tag for tag, _ in parts.tags].count("script") == 1
    assert not any(name.startswith("on") for _, attrs in parts.tags for name in attrs)
    assert HOSTILE in "".join(parts.text)


def test_the_page_says_what_the_records_say(records, out):
    text = " ".join("".join(Reader((out / "report.html").read_text()).text).split())
    for eps in RADII:
        for model in NAMES:
            value = records.robust(model, "linf", eps)
            doubt = "suspect " if model == HOSTILE else ""
            said = f"{doubt}{100 * value.value:.2f} %[{100 * value.low:.2f}, {100 * value.high:.2f}]"
            assert said in text.replace("% [", "%[")
    assert "Only this attack broke these" in text
    assert "Every model fell for these" in text


def test_every_identifier_of_a_drawing_is_on_the_page_once_or_alike(out):
    text = (out / "report.html").read_text()
    drawings = re.findall(r'<svg class="plot".*?</svg>', text, re.DOTALL)
    assert len(drawings) == 6
    for drawing in drawings:
        own = set(re.findall(r' id="([^"]+)"', drawing))
        used = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', drawing))
        assert {a or b for a, b in used} <= own
    assert "#000000" not in "".join(drawings)


def test_a_chain_says_who_came_first():
    records = make(together=False)
    spent = ledger(records, "plain", "linf", 0.2)
    tries = records.tries[(records.tries["model"] == "plain") & (records.tries["eps"] == 0.2)]
    assert sum(one.own for one in spent) == tries[tries["success"]]["index"].nunique()
    assert spent[0].own == spent[0].broke
    assert spent[-1].alone is None
    assert plan_order(records, "linf") is None


def test_alone_counts_what_no_other_attack_broke(records):
    closest = {a: records.closest("plain", "linf", attack=a) for a in ATTACKS}
    for one in ledger(records, "plain", "linf", 0.1):
        others = [closest[a] > 0.1 for a in ATTACKS if a != one.attack]
        wins = records.tries[(records.tries["model"] == "plain") & (records.tries["eps"] == 0.1) & records.tries["success"]]
        sets = {a: set(wins[wins["attack"] == a]["index"]) for a in ATTACKS}
        rest = set().union(*(sets[a] for a in ATTACKS if a != one.attack))
        assert one.own == len(sets[one.attack] - rest)
        assert one.broke == len(sets[one.attack])
        assert len(others) == 2
        assert one.alone == alone(records, "plain", "linf", [0.1])[0.1, one.attack]
        assert one.passes == one.forwards + one.backwards
        assert one.seconds == 2 * (0.5 + ATTACKS.index(one.attack))


def test_in_a_search_the_closest_counts(records):
    spent = ledger(records, "plain", "l2", math.inf)
    assert sum(one.own for one in spent) == N - 1
    assert all(one.alone is None for one in spent)


def planned(broken, passes):
    """Records of one model in which attack k breaks the examples broken[k] at passes[k] forward passes each."""
    base, names = make(), list("abcdef")[: len(broken)]
    tries = [
        {"model": "plain", "family": "linf", "eps": 0.1, "attack": a, "seed": 0, "start": 0, "index": i, "success": i in b}
        | {"distance": 0.1 if i in b else math.inf, "adversarial": 1, "forwards": p, "backwards": 0, "checks": 0}
        for a, b, p in zip(names, broken, passes, strict=True)
        for i in range(1, N)
    ]
    about = {
        **base.about,
        "models": base.about["models"][:1],
        "seeds": [0],
        "families": {"linf": {"radii": [0.1], "attacks": names}},
    }
    return dataclasses.replace(base, about=about, tries=pd.DataFrame(tries))


def test_the_planner_takes_first_what_breaks_most_per_pass():
    order = plan_order(planned([{1, 2}, {3, 4, 5, 6, 7, 8}, {1}], [10, 1, 2]), "linf")
    assert [(s.attack, s.broke, s.passes) for s in order.steps] == [("b", 6, 11), ("c", 1, 10), ("a", 1, 40)]
    # In the order given: 11 at 10, then 9 at 1, then 3 at 2.
    assert (order.given, order.passes, order.needless) == (125, 61, ())
    assert order.saving == pytest.approx(1 - 61 / 125)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, N - 1)), st.integers(1, 50)), min_size=2, max_size=4))
def test_an_order_has_every_attack_once_and_breaks_what_all_break(attacks):
    broken, passes = zip(*attacks, strict=True)
    order = plan_order(planned(broken, passes), "linf")
    assert sorted(step.attack for step in order.steps) == list("abcdef")[: len(attacks)]
    assert sum(step.broke for step in order.steps) == len(set().union(*broken))
    assert order.needed <= order.passes
    firsts = [len(b) / (p * (N - 1)) for b, p in attacks]
    first = order.steps[0]
    assert first.broke / first.passes == pytest.approx(max(firsts))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, N - 1)), st.integers(1, 50)), min_size=2, max_size=4))
def test_the_ledger_and_the_planner_count_what_a_run_would(attacks):
    broken, passes = zip(*attacks, strict=True)
    records, names = planned(broken, passes), list("abcdef")[: len(attacks)]
    rest = {name: set().union(*(b for n, b in zip(names, broken, strict=True) if n != name)) for name in names}
    for one, hits, cost in zip(ledger(records, "plain", "linf", 0.1), broken, passes, strict=True):
        own = hits - rest[one.attack]
        assert (one.examples, one.broke, one.own) == (N - 1, len(hits), len(own))
        assert (one.alone.count, one.alone.of) == (N - 1 - len(hits), N)
        assert one.passes_each == (cost * (N - 1) / len(own) if own else math.inf)
    order = plan_order(records, "linf")

    def simulated(chosen):
        left, total = set(range(1, N)), 0
        for name in chosen:
            total += passes[names.index(name)] * len(left)
            left -= broken[names.index(name)]
        return total

    assert order.given == simulated(names)
    assert order.passes == simulated([step.attack for step in order.steps])
    assert order.needed == simulated([step.attack for step in order.steps if step.broke])


def test_the_planner_refuses_an_unknown_family(records):
    with pytest.raises(UsageError, match="l1 was not measured; measured are linf, l2"):
        plan_order(records, "l1")


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8))
def test_no_point_of_the_front_is_beaten_and_every_other_is(points):
    best = set(plots.front(points))
    for i, (x, y) in enumerate(points):
        beaten = any((u >= x and v > y) or (u > x and v >= y) for u, v in points)
        assert beaten == (i not in best)


def test_the_plane_of_accuracies_is_as_wide_as_its_intervals():
    places = [plots.Place(0, rate(295, 300), rate(4, 300)), plots.Place(1, rate(300, 300), rate(223, 300))]
    ticks = [float(text) for text in re.findall(r">\s*(\d+(?:\.\d+)?)</text>", plots.pareto(places, "linf(0.2)"))]
    across, up = [t for t in ticks if t > 90], [t for t in ticks if t <= 90]
    assert (min(across) > 95, max(across), min(up), max(up)) == (True, 100, 0, 80)
    assert len(across) > 3


@pytest.mark.parametrize("draw", [lambda one: plots.spread([one], "l"), lambda one: plots.curves([one], "l", everywhere=False)])
def test_suspect_marks_are_hollow(draw):
    points = [(0.1, rate(9, 10)), (0.2, rate(5, 10))]
    hollow, full = (draw(plots.Series(0, points, suspect)) for suspect in (True, False))
    assert ("fill-opacity: 0" in hollow, "fill-opacity: 0" in full) == (True, False)


def test_a_label_is_text_and_no_formula():
    assert "$x_{$" in plots.spread([plots.Series(0, [(0, rate(1, 2))])], "$x_{$")


def test_pictures_are_what_they_were():
    x = torch.rand((3, 4, 6), generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    image = Image.open(io.BytesIO(b64decode(gallery.png(x).split(",")[1])))
    assert torch.equal(torch.from_numpy(np.array(image)).permute(2, 0, 1), (x * 255).round().byte())


def test_the_difference_is_amplified_as_it_says(records):
    (_, (name, uri), _) = gallery.card(records, records.shown("plain", "linf")[0]).parts
    pixels = np.array(Image.open(io.BytesIO(b64decode(uri.split(",")[1]))))
    assert name == "difference x 4"
    # A change of 0.1, four times, from the middle.
    assert set(pixels.flatten()) <= {round(255 * (0.5 + 4 * 0.1)), round(255 * (0.5 + 4 * 0.1)) - 1, 229, 230}


def test_sounds_are_16_bit_wav():
    records = make(kind="waveform")
    records.about["data"]["rate"] = 8000
    del records.about["families"]["linf"]
    card = gallery.card(records, records.shown("plain", "l2")[0])
    assert [name.split(" x ")[0] for name, _ in card.parts] == ["original", "difference", "adversarial"]
    with wave.open(io.BytesIO(b64decode(card.parts[0][1].split(",")[1]))) as file:
        assert (file.getframerate(), file.getsampwidth(), file.getnframes()) == (8000, 2, 400)
        samples = np.frombuffer(file.readframes(400), "<i2")
    assert samples[0] == round(-0.5 * 32767)
    sounds = Reader(page(records, summary(records)))
    players = [attrs for tag, attrs in sounds.tags if tag == "audio"]
    assert players
    assert all(attrs["src"].startswith("data:audio/wav;base64,") for attrs in players)


def test_of_features_the_numbers_that_changed_most_are_told():
    records = make(kind="features")
    one = records.shown("plain", "l2")[0]
    one.x_adv[:] = one.x + torch.tensor([0, 0.1, 0, -0.3, 0, 0.2])
    assert gallery.card(records, one).parts == (("x[3]", "0.5 -> 0.2"), ("x[5]", "0.5 -> 0.7"), ("x[1]", "0.5 -> 0.6"))


@pytest.mark.parametrize(("channels", "parts"), [(3, "image"), (4, "features")])
def test_images_in_another_range_are_seen(channels, parts, records):
    shown = dataclasses.replace(
        records.shown("plain", "l2")[0], x=torch.zeros(channels, 4, 4), x_adv=torch.ones(channels, 4, 4)
    )
    about = {**records.about, "data": {**records.about["data"], "low": -1.0, "high": 1.0}}
    assert gallery.card(dataclasses.replace(records, about=about), shown).kind == parts


def test_captions(records):
    one = records.shown("plain", "l2")[0]
    assert gallery.card(records, one).caption == f"3 -> 7, l_2 {one.distance:.3g}, {one.attack}"


def test_a_model_of_which_nothing_is_finished_is_said_to_be_so(records, tmp_path):
    kept = {name: getattr(records, name) for name in ("clean", "tries", "costs")}
    kept = {name: table[table["model"] == "plain"] for name, table in kept.items()}
    half = dataclasses.replace(records, **kept, gallery=lambda *_: [])
    report(half, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "Nothing of it is finished." in text
    assert (text.count("<svg"), text.count("The line is the front")) == (4, 0)
    found = json.loads((tmp_path / "summary.json").read_text())
    jsonschema.validate(found, schema())
    assert found["families"][0]["front"] == ["plain"]
    nothing = dataclasses.replace(half, clean=half.clean.iloc[:0])
    with pytest.raises(UsageError, match="nothing is finished"):
        report(nothing, tmp_path)


def test_where_nothing_was_broken_there_is_a_report_too(records):
    unbroken = records.tries.assign(success=False, distance=math.inf, adversarial=-1)
    robust = dataclasses.replace(records, tries=unbroken, gallery=lambda *_: [])
    found = summary(robust)
    assert "None were kept." in page(robust, found)
    jsonschema.validate(found, schema())
    assert {row["robust"]["count"] for row in found["results"]} == {N - 1}
    assert [family["front"] for family in found["families"]] == [list(NAMES)] * 2
    assert found["families"][0]["order"]["needless"]
    assert page(robust, found).count("<svg") == 6


def test_data_without_a_range_have_a_report(records, tmp_path):
    about = {**records.about, "data": {**records.about["data"], "kind": "features", "low": -math.inf, "high": math.inf}}
    report(dataclasses.replace(records, about=about), tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["run"]["data"]["low"], found["run"]["data"]["high"]) == (None, None)
    jsonschema.validate(found, schema())


def test_a_name_that_is_no_text_is_replaced(records, tmp_path):
    about = {**records.about, "models": [{**model, "spec": "m\udcff.py"} for model in records.about["models"]]}
    report(dataclasses.replace(records, about=about, title="t\udcff", notes=("n\udcff",)), tmp_path, DECISIONS)
    assert "<h1>t?</h1>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    ElementTree.parse(tmp_path / "junit.xml")


def test_code_scanning_is_told_of_the_file_and_of_every_gate_that_fails_the_run(records):
    strict = dataclasses.replace(DECISIONS[2], ok=False)
    about = {**records.about, "models": [{**model, "spec": "nets/m.py:load"} for model in records.about["models"]]}
    log = json.loads(ci.sarif(summary(dataclasses.replace(records, about=about, findings=()), (strict,))))
    (result,) = log["runs"][0]["results"]
    assert result["ruleId"] == "gate"
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "nets/m.py"


def test_the_headline_is_where_models_differ(records):
    assert headline(records, "linf") == 0.2
    broken = records.tries.assign(success=True, distance=records.tries["eps"].clip(upper=0.15), adversarial=7)
    at = {"all": broken, "most": broken.where(broken["eps"] > 0.1, records.tries)}
    of = {name: dataclasses.replace(records, tries=tries) for name, tries in at.items()}
    assert of["most"].robust("plain", "linf", 0.1).count > of["most"].robust("plain", "linf", 0.2).count == 0
    assert {name: headline(one, "linf") for name, one in of.items()} == {"all": 0.1, "most": 0.1}


def test_the_table_of_attacks_is_open_at_the_headline_and_folded_elsewhere(out):
    parts = Reader((out / "report.html").read_text())
    attacks = [attrs for tag, attrs in parts.tags if tag == "details"][:3]
    assert ["open" in attrs for attrs in attacks] == [True, False, True]
    labels = [attrs["aria-label"] for _, attrs in parts.tags if attrs.get("aria-label", "").startswith("Attacks under")]
    assert labels == [f"Attacks under {threat}" for threat in ("linf(0.2)", "linf(0.1)", "l2")]


def test_the_verdict_counts_gates_and_checks(records, out):
    counts = "1 failed 1 undecided 1 passed", "1 suspect 1 warning 1 fine"
    text = " ".join(" ".join(Reader((out / "report.html").read_text()).text).split())
    assert all(said in text for said in counts)
    assert all(said.replace(" 1", ", 1") in (out / "report.md").read_text() for said in counts)
    assert "Checks: none were run." in _markdown(summary(dataclasses.replace(records, findings=())))


def test_it_does_not_write_into_the_run(records, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a run"):
        report(records, tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        report(records, tmp_path / "run.json")


def test_the_command(records, tmp_path, monkeypatch, capsys):
    import advkit

    model = lambda x: x.flatten(1)[:, :10]
    x = torch.rand((12, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    advkit.evaluate(model, (x, model(x).argmax(1)), threat="linf(0.1)", attacks=["fgsm", "pgd(steps=3)"], out=tmp_path / "run")
    (tmp_path / "step.md").write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "step.md"))
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    arguments = parser.parse_args(["report", str(tmp_path / "run"), "--title", "Release"])
    assert arguments.run(arguments) == 0
    folder = tmp_path / "run" / "report"
    assert capsys.readouterr().out.splitlines() == [str(path) for path in (folder / name for name in FILES)]
    assert {path.name for path in folder.iterdir()} == set(FILES)
    found = json.loads((folder / "summary.json").read_text())
    jsonschema.validate(found, schema())
    assert found["title"] == "Release"
    assert (tmp_path / "step.md").read_text() == "before\n" + (folder / "report.md").read_text() + "\n"
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    append_step_summary(folder / "report.md")


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def browse(page, tmp_path, script, *options):
    """What a script added to a copy of the page says, in a browser that reaches no network."""
    copy = tmp_path / "page.html"
    add = f"<script>document.documentElement.dataset.said = JSON.stringify((() => {{ {script} }})())</script></body>"
    copy.write_text(page.read_text().replace("</body>", add))
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * 127.0.0.1:9"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", *options, "--dump-dom"]
    done = subprocess.run([CHROMIUM, *arguments, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    (_, attrs) = next(tag for tag in Reader(done.stdout).tags if tag[0] == "html")
    return json.loads(attrs["data-said"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page with")
class TestInABrowser:
    def test_a_click_on_a_header_sorts(self, records, out, tmp_path):
        script = """
        const table = document.querySelector("table.sortable"), said = [];
        const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent.startsWith("linf(0.1)"));
        for (let i = 0; i < 2; i++) {
          head.querySelector("button").click();
          said.push([head.getAttribute("aria-sort"), [...table.tBodies[0].rows].map(row => row.cells[0].dataset.sort)]);
        }
        return said;
        """
        up = sorted(NAMES, key=lambda model: records.robust(model, "linf", 0.1).value)
        assert records.robust(up[0], "linf", 0.1).value < records.robust(up[1], "linf", 0.1).value
        assert browse(out / "report.html", tmp_path, script) == [["descending", up[::-1]], ["ascending", up]]

    def test_nothing_is_fetched_and_nothing_hostile_runs(self, out, tmp_path):
        script = """
        return performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"))
        """
        assert browse(out / "report.html", tmp_path, script) == []

    def test_a_phone_scrolls_tables_and_not_the_page(self, out, tmp_path):
        # A window of a desktop browser has a least width; a frame has none.
        page = json.dumps((out / "report.html").read_text()).replace("</", "<\\/")
        script = f"""
        document.body.innerHTML = '<iframe style="width:390px;height:800px;border:0"></iframe>';
        const frame = document.querySelector("iframe").contentDocument;
        frame.write({page});
        frame.close();
        const root = frame.documentElement, boxes = [...frame.querySelectorAll(".scroll")];
        return [root.clientWidth, root.scrollWidth, boxes.some(box => box.scrollWidth > box.clientWidth)];
        """
        width, needed, scrolls = browse(out / "report.html", tmp_path, script)
        assert 370 <= width <= 390
        assert needed <= width
        assert scrolls

    @pytest.mark.parametrize(("scheme", "dark"), [(0, True), (1, False)])
    def test_the_page_is_dark_where_that_is_wanted(self, out, tmp_path, scheme, dark):
        script = "return getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"
        shade = browse(out / "report.html", tmp_path, script, f"--blink-settings=preferredColorScheme={scheme}")
        assert (sum(shade) < 200) == dark


def test_csv_is_read_by_the_csv_module(out):
    with (out / "results.csv").open(newline="") as file:
        assert {row["model"] for row in csv.DictReader(file)} == set(NAMES)
