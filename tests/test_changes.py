"""Threat models whose adversary changes the whole image: what they make of it, and the way from a spec to records."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from advkit import Colour, Evaluation, Flow, Lp, Masked, Rotation, Sticker, evaluate, perturb, run, spec
from advkit.attacks import FGSM, PGD, Grid, Square, Uniform
from advkit.benchmarks.plan import plan
from advkit.benchmarks.suites import FEW
from advkit.cli import main
from advkit.data import from_tensors, load
from advkit.errors import UsageError
from advkit.models import checkpoint, wrap
from advkit.models.networks import build
from advkit.oracle import Access
from advkit.streams import Streams
from advkit.threat import CHANGES, THREATS
from advkit.train import Recipe, train

RANGES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-2.1179, 2.64)]
SHAPES = [(1, 8, 8), (3, 7, 10), (4, 1, 5)]
NETWORK = "mnist-mlp(width=32)"


def changes(low=0.0, high=1.0):
    box = {"low": low, "high": high}
    mask = torch.eye(10, dtype=torch.bool)
    return [
        Rotation(**box),
        Rotation(50, 0.2, 0.3, "edge", **box),
        Rotation(0, 0.3, **box),
        Flow(1.7, **box),
        Colour(**box),
        Colour(0, 0.5, hue=0, **box),
        Sticker(0.2, 0.3, 0.4, 0.35, **box),
        Sticker(0.9, 0.0, 0.1, 0.01, radius=0.1 * (high - low), **box),
        Masked(mask, **box),
    ]


def images(shape=(3, 10, 10), n=3, low=0.0, high=1.0, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (low + (high - low) * torch.rand(n, *shape, generator=rng, dtype=torch.float64)).to(dtype)


def start(change, x, seed=0):
    return change.ball.start(change.zero(x), Streams.seeded(seed, range(len(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), RANGES)
def test_no_change_is_the_image_itself(low, high, dtype):
    for change in changes(low, high):
        for shape in SHAPES if not isinstance(change, Masked) else [(2, 10, 10)]:
            x = images(shape, low=low, high=high, dtype=dtype).clamp(low, high)
            z = change.apply(x, change.zero(x))
            assert z.dtype == dtype
            assert float((z - x).abs().max()) <= 1e-6 * (high - low) * (1 if isinstance(change, Colour) else 0), change


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=st.integers(0, 10_000), which=st.integers(0, 8), extent=st.sampled_from(RANGES))
@settings(max_examples=60, deadline=None)
def test_changed_images_are_in_the_range_and_rows_are_independent(dtype, seed, which, extent):
    change = changes(*extent)[which]
    x = images((3, 10, 10), low=extent[0], high=extent[1], dtype=dtype, seed=seed).clamp(*extent)
    # Saturated pixels, where a sum of weights that is not quite 1 would leave the range.
    x[0] = extent[seed % 2]
    x = x.clamp(*torch.tensor(extent, dtype=dtype).tolist())
    theta = start(change, x, seed)
    z = change.apply(x, theta)
    assert z.shape == x.shape
    low, high = torch.tensor(extent, dtype=dtype).tolist()
    assert float(z.min()) >= low
    assert float(z.max()) <= high
    alone = torch.cat([change.apply(x[i : i + 1], theta[i : i + 1]) for i in range(len(x))])
    assert torch.allclose(alone, z, atol=1e-5 * (high - low))
    on_grid = change.snap(z, x, 255)
    whole = (on_grid - low) * 255 / (high - low)
    assert torch.allclose(whole, whole.round(), atol=1e-3)


@pytest.mark.parametrize("which", range(9))
def test_gradients_are_those_of_finite_differences(which):
    """At a place where no pixel is clipped and none is taken from exactly between two others."""
    change, x = changes()[which], 0.3 + 0.4 * images()
    zero = change.zero(x)
    theta = zero + 0.21 * (start(change, x, 5) - zero)
    assert torch.autograd.gradcheck(lambda t: change.apply(x, t), theta.requires_grad_(), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("border", ["black", "edge"])
@pytest.mark.parametrize("turns", [-2, -1, 1, 2])
def test_quarter_turns_are_those_of_torch(turns, border):
    x = images((2, 6, 6))
    change = Rotation(180, 0, border=border)
    z = change.apply(x, torch.full((3, 1), turns / 2, dtype=x.dtype))
    assert torch.allclose(z, x.rot90(turns, (2, 3)), atol=1e-10)


def test_a_shift_by_whole_pixels_moves_the_image():
    x = images((2, 8, 10), low=-1.0)
    right, down = 0.3, 0.25
    black = Rotation(0, 0.5, low=-1.0).apply(x, torch.tensor([[right, -down]] * 3, dtype=x.dtype) / 0.5)
    assert torch.allclose(black[:, :, :6, 3:], x[:, :, 2:, :7])
    assert torch.allclose(black[:, :, 6:], torch.tensor(-1.0, dtype=x.dtype))
    edge = Rotation(0, 0.5, border="edge", low=-1.0).apply(x, torch.tensor([[right, 0.0]] * 3, dtype=x.dtype) / 0.5)
    assert torch.allclose(edge[..., :3], x[..., :1].expand(-1, -1, -1, 3))


def test_scale_grows_the_image_about_its_centre():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 3:6, 3:6] = 1.0
    larger, smaller = (Rotation(0, 0, 0.5).apply(x, torch.tensor([[t]])) for t in (1.0, -1.0))
    assert float(larger.sum()) > 1.5 * float(x.sum()) > 3 * float(smaller.sum())
    assert torch.allclose(larger, larger.flip(2, 3), atol=1e-6)


def test_a_constant_flow_moves_the_image_and_any_flow_is_smooth():
    x, change = images((2, 12, 12)), Flow(2.0, smooth=1.6)
    theta = change.zero(x)
    theta[:, 0] = 2.0
    assert torch.allclose(change.apply(x, theta)[:, :, :10], x[:, :, 2:])
    ramp = torch.arange(12.0, dtype=x.dtype).expand(1, 1, 12, 12)
    rough = torch.where(torch.arange(12) < 6, 2.0, -2.0).to(x.dtype).expand(1, 2, 12, 12)
    taken = Flow(2.0, smooth=1.6, high=11.0).apply(ramp, rough)
    assert float((taken - ramp).abs().max()) <= 2.0
    assert bool((taken.diff(dim=3) >= 0).all())


def test_each_colour_does_what_it_says():
    x = 0.3 + 0.4 * images((3, 5, 5))
    one = torch.ones(3, 1, dtype=x.dtype)
    only = {"brightness": 0, "contrast": 0, "gamma": 0, "saturation": 0, "hue": 0}

    def apply(**given):
        return Colour(**{**only, **given}).apply(x, one)

    assert torch.allclose(apply(brightness=0.1), x + 0.1)
    assert torch.allclose(apply(contrast=0.2).std((1, 2, 3)), 1.2 * x.std((1, 2, 3)))
    assert torch.allclose(apply(gamma=1.0), x**2)
    assert torch.allclose(apply(hue=120), x.roll(1, 1))
    grey = Colour(**{**only, "saturation": 1.0}).apply(x, -one)
    assert torch.allclose(grey, (0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]).expand_as(x))
    assert Colour().zero(x[:, :1]).shape == (3, 3)
    assert Colour().zero(x).shape == (3, 5)


def test_outside_of_a_sticker_and_a_mask_no_bit_changes():
    x = images((3, 10, 10), n=4, dtype=torch.float32)
    model = lambda z: torch.stack([z.mean((1, 2, 3)), 1 - z.mean((1, 2, 3))], 1)
    y = model(x).argmax(1)
    inside = torch.zeros(10, 10, dtype=torch.bool)
    inside[2:6, 3:7] = True
    for threat in (Sticker(0.2, 0.3, 0.4, 0.4), Masked(inside)):
        for attack in (PGD(10), Square(20)):
            result = run(attack, model, x, y, threat)
            assert result.success.any()
            assert torch.equal(result.x_adv[..., ~inside], x[..., ~inside])
            assert not torch.equal(result.x_adv, x)
        last = perturb(PGD(3), model, x, y, threat, rng=torch.Generator().manual_seed(0))
        assert torch.equal(last[..., ~inside], x[..., ~inside])
    near = run(PGD(10), model, x, y, Sticker(0.2, 0.3, 0.4, 0.4, radius=0.05))
    assert float((near.x_adv - x).abs().max()) <= 0.05 + 1e-6


def test_a_sticker_is_as_strong_as_the_ball_it_is():
    """With all pixels inside, an attack on a sticker is the attack on the l_inf ball."""
    x = images((1, 6, 6), n=8)
    w = torch.randn(36, 2, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    model = lambda z: z.flatten(1) @ w
    y = model(x).argmax(1)
    ball, sticker = (run(PGD(5), model, x, y, threat) for threat in (Lp(math.inf, 0.1), Sticker(0, 0, 1, 1, radius=0.1)))
    assert torch.equal(ball.x_adv, sticker.x_adv)
    assert torch.equal(ball.distance, sticker.distance)


def test_a_mask_of_features():
    x, mask = torch.rand(5, 7), torch.tensor([True, False, True, False, False, False, True])
    model = lambda z: torch.stack([z.sum(1), 3.5 + 0 * z[:, 0]], 1)
    result = run(FGSM(), model, x, model(x).argmax(1), Masked(mask))
    assert result.change.shape == (5, 3)
    assert torch.equal(result.x_adv[:, ~mask], x[:, ~mask])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Rotation(-1), "rotation: angle is -1; it should be at least 0"),
        (lambda: Rotation(border="red"), "border"),
        (lambda: Rotation(scale=1.0), "less than 1"),
        (lambda: Rotation(0, 0), "no limit greater than 0"),
        (lambda: Colour(0, 0, 0), "no limit greater than 0 that applies to images of 1 channels"),
        (lambda: Rotation(low=-math.inf), "needs finite numbers"),
        (lambda: Flow(0.0), "flow: radius is 0.0"),
        (lambda: Flow(1.0, -1.0), "flow: smooth is -1.0"),
        (lambda: Colour(contrast=-0.1), "colour: contrast is -0.1"),
        (lambda: Sticker(0.5, 0.0, 0.6, 0.1), "top is 0.5 and height is 0.6"),
        (lambda: Sticker(0.5, 0.0, 0.1, 0.0), "left is 0.0 and width is 0.0"),
        (lambda: Sticker(0, 0, 1, 1, radius=0), "sticker: radius is 0"),
        (lambda: Masked(torch.zeros(3, 3, dtype=torch.bool)), "at least one entry is True"),
        (lambda: Masked(torch.ones(3, 3)), "of type bool"),
        (lambda: Masked(torch.ones(3, 3, dtype=torch.bool)), r"the mask has shape \(3, 3\)"),
    ],
)
def test_what_is_refused(make, sentence):
    with pytest.raises(UsageError, match=sentence):
        make().zero(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("change", [Rotation(), Flow(), Colour(), Sticker(0, 0, 1, 1)])
def test_what_is_no_image_is_refused_before_anything_runs(change):
    x, y = torch.rand(4, 9), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"shape \(4, 9\); this threat model changes images, \(N, C, H, W\)"):
        run(FGSM(), nn.Linear(9, 2), x, y, change)
    with pytest.raises(UsageError, match="this threat model changes images"):
        plan(wrap(nn.Linear(9, 2)), from_tensors(x, y), threat=change)


def test_specs_and_reprs():
    needed = {"sticker": "(top=0.2, left=0.3, height=0.2, width=0.4)", "latent": '(source="g.safetensors")'}
    for name in CHANGES:
        text = name + needed.get(name, "")
        threat = spec.parse(text, THREATS, "threat")
        assert spec.show(threat, THREATS) == text
    assert spec.parse("rotation(20, 0)", THREATS, "threat") == Rotation(20, 0)
    a, b = (Masked(torch.arange(9).view(3, 3) < n) for n in (4, 5))
    assert repr(a) != repr(b)
    assert "4 of 9 entries" in repr(a)


CORNER = torch.zeros(9, 9)
CORNER[:3, :3] = 1.0


def corner(z):
    """Two classes: whether most of the light is in the first corner; wrong for a far turn, and for nothing less."""
    light = (z[:, 0] * CORNER.to(z)).sum((1, 2)) / z[:, 0].sum((1, 2)).clamp(min=1e-6)
    return torch.stack([light, 0.3 + 0 * light], 1)


def test_more_tries_find_more_and_the_grid_most():
    x = torch.zeros(40, 1, 9, 9)
    rng = torch.Generator().manual_seed(0)
    x[:, 0, :3, :3] = 0.2 + 0.8 * torch.rand(40, 3, 3, generator=rng)
    y = torch.zeros(40, dtype=torch.int64)
    found = [int(run(attack, corner, x, y, Rotation(30, 0.15)).success.sum()) for attack in (Uniform(1), Uniform(10), Grid())]
    assert found == sorted(found)
    assert found[0] < found[1] <= found[2]


def test_the_grid_has_every_point_once_and_says_what_it_cannot_search():
    points = Grid(775)._points(3)
    assert len(points) == 729
    assert len(points.unique(dim=0)) == 729
    assert [len(Grid(775)._points(d)) for d in (1, 2, 4, 5, 6)] == [775, 729, 625, 243, 729]
    assert [Grid(n).dimensions for n in (3, 8, 9, 728, 729, 775)] == [1, 1, 2, 5, 6, 6]
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(UsageError, match="grid: 16 numbers are to be searched; with n = 775 points it can be at most 6"):
        run(Grid(), lambda z: z.flatten(1)[:, :2], x, torch.zeros(2, dtype=torch.int64), Lp(math.inf, 0.1))


def test_the_grid_counts_its_points():
    x = torch.rand(3, 1, 5, 5)
    result = run(
        Grid(27), lambda z: torch.stack([1 + 0 * z[:, 0, 0, 0], 0 * z[:, 0, 0, 0]], 1), x, x[:, 0, 0, 0].long(), Rotation()
    )
    # The engine looks at the last one again.
    assert result.forwards.tolist() == [28, 28, 28]
    assert not result.success.any()


def test_attacks_where_none_is_named():
    x = torch.rand(6, 1, 8, 8)
    data, model = from_tensors(x, torch.zeros(6, dtype=torch.int64)), wrap(nn.Sequential(nn.Flatten(), nn.Linear(64, 2)))
    for access in Access:
        names = [name for name, _ in plan(model, data, threat="rotation", access=access).attacks]
        assert len(names) == len(FEW[access])
        assert "grid" in names
    assert "grid" not in [name for name, _ in plan(model, data, threat="flow").attacks]
    assert plan(model, data, threat=Sticker(0, 0, 0.5, 0.5, radius=0.1)).threat.radius == 0.1


@pytest.mark.parametrize("threat", ["rotation(40)", "flow(2)", "colour(0.5)", "sticker(0.2, 0.2, 0.5, 0.5)"])
def test_evaluations_of_8_bit_images(threat):
    rng = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 1, 9, 9), generator=rng).byte()
    w = torch.randn(81, 3, generator=rng)
    model = lambda z: z.flatten(1) @ w
    y = model(x.float() / 255).argmax(1)
    result = evaluate(model, (x, y), threat=threat, attacks=["uniform(n=5)", "pgd(steps=10)"], batch_size=5)
    tensors, change = result.examples(), spec.parse(threat, THREATS, "threat")
    broken = torch.tensor([row["success"] for row in result.rows])
    assert broken.any()
    assert torch.equal(model(tensors["x_adv"]).argmax(1) != y, broken)
    assert torch.allclose(change.apply(tensors["x"], tensors["change"]), tensors["x_adv"], atol=1e-6)
    works = torch.tensor([row["success_8bit"] for row in result.rows])
    assert works.any()
    assert torch.equal(model(tensors["x_8bit"] / 255).argmax(1) != y, works)
    assert not result.minimum
    assert result.summary()["curve"] is None


def test_an_evaluation_does_not_depend_on_its_batches_and_goes_on(tmp_path):
    x, y = images((1, 9, 9), n=9, dtype=torch.float32), torch.arange(9) % 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(81, 2))
    options = {"threat": "rotation(60, 0.2)", "attacks": ["uniform(n=3)", "pgd(steps=4)"]}
    one, two = (evaluate(model, (x, y), batch_size=size, **options) for size in (2, 9))
    assert [row["success"] for row in one.rows] == [row["success"] for row in two.rows]
    assert torch.allclose(one.examples()["x_adv"], two.examples()["x_adv"], atol=1e-6)
    evaluate(model, (x, y), out=tmp_path / "run", **options)
    again = evaluate(model, (x, y), out=tmp_path / "run", **options)
    assert again.robust_accuracy == two.robust_accuracy
    assert Evaluation.load(tmp_path / "run").examples()["change"].shape == (9, 3)


def test_an_evaluation_with_a_mask_says_which():
    x, y = images((1, 9, 9), n=4, dtype=torch.float32), torch.zeros(4, dtype=torch.int64)
    mask = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    result = evaluate(lambda z: z.flatten(1)[:, :2], (x, y), threat=Masked(mask), attacks="fgsm")
    assert result.run["threat"].startswith("Masked(mask=")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    with torch.random.fork_rng(devices=[]):
        checkpoint.save(path, train(build(NETWORK), load("mnist-5k", split="train"), Recipe(epochs=2)), NETWORK)
    return path


def test_the_command(digits, tmp_path, capsys):
    out = tmp_path / "run"
    command = ["attack", "--model", str(digits), "--data", "mnist-5k", "--limit", "12", "--threat", "rotation(30)"]
    assert main([*command, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "size of the change" in printed
    assert "grid" in printed
    assert json.loads((out / "summary.json").read_text())["run"]["threat"] == "rotation"
    assert list((out / "pictures").iterdir())
    assert main([*command[:-1], "sticker(0.9, 0.9, 0.9, 0.9)"]) == 2
    assert "their sum is at most 1" in capsys.readouterr().err
    assert main(["list", "threats"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in THREATS)


def test_training_against_rotations(tmp_path, capsys):
    out = tmp_path / "r.safetensors"
    command = ["train", "--model", NETWORK, "--data", "mnist-5k", "--limit", "64", "--epochs", "1", "--out", str(out)]
    assert main([*command, "--defense", "pgd(steps=2)", "--threat", "rotation(30)"]) == 0
    assert "clean accuracy" in capsys.readouterr().out
    assert out.exists()
