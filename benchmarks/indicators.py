"""The indicators of attack failure: signs, in a run of an attack, that it failed and not the model that withstood.

Pintor, Demetrio, Sotgiu, Demontis, Carlini, Biggio and Roli, 2022, "Indicators of attack failure: debugging and improving
optimization of adversarial examples", https://arxiv.org/abs/2106.09947. Their sixth, an attack without bounds that fails, is
in ``masking``, as it is a sign of Athalye et al. as well.

Symbols: L is the margin, the greatest other logit less the label's; g its gradient at x; d a small random change of x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from advkit.benchmarks.findings import Finding
from advkit.benchmarks.probe import ALLOWED, Case, leaves, surely
from advkit.engine import frozen
from advkit.losses import LOSSES, Loss, margin
from advkit.oracle import Access, answer
from advkit.sound.threats import Decibels, lengths
from advkit.streams import Streams

SIDE = 8 / 255
"""The side of the cube around x in which d is drawn, as a share of the data's range."""
DRAWS = 100
"""How many d."""
FORETOLD = 2.5
"""The gradient may foretell changes of L up to this factor too large or too small."""
UNSTEADY = 0.1
"""The share of rows where it may be further off."""
TAIL = 0.25
"""The last part of the way, in which an attack that has converged gains little."""
GAIN = 0.05
"""What it may gain there, as a share of what it gained in all."""
LOST = 0.1
"""The share of examples that fool the surrogate and may not fool the model."""

ADAPT = "give the attack the gradient of a stand-in without that part (straighten and tap, docs/adaptive.md), or use scores"


def unavailable_gradients(case: Case) -> Finding | None:
    """The gradient of the margin at x is 0 or not finite, or there is none.

    The margin does not underflow, so a network that is sure of itself does not count. Where only the attack's own loss has no
    gradient, that is a warning.
    """
    if not case.gradients:
        return None
    own = next((leaf.loss for leaf in leaves(case.attack) if getattr(leaf, "loss", None) in LOSSES), "margin")
    (dead, why), (flat, _) = (_dead(case, loss) for loss in (margin, LOSSES[own]))
    of, none = len(case), surely(dead, len(case), ALLOWED)
    advice, command = f"the attack has no direction to go; {ADAPT}", case.command("--access", "scores")
    if not none:
        advice = f"the loss {own!r} underflows where the model is sure of itself; use one that does not, as the margin"
        command = case.command("--attack", 'pgd(steps=40, loss="margin")')
    return case.finding(
        "unavailable-gradients",
        f"the gradient of the margin is 0 or missing for {dead} of {of} examples{why}, that of the attack's loss for {flat}",
        none or surely(flat, of, ALLOWED),
        advice,
        command,
        "suspect" if none else "warning",
        dead=dead,
        dead_own=flat,
        examples=of,
    )


def _dead(case: Case, loss: Loss) -> tuple[int, str]:
    """How many rows have no gradient at x, and why if none has."""
    try:
        g = _gradient(case, loss)[1].flatten(1)
    except Exception as error:  # what a model's backward pass raises is its own
        return len(case), f" (the backward pass raised {type(error).__name__})"
    return int((~(g.isfinite().all(1) & (g != 0).any(1))).sum()), ""


def _gradient(case: Case, loss: Loss) -> tuple[Tensor, Tensor]:
    """The loss at x, (N,), and its gradient, (N, *)."""
    z = case.x.clone().requires_grad_(True)
    with torch.enable_grad(), frozen(case.model.module):
        values = loss(answer(case.model.module, z), case.y)
        (g,) = torch.autograd.grad(values.sum(), z)
    return values.detach(), g


def _near(case: Case, d: Tensor) -> Tensor:
    """The inputs moved by d, (N, *), in units of the range; sounds in units of their root mean square, before their end."""
    threat = case.threat
    if isinstance(threat, Decibels):
        size = case.x.norm(dim=1) / lengths(case.x).sqrt()
        return threat.added(case.x, d * size.unsqueeze(1))
    return (case.x + d * (threat.high - threat.low)).clamp(threat.low, threat.high)


