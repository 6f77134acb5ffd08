"""``advkit gan``: train a generator, draw from it, attack with it, and see what it has learned."""

from __future__ import annotations

from typing import Any


def add(commands: Any) -> None:
    """Add the command and those below it."""
    from advkit.cli import gan_attack, gan_invert, gan_natural, gan_sample, gan_score, gan_train

    command = commands.add_parser(
        "gan",
        help="train generators, draw from them, and see what they have learned",
        description="Generative adversarial networks: as sources of data, as attackers, and as learners with few labels.",
        allow_abbrev=False,
    )
    below = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for part in (gan_train, gan_sample, gan_score, gan_invert, gan_attack, gan_natural):
        part.add(below)
