"""What a check of an evaluation found, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from advkit.errors import UsageError

SEVERITIES = ("suspect", "warning", "fine")
"""From the worst: the number cannot be trusted; look at it; the check found nothing."""


@dataclass(frozen=True)
class Finding:
    """One check of one model under one threat model.

    Attributes:
        check: The check's name: ``zero-gradients``.
        severity: One of ``SEVERITIES``.
        model: The model's name.
        threat: The threat model's spec.
        evidence: A sentence with the numbers.
        advice: A sentence: what it means and what to do. Empty where nothing was found.
        command: The next command to run; empty where there is none.
        numbers: The numbers of the evidence, by name.
    """

    check: str
    severity: str
    model: str
    threat: str
    evidence: str
    advice: str = ""
    command: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields, as they are written to a file."""
        return {**asdict(self), "numbers": dict(self.numbers)}

    @classmethod
    def from_json(cls, content: Any) -> Finding:
        """What ``to_json`` made.

        Raises:
            UsageError: It is something else.
        """
        try:
            found = cls(**content)
        except TypeError:
            raise UsageError("a finding lacks a field or has one too many; repeat the run elsewhere") from None
        texts = (found.check, found.model, found.threat, found.evidence, found.advice, found.command)
        numbers = found.numbers.values() if isinstance(found.numbers, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not all(type(number) in (int, float) for number in numbers):
            raise UsageError("a finding holds something else than texts and numbers; repeat the run elsewhere")
        if found.severity not in SEVERITIES:
            raise UsageError(f"a finding has the severity {found.severity!r}; known are {', '.join(SEVERITIES)}")
        return found
