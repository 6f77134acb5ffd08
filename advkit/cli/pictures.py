"""Pictures that commands write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LEAST_HEIGHT = 112
"""Pictures of smaller images are enlarged by a whole factor to at least this many pixels."""


def save_image(image: Tensor, path: Path, least: int = LEAST_HEIGHT) -> None:
    """Write an image (C, H, W) in [0, 1] as a PNG, enlarged by a whole factor to ``least`` pixels where it is smaller."""
    import torch
    from PIL import Image

    if image.shape[0] not in (1, 3):
        return
    factor = -(-least // image.shape[1])
    levels = (255 * image.detach().cpu().clamp(0, 1)).round().to(torch.uint8)
    pixels = levels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(1, 2, 0).squeeze(2).numpy()
    Image.fromarray(pixels).save(path)


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write images (N, C, H, W) in [0, 1] side by side as one PNG, a grey pixel between them.

    Arguments:
        images: The images; of other than 1 or 3 channels nothing is written.
        path: Where to write.
        columns: How many in a row.
    """
    from torch.nn import functional as F

    n, channels, _, width = images.shape
    images = F.pad(images, (0, 0, 0, 0, 0, 0, 0, -n % columns), value=0.5)
    tiles = F.pad(images, (1, 1, 1, 1), value=0.5).unflatten(0, (-1, columns))
    save_image(tiles.permute(2, 0, 3, 1, 4).reshape(channels, -1, columns * (width + 2)), path)
