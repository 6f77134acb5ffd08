"""The report of a run: a page, a text, tables, and the files that CI reads, all computed from the records.

``summary`` has every number; the page, the text and the files for CI print them. A number that cannot be trusted is marked
wherever it stands.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit import spec
from advkit.benchmarks import ci, plots
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.folder import Row, replace
from advkit.benchmarks.gallery import galleries
from advkit.benchmarks.ledger import Order, Spent, alone, ledger, plan_order
from advkit.benchmarks.records import Records
from advkit.errors import UsageError
from advkit.threat import BALLS

if TYPE_CHECKING:
    import jinja2
    import pandas as pd

    from advkit.benchmarks.gates import Decision

SCHEMA = "advkit/benchmark/1"
FILES = ("report.html", "report.md", "junit.xml", "report.sarif", "summary.json", "results.csv", "examples.csv")
"""What a report is."""


def report(records: Records, out: str | Path, decisions: Sequence[Decision] = ()) -> list[Path]:
    """Write a report to a folder and say which files it has.

    Arguments:
        records: The run.
        out: The folder; made if it is not there. Files of an earlier report are replaced.
        decisions: What the gates decided.

    Raises:
        UsageError: ``out`` is a file, or holds the run itself, or no example is done.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out should be a folder")
    if any((folder / name).exists() for name in ("run.json", "benchmark.json")):
        raise UsageError(f"{folder} holds a run, whose summary.json stays as it is; give --out another folder")
    if not _measured(records):
        raise UsageError(f"of {records.title} nothing is finished; the command that began it goes on")
    folder.mkdir(parents=True, exist_ok=True)
    found = summary(records, decisions)
    as_json = json.dumps(found, indent=2, allow_nan=False) + "\n"
    tables = _csv(_results(records, found)), _attempts(records).to_csv(index=False, lineterminator="\n")
    contents = (page(records, found), _markdown(found), ci.junit(found), ci.sarif(found), as_json, *tables)
    for name, content in zip(FILES, contents, strict=True):
        # The name of a file may hold what is no text.
        replace(folder / name, content.encode(errors="replace"))
    return [folder / name for name in FILES]


def append_step_summary(markdown: Path) -> None:
    """Append a text to the summary of a GitHub Actions step, where there is one ($GITHUB_STEP_SUMMARY)."""
    if target := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(markdown.read_text(encoding="utf-8") + "\n")


def summary(records: Records, decisions: Sequence[Decision] = ()) -> Row:
    """Every number of a report, as it is written to ``summary.json``; ``docs/report.md`` says what each field is.

    The same run gives the same, except for what is under ``time``.

    Arguments:
        records: The run.
        decisions: What the gates decided.
    """
    about = records.about
    spent = [one for place in _attacked(records) for one in ledger(records, *place)]
    kept = ("advkit", "torch", "command", "access", "seeds", "alone")
    return {
        "schema": SCHEMA,
        "title": records.title,
        "run": {
            **{name: about.get(name) for name in kept},
            "data": {
                **{name: about["data"].get(name) for name in ("name", "digest", "examples", "kind")},
                **{name: _number(about["data"][name]) for name in ("low", "high")},
            },
        },
        "models": [_model(records, model) for model in about["models"]],
        "results": [_result(records, *place) for place in _places(records)],
        "families": [_family(records, family) for family in records.families],
        "attacks": [_spent(records, one) for one in spent],
        "findings": [finding_row(finding) for finding in records.findings],
        "gates": [_decision(decision) for decision in decisions],
        "notes": list(records.notes),
        "time": {
            "training": [{"model": model["name"], "seconds": model.get("training_seconds")} for model in about["models"]],
            "attacks": [_time(records, one) for one in spent],
        },
    }


