"""The contract that every attack keeps, as a test that anybody can run on their own.

    from advkit.testing import check_attack

    def test_my_attack():
        check_attack(MyAttack(steps=5))

Each part is a function of its own, listed in ``CONTRACT``, and raises an AssertionError whose text says what was broken.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advkit import spec
from advkit.attacks import ATTACKS
from advkit.engine import Attack, AttackResult, perturb, run
from advkit.errors import AccessError, UsageError
from advkit.oracle import Access, Goal
from advkit.streams import Streams
from advkit.threat import Lp, Rotation

RADII = {math.inf: 0.15, 2.0: 0.8, 1.0: 4.0, 0.0: 6.0}
SHAPES = ((12,), (2, 10), (1, 6, 6), (2, 2, 4, 4))


@dataclass(frozen=True)
class Problem:
    """One attack, one model, one batch, one threat model.

    Attributes:
        attack: What is tested.
        model: A small network with dropout and batch normalization, in training mode, one parameter fixed.
        x: The inputs, (N, *).
        y: The model's own answers for them, (N,).
        threat: The threat model.
    """

    attack: Attack
    model: nn.Module
    x: Tensor
    y: Tensor
    threat: Lp

    def run(self, model: nn.Module | None = None, seed: int = 0, **options: object) -> AttackResult:
        """Run the attack on the batch."""
        given = {"rng": torch.Generator().manual_seed(seed), **options}
        return run(self.attack, model or self.model, self.x, self.y, self.threat, **given)  # type: ignore[arg-type]


class _Counting(nn.Module):
    """Counts the rows that go forward and the rows whose gradient comes back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, g: Tensor) -> None:
        self.backwards += len(g)


class _Broken(nn.Module):
    """Answers a number of times, then raises."""

    def __init__(self, model: nn.Module, answers: int) -> None:
        super().__init__()
        self.model, self.left = model, answers

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("out of answers")
        return self.model(x)


