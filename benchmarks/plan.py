"""What an evaluation will do, checked and said in full before it does it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import nn

from advkit import models as models_by_name
from advkit import spec
from advkit.attacks import ATTACKS
from advkit.benchmarks.suites import SUITES
from advkit.combine import Expect
from advkit.data import Data
from advkit.data.dataset import check_seed
from advkit.engine import Attack, check_serves
from advkit.errors import AccessError, UsageError, first_line
from advkit.fast import Fast
from advkit.fast import fast as make_fast
from advkit.models import Model
from advkit.models.digest import digest_files
from advkit.oracle import Access
from advkit.threat import BALLS, CHANGES, THREATS, Change, Lp
from advkit.version import __version__

ENTRIES_A_BATCH = 200_704
"""How many numbers a batch holds by default: 256 digits of 28 x 28."""

TARGETS = ("next", "random", "least-likely")

ONE_ANSWER = (
    "one answer decides what counts as fooled; let several decide (--votes 5, votes=5), and attack their mean (expect(...))"
)

VOTES = 5
"""Of how many answers most decide, where a defense that draws says how it is attacked and the number is not given."""

DRAWS = f"the defense draws at random, so most of {VOTES} answers decide what counts as fooled (votes)"

NAIVE = "the model says how an adaptive attack is made, but the attacks here are naive; advkit attack runs both"

SAME = "the defense asks for no other attacks than these, which are adaptive as they are"

STAND_IN = "a stand-in in bfloat16 answers the attacks; the model itself confirms every success"


@dataclass(frozen=True)
class Plan:
    """One evaluation, fully said: nothing is left to choose."""

    model: Model
    data: Data
    attacks: tuple[tuple[str, Attack], ...]
    adaptive: tuple[str, ...]
    threat: Lp | Change
    target: str | None
    access: Access
    budget: int | None
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    seed: int
    quantize: bool
    alone: bool
    votes: int
    fast: Fast | None
    notes: tuple[str, ...]
    data_digest: str

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same."""
        kind = {"kind": self.data.kind, "low": self.data.low, "high": self.data.high, **rate_of(self.data)}
        files = digest_files([self.threat, [attack for _, attack in self.attacks]])
        return {
            "format": 1,
            "advkit": __version__,
            "model": {"name": self.model.name, "digest": self.model.digest},
            "data": {"name": self.data.name, "digest": self.data_digest, "examples": len(self.data), **kind},
            "attacks": [name for name, _ in self.attacks],
            "adaptive": list(self.adaptive),
            "threat": threat_name(self.threat),
            "goal": self.target or "untargeted",
            "access": self.access.name.lower(),
            "budget": self.budget,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "quantize": self.quantize,
            "alone": self.alone,
            "votes": self.votes,
            "fast": self.fast is not None,
            "compile": self.fast is not None and self.fast.compiled,
            **({"files": files} if files else {}),
        }


def rate_of(data: Data) -> dict[str, int]:
    """The sample rate of sounds, as the files of a run note it; nothing for other data."""
    return {} if data.rate is None else {"rate": data.rate}


