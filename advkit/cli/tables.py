"""Tables on the terminal."""

from __future__ import annotations

import sys
from typing import Any


def show(*tables: Any, width: int = 120) -> None:
    """Print tables of rich, as wide as the terminal; ``width`` characters where the output is none."""
    from rich.console import Console

    console = Console(width=None if sys.stdout is not None and sys.stdout.isatty() else width)
    # Captured, because a console of its own accord ends the program when whoever reads its output has gone.
    with console.capture() as captured:
        console.print(*tables)
    print(captured.get(), end="")
