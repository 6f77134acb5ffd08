"""Defenses that act when a model is asked: modules around a module, one paper a file, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from advkit import spec
from advkit.defenses.inference.bit_depth import BitDepth as BitDepth
from advkit.defenses.inference.deep_image_prior import DeepImagePrior as DeepImagePrior
from advkit.defenses.inference.defended import Defense
from advkit.defenses.inference.defended import adaptive as adaptive
from advkit.defenses.inference.defense_gan import DefenseGAN as DefenseGAN
from advkit.defenses.inference.jpeg import JPEG as JPEG
from advkit.defenses.inference.median import Median as Median
from advkit.defenses.inference.moving_target import Moving as Moving
from advkit.defenses.inference.moving_target import MovingTarget as MovingTarget
from advkit.defenses.inference.resize_pad import ResizePad as ResizePad
from advkit.defenses.inference.smoothing import Smoothing as Smoothing
from advkit.defenses.inference.total_variation import TotalVariation as TotalVariation
from advkit.errors import UsageError

INFERENCE: spec.Table = {
    "jpeg": JPEG,
    "bit-depth": BitDepth,
    "median": Median,
    "total-variation": TotalVariation,
    "resize-pad": ResizePad,
    "smoothing": Smoothing,
    "deep-image-prior": DeepImagePrior,
    "moving-target": MovingTarget,
    "defense-gan": DefenseGAN,
}
"""The defenses that a spec may name: ``jpeg(quality=75)``."""


def defend(model: Callable[[Tensor], Any], *defenses: str | Defense) -> nn.Module:
    """A model behind one or more defenses; an input goes through the first of them first.

    Arguments:
        model: Images (N, C, H, W) in [0, 1] to logits (N, K).
        defenses: Defenses or their specs, at least one.

    Raises:
        UsageError: There is none, or a spec cannot be read.

    >>> import torch
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> defend(network, "bit-depth(bits=2)", "median")(torch.rand(3, 1, 2, 2)).shape
    torch.Size([3, 2])
    """
    if not defenses:
        raise UsageError(f"there is no defense; name at least one of {', '.join(INFERENCE)}")
    for defense in reversed(defenses):
        made: Defense = spec.parse(defense, INFERENCE, "defense") if isinstance(defense, str) else defense
        model = made.around(model)
    assert isinstance(model, nn.Module)
    return model
