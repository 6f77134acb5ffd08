"""GANs as attackers: the space of codes, the attacks made for it, generators of perturbations, and judges of what they find."""

import argparse
import json
import math
import pickle

import pytest
import torch
from torch import nn

from advkit import Lp, Worst, evaluate, spec
from advkit.attacks import PGD, AdvGAN, Natural, Uniform, Unrestricted
from advkit.attacks.advgan import AdvGANGame, Critic, Generator, Judges, Student, Trained
from advkit.benchmarks import one_pass
from advkit.benchmarks.plan import parse_threat
from advkit.cli import gan_attack, gan_invert, gan_natural, main
from advkit.data import from_tensors, load
from advkit.engine import perturb, run
from advkit.errors import AccessError, UsageError
from advkit.gan import invert, pair
from advkit.gan.game import Match, play
from advkit.gan.inverter import Inverter
from advkit.gan.naturalness import opinion, scores, together
from advkit.gan.pair import Pair
from advkit.latent import Latent
from advkit.models import checkpoint, networks, wrap
from advkit.models.digest import digest_files
from advkit.norms import dual, lp_norm
from advkit.oracle import Access
from advkit.threat import THREATS
from advkit.train import Recipe, train

CONDITIONAL, PLAIN = "biggan(d=6, width=4)", "dcgan(d=5, width=4)"
LINEAR = """
import torch

A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, -1.0]])

class Linear:
    shape, low, high, classes = (3,), -50.0, 50.0, 0

    def latent(self, n, rng):
        return torch.randn(n, 2, generator=rng)

    def decode(self, z, y=None):
        return z @ A.T.to(z)

    def invert(self, x):
        return x @ torch.linalg.pinv(A).T.to(x), None

    def sample(self, n, y, rng):
        return self.decode(self.latent(n, rng))

class Blind(Linear):
    invert = None

def source():
    return Linear()

def blind():
    return Blind()
"""


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def made(text, shape=(1, 28, 28), low=0.0, high=1.0, inverter=True):
    settings, generator, discriminator = pair.build(text, shape, 10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        reads = Inverter(shape, settings.d, 10) if inverter else None
    names = tuple("0123456789")
    return Pair(settings, shape, low, high, names, 10, generator.eval(), discriminator.eval(), reads and reads.eval())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small generators, a source of linear drawings, and models, each in its file."""
    out = tmp_path_factory.mktemp("generators")
    pair.save(out / "c.safetensors", made(CONDITIONAL))
    pair.save(out / "g.safetensors", made(PLAIN))
    pair.save(out / "blind.safetensors", made(PLAIN, inverter=False))
    (out / "linear.py").write_text(LINEAR, encoding="utf-8")
    digits = load("mnist-5k", split="train", limit=1000)
    for seed in (0, 1):
        model = train(networks.build("mnist-mlp(width=48)", seed), digits, Recipe(epochs=4), seed=seed)
        checkpoint.save(out / f"m{seed}.safetensors", model, "mnist-mlp(width=48)")
    return out


@pytest.fixture
def model(folder):
    return checkpoint.load(folder / "m0.safetensors")[0].eval()


def digits(n=8, split="test"):
    return load("mnist-5k", split=split, limit=n).batch(0, n)


# The space of codes


def test_a_run_with_another_generator_of_the_same_name_is_another_run(folder, model, tmp_path):
    names = "g.safetensors", "c.safetensors"
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    threat, attack = Latent(str(tmp_path / names[0]), eps=0.1), Worst((PGD(1), Unrestricted(1, guard=str(tmp_path / names[1]))))
    assert set(digest_files([threat, attack])) == {str(tmp_path / name) for name in names}
    assert digest_files({"text": "t" * 5000 + ".pt", "nothing": "margin", "folder": str(tmp_path)}) == {}
    evaluate(wrap(model), digits(4), threat=threat, attacks="unrestricted(steps=1)", out=tmp_path / "run")
    (tmp_path / names[0]).write_bytes((folder / names[1]).read_bytes())
    with pytest.raises(UsageError, match="holds another run"):
        evaluate(wrap(model), digits(4), threat=threat, attacks="unrestricted(steps=1)", out=tmp_path / "run")


def test_a_named_file_that_cannot_be_read_is_one_sentence(folder, monkeypatch):
    def denied(*_):
        raise PermissionError("permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(UsageError, match=r"g\.safetensors cannot be read: permission denied"):
        digest_files(Latent(str(folder / "g.safetensors")))


@pytest.mark.parametrize("name", ["c.safetensors", "g.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_gives_the_drawing_and_rows_are_their_own(folder, name, dtype):
    threat, source = Latent(str(folder / name), eps=0.5), pair.load(str(folder / name))
    x = digits()[0].to(dtype)
    theta = threat.zero(x)
    drawn = threat.apply(x, theta)
    assert theta.shape == (8, source.settings.d)
    assert drawn.shape == x.shape
    assert drawn.dtype == theta.dtype == dtype
    assert torch.equal(drawn, source.decode(*source.invert(x)).to(dtype))
    assert threat.allows(drawn, x).all()
    theta = torch.randn(theta.shape, generator=rng(), dtype=dtype)
    whole, alone = threat.apply(x, theta), torch.cat([threat.apply(x[i : i + 1], theta[i : i + 1]) for i in range(8)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert not torch.allclose(whole, drawn, atol=1e-4)


def test_codes_have_gradients_whatever_mode_the_file_was_read_in(folder, tmp_path):
    path = tmp_path / "g.safetensors"
    path.write_bytes((folder / "g.safetensors").read_bytes())
    threat, x, before = Latent(str(path)), digits()[0], torch.get_rng_state()
    with torch.inference_mode():
        threat.apply(x.clone(), threat.zero(x))
    assert torch.equal(torch.get_rng_state(), before)
    theta = threat.zero(x).requires_grad_(True)
    (g,) = torch.autograd.grad(threat.apply(x, theta).square().sum(), theta)
    assert (lp_norm(g, 2) > 0).all()


def test_what_is_found_is_what_the_parameters_draw(folder, model):
    threat = Latent(str(folder / "c.safetensors"), eps=1.5)
    x, y = digits(20)
    for attack in (PGD(5), Unrestricted(5), Natural(20, 4), Uniform(5)):
        result = run(attack, model, x, y, threat, rng=rng())
        assert threat.ball.allows(result.change, threat.zero(x)).all()
        assert torch.equal(result.x_adv, threat.apply(x, result.change))
        assert torch.equal(model(result.x_adv).argmax(1) != y, result.success)
        start = model(threat.apply(x, threat.zero(x))).argmax(1)
        assert torch.equal(result.distance == 0, start != y)


def test_specs_pickles_and_the_range_of_the_data(folder):
    for threat in (Latent("a/g-1.safetensors"), Latent("g.safetensors", 0.5, 2.0, -1.0, 1.0)):
        assert spec.parse(spec.show(threat, THREATS), THREATS, "threat") == threat
        assert pickle.loads(pickle.dumps(threat)) == threat
        assert hash(threat) == hash(pickle.loads(pickle.dumps(threat)))
    assert spec.parse('latent("g.safetensors", eps=1/2)', THREATS, "threat") == Latent("g.safetensors", 0.5)
    path = folder / "shifted.safetensors"
    pair.save(path, made(PLAIN, low=-1.0))
    data = load("mnist-5k", limit=4, low=-1.0, high=1.0)
    assert parse_threat(f'latent("{path}", eps=0.5)', data) == Latent(str(path), 0.5, low=-1.0)
    with pytest.raises(UsageError, match=r"draws samples in \[-1, 1\] and the data are in \[0, 1\]"):
        parse_threat(f'latent("{path}", eps=0.5)', load("mnist-5k", limit=4))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none.safetensors", "there is no file"),
        ("blind.safetensors", "has no inverter, which finds the code of an input; train one: advkit gan invert"),
        ("linear.py:blind", "has no method invert"),
        ("linear.py:source", r"draws samples of shape \(3,\) and the data have \(1, 28, 28\)"),
        ("m0.safetensors", "holds no generator"),
    ],
)
def test_sources_that_do_not_serve_are_refused(folder, source, says):
    blind = source == "linear.py:blind"
    threat = Latent(str(folder / source), low=-50.0 if blind else 0.0, high=50.0 if blind else 1.0)
    with pytest.raises(UsageError, match=says):
        threat.zero(torch.zeros(2, 3) if blind else digits()[0])


@pytest.mark.parametrize("given", [{"eps": 0.0}, {"p": 3.0}, {"low": 1.0}, {"high": math.inf}])
def test_numbers_out_of_range_are_refused(given):
    with pytest.raises(UsageError):
        Latent("g.safetensors", **given)


# Attacks made for it


def linear(folder, p, eps=math.inf, n=20):
    """A linear model of linear drawings: the closest code that changes the answer is known."""
    threat = Latent(str(folder / "linear.py:source"), eps, p, low=-50.0, high=50.0)
    w = torch.tensor([1.0, -2.0, 0.5])
    z = torch.randn(n, 2, generator=rng(3))
    A = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
    x = z @ A.T
    model = lambda seen: torch.stack([-(seen @ w), seen @ w], 1)
    true = (x @ w).abs() / lp_norm((A.T @ w).unsqueeze(0), dual(p))
    return threat, model, x, ((x @ w) > 0).long(), true


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_natural_finds_the_closest_code(folder, p):
    threat, model, x, y, true = linear(folder, p)
    result = run(Natural(1500, 50), model, x, y, threat, access=Access.LABELS, rng=rng())
    ratio = result.distance / true
    assert result.success.all()
    assert float(ratio.min()) > 1 - 1e-5
    assert float(ratio.max()) < 1.1


def test_natural_ends_when_thin_shells_are_empty(folder):
    threat, model, x, y, _ = linear(folder, 2.0)
    result = run(Natural(100_000, 20, step=0.01, patience=2), model, x, y, threat, rng=rng())
    assert result.success.all()
    assert int(result.forwards.max()) < 5000


def test_natural_begins_again_where_it_found_nothing():
    """What few candidates hit is missed by the shells on the way to the outermost, and not given up."""
    x, y = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
    model = lambda z: torch.stack([torch.zeros(len(z)), (z[:, 0] - 8.0) * (z[:, 1].abs() < 0.15)], 1)
    threat = Lp(2.0, low=-math.inf, high=math.inf)
    once, again = (run(Natural(n, 10, step=0.1), model, x, y, threat, rng=rng()).success for n in (40, 3000))
    assert not once.all()
    assert again.all()


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_unrestricted_succeeds_exactly_where_the_radius_reaches(folder, p):
    true = linear(folder, p)[4]
    ordered = true.sort().values
    gap = int((ordered[6:18] / ordered[5:17]).argmax()) + 5
    eps = float((ordered[gap] + ordered[gap + 1]) / 2)
    threat, model, x, y, _ = linear(folder, p, eps)
    assert torch.equal(run(Unrestricted(60), model, x, y, threat).success, true < eps)


def test_a_guard_keeps_what_it_said(folder):
    """Of two directions that fool the model the guard forbids the steeper one."""
    file = folder / "guard.py"
    says = "torch.stack([0 * x[:, 0], 20 * (x[:, 0].abs() - 0.3)], 1)"
    file.write_text(f"import torch\n\ndef guard():\n    return lambda x: {says}\n", "utf-8")
    x, y = torch.zeros(5, 2), torch.zeros(5, dtype=torch.int64)
    model = lambda z: torch.stack([0 * z[:, 0], 2 * z[:, 0] + z[:, 1] - 0.7], 1)
    threat = Lp(math.inf, 1.0, low=-1.0)
    strayed = run(Unrestricted(40, lr=0.02), model, x, y, threat).x_adv
    guarded = run(Unrestricted(100, lr=0.02, guard=f"{file}:guard", weight=3.0), model, x, y, threat)
    assert (strayed[:, 0] > 0.2).all()
    assert guarded.success.all()
    assert (guarded.x_adv[:, 0] < strayed[:, 0]).all()
    assert (guarded.x_adv[:, 1] > guarded.x_adv[:, 0]).all()


def test_with_a_guard_rows_are_their_own_and_the_global_state_is_left_alone(folder):
    file = folder / "small.py"
    file.write_text(
        "import torch\n\ndef guard():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, 3))\n",
        "utf-8",
    )
    x, y = torch.rand(6, 1, 6, 6, generator=rng()), torch.zeros(6, dtype=torch.int64)
    attack, threat = Unrestricted(4, guard=f"{file}:guard"), Lp(math.inf, 0.1)
    model, before = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).requires_grad_(False), torch.get_rng_state()
    whole = perturb(attack, model, x, y, threat, rng=rng())
    assert torch.equal(torch.get_rng_state(), before)
    alone = torch.cat([perturb(attack, model, x[i : i + 1], y[i : i + 1], threat, rng=rng()) for i in range(6)])
    assert torch.allclose(whole, alone, atol=1e-6)
    assert perturb(attack, model.double(), x.double(), y, threat, rng=rng()).dtype == torch.float64


def test_guards_that_do_not_serve_are_refused(folder, model):
    x, y = digits()
    (folder / "stiff.py").write_text("def guard():\n    return lambda x: x.detach().flatten(1)\n", "utf-8")
    for guard, says in (
        (folder / "none.safetensors", "there is no file"),
        (f"{folder / 'stiff.py'}:guard", "gives no gradient"),
        (f"{folder / 'guard.py'}:guard", "does not serve"),
    ):
        (folder / "guard.py").write_text("def guard():\n    return lambda x: x[:, 7]\n", "utf-8")
        with pytest.raises(UsageError, match=says):
            run(Unrestricted(2, guard=str(guard)), model, x, y, Lp(math.inf, 0.1))


# A generator of perturbations


def trained(path, shape=(1, 28, 28), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Trained(Generator(shape, 2), shape, 2, {"model": "mine"}).save(path)
    return path


def test_a_file_holds_a_generator_and_the_attack_is_one_pass_of_it(tmp_path, model):
    path, (x, y), before = trained(tmp_path / "a.safetensors"), digits(), torch.get_rng_state()
    read = Trained.read(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (read.shape, read.width, read.about["model"]) == ((1, 28, 28), 2, "mine")
    attack, threat = AdvGAN(str(path)), Lp(math.inf, 0.1)
    with torch.no_grad():
        expected = (x + 0.1 * read.generator(x)).clamp(0, 1)
    assert torch.allclose(perturb(attack, model, x, y, threat, rng=rng()), expected, atol=1e-6)
    wide = perturb(attack, model, 2 * x - 1, y, Lp(math.inf, 0.2, low=-1.0), rng=rng())
    assert torch.allclose(wide, 2 * expected - 1, atol=1e-6)
    result = run(attack, lambda z: model(z.detach()), x, y, threat, access=Access.LABELS)
    assert int(result.forwards.max()) <= 1
    assert torch.equal(result.success, model(result.x_adv).argmax(1) != y)
    trained(path, seed=1)
    assert not torch.allclose(perturb(attack, model, x, y, threat, rng=rng()), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("", (1, 28, 28), "advgan has no generator; train one: advkit gan attack"),
        ("none.safetensors", (1, 28, 28), "there is no file"),
        ("m0.safetensors", (1, 28, 28), "holds no generator of perturbations"),
        ("a.safetensors", (1, 8, 8), r"was trained for inputs of shape \(1, 28, 28\); these have \(1, 8, 8\)"),
        ("damaged.safetensors", (1, 28, 28), "do not fit the generator"),
    ],
)
def test_files_that_do_not_serve_are_refused(folder, name, shape, says):
    state, about = checkpoint.read(trained(folder / "a.safetensors"))
    checkpoint.write(folder / "damaged.safetensors", state, about | {"advgan": '{"shape": [1, 28, 28], "width": 3}'})
    attack, x, y = AdvGAN(name and str(folder / name)), torch.rand(2, *shape), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match=says):
        run(attack, nn.Flatten(), x, y, Lp(math.inf, 0.1))


def game_of(model, target=None, student=False, threat=None, **given):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judges = Judges(Critic((1, 28, 28), 4), Student((1, 28, 28), 10, 4) if student else None)
        return AdvGANGame(model, Generator((1, 28, 28), 4), judges, threat or Lp(math.inf, 0.3), target, **given)


def test_the_generator_descends_the_sum_of_its_three_losses(model):
    x, y = digits(12)
    given = {"alpha": 0.0, "beta": 0.0, "kappa": 2.0}
    parts = [given, given | {"kappa": 0.0, "alpha": 2.0}, given | {"kappa": 0.0, "beta": 3.0}]
    adversarial, seeming, length = (float(game_of(model, **one).generate(x, y, rng()).detach()) for one in parts)
    whole = float(game_of(model, alpha=2.0, beta=3.0, kappa=2.0).generate(x, y, rng()).detach())
    at_zero = float(game_of(model, **(given | {"kappa": 0.0})).generate(x, y, rng()).detach())
    assert math.isclose(whole, adversarial + seeming + length - 2 * at_zero, rel_tol=1e-4)
    # Of a target, its own class is left out, and the others are pushed towards it.
    y = torch.tensor([3] * 6 + [5] * 6)
    game = game_of(model, target=3, **given)
    outputs = model(game._perturbed(x)[0])[6:]
    short = 2.0 + (outputs[:, [k for k in range(10) if k != 3]].amax(1) - outputs[:, 3])
    assert math.isclose(float(game.generate(x, y, rng()).detach()), float(short.relu().sum().detach()) / 12, rel_tol=1e-4)


def test_the_attacked_model_is_left_as_it_was(model):
    x, y = digits(12)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    game = game_of(model)
    game.discriminate(x, y, rng())[0].backward()
    game.generate(x, y, rng()).backward()
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is not None for p in game.generator.parameters())


class Answers(nn.Module):
    """A model of which only answers are seen: it refuses gradients, and counts."""

    def __init__(self, model, scale=1.0):
        super().__init__()
        self.model, self.scale, self.asked = model, scale, 0

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.asked += len(x)
        return self.scale * self.model(x)


def test_a_student_needs_answers_only(model):
    x, y = digits(12)
    losses = []
    for scale in (1.0, 100.0):
        black = Answers(model, scale)
        game = game_of(black, student=True, labels=True)
        loss, told = game.discriminate(x, y, rng())
        game.generate(x, y, rng()).backward()
        losses.append(float(loss.detach()))
        assert black.asked == 2 * len(x)
        assert 0 <= float(told) <= 1
    assert losses[0] == losses[1]
    scored = float(game_of(Answers(model), student=True).discriminate(x, y, rng())[0].detach())
    assert not math.isclose(scored, losses[0], rel_tol=1e-3)


def test_games_that_cannot_be_played_are_refused(model):
    with pytest.raises(UsageError, match="in l_inf with a radius"):
        game_of(model, threat=Lp(2.0, 1.0))
    with pytest.raises(UsageError, match="kappa is -1"):
        game_of(model, kappa=-1.0)
    with pytest.raises(UsageError, match=r"takes images \(C, H, W\) of at least 8 x 8"):
        Generator((784,))
    with pytest.raises(AccessError, match="--black-box"):
        game_of(lambda x: model(x.detach()).detach()).generate(*digits(), rng())


@pytest.mark.parametrize("student", [False, True])
def test_a_game_gives_the_same_generator_again(model, student):
    data = load("mnist-5k", split="train", limit=64)
    weights = []
    for _ in range(2):
        game = game_of(model, student=student)
        (last,) = play(game, data, Match(epochs=1, batch_size=16))
        weights.append(torch.cat([p.flatten() for p in game.generator.parameters()]))
        assert math.isfinite(last.g_loss)
    assert torch.equal(*weights)


def test_the_benchmark_of_one_pass(folder, tmp_path, monkeypatch, capsys):
    trained(tmp_path / "a.safetensors")
    given = "--generator", tmp_path / "a.safetensors", "--model", folder / "m0.safetensors", "--data", "mnist-5k", "--limit", 20
    monkeypatch.setattr("sys.argv", ["one_pass", *map(str, given)])
    one_pass.main()
    one, many, ratio = capsys.readouterr().out.splitlines()
    assert one.startswith("advgan: fools ")
    assert many.startswith("pgd(steps=40): fools ")
    assert int(ratio.split()[2]) > 1


def test_a_generator_fools_where_noise_does_not(folder, model, tmp_path):
    data, (x, y) = load("mnist-5k", split="train", limit=1200), digits(300)
    game, threat = game_of(model, threat=Lp(math.inf, 0.2)), Lp(math.inf, 0.2)
    play(game, data, Match(epochs=1, batch_size=32, lr=2e-3, lr_discriminator=1e-3, average=0.9))
    Trained(game.generator, (1, 28, 28), 4).save(tmp_path / "a.safetensors")
    right = model(x).argmax(1) == y
    share = lambda attack: float(run(attack, model, x, y, threat, rng=rng()).success[right].float().mean())
    assert share(AdvGAN(str(tmp_path / "a.safetensors"))) > share(Uniform(1)) + 0.2


# The inverter


def test_an_inverter_learns_codes_and_classes(folder):
    data, unseen, untrained = load("mnist-5k", split="train", limit=800), load("mnist-5k", limit=200), made(CONDITIONAL)
    trained = invert.fit(untrained, data, batch_size=32, seed=3)
    before, after = invert.read(untrained, unseen), invert.read(trained, unseen)
    assert after.error < before.error
    assert after.right > 0.5 * after.of > before.right
    assert not any(p.requires_grad for p in trained.inverter.parameters())
    assert trained.generator is untrained.generator
    twice = [invert.fit(untrained, load("mnist-5k", limit=40), batch_size=20).inverter.state_dict() for _ in range(2)]
    assert all(torch.equal(value, twice[1][key]) for key, value in twice[0].items())


def test_codes_of_drawings_are_read(folder):
    """Of a generator whose drawings tell the code apart, the codes of unseen drawings are read far better than by guessing."""
    source = made(PLAIN, inverter=False)
    with torch.no_grad():
        next(layer for layer in source.generator.modules() if isinstance(layer, nn.Linear)).weight.mul_(8)
        for layer in source.generator.modules():
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight.mul_(8)
    x = source.sample(800, None, rng())
    read = invert.fit(source, from_tensors(x, torch.zeros(800, dtype=torch.int64)), epochs=2, batch_size=32)
    z = source.latent(200, rng(9))
    found, y = read.invert(source.decode(z))
    assert y is None
    assert float((found - z).square().mean()) < 0.5


def test_data_that_the_generator_does_not_draw_are_refused():
    data = load("mnist-5k", limit=20)
    for source, says in (
        (made(CONDITIONAL, (3, 32, 32)), "draws samples of shape"),
        (made(CONDITIONAL, low=-1.0), r"draws samples in \[-1, 1\]"),
    ):
        with pytest.raises(UsageError, match=says):
            invert.fit(source, data)
    with pytest.raises(UsageError, match="the greatest label is 12"):
        invert.fit(made(CONDITIONAL), from_tensors(torch.rand(4, 1, 28, 28), torch.tensor([0, 1, 2, 12])))
    with pytest.raises(UsageError, match="epochs is 0"):
        invert.fit(made(CONDITIONAL), data, epochs=0)


# Who judges


def test_what_a_judge_says_is_counted():
    judge = wrap(lambda x: x[:, :3])
    one = torch.eye(3)
    y, said = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 0, 2])
    found = opinion(judge, one[y], one[torch.tensor([0, 2, 1, 0])], y, said)
    assert (found.clean, found.label, found.fooled, found.of) == (4, 2, 1, 4)
    other = opinion(judge, one[y], one[torch.tensor([1, 1, 2, 0])], y, said)
    assert (other.label, together([found]), together([found, other])) == (3, 2, 1)


def test_a_discriminator_scores_successes_beside_data_and_samples():
    source = made(CONDITIONAL)
    x, y = digits(200)
    same = scores(source, x, y, x, y, rng())
    assert (same.examples, same.of_examples, same.of_samples) == (190, 200, 200)
    drawn = source.sample(200, y, rng())
    assert scores(source, x, y, drawn, y, rng()).examples == same.samples
    with pytest.raises(UsageError, match="draws samples of shape"):
        scores(source, x[:, :, :8], y, x, y, rng())


# The command line


def command(module, *given):
    """Run a subcommand as ``advkit gan`` mounts it."""
    parser = argparse.ArgumentParser()
    module.add(parser.add_subparsers())
    arguments = parser.parse_args([*map(str, given)])
    return arguments.run(arguments)


def test_invert_attack_and_judge(folder, tmp_path, capsys):
    generator, data = tmp_path / "c.safetensors", ("--data", "mnist-5k")
    generator.write_bytes((folder / "c.safetensors").read_bytes())
    assert command(gan_invert, "invert", generator, *data, "--limit", 100) == 0
    said = capsys.readouterr().out
    assert "drawings differ from unseen examples by" in said
    assert "the class is read right of" in said
    assert pair.read(generator)[0].inverter is not None
    threat, out = f'latent("{generator}", eps=0.5)', tmp_path / "run"
    attack = ("attack", "--model", folder / "m0.safetensors", *data, "--limit", 20, "--threat", threat, "--out", out)
    assert main([*map(str, attack), "--attack", "unrestricted(steps=2)", "--attack", "natural(queries=4)"]) == 0
    assert json.loads((out / "summary.json").read_text())["run"]["threat"] == f'latent(source="{generator}", eps=0.5)'
    capsys.readouterr()
    judge = ("judge", out, "--judge", folder / "m1.safetensors", "--generator", generator)
    assert command(gan_natural, *judge) == 0
    said = capsys.readouterr().out
    assert "still the label" in said
    assert "the discriminator takes for data" in said
    written = json.loads((out / "judge.json").read_text())
    assert written["schema"] == "advkit/judge/1"
    assert written["successes"] == written["judges"][0]["label"]["of"] == written["discriminator"]["successes"]["of"]
    assert written["together"] == written["judges"][0]["label"]
    with pytest.raises(UsageError, match="is the attacked model"):
        command(gan_natural, "judge", out, "--judge", folder / "m0.safetensors")


def test_the_closest_code_from_the_command_line(folder, tmp_path, capsys):
    threat = f'latent("{folder / "g.safetensors"}", p=2)'
    attack = ("attack", "--model", folder / "m0.safetensors", "--data", "mnist-5k", "--limit", 6, "--threat", threat)
    assert main([*map(str, attack), "--attack", "natural(queries=20)", "--attack", "fmn(steps=5)"]) == 0
    assert "natural" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more", [(), ("--target", 3), ("--black-box",), ("--black-box", "labels", "--student", "mnist-mlp(width=16)")]
)
def test_train_a_generator_of_perturbations(folder, tmp_path, capsys, more):
    out, model = tmp_path / "a.safetensors", folder / "m0.safetensors"
    given = ("--model", model, "--data", "mnist-5k", "--threat", "linf(0.2)", "--limit", 96, "--epochs", 1, "--width", 2)
    assert command(gan_attack, "attack", *given, "--out", out, *more) == 0
    said = capsys.readouterr().out
    assert "success on unseen examples of" in said
    assert ("the student asked" in said) == ("--black-box" in more)
    assert not out.with_name("a.safetensors.partial").exists()
    about = Trained.read(out).about
    assert (about["threat"], about["target"]) == ("linf(eps=0.2)", str(more[1]) if "--target" in more else "any")
    attack = ("attack", "--model", model, "--data", "mnist-5k", "--limit", 20, "--threat", "linf(0.2)")
    assert main([*map(str, attack), "--attack", f'advgan("{out}")']) == 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--threat", "l2(1)"), "in l_inf with a radius"),
        (("--threat", "rotation(30)"), "an l_p ball"),
        (("--student", "mnist-mlp"), "a student learns with --black-box only"),
        (("--black-box", "--student", "tap"), "unknown network"),
        (("--out", "a.pt"), "ends in .safetensors"),
        (("--target", 12), "the target is class 12; the model has classes 0 to 9"),
    ],
)
def test_misuse_of_the_attack_is_one_sentence(folder, tmp_path, monkeypatch, more, says):
    monkeypatch.chdir(tmp_path)
    given = ["--model", folder / "m0.safetensors", "--data", "mnist-5k", "--limit", 20, "--epochs", 1]
    for name, value in (("--threat", "linf(0.2)"), ("--out", "a.safetensors")):
        given += [] if name in more else [name, value]
    with pytest.raises(UsageError, match=says):
        command(gan_attack, "attack", *given, *more)


def test_a_model_that_gives_scores_only_is_told_of_the_student(folder, tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\n\ndef load():\n    return lambda x: x.detach().flatten(1)[:, :10]\n", "utf-8"
    )
    given = ("--data", "mnist-5k", "--limit", 40, "--epochs", 1, "--threat", "linf(0.2)", "--width", 2)
    given = (*given, "--out", tmp_path / "a.safetensors")
    with pytest.raises(AccessError, match="--black-box"):
        command(gan_attack, "attack", "--model", f"{tmp_path / 'net.py'}:load", *given)
    assert command(gan_attack, "attack", "--model", f"{tmp_path / 'net.py'}:load", *given, "--black-box") == 0
