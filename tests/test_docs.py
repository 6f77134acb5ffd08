"""The documents: their Python runs, their commands parse, their links lead somewhere, their tables are what the code says."""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import advkit
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.attacks.audio import SPEECH_ATTACKS
from advkit.benchmarks import suitefile
from advkit.benchmarks.gates import Gate
from advkit.benchmarks.result import Evaluation
from advkit.benchmarks.suites import SUITES
from advkit.cli import parser
from advkit.data import DATA, load
from advkit.defenses import DEFENSES, named
from advkit.defenses.inference import defend
from advkit.losses import LOSSES
from advkit.models import MODELS, checkpoint
from advkit.models.networks import NETWORKS, build
from advkit.threat import THREATS
from advkit.train import Recipe, train

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
NETWORK = "mnist-mlp(width=32)"


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, info):
    return [found["text"] for found in BLOCK.finditer(page.read_text(encoding="utf-8")) if found["info"] == info]


def prose(page):
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def test_every_block_says_what_it_is():
    known = {"python", "python no-run", "console", "text", "toml", "yaml"}
    for page in PAGES:
        infos = [line[3:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("```")]
        assert set(infos[::2]) <= known, name_of(page)
        assert set(infos[1::2]) <= {""}, f"{name_of(page)} has a block that is not closed"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What the pages call m.safetensors, small and soon ready."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    with torch.random.fork_rng(devices=[]):
        checkpoint.save(path, train(build(NETWORK), load("mnist-5k", split="train"), Recipe(epochs=3)), NETWORK)
    return path


class Page:
    """Runs a page's blocks in order in one namespace; a block that begins with ``# NAME.py`` is that file."""

    def __init__(self, name):
        self.name, self.module = name, types.ModuleType("page")

    def run(self, text):
        before = set(vars(self.module))
        if file := re.match(r"# (\w+)\.py\n", text):
            Path(file[0][2:-1]).write_text(text, encoding="utf-8")
            importlib.invalidate_caches()
            vars(self.module).update({k: v for k, v in vars(importlib.import_module(file[1])).items() if k[:2] != "__"})
        else:
            exec(compile(text, f"<{self.name}>", "exec"), vars(self.module))
        for name in set(vars(self.module)) - before:
            if name.startswith("test_"):
                vars(self.module)[name]()


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(path, trained, tmp_path, monkeypatch, capsys):
    (tmp_path / "m.safetensors").write_bytes(trained.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    page, before = Page(name_of(path)), set(sys.modules)
    monkeypatch.setitem(sys.modules, "page", page.module)
    try:
        for text in blocks(path, "python"):
            page.run(text)
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(tmp_path):
                del sys.modules[name]
    assert "nan" not in capsys.readouterr().out


def test_python_that_does_not_run_is_python():
    for page in PAGES:
        for text in blocks(page, "python no-run"):
            compile(text, name_of(page), "exec")


def commands(page):
    """The lines that a person types, without the prompt and the environment's folder; continued lines are joined."""
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in text.splitlines()]
    return [line.removeprefix(".venv/bin/") for line in lines if line and not line.startswith("#")]


COMMANDS = [(name_of(page), command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_commands_parse(page, command):
    program, *arguments = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in arguments)
        return
    assert program == "advkit", "say how this is checked"
    given = vars(parser().parse_args(arguments))
    threats = given.get("threat") or []
    for threat in [threats] if isinstance(threats, str) else threats:
        spec.parse(threat, THREATS, "threat")
    attacks = given.get("attack") or []
    for attack in [attacks] if isinstance(attacks, str) else attacks:
        if attack not in SUITES:
            spec.parse(attack, {**ATTACKS, **SPEECH_ATTACKS}, "attack")
    for gate in given.get("require") or []:
        Gate.parse(gate)
    several = len(threats) > 1 and program == "advkit" and arguments[0] == "train"
    for defense in [given["defense"]] if isinstance(given.get("defense"), str) else given.get("defense") or []:
        named(defense.split(" linf(")[0], (advkit.Lp(2, 1), advkit.Lp(2, 1)) if several else advkit.Lp(2, 1))


def test_suites_can_be_read():
    found = [suitefile.parse(text, name_of(page)) for page in PAGES for text in blocks(page, "toml")]
    assert found
    page = (ROOT / "docs/benchmark.md").read_text(encoding="utf-8")
    described = " ".join(row[0] for row in table_rows(page)).replace("`", "").replace(",", "").split()
    fields = {field.name for field in dataclasses.fields(suitefile.Suite)}
    assert {name for name in described if "." not in name} == fields - {"models", "threats"} | {"attacks"}


def test_the_steps_of_the_workflow_are_commands():
    yaml = pytest.importorskip("yaml")
    steps = [
        step
        for page in PAGES
        for text in blocks(page, "yaml")
        for job in yaml.safe_load(text)["jobs"].values()
        for step in job["steps"]
    ]
    lines = [line for step in steps for line in step.get("run", "").splitlines() if line.startswith("advkit ")]
    assert [line.split()[1] for line in lines] == ["benchmark", "compare"]
    for line in lines:
        given = vars(parser().parse_args(shlex.split(line)[1:]))
        assert given["run"]


def options(command):
    (subparsers,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {option for action in subparsers.choices[command]._actions for option in action.option_strings if option[:2] == "--"}


@pytest.mark.parametrize(("page", "command"), [("attack-command-line.md", "attack"), ("train.md", "train")])
def test_every_option_is_described_and_none_that_is_not_there(page, command):
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", (ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert options(command) - {"--help"} <= said
    assert said <= options("attack") | options("train")


def first_cells(page, heading):
    """The first cell of each line of the table below a heading, without backticks."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [row[0] for row in table_rows(section)]


def table_rows(text):
    """The cells of each line of tables whose first cell is code; the code without backticks."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line] for line in lines]


def test_every_model_data_loss_and_threat_is_described():
    assert first_cells("models-and-data.md", "Models") == [name for name in MODELS if name not in NETWORKS]
    assert first_cells("models-and-data.md", "Data") == [name.split("@")[0] for name in DATA]
    assert first_cells("attacks.md", "Losses") == list(LOSSES)
    page = (ROOT / "docs/threat-models.md").read_text(encoding="utf-8")
    assert [row[0].split("(")[0] for row in table_rows(page)][: len(THREATS)] == list(THREATS)
    page = (ROOT / "docs/train.md").read_text(encoding="utf-8")
    assert all(f"`{name}" in page for name in NETWORKS)
    page = (ROOT / "docs/defenses.md").read_text(encoding="utf-8")
    assert {row[0] for row in table_rows(page)} >= set(DEFENSES)


def attack_table():
    found = importlib.util.spec_from_file_location("attack_table", ROOT / "docs/attack_table.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_table_of_attacks_is_what_the_code_says():
    script = attack_table()
    page = (ROOT / "docs/attacks.md").read_text(encoding="utf-8")
    assert page == script.with_table(page), "run python docs/attack_table.py"
    assert all(f"[`{name}`]" in page for name in ATTACKS)


def test_the_script_replaces_an_old_table_and_refuses_a_page_without_its_comments():
    script = attack_table()
    old = f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n"
    assert script.with_table(old) == f"before\n{script.BEGIN}\n\n{script.table()}\n{script.END}\nafter\n"
    with pytest.raises(ValueError, match="each of the two comments once"):
        script.with_table("before")


def links(page):
    return re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leads out of the repository"
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = ROOT / "docs/index.md"
    assert {page.name for page in index.parent.glob("*.md")} - {index.name} <= set(links(index))


def test_citation_has_the_version():
    assert f"\nversion: {advkit.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\n## [{advkit.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


RATE, QUANTILES = {"value", "low", "high", "count", "of"}, {"q05", "q25", "q50", "q75", "q95"}
TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}


def kind(key, value):
    """What docs/records.md calls the type of a value; None where its parts are described one by one."""
    if key == "run":
        return "run"
    if isinstance(value, dict):
        return {frozenset(RATE): "rate", frozenset(QUANTILES): "quantiles"}.get(frozenset(value))
    if isinstance(value, list):
        return "strings" if all(isinstance(item, str) for item in value) else None
    return TYPES[type(value)]


def note(seen, thing, prefix=""):
    """Add the fields of an object, by their dotted paths, and the types of their values to ``seen``.

    The fields of a rate are under ``rate.``, those of quantiles under ``quantiles.``, wherever they stand.
    """
    for key, value in thing.items():
        name = kind(key, value)
        if name is not None:
            seen[prefix + key].add(name)
        if name in ("rate", "quantiles"):
            note(seen, value, f"{name}.")
        elif isinstance(value, dict) and name is None:
            note(seen, value, f"{prefix}{key}.")
        elif isinstance(value, list) and name is None:
            for item in value:
                note(seen, item, f"{prefix}{key}[].")


def below(seen, prefix):
    """Take the fields under a prefix out of ``seen``."""
    return {field.removeprefix(prefix): seen.pop(field) for field in sorted(seen) if field.startswith(prefix)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny runs that between them write every field in every type."""
    root = tmp_path_factory.mktemp("records")
    x = torch.rand((12, 1, 5, 5), generator=torch.Generator().manual_seed(0)).mul(255).byte()
    model = lambda z: z.flatten(1)[:, :10]
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    runs = {
        "fixed": {"threat": "linf(0.1)", "attacks": ["fgsm", "pgd(steps=2)"]},
        "target": {
            "threat": "linf(0.1)",
            "attacks": "pgd(steps=2)",
            "goal": "next",
            "budget": 2,
            "quantize": False,
            "votes": 3,
        },
        "closest": {"threat": "l2", "attacks": ["fmn(steps=20)", "fmn(steps=9)"], "quantize": False},
        "wrong": {"threat": "linf(0.1)", "attacks": "fgsm", "goal": "random"},
        "nothing": {"threat": "linf(0.001)", "attacks": "fgsm", "goal": "next"},
    }
    for name, arguments in runs.items():
        labels = (model(x).argmax(1) + 1) % 10 if name == "wrong" else y
        advkit.evaluate(model, (x, labels), out=root / name, **arguments)
    advkit.evaluate(defend(model, "bit-depth"), (x, y), out=root / "defended", threat="linf(0.1)", attacks="fgsm")
    return [root / name for name in (*runs, "defended")]


def described(section):
    """Field to types, from the tables of a section of docs/records.md, one mapping a table."""
    page = (ROOT / "docs/records.md").read_text(encoding="utf-8")
    text = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
    tables = [table_rows(part) for part in text.split("| --- | --- | --- |")[1:]]
    return [{row[0]: set(row[1].split(" or ")) for row in rows} for rows in tables]


def test_records_md_describes_run_json(folders):
    seen = defaultdict(set)
    for folder in folders:
        note(seen, json.loads((folder / "run.json").read_text()))
    assert described("run.json") == [seen]


@pytest.mark.parametrize("file", ["records.jsonl", "times.jsonl"])
def test_records_md_describes_the_rows(folders, file):
    seen = defaultdict(set)
    for folder in folders:
        for row in map(json.loads, (folder / file).read_text().splitlines()):
            note(seen, row)
    # An empty list of attacks looks like one of strings.
    seen.pop("attacks", None)
    assert described(file) == [seen]


def test_records_md_describes_summary_json(folders):
    seen = defaultdict(set)
    for folder in folders:
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["schema"] == "advkit/summary/1"
        assert summary["run"] == json.loads((folder / "run.json").read_text())
        note(seen, summary)
    # Inside a fixed radius there is no curve, which the description of curve[].value says.
    assert seen.pop("curve") == {"null"}
    rate, quantiles = below(seen, "rate."), below(seen, "quantiles.")
    assert described("summary.json") == [seen, rate, quantiles]


def test_records_md_describes_the_tensors_and_the_files(folders):
    (tensors,) = described("examples")
    found = Evaluation.load(folders[0]).examples()
    assert tensors == {name: {str(tensor.dtype).removeprefix("torch.")} for name, tensor in found.items()}
    page = (ROOT / "docs/records.md").read_text(encoding="utf-8")
    files = {row[0].split("/")[0] for row in table_rows(page.split("\n## ")[0])}
    written = {path.name for folder in folders for path in folder.iterdir()}
    assert files - {"pictures", "files", "curve.png"} == written
