"""Randomized smoothing: what a model says of an input under noise, and how far that cannot change.

Symbols: f is the model's answer, sigma the standard deviation of the noise, g(x) the answer that f gives most often at
x + sigma * n with n ~ N(0, I), p_A the share of that answer, Phi the standard normal's distribution function.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit.defenses.certificates.region import Region, check_ball
from advkit.defenses.certificates.result import Certified
from advkit.engine import check_device, check_inputs, frozen
from advkit.errors import ModelError, UsageError
from advkit.fast import fast
from advkit.oracle import Goal, Model, answer, check_outputs, logits_of
from advkit.spec import check_positive, check_whole
from advkit.streams import Streams
from advkit.threat import Lp

ABSTAINED = -1
"""What is predicted where the noise leaves open which answer is the most frequent."""

ENTRIES = 100_352
"""How many numbers a block of noise holds, about: 128 digits of 28 x 28. More fall out of a core's cache."""

BLOCKS = {"cpu": 1}
"""How many blocks are sent to a device at once; 64 to others."""

LEAST = 8
"""How many noisy copies a block holds at least."""


@dataclass(frozen=True)
class Answers:
    """What a smoothed model says, row by row.

    Attributes:
        predicted: The class; -1 where it abstains. Shape (N,), int64.
        share: The lower bound on p_A that holds with a probability of at least 1 - alpha, with shape (N,), float64.
        radius: The l_2 radius inside which the answer stays, in the units of the data; 0 where it abstains. Shape (N,).
    """

    predicted: Tensor
    share: Tensor
    radius: Tensor


@dataclass(frozen=True)
class Smoothing:
    r"""g(x + d) = g(x) for all ||d||_2 < sigma * Phi^-1(p_A), where p_A > 1/2.

    Cohen, Rosenfeld and Kolter, 2019, "Certified adversarial robustness via randomized smoothing",
    https://arxiv.org/abs/1902.02918, algorithms predict and certify. p_A is bounded from below by the exact interval of
    Clopper and Pearson, so the answer and its radius are right with a probability of at least 1 - alpha for each example.
    What is certified is g, not f.

    Arguments:
        sigma: The standard deviation of the noise, in the units of the data.
        n0: How many noisy copies choose the class.
        n: How many bound its share; also how many :meth:`predict` asks.
        alpha: How often an answer may be wrong, at most.

    Raises:
        UsageError: A number out of range.
    """

    sigma: float = 0.5
    n0: int = 100
    n: int = 10_000
    alpha: float = 0.001

    def __post_init__(self) -> None:
        check_positive("smoothing: sigma", self.sigma)
        check_whole("smoothing: n0", self.n0, 1)
        check_whole("smoothing: n", self.n, 1)
        if not 0 < self.alpha < 1:
            raise UsageError(f"smoothing: alpha is {self.alpha}; it should be between 0 and 1")

    def __call__(self, model: Model, x: Tensor, y: Tensor, threat: Lp, rng: torch.Generator) -> Certified:
        """What is certain of g for inputs (N, *) with labels (N,).

        A ball of l_1 is inside that of l_2 with its radius, and one of l_inf inside that with sqrt(d) times its radius, for d
        entries; so these are served too, l_inf at small radii only.

        Raises:
            UsageError: The inputs or labels are not of this form, the threat model is not a ball of l_2, l_1 or l_inf with a
                radius, or the answers are not logits.
        """
        check_ball(threat)
        check_inputs(x, y, threat)
        check_device(model, x)
        with torch.no_grad(), frozen(model):
            check_outputs(answer(model, x[:1]), y, Goal())
        eps = Region.around(x, threat, torch.float64).eps.squeeze(1).cpu()
        found = self.certify(model, x, rng)
        radius = found.radius / x[0].numel() ** max(0.0, 0.5 - 1 / threat.p)
        return Certified((found.predicted == y.cpu()) & (radius >= eps), found.predicted, radius, radius)

    def certify(
        self, model: Model, x: Tensor, rng: torch.Generator | Streams, report: Callable[[float], None] | None = None
    ) -> Answers:
        """What g says of each example and how far it stands; it abstains where the bound on p_A is not above 1/2.

        Arguments:
            model: f: inputs (N, *) to logits (N, K).
            x: The inputs, with shape (N, *).
            rng: Where the noise comes from; with ``Streams`` an example's noise is its own, whatever batch it is in.
            report: Called as it goes with the share that is done.

        Raises:
            UsageError: The model's answers are not logits.
        """
        seeds = _seeds(rng, x, 2)
        chosen = votes(model, x, self.sigma, self.n0, seeds[:, 0]).argmax(1)
        counts = votes(model, x, self.sigma, self.n, seeds[:, 1], report)
        share = lower_bound(counts.gather(1, chosen.unsqueeze(1)).squeeze(1), self.n, self.alpha)
        sure = share > 0.5
        radius = torch.where(sure, self.sigma * torch.special.ndtri(share), 0.0)
        return Answers(torch.where(sure, chosen, ABSTAINED), share, radius)

    def predict(
        self, model: Model, x: Tensor, rng: torch.Generator | Streams, report: Callable[[float], None] | None = None
    ) -> Tensor:
        """What g says of each example, with shape (N,): -1 where the two most frequent answers are as good as equal.

        That is where a two-sided binomial test of equal shares is not significant at alpha. An answer is other than g(x) with
        a probability of at most alpha (Hung and Fithian, 2019, https://arxiv.org/abs/1610.03944). Arguments as in
        :meth:`certify`.
        """
        from scipy.stats import binom

        counts = votes(model, x, self.sigma, self.n, _seeds(rng, x, 1)[:, 0], report)
        (first, second), classes = counts.topk(2).values.T, counts.argmax(1)
        p = torch.from_numpy(2 * binom.sf(first.numpy() - 1, (first + second).numpy(), 0.5))
        return torch.where(p <= self.alpha, classes, ABSTAINED)


