"""The suites: what they hold, for every threat model and access."""

import math

import pytest
import torch

import advkit
from advkit import Access, Lp, Rotation
from advkit.attacks import APGD, IfMasked, Square
from advkit.benchmarks.suites import SUITES, black_box, fast, standard
from advkit.errors import UsageError

P = (math.inf, 2.0, 1.0, 0.0)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("access", Access)
@pytest.mark.parametrize("p", P)
def test_every_suite_serves_every_norm_inside_a_radius(suite, access, p):
    attacks = SUITES[suite](Lp(p, 4.0), access, None)
    assert attacks
    assert all(p in attack.norms and attack.access <= access for attack in attacks)


@pytest.mark.parametrize("p", P)
def test_dear_attacks_come_last_and_fast_is_cheaper(p):
    attacks = [attack for attack in standard(Lp(p, 4.0)) if not isinstance(attack, IfMasked)]
    costs = [attack.cost for attack in attacks]
    assert costs == sorted(costs)
    assert sum(attack.cost for attack in fast(Lp(p, 4.0))) < sum(costs) / 5


def test_a_black_box_sees_no_gradient():
    for p in P:
        assert all(attack.access < Access.GRADIENTS for attack in black_box(Lp(p, 4.0), Access.GRADIENTS))
    assert all(attack.access == Access.LABELS for attack in black_box(Lp(math.inf, 0.1), Access.LABELS))


def test_without_a_radius_the_closest_example_is_searched():
    for p in P:
        assert all(attack.minimum for attack in standard(Lp(p)))
    with pytest.raises(UsageError, match="no suite has attacks for l_1 with access to labels"):
        standard(Lp(1.0), Access.LABELS)


def test_a_change_of_few_numbers_gets_a_grid():
    assert any(type(attack).__name__ == "Grid" for attack in standard(Rotation(30.0), entries=3))
    assert not any(type(attack).__name__ == "Grid" for attack in standard(Rotation(30.0), entries=3000))


def test_evaluate_takes_a_suite_by_name_beside_an_attack():
    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    result = advkit.evaluate(lambda z: z, (x, x.argmax(1)), threat="linf(0.9)", attacks=["fast", "fgsm"])
    assert result.robust_accuracy.value == 0
    assert result.run["attacks"][0].startswith("fgsm")
    assert len(result.run["attacks"]) == 3


class Rounded(torch.nn.Module):
    """A linear model behind a rounding of its input, which has no gradient."""

    def forward(self, z):
        z = z.flatten(1)
        score = ((50 * z).round() / 50 - 0.5) @ torch.linspace(-1, 1, 16)
        return torch.stack([score, -score], 1) + 0 * z[:, :2]


def test_if_masked_runs_only_where_gradients_mislead(linear):
    x = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = Rounded()(x).argmax(1)
    threat = Lp(math.inf, 0.1)
    attack = IfMasked(Square(60), APGD(8, "margin"), Square(15))
    masked = advkit.run(attack, Rounded(), x, y, threat)
    short = advkit.run(Square(15), Rounded(), x, y, threat)
    assert int(masked.success.sum()) > int(short.success.sum())
    assert int(masked.forwards[~masked.success].min()) > 70
    model, w, x, y = linear(16)
    honest = advkit.run(attack, model, x, y, Lp(math.inf, 0.5 * float((x @ w).abs().min() / w.abs().sum()), -9, 9))
    assert not honest.success.any()
    assert int(honest.forwards.max()) <= 8 + 15 + 3