def plan(
    model: Model,
    data: Data,
    *,
    threat: str | Lp | Change,
    attacks: str | Attack | Sequence[str | Attack] | None = None,
    goal: str | int = "untargeted",
    access: str | Access | None = None,
    budget: int | None = None,
    batch_size: int | None = None,
    device: str = "cpu",
    seed: int = 0,
    quantize: bool | None = None,
    alone: bool = False,
    votes: int | None = None,
    fast: bool = False,
    compile: bool = False,
    adaptive: bool = False,
) -> Plan:
    """Everything that :func:`evaluate` would do, checked before the first attack; the arguments are evaluate's.

    With ``adaptive``, the attacks are followed by those that the model itself makes of them, as evaluate does.

    Raises:
        UsageError: As evaluate.
    """
    place = models_by_name.find_device(device)
    check_seed(seed)
    if not len(data):
        raise UsageError(f"{data.name} holds no examples; there should be at least one")
    threat = parse_threat(threat, data)
    seen = _access(access, model)
    chosen = _attacks(attacks, threat, seen, data)
    known, about = _known(model, chosen, threat, seen, adaptive)
    target, data, notes = _target(goal, data)
    if votes is not None:
        spec.check_whole("votes", votes, 1)
    x, _ = data.batch(0, 8)
    dtype = dtype_of(model)
    if all(attack.paper == "baseline" for _, attack in chosen):
        notes = (*notes, "only noise is tried, which is no adversary: the robust accuracy says little")
    notes = (
        *model.notes,
        *data.notes,
        *notes,
        *models_by_name.inspect(model, x.to(place, dtype), data.y.to(place), len(data.classes)),
    )
    votes, said = _votes(votes, known, models_by_name.RANDOM in notes)
    notes = (*notes, *about, *said)
    stand_in = _stand_in(model, fast, compile)
    notes = notes if stand_in is None else (*notes, STAND_IN)
    on_grid = data.levels is not None and (threat.low, threat.high) == (data.low, data.high)
    if quantize and not on_grid:
        raise UsageError(
            "there is no grid to round to: the data are no 8-bit integers or sounds in the threat's range; leave quantize out"
        )
    if batch_size is None:
        batch_size = max(16, min(256, ENTRIES_A_BATCH // x[0].numel()))
    spec.check_whole("batch size", batch_size, 1)
    if budget is not None:
        spec.check_whole("budget", budget, 1)
    rounded = on_grid if quantize is None else quantize
    return Plan(
        model,
        data,
        (*chosen, *known),
        tuple(name for name, _ in known),
        threat,
        target,
        seen,
        budget,
        batch_size,
        place,
        dtype,
        seed,
        rounded,
        alone,
        votes,
        stand_in,
        notes,
        data.digest(),
    )


def _known(
    model: Model, chosen: tuple[tuple[str, Attack], ...], threat: Lp | Change, access: Access, adaptive: bool
) -> tuple[tuple[tuple[str, Attack], ...], tuple[str, ...]]:
    """What the model's own method ``adaptive`` makes of the attacks, by name, where that is another one; what to announce."""
    try:
        make = getattr(model.module, "adaptive", None)
        # A layer may well be called so.
        if not callable(make) or isinstance(make, nn.Module):
            return (), ()
        pairs = [(name, attack, make(attack)) for name, attack in chosen]
        known = tuple((f"adaptive {name}", made) for name, attack, made in pairs if made is not attack)
        for _, made in known:
            check_serves(made, threat)
            _check_access(made, access)
    except Exception as error:  # whatever the model's own code raises
        says = "of an attack it should make one that knows of the model's defense, or have another name"
        raise UsageError(f"the model's attribute 'adaptive' does not serve ({first_line(error)}); {says}") from error
    if adaptive:
        return known, () if known else (SAME,)
    return (), (NAIVE,) if known else ()


def _votes(votes: int | None, known: tuple[tuple[str, Attack], ...], random: bool) -> tuple[int, tuple[str, ...]]:
    """Of how many answers most decide, and what to announce."""
    if votes is None and known and (random or any(isinstance(attack, Expect) for _, attack in known)):
        return VOTES, (DRAWS,)
    return votes or 1, (ONE_ANSWER,) if random and (votes or 1) == 1 else ()


def _stand_in(model: Model, fast: bool, compile: bool) -> Fast | None:
    if compile and not fast:
        raise UsageError("compile is for the stand-in, and none is asked for; give fast as well, or leave compile out")
    return make_fast(model.module, compile=compile) if fast else None


def dtype_of(model: Model) -> torch.dtype:
    """What a model computes in: float64 for a module in float64, else float32."""
    first = next(model.module.parameters(), None) if isinstance(model.module, nn.Module) else None
    return torch.float64 if first is not None and first.dtype == torch.float64 else torch.float32


def parse_threat(threat: str | Lp | Change, data: Data) -> Lp | Change:
    """The threat model of a spec, over the data's own range unless the spec gives one."""
    range_ = {"low": data.low, "high": data.high}
    built = spec.parse(threat, THREATS, "threat", defaults=range_) if isinstance(threat, str) else threat
    if isinstance(built, Lp):
        return built
    if isinstance(built, type) or not hasattr(built, "ball"):
        raise UsageError(f"the threat model is {threat!r}; it should be an Lp, a change or a spec, as in linf(0.3)")
    # Refuses examples that cannot be changed so.
    built.zero(data.batch(0, 1)[0])
    return built


def parse_ball(threat: str | Lp, data: Data) -> Lp:
    """As :func:`parse_threat`, where only an l_p ball will do.

    Raises:
        UsageError: It is a change.
    """
    ball = parse_threat(threat, data)
    if not isinstance(ball, Lp):
        raise UsageError(f"the threat model is {threat_name(ball)}; here it should be an l_p ball: {', '.join(BALLS)}")
    return ball


def _access(access: str | Access | None, model: Model) -> Access:
    if access is None:
        return model.access
    if not isinstance(access, Access):
        levels = {level.name.lower(): level for level in Access}
        spec.check_choice("access", access, levels)
        access = levels[access]
    if access > model.access:
        name, most = access.name.lower(), model.access.name.lower()
        raise AccessError(f"{model.name} answers with {most} only; the access asked for is {name}")
    return access


def _attacks(
    attacks: str | Attack | Sequence[str | Attack] | None, threat: Lp | Change, access: Access, data: Data
) -> tuple[tuple[str, Attack], ...]:
    """The attacks by name, cheap ones first; refused up front where they do not serve the threat model or the access."""
    given: Any = "standard" if attacks is None else attacks
    listed = [given] if isinstance(given, str) or not isinstance(given, Sequence) else list(given)
    built = [one for attack in listed for one in _built(attack, threat, access, data)]
    if not built:
        raise UsageError("there is no attack to run; name at least one")
    for attack in built:
        check_serves(attack, threat)
        _check_access(attack, access)
    named = [(attack_name(attack), attack) for attack in built]
    if len({name for name, _ in named}) < len(named):
        raise UsageError("the same attack is named twice; each attack is run once")
    # A suite has an order of its own.
    return tuple(named if isinstance(given, str) and given in SUITES else sorted(named, key=lambda pair: pair[1].cost))


def _check_access(attack: Attack, access: Access) -> None:
    if attack.access > access:
        needs, sees = attack.access.name.lower(), access.name.lower()
        able = ", ".join(name for name, make in ATTACKS.items() if _leaf_access(make) <= access)
        raise AccessError(f"{attack_name(attack)} needs {needs}; the adversary sees {sees}; attacks that do with that: {able}")


def _built(attack: str | Attack, threat: Lp | Change, access: Access, data: Data) -> tuple[Attack, ...]:
    """The attacks of a suite's name, or the one that is given or named."""
    if isinstance(attack, str) and attack in SUITES:
        entries = None if isinstance(threat, Lp) else threat.zero(data.batch(0, 1)[0]).numel()
        return SUITES[attack](threat, access, entries)
    if isinstance(attack, str) and re.fullmatch(r"[\w-]+", attack) and attack not in ATTACKS:
        raise spec.unknown("attack", attack, [*SUITES, *ATTACKS])
    return (spec.parse(attack, ATTACKS, "attack") if isinstance(attack, str) else attack,)


def _leaf_access(make: Any) -> int:
    """What a table's attack needs; a wrapper's depends on what it wraps, so it is not offered."""
    access = getattr(make, "access", None)
    return access if isinstance(access, Access) else len(Access)


def threat_name(threat: Lp | Change) -> str:
    """The spec of a threat model, or its repr where it is not in the table."""
    return spec.show(threat, THREATS) if type(threat) in (Lp, *CHANGES.values()) else repr(threat)


def attack_name(attack: Attack) -> str:
    """The spec of an attack, or its repr where it is not in the table.

    Raises:
        UsageError: The attack is not a dataclass, whose repr says all of its settings and nothing else.
    """
    if not is_dataclass(attack):
        raise UsageError(f"the attack {type(attack).__name__} is not a dataclass; write @dataclass(frozen=True) above it")
    try:
        return spec.show(attack, ATTACKS)
    except UsageError:
        return repr(attack)


def _target(goal: str | int, data: Data) -> tuple[str | None, Data, tuple[str, ...]]:
    """What targets are made from (None: no target), the examples that can have one, and what to announce."""
    goal = str(goal)
    if goal == "untargeted":
        return None, data, ()
    if goal in TARGETS:
        return goal, data, ()
    if not re.fullmatch("[0-9]{1,9}", goal):
        raise UsageError(f"the goal is {goal!r}; it should be untargeted, a class number, {', '.join(TARGETS)}")
    other = (data.y != int(goal)).nonzero().squeeze(1)
    if not len(other):
        raise UsageError(f"every example is of class {goal}, so none can be pushed to it; give another target or other data")
    left = len(data) - len(other)
    note = (f"{left} examples of class {goal} are left out: they are the target already",) if left else ()
    return goal, data.select(other), note
