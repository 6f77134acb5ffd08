"""Draw ``docs/pictures/*.png``: what each attack does to one digit and to one photograph, the same two for all of them.

``python docs/attack_pictures.py --digit-model mnist.safetensors --photo-model cifar.safetensors --photo-data cifar10/``, with
models that ``advkit train`` made: one of MNIST, and one of CIFAR-10, whose folder of Parquet files is the last path.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import advkit
from advkit import Lp, spec
from advkit.attacks import ATTACKS
from advkit.attacks.patch import Patch
from advkit.attacks.universal import Universal
from advkit.data import load
from advkit.engine import Attack
from advkit.models import load as load_model
from advkit.norms import lp_norm, norm_name
from advkit.oracle import Model
from advkit.streams import Streams
from advkit.threat import THREATS, Change, Flow, Rotation, Sticker

FOLDER = Path(__file__).with_name("pictures")
DIGIT, PHOTO = 594, 39
"""Where the two images are in their test splits: a four and an airplane."""
FIT = 2000
"""How many images a patch and a universal perturbation are learned from."""
FACTORS = (0.5, 1, 2, 3, 5, 10, 20, 50, 100)
"""By how much a difference is multiplied before grey is added: the greatest that does not reach black or white."""

Row = tuple[str, str, str]
"""An attack, the threat model for the digit and the one for the photograph."""

GRIDS: dict[str, tuple[Row, ...]] = {
    "fixed-radius": (
        ("fgsm", "linf(0.15)", "linf(4/255)"),
        ("pgd", "linf(0.15)", "linf(4/255)"),
        ("apgd", "l2(2)", "l2(0.5)"),
        ("apgd-l1", "l1(15)", "l1(10)"),
        ("square", "linf(0.15)", "linf(4/255)"),
        ("sparse-rs", "l0(25)", "l0(25)"),
        ("uniform", "linf(0.15)", "linf(4/255)"),
    ),
    "closest": (
        ("fmn", "linf", "linf"),
        ("ddn", "l2", "l2"),
        ("deepfool", "l2", "l2"),
        ("fmn", "l1", "l1"),
        ("sigma-zero", "l0", "l0"),
        ("jsma", "l0", "l0"),
    ),
    "labels": (
        ("rays(queries=2000)", "linf", "linf"),
        ("hopskipjump(queries=2000)", "linf", "linf"),
        ("hopskipjump(queries=2000)", "l2", "l2"),
        ("surfree(queries=2000)", "l2", "l2"),
        ("boundary(queries=2000)", "l2", "l2"),
    ),
    "beyond": (
        ("grid", "rotation(30, 0.1)", "rotation(30, 0.1)"),
        ("pgd", "flow(1.5)", "flow(1.5)"),
        ("pgd", "colour", "colour"),
        ("apgd", "sticker(0.1, 0.35, 0.25, 0.35)", "sticker(0.4, 0.4, 0.25, 0.25)"),
        ("patch", "patch(share=0.15, steps=300)", "patch(share=0.12, steps=300)"),
        ("universal", "linf(0.3)", "linf(10/255)"),
    ),
}
TARGETS = {"digit": 8, "photograph": 6}
"""The classes that the patches make: an eight and a frog."""


@dataclass(frozen=True)
class Subject:
    """An image, (1, C, H, W), its label, its model, and the data it is from."""

    kind: str
    model: Model
    data: str
    x: Tensor
    y: Tensor
    classes: tuple[str, ...]

    def says(self, z: Tensor) -> str:
        """The name of the class that the model sees."""
        with advkit.frozen(self.model), torch.no_grad():
            return self.classes[int(self.model(z).argmax())]


def subject(kind: str, model: str, data: str, position: int) -> Subject:
    """The image at a position of the test split."""
    test = load(data, split="test")
    x, y = test.batch(position, position + 1)
    return Subject(kind, load_model(model).module, data, x, y, test.classes)


def attacked(on: Subject, attack: str, threat: str) -> tuple[Tensor, str]:
    """The adversarial image, the last candidate where the attack failed, and how far it is, ready for what the model says."""
    if attack in LEARNED:
        return LEARNED[attack](on, threat)
    ball: Lp | Change = spec.parse(threat, THREATS, "threat")
    made: Attack = spec.parse(attack, ATTACKS, "attack")
    result = advkit.run(made, on.model, on.x, on.y, ball)
    if not result.success:
        last = advkit.perturb(made, on.model, on.x, on.y, ball, rng=torch.Generator().manual_seed(0))
        return last, _distance(last - on.x, ball) if isinstance(ball, Lp) else ""
    return result.x_adv, _extent(result, ball, on.x)


def _extent(result: advkit.AttackResult, threat: Lp | Change, x: Tensor) -> str:
    if isinstance(threat, Lp):
        return _distance(result.x_adv - x, threat)
    if isinstance(threat, Rotation):
        return f"{threat.angle * float(result.change[0, 0]):.0f} degrees: "
    if isinstance(threat, Flow):
        return f"{float(result.distance):.2g} pixels: "
    if isinstance(threat, Sticker):
        return f"{result.change.shape[2]} x {result.change.shape[3]} pixels: "
    return f"{100 * float(result.distance):.0f} % of the limits: "


def _distance(change: Tensor, threat: Lp) -> str:
    return f"{norm_name(threat.p)} {float(lp_norm(change, threat.p)):.3g}: "


def patched(on: Subject, settings: str) -> tuple[Tensor, str]:
    """The image with a patch that was learned from others, at a random place."""
    attack: Patch = spec.parse(settings, {"patch": Patch}, "patch")
    x, y = load(on.data, split="train", limit=FIT).batch(0, FIT)
    patch = attack.fit(on.model, x, y, TARGETS[on.kind], rng=torch.Generator().manual_seed(0))
    return attack.paste(on.x, patch, Streams.seeded(0, [0])), f"{100 * attack.share:.0f} % of the area: "


def universal(on: Subject, threat: str) -> tuple[Tensor, str]:
    """The image with a perturbation that was learned from others."""
    attack, ball = Universal(steps=300), spec.parse(threat, THREATS, "threat")
    x, y = load(on.data, split="train", limit=FIT).batch(0, FIT)
    z = attack.apply(on.x, attack.fit(on.model, x, y, ball, rng=torch.Generator().manual_seed(0)), ball)
    return z, _distance(z - on.x, ball)


LEARNED: dict[str, Any] = {"patch": patched, "universal": universal}


def draw(name: str, rows: tuple[Row, ...], subjects: tuple[Subject, ...]) -> None:
    """One file: a row an attack; original, adversarial image and difference of each subject."""
    figure = Figure(figsize=(3 * len(subjects) * 1.2 + 0.9, 1.36 * len(rows)), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    columns = 4 * len(subjects) - 1
    ratios = [0.12 if k % 4 == 3 else 1 for k in range(columns)]
    axes = figure.subplots(len(rows), columns, squeeze=False, width_ratios=ratios)
    for line, (attack, *threats) in zip(axes, rows, strict=True):
        names = dict.fromkeys((attack.split("(")[0], threats[0].split("(")[0]))
        line[0].set_ylabel("\n".join(names), rotation=0, ha="right", va="center", fontsize=8)
        for gap in line[3::4]:
            gap.set_axis_off()
        for k, (on, threat) in enumerate(zip(subjects, threats, strict=True)):
            z, extent = attacked(on, attack, threat)
            change = z - on.x
            factor = max((f for f in FACTORS if f * float(change.abs().max()) <= 0.501), default=FACTORS[0])
            first, second, third = line[4 * k : 4 * k + 3]
            before, after = on.says(on.x), on.says(z)
            show(first, on.x, f"original: {before}")
            show(second, z, f"{extent}{'still ' * (after == before)}{after}")
            show(third, 0.5 + factor * change, f"difference x {factor:g}")
            print(f"{name}: {attack}, {threat}, {on.kind}: {extent}{after}")
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png")


def show(axes: Axes, image: Tensor, title: str) -> None:
    """An image (1, C, H, W) in [0, 1], each of its pixels a square."""
    axes.imshow(image[0].clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=7, pad=2)
    axes.set(xticks=[], yticks=[])


def main() -> None:
    """Draw all of them, or those that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--digit-model", required=True, help="of advkit train --model mnist-cnn")
    parser.add_argument("--photo-model", required=True, help="of advkit train --model cifar-resnet")
    parser.add_argument("--photo-data", required=True, help="CIFAR-10")
    parser.add_argument("--only", choices=sorted(GRIDS), action="append", help="one of the files; repeatable")
    given = parser.parse_args()
    subjects = (
        subject("digit", given.digit_model, "mnist-5k", DIGIT),
        subject("photograph", given.photo_model, given.photo_data, PHOTO),
    )
    for name in given.only or GRIDS:
        draw(name, GRIDS[name], subjects)


if __name__ == "__main__":
    main()
