"""JPEG compression of the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from advkit import transforms
from advkit.defenses.inference.defended import Defended, opaque
from advkit.streams import Streams


@dataclass(frozen=True)
class JPEG:
    """t(x) is x saved as JPEG and read back.

    Das, Shanbhogue, Chen, Hohman, Chen, Kounavis and Chau, 2017, "Keeping the bad guys out: protecting and vaccinating deep
    learning with JPEG compression", https://arxiv.org/abs/1705.02900; Guo, Rana, Cisse and van der Maaten, 2018, "Countering
    adversarial images using input transformations", https://arxiv.org/abs/1711.00117. A file has no gradient; an adaptive
    attack takes that of the same arithmetic with rounding left out (``advkit.transforms.JPEG``).

    Arguments:
        quality: From 1 to 100, as in Pillow and libjpeg.

    Raises:
        UsageError: The quality is something else.
    """

    quality: int = 75
    draws = 1
    seed = 0

    def __post_init__(self) -> None:
        transforms.JPEG(self.quality)

    def exact(self, x: Tensor, rng: Streams) -> Tensor:
        """The images as read back."""
        return opaque(self.guide(x.detach(), rng), x)

    def guide(self, x: Tensor, rng: Streams) -> Tensor:
        """The same images, with a gradient."""
        return transforms.JPEG(self.quality)(x, rng, torch.arange(len(x), device=x.device))

    def around(self, model: Callable[[Tensor], Any]) -> nn.Module:
        """The model behind it."""
        return Defended(self, model)
