"""Defense-GAN around a network: what attacks that do not know of it say, and what adaptive ones do.

    advkit gan train --model dcgan --data DATA --out g.safetensors
    advkit train --model mnist-cnn --data DATA --out m.safetensors
    python -m advkit.benchmarks.defense_gan --generator g.safetensors --model m.safetensors --data DATA --limit 100

FGSM and PGD are made on the network without its defense and shown to the defended one. PGD as it is has a gradient of 0, so it
stays at its random start; square asks the defended model for scores. ``naive`` is the worst of the four, example by example,
``all`` the worst of everything.

The adaptive attacks are rehearsed: PGD on the margin against a stand-in that searches for a shorter time, in each step with new
draws. Only the last iterate is shown to the defended model, one answer of which may cost more than many steps. The first takes
the gradient of the identity (Athalye, Carlini and Wagner, 2018, https://arxiv.org/abs/1802.00420), the second that of the
projection on what the generator can draw, as the defense's own adaptive attack does. The third needs no gradient of the search:
it looks for two drawings that are close to each other, one that the network gets right and one that it gets wrong, and moves
the input from the first to the second (after Jalal, Ilyas, Daskalakis and Dimakis, 2017, https://arxiv.org/abs/1712.09196).

Of the defended model's answers most of five decide, as it draws. The seconds are those of an attack and its verdicts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from advkit import data as data_by_name
from advkit import models as models_by_name
from advkit.adaptive import Straight
from advkit.attacks import FGSM, PGD, Square
from advkit.benchmarks.statistics import rate
from advkit.defenses.inference import DefenseGAN
from advkit.defenses.inference.defense_gan import Imitation
from advkit.engine import Attack, frozen, perturb, run
from advkit.losses import margin
from advkit.threat import Lp

VOTES = 5
UNDEFENDED = "pgd, without the defense"
NAIVE = ("fgsm of the network", "pgd of the network", "pgd as it is", "square")
CODES, NEAR, SEARCH, WARM, RATE, WEIGHT, STEP, FAR = 6, 0.1, 250, 60, 0.05, 10.0, 0.05, 1e6
"""Of the search between drawings: codes of each kind, their first deviation, steps of Adam, those before the point moves, the
rate, the weight of the hinge, the first step of the point over the radius, and a distance beyond all others."""


def right(model: nn.Module, x: Tensor, y: Tensor, votes: int = VOTES) -> Tensor:
    """Which rows most of so many answers get right, with shape (N,)."""
    with frozen(model), torch.no_grad():
        answers = torch.stack([model(x).argmax(1) == y for _ in range(votes)])
    return 2 * answers.sum(0) > votes


def between(network: nn.Module, gan: DefenseGAN, x: Tensor, y: Tensor, threat: Lp, seed: int) -> Tensor:
    """Points of the balls around x, (N, *), that are closer to drawings of something else than to drawings of y.

    Each row has codes whose drawings the network gets right and codes whose drawings it gets wrong, held there by a hinge. All
    follow the point, and the point goes from the closest drawing of the first kind to the closest of the second.
    """
    rng, n = torch.Generator().manual_seed(seed), len(x)
    # As the defense's, the codes begin near the middle of the prior: only what it finds from there counts.
    z = (NEAR * gan.source.latent(2 * n * CODES, rng)).to(x).requires_grad_(True)
    classes = torch.randint(max(1, gan.source.classes), (len(z),), generator=rng).to(x.device) if gan.source.classes else None
    sign = torch.tensor([1.0, -1.0]).to(x).repeat_interleave(n * CODES)
    adam, x_adv = torch.optim.Adam([z], RATE), x
    for i in range(SEARCH):
        with torch.enable_grad(), frozen(network):
            drawn = gan.source.decode(z, classes)
            away = (drawn - x_adv.repeat_interleave(CODES, 0).repeat(2, 1, 1, 1)).square().flatten(1).sum(1)
            astray = sign * margin(network(drawn), y.repeat_interleave(CODES).repeat(2))
            adam.zero_grad()
            (away + WEIGHT * (1 + astray).relu()).sum().backward()
            adam.step()
        with torch.no_grad():
            weights = torch.softmax(-torch.where(astray < 0, away, away + FAR).view(2, n, CODES), 2)
            right, other = (weights.view(2, n, CODES, 1, 1, 1) * drawn.view(2, n, CODES, *x.shape[1:])).sum(2)
            rate = STEP * (1 - (i - WARM) / (SEARCH - WARM)) if i >= WARM else 0.0
            x_adv = threat.project(x_adv + rate * threat.eps * (other - right).sign(), x)
    return x_adv


def attacks(
    network: nn.Module, gan: DefenseGAN, x: Tensor, y: Tensor, threat: Lp, settings: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """For each attack its name, and what says which rows stand it, with shape (N,)."""
    defended = gan.around(network)
    projection = Imitation(gan.shorter())

    def shown(make: Callable[[int], Tensor], tries: int = 1) -> Tensor:
        return torch.stack([right(defended, make(k), y) for k in range(tries)]).all(0)

    def made(attack: Attack, surrogate: nn.Module) -> Callable[[int], Tensor]:
        return lambda k: perturb(attack, surrogate, x, y, threat, rng=torch.Generator().manual_seed(k))

    def rehearsed(imitation: nn.Module) -> Tensor:
        return shown(made(PGD(settings.attack_steps, loss="margin"), nn.Sequential(imitation, network)), settings.tries)

    def asked(attack: Attack) -> Tensor:
        return ~run(attack, defended, x, y, threat, votes=VOTES).success

    yield UNDEFENDED, lambda: ~run(PGD(), network, x, y, threat).success
    yield NAIVE[0], lambda: shown(made(FGSM(), network))
    yield NAIVE[1], lambda: shown(made(PGD(), network))
    # Where the gradient is 0, more steps only ask again.
    yield NAIVE[2], lambda: asked(PGD(1))
    yield NAIVE[3], lambda: asked(Square(settings.queries))
    yield "adaptive: the identity", lambda: rehearsed(Straight(projection))
    yield "adaptive: the projection", lambda: rehearsed(projection)
    yield "adaptive: between drawings", lambda: shown(lambda k: between(network, gan, x, y, threat, k), settings.tries)


def line(name: str, stands: Tensor, seconds: float) -> None:
    """Print a row of the table."""
    print(f"| {name} | {rate(int(stands.sum()), len(stands))} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Print a line for each attack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="what the defense draws with")
    parser.add_argument("--model", required=True, help="the network that is defended")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=100, help="how many test images (default 100)")
    parser.add_argument("--eps", type=float, default=0.3, help="the radius in l_inf (default 0.3)")
    parser.add_argument("--steps", type=int, default=200, help="of the defense's search (default 200)")
    parser.add_argument("--restarts", type=int, default=10, help="of the defense's search (default 10)")
    parser.add_argument("--attack-steps", type=int, default=20, help="of the adaptive attacks (default 20)")
    parser.add_argument("--tries", type=int, default=3, help="of the adaptive attacks, from other starts (default 3)")
    parser.add_argument("--queries", type=int, default=50, help="of square (default 50)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default cpu)")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    x, y = data_by_name.load(settings.data, split="test").limited(settings.limit, 0).batch(0, settings.limit)
    network = models_by_name.load(settings.model, device=settings.device).module
    assert isinstance(network, nn.Module)
    x, y = x.to(settings.device), y.to(settings.device)
    gan = DefenseGAN(settings.generator, settings.steps, settings.restarts)
    print("| attack | accuracy | seconds |\n| --- | --- | --- |")
    stood: dict[str, Tensor] = {}

    def measure(name: str, stands: Callable[[], Tensor]) -> None:
        began = time.perf_counter()
        stood[name] = stands()
        line(name, stood[name], time.perf_counter() - began)

    measure("none", lambda: right(gan.around(network), x, y))
    for name, stands in attacks(network, gan, x, y, Lp(torch.inf, settings.eps), settings):
        measure(name, stands)
    del stood[UNDEFENDED]
    measure("naive", lambda: torch.stack([stood[name] for name in ("none", *NAIVE)]).all(0))
    measure("all", lambda: torch.stack(list(stood.values())).all(0))


if __name__ == "__main__":
    main()
