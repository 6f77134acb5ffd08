import functools
import math

import pytest
import torch
from torch import nn

from advkit import Lp, ModelError, UsageError, data, evaluate, run
from advkit.adaptive import Adaptive
from advkit.attacks import PGD
from advkit.benchmarks import defense_gan as benchmark
from advkit.benchmarks.result import Evaluation
from advkit.cli import main
from advkit.combine import Expect
from advkit.defenses.inference import DefenseGAN, adaptive, defend
from advkit.defenses.inference import defense_gan as module
from advkit.defenses.inference.defense_gan import Imitation, projected
from advkit.gan import pair
from advkit.gan.source import Own
from advkit.models import checkpoint
from advkit.models.networks import build
from advkit.streams import Streams
from advkit.train import Recipe, train

PIXELS, SCALE = 16, 0.3
RATE = 0.2 * PIXELS / (2 * SCALE**2)


@functools.cache
def basis():
    """Orthonormal rows, with shape (3, 16)."""
    q, _ = torch.linalg.qr(torch.randn(PIXELS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return q.T


def linear():
    """1/2 + SCALE * z Q: what it can draw is an affine subspace."""
    return Own(lambda z: (0.5 + SCALE * z @ basis().to(z.dtype)).view(-1, 1, 4, 4), d=3, shape=(1, 4, 4))


def curved():
    """The sigmoid of three linear maps of different scales."""
    scales = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    return Own(lambda z: (z * scales.to(z.dtype) @ basis().to(z.dtype)).sigmoid().view(-1, 1, 4, 4), d=3, shape=(1, 4, 4))


def classes():
    """A grey of each of five classes, and a slope across that the code says."""
    ramp = torch.linspace(-0.1, 0.1, 4)

    def draw(z, y):
        return (0.1 + 0.2 * y.view(-1, 1, 1, 1) + z.tanh().view(-1, 1, 1, 1) * ramp.to(z)).expand(-1, 1, 4, 4)

    return Own(draw, d=1, shape=(1, 4, 4), classes=5)


def sprawling():
    """As large as digits, for the contract of defenses."""
    a = torch.randn(6, 784, generator=torch.Generator().manual_seed(0))
    return Own(lambda z: (z @ a.to(z)).sigmoid().view(-1, 1, 28, 28), d=6, shape=(1, 28, 28))


def digits():
    """What is common to digits: their mean and 30 principal directions, through a sigmoid."""
    x, _ = data.load("mnist-5k", split="train", limit=2000).batch(0, 2000)
    flat = x.flatten(1)
    mean = flat.mean(0)
    _, s, directions = torch.linalg.svd(flat - mean, full_matrices=False)
    scaled = (s[:30] / len(x) ** 0.5).unsqueeze(1) * directions[:30]
    return Own(lambda z: (6 * (mean.to(z) + z @ scaled.to(z) - 0.4)).sigmoid().view(-1, 1, 28, 28), d=30, shape=(1, 28, 28))


def wide():
    return Own(lambda z: z.tanh().view(-1, 1, 2, 2), d=4, shape=(1, 2, 2), low=-1.0)


def everything():
    return Own(lambda z: (4 * z).sigmoid().view(-1, 1, 2, 2), d=4, shape=(1, 2, 2))


def broken():
    return Own(lambda z: (0 * z / 0).view(-1, 1, 2, 2), d=4, shape=(1, 2, 2))


def nothing():
    return 3


def gan(source, **settings):
    return DefenseGAN(f"{__name__}:{source}", **settings)


def shown(change, x, seed=0):
    return change.exact(x, Streams.seeded(seed, range(len(x))))


def images(n=4, seed=0, dtype=torch.float64):
    return 0.3 + 0.4 * torch.rand((n, 1, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_a_linear_generator_is_projected_on():
    x = images()
    q = basis()
    wanted = 0.5 + (x.flatten(1) - 0.5) @ q.T @ q
    found = shown(gan("linear", lr=RATE, restarts=2), x)
    torch.testing.assert_close(found.flatten(1), wanted, rtol=0, atol=1e-5)
    # What lies on it stays, so a search cannot take back what an attack does there.
    torch.testing.assert_close(shown(gan("linear", lr=RATE), found), found, rtol=0, atol=1e-5)


def test_steps_come_closer():
    x = images(8)
    errors = [(shown(gan("curved", steps=steps, lr=5.0), x) - x).square().mean((1, 2, 3)) for steps in (1, 10, 100)]
    assert bool((errors[0] > errors[1]).all())
    assert bool((errors[1] > errors[2]).all())


def test_the_best_start_is_kept_and_starts_go_over_the_classes():
    y = torch.tensor([3, 0, 4, 1, 2])
    slope = torch.linspace(-0.05, 0.05, 4, dtype=torch.float64)
    x = (0.1 + 0.2 * y.view(-1, 1, 1, 1) + slope).expand(-1, 1, 4, 4)
    every = gan("classes", steps=300, restarts=5, lr=50.0)
    torch.testing.assert_close(shown(every, x), x, rtol=0, atol=1e-3)
    assert every.shorter().restarts == 5
    # Of three starts, whichever classes they have, one at most is right.
    grey = (shown(gan("classes", steps=300, restarts=3, lr=50.0), x).mean((1, 2, 3)) - 0.1) / 0.2
    torch.testing.assert_close(grey, grey.round(), rtol=0, atol=1e-3)


def test_rows_do_not_know_their_batch(monkeypatch):
    x = images(7, dtype=torch.float32)
    change = gan("curved", steps=10, restarts=3)
    whole = shown(change, x)
    torch.testing.assert_close(shown(change, x[:3]), whole[:3], rtol=0, atol=1e-6)
    monkeypatch.setattr(module, "ROWS", 6)
    torch.testing.assert_close(shown(change, x), whole, rtol=0, atol=1e-6)
    # The same input draws other starts in another row.
    same = shown(gan("curved", steps=1, restarts=1), x[:1].expand(3, -1, -1, -1))
    assert len(same.unique(dim=0)) == 3


def test_answers_come_from_the_dice():
    x = images(3)
    change = gan("curved", steps=2)
    assert torch.equal(shown(change, x), shown(change, x))
    assert not torch.equal(shown(change, x), shown(change, x, seed=1))
    models = [defend(nn.Flatten(), change) for _ in range(2)]
    answers = [[model(x) for _ in range(2)] for model in models]
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.equal(answers[0][1], answers[1][1])
    assert not torch.equal(answers[0][0], answers[0][1])
    other = defend(nn.Flatten(), gan("curved", steps=2, seed=5))
    assert not torch.equal(other(x), answers[0][0])


def test_starts_are_near_the_middle_of_the_prior():
    """The mean of d draws: of a standard normal N(0, 1/d), of [0, 1) about 1/2."""
    change = gan("sprawling", restarts=2000)
    z, y = change._starts(torch.zeros(2, 1, 28, 28), Streams.seeded(0, range(2)))
    assert z.shape == (2, 2000, 6)
    assert float(z.var()) == pytest.approx(1 / 6, rel=0.05)
    assert not y.any()


def test_products_with_the_derivative_are_those_of_its_matrix():
    draw, lam = curved().generator, 0.05
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    g = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = projected(draw, z, g, lam)
    for code, gradient, row in zip(z, g, found, strict=True):
        j = torch.autograd.functional.jacobian(lambda one: draw(one.unsqueeze(0)).flatten(), code)
        wanted = j @ torch.linalg.solve(j.T @ j + lam * torch.eye(3, dtype=j.dtype), j.T @ gradient.flatten())
        torch.testing.assert_close(row.flatten(), wanted, rtol=1e-9, atol=1e-12)
    assert not projected(draw, z, torch.zeros_like(g), lam).any()


def slope(change, x, g, h=1e-4):
    """The gradient of <g, t(x)> for one x by central differences, with the same dice throughout."""
    steps = h * torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape[1:])
    around = torch.cat([x + steps, x - steps])
    values = (change.exact(around, Streams(Streams.seeded(0, [0]).keys.expand(len(around)))) * g).sum((1, 2, 3))
    return ((values[: x.numel()] - values[x.numel() :]) / (2 * h)).view_as(x)


@pytest.mark.parametrize(("source", "lr", "steps", "off"), [("linear", RATE, 200, 0.02), ("curved", 3.0, 40, 0.25)])
def test_the_guides_gradient_is_that_of_the_search(source, lr, steps, off):
    x, g = images(1, seed=3), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = gan(source, lr=lr, steps=steps, restarts=1)
    z = x.clone().requires_grad_(True)
    drawn = change.guide(z, Streams.seeded(0, [0]))
    torch.testing.assert_close(drawn.detach(), shown(change, x), rtol=0, atol=1e-12)
    (given,) = torch.autograd.grad((g * drawn).sum(), z)
    wanted = slope(change, x, g)
    assert float((given - wanted).norm()) < off * float(wanted.norm())
    assert float((g - wanted).norm()) > 2 * off * float(wanted.norm())


def test_by_itself_it_has_no_gradient():
    x = images(2).requires_grad_(True)
    (g,) = torch.autograd.grad(shown(gan("curved", steps=3), x).sum(), x)
    assert not g.any()


@pytest.fixture(scope="module")
def network():
    """A network that tells digits apart, behind what is common to digits; and digits that it gets right so."""
    with torch.random.fork_rng(devices=[]):
        network = train(build("mnist-mlp(width=32)"), data.load("mnist-5k", split="train", limit=2000), Recipe(epochs=3))
    x, y = data.load("mnist-5k", limit=60).batch(0, 60)
    right = defend(network.eval(), gan("digits", steps=40, restarts=1))(x).argmax(1) == y
    assert int(right.sum()) > 40
    return network, x[right][:24], y[right][:24]


def test_an_adaptive_attack_takes_what_a_naive_one_leaves(network):
    module_, x, y = network
    defended = defend(module_, gan("digits", steps=40, restarts=1))
    result = evaluate(defended, (x, y), threat="linf(0.2)", attacks="pgd(steps=8)", votes=1)
    assert result.robust_accuracy_naive.value > 0.8
    assert result.robust_accuracy.value < result.robust_accuracy_naive.value - 0.3


def test_what_an_attack_is_told():
    defended = defend(nn.Flatten(), gan("curved", steps=9, restarts=4))
    made = defended.adaptive(PGD(2))
    assert isinstance(made, Expect)
    assert isinstance(made.attack, Adaptive)
    (imitation,) = (part for part in made.attack.model.modules() if isinstance(part, Imitation))
    assert (imitation.gan.steps, imitation.gan.restarts) == (5, 1)
    assert (defended.filter.change.steps, defended.filter.change.restarts) == (9, 4)
    assert adaptive(defended, made) is made


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defense-gan", "needs a value for generator"),
        ("defense-gan('none.safetensors')", "there is no file none.safetensors; advkit gan train writes a generator"),
        ("defense-gan('none.pt')", "'none.pt' names no generator"),
        (f"defense-gan('{__name__}:wide')", r"draws samples in \[-1, 1\] and the data are in \[0, 1\]"),
        (f"defense-gan('{__name__}:broken')", "drew NaN or infinite values; samples should be finite"),
        (f"defense-gan('{__name__}:nothing')", "is no source of samples"),
        (f"defense-gan('{__name__}:linear', steps=0)", "steps is 0; it should be at least 1"),
        (f"defense-gan('{__name__}:linear', restarts=0)", "restarts is 0"),
        (f"defense-gan('{__name__}:linear', lr=0)", "lr is 0"),
        (f"defense-gan('{__name__}:linear', seed=-1)", "seed is -1"),
    ],
)
def test_bad_settings(text, said):
    with pytest.raises(UsageError, match=said):
        defend(nn.Flatten(), text)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ModelError, match=r"draws images of shape \(1, 4, 4\) and the inputs have \(1, 5, 4\); both should"):
        defend(nn.Flatten(), gan("linear"))(torch.rand(2, 1, 5, 4))
    threat = Lp(math.inf, 0.1)
    with pytest.raises(ModelError, match="both should be the same"):
        run(PGD(2), defend(nn.Flatten(), gan("linear")), torch.rand(2, 3, 4, 4), torch.tensor([0, 1]), threat)


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    """A checkpoint, and a small generator that has learned nothing."""
    folder = tmp_path_factory.mktemp("defense_gan")
    checkpoint.save(folder / "m.safetensors", network[0], "mnist-mlp(width=32)")
    parts = pair.build("dcgan(d=8, width=4)", (1, 28, 28), 10)
    names = tuple(map(str, range(10)))
    pair.save(folder / "g.safetensors", pair.Pair(parts[0], (1, 28, 28), 0.0, 1.0, names, 10, *parts[1:]))
    return folder