def _network(size: int, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        layers = (nn.Flatten(), nn.Linear(size, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 4))
        model = nn.Sequential(*layers).to(dtype)
    layers[1].bias.requires_grad_(False)
    return model.train()


def problem(
    attack: Attack, p: float, shape: tuple[int, ...] = (1, 6, 6), n: int = 6, dtype: torch.dtype = torch.float32
) -> Problem:
    """A problem in the norm ``p`` on ``n`` inputs of a shape."""
    rng = torch.Generator().manual_seed(11)
    x = torch.rand((n, *shape), generator=rng, dtype=torch.float64).to(dtype)
    model = _network(x[0].numel(), dtype)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    return Problem(attack, model.train(), x, y, Lp(p, RADII[p]))


def _same(a: AttackResult, b: AttackResult, rows: slice = slice(None)) -> bool:
    names = ("x_adv", "success", "distance", "forwards", "backwards")
    return all(torch.equal(getattr(a, name)[rows], getattr(b, name)[rows]) for name in names)


def _close(a: AttackResult, b: AttackResult, rows: slice) -> bool:
    """Equal up to what the order of a matrix product's sums can change."""
    same = torch.equal(a.success[rows], b.success[rows]) and torch.equal(a.forwards[rows], b.forwards[rows])
    return same and torch.allclose(a.x_adv[rows], b.x_adv[rows], atol=1e-5)


def _last(task: Problem, rng: torch.Generator | Streams, rows: slice = slice(None)) -> Tensor:
    return perturb(task.attack, task.model, task.x[rows], task.y[rows], task.threat, rng=rng)


def _deterministic(task: Problem) -> None:
    assert _same(task.run(seed=3), task.run(seed=3)), "the same generator should give the same result"
    a, b = (_last(task, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b), "the same generator should give the same last iterate"


def _independent_of_batch(task: Problem) -> None:
    streams = Streams.seeded(0, range(len(task.x)))
    whole = task.run(rng=Streams(streams.keys))
    for part in (slice(0, 1), slice(1, 4)):
        x, y, rng = task.x[part], task.y[part], Streams(streams.keys[part])
        alone = run(task.attack, task.model, x, y, task.threat, rng=rng)
        whole_part = AttackResult(**{name: value[part] for name, value in vars(whole).items() if value is not None})
        assert _close(alone, whole_part, slice(None)), "a row's result should not depend on the rest of its batch"
        a, b = _last(task, Streams(streams.keys))[part], _last(task, Streams(streams.keys[part]), part)
        assert torch.allclose(a, b, atol=1e-5), "a row's last iterate should not depend on the rest of its batch"


def _global_random_state(task: Problem) -> None:
    before = torch.get_rng_state()
    task.run()
    assert torch.equal(before, torch.get_rng_state()), "the global random state should be left alone"


def _state(model: nn.Module) -> list[object]:
    flags: list[object] = [module.training for module in model.modules()]
    for parameter in model.parameters():
        flags += [parameter.requires_grad, parameter.grad is None]
    return [*flags, *(value.tolist() for value in model.state_dict().values())]


def _model_untouched(task: Problem) -> None:
    before = _state(task.model)
    task.run()
    assert _state(task.model) == before, "the model's modes, requires_grad, gradients and weights should be left as they were"
    for answers in (0, 1, 2):
        with contextlib.suppress(UsageError):
            task.run(_Broken(task.model, answers))
        assert _state(task.model) == before, "the model should be left as it was after an exception too"


def _under_no_grad(task: Problem) -> None:
    expected = task.run()
    with torch.no_grad():
        assert _same(task.run(), expected), "the attack should work under torch.no_grad"
    with torch.inference_mode():
        x, y = task.x.clone(), task.y.clone()
        inside = Problem(task.attack, task.model, x, y, task.threat).run()
        assert _same(inside, expected), "the attack should work under torch.inference_mode"


def _inputs_unmodified(task: Problem) -> None:
    x, y = task.x.clone(), task.y.clone()
    result = task.run()
    assert torch.equal(x, task.x) and torch.equal(y, task.y), "the inputs should not be changed"
    assert result.x_adv.data_ptr() != task.x.data_ptr(), "the result should not share memory with the inputs"


def _inside(task: Problem) -> None:
    result = task.run()
    assert bool(task.threat.allows(result.x_adv, task.x).all()), "every result should be inside the threat model"
    assert result.x_adv.dtype == task.x.dtype and result.x_adv.shape == task.x.shape, "dtype and shape should be kept"
    x_adv = _last(task, torch.Generator().manual_seed(0))
    if not task.attack.minimum:
        assert bool(task.threat.allows(x_adv, task.x).all()), "the last iterate should be inside the threat model"
    assert bool(((x_adv >= task.threat.low) & (x_adv <= task.threat.high)).all()), "the last iterate should be in the range"
    box = Lp(task.threat.p, task.threat.eps, -1.0, 2.0)
    wide = run(task.attack, task.model, 3 * task.x - 1, task.y, box)
    assert bool(box.allows(wide.x_adv, 3 * task.x - 1).all()), "another range of the data should be kept too"


def _success_is_true(task: Problem) -> None:
    result = task.run()
    with torch.no_grad():
        fooled = task.model.eval()(result.x_adv).argmax(1) != task.y
    task.model.train()
    assert torch.equal(fooled, result.success), "success should be what the model says of the result"


def _within_budget(task: Problem) -> None:
    for budget in (1, 3):
        result = task.run(budget=budget)
        assert int(result.forwards.max()) <= budget, f"a budget of {budget} forward passes should be kept"


def _within_cost(task: Problem) -> None:
    result = task.run()
    passes = result.forwards + result.backwards
    # The engine looks at the last iterate once more.
    assert int(passes.max()) <= task.attack.cost + 1, f"a row should take at most the attack's cost, {task.attack.cost} passes"


def _access_respected(task: Problem) -> None:
    below = [access for access in Access if access < task.attack.access]
    assert not below or _refuses(lambda: task.run(access=below[-1])), "the attack should say which access it needs"
    enough = not _refuses(lambda: task.run(access=task.attack.access))
    assert enough, f"the attack should do with {task.attack.access.name.lower()}, the access that it says it needs"


def _refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except AccessError:
        return True
    return False


def _honest_counts(task: Problem) -> None:
    model = _Counting(task.model)
    result = task.run(model)
    forwards = int((result.forwards + result.checks).sum())
    assert forwards == model.forwards, f"{forwards} forward passes are reported, the model saw {model.forwards}"
    backwards = int(result.backwards.sum())
    assert backwards == model.backwards, f"{backwards} backward passes are reported, the model saw {model.backwards}"


def _targeted(task: Problem) -> None:
    target = (task.y + 1) % 4
    given = (task.attack, task.model, task.x, target, task.threat)
    result = run(*given, goal=Goal(targeted=True), rng=torch.Generator().manual_seed(0))
    with torch.no_grad():
        reached = task.model.eval()(result.x_adv).argmax(1) == target
    task.model.train()
    assert torch.equal(reached, result.success), "with a target, success should mean that the model says the target"


def _picklable(task: Problem) -> None:
    assert pickle.loads(pickle.dumps(task.attack)) == task.attack, "the attack should survive pickling"
    assert hash(task.attack) == hash(pickle.loads(pickle.dumps(task.attack))), "the attack should be hashable"


def _spec(task: Problem) -> None:
    if type(task.attack) in ATTACKS.values():
        text = spec.show(task.attack, ATTACKS)
        assert spec.parse(text, ATTACKS, "attack") == task.attack, f"{text} should be read back as the same attack"


def _radius(task: Problem) -> None:
    closest = Lp(task.threat.p)
    if task.attack.minimum:
        result = run(task.attack, task.model, task.x, task.y, closest)
        assert bool(closest.allows(result.x_adv, task.x).all()), "without a radius the result should still be in the range"
        return
    try:
        run(task.attack, task.model, task.x, task.y, closest)
    except UsageError:
        return
    raise AssertionError("an attack that needs a radius should refuse eps = inf")


def _change(task: Problem) -> None:
    if task.threat.p != math.inf or task.x.dtype != torch.float64:
        return
    images, threat = problem(task.attack, math.inf, dtype=torch.float64), Rotation(40, 0.2)
    try:
        result = run(task.attack, images.model, images.x, images.y, threat)
    except UsageError:
        # One that needs inputs of another shape than the parameters have says so.
        return
    assert result.change is not None
    zero = threat.zero(images.x)
    assert bool(threat.ball.allows(result.change, zero).all()), "the parameters of a change should be inside their ball"
    assert torch.equal(result.x_adv, threat.apply(images.x, result.change)), "a result should be what the parameters make of x"
    with torch.no_grad():
        fooled = images.model.eval()(result.x_adv).argmax(1) != images.y
    assert torch.equal(fooled, result.success), "success should be what the model says of the changed input"


CONTRACT: dict[str, Callable[[Problem], None]] = {
    "deterministic": _deterministic,
    "independent of batch": _independent_of_batch,
    "global random state": _global_random_state,
    "model untouched": _model_untouched,
    "under no_grad": _under_no_grad,
    "inputs unmodified": _inputs_unmodified,
    "inside": _inside,
    "success is true": _success_is_true,
    "within budget": _within_budget,
    "within cost": _within_cost,
    "access respected": _access_respected,
    "honest counts": _honest_counts,
    "targeted": _targeted,
    "picklable": _picklable,
    "spec": _spec,
    "radius": _radius,
    "change": _change,
}
"""The parts of the contract."""


def check_attack(attack: Attack, *, norms: tuple[float, ...] | None = None) -> None:
    """Check an attack against the whole contract, in each of its norms, on several shapes, in float32 and float64.

    Arguments:
        attack: The attack, with settings that make it quick.
        norms: The norms to check; by default, all that it serves.

    Raises:
        AssertionError: Something is broken; the text says what, and where.
    """
    for task in _problems(attack, attack.norms if norms is None else norms):
        for name, check in CONTRACT.items():
            try:
                check(task)
            except AssertionError as error:
                where = f"l_{task.threat.p:g}, inputs {tuple(task.x.shape)}, {task.x.dtype}"
                raise AssertionError(f"{attack!r} breaks the contract ({name}; {where}): {error}") from error


def _problems(attack: Attack, norms: tuple[float, ...]) -> Iterator[Problem]:
    # An attack that searches everywhere says how many entries it can search; one made for a single shape, which.
    most, only = getattr(attack, "dimensions", math.inf), getattr(attack, "shape", None)
    shapes = [only] if only else [shape for shape in SHAPES if math.prod(shape) <= most] or [(int(most),)]
    usual = shapes[0] if only or most < 36 else (1, 6, 6)
    for p in norms:
        yield problem(attack, p, usual)
        yield problem(attack, p, usual, dtype=torch.float64)
    for shape in shapes:
        yield problem(attack, norms[0], shape)
