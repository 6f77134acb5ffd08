"""``advkit gan sample``: draw from a generator."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from advkit.gan.source import Source

EXAMPLES = """\
examples:
  advkit gan sample --generator g.safetensors --out grid.png                  a picture of 100
  advkit gan sample --generator g.safetensors --n 20000 --out samples.npz     arrays x and y, data for other commands
  advkit gan sample --generator c.safetensors --n 500 --class 3 --out images  a PNG each, in a folder a class
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "sample",
        help="draw from a generator",
        description="Draw samples and write them as a picture, as arrays or as PNG files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--generator", required=True, help="g.safetensors, or a file.py:function of your own")
    command.add_argument("--n", type=int, default=100, help="how many (default 100)")
    command.add_argument("--class", type=int, dest="of", metavar="K", help="of this class only (default: all, in turn)")
    command.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    command.add_argument("--out", required=True, type=Path, help="a .png, an .npz, or a folder")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Draw and write."""
    import torch

    from advkit.data.dataset import check_seed
    from advkit.gan.pair import load
    from advkit.spec import check_whole

    check_seed(arguments.seed)
    check_whole("--n", arguments.n, 1)
    source = load(arguments.generator)
    y = torch.arange(arguments.n) % max(1, source.classes)
    y = y if arguments.of is None else torch.full_like(y, arguments.of)
    asked = y if source.classes or arguments.of is not None else None
    x = source.sample(arguments.n, asked, torch.Generator().manual_seed(arguments.seed))
    write = {".png": _picture, ".npz": _arrays}.get(arguments.out.suffix, _folder)
    write(arguments.out, source, x, y)
    print(f"{arguments.out}: {arguments.n} samples")
    return 0


def _unit(source: Source, x: Tensor) -> Tensor:
    return ((x - source.low) / (source.high - source.low)).clamp(0, 1)


def _check_images(x: Tensor) -> None:
    from advkit.errors import UsageError

    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise UsageError(f"the samples have shape {tuple(x.shape[1:])}, which is no picture; write them to an .npz")


def _picture(out: Path, source: Source, x: Tensor, y: Tensor) -> None:
    from advkit.cli.pictures import save_grid

    _check_images(x)
    save_grid(_unit(source, x), out)


def _arrays(out: Path, source: Source, x: Tensor, y: Tensor) -> None:
    import numpy as np

    images = x.ndim == 4
    values = (255 * _unit(source, x)).round().byte().numpy() if images else x.numpy()
    np.savez_compressed(out, x=values, y=y.numpy())


def _folder(out: Path, source: Source, x: Tensor, y: Tensor) -> None:
    from advkit.cli.pictures import save_image

    _check_images(x)
    # Padded, because folders of classes are read in alphabetical order.
    width = len(str(int(y.max())))
    for k in y.unique().tolist():
        (out / f"{k:0{width}d}").mkdir(parents=True, exist_ok=True)
    for i, (image, k) in enumerate(zip(_unit(source, x), y.tolist(), strict=True)):
        save_image(image, out / f"{k:0{width}d}" / f"{i:06d}.png", least=1)