def test_between_drawings_succeeds_where_the_ball_reaches_another_class():
    # Everything is a drawing, and the classes meet in a plane: the closest input of another class is known.
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, -2.0, 1.0, 4.0]]))
        network[1].bias.copy_(torch.tensor([0.0, -3.0]))
    everything = DefenseGAN(f"{__name__}:everything", steps=50)
    x = torch.rand(50, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y, threat = network(x).argmax(1), Lp(math.inf, 0.1)
    x_adv = benchmark.between(network, everything, x, y, threat, seed=0)
    assert threat.allows(x_adv, x).all()
    margins = (network(x)[:, 1] - network(x)[:, 0]).abs() / 10
    found = network(x_adv).argmax(1) != y
    assert not found[margins > 0.1].any()
    assert found[margins < 0.08].all()
    assert 5 < int(found.sum()) < 45


def test_between_drawings_of_classes_stays_in_the_ball_and_moves():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.zeros(16), torch.ones(16)]))
        network[1].bias.copy_(torch.tensor([0.0, -8.0]))
    x, threat = torch.full((2, 1, 4, 4), 0.4), Lp(math.inf, 0.2)
    x_adv = benchmark.between(network, DefenseGAN(f"{__name__}:classes"), x, torch.tensor([0, 0]), threat, seed=0)
    assert threat.allows(x_adv, x).all()
    assert (network(x_adv).argmax(1) == 1).all()


