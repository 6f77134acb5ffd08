"""Adversarial patches: a sticker that makes a model see the target wherever it lies.

Symbols: P is the patch, A(P, x, l, t) the image x with the patch at place l after the turn and scaling t, y_t the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.errors import UsageError
from advkit.losses import LOSSES
from advkit.oracle import Goal, Model
from advkit.spec import check_choice, check_positive, check_whole
from advkit.stochastic import Ascent, Progress
from advkit.streams import Streams

SHAPES = {"circle": math.pi / 4, "square": 1.0}
"""The share of its own bounding square that a patch of each shape fills."""


@dataclass(frozen=True)
class Patch:
    r"""The maximum over P of the mean over images x, places l and changes t of log softmax(model(A(P, x, l, t)))_{y_t}.

    Brown, Mane, Roy, Abadi and Gilmer, 2017, "Adversarial patch", https://arxiv.org/abs/1712.09665. Places are uniform among
    those where the whole patch is on the image, angles in [-rotation, rotation], factors of length in [1 - scale, 1 + scale].

    Arguments:
        share: The share of the image's area that the patch covers at factor 1, in (0, 1).
        shape: ``circle`` or ``square``.
        rotation: The greatest angle, in degrees.
        scale: The greatest relative change of its side, in [0, 1).
        steps: How many batches are learned from.
        batch_size: How many images are in a batch.
        alpha: The first step, in shares of the range of the data.
        loss: What is minimized for the target, by its name.
        detail: How many entries of the patch there are for a pixel of its side, at factor 1.
    """

    share: float = 0.06
    shape: str = "circle"
    rotation: float = 22.5
    scale: float = 0.1
    steps: int = 500
    batch_size: int = 64
    alpha: float = 0.1
    loss: str = "ce"
    detail: float = 1.5
    paper = "Brown et al. 2017"

    def __post_init__(self) -> None:
        check_choice("shape of a patch", self.shape, SHAPES)
        check_choice("patch: loss", self.loss, LOSSES)
        for name in ("steps", "batch_size"):
            check_whole(f"patch: {name}", getattr(self, name), 1)
        for name in ("share", "alpha", "detail"):
            check_positive(f"patch: {name}", getattr(self, name))
        if self.share >= 1:
            raise UsageError(f"patch: share is {self.share}; it should be less than 1")
        if not 0 <= self.rotation <= 180:
            raise UsageError(f"patch: rotation is {self.rotation}; it should be from 0 to 180 degrees")
        if not 0 <= self.scale < 1:
            raise UsageError(f"patch: scale is {self.scale}; it should be at least 0 and less than 1")

    def fit(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        target: int,
        *,
        low: float = 0.0,
        high: float = 1.0,
        rng: torch.Generator,
        report: Callable[[Progress], None] | None = None,
    ) -> Tensor:
        """The patch, with shape (C, S, S), in [low, high]; of a circle, what is outside of it is never seen.

        Arguments:
            model: Images (N, C, H, W) to logits (N, K); used in evaluation mode, and left as it was.
            x: The images to learn from, with shape (N, C, H, W); those of the target's class are left out.
            y: Their labels, with shape (N,) and dtype int64.
            target: y_t, the class that the model should see.
            low: The least value of the data.
            high: The greatest.
            rng: Where the order of the images, and the places, angles and factors come from.
            report: Called after each step.

        Raises:
            UsageError: The inputs are no images, none is of another class, or the patch does not fit on them.
            AccessError: The model gives no gradient.
        """
        side = self._side(x)
        x = x[y != target]
        if not len(x):
            raise UsageError(f"every image is of class {target}; a patch is learned from images of other classes")
        n = max(1, math.ceil(self.detail * side))
        start = torch.full((x.shape[1], n, n), (low + high) / 2, dtype=x.dtype, device=x.device)
        return Ascent(self.steps, self.batch_size, self.alpha * (high - low))(
            model,
            x,
            torch.full((len(x),), target, dtype=torch.int64, device=x.device),
            start,
            self.paste,
            lambda P: P.clamp(low, high),
            loss=LOSSES[self.loss],
            goal=Goal(targeted=True),
            rng=rng,
            report=report,
        )

    def paste(self, x: Tensor, patch: Tensor, rng: Streams) -> Tensor:
        """A(P, x, l, t): the patch on each image, at a random place, angle and factor; differentiable in the patch.

        Arguments:
            x: Images, with shape (N, C, H, W).
            patch: P, with shape (C, S, S).
            rng: Where the place, angle and factor of each image come from.

        Raises:
            UsageError: The inputs are no images, or the patch does not fit on them.
        """
        a, b, half = self._frame(x, 2 * rng.uniform(4, dtype=x.dtype) - 1)
        far = (a.square() + b.square()).sqrt() if self.shape == "circle" else torch.maximum(a.abs(), b.abs())
        # A pixel that the edge crosses is covered in part.
        mask = (half - far + 0.5).clamp(0, 1).unsqueeze(1)
        place = torch.stack([a / half, b / half], 3)
        seen = F.grid_sample(patch.expand(len(x), *patch.shape), place, padding_mode="border", align_corners=False)
        return x + mask * (seen - x)

    def cut(self, patch: Tensor) -> Tensor:
        """The patch, (C, S, S) in [0, 1], as it is to be printed: of a circle, what is outside of it is white."""
        if self.shape == "square":
            return patch
        across = (torch.arange(patch.shape[-1], dtype=patch.dtype, device=patch.device) + 0.5) * 2 / patch.shape[-1] - 1
        return torch.where(across.square() + across.unsqueeze(1).square() <= 1, patch, 1.0)

    def _frame(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each pixel's coordinates in the turned patch, in pixels from its centre, (N, H, W), and half its side, (N, 1, 1).

        u are four numbers in [-1, 1] for each image, with shape (N, 4).
        """
        h, w = x.shape[-2:]
        turn, grow, across, down = u.view(-1, 4, 1, 1).unbind(1)
        angle = math.radians(self.rotation) * turn
        cos, sin = angle.cos(), angle.sin()
        half = self._side(x) / 2 * (1 + self.scale * grow)
        reach = half if self.shape == "circle" else half * (cos.abs() + sin.abs())
        dx = torch.arange(w, dtype=x.dtype, device=x.device) - (w - 1) / 2 - across * (w / 2 - reach)
        dy = torch.arange(h, dtype=x.dtype, device=x.device).unsqueeze(1) - (h - 1) / 2 - down * (h / 2 - reach)
        return cos * dx + sin * dy, cos * dy - sin * dx, half

    def _side(self, x: Tensor) -> float:
        """The side of the patch's bounding square at factor 1, in pixels."""
        if x.ndim != 4:
            raise UsageError(f"a patch is put on images (N, C, H, W); the inputs have shape {tuple(x.shape)}")
        side = math.sqrt(self.share * x.shape[-2] * x.shape[-1] / SHAPES[self.shape])
        turn = min(math.radians(self.rotation), math.pi / 4)
        reach = side * (1 + self.scale) * (math.cos(turn) + math.sin(turn) if self.shape == "square" else 1.0)
        if reach > min(x.shape[-2:]):
            what = f"a {self.shape} of {self.share:g} of the area, turned and scaled, takes {reach:.1f} pixels"
            raise UsageError(f"{what}; the images are {x.shape[-2]} by {x.shape[-1]}, so give a smaller share")
        return side
