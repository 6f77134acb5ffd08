"""The report of attacks on a recogniser of speech: one page that can be heard, a table, and a file for CI."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.benchmarks import ci, gallery, plots
from advkit.benchmarks.folder import Row, replace
from advkit.benchmarks.report import environment
from advkit.benchmarks.speech_result import Speech
from advkit.errors import UsageError
from advkit.sound import wav

if TYPE_CHECKING:
    from torch import Tensor

    from advkit.benchmarks.gates import Decision

FILES = ("report.html", "junit.xml", "summary.json", "sounds.csv")
"""What a report is."""

MOST = 30
"""How many sounds a page has: each is in it, with its plots."""

WHAT = {
    "wer": "word error rate, against what is said",
    "cer": "character error rate, against what is said",
    "target_wer": "word error rate, against the target",
    "snr": "signal-to-noise ratio, dB",
    "db_x": "loudest change to loudest sample, dB",
    "above": "share of bins above the masking threshold",
    "pesq": "PESQ (1 bad, 4.6 the same)",
    "stoi": "STOI (1 the same)",
    "proxy_wer": "word error rate of the proxy, at most 1",
    "queries": "queries a sound",
    "passes": "passes a sound",
    "seconds": "CPU seconds a sound",
}
"""The means of a summary, as tables call them."""

SOUNDS = {
    "attack": "what was made",
    "clean": "the clean sound",
    "fast": "the same sped up to the same length",
    "noise": "noise of that length and level",
}
"""What is heard beside each other, as tables call it."""


def report(result: Speech, out: str | Path, decisions: Sequence[Decision] = (), title: str | None = None) -> list[Path]:
    """Write a report to a folder and say which files it has.

    Arguments:
        result: The run, with the folder of its sounds.
        out: The folder; made if it is not there. Files of an earlier report are replaced.
        decisions: What the gates decided.
        title: The title; by default, the attack and the recogniser.

    Raises:
        UsageError: ``out`` is a file or holds a run, nothing is finished, or the sounds are not there.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; --out should be a folder")
    if (folder / "run.json").exists():
        raise UsageError(f"{folder} holds a run, whose summary.json stays as it is; give --out another folder")
    if not result.rows or result.folder is None:
        raise UsageError(
            "there is nothing to report: no sound is finished, or none was kept; the command that began it goes on"
        )
    folder.mkdir(parents=True, exist_ok=True)
    found = {"title": title or _title(result), **result.summary(decisions)}
    as_json = json.dumps(found, indent=2, allow_nan=False) + "\n"
    contents = (page(result, found), ci.junit({**found, "results": []}), as_json, _csv(result.rows))
    for name, content in zip(FILES, contents, strict=True):
        replace(folder / name, content.encode(errors="replace"))
    return [folder / name for name in FILES]


def page(result: Speech, found: Row) -> str:
    """The page, in one file: the numbers, and each sound with its plots, what it is heard as, and its controls."""
    context = {
        "summary": found,
        "numbers": [(WHAT[name], value) for name, value in found["means"].items() if value is not None],
        "names": SOUNDS,
        "rows": [{**row, "sounds": _sounds(result, row)} for row in result.rows[:MOST]],
        "left": max(0, len(result.rows) - MOST),
    }
    return environment().get_template("speech.html.jinja").render(context)


def _title(result: Speech) -> str:
    return f"{result.run['attack']} on {result.run['model']['name']}"


def _sounds(result: Speech, row: Row) -> list[Row]:
    """The sounds of a row for the page: their names, data URIs and plots."""
    assert result.folder is not None
    rate = result.run["rate"]
    read = {kind: _read(result.folder / path, rate) for kind, path in row["files"].items() if kind != "difference"}
    parts = [(kind, read[kind]) for kind in ("original", "adversarial") if kind in read]
    top = max(float(x.abs().max()) for _, x in parts)
    loudest = max(float(plots.spectrum_of(x).max()) for _, x in parts)
    if "difference" in row["files"]:
        delta = read["adversarial"] - read["original"]
        most = float(delta.abs().max())
        times = max(1, math.floor(top / most)) if most else 1
        parts.append((f"difference x {times}", delta * times))
    return [{"name": kind, "uri": gallery.wav(x, rate), "plot": plots.sound(x, rate, top, loudest)} for kind, x in parts]


def _read(path: Path, rate: int) -> Tensor:
    return wav.read(path, rate, math.inf)[0]


def _csv(rows: Sequence[Row]) -> str:
    """A line a sound, without what is in lists of its own."""
    flat: list[dict[str, Any]] = [{key: value for key, value in row.items() if not isinstance(value, dict)} for row in rows]
    for one, row in zip(flat, rows, strict=True):
        one |= {f"{kind} heard": control["heard"] for kind, control in row["controls"].items()}
        one |= {f"over {name}": part["count"] / part["of"] for name, part in row["channels"].items()}
        one |= {f"{kind} file": path for kind, path in row["files"].items()}
    out = io.StringIO()
    columns = list(dict.fromkeys(key for one in flat for key in one))
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()