def test_another_generator_is_another_model(files):
    one = DefenseGAN(str(files / "g.safetensors"))
    parts = pair.build("dcgan(d=8, width=4)", (1, 28, 28), 10, seed=1)
    pair.save(files / "h.safetensors", pair.Pair(parts[0], (1, 28, 28), 0.0, 1.0, (), 10, *parts[1:]))
    assert one == DefenseGAN(str(files / "g.safetensors"))
    assert one.digest != DefenseGAN(str(files / "h.safetensors")).digest
    assert one.digest in repr(defend(nn.Flatten(), one))


def test_the_command_line(files, tmp_path, capsys):
    defense = f'defense-gan("{files / "g.safetensors"}", steps=20, restarts=2)'
    words = ["attack", "--model", str(files / "m.safetensors"), "--defend", defense, "--data", "mnist-5k"]
    words += ["--threat", "linf(0.3)", "--limit", "8", "--attack", "pgd(steps=2)", "--pictures", "0"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "most of 5 answers decide" in said
    result = Evaluation.load(tmp_path / "run")
    assert result.run["attacks"] == ["pgd(steps=2)", "adaptive pgd(steps=2)"]
    assert result.run["model"]["name"].endswith(f"behind {defense}")
    words[words.index("--defend") + 1] = f'defense-gan("{__name__}:linear")'
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "draws images of shape (1, 4, 4) and the inputs have (1, 28, 28)" in error
    assert error.count("\n") == 1


def test_the_benchmark(files, monkeypatch, capsys):
    words = [
        "--generator",
        f"{__name__}:digits",
        "--model",
        str(files / "m.safetensors"),
        "--data",
        "mnist-5k",
        "--limit",
        "24",
    ]
    words += ["--eps", "0.15", "--steps", "30", "--restarts", "1", "--attack-steps", "8", "--tries", "2", "--queries", "3"]
    monkeypatch.setattr("sys.argv", ["defense_gan", *words])
    benchmark.main()
    _head, _rule, *lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]
    accuracy = {name: float(cell.split(" %")[0]) for name, cell, _ in rows}
    assert list(accuracy) == [
        "none",
        "pgd, without the defense",
        "fgsm of the network",
        "pgd of the network",
        "pgd as it is",
        "square",
        "adaptive: the identity",
        "adaptive: the projection",
        "adaptive: between drawings",
        "naive",
        "all",
    ]
    assert accuracy["pgd, without the defense"] < 20
    assert accuracy["adaptive: the projection"] < min(accuracy["pgd as it is"], accuracy["square"]) - 30
    assert accuracy["all"] <= min(accuracy[name] for name in list(accuracy) if name != "pgd, without the defense")
