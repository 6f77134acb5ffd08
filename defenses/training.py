"""Training a network to withstand an adversary, with its robust accuracy watched from epoch to epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import train as loop
from advkit.attacks import FGSM, PGD
from advkit.data import Data, from_tensors
from advkit.data.dataset import stratified
from advkit.engine import Attack, frozen, run
from advkit.errors import UsageError
from advkit.norms import lp_norm
from advkit.oracle import answer
from advkit.threat import Change, Lp
from advkit.train import Check, Extra, Progress, Recipe, TrainingLoss, kept

STEPS = 10
"""How many gradients the check at the end of an epoch takes."""
HELD_OUT = 1000
"""How many examples are held out to be checked on, at most a tenth of the data."""

Threats = Lp | Change | tuple[Lp | Change, ...]


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        model: The network, in evaluation mode, with the weights of ``epoch``.
        history: The check at the end of each epoch; empty where no threat model was watched.
        epoch: The epoch whose weights were kept, from 0; None where nothing was checked.
        warning: What went wrong on the way, where something did.
    """

    model: nn.Module
    history: tuple[Check, ...]
    epoch: int | None
    warning: str | None


def train(
    model: nn.Module,
    data: Data | tuple[Tensor, Tensor],
    loss: TrainingLoss,
    recipe: Recipe | None = None,
    *,
    threat: Threats | None = None,
    validation: Data | tuple[Tensor, Tensor] | int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    partial: Path | None = None,
    identity: str = "",
    report: Callable[[Progress], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    extra: Extra | None = None,
    compile: bool = False,
) -> Trained:
    """Train a network in place, and keep the weights of its best epoch.

    At the end of each epoch PGD of ten steps attacks the network on examples that it does not learn from. The weights that
    are kept are the latest that are within a standard error of the best robust accuracy (early stopping: Rice, Wong and
    Kolter, 2020, "Overfitting in adversarially robust deep learning", https://arxiv.org/abs/2002.11569). A network that
    withstands the single step that it was trained against, and no longer several, has overfitted catastrophically (Wong,
    Rice and Kolter, 2020, https://arxiv.org/abs/2001.03994); the warning names the epoch.

    Arguments:
        model: The network, inputs (B, *) to logits (B, K).
        data: What to learn: data of :mod:`advkit.data`, or inputs (N, *) and labels (N,) in the range of the threat model.
        loss: What a step descends: ``TRADES(threat)``; advkit list defenses.
        recipe: How; by default five epochs of ``Recipe()``.
        threat: What the network is checked against; by default what the loss knows of. Nothing is checked without one.
        validation: Examples to check on, as ``data``, or how many to hold out of those; by default 1,000, and a tenth at most.
        seed: Of every random draw.
        device: Where to train.
        partial: A file that holds the run after each epoch, as in :func:`advkit.train.train`; so are the other arguments.
        identity: What else makes this run the same as the one in ``partial``.
        report: Called after each step and each check.
        optimizer: In place of the recipe's.
        extra: Examples that fill a share of every batch.
        compile: Whether the network is translated with torch.compile first.

    Raises:
        UsageError: What is given is not of this form, a radius is wider than the data's range, there are too few examples, or
            as in :func:`advkit.train.train`.
    """
    recipe = Recipe() if recipe is None else recipe
    threats = threats_of(loss if threat is None else threat)
    if threat is not None:
        _check_threats(threat, threats)
    data = _as_data(data, threats)
    for one in threats:
        check_radius(one, data)
    check = None
    if threats:
        given = validation if validation is None or isinstance(validation, int) else _as_data(validation, threats)
        data, watched = held_out(data, given, seed)
        loop.check_fits(model.to(loop.place(device)), watched)
        check = Guard(threats, watched)
    elif validation is not None:
        raise UsageError("examples to check on were given without a threat model; plain training is not checked")
    seen: list[Progress] = []

    def watch(progress: Progress) -> None:
        seen[:] = [progress]
        if report:
            report(progress)

    loop.train(
        model,
        data,
        recipe,
        loss=loss,
        seed=seed,
        device=device,
        partial=partial,
        identity=identity,
        report=watch,
        check=check,
        optimizer=optimizer,
        extra=extra,
        compile=compile,
    )
    history = seen[-1].history if seen else ()
    found = kept(history)
    return Trained(model, history, None if found is None else found.epoch, overfitting(history))


def threats_of(source: Any) -> tuple[Lp | Change, ...]:
    """The threat models of a loss, or of the loss that it wraps; none, one or several. Threat models are their own."""
    while not isinstance(source, tuple | list) and not hasattr(source, "allows"):
        source = getattr(source, "threat", getattr(source, "loss", ()))
    return tuple(source) if isinstance(source, tuple | list) else (source,)


def _check_threats(given: Any, threats: tuple[Any, ...]) -> None:
    if not threats or not all(hasattr(threat, "allows") for threat in threats):
        raise UsageError(f"the threat model is {given!r}; it should be one, as in Lp(inf, 8 / 255), or a tuple of several")


def _as_data(given: Any, threats: tuple[Lp | Change, ...]) -> Data:
    if isinstance(given, Data):
        return given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise UsageError(f"the data are of type {type(given).__name__}; they should be of advkit.data, or inputs and labels")
    if not threats:
        raise UsageError("inputs and labels were given without a threat model to say their range; use advkit.data.from_tensors")
    x, y = given
    return from_tensors(x, y, low=threats[0].low, high=threats[0].high)


def check_radius(threat: Lp | Change, data: Data) -> None:
    """Refuse an l_p ball that holds every input there can be.

    Raises:
        UsageError: It does.
    """
    if not isinstance(threat, Lp):
        return
    x, _ = data.batch(0, 1)
    widest = float(lp_norm(torch.full_like(x, data.high - data.low), threat.p))
    if threat.eps >= widest:
        raise UsageError(
            f"the radius is {threat.eps:g} and the data go from {data.low:g} to {data.high:g}, "
            f"so that no two inputs are further apart than {widest:g}; give a smaller radius"
        )


def held_out(data: Data, validation: Data | int | None, seed: int) -> tuple[Data, Data]:
    """What to learn from, and what to check on: the data given, or so many examples, classes in proportion.

    Raises:
        UsageError: No example would be left for one of the two.
    """
    if isinstance(validation, Data):
        return data, validation
    n = min(HELD_OUT, len(data) // 10) if validation is None else validation
    if not 0 < n < len(data):
        raise UsageError(f"{n} of {len(data)} examples would be held out to check on; it should be at least 1, and not all")
    positions = stratified(data.y, n, seed)
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[positions] = False
    return data.select(rest.nonzero().squeeze(1)), data.select(positions)


@dataclass(frozen=True)
class Guard:
    """What a network is worth at the end of an epoch: clean, under PGD, and under one step of FGSM.

    Arguments:
        threats: What the adversary may change; an example counts as robust if it withstands each.
        data: The examples.
    """

    threats: tuple[Lp | Change, ...]
    data: Data

    def __call__(self, model: nn.Module, epoch: int, full: bool) -> Check:
        """The check; the same noise each time."""
        # Rotation and the like have no single step that comes close to PGD.
        steps = all(isinstance(threat, Lp) and threat.p in FGSM.norms for threat in self.threats)
        counts = torch.zeros(3)
        for start in range(0, len(self.data), 500):
            x, y = self.data.batch(start, start + 500)
            first = next(model.parameters())
            x, y = x.to(first), y.to(first.device)
            attacks: list[Attack] = [PGD(STEPS), FGSM()] if steps else [PGD(STEPS)]
            results = [self._withstood(model, x, y, attack) for attack in attacks]
            with torch.no_grad(), frozen(model):
                results.insert(0, answer(model, x).argmax(1) == y)
            for i, result in enumerate(results):
                counts[i] += result.sum().cpu()
        clean, robust, one_step = (counts / len(self.data)).tolist()
        return Check(epoch, clean, robust, one_step if steps else None, len(self.data), full)

    def _withstood(self, model: nn.Module, x: Tensor, y: Tensor, attack: Attack) -> Tensor:
        robust = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for threat in self.threats:
            robust &= ~run(attack, model, x, y, threat, rng=torch.Generator().manual_seed(0)).success
        return robust


def overfitting(history: Sequence[Check]) -> str | None:
    """A sentence that names the epoch in which catastrophic overfitting began; None where it did not.

    It began where robust accuracy under ten steps fell below half of the best before; or where the network, from then to the
    end, gets at least half of the examples right under one step and under ten less than half of those. A network that is only
    beginning to learn does so as well, but not to the end.
    """
    began = next((check for check, best in _with_best(history) if 2 * check.robust < best), None)
    for check in reversed(history):
        if not _narrow(check):
            break
        began = check if began is None or check.epoch < began.epoch else began
    if began is None:
        return None
    found = kept(history)
    assert found is not None
    one = "" if began.one_step is None else f" and {100 * began.one_step:.1f} % under one"
    right = f"{100 * began.robust:.1f} % of the held out examples were right under {STEPS} steps{one}"
    weights = f"the weights of epoch {found.epoch + 1} ({100 * found.robust:.1f} %) were kept"
    return f"catastrophic overfitting began in epoch {began.epoch + 1}: {right}; {weights}"


def _with_best(history: Sequence[Check]) -> Iterator[tuple[Check, float]]:
    """Each check at full strength with the best robust accuracy before it."""
    best = 0.0
    for check in history:
        if check.full:
            yield check, best
            best = max(best, check.robust)


def _narrow(check: Check) -> bool:
    """Whether one step is withstood, and several are not."""
    one_step = check.one_step or 0.0
    return check.full and one_step >= 0.5 and 2 * check.robust < one_step


def label(model: nn.Module, data: Data, batch_size: int = 500) -> Data:
    """The same inputs with the labels that a network gives them: pseudo-labels, for :class:`advkit.train.Extra`.

    Carmon, Raghunathan, Schmidt, Liang and Duchi, 2019, "Unlabeled data improves adversarial robustness",
    https://arxiv.org/abs/1905.13736.

    Arguments:
        model: The network, inputs (B, *) to logits (B, K).
        data: The inputs; their labels are not looked at.
        batch_size: Examples at a time.

    Raises:
        UsageError: There are no examples, or the data have fewer classes than the network.
    """
    if not len(data):
        raise UsageError(f"{data.name} holds no examples; there should be at least one")
    first = next(model.parameters(), torch.empty(0))
    with frozen(model), torch.no_grad():
        starts = range(0, len(data), batch_size)
        labels = [answer(model, data.batch(i, i + batch_size)[0].to(first)).argmax(1).cpu() for i in starts]
    return dataclasses.replace(data, y=torch.cat(labels))
