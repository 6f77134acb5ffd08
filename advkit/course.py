"""What a training run carries from epoch to epoch, and the file that holds it where it is stopped."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit import processes
from advkit.engine import frozen
from advkit.errors import UsageError
from advkit.models import checkpoint
from advkit.oracle import logits_of
from advkit.recipe import SCHEDULES, Recipe
from advkit.spec import check_between, check_whole


@dataclass(frozen=True)
class Check:
    """What a network was worth at the end of an epoch, on examples that it does not learn from.

    Attributes:
        epoch: The epoch, from 0.
        clean: The share of the examples that it gets right.
        robust: The share that it gets right under attack.
        one_step: The share that it gets right under an attack of one step, where there is such an attack.
        of: How many examples.
        full: Whether the loss was at its full strength by then: a network that still learns from a smaller radius is not
            the one that was asked for.

    Raises:
        UsageError: A share is not in [0, 1], or a number is not whole.
    """

    epoch: int
    clean: float
    robust: float
    one_step: float | None
    of: int
    full: bool

    def __post_init__(self) -> None:
        check_whole("check: epoch", self.epoch, 0)
        check_whole("check: of", self.of, 1)
        for name in ("clean", "robust", "one_step"):
            share = getattr(self, name)
            if share is not None:
                check_between(f"check: {name}", share)


def kept(history: Sequence[Check]) -> Check | None:
    """The check of the epoch whose weights are kept: the latest that is within a standard error of the best before it.

    The best of many noisy checks is often luck; of two that cannot be told apart, the one that was trained longer is kept.
    """
    best, found = -1.0, None
    for check in history:
        error = math.sqrt(best * (1 - best) / check.of) if best > 0 else 0.0
        if not check.full or check.robust >= best - error:
            found = check
        best = max(best, check.robust) if check.full else best
    return found


class Diverged(UsageError):
    """The loss became NaN or infinite; the model holds the last weights that were good."""


@dataclass
class Course:
    """What a run carries from epoch to epoch, and what the file of a stopped one holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    recipe: Recipe
    average: dict[str, Tensor] = field(default_factory=dict)
    good: dict[str, Tensor] = field(default_factory=dict)
    history: list[Check] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            inspect.signature(self.optimizer.step).bind()
        except TypeError:
            kind = type(self.optimizer).__name__
            raise UsageError(f"a step of {kind} needs a closure; give an optimizer that needs no more than gradients") from None
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.taken = 0
        if self.recipe.average:
            self.average = _copied(self.model.state_dict())
        self.good = _copied(self.model.state_dict())

    def set_rate(self, t: float) -> None:
        """Set the learning rates for a share t of all steps."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * SCHEDULES[self.recipe.schedule](t)

    def step(self) -> None:
        """One step of the optimizer, with the gradients that are there, and of the average."""
        if self.recipe.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.taken += 1
        # Young averages forget the first weights faster.
        share = min(self.recipe.average, (1 + self.taken) / (10 + self.taken))
        for name, value in self.model.state_dict().items() if self.average else ():
            if value.is_floating_point():
                self.average[name].lerp_(value, 1 - share)
            else:
                self.average[name].copy_(value)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with the averaged weights, where there are any."""
        if not self.average:
            yield
            return
        own = _copied(self.model.state_dict())
        self.model.load_state_dict(self.average)
        try:
            yield
        finally:
            self.model.load_state_dict(own)

    def agree(self) -> None:
        """All processes begin with what the first has."""
        for state in (self.model.state_dict(), self.average, self.good):
            for value in state.values():
                processes.share(value)

    def end(self, epoch: int, few: Tensor, check: Callable[[int], Check] | None) -> None:
        """Check an epoch that is done, and keep its weights if they are the ones to keep; ``few`` are inputs, (N, *)."""
        for name, buffer in self.model.named_buffers():
            for value in (buffer, self.average.get(name)):
                if value is not None and value.is_floating_point():
                    processes.mean(value)
        if not self.sound(few):
            raise self.diverged(epoch)
        if check is not None:
            self.history.append(check(epoch))
        if check is None or kept(self.history) is self.history[-1]:
            self.good = _copied(self.average or self.model.state_dict())

    def sound(self, x: Tensor) -> bool:
        """Whether the weights are finite, and no answer for inputs, (N, *), is NaN."""
        if not all(bool(value.isfinite().all()) for value in self.model.parameters()):
            return False
        with frozen(self.model), torch.no_grad():
            return not bool(logits_of(self.model(x)).isnan().any())

    def diverged(self, epoch: int, became: str = "NaN") -> Diverged:
        """The error for a loss that is no number any more; the model is given the last good weights."""
        self.model.load_state_dict(self.good)
        self.model.eval()
        found = kept(self.history)
        last = epoch if found is None else found.epoch + 1
        weights = f"the weights after epoch {last} were kept" if epoch else "no epoch was done"
        lower = f"try a learning rate below {max(self.rates):g}"
        return Diverged(f"the loss became {became} in epoch {epoch + 1} and {weights}; {lower}")

    def save(self, partial: Path, name: str, epoch: int) -> None:
        """Write the run to its file, in the first process."""
        if processes.group()[0] == 0:
            tensors, about = self.state()
            checkpoint.write(partial, tensors, {"run": name, "progress": _text({**about, "epoch": epoch}, self.optimizer)})
        processes.barrier()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the run carries: its tensors by name, and the rest."""
        parts = {"model": self.model.state_dict(), "average": self.average, "good": self.good}
        tensors = {f"{part}.{key}": value for part, of in parts.items() for key, value in of.items()}
        state = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": value for i, of in state.items() for key, value in of.items()}
        tensors |= {f"optimizer.{key}": value for key, value in flat.items() if isinstance(value, Tensor)}
        return tensors, {
            "taken": self.taken,
            "history": [asdict(check) for check in self.history],
            "state": {key: value for key, value in flat.items() if not isinstance(value, Tensor)},
            "groups": [numbers(group) for group in self.optimizer.param_groups],
        }

    def resume(self, partial: Path, name: str) -> int:
        """Put the run in ``partial`` back and return its next epoch; 0 where there is none."""
        found = resumed(partial, name)
        if found is None:
            return 0
        tensors, about = found
        with damaged(partial):
            self.put_back(tensors, about)
            epoch: int = about["epoch"]
            check_whole("epoch", epoch, 1)
            if epoch > self.recipe.epochs or [check.epoch for check in self.history] not in ([], list(range(epoch))):
                raise ValueError("epochs that there are not")
            return epoch

    def put_back(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Carry on with what :meth:`state` gave.

        Raises:
            RuntimeError, LookupError, ValueError, TypeError, AttributeError: It is not of this model and optimizer.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "good": {}, "optimizer": {}}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = value
        self.good = self._loaded(parts["good"])
        self.average = self._loaded(parts["average"]) if self.recipe.average else {}
        self._loaded(parts["model"])
        state: dict[int, dict[str, Any]] = {}
        for key, value in (parts["optimizer"] | about["state"]).items():
            i, _, name = key.partition(".")
            state.setdefault(int(i), {})[name] = value
        self._check_state(state)
        pairs = zip(self.optimizer.state_dict()["param_groups"], map(numbers, about["groups"]), strict=True)
        groups = [own | {key: saved[key] for key in numbers(own)} for own, saved in pairs]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.history = [Check(**check) for check in about["history"]]
        self.taken = about["taken"]
        check_whole("taken", self.taken, 1)

    def _check_state(self, state: dict[int, dict[str, Any]]) -> None:
        """Refuse what a step would stumble over later, as far as the optimizer's state is known."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        known = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}
        for i, of in state.items():
            shape = parameters[i].shape
            for key in known.get(type(self.optimizer), set()):
                if of[key].shape != (() if key == "step" else shape):
                    raise ValueError(f"{key} of another shape")

    def _loaded(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        self.model.load_state_dict(state)
        return _copied(self.model.state_dict())


def resumed(partial: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and the rest of the run in a file; None where there is no file.

    Raises:
        UsageError: It holds another run, or is damaged.
    """
    if not partial.exists():
        return None
    tensors, metadata = checkpoint.read(partial)
    if metadata.get("run") != name:
        raise UsageError(f"{partial} holds another run (network, data, recipe or seed differ); delete it to start anew")
    with damaged(partial):
        about: dict[str, Any] = json.loads(metadata["progress"])
        return tensors, about


@contextlib.contextmanager
def damaged(partial: Path) -> Iterator[None]:
    """What does not fit is said in a sentence."""
    try:
        yield
    except (RuntimeError, LookupError, ValueError, TypeError, AttributeError):
        raise UsageError(f"{partial} is damaged, or does not fit the network; delete it to start anew") from None


def _text(about: dict[str, Any], optimizer: torch.optim.Optimizer) -> str:
    try:
        return json.dumps(about)
    except (TypeError, ValueError):
        kind = type(optimizer).__name__
        raise UsageError(f"{kind} keeps more than tensors, numbers and text, so its run cannot be saved") from None


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.items()}


def numbers(settings: dict[str, Any]) -> dict[str, float]:
    """Those of an optimizer's settings that are numbers."""
    return {name: value for name, value in settings.items() if isinstance(value, int | float)}
