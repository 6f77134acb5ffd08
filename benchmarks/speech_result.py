"""What attacks on a recogniser of speech came to, computed from the rows: rates, means, controls, gates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advkit.benchmarks.folder import Row, damaged, read_json, read_rows
from advkit.benchmarks.gates import SPOKEN, Decision, Gate, verdict
from advkit.benchmarks.statistics import Estimate, Rate, rate, student
from advkit.errors import UsageError
from advkit.sound.wav import RATES
from advkit.spec import unknown

KIND = "speech"
"""What ``run.json`` says of such a folder."""

COLUMNS = {
    "index": int,
    "name": str,
    "reference": str,
    "target": str | None,
    "before": str | None,
    "after": str,
    "success": bool,
    "wer": float,
    "cer": float,
    "target_wer": float | None,
    "target_cer": float | None,
    "snr": float | None,
    "db_x": float | None,
    "above": float | None,
    "pesq": float | None,
    "stoi": float | None,
    "proxy": str | None,
    "proxy_wer": float | None,
    "controls": dict,
    "channels": dict,
    "queries": int,
    "passes": int,
    "seconds": float,
    "files": dict,
}
"""What a row holds."""

HEARD: dict[str, Any] = {"heard": str, "success": bool, "wer": float, "proxy": str | None, "proxy_wer": float | None}
"""What is known of a control."""

DRAWS: dict[str, Any] = {"count": int, "of": int}
"""What is known of a channel."""

RUN: dict[str, Any] = {
    **{"attack": str, "goal": str, "model": dict, "listener": dict | None, "threat": str | None},
    **{"over": list, "rate": int, "notes": list},
}
"""What has to be known of a run for its numbers and its report."""

MEASURES = ("wer", "cer", "target_wer", "snr", "db_x", "above", "pesq", "stoi", "proxy_wer", "queries", "passes", "seconds")
"""The columns of which a summary has the mean."""

FILE = re.compile(r"clips/[\w.-]+\.wav")
"""What the path of a sound is in the folder."""

HIDDEN = 0.5
"""From which word error rate of the proxy on, capped at 1, a sound counts as not understood by it."""


@dataclass(frozen=True)
class Speech:
    """What came of attacks on a recogniser.

    Attributes:
        run: What was run: model, attack, threat, listener, seed and versions.
        rows: A row a clip or command; ``docs/speech.md`` says what each field is.
        notes: What was announced.
        folder: Where the sounds are, where they were kept.
    """

    run: dict[str, Any]
    rows: list[Row]
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    @classmethod
    def load(cls, folder: str | Path) -> Speech:
        """What is finished of a run in a folder.

        Raises:
            UsageError: There is none, or it is damaged.
        """
        folder = Path(folder)
        run = _run(folder / "run.json")
        rows = checked(read_rows(folder / "rows.jsonl", set(COLUMNS)), folder)
        if any(list(row["channels"]) != run["over"] for row in rows):
            raise damaged(folder / "rows.jsonl", "its channels are not those of the run")
        return cls(run, rows, tuple(run["notes"]), folder)

    @property
    def success(self) -> Rate:
        """How many sounds are heard as the attack wants."""
        return rate(sum(row["success"] for row in self.rows), len(self.rows))

    @property
    def hidden(self) -> Rate | None:
        """How many commands are, while the proxy loses at least half of the words; None without one, and of recordings."""
        if not self.run["listener"] or self.run["goal"] != "command":
            return None
        return rate(sum(row["success"] and row["proxy_wer"] >= HIDDEN for row in self.rows), len(self.rows))

    def mean(self, name: str) -> Estimate | None:
        """The mean of a measure over the rows that have it, with Student's interval; None where none has."""
        known = [row[name] for row in self.rows if row[name] is not None]
        if not known:
            return None
        found = student(known)
        return found if name in ("snr", "db_x", "stoi") else Estimate(found.value, max(0.0, found.low), found.high)

    def controls(self) -> list[Row]:
        """What is heard in what was made, and in each control: how often that is what is wanted, and word error rates."""
        named = [("attack", self.rows)]
        for name in ("clean", "fast", "noise"):
            named.append((name, [row["controls"][name] for row in self.rows if row["controls"].get(name)]))
        return [_control(name, parts) for name, parts in named if parts]

    def channels(self) -> list[Row]:
        """The share of draws of each channel after which a sound is still heard as the attack wants."""
        found = []
        for name in self.run["over"]:
            counts = [row["channels"][name] for row in self.rows]
            count, of = (sum(part[key] for part in counts) for key in ("count", "of"))
            found.append({"channel": name, "count": count, "of": of, "value": count / of if of else None})
        return found

    def summary(self, decisions: Sequence[Decision] = ()) -> Row:
        """Every number, as it is written to ``summary.json``."""
        means = {name: self.mean(name) for name in MEASURES}
        return {
            "schema": "advkit/speech/1",
            "run": self.run,
            "notes": list(self.notes),
            "examples": len(self.rows),
            "success": self.success.to_json(),
            "hidden": self.hidden.to_json() if self.hidden else None,
            "means": {name: _ends(found) if found else None for name, found in means.items()},
            "controls": self.controls(),
            "channels": self.channels(),
            "gates": [_decision(one) for one in decisions],
        }


