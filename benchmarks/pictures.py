"""What a person would rather look at than read: adversarial images beside their originals, and the curve over radii."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from advkit.benchmarks.folder import Row
    from advkit.benchmarks.result import Evaluation

LEAST_HEIGHT = 112
"""Pictures of smaller images are enlarged by a whole factor to at least this many pixels."""


def save_pictures(result: Evaluation, folder: Path, limit: int) -> int:
    """Write PNG files of the first successes of an evaluation of images, and say how many.

    ``pictures/`` gets the original, the adversarial image and their difference side by side (grey is no change, and the
    greatest change is black or white); ``files/`` each adversarial image as it is, if it was rounded and still works. A
    success that was rounded is shown as rounded. Names end in what the model says of the image.

    Arguments:
        result: The evaluation.
        folder: Where the two folders are made.
        limit: How many at most.
    """
    broken = [i for i, row in enumerate(result.rows) if row["success"] and row["distance"] > 0][:limit]
    tensors = result.examples() if broken else {}
    if not broken or not _is_image(tensors["x"]):
        return 0
    low, high = result.run["data"]["low"], result.run["data"]["high"]
    for name in ("files", "pictures"):
        (folder / name).mkdir(exist_ok=True)
    for i in broken:
        row, x = result.rows[i], _bytes(tensors["x"][i], low, high)
        works = bool(row["success_8bit"])
        x_adv = tensors["x_8bit"][i] if works else _bytes(tensors["x_adv"][i], low, high)
        says = row["adversarial_8bit"] if works else row["adversarial"]
        name = f"{row['index']:06d}-{row['label']}-as-{says}.png"
        if works:
            _save(x_adv, folder / "files" / name, 1)
        _save(torch.cat([x, x_adv, _difference(x_adv, x)], dim=2), folder / "pictures" / name, -(-LEAST_HEIGHT // x.shape[1]))
    return len(broken)


def _is_image(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] in (1, 3)


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