def headline(records: Records, family: str) -> float:
    """The radius that a sentence about a family names: the greatest attacked that some model withstands, else the least.

    Where every model is broken, models do not differ. Where only the closest examples were searched for, half of the radius at
    which 99 of 100 are broken for every model.
    """
    steps, radii = records.steps(family), records.radii(family)
    if not radii:
        return steps[(len(steps) - 1) // 2] if steps else 0.0
    return max((eps for eps in radii if any(records.robust(m, family, eps).count for m in records.models)), default=radii[0])


def _measured(records: Records) -> list[str]:
    """The models of which at least one example is done."""
    return [model for model in records.models if records.clean_accuracy(model).of]


def _places(records: Records) -> Iterator[tuple[str, str, float]]:
    """Every model, family and radius that has a result."""
    for family in records.families:
        for eps in records.steps(family) or (0.0,):
            yield from ((model, family, eps) for model in records.models)


def _attacked(records: Records) -> Iterator[tuple[str, str, float]]:
    """Every model, family and radius that was attacked; inf for a search."""
    for family in records.families:
        radii = (*records.radii(family), *([math.inf] if records.searched(family) else []))
        yield from ((model, family, eps) for eps in radii for model in records.models)


def _model(records: Records, model: Row) -> Row:
    name = model["name"]
    return {"name": name, "spec": model["spec"], "digest": model["digest"], "clean": records.clean_accuracy(name).to_json()}


def _result(records: Records, model: str, family: str, eps: float) -> Row:
    certified = records.certified(model, family, eps)
    return {
        "model": model,
        "family": family,
        "threat": records.threat(family, eps),
        "eps": eps,
        "robust": records.robust(model, family, eps).to_json(),
        "certified": None if certified is None else certified.to_json(),
        "seeds": [rate.to_json() for rate in records.spread(model, family, eps)],
        "headline": eps == headline(records, family),
        "suspect": bool(records.suspect(model, family)),
    }


def _family(records: Records, family: str) -> Row:
    eps = headline(records, family)
    measured = _measured(records)
    points = [(records.clean_accuracy(m).value, records.robust(m, family, eps).value) for m in measured]
    order = plan_order(records, family)
    return {
        "family": family,
        "searched": records.searched(family),
        "attacks": list(records.attacks(family)),
        "headline": records.threat(family, eps),
        "front": [measured[i] for i in plots.front(points)],
        "areas": [_area(records, model, family) for model in records.models],
        "order": None if order is None else _order(order),
    }


def _area(records: Records, model: str, family: str) -> Row:
    return {
        "model": model,
        "value": _number(records.area(model, family)),
        "median": _number(float(records.closest(model, family).median())) if records.searched(family) else None,
        "suspect": bool(records.suspect(model, family)),
    }


def _order(order: Order) -> Row:
    return {
        "steps": [asdict(step) for step in order.steps],
        "passes": order.passes,
        "needed": order.needed,
        "given": order.given,
        "saving": order.saving,
        "needless": list(order.needless),
    }


def _spent(records: Records, one: Spent) -> Row:
    return {
        **_place(records, one),
        "examples": one.examples,
        "broke": one.broke,
        "own": one.own,
        "alone": None if one.alone is None else one.alone.to_json(),
        "median": _number(one.median),
        "forwards": one.forwards,
        "backwards": one.backwards,
        "passes_each": _number(one.passes_each),
        "suspect": bool(records.suspect(one.model, one.family)),
    }


def _time(records: Records, one: Spent) -> Row:
    return {
        **_place(records, one),
        "seconds": one.seconds,
        "seconds_each": _number(one.seconds_each),
        "examples_a_second": _number(one.examples_a_second),
        "passes_a_second": _number(one.passes_a_second),
        "memory": one.memory or None,
    }


def _place(records: Records, one: Spent) -> Row:
    threat = records.threat(one.family, one.eps)
    return {"model": one.model, "family": one.family, "threat": threat, "eps": _number(one.eps), "attack": one.attack}


def finding_row(finding: Finding) -> Row:
    """A finding for JSON; a number that is not finite is null."""
    return {**finding.to_json(), "numbers": {name: _number(value) for name, value in finding.numbers.items()}}


def _decision(decision: Decision) -> Row:
    names = ("gate", "model", "verdict", "ok", "suspect", "sentence", "needed")
    numbers = {name: _number(getattr(decision.value, name)) for name in ("value", "low", "high")}
    return {**{name: getattr(decision, name) for name in names}, **numbers}


def _number(value: float) -> float | None:
    """A number for JSON, which has neither inf nor NaN."""
    return value if math.isfinite(value) else None


def _results(records: Records, found: Row) -> list[Row]:
    """The rows of results.csv."""
    clean = {model["name"]: model["clean"] for model in found["models"]}
    attacks = list(dict.fromkeys(name for family in records.families for name in records.attacks(family)))
    each = {
        (model, family): alone(records, model, family, records.steps(family))
        for model in records.models
        for family in records.families
    }
    rows = []
    for result in found["results"]:
        model, robust = result["model"], result["robust"]
        known = {name: rate.value for (eps, name), rate in each[model, result["family"]].items() if eps == result["eps"]}
        row = {name: result[name] for name in ("model", "family", "threat", "eps")}
        row |= {"clean": clean[model]["value"], "clean_low": clean[model]["low"], "clean_high": clean[model]["high"]}
        row |= {"robust": robust["value"], "robust_low": robust["low"], "robust_high": robust["high"]}
        row |= {"count": robust["count"], "of": robust["of"], "suspect": result["suspect"]}
        row |= {"certified": result["certified"]["value"]} if result["certified"] else {"certified": None}
        rows.append({**row, **{f"robust to {name} alone": known.get(name) for name in attacks}})
    return rows


def _csv(rows: Sequence[Row]) -> str:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _attempts(records: Records) -> pd.DataFrame:
    """The rows of examples.csv."""
    clean = records.clean[["model", "index", "label", "clean", "correct"]]
    tries = records.tries.drop(columns="start").merge(clean, on=["model", "index"], how="left")
    return tries.assign(distance=tries["distance"].where(tries["success"]))


def page(records: Records, found: Row) -> str:
    """The page, in one file.

    Arguments:
        records: The run.
        found: Its summary.
    """
    context = _context(found)
    context["plots"] = {family: _plots(records, family) for family in records.families}
    context["galleries"] = {family: galleries(records, family) for family in records.families}
    return environment().get_template("report.html.jinja").render(context)


def _plots(records: Records, family: str) -> Row:
    eps, seconds = headline(records, family), {m["name"]: m.get("training_seconds") for m in records.about["models"]}
    label, everywhere = records.threat(family, eps), records.searched(family)
    steps = records.steps(family)
    fine = [steps[-1] * i / 160 for i in range(1, 161)] if everywhere and steps else None
    series, places, seeds = [], [], []
    numbers = {name: records.models.index(name) for name in _measured(records)}
    for name, i in numbers.items():
        suspect, clean = bool(records.suspect(name, family)), records.clean_accuracy(name)
        series.append(plots.Series(i, records.curve(name, family, fine), suspect))
        places.append(plots.Place(i, clean, records.robust(name, family, eps), seconds[name], suspect))
        seeds.append(plots.Series(i, list(enumerate(records.spread(name, family, eps))), suspect))
    return {
        "curve": plots.curves(series, f"radius, {family}" if family in BALLS else f"share of {family}", everywhere=everywhere),
        "pareto": plots.pareto(places, label) if len(places) > 1 else None,
        "spread": plots.spread(seeds, label) if len(records.seeds) > 1 else None,
    }


def _context(found: Row) -> Row:
    """What the templates know: the summary, and what of it belongs together."""
    return {
        "summary": found,
        "names": [model["name"] for model in found["models"]],
        "tables": [_table(found, family) for family in found["families"]],
        "ledgers": [_ledger(found, family) for family in found["families"]],
        "verdicts": Counter(gate["verdict"] for gate in found["gates"]),
        "checks": Counter(finding["severity"] for finding in found["findings"]),
        "doubts": [finding for finding in found["findings"] if finding["severity"] != "fine"],
    }


MOST_COLUMNS = 5


def _table(found: Row, family: Row) -> Row:
    """The main table of a family: a line a model, a column a radius."""
    rows = [row for row in found["results"] if row["family"] == family["family"]]
    radii = list(dict.fromkeys(row["eps"] for row in rows))
    attacked = {row["eps"] for row in found["attacks"] if row["family"] == family["family"] and row["eps"] is not None}
    shown = [eps for eps in radii if eps in attacked] or radii[-1 :: -max(1, len(radii) // (MOST_COLUMNS - 1))][::-1]
    cells = {(row["model"], row["eps"]): row for row in rows}
    seconds = {row["model"]: row["seconds"] for row in found["time"]["training"]}
    areas = {row["model"]: row for row in family["areas"]}
    lines = [
        {
            "model": model,
            "cells": [cells[model["name"], eps] for eps in shown],
            "area": areas[model["name"]],
            "front": model["name"] in family["front"],
            "training": seconds[model["name"]],
        }
        for model in found["models"]
    ]
    timed = any(value is not None for value in seconds.values())
    return {"family": family, "lines": lines, "timed": timed, "attacked": bool(attacked)}


def _ledger(found: Row, family: Row) -> Row:
    """The attacks of a family with their times, by threat model; the one in the headline first, to be seen at once."""
    pairs = zip(found["attacks"], found["time"]["attacks"], strict=True)
    rows = [{**spent, **time} for spent, time in pairs if spent["family"] == family["family"]]
    threats = sorted(dict.fromkeys(row["threat"] for row in rows), key=lambda threat: threat != family["headline"])
    parts = [{"threat": threat, "rows": [row for row in rows if row["threat"] == threat]} for threat in threats]
    return {"family": family["family"], "parts": parts, "memory": any(row["memory"] for row in rows)}


def _markdown(found: Row) -> str:
    return environment().get_template("report.md.jinja").render(_context(marked_down(found)))


def environment() -> jinja2.Environment:
    """What renders the templates, with the filters that print numbers."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("advkit.benchmarks"),
        autoescape=jinja2.select_autoescape(["html.jinja"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"rate": _percent, "interval": _interval, "short": _short, "time": _duration, "bytes": _bytes}
    environment.globals |= {"mark": plots.mark, "colour": plots.colour_of}
    return environment


def marked_down(value: Any) -> Any:
    r"""The same with the signs of Markdown and HTML in every text made harmless, and each text on one line.

    >>> marked_down({"name": "a|b_<c>"})
    {'name': 'a\\|b\\_\\<c\\>'}
    """
    if isinstance(value, dict):
        return {name: marked_down(part) for name, part in value.items()}
    if isinstance(value, list):
        return [marked_down(part) for part in value]
    if not isinstance(value, str):
        return value
    line = ci.printable(" ".join(value.split()))
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|~$&#" else sign for sign in line)


def _percent(rate: Row | None) -> str:
    return "-" if rate is None or rate["value"] is None else f"{100 * rate['value']:.2f} %"


def _interval(rate: Row | None) -> str:
    return "" if rate is None or rate["value"] is None else f"[{100 * rate['low']:.2f}, {100 * rate['high']:.2f}]"


def _short(value: float | None) -> str:
    """A number with three digits, and a space between thousands at which no line breaks."""
    if value is None:
        return "-"
    return (
        f"{value:,.0f}".replace(",", "\u00a0")
        if abs(value) >= 100 or value == int(value)
        else spec.number(float(f"{value:.3g}"))
    )


def _duration(seconds: float | None) -> str:
    """Seconds as a person would say them.

    >>> _duration(0.25), _duration(90), _duration(7300)
    ('0.25 s', '1.5 min', '2.0 h')
    """
    if seconds is None:
        return "-"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 60 else _long(seconds / 60)


def _long(minutes: float) -> str:
    return f"{minutes:.1f} min" if minutes < 60 else f"{minutes / 60:.1f} h"


def _bytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f} MiB".replace(",", " ")
