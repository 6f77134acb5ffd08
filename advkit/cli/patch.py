"""``advkit patch``: a sticker that makes a model see a class, wherever it lies on an image."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """\
examples:
  advkit patch --model c.safetensors --data hf:uoft-cs/cifar10 --target 3 --out patch
  advkit patch --model c.safetensors --data images/ --target 3 --share 0.1 --shape square --transfer-to other.safetensors

It is learned from the split train, at random places, angles and scales, and tried on images that it has not seen.
Stopping it (Ctrl-C) ends the learning and tries the patch as it is.
"""


def add(commands: Any) -> None:
    """Add the command."""
    from advkit.cli import fitting

    command = commands.add_parser(
        "patch",
        help="learn an adversarial patch",
        description="Learn a patch that makes a model see a class wherever it lies, and try it on unseen images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--target", type=int, required=True, help="the class that the model should see")
    command.add_argument("--share", type=float, default=0.06, help="of the image's area (default 0.06)")
    command.add_argument("--shape", default="circle", help="circle (default) or square")
    command.add_argument("--rotation", type=float, default=22.5, help="the greatest angle, in degrees (default 22.5)")
    command.add_argument("--scale", type=float, default=0.1, help="the greatest relative change of its side (default 0.1)")
    fitting.add_options(command, steps=500)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Learn, try, keep and print."""
    from advkit.attacks.patch import Patch
    from advkit.cli import fitting
    from advkit.cli.pictures import save_image
    from advkit.streams import Streams

    given = {key: getattr(arguments, key) for key in ("share", "shape", "rotation", "scale", "steps", "batch_size")}
    attack = Patch(**given)
    task = fitting.task(arguments)
    data, model = task.fit, task.models[0].module
    x, y = task.examples()
    limits = {"low": data.low, "high": data.high}
    patch, steps = fitting.fitted(
        lambda report: attack.fit(model, x, y, arguments.target, **limits, rng=task.generator(), report=report)
    )

    def change(z: Tensor, numbers: Tensor) -> Tensor:
        return attack.paste(z, patch, Streams.seeded(task.seed, numbers.tolist(), "patch", task.device))

    outcomes, shown = fitting.tried(task, change, arguments.target)
    fitting.show(f"a {attack.shape} of {attack.share:g} of the image, target {arguments.target}", outcomes, arguments.target)
    if arguments.out is not None:
        about = {
            **given,
            "steps": steps,
            "target": arguments.target,
            "seed": task.seed,
            "data": data.name,
            "learned_from": len(x),
        }
        fitting.save(arguments.out, "patch", patch, about, outcomes, shown, data)
        save_image(attack.cut((patch - data.low) / (data.high - data.low)), arguments.out / "patch.png")
    return 0