class Soft(nn.Module):
    """log of the mean over noise of the probabilities that f gives: a smooth stand-in for g, as attacks need it.

    Salman, Yang, Li, Zhang, Zhang, Razenshteyn and Bubeck, 2019, "Provably robust deep learning via adversarially trained
    smoothed classifiers", https://arxiv.org/abs/1906.04584.

    Arguments:
        model: f: inputs (N, *) to logits (N, K).
        noise: What is added, with shape (m, N, *), or (m, 1, *) for the same to every row.
    """

    def __init__(self, model: Model, noise: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("noise", noise)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, with shape (N, K)."""
        assert isinstance(self.noise, Tensor)
        noisy = (x + self.noise).flatten(0, 1)
        each = logits_of(self.model(noisy)).log_softmax(1).view(len(self.noise), len(x), -1)
        return each.logsumexp(0) - math.log(len(self.noise))


def lower_bound(count: Tensor, n: int, alpha: float) -> Tensor:
    """The share that is below the true one with a probability of at least 1 - alpha, in float64.

    C. J. Clopper and E. S. Pearson, 1934, https://doi.org/10.1093/biomet/26.4.404, one-sided.

    Arguments:
        count: How often something happened, of n times; any shape, int64.
        n: How many times it could have happened.
        alpha: How often the bound may be wrong.

    >>> lower_bound(torch.tensor([0, 100]), 100, 0.001)
    tensor([0.0000, 0.9333], dtype=torch.float64)
    """
    from scipy.special import betaincinv

    k = count.double()
    bound = torch.from_numpy(betaincinv(k.clamp(min=1).numpy(), (n - k + 1).numpy(), alpha))
    return torch.where(k > 0, bound, 0.0)


def votes(
    model: Model, x: Tensor, sigma: float, n: int, seeds: Tensor, report: Callable[[float], None] | None = None
) -> Tensor:
    """How often the model gives each answer to n noisy copies of each input, with shape (N, K), int64, on the CPU.

    An example's noise depends on its seed alone: it is drawn in blocks of its own, however many are sent at once.

    Arguments:
        model: Inputs (N, *) to logits (N, K).
        x: The inputs, with shape (N, *).
        sigma: The standard deviation of the noise.
        n: How many copies of each.
        seeds: What each example's noise is drawn from, with shape (N,) and dtype int64.
        report: Called as it goes with the share that is done.

    Raises:
        UsageError: The model's answers are not logits for two classes or more.
    """
    counts = torch.zeros(len(x), 0, dtype=torch.int64)
    together = BLOCKS.get(x.device.type, 64)
    with torch.no_grad(), frozen(model):
        quick, left = _quick(model), _blocks(x, sigma, n, seeds)
        while blocks := list(itertools.islice(left, together)):
            outputs = answer(quick, torch.cat([noisy for _, noisy in blocks]))
            if outputs.ndim != 2 or outputs.shape[1] < 2:
                shape = tuple(outputs.shape)
                raise ModelError(
                    f"the model returned logits of shape {shape}; to be smoothed it should have two classes or more"
                )
            k = outputs.shape[1]
            counts = counts if counts.shape[1] else counts.new_zeros(len(x), k)
            rows = torch.cat([torch.full((len(noisy),), i) for i, noisy in blocks])
            counts += (rows * k + outputs.argmax(1).cpu()).bincount(minlength=counts.numel()).view_as(counts)
            if report is not None:
                report(int(counts.sum()) / (n * len(x)))
    return counts


def _blocks(x: Tensor, sigma: float, n: int, seeds: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of an example and noisy copies of it, with shape (M, *), until each has had n."""
    most = max(LEAST, ENTRIES // x[0].numel())
    for i, seed in enumerate(seeds.tolist()):
        rng = torch.Generator(x.device).manual_seed(seed)
        for start in range(0, n, most):
            noise = torch.randn((min(most, n - start), *x.shape[1:]), generator=rng, dtype=x.dtype, device=x.device)
            yield i, noise.mul_(sigma).add_(x[i])


def _seeds(rng: torch.Generator | Streams, x: Tensor, draws: int) -> Tensor:
    """Whole numbers of each row's own, with shape (N, draws)."""
    streams = rng if isinstance(rng, Streams) else Streams.of(rng, len(x))
    return streams.integers(2**63 - 1, draws).cpu()


def _quick(model: Model) -> Model:
    """A module laid out for speed, in the precision that it has; the model itself where there is no such copy."""
    if not isinstance(model, nn.Module):
        return model
    numbers = (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    if any(t.dtype != torch.float32 for t in numbers):
        return model
    try:
        return fast(model, half=False)
    except UsageError:
        return model
