"""What was said and what was heard: text as it is compared, and how far one is from the other."""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from advkit.errors import UsageError
from advkit.spec import Table, check_at_least

ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def normalise(text: str) -> str:
    """Lower case letters and apostrophes, words apart by one space, numbers spelled out.

    Three digits and more are spelled one by one, but for whole hundreds and thousands; the sign of dollars is said after.

    >>> normalise("  Call 911, it's 25 O'Clock!")
    "call nine one one it's twenty five o'clock"
    """
    plain = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    plain = re.sub(r"\$([0-9]+)", r"\1 dollars", plain)
    spelled = re.sub("[0-9]+", lambda number: f" {_spelled(number[0])} ", plain)
    return " ".join(word.strip("'") for word in re.findall(r"[^\W\d_']+(?:'[^\W\d_]+)*'?", spelled))


def _spelled(digits: str) -> str:
    if re.fullmatch("[1-9]0{2,3}", digits):
        return f"{ONES[int(digits[0])]} {'hundred' if len(digits) == 3 else 'thousand'}"
    if len(digits) > 2 or (len(digits) == 2 and digits[0] == "0"):
        return " ".join(ONES[int(digit)] for digit in digits)
    n = int(digits)
    return ONES[n] if n < 20 else f"{TENS[n // 10 - 2]} {ONES[n % 10] if n % 10 else ''}"


def wer(wanted: str, heard: str) -> float:
    """The word error rate: edits from ``wanted`` to ``heard``, in words of ``wanted``; 0 is the same, more than 1 is possible.

    Both are normalised first. Against nothing that was said, every word heard counts as 1.

    >>> wer("open the front door", "Open the door.")
    0.25
    """
    return float(_jiwer().wer(normalise(wanted), normalise(heard)))


def cer(wanted: str, heard: str) -> float:
    """The same in characters."""
    return float(_jiwer().cer(normalise(wanted), normalise(heard)))


def _jiwer() -> ModuleType:
    try:
        import jiwer
    except ImportError:
        raise UsageError("error rates of words need jiwer; pip install 'advkit[audio]'") from None
    return jiwer


class Match(Protocol):
    """When what was heard counts as what was wanted; frozen data."""

    def __call__(self, wanted: str, heard: str) -> bool:
        """Whether it does."""


@dataclass(frozen=True)
class Exact:
    """The same words, after :func:`normalise`."""

    def __call__(self, wanted: str, heard: str) -> bool:
        """Whether they are."""
        return normalise(wanted) == normalise(heard)


@dataclass(frozen=True)
class Contains:
    """The words that are wanted are heard, one after the other, among others."""

    def __call__(self, wanted: str, heard: str) -> bool:
        """Whether they are."""
        return f" {normalise(wanted)} " in f" {normalise(heard)} "


@dataclass(frozen=True)
class Wer:
    """The word error rate is at most a bound.

    Arguments:
        most: The bound, at least 0.

    Raises:
        UsageError: The bound is negative.
    """

    most: float = 0.5

    def __post_init__(self) -> None:
        check_at_least("wer: most", self.most, 0)

    def __call__(self, wanted: str, heard: str) -> bool:
        """Whether it is."""
        return wer(wanted, heard) <= self.most


MATCHES: Table = {"exact": Exact, "contains": Contains, "wer": Wer}
"""When a transcript counts as said: ``exact``, ``contains``, ``wer(0.5)``."""


def check_said(text: str) -> str:
    """The text, normalised.

    Raises:
        UsageError: Nothing is left of it.
    """
    plain = normalise(text)
    if not plain:
        raise UsageError(f"the text is {text!r}; it should hold at least one word")
    return plain
