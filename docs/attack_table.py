"""Write the table of attacks in ``attacks.md``, beside this file, from the code: ``python docs/attack_table.py``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from advkit.attacks import ATTACKS
from advkit.norms import norm_name
from advkit.oracle import Access

PAGE = Path(__file__).with_name("attacks.md")
BEGIN = "<!-- Between these two comments the page is written by docs/attack_table.py. -->"
END = "<!-- End of the table. -->"
HEAD = ("name", "access", "norms", "radius", "passes at most", "paper")


def table() -> str:
    """The table, a line an attack, in the order of ``ATTACKS``."""
    lines = [HEAD, ("---",) * len(HEAD), *(_cells(name, make) for name, make in ATTACKS.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(name: str, make: Any) -> tuple[str, ...]:
    linked = f"[`{name}`]({_source(make)})"
    # What a wrapper needs and serves is a property, not a constant of the class.
    if not isinstance(make.access, Access):
        return linked, *("of what it wraps",) * 4, make.paper
    norms = ", ".join(norm_name(p) for p in make.norms)
    radius = "closest" if make.minimum else "fixed"
    return linked, make.access.name.lower(), norms, radius, f"{make().cost:,}", _paper(make)


def _source(make: Any) -> str:
    """The path of the file of a class, from this folder."""
    return "../" + make.__module__.replace(".", "/").replace("advkit/attacks/", "attacks/") + ".py"


def _paper(make: Any) -> str:
    """The paper with a link to it: the first in the docstring."""
    link = re.search(r"https://[\w./-]*\w", inspect.getdoc(make) or "")
    return f"[{make.paper}]({link[0]})" if link else make.paper


def with_table(page: str) -> str:
    """The text of a page with the table between its two comments.

    Raises:
        ValueError: The comments are not there.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"{PAGE.name} should hold each of the two comments once: {BEGIN} and {END}")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
