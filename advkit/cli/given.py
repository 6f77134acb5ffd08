"""What commands that evaluate one model on data have in common: the options that say which, and the loading of both."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.data import Data
    from advkit.models import Model


def add_options(command: Any, limit: str) -> None:
    """Add the options for the data and the device, and how a model may be loaded; ``limit`` is the help of --limit."""
    command.add_argument("--split", default="test", help="the part of the data (default test)")
    command.add_argument("--limit", type=int, help=limit)
    command.add_argument("--range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="the range of the data's values")
    command.add_argument("--size", type=int, help="resize and crop images to this height and width")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    command.add_argument("--seed", type=int, default=0, help="of every random draw (default 0)")
    command.add_argument("--probabilities", action="store_true", help="the model returns probabilities: attack their logarithm")
    command.add_argument(
        "--trust-pickle", action="store_true", help="load a pickled model: it can run any code on this machine"
    )


def data_of(arguments: argparse.Namespace, default: int | None = None) -> Data:
    """The data that the options name, at most ``default`` examples where there is no --limit."""
    from advkit import data

    low, high = arguments.range or (None, None)
    limit = default if arguments.limit is None else arguments.limit
    options = {"split": arguments.split, "limit": limit, "seed": arguments.seed, "size": arguments.size}
    return data.load(arguments.data, **options, low=low, high=high)


def model_of(arguments: argparse.Namespace, spec: str) -> Model:
    """The model of a spec, loaded as the options say."""
    from advkit import models

    given = {"device": arguments.device, "trust_pickle": arguments.trust_pickle, "probabilities": arguments.probabilities}
    return models.load(spec, **given)
