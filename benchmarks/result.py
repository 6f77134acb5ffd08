"""What an evaluation found, computed from its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from advkit.benchmarks.folder import Batch, Folder, Row, damaged, load_tensors, read_json, read_records, read_times
from advkit.benchmarks.statistics import Rate, rate
from advkit.errors import UsageError
from advkit.threat import BALLS

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "advkit/summary/1"
_RUN = {
    **dict.fromkeys(("model", "data"), dict),
    **dict.fromkeys(("advkit", "threat", "access", "goal"), str),
    **dict.fromkeys(("seed", "batch_size"), int),
    **dict.fromkeys(("alone", "quantize"), bool),
    "attacks": list,
}
"""What ``run.json`` holds that is read again."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Evaluation:
    """The result of ``advkit.evaluate``.

    Arguments:
        run: What was run: model, data, attacks, threat, goal, access, budget, seed.
        rows: A record an example.
        times: A record a batch and attack.
        notes: What was announced.
        tensors: ``x``, ``x_adv`` and ``x_8bit``, where they are in memory.
        folder: The folder, where they are in one.
    """

    def __init__(
        self,
        run: dict[str, Any],
        rows: list[Row],
        times: list[Row],
        notes: Sequence[str] = (),
        *,
        tensors: dict[str, Tensor] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.run, self.rows, self.times, self.notes, self.folder = run, rows, times, tuple(notes), folder
        self._tensors = tensors

    @property
    def clean_accuracy(self) -> Rate:
        """How many examples the model gets right."""
        return rate(sum(row["correct"] for row in self.rows), len(self.rows))

    @property
    def robust_accuracy(self) -> Rate:
        """How many examples the model gets right and no attack broke."""
        return rate(sum(row["correct"] and not row["success"] for row in self.rows), len(self.rows))

    @property
    def robust_accuracy_naive(self) -> Rate | None:
        """The same, where only the attacks that know nothing of a defense count; None where there are no others."""
        adaptive = self.run.get("adaptive", [])
        if not adaptive:
            return None
        fell = (any(part["success"] for part in row["attacks"] if part["attack"] not in adaptive) for row in self.rows)
        return rate(sum(row["correct"] and not broken for row, broken in zip(self.rows, fell, strict=True)), len(self.rows))

    @property
    def robust_accuracy_once(self) -> Rate | None:
        """How many the model gets right and no attack fooled in even one answer; None where one answer decides."""
        if self.run.get("votes", 1) == 1:
            return None
        return rate(sum(row["correct"] and not row["once"] for row in self.rows), len(self.rows))

    @property
    def robust_accuracy_8bit(self) -> Rate | None:
        """The same, where only successes count that still work as files of 8 bits, sounds of 16; None if not tried."""
        if not self.run["quantize"]:
            return None
        return rate(sum(row["correct"] and not row["success_8bit"] for row in self.rows), len(self.rows))

    @property
    def success_rate(self) -> Rate:
        """How many of the examples that the model gets right were broken."""
        return rate(sum(row["success"] for row in self.rows), sum(row["correct"] for row in self.rows))

    def examples(self) -> dict[str, Tensor]:
        """``x`` and ``x_adv``, (N, *), and ``x_8bit``, uint8, where successes were rounded; in the order of the rows.

        ``x_adv`` is the closest success, and x where there is none.
        """
        if self._tensors is not None:
            return self._tensors
        return load_tensors(self.folder, len(self.rows)) if self.folder else {}

    def table(self) -> pd.DataFrame:
        """A row an example."""
        import pandas as pd

        return pd.DataFrame([{key: value for key, value in row.items() if key != "attacks"} for row in self.rows])

    @property
    def minimum(self) -> bool:
        """Whether the run searched for the closest examples, without a radius."""
        return self.run["threat"].split("(")[0] in BALLS and "eps=" not in self.run["threat"]

    def distances(self) -> list[float]:
        """The distance of each example that the model gets right, inf where it was not broken; sorted."""
        return sorted(row["distance"] if row["success"] else math.inf for row in self.rows if row["correct"])

    def curve(self, radii: Sequence[float] | None = None) -> list[Row]:
        """Robust accuracy at each radius: the share that is right and has no success as close.

        Arguments:
            radii: The radii; by default, ten even steps up to where 99 of 100 are broken.

        Raises:
            UsageError: The run had a radius, so that its distances are not the closest.
        """
        if not self.minimum:
            raise UsageError(f"a run with {self.run['threat']} gives no curve; one without a radius, as in linf, does")
        finite = [d for d in self.distances() if d < math.inf]
        if radii is None:
            radii = _even(finite[min(len(finite) - 1, math.ceil(0.99 * len(finite)))]) if finite else []
        right = self.clean_accuracy.count
        counts = [right - sum(d <= eps for d in finite) for eps in radii]
        return [{"eps": eps, **rate(count, len(self.rows)).to_json()} for eps, count in zip(radii, counts, strict=True)]

    def by_attack(self) -> list[Row]:
        """What each attack did: on how many examples it was run, how many it broke, how many it broke first or closest."""
        return [self._attack(name) for name in self.run["attacks"]]

    def _attack(self, name: str) -> Row:
        parts = [part for row in self.rows for part in row["attacks"] if part["attack"] == name]
        broke = sum(part["success"] for part in parts)
        # Robust accuracy under this attack alone can be said only where it was run on every example that was right.
        everywhere = len(parts) == self.clean_accuracy.count
        alone = rate(self.clean_accuracy.count - broke, len(self.rows)).to_json() if everywhere else None
        return {
            "attack": name,
            "examples": len(parts),
            "broke": broke,
            "counted": sum(row["attack"] == name for row in self.rows),
            "robust_accuracy_alone": alone,
            "forwards": sum(part["forwards"] for part in parts),
            "backwards": sum(part["backwards"] for part in parts),
            "seconds": round(sum(row["seconds"] for row in self.times if row["attack"] == name), 3),
        }

    def summary(self) -> dict[str, Any]:
        """Everything but the rows, as it is written to ``summary.json``; ``docs/records.md`` says what each field is."""
        broken = [row for row in self.rows if row["success"]]
        queries = sorted(sum(part["forwards"] for part in row["attacks"]) for row in broken)
        rounded, once, naive = self.robust_accuracy_8bit, self.robust_accuracy_once, self.robust_accuracy_naive
        return {
            "schema": SCHEMA,
            "run": self.run,
            "examples": len(self.rows),
            "clean_accuracy": self.clean_accuracy.to_json(),
            "robust_accuracy": self.robust_accuracy.to_json(),
            "robust_accuracy_naive": naive.to_json() if naive else None,
            "robust_accuracy_once": once.to_json() if once else None,
            "robust_accuracy_8bit": rounded.to_json() if rounded else None,
            "attack_success_rate": self.success_rate.to_json(),
            "distance": _quantiles(self.distances()),
            "forwards_of_broken": _quantiles([float(q) for q in queries]),
            "forwards": sum(row["forwards"] for row in self.rows),
            "backwards": sum(row["backwards"] for row in self.rows),
            "checks": sum(row["checks"] for row in self.rows),
            "seconds": round(sum(row["seconds"] for row in self.times), 3),
            "attacks": self.by_attack(),
            "curve": self.curve() if self.minimum else None,
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> None:
        """Write the run to a new folder, as ``out=`` would have.

        Raises:
            UsageError: The folder holds something else.
        """
        size, tensors = self.run["batch_size"], self.examples()
        with Folder(Path(folder), self.run, [row["index"] for row in self.rows], size) as target:
            for start in range(len(target.rows), len(self.rows), size):
                times = [row for row in self.times if row["start"] == start]
                part = {name: tensor[start : start + size] for name, tensor in tensors.items()}
                target.append(Batch(self.rows[start : start + size], times, part))
            target.finish(self.summary())

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """Read a folder that ``save`` or ``out=`` wrote; of a run that was stopped, the rows there are.

        Raises:
            UsageError: There is no run in the folder, or it is damaged.
        """
        path = Path(folder)
        if not (path / "run.json").exists():
            raise UsageError(f"{path} holds no run; it should be a folder that advkit attack wrote")
        summary, run = path / "summary.json", read_json(path / "run.json")
        wrong = [key for key, kind in _RUN.items() if not isinstance(run.get(key), kind)]
        wrong = wrong or [key for key in ("model", "data") if not {"name", "digest"} <= set(run[key])]
        if wrong:
            raise damaged(path / "run.json", f"its {wrong[0]} is not what it should be")
        notes = read_json(summary).get("notes", []) if summary.exists() else []
        return cls(run, read_records(path), read_times(path), notes, folder=path)

    def __repr__(self) -> str:
        return (
            f"Evaluation({self.run['model']['name']} on {len(self.rows)} examples of {self.run['data']['name']}, "
            f"{self.run['threat']}: clean {self.clean_accuracy}, robust {self.robust_accuracy})"
        )


def _quantiles(values: list[float]) -> Row | None:
    """Quantiles of sorted values, each one of them; null stands for inf."""
    if not values:
        return None
    picked = {f"q{100 * q:02.0f}": values[min(len(values) - 1, int(q * len(values)))] for q in QUANTILES}
    return {name: value if value < math.inf else None for name, value in picked.items()}


def _even(most: float) -> list[float]:
    """Ten even steps that reach ``most``, of a width that reads well."""
    raw = most / 10
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    return [round(step * (i + 1), 12) for i in range(10)]
