"""A generator that draws the perturbation of an input in one pass, and the game in which it learns to.

Symbols: x are inputs in [0, 1], (N, C, H, W), G(x) the perturbation in [-1, 1] times the radius eps, D the discriminator, f the
attacked model or its student, y the labels, t the target, kappa how far beyond the boundary G has to push, alpha the weight of
L_GAN, beta that of L_hinge, c the length of a perturbation that is not fined.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import tensors
from advkit.engine import frozen
from advkit.errors import AccessError, UsageError
from advkit.gan.dcgan import Centred
from advkit.gan.losses import LeastSquares, told_apart
from advkit.losses import margin
from advkit.oracle import Access, Model, Oracle, answer
from advkit.spec import check_at_least, check_whole
from advkit.streams import Streams
from advkit.threat import Lp
from advkit.version import __version__

LEAST = 8
"""Images have at least this height and width."""
BLOCKS = 4
"""Residual blocks at a quarter of the resolution."""


@dataclass(frozen=True)
class AdvGAN:
    r"""x + eps * G(x), clipped to the range: one pass of a generator that was trained against a model before.

    Nothing is asked of the attacked model, which need not be the one that G was trained against. Any radius will do; G was
    trained for one.

    Xiao, Li, Zhu, He, Liu and Song, 2018, "Generating adversarial examples with adversarial networks",
    https://arxiv.org/abs/1801.02610.

    Arguments:
        generator: A file that ``advkit gan attack`` wrote.
    """

    generator: str = ""
    access = Access.LABELS
    norms = (math.inf,)
    minimum = False
    paper = "Xiao et al. 2018"
    cost = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the inputs that the generator takes.

        Raises:
            UsageError: There is no such file, or it is no generator of perturbations.
        """
        return self._opened(torch.device("cpu")).shape

    def __call__(self, oracle: Oracle, x: Tensor, threat: Lp, rng: Streams) -> Tensor:
        """The perturbed inputs, with shape (N, *).

        Raises:
            UsageError: There is no such file, it was trained for inputs of another shape, or the range is not finite.
        """
        trained = self._opened(x.device)
        if tuple(x.shape[1:]) != trained.shape:
            raise UsageError(
                f"advgan: {self.generator} was trained for inputs of shape {trained.shape}; these have {tuple(x.shape[1:])}"
            )
        unit = (x - threat.low) / threat.width
        with torch.no_grad():
            delta = trained.generator(unit.to(next(trained.generator.parameters())))
        return threat.project(x + threat.eps * delta.to(x), x)

    def _opened(self, device: torch.device) -> Trained:
        if not self.generator:
            train = 'advkit gan attack --model MODEL --data DATA --threat "linf(0.3)" --out a.safetensors'
            raise UsageError(f'advgan has no generator; train one: {train}, and give it: advgan("a.safetensors")')
        path = Path(self.generator).expanduser()
        return _loaded(str(path.resolve()), str(device), path.stat().st_mtime_ns if path.is_file() else 0)


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained generator of perturbations, as a file holds it.

    Arguments:
        generator: Inputs (N, C, H, W) in [0, 1] to perturbations in [-1, 1].
        shape: Of one input.
        width: Channels of the generator's first convolution.
        about: What it was trained against, and how: text for the file.
    """

    generator: nn.Module
    shape: tuple[int, ...]
    width: int
    about: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the generator.

        Raises:
            UsageError: The file cannot be written.
        """
        made = json.dumps({"shape": list(self.shape), "width": self.width})
        tensors.write(path, self.generator.state_dict(), {**self.about, "advkit": __version__, "advgan": made})

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """The generator in a file that :meth:`save` wrote, in evaluation mode.

        Raises:
            UsageError: The file is damaged or holds something else.
        """
        state, metadata = tensors.read(path)
        if "advgan" not in metadata:
            raise UsageError(f"{path} holds no generator of perturbations; advkit gan attack writes one")
        try:
            made = json.loads(metadata["advgan"])
            shape, width = tuple(map(int, made["shape"])), int(made["width"])
            # Weights are drawn before they are read.
            with torch.random.fork_rng(devices=[]):
                generator = Generator(shape, width)
            generator.load_state_dict(state)
        except Exception as error:
            raise UsageError(
                f"the tensors in {path} do not fit the generator that it names: {tensors.telling(error)}"
            ) from None
        return cls(generator.eval().requires_grad_(False), shape, width, metadata)


