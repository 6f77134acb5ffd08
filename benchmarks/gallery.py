"""Adversarial examples to look at and to listen to, as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from advkit import spec
from advkit.benchmarks.ledger import owners
from advkit.benchmarks.records import Records, Shown
from advkit.norms import norm_name
from advkit.threat import BALLS

MOST = 6
"""How many examples a gallery shows."""

RATE = 16_000
"""Samples a second of a waveform where the data do not say."""


@dataclass(frozen=True)
class Card:
    """One adversarial example as a page shows it.

    Attributes:
        caption: What the model said before and after, how far away, and which attack: ``7 -> 2, l_inf 0.043, fmn``.
        model: The model's name.
        index: The number of the example.
        kind: ``image``, ``waveform`` or ``features``.
        parts: (what it is, its data URI, or its text where it is neither seen nor heard).
    """

    caption: str
    model: str
    index: int
    kind: str
    parts: tuple[tuple[str, str], ...]


def galleries(records: Records, family: str) -> dict[str, list[Card]]:
    """What is worth a look, by why: the closest, those that one attack alone broke, and those that fooled every model.

    Arguments:
        records: The run.
        family: The family of the threat model.
    """
    shown = {model: records.shown(model, family) for model in records.models}
    found = {"The closest": _in_turn(list(shown.values())), **_last(records, family, shown)}
    if len(records.models) > 1:
        found["Every model fell for these"] = _everywhere(shown)
    return {why: [card(records, one) for one in group[:MOST]] for why, group in found.items() if group}


def _in_turn(groups: Sequence[Sequence[Shown]]) -> list[Shown]:
    """The closest of each model, then the second closest of each."""
    most = max((len(group) for group in groups), default=0)
    return [group[i] for i in range(most) for group in groups if i < len(group)]


def _last(records: Records, family: str, shown: dict[str, list[Shown]]) -> dict[str, list[Shown]]:
    """The examples that one attack alone broke; where each attack ran on what was left, those that the later ones broke."""
    radii = records.radii(family)
    if not radii or len(records.attacks(family)) < 2:
        return {}
    why = "Only this attack broke these" if records.about["alone"] else "The first attack failed on these"
    names = records.attacks(family) if records.about["alone"] else records.attacks(family)[1:]
    groups = []
    for model, found in shown.items():
        own = owners(records, model, family, radii[-1])
        groups.append([one for one in found if one.attack in names and one.index in own[one.attack]])
    return {why: _in_turn(groups)}


def _everywhere(shown: dict[str, list[Shown]]) -> list[Shown]:
    """The examples that fooled every model, beside each other; first those for which the most robust had to be moved least."""
    by_index: dict[int, list[Shown]] = {}
    for one in (one for found in shown.values() for one in found):
        by_index.setdefault(one.index, []).append(one)
    whole = [group for group in by_index.values() if len(group) == len(shown)]
    return [one for group in sorted(whole, key=lambda group: max(one.distance for one in group)) for one in group]


def card(records: Records, one: Shown) -> Card:
    """An adversarial example as a page shows it."""
    data = records.about["data"]
    norm = norm_name(spec.parse(one.family, BALLS, "threat").p) if one.family in BALLS else one.family
    caption = f"{one.label} -> {one.adversarial}, {norm} {one.distance:.3g}, {one.attack}"
    kind = _kind(one.x, data)
    make = {"image": _images, "waveform": _sounds}.get(kind, _numbers)
    return Card(caption, one.model, one.index, kind, make(one.x.double(), one.x_adv.double(), data))


def _kind(x: Tensor, data: dict[str, Any]) -> str:
    """What an example is shown as; an image in any range, as [-1, 1], can be seen."""
    if x.ndim == 3 and x.shape[0] in (1, 3) and data["high"] - data["low"] < math.inf:
        return "image"
    return "waveform" if data["kind"] == "waveform" else "features"


def _images(x: Tensor, x_adv: Tensor, data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    low, width = data["low"], data["high"] - data["low"]
    change = (x_adv - x) / width
    factor = _factor(change, 0.5)
    return (
        ("original", png((x - low) / width)),
        (f"difference x {factor}", png(0.5 + factor * change)),
        ("adversarial", png((x_adv - low) / width)),
    )


def _sounds(x: Tensor, x_adv: Tensor, data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    most, rate = max(abs(data["low"]), abs(data["high"])), int(data.get("rate", RATE))
    change = (x_adv - x) / most
    factor = _factor(change, 1.0)
    return (
        ("original", wav(x / most, rate)),
        (f"difference x {factor}", wav(factor * change, rate)),
        ("adversarial", wav(x_adv / most, rate)),
    )


def _numbers(x: Tensor, x_adv: Tensor, data: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """The three numbers that changed most."""
    x, x_adv = x.flatten(), x_adv.flatten()
    order = (x_adv - x).abs().argsort(descending=True, stable=True)[:3]
    return tuple((f"x[{i}]", f"{x[i]:.4g} -> {x_adv[i]:.4g}") for i in order.tolist())


def _factor(change: Tensor, room: float) -> int:
    """The greatest whole factor that keeps a change inside the room there is."""
    most = float(change.abs().max())
    return max(1, math.floor(room / most)) if most else 1


def png(image: Tensor) -> str:
    """An image (C, H, W) in [0, 1], with one or three channels, as the data URI of a PNG; values outside are cut."""
    from PIL import Image

    out = io.BytesIO()
    pixels = (image * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
    Image.fromarray((pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).numpy()).save(out, format="png", optimize=True)
    return _uri("image/png", out.getvalue())


def wav(sound: Tensor, rate: int) -> str:
    """A waveform (T,) or (1, T) in [-1, 1] as the data URI of a WAV file of 16 bits; values outside are cut.

    Arguments:
        sound: The samples.
        rate: Samples a second.
    """
    import wave

    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.flatten() * 32767).round().clamp(-32768, 32767).short().numpy().astype("<i2").tobytes())
    return _uri("audio/wav", out.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
