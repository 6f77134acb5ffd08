"""Suites: TOML files that say what a benchmark runs, checked before anything runs.

    title = "Digits, l_inf"
    data = "mnist-5k"
    limit = 1000
    attacks = ["fgsm", "pgd(steps=40)"]

    [models]
    plain = "plain.safetensors"
    robust = { model = "robust.safetensors", training-seconds = 140 }

    [[threats]]
    threat = "linf"
    radii = [0.1, 0.2, "8/255"]
    closest = ["fmn"]

``docs/benchmark.md`` says what each key is.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.suites import SUITES
from advkit.engine import Attack, check_serves
from advkit.errors import UsageError, first_line
from advkit.threat import BALLS, THREATS, Change, Lp

FOLDER = Path(__file__).parent / "suites"
"""The suites that advkit ships."""


@dataclass(frozen=True)
class Entry:
    """A model: its name in reports, its spec (or the object), and what its training took, in seconds, where that is known."""

    name: str
    model: Any
    training_seconds: float | None = None


@dataclass(frozen=True)
class Threat:
    """A family of threat models: the spec without a radius, the radii, the attacks, and those that search for the closest."""

    family: str
    radii: tuple[float, ...]
    attacks: tuple[str, ...]
    closest: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """What a benchmark runs.

    Attributes:
        title: What reports call it.
        data: The spec of the data; empty where it has to be given.
        models: The models; none where they have to be given.
        threats: The families of threat models.
        seeds: Of every random draw; each seed is a run of its own.
        split: The part of the data.
        limit: The most examples; None for all.
        block: How many examples are kept at a time; None for what ``advkit attack`` would take.
        alone: Whether every attack meets every example; otherwise only those that the attacks before it left.
        access: What the adversary sees; None for all that a model answers.
        budget: The most forward passes of each attack for an example.
        votes: How many answers decide.
        fast: Whether a copy of the model in bfloat16 answers the attacks.
        compile: Whether that copy is compiled.
        keep: How many adversarial examples are kept of each cell and block, the closest ones.
        checks: Whether the checks of ``advkit doctor`` are run.
    """

    title: str
    data: str = ""
    models: tuple[Entry, ...] = ()
    threats: tuple[Threat, ...] = ()
    seeds: tuple[int, ...] = (0,)
    split: str = "test"
    limit: int | None = None
    block: int | None = None
    alone: bool = False
    access: str | None = None
    budget: int | None = None
    votes: int = 1
    fast: bool = False
    compile: bool = False
    keep: int = 8
    checks: bool = True


def shipped() -> dict[str, Path]:
    """The suites that advkit ships, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read(suite: str | Path) -> Suite:
    """The suite in a TOML file, or the shipped one of a name.

    Raises:
        UsageError: There is none, or something in it is not allowed; the message gives the line and what is allowed.
    """
    path = shipped().get(str(suite), Path(suite))
    if not path.is_file():
        if path.suffix == ".toml":
            raise UsageError(f"there is no file {path}")
        raise spec.unknown("suite", str(suite), [*shipped(), "a file that ends in .toml"])
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not text in UTF-8; a suite is a TOML file") from None
    return parse(text, str(path))


