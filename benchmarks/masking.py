"""The signs of masked gradients: an attack does worse than a simpler one, or no better with more means.

Athalye, Carlini and Wagner, 2018, "Obfuscated gradients give a false sense of security: circumventing defenses to adversarial
examples", https://arxiv.org/abs/1802.00420 (section 3.1); the checks that are not theirs are from Carlini et al., 2019, "On
evaluating adversarial robustness", https://arxiv.org/abs/1902.06705.

All of them try something on what the attack left unbroken, the simpler attacks in the same threat model.
"""

from __future__ import annotations

import math

import torch

from advkit.attacks import FGSM, SparseRS, Square, Uniform
from advkit.benchmarks.findings import Finding
from advkit.benchmarks.plan import attack_name
from advkit.benchmarks.probe import ALLOWED, Case, leaves, longer, parts, rebuilt, surely
from advkit.combine import Expect
from advkit.engine import Attack
from advkit.oracle import Access, top1

QUERIES = 200
"""Of the search with scores."""
TRIES = 100
"""Of random inputs in the ball."""
ANSWERS = 5
"""How often the model is asked the same."""
MOST = 0.5
"""The share of examples on which a search with scores may get further than the gradient, without breaking them."""

MASKED = "the gradients mislead the attack; see docs/adaptive.md"


def _simpler(case: Case, check: str, attack: Attack, what: str, advice: str, command: str) -> Finding:
    """What another attack breaks of what was left."""
    count, left = case.breaks(attack), len(case.left)
    return case.finding(
        check,
        f"{what} breaks {count} of {left} examples that {attack_name(case.attack)} left unbroken, of {len(case)} in all",
        surely(count, len(case), ALLOWED),
        advice,
        command,
        broke=count,
        left=left,
        examples=len(case),
    )


def one_step(case: Case) -> Finding | None:
    """One step along the gradient breaks what many steps left."""
    if not case.gradients or case.p not in FGSM.norms or case.attack.cost <= FGSM.cost:
        return None
    return _simpler(case, "one-step-beats-many", FGSM(), "a single step", MASKED, case.command("--attack", "standard"))


def black_box(case: Case) -> Finding | None:
    """A short search with scores breaks what gradients left, or gets further on most of it."""
    search = SparseRS(queries=QUERIES) if case.p == 0 else Square(queries=QUERIES)
    if not case.gradients or not len(case.left):
        return None
    climb = case.climb(search, case.left)
    further = int((climb.best > case.way.best[case.left]).sum())
    count, left = int(climb.fooled.sum()), len(case.left)
    return case.finding(
        "black-box-beats-gradients",
        f"of {left} examples left unbroken, {QUERIES} queries of scores break {count}, and reach a greater margin on {further}",
        surely(count, len(case), ALLOWED) or surely(further, left, MOST),
        MASKED,
        case.command("--access", "scores"),
        broke=count,
        further=further,
        left=left,
        examples=len(case),
    )


def random_search(case: Case) -> Finding | None:
    """Random inputs in the ball break what the attack left."""
    if all(leaf.paper == "baseline" for leaf in leaves(case.attack)):
        return None
    command = case.command("--attack", "standard") if case.access == Access.GRADIENTS else case.stronger()
    what = f"the best of {TRIES} random inputs"
    return _simpler(case, "random-beats-attack", Uniform(TRIES), what, "the attack fails; " + MASKED, command)


def unbounded(case: Case) -> Finding | None:
    """With the radius of the whole range, where every image of another class is allowed, the attack still fails."""
    threat = case.widened(math.inf)
    if threat is None:
        return None
    factor = threat.eps / case.threat.eps
    attack = rebuilt(case.attack, lambda leaf: {"step": factor * leaf.step} if getattr(leaf, "step", None) else {})
    count, left = case.breaks(attack, threat), len(case.left)
    return case.finding(
        "unbounded-attack-fails",
        f"with a radius of the whole range, {left - count} of {left} examples left are still unbroken, of {len(case)} in all",
        surely(left - count, len(case), ALLOWED),
        "an attack that fails without bounds says nothing of one with bounds; the attack is at fault, or the gradients are",
        case.command("--attack", "standard") if case.gradients else case.stronger(),
        unbroken=left - count,
        left=left,
        examples=len(case),
    )


def more_radius(case: Case) -> Finding | None:
    """With twice the radius the attack breaks no more, and gets no further on most of what is left."""
    threat = case.widened(2)
    if threat is None or not len(case.left):
        return None
    # With the same draws, so that an attack that does not see the radius does the same again.
    climb = case.climb(case.attack, case.left, threat, label="")
    still, left = int((climb.best <= case.way.best[case.left]).sum()), len(case.left)
    broke = int((climb.best > 0).sum())
    return case.finding(
        "more-radius-does-not-help",
        f"with twice the radius {broke} of {left} examples left are broken, and the margin grows no further for {still}",
        broke == 0 and surely(still, left, MOST),
        "the attack does not use its radius: it is cut somewhere (a step, a projection, a clipping), or follows no gradient",
        case.stronger(),
        broke=broke,
        still=still,
        left=left,
    )


def answers_change(case: Case) -> Finding:
    """The model answers the same input differently from call to call, and the attack follows single answers."""
    answers = torch.stack([case.ask(case.base.x_adv) for _ in range(ANSWERS)])
    spread = (answers - answers[0]).abs().amax(0).amax(1)
    scale = (answers.amax(2) - answers.amin(2)).amax(0)
    # Kernels may add in another order each time.
    changed = int((spread > 1e-3 * scale).sum())
    turned = int((torch.stack([top1(z, case.y) for z in answers]).float().mean(0) % 1 > 0).sum())
    return case.finding(
        "answers-change",
        f"asked {ANSWERS} times, the model gives other logits for {changed} of {len(case)} inputs, another class for {turned}",
        surely(changed, len(case), ALLOWED),
        "one answer proves nothing: follow the mean of many, and let most of several decide",
        case.command("--attack", "expect(pgd(steps=40), n=20)", "--votes", "5"),
        "warning" if _averages(case.attack) else "suspect",
        changed=changed,
        turned=turned,
        examples=len(case),
    )


def _averages(attack: Attack) -> bool:
    return isinstance(attack, Expect) or any(map(_averages, parts(attack)))


def not_converged(case: Case) -> Finding | None:
    """Twice the steps, or queries, break more of what is left."""
    more = longer(case.attack, 2)
    if more is None:
        return None
    advice = "the attack ends too early; give it more steps until nothing changes"
    return _simpler(case, "not-converged", more, "the same attack with twice the steps", advice, case.stronger())


def transfer_beats(case: Case) -> Finding | None:
    """Examples made on other models break what the attack left."""
    if not case.others or not len(case.left):
        return None
    found = torch.stack([case.transferred(source, case.left)[1] for source in case.others.values()]).any(0)
    count, left = int(found.sum()), len(case.left)
    return case.finding(
        "transfer-beats-attack",
        f"examples made on {', '.join(case.others)} break {count} of {left} that the attack on the model left unbroken",
        surely(count, len(case), ALLOWED),
        "the model's own gradients are worth less than another's; " + MASKED,
        case.command("--attack", "standard") if case.access == Access.GRADIENTS else case.stronger(),
        broke=count,
        left=left,
        examples=len(case),
    )
