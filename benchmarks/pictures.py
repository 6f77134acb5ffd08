"""What a person would rather look at than read: adversarial images beside their originals, and the curve over radii."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from advkit.benchmarks.folder import Row
    from advkit.benchmarks.result import Evaluation

LEAST_HEIGHT = 112
"""Pictures of smaller images are enlarged by a whole factor to at least this many pixels."""


def save_pictures(result: Evaluation, folder: Path, limit: int) -> int:
    """Write PNG files of the first successes of an evaluation of images, and say how many.

    ``files/`` gets each adversarial image as it is, ``pictures/`` the original, the adversarial image and their difference
    side by side (grey is no change, and the greatest change is black or white). A success that was rounded to 8 bits is
    shown as rounded.

    Arguments:
        result: The evaluation.
        folder: Where the two folders are made.
        limit: How many at most.
    """
    broken = [i for i, row in enumerate(result.rows) if row["success"] and row["distance"] > 0][:limit]
    tensors = result.examples() if broken else {}
    if not broken or not _is_image(tensors["x"]):
        return 0
    low, high = _range(result.run["threat"])
    for name in ("files", "pictures"):
        (folder / name).mkdir(exist_ok=True)
    for i in broken:
        row = result.rows[i]
        x = _bytes(tensors["x"][i], low, high)
        rounded = row["success_8bit"] and "x_8bit" in tensors
        x_adv = tensors["x_8bit"][i] if rounded else _bytes(tensors["x_adv"][i], low, high)
        name = f"{row['index']:06d}-{row['label']}-as-{row['adversarial']}.png"
        _save(x_adv, folder / "files" / name, 1)
        _save(torch.cat([x, x_adv, _difference(x_adv, x)], dim=2), folder / "pictures" / name, -(-LEAST_HEIGHT // x.shape[1]))
    return len(broken)


def _is_image(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


def _range(threat: str) -> tuple[float, float]:
    from advkit import spec
    from advkit.threat import THREATS

    parsed: Any = spec.parse(threat, THREATS, "threat")
    return parsed.low, parsed.high


def _bytes(image: Tensor, low: float, high: float) -> Tensor:
    return ((image - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)


def _difference(x_adv: Tensor, x: Tensor) -> Tensor:
    change = x_adv.float() - x.float()
    return (127.5 + 127.5 * change / change.abs().max().clamp(min=1)).round().to(torch.uint8)


def _save(image: Tensor, path: Path, factor: int) -> None:
    """Write an image (C, H, W), enlarged by a whole factor."""
    from PIL import Image

    pixels = image.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(pixels).save(path)


def save_curve(curve: list[Row], clean: float, label: str, path: Path) -> None:
    """Draw robust accuracy over the radius, with its intervals, as a PNG.

    Arguments:
        curve: What ``Evaluation.curve`` returns.
        clean: The clean accuracy, at radius 0.
        label: What the radius is: ``l_inf radius``.
        path: The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    eps = [0.0, *(row["eps"] for row in curve)]
    axes.plot(eps, [100 * clean, *(100 * row["value"] for row in curve)], marker="o", color="#1f5fa8")
    low, high = ([100 * row[end] for row in curve] for end in ("low", "high"))
    axes.fill_between(eps[1:], low, high, alpha=0.2, color="#1f5fa8", linewidth=0)
    axes.set(xlabel=label, ylabel="robust accuracy (%)", ylim=(0, 100), xlim=(0, eps[-1]))
    axes.grid(alpha=0.3)
    figure.savefig(path)
