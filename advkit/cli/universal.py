"""``advkit universal``: one perturbation for every input."""

from __future__ import annotations

import argparse
from typing import Any

EXAMPLES = """\
examples:
  advkit universal --model c.safetensors --data hf:uoft-cs/cifar10 --threat "linf(10/255)" --out universal
  advkit universal --model m.safetensors --data mnist-5k --threat "l2(3)" --target 3 --transfer-to other.safetensors

It is learned from the split train and tried on inputs that it has not seen. Stopping it (Ctrl-C) ends the learning and
tries the perturbation as it is.
"""


def add(commands: Any) -> None:
    """Add the command."""
    from advkit.cli import fitting

    command = commands.add_parser(
        "universal",
        help="learn one perturbation for every input",
        description="Learn one perturbation that fools a model on most inputs, and try it on unseen ones.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--threat", required=True, help='how large it may be: "linf(10/255)" or "l2(1)"')
    command.add_argument("--target", type=int, help="the class that the model should see (default: any wrong one)")
    fitting.add_options(command, steps=500)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Learn, try, keep and print."""
    import torch

    from advkit.attacks.universal import Universal
    from advkit.benchmarks.plan import parse_ball, threat_name
    from advkit.cli import fitting
    from advkit.cli.pictures import save_image
    from advkit.oracle import Goal

    attack, target = Universal(arguments.steps, arguments.batch_size), arguments.target
    task = fitting.task(arguments)
    data, model = task.fit, task.models[0].module
    threat = parse_ball(arguments.threat, data)
    x, y = task.examples()
    if target is not None:
        x, y = x[y != target], torch.full_like(y[y != target], target)
    goal = Goal(targeted=target is not None)
    delta, steps = fitting.fitted(
        lambda report: attack.fit(model, x, y, threat, goal=goal, rng=task.generator(), report=report)
    )
    outcomes, shown = fitting.tried(task, lambda z, _: attack.apply(z, delta, threat), target)
    name = threat_name(threat)
    fitting.show(f"one perturbation, {name}{'' if target is None else f', target {target}'}", outcomes, target)
    if arguments.out is not None:
        about = {"threat": name, "steps": steps, "target": target, "seed": task.seed, "data": data.name, "learned_from": len(x)}
        fitting.save(arguments.out, "universal", delta, about, outcomes, shown, data)
        if data.kind == "image":
            save_image(0.5 + 0.5 * delta / delta.abs().max().clamp(min=1e-12), arguments.out / "universal.png")
    return 0
