"""What commands that evaluate one model on data have in common: the options that say which, and the loading of both."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.data import Data
    from advkit.models import Model
    from advkit.train import Recipe


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


def recipe_of(arguments: argparse.Namespace, n: int) -> Recipe:
    """The recipe of the network that --model names, for ``n`` examples, with what the options say in place of its own."""
    import dataclasses

    from advkit import spec
    from advkit.models.networks import NETWORKS
    from advkit.train import RECIPES

    own = RECIPES[spec.show(spec.parse(arguments.model, NETWORKS, "network"), NETWORKS).split("(")[0]]
    given = {field.name: getattr(arguments, field.name, None) for field in dataclasses.fields(own)}
    recipe = dataclasses.replace(own, **{name: value for name, value in given.items() if value is not None})
    return recipe if arguments.epochs is not None else recipe.for_examples(n)


def behind(model: Model, defenses: Sequence[str], data: Data) -> Model:
    """The model behind the defenses of specs, if any, for images in [0, 1]."""
    import dataclasses
    import hashlib

    from advkit.defenses.inference import defend
    from advkit.errors import UsageError

    if not defenses:
        return model
    if (data.low, data.high) != (0, 1):
        raise UsageError(f"the range of the data is [{data.low:g}, {data.high:g}]; --defend is for images in [0, 1]")
    module, name = defend(model.module, *defenses), " behind ".join([model.name, *reversed(defenses)])
    digest = hashlib.sha256(f"{model.digest} behind {defenses}".encode()).hexdigest()
    return dataclasses.replace(model, module=module, name=name, digest=digest)