def parse(text: str, where: str = "the suite") -> Suite:
    r"""The suite in a TOML text.

    Arguments:
        text: The text.
        where: What messages call it.

    Raises:
        UsageError: Something in it is not allowed; the message gives the line and what is allowed.

    >>> parse('title = "t"\nattacks = ["fgsm"]\n[[threats]]\nthreat = "linf"\nradii = ["8/255"]').threats[0].radii
    (0.03137254901960784,)
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{where} is not TOML: {first_line(error)}") from None
    return _Reader(text, where).suite(content)


class _Reader:
    """Turns what TOML holds into a suite, and knows the line of each thing."""

    def __init__(self, text: str, where: str) -> None:
        self.lines, self.where = text.split("\n"), where

    def suite(self, content: dict[str, Any]) -> Suite:
        self._known(content, "", (*_PLAIN, "seeds", "attacks", "models", "threats"))
        given = {key: self._value("", key, content[key], kind) for key, kind in _PLAIN.items() if key in content}
        self._need(content, "", ("title", "threats"))
        models, threats = content.get("models", {}), content["threats"]
        if not isinstance(models, dict):
            raise self._error("", "models", "models should be a table, as in [models]")
        if not isinstance(threats, list) or not threats or not all(isinstance(one, dict) for one in threats):
            raise self._error("", "threats", "threats should be tables, each under [[threats]]")
        attacks = self._names("", "attacks", content.get("attacks", ["standard"]))
        made = Suite(
            **given,
            models=tuple(self._model(name, value) for name, value in models.items()),
            threats=tuple(self._threat(f"threats {i}", one, attacks) for i, one in enumerate(threats)),
            seeds=self._seeds(content.get("seeds", [0])),
        )
        families = [threat.family for threat in made.threats]
        for i, family in enumerate(families):
            if family in families[:i]:
                raise self._error(f"threats {i}", "threat", f"the threat {family} is there twice; name all its radii in one")
        return made

    def _model(self, name: str, value: Any) -> Entry:
        try:
            check_name(name)
        except UsageError as error:
            raise self._error("models", name, str(error)) from None
        if isinstance(value, str):
            return Entry(name, value)
        if not isinstance(value, dict):
            raise self._error("models", name, f"the model {name} is {value!r}; it should be a model's spec")
        self._known(value, "models", ("model", "training-seconds"), name)
        if not isinstance(value.get("model"), str):
            raise self._error("models", name, f"the model {name} needs a spec: {{ model = ... }}")
        seconds = value.get("training-seconds")
        if seconds is not None and not (type(seconds) in (int, float) and 0 <= seconds < math.inf):
            raise self._error("models", name, f"training-seconds is {seconds!r}; it should be a number, at least 0")
        return Entry(name, value["model"], None if seconds is None else float(seconds))

    def _threat(self, section: str, value: dict[str, Any], attacks: tuple[str, ...]) -> Threat:
        self._known(value, section, ("threat", "radii", "attacks", "closest"))
        self._need(value, section, ("threat",))
        built = self._family(section, value)
        radii = self._radii(section, value.get("radii", []), built) if isinstance(built, Lp) else (built.eps,)
        closest = self._names(section, "closest", value["closest"], built) if "closest" in value else ()
        if closest and not radii:
            if "attacks" in value:
                raise self._error(section, "attacks", "attacks run inside radii, and there are none; give radii as well")
            return Threat(spec.show(built, THREATS), (), (), closest)
        within = replace(built, eps=radii[0]) if radii and isinstance(built, Lp) else built
        where = section if "attacks" in value else ""
        named = self._names(where, "attacks", value.get("attacks", list(attacks)), within)
        # Without radii, the attacks search for the closest.
        return Threat(spec.show(built, THREATS), radii, named if radii else (), closest if radii else named)

    def _family(self, section: str, value: dict[str, Any]) -> Lp | Change:
        """The threat model without a radius."""
        given = self._value(section, "threat", value["threat"], _TEXT)
        try:
            built: Lp | Change = spec.parse(given, THREATS, "threat")
        except UsageError as error:
            raise self._error(section, "threat", str(error)) from None
        family, ball = spec.show(built, THREATS), isinstance(built, Lp)
        if ball and family not in BALLS:
            what = f"the threat is {given}; name the ball alone, as in linf, and its radii in radii"
            raise self._error(section, "threat", what)
        if not ball and "radii" in value:
            raise self._error(section, "radii", f"{family} has no radius; what limits it is in its settings; leave radii out")
        if not ball and "closest" in value:
            raise self._error(section, "closest", f"the closest example is searched for in {', '.join(BALLS)} only")
        return built

    def _radii(self, section: str, value: Any, ball: Lp) -> tuple[float, ...]:
        if not isinstance(value, list):
            raise self._error(section, "radii", f'radii is {value!r}; it should be a list, as in [0.1, "8/255"]')
        radii = []
        for one in value:
            try:
                eps = float(spec.parse(f"linf({one})", BALLS, "radius").eps) if not isinstance(one, bool) else math.nan
            except UsageError:
                eps = math.nan
            if not 0 < eps < math.inf:
                what = f'a radius is {one!r}; it should be a number greater than 0, as in 0.1 or "8/255"'
                raise self._error(section, "radii", what, one)
            try:
                radii.append(replace(ball, eps=eps).eps)
            except UsageError as error:
                raise self._error(section, "radii", str(error), one) from None
        return tuple(sorted(set(radii)))

    def _seeds(self, value: Any) -> tuple[int, ...]:
        right = isinstance(value, list) and value and all(type(seed) is int and 0 <= seed < 2**63 for seed in value)
        if not right or len(set(value)) < len(value):
            raise self._error("", "seeds", f"seeds is {value!r}; it should be a list of different whole numbers, at least 0")
        return tuple(value)

    def _names(self, section: str, key: str, value: Any, threat: Lp | Change | None = None) -> tuple[str, ...]:
        """Names of attacks, which are all known and serve the threat model."""
        if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
            raise self._error(section, key, f'{key} is {value!r}; it should be a list of attacks, as in ["fgsm", "apgd"]')
        # A suite of attacks chooses those that serve.
        alone = [name for name in value if name not in SUITES]
        attacks = {name: self._attack(section, key, name) for name in alone}
        for name, attack in attacks.items():
            try:
                if threat is not None:
                    check_serves(attack, threat)
            except UsageError as error:
                raise self._error(section, key, str(error), name) from None
        return tuple(value)

    def _attack(self, section: str, key: str, name: str) -> Attack:
        try:
            attack: Attack = spec.parse(name, ATTACKS, "attack")
        except UsageError as error:
            raise self._error(section, key, str(error), name) from None
        return attack

    def _value(self, section: str, key: str, value: Any, kind: _Kind) -> Any:
        if not kind.right(value):
            raise self._error(section, key, f"{key} is {value!r}; it should be {kind.wanted}")
        return value

    def _need(self, content: Mapping[str, Any], section: str, keys: tuple[str, ...]) -> None:
        for key in keys:
            if key not in content:
                raise self._error(section, "", f"{section.split()[0] if section else 'the suite'} needs {key}")

    def _known(self, content: Mapping[str, Any], section: str, keys: tuple[str, ...], line: str | None = None) -> None:
        for key in content:
            if key not in keys:
                raise self._error(section, line or key, str(spec.unknown("key", key, list(keys))))

    def _error(self, section: str, key: str, what: str, value: Any = None) -> UsageError:
        line = self._line(section, key, value)
        return UsageError(f"{self.where}, line {line}: {what}")

    def _line(self, section: str, key: str, value: Any) -> int:
        """The number of the line with a key of a section, or with one of its values; the section's own where it is not seen."""
        first, last = self._section(section)
        if not key:
            return max(first, 1)
        starts = [i for i in range(first, last) if re.match(rf'\s*"?{re.escape(key)}"?\s*[.=]', self.lines[i])]
        if not starts:
            head = re.compile(rf"\s*\[+\s*({re.escape(section)}\.)?{re.escape(key)}\s*\]")
            return next((i + 1 for i, line in enumerate(self.lines) if head.match(line)), max(first, 1))
        if value is None:
            return starts[0] + 1
        token = re.compile(rf"(?<![\w.]){re.escape(str(value))}(?![\w.])")
        texts = ((i, self.lines[i].split("=", i == starts[0])[-1]) for i in range(starts[0], last))
        return next((i + 1 for i, text in texts if token.search(text)), starts[0] + 1)

    def _section(self, section: str) -> tuple[int, int]:
        """The first line of a section's contents and the one after its last; ``threats 1`` is the second of that name."""
        name, _, number = section.partition(" ")
        heads = [i for i, line in enumerate(self.lines) if re.match(r"\s*\[", line) and "=" not in line.split("#")[0]]
        if not name:
            return 0, heads[0] if heads else len(self.lines)
        named = [i for i in heads if self.lines[i].split("#")[0].strip(" []\r") == name]
        if len(named) <= int(number or 0):
            return 0, len(self.lines)
        head = named[int(number or 0)]
        return head + 1, next((i for i in heads if i > head), len(self.lines))


@dataclass(frozen=True)
class _Kind:
    """What a value should be."""

    wanted: str
    right: Callable[[Any], bool]


_TEXT = _Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_COUNT = _Kind("a whole number, at least 1", lambda value: type(value) is int and 1 <= value <= spec.MOST)
_PLAIN = {
    "title": _TEXT,
    "data": _TEXT,
    "split": _TEXT,
    "limit": _COUNT,
    "block": _COUNT,
    "alone": _FLAG,
    "access": _Kind("gradients, scores or labels", lambda value: value in ("gradients", "scores", "labels")),
    "budget": _COUNT,
    "votes": _COUNT,
    "fast": _FLAG,
    "compile": _FLAG,
    "keep": _Kind("a whole number, at least 0", lambda value: type(value) is int and 0 <= value <= spec.MOST),
    "checks": _FLAG,
}


def check_name(name: Any) -> None:
    """Refuse a name of a model that is not one line of text.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise UsageError(f"a model is called {name!r}; a name should be a text of one line")


def changed(suite: Suite, **changes: Any) -> Suite:
    """The suite with other values where they are not None."""
    return replace(suite, **{key: value for key, value in changes.items() if value is not None})