@functools.lru_cache(maxsize=4)
def _loaded(path: str, device: str, changed: int) -> Trained:
    with torch.inference_mode(False):
        trained = Trained.read(path)
        trained.generator.to(device)
    return trained


class Generator(nn.Module):
    """G: convolutions down to a quarter of the resolution, residual blocks, and up again; (N, C, H, W) to the same shape.

    The paper's, which is that of Johnson, Alahi and Fei-Fei, 2016, https://arxiv.org/abs/1603.08155. On the way up maps are
    enlarged and then convolved, so that any height and width will do.

    Arguments:
        shape: (C, H, W).
        width: Channels of the first convolution; 8 in the paper.

    Raises:
        UsageError: The inputs are no images, or too small.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        check_whole("the generator's width", width, 1)
        if len(shape) != 3 or min(shape[1:]) < LEAST:
            raise UsageError(
                f"the inputs have shape {tuple(shape)}; advgan takes images (C, H, W) of at least {LEAST} x {LEAST}"
            )
        w = width
        self.down = nn.Sequential(Centred(), _block(shape[0], w, 1), _block(w, 2 * w, 2), _block(2 * w, 4 * w, 2))
        self.middle = nn.ModuleList(nn.Sequential(_block(4 * w, 4 * w, 1), _convolved(4 * w, 4 * w, 1)) for _ in range(BLOCKS))
        self.up = nn.ModuleList([_block(4 * w, 2 * w, 1), _block(2 * w, w, 1)])
        self.last = nn.Conv2d(w, shape[0], 3, padding=1)
        self.sides = tuple(tuple(-(-side // part) for side in shape[1:]) for part in (2, 1))

    def forward(self, x: Tensor) -> Tensor:
        """G(x) / eps, in [-1, 1]."""
        h = self.down(x)
        for block in self.middle:
            h = h + block(h)
        for block, side in zip(self.up, self.sides, strict=True):
            h = block(F.interpolate(h, size=side))
        return self.last(h).tanh()


def _convolved(inward: int, outward: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inward, outward, 3, stride, 1, bias=False), nn.InstanceNorm2d(outward, affine=True))


def _block(inward: int, outward: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_convolved(inward, outward, stride), nn.ReLU())


class Critic(nn.Module):
    """D: the paper's three strided convolutions, (N, C, H, W) in [0, 1] to scores (N,).

    Arguments:
        shape: (C, H, W).
        width: Channels of the first.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        sizes = [shape[0], width, 2 * width, 4 * width]
        layers: list[nn.Module] = [Centred()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv2d(a, b, 4, 2, 1), nn.LeakyReLU(0.2)]
        units = sizes[-1] * math.prod(side // 8 for side in shape[1:])
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(units, 1))

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        return self.body(x).squeeze(1)