def unstable_predictions(case: Case) -> Finding | None:
    """The margin changes around x by far more, or far less, than its gradient says.

    Over draws of d, uniform in a cube, the root mean squares of <g, d> and of L(x + d) - L(x) are compared. Pintor et al.
    divide the change by |L(x)|, which is large for a steep network and small for a robust one with noise; divided by what the
    gradient foretells it is near 1 for both, far below 1 for noise and jumps, far above for gradients that explode.
    """
    if not case.gradients or not case.threat.high - case.threat.low < math.inf or _dead(case, margin)[1]:
        return None
    before, g = _gradient(case, margin)
    rng = Streams.seeded(case.seed, range(len(case)), "cube", case.x.device)
    changes, foretold = [], []
    for _ in range(DRAWS):
        u = rng.uniform(*case.x.shape[1:], dtype=case.x.dtype)
        z = _near(case, SIDE * (u - 0.5))
        changes.append(margin(case.ask(z), case.y) - before)
        foretold.append((g.nan_to_num(0.0, 0.0, 0.0) * (z - case.x)).flatten(1).sum(1))
    ratio = torch.stack(foretold).norm(dim=0) / torch.stack(changes).norm(dim=0)
    # Where nothing changes and nothing is foretold there is nothing to compare.
    if ratio.isnan().all():
        return None
    off = ((ratio > FORETOLD) | (ratio < 1 / FORETOLD)) & ~ratio.isnan()
    count, median = int(off.sum()), float(ratio.nanmedian())
    return case.finding(
        "unstable-predictions",
        f"around {count} of {len(case)} examples the gradient foretells changes of the margin that are {FORETOLD:g} times too "
        f"large or too small; the median factor is {median:.2g}",
        surely(count, len(case), UNSTEADY),
        "the gradient at a point says little of the points nearby: noise, jumps, or gradients that explode; take its mean over "
        "draws or over a small region (expect, docs/adaptive.md), or use scores",
        case.command("--access", "scores"),
        off=count,
        median=median,
        examples=len(case),
    )


def silent_success(case: Case) -> Finding | None:
    """The attack passes a point that fools the model and ends at one that does not.

    ``advkit.evaluate`` counts the best point of the way; what takes the last iterate, as training, transfer and other tools
    do, does not, so this is a warning.
    """
    lost = case.base.success & ~case.way.fooled
    count, of = int(lost.sum()), int(case.base.success.sum())
    return case.finding(
        "silent-success",
        f"of {of} examples that the attack broke on its way, {count} are not broken by its last iterate",
        surely(count, of, ALLOWED),
        "whatever uses the last iterate (perturb, transfer, other tools) takes these for robust; keep the best point of the "
        "way, as advkit attack does",
        case.command("--attack", case.named(case.attack)),
        "warning",
        lost=count,
        broken=of,
    )


def incomplete_optimization(case: Case) -> Finding | None:
    """The margin, rescaled to what the attack gained in all, still grows in the last part of the way."""
    way = case.way.margins[:, case.left]
    steps = len(way) - 1
    if steps < 2 or not len(case.left):
        return None
    best = way.cummax(0).values
    tail = math.ceil(TAIL * steps)
    gained = best[-1] - best[0]
    late = (best[-1] - best[-1 - tail]) / gained.clamp(min=torch.finfo(gained.dtype).tiny)
    count, of = int((late > GAIN).sum()), len(case.left)
    return case.finding(
        "incomplete-optimization",
        f"for {count} of {of} examples left, the last {tail} of {steps} steps bring more than {100 * GAIN:g} % of the gain",
        surely(count, of, 0.5),
        "the attack has not converged; give it more steps, or larger ones",
        case.stronger(),
        "warning",
        late=count,
        left=of,
    )


def transfer_failure(case: Case) -> Finding | None:
    """The examples are made on a surrogate, and fool it but not the model."""
    if case.surrogate is None:
        return None
    there, here = case.transferred(case.surrogate, torch.arange(len(case)))
    of, count = int(there.sum()), int((there & ~here).sum())
    return case.finding(
        "transfer-failure",
        f"of {of} examples that fool the surrogate, {count} do not fool the model",
        surely(count, of, LOST),
        "the surrogate says little of this model; attack the model itself, with scores if it has no gradients, or a surrogate "
        "closer to it",
        case.command(*(() if case.access == Access.GRADIENTS else ("--access", case.access.name.lower()))),
        lost=count,
        fooled=of,
    )
