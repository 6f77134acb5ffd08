"""``advkit list``: what may be named."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Mapping
from typing import Any

Subparsers = Any


def add(commands: Subparsers) -> None:
    """Add the command."""
    command = commands.add_parser(
        "list", help="list what may be named on the command line", description="List what may be named, one line each."
    )
    command.add_argument("what", choices=sorted(LISTS), help="what to list")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the list."""
    rows = LISTS[arguments.what]()
    width = max(len(name) for name, _ in rows)
    for name, line in rows:
        print(f"{name:<{width}}  {line}")
    return 0


def _attacks() -> list[tuple[str, str]]:
    from advkit.attacks import ATTACKS

    return [(_signature(name, make), _about(make)) for name, make in ATTACKS.items()]


def _about(make: Any) -> str:
    """Access, norms, kind and paper of an attack; a wrapper has them from what it wraps."""
    from advkit.norms import norm_name
    from advkit.oracle import Access

    if not isinstance(getattr(make, "access", None), Access):
        return f"{make.paper}"
    norms = ", ".join(norm_name(p) for p in make.norms)
    return f"{make.access.name.lower()}; {norms}; {'closest' if make.minimum else 'fixed radius'}; {make.paper}"


def _signature(name: str, make: Any) -> str:
    from advkit.spec import settings

    return f"{name}({', '.join(field.name for field in settings(make))})"


def _speech_attacks() -> list[tuple[str, str]]:
    from advkit.attacks.audio import SPEECH_ATTACKS

    return [(_signature(name, make), _about_speech(make)) for name, make in SPEECH_ATTACKS.items()]


def _about_speech(make: Any) -> str:
    """The access, what it does, and the paper; of one that changes a recording, what it says as an attack of the kernel."""
    if hasattr(make, "make"):
        return f"{make.access.name.lower()}; says a text; {make.paper}"
    return f"gradients; one change for every recording; {make.paper}" if hasattr(make, "fit") else _about(make)


def _channels() -> list[tuple[str, str]]:
    from advkit.audio.channels import CHANNELS

    return _rows(CHANNELS)


def _recognisers() -> list[tuple[str, str]]:
    from advkit.audio.loading import RECOGNISERS

    return list(RECOGNISERS.items())


def _voices() -> list[tuple[str, str]]:
    from advkit.audio.synthesis import VOICES, installed

    here = installed()
    return [
        (name, voice.about if name in here else f"{voice.about} (apt-get install {voice.packages})")
        for name, voice in VOICES.items()
    ]


def _suites() -> list[tuple[str, str]]:
    from advkit.benchmarks.suites import SUITES

    return [(name, (inspect.getdoc(suite) or "").splitlines()[0]) for name, suite in SUITES.items()]


def _benchmarks() -> list[tuple[str, str]]:
    from advkit.benchmarks.suitefile import shipped

    return [(name, path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")) for name, path in shipped().items()]


def _threats() -> list[tuple[str, str]]:
    from advkit.norms import norm_name
    from advkit.threat import BALLS, CHANGES

    def line(make: Any) -> str:
        return f"||z - x|| <= eps in {norm_name(make.keywords['p'])}, z in the data's range; without eps: the closest example"

    balls = [(f"{name}(eps)", line(make)) for name, make in BALLS.items()]
    return [*balls, *((_signature(name, make), (inspect.getdoc(make) or "").splitlines()[0]) for name, make in CHANGES.items())]


def _models() -> list[tuple[str, str]]:
    from advkit.models import MODELS

    return list(MODELS.items())


def _data() -> list[tuple[str, str]]:
    from advkit.data import DATA

    return list(DATA.items())


def _certificates() -> list[tuple[str, str]]:
    from advkit.defenses.certificates import CERTIFICATES

    return _rows(CERTIFICATES)


def _gans() -> list[tuple[str, str]]:
    from advkit.gan.pair import GANS

    return _rows(GANS)


def _game_losses() -> list[tuple[str, str]]:
    from advkit.gan.losses import GAME_LOSSES

    return _rows(GAME_LOSSES)


def _defenses() -> list[tuple[str, str]]:
    from advkit.defenses import DEFENSES

    return _rows(DEFENSES)


def _detectors() -> list[tuple[str, str]]:
    from advkit.defenses.detectors import DETECTORS

    return _rows(DETECTORS)


def _inference() -> list[tuple[str, str]]:
    from advkit.defenses.inference import INFERENCE

    return _rows(INFERENCE)


def _rows(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of a table with their settings, and the first line of each docstring."""
    return [(_signature(name, make), (inspect.getdoc(_made(make)) or "").splitlines()[0]) for name, make in table.items()]


def _made(make: Any) -> Any:
    """What an entry of a table makes, also where some settings are fixed."""
    return getattr(make, "func", make)


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "attacks": _attacks,
    "benchmarks": _benchmarks,
    "certificates": _certificates,
    "channels": _channels,
    "data": _data,
    "defenses": _defenses,
    "detectors": _detectors,
    "game-losses": _game_losses,
    "gans": _gans,
    "inference": _inference,
    "models": _models,
    "recognisers": _recognisers,
    "speech-attacks": _speech_attacks,
    "suites": _suites,
    "threats": _threats,
    "voices": _voices,
}
