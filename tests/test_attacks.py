"""Every attack: the contract, and the closed-form optimum of a linear model."""

import math

import pytest
import torch

from advkit import Lp, Restarts, Worst, perturb, run
from advkit.attacks import (
    APGD,
    APGDL1,
    ATTACKS,
    BIM,
    CW,
    DDN,
    DI,
    EAD,
    FAB,
    FGSM,
    FMN,
    JSMA,
    MIFGSM,
    NES,
    NIFGSM,
    PDPGD,
    PGD,
    SI,
    SPSA,
    TI,
    VMI,
    Admix,
    AdvGAN,
    Boundary,
    CWLinf,
    DeepFool,
    Expect,
    Gaussian,
    Grid,
    HopSkipJump,
    IfMasked,
    MultiTargeted,
    Natural,
    RayS,
    SaltAndPepper,
    SigmaZero,
    SimBA,
    SparseRS,
    Square,
    SurFree,
    Uniform,
    Unrestricted,
)
from advkit.attacks.advgan import Generator, Trained
from advkit.norms import dual, lp_norm, steepest
from advkit.testing import check_attack

QUICK = {
    "fgsm": [FGSM(), FGSM(loss="margin")],
    "bim": [BIM(4)],
    "pgd": [PGD(4), PGD(4, loss="dlr", momentum=0.9, start=False)],
    "apgd": [APGD(6), APGD(5, loss="dlr")],
    "apgd-l1": [APGDL1(8)],
    "multi-targeted": [MultiTargeted(APGD(3), 2, "dlr"), MultiTargeted(PGD(2), 3)],
    "if-masked": [IfMasked(Square(4), PGD(2), Square(3))],
    "mi-fgsm": [MIFGSM(4)],
    "ni-fgsm": [NIFGSM(4)],
    "di": [DI(MIFGSM(3), least=0.7)],
    "ti": [TI(DI(MIFGSM(3)))],
    "si": [SI(NIFGSM(3), 2)],
    "vmi": [VMI(PGD(3), 2)],
    "admix": [Admix(MIFGSM(2), n=2, m=2)],
    "fmn": [FMN(6)],
    "deepfool": [DeepFool(3), DeepFool(2, 3, halvings=0)],
    "ddn": [DDN(6)],
    "fab": [FAB(3), FAB(2, targets=2)],
    "cw": [CW(4, 2)],
    "cw-linf": [CWLinf(6, 3)],
    "ead": [EAD(4, 2)],
    "pdpgd": [PDPGD(6)],
    "square": [Square(6)],
    "nes": [NES(6, pairs=2)],
    "spsa": [SPSA(8, pairs=2)],
    "simba": [SimBA(4), SimBA(4, "pixel")],
    "jsma": [JSMA(4), JSMA(3, entries=2)],
    "sigma-zero": [SigmaZero(6)],
    "sparse-rs": [SparseRS(12)],
    "boundary": [Boundary(16)],
    "hopskipjump": [HopSkipJump(20, probes=3)],
    "rays": [RayS(16)],
    "surfree": [SurFree(20)],
    "advgan": [AdvGAN("a.safetensors")],
    "unrestricted": [Unrestricted(4), Unrestricted(3, lr=0.5)],
    "natural": [Natural(12, 3), Natural(9, 2, step=0.5, reach=0.4)],
    "uniform": [Uniform(4)],
    "grid": [Grid(30)],
    "gaussian": [Gaussian(4)],
    "salt-and-pepper": [SaltAndPepper(4)],
    "expect": [Expect(PGD(2), 2), Expect(FMN(3), 2)],
    "restarts": [Restarts(PGD(3), 2)],
    "worst": [Worst((FGSM(), Square(5)))],
}
CASES = [attack for attacks in QUICK.values() for attack in attacks]


