"""A report in the formats of continuous integration: JUnit's XML and SARIF."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from advkit.benchmarks.folder import Row
from advkit.benchmarks.statistics import Rate
from advkit.version import __version__

LEVELS = {"suspect": "error", "warning": "warning"}
"""SARIF's level of a finding's severity; a finding that is fine is no result."""

GATE = "gate"
"""The rule of a gate that failed."""


def junit(summary: Row) -> str:
    """A test a gate, and one a model and threat model, as JUnit's XML; a gate that failed is a failure.

    Arguments:
        summary: What ``advkit.benchmarks.report.summary`` returns.
    """
    root = ElementTree.Element("testsuites", name=printable(summary["title"]))
    gates = summary["gates"]
    failed = sum(not gate["ok"] for gate in gates)
    suite = ElementTree.SubElement(root, "testsuite", name="gates", tests=str(len(gates)), failures=str(failed))
    for gate in gates:
        case = _case(suite, gate["model"], gate["gate"])
        if not gate["ok"]:
            ElementTree.SubElement(case, "failure", message=printable(gate["sentence"]))
        _say(case, gate["sentence"], suspect=gate["suspect"])
    results = summary["results"]
    suite = ElementTree.SubElement(root, "testsuite", name="robustness", tests=str(len(results)), failures="0")
    for result in results:
        case = _case(suite, result["model"], result["threat"])
        _say(case, f"robust accuracy {percent(result['robust'])}", suspect=result["suspect"])
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _case(suite: ElementTree.Element, model: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=printable(model), name=printable(name))


def _say(case: ElementTree.Element, sentence: str, *, suspect: bool) -> None:
    text = f"{sentence} (suspect: this number cannot be trusted)" if suspect else sentence
    ElementTree.SubElement(case, "system-out").text = printable(text)


def printable(text: str) -> str:
    """A text without the characters that XML 1.0 does not have."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", text)


def percent(rate: Row) -> str:
    """A rate of a summary as text, in percent with its interval."""
    return str(Rate(rate["count"], rate["of"], rate["low"], rate["high"]))


def sarif(summary: Row) -> str:
    """The findings that are not fine and the gates that failed, as SARIF 2.1.0, which code scanning shows.

    (OASIS, 2020, Static Analysis Results Interchange Format, https://docs.oasis-open.org/sarif/sarif/v2.1.0/.)

    Arguments:
        summary: What ``advkit.benchmarks.report.summary`` returns.
    """
    specs = {model["name"]: model["spec"] for model in summary["models"]}
    found = [
        (
            finding["check"],
            LEVELS[finding["severity"]],
            finding["model"],
            finding["threat"],
            _message(finding),
            finding["advice"],
        )
        for finding in summary["findings"]
        if finding["severity"] in LEVELS
    ]
    failed = [gate for gate in summary["gates"] if not gate["ok"]]
    found += [(GATE, "error", gate["model"], gate["gate"], _noted(gate), GATE_HELP) for gate in failed]
    rules: dict[str, str] = {}
    for rule, *_, advice in found:
        rules[rule] = rules.get(rule) or advice
    names = list(rules)
    results = [
        {
            "ruleId": rule,
            "ruleIndex": names.index(rule),
            "level": level,
            "message": {"text": f"{model}, {where}: {text}"},
            "locations": [_location(specs.get(model, model))],
            "partialFingerprints": {"advkit/v1": _digest(rule, model, where)},
        }
        for rule, level, model, where, text, _ in found
    ]
    driver = {"name": "advkit", "version": __version__, "rules": [_rule(name, advice) for name, advice in rules.items()]}
    log = {"$schema": SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}
    return json.dumps(log, indent=2) + "\n"


SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
GATE_HELP = "Compare the model with the last one that passed; where the gate is undecided, run more examples."


def _message(finding: Row) -> str:
    parts = (finding["evidence"], finding["advice"], f"next: {finding['command']}" if finding["command"] else "")
    return "; ".join(part for part in parts if part)


def _noted(gate: Row) -> str:
    return f"{gate['sentence']} (suspect: this number cannot be trusted)" if gate["suspect"] else gate["sentence"]


def _rule(name: str, advice: str) -> dict[str, Any]:
    text = advice or f"What the check {name} found."
    return {"id": name, "shortDescription": {"text": name}, "help": {"text": text}}


def _location(spec: str) -> dict[str, Any]:
    """A place, which code scanning asks for: the model's file, or the model as it was named."""
    uri = quote(re.sub(r"(?<=\.py):.*", "", spec, flags=re.DOTALL), safe="/", errors="replace")
    return {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode(errors="replace")).hexdigest()
