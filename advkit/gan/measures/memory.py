"""Whether a generator repeats its training examples.

Symbols: x are N samples, T the m training examples, H the k held-out ones; d_T(x) is the distance of x to its nearest neighbour
in T and d'_T(x) to the second nearest, d_H(x) likewise. Distances are between pixels.

Three questions, the more general the later:

* How many samples are copies, d_T < d'_T / 2? A copy stays one under noise that is small beside what tells examples apart; real
  examples are hardly ever so much closer to one training example than to all others.
* How many have their nearest real neighbour in T? Before anything was learned T and H could have changed places, so for what
  draws without a look at which was which, the share is m / (m + k) but for chance, however few or poor its pictures are.
* How often is d_T of a sample smaller than that of a held-out example? For a generator as good as real data, half of the
  time; a smooth or plain picture is close to some training example too, so by itself this is no proof of copying.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.errors import UsageError
from advkit.gan.measures.neighbours import Tell, nearest, quiet

HALF = 0.5
"""A copy is closer to one training example than this part of the distance to the next."""
LEAST_IN_CELL = 20
"""Cells with fewer samples or held-out examples say too little; where all have fewer, they are one."""


@dataclass(frozen=True, eq=False)
class Near:
    """The nearest real neighbours of some images.

    Attributes:
        trained: d_T and d'_T, with shape (N, 2).
        trained_index: Which training examples these are, with shape (N, 2).
        held: d_H, with shape (N,).
        held_index: Which held-out example that is, with shape (N,).
        m: How many training examples there are.
        k: How many held-out examples.
    """

    trained: Tensor
    trained_index: Tensor
    held: Tensor
    held_index: Tensor
    m: int
    k: int

    @classmethod
    def of(cls, x: Tensor, train: Tensor, held: Tensor, own: Tensor | None = None, tell: Tell = quiet) -> Near:
        """The neighbours of images.

        Arguments:
            x: The images, with shape (N, *).
            train: Training examples, with shape (m, *).
            held: Held-out examples, with shape (k, *).
            own: Where the images are training examples, which ones, with shape (N,): none is its own neighbour.
            tell: Called with the share that is done.

        Raises:
            UsageError: There are fewer than two training examples, not counting the image itself, or no held-out ones.
        """
        m, k = len(train), len(held)
        share = m / max(1, m + k)
        trained, index = nearest(x, train, 2 if own is None else 3, tell=lambda done: tell(share * done))
        if own is not None:
            # The images themselves go to the end; where doubles have pushed one out of sight, the farthest is left out.
            order = (index == own.unsqueeze(1)).long().argsort(dim=1, stable=True)[:, :2]
            trained, index = trained.gather(1, order), index.gather(1, order)
        other, where = nearest(x, held, tell=lambda done: tell(share + (1 - share) * done))
        return cls(trained.cpu(), index.cpu(), other[:, 0].cpu(), where[:, 0].cpu(), m, k)


def copies(trained: Tensor, exact: float = 0.0) -> Tensor:
    """Which images are copies of a training example, with shape (N,), bool.

    Arguments:
        trained: d_T and d'_T, with shape (N, 2).
        exact: A distance that only rounding makes, which makes a copy whatever the next neighbour is.
    """
    return trained[:, 0] <= (HALF * trained[:, 1]).clamp(min=exact)


@dataclass(frozen=True)
class Memory:
    """What was learned by heart.

    Attributes:
        copies: How many samples are copies of a training example.
        of: How many samples there are.
        near: How many have their nearest real neighbour in the training data.
        chance: The share that would have, m / (m + k), had nothing been learned from one rather than the other.
        error: How far chance takes that share: its standard deviation when the names of T and H are drawn anew.
        closer: How often a sample is closer to the training data than a held-out example of its cell: about 1/2 for real data.
        c_t: The same as Meehan's statistic: about 0 for real data, far below for copies, far above for what is unlike the data.
    """

    copies: int
    of: int
    near: int
    chance: float
    error: float
    closer: float
    c_t: float


def memory(near: Near, cells: Tensor, control: Tensor, control_cells: Tensor, exact: float = 0.0) -> Memory:
    """Answer the three questions.

    Meehan, Chaudhuri and Dasgupta, 2020, "A non-parametric test to detect data-copying in generative models",
    https://arxiv.org/abs/2004.05675: a rank test (Mann and Whitney, 1947) of d_T of samples and of held-out examples in each
    cell of the space, and the mean over the cells by the share of held-out examples in each.

    Arguments:
        near: The samples' neighbours.
        cells: The samples' cells, such as their classes, with shape (N,) and dtype int64.
        control: d_T of held-out examples, with shape (M,).
        control_cells: Their cells, with shape (M,).
        exact: The distance that only rounding makes.

    Raises:
        UsageError: There are no samples or no control.
    """
    if not len(cells) or not len(control):
        raise UsageError(f"there are {len(cells)} samples and {len(control)} held-out examples; there should be some of each")
    closer, c_t = _ranks(near.trained[:, 0], cells, control, control_cells)
    nearer = near.trained[:, 0] < near.held
    return Memory(
        copies=int(copies(near.trained, exact).sum()),
        of=len(cells),
        near=int(nearer.sum()),
        chance=near.m / (near.m + near.k),
        error=_error(near, nearer) / len(cells),
        closer=closer,
        c_t=c_t,
    )


def beyond(ours: Memory, usual: Memory) -> tuple[float, float]:
    """The share of samples that are bound to the training data, and how often chance alone brings as much.

    It is what the share with the nearest real neighbour in T is beyond that of real examples, or beyond m / (m + k) where that
    is more, as a part of all that could be. Real examples of the split train tell what that share is where the splits differ,
    as MNIST's do in who wrote the digits.

    Arguments:
        ours: Of samples.
        usual: Of training examples in their place, each sought among the others.

    >>> still = Memory(0, 1000, 750, 0.75, 0.01, 0.5, 0.0)
    >>> share, p = beyond(Memory(0, 1000, 875, 0.75, 0.01, 0.5, 0.0), still)
    >>> share, p < 1e-9
    (0.5, True)
    """
    from scipy.stats import norm

    expected = max(ours.chance, usual.near / usual.of)
    more = ours.near / ours.of - expected
    if more <= 0:
        return 0.0, 1.0
    return more / (1 - expected), float(norm.sf(more / math.hypot(ours.error, usual.error)))


def _error(near: Near, nearer: Tensor) -> float:
    """The deviation of the number of samples with the nearest neighbour in T, when which m of all m + k are T is drawn anew.

    With c_i samples whose nearest is the real example i, it is that of the sum of c_i over m of them, drawn without
    replacement: a picture that is drawn often counts once, however often.
    """
    m, k = near.m, near.k
    c = torch.where(nearer, near.trained_index[:, 0], m + near.held_index).bincount(minlength=m + k).double()
    return math.sqrt(m * k / (m + k) * float(c.var()))


def _ranks(d: Tensor, cells: Tensor, control: Tensor, control_cells: Tensor) -> tuple[float, float]:
    """The share of pairs of one cell in which the sample is closer, and C_T."""
    apart = [(d[cells == cell], control[control_cells == cell]) for cell in control_cells.unique()]
    pairs = [pair for pair in apart if min(map(len, pair)) >= LEAST_IN_CELL] or [(d, control)]
    found = torch.tensor([_rank(*pair) for pair in pairs], dtype=torch.float64)
    w = torch.tensor([len(theirs) for _, theirs in pairs], dtype=torch.float64)
    closer, c_t = (w @ found / w.sum()).tolist()
    return closer, c_t


def _rank(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """The share of pairs in which ours is less, and how many deviations U is from where equal distributions have it."""
    from scipy.stats import mannwhitneyu

    n, m = len(ours), len(theirs)
    u = float(mannwhitneyu(ours.numpy(), theirs.numpy(), method="asymptotic").statistic)
    return 1 - u / (n * m), (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