def test_every_attack_of_the_table_is_tested():
    assert set(QUICK) == set(ATTACKS)
    for name, attacks in QUICK.items():
        assert all(type(attack) is ATTACKS[name] for attack in attacks)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the file of an attack that needs one is."""
    out, shape = tmp_path_factory.mktemp("attacks"), (2, 9, 8)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Trained(Generator(shape, 2), shape, 2).save(out / "a.safetensors")
    return out


@pytest.mark.parametrize("attack", CASES, ids=repr)
def test_contract(attack, folder, monkeypatch):
    monkeypatch.chdir(folder)
    check_attack(attack)


BASIC = [FGSM(), BIM(), PGD(40), PGD(40, momentum=0.9), PGD(40, loss="margin")]
FREE = {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize("shape", [(2,), (20,), (3, 4, 5)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_fmn_finds_the_distance_to_a_linear_boundary(linear, p, shape):
    model, w, x, y = linear(math.prod(shape))
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    result = run(FMN(), lambda z: model(z.flatten(1)), x.view(-1, *shape), y, Lp(p, **FREE))
    ratio = result.distance / true
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-6
    assert float(ratio.max()) < 1.02


def test_fmn_finds_the_fewest_entries_of_a_linear_boundary(linear):
    """In [0, 1] the fewest entries are those whose change to the far end of the range gains most."""
    model, w, x, _y = linear(20)
    x = x.sigmoid()
    centre = torch.full_like(w, 0.5)
    score = (x - centre) @ w
    gain = torch.where((w > 0) == (score < 0).unsqueeze(1), 1 - x, x) * w.abs()
    reach = gain.sort(1, descending=True).values.cumsum(1)
    true = (reach < score.abs().unsqueeze(1)).sum(1) + 1
    result = run(FMN(), lambda z: model(z - centre), x, (score > 0).long(), Lp(0.0))
    assert result.success.all()
    assert (result.distance >= true).all()
    assert float((result.distance / true).mean()) < 1.25


@pytest.mark.parametrize("attack", [*BASIC, APGD(40), APGD(40, "margin"), APGDL1(100)], ids=repr)
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_a_linear_model_falls_exactly_when_the_radius_exceeds_the_distance(linear, attack, p):
    if p not in attack.norms:
        pytest.skip("another norm")
    model, w, x, y = linear(6)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    ordered = true.sort().values
    gap = int((ordered[9:24] / ordered[8:23]).argmax()) + 8
    eps = float((ordered[gap] + ordered[gap + 1]) / 2)
    result = run(attack, model, x, y, Lp(p, eps, **FREE))
    assert torch.equal(result.success, true < eps)


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_fgsm_is_one_step_to_the_edge(linear, p):
    model, w, x, y = linear(5)
    sign = torch.where(y == 0, 1.0, -1.0).unsqueeze(1)
    expected = x + 100.0 * sign * steepest(w.unsqueeze(0), p)
    result = run(FGSM(), model, x, y, Lp(p, 100.0, **FREE))
    assert torch.allclose(result.x_adv, expected)


def test_square_solves_a_linear_model_with_scores(linear):
    model, w, x, y = linear(16)
    true = (x @ w).abs() / w.abs().sum()
    result = run(Square(600), model, x, y, Lp(math.inf, float(true.max()) * 1.2, **FREE))
    assert result.success.float().mean() > 0.9
    unreachable = run(Square(50), model, x, y, Lp(math.inf, float(true.min()) * 0.99, **FREE))
    assert not unreachable.success.any()


def test_more_steps_and_more_radius_do_not_hurt(linear):
    model, _w, x, y = linear(30)
    found = [int(run(PGD(steps), model, x, y, Lp(2.0, 0.8, **FREE)).success.sum()) for steps in (1, 5, 40)]
    assert found == sorted(found)
    found = [int(run(PGD(10), model, x, y, Lp(2.0, eps, **FREE)).success.sum()) for eps in (0.1, 0.4, 0.8, 1.6, 30.0)]
    assert found == sorted(found)
    assert found[-1] == len(x)


def test_noise_is_no_adversary(linear):
    """In many dimensions noise of a radius at which PGD always succeeds finds little."""
    model, w, x, y = linear(1000)
    true = (x @ w).abs() / w.abs().sum()
    threat = Lp(math.inf, float(true.median()) * 2, **FREE)
    assert run(PGD(10), model, x, y, threat).success.float().mean() > 0.6
    for noise in (Uniform(20), Gaussian(20)):
        assert run(noise, model, x, y, threat).success.float().mean() < 0.3


def test_restarts_and_worst_count_every_attack(linear):
    model, w, x, y = linear(8)
    threat = Lp(2.0, float((x @ w).abs().median() / w.norm()), **FREE)
    single = run(PGD(2), model, x, y, threat)
    several = run(Restarts(PGD(2), 5), model, x, y, threat)
    assert int(several.success.sum()) >= int(single.success.sum())
    worst = run(Worst((Uniform(3), PGD(40))), model, x, y, threat)
    assert int(worst.success.sum()) >= int(single.success.sum())


class Valleys(torch.nn.Module):
    """Three logits: the first is the label's, and the gradient at the start points to the second, which is never reached."""

    def forward(self, z):
        first = torch.zeros(len(z))
        bait = z[:, 0].clamp(max=0.05) - 0.1
        return torch.stack([first, bait, 0.2 * z[:, 1] - 0.15], 1)


def test_a_class_that_is_not_the_nearest_is_found_by_aiming_at_each():
    x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    threat = Lp(math.inf, 1.0, low=-1.0)
    climb = PGD(10, loss="margin", start=False)
    assert not run(climb, Valleys(), x, y, threat).success.any()
    assert not run(MultiTargeted(climb, 1), Valleys(), x, y, threat).success.any()
    assert run(MultiTargeted(climb, 2), Valleys(), x, y, threat).success.all()


def test_apgd_halves_its_step_until_it_arrives(linear):
    """In l_2 the best point of the ball is known; the loss there should be reached up to a thousandth."""
    model, w, x, y = linear(20)
    eps = 0.9 * float((x @ w).abs().min() / w.norm())
    x_adv = perturb(APGD(60, "margin"), model, x, y, Lp(2.0, eps, **FREE), rng=torch.Generator().manual_seed(0))
    gained = (x_adv - x) @ w * torch.where(y == 0, 1.0, -1.0)
    assert (gained > 0.999 * eps * w.norm()).all()