def _run(path: Path) -> Row:
    """What was run, after a look at its types."""
    run = _typed(read_json(path), RUN, path)
    for one in (run["model"], run["listener"]):
        _typed({"name": "", "digest": ""} if one is None else one, {"name": str, "digest": str}, path)
    if not RATES[0] <= run["rate"] <= RATES[1]:
        raise damaged(path, f"rate is {run['rate']}")
    return run


def checked(rows: list[Row], folder: Path) -> list[Row]:
    """The rows, after a look at their types.

    Raises:
        UsageError: One holds something of another type.
    """
    path = folder / "rows.jsonl"
    for row in rows:
        _typed(row, COLUMNS, path)
        for kinds, parts in ((HEARD, row["controls"]), (DRAWS, row["channels"])):
            for part in parts.values():
                _typed(part, kinds, path)
        # A report has the sounds in it, so that a file from elsewhere would be shown to whoever reads it.
        if "adversarial" not in row["files"] or not all(FILE.fullmatch(str(file)) for file in row["files"].values()):
            raise damaged(path, f"files is {row['files']!r}")
    return rows


def _typed(found: Any, kinds: dict[str, Any], path: Path) -> Row:
    """What was read from a file, after a look at its types."""
    if not isinstance(found, dict):
        raise damaged(path, f"it holds {found!r}")
    for key, kind in kinds.items():
        value = float(found[key]) if type(found.get(key)) is int and kind is not int else found.get(key)
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise damaged(path, f"{key} is {value!r}")
    return found


def is_speech(folder: Path) -> bool:
    """Whether a folder holds attacks on a recogniser of speech."""
    return (folder / "run.json").is_file() and read_json(folder / "run.json").get("kind") == KIND


def decide(gate: Gate, result: Speech, *, strict: bool = False) -> Decision:
    """Whether a run passes a gate on ``success``, ``wer`` or ``snr``.

    Success is a share with its exact interval; the others are means with Student's. What is not decided passes, unless
    ``strict``.

    Raises:
        UsageError: The gate is on something else, or on what was not measured.
    """
    if gate.quantity not in SPOKEN:
        raise UsageError(f"the gate {gate.text!r} is for classifiers; of a recogniser there are {', '.join(SPOKEN)}")
    name = result.run["model"]["name"]
    if gate.model not in (None, name):
        raise unknown("model", str(gate.model), [name])
    value = result.success if gate.quantity == "success" else result.mean(gate.quantity)
    if value is None or not result.rows:
        raise UsageError(f"the run has no {gate.quantity}, so {gate.text!r} cannot be decided")
    said = verdict(gate, value.low, value.high)
    sentence = f"{gate.quantity} on {name} is {value} over {len(result.rows)} sounds and should be {gate.bound}: {said}"
    fine = said == "passed" or (said == "undecided" and not strict)
    return Decision(gate.text, name, value, said, False, None, fine, sentence)


def _decision(decision: Decision) -> Row:
    named = {name: getattr(decision, name) for name in ("gate", "model", "verdict", "ok", "suspect", "sentence")}
    return {**named, **_ends(decision.value)}


def _ends(value: Rate | Estimate) -> Row:
    """A number and its interval for JSON, which has no inf."""
    return {name: _finite(getattr(value, name)) for name in ("value", "low", "high")}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _control(name: str, parts: Sequence[Row]) -> Row:
    """What was heard in the sounds of one kind."""

    def of(key: str) -> tuple[Row | None, float | None]:
        known = [min(1.0, part[key]) for part in parts if part[key] is not None]
        return (rate(known.count(0), len(known)).to_json(), sum(known) / len(known)) if known else (None, None)

    (exact, wer), (proxy_exact, proxy_wer) = of("wer"), of("proxy_wer")
    wanted = rate(sum(part["success"] for part in parts), len(parts)).to_json()
    heard = {"success": wanted, "exact": exact, "wer": wer, "proxy_exact": proxy_exact, "proxy_wer": proxy_wer}
    return {"sound": name, "sounds": len(parts), **heard}