class Student(nn.Module):
    """A small network for images of any size, that learns what another answers.

    Arguments:
        shape: (C, H, W).
        classes: How many the other names.
        width: Channels of the first convolution.
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 32) -> None:
        super().__init__()
        sizes = [shape[0], width, 2 * width]
        layers: list[nn.Module] = [Centred()]
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        units = sizes[-1] * math.prod(side // 4 for side in shape[1:])
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(units, 128), nn.ReLU(), nn.Linear(128, classes))

    def forward(self, x: Tensor) -> Tensor:
        """The logits, (N, classes)."""
        return self.body(x)


class Judges(nn.Module):
    """What learns beside the generator: the discriminator, and in a black box the student.

    Arguments:
        critic: Inputs (N, *) in [0, 1] to scores (N,).
        student: Inputs (N, *) in the data's range to logits (N, K); None where the model itself gives gradients.
    """

    def __init__(self, critic: nn.Module, student: nn.Module | None = None) -> None:
        super().__init__()
        self.critic, self.student = critic, student


class AdvGANGame:
    r"""G descends L_adv + alpha * L_GAN + beta * L_hinge, D tells perturbed inputs from data by least squares.

    L_adv = mean max(kappa - margin(f(x + eps G(x)), y), 0), the loss of Carlini and Wagner, with the margin towards t where
    there is a target; L_hinge = mean max(||eps G(x)||_2 - c, 0). In a black box f is a student that learns beside D to answer
    as the model does, on data and on what G draws at the time (dynamic distillation); the model's gradient is not used.

    Arguments:
        model: The attacked model: inputs in the data's range to logits (N, K). It is left as it was.
        generator: G.
        judges: D, and the student in a black box.
        threat: The ball, in l_inf with a radius, over a finite range.
        target: t; None for any class but the label.
        labels: Whether the student sees the model's labels only, not its logits.
        alpha: The weight of L_GAN.
        beta: The weight of L_hinge.
        c: The length that is not fined, as a share of the longest perturbation.
        kappa: How far beyond the boundary.

    Raises:
        UsageError: The threat model is another, or a number is out of range.
    """

    evenly = False

    def __init__(
        self,
        model: Model,
        generator: nn.Module,
        judges: Judges,
        threat: Lp,
        target: int | None = None,
        *,
        labels: bool = False,
        alpha: float = 1.0,
        beta: float = 1.0,
        c: float = 0.1,
        kappa: float = 10.0,
    ) -> None:
        if threat.p != math.inf or threat.eps == math.inf:
            raise UsageError(f"advgan learns perturbations in l_inf with a radius, as in linf(0.3); it was given {threat!r}")
        for name, value in (("alpha", alpha), ("beta", beta), ("c", c), ("kappa", kappa)):
            check_at_least(f"advgan: {name}", value, 0)
        self.model, self.generator, self.discriminator, self.threat, self.target = model, generator, judges, threat, target
        self.labels, self.alpha, self.beta, self.c, self.kappa = labels, alpha, beta, c, kappa
        self.loss, self.seen = LeastSquares(), torch.empty(0)

    def begin(self, x: Tensor) -> None:
        """Nothing is started from data."""

    def draw(self, n: int, y: Tensor, rng: torch.Generator) -> Tensor:
        """The last batch as the generator perturbs it, again and again up to ``n``, with shape (n, *)."""
        return self._perturbed(self.seen[torch.arange(n) % len(self.seen)])[0]

    def discriminate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """The loss of D, and of the student, with shape (), and the share that D tells apart."""
        self.seen = x
        with torch.no_grad():
            x_adv, _ = self._perturbed(x)
        real, fake = self.discriminator.critic(x), self.discriminator.critic(x_adv)
        loss = self.loss.discriminator(real, fake)
        if self.discriminator.student is not None:
            loss = loss + sum(self._distilled(self.discriminator.student, seen) for seen in (x, x_adv))
        return loss, told_apart(self.loss, real.detach(), fake.detach())

    def generate(self, x: Tensor, y: Tensor, rng: torch.Generator) -> Tensor:
        """The loss of G, with shape ()."""
        x_adv, delta = self._perturbed(x)
        attacked = self.model if self.discriminator.student is None else self.discriminator.student
        with frozen(attacked):
            outputs = answer(attacked, self._shown(x_adv))
        if not outputs.requires_grad:
            raise AccessError("the model gives no gradient with respect to its input; let a student learn from it: --black-box")
        length = delta.flatten(1).norm(dim=1) / math.sqrt(delta[0].numel())
        fooling = (self.kappa - self._gain(outputs, y)).relu().sum() / len(y)
        seeming = self.loss.generator(self.discriminator.critic(x_adv))
        return fooling + self.alpha * seeming + self.beta * (length - self.c).relu().mean()

    def _gain(self, outputs: Tensor, y: Tensor) -> Tensor:
        """How far each input is on the adversary's side; with a target, each that is of another class."""
        if self.target is None:
            return margin(outputs, y)
        if not 0 <= self.target < outputs.shape[1]:
            raise UsageError(f"the target is class {self.target}; the model has classes 0 to {outputs.shape[1] - 1}")
        others = y != self.target
        return -margin(outputs[others], torch.full_like(y[others], self.target))

    def _perturbed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The perturbed inputs, in [0, 1], and G(x) / eps, in [-1, 1]."""
        delta = self.generator(x)
        return (x + self.threat.eps / self.threat.width * delta).clamp(0, 1), delta

    def _shown(self, x: Tensor) -> Tensor:
        return self.threat.low + self.threat.width * x

    def _distilled(self, student: nn.Module, x: Tensor) -> Tensor:
        """The cross entropy of the student and what the model answers, with shape ()."""
        shown = self._shown(x)
        with torch.no_grad(), frozen(self.model):
            said = answer(self.model, shown)
        wanted = said.argmax(1) if self.labels else said.softmax(1)
        return F.cross_entropy(student(shown), wanted)
