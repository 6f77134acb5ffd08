import io
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from advkit import Lp, UsageError, data, evaluate, models, run, spec
from advkit.adaptive import Adaptive
from advkit.attacks import PGD, RayS
from advkit.benchmarks import defended
from advkit.benchmarks.plan import NAIVE, SAME, plan
from advkit.benchmarks.result import Evaluation
from advkit.cli import main
from advkit.combine import Expect
from advkit.data import from_tensors
from advkit.defenses.inference import (
    INFERENCE,
    JPEG,
    BitDepth,
    DeepImagePrior,
    DefenseGAN,
    Median,
    Moving,
    MovingTarget,
    ResizePad,
    Smoothing,
    TotalVariation,
    defend,
)
from advkit.defenses.inference.total_variation import _differences
from advkit.models import checkpoint
from advkit.models.networks import build
from advkit.streams import Streams
from advkit.train import Recipe, train

# For images of the shape that it draws, 28 x 28 in grey; the others take any.
GAN = DefenseGAN("tests.test_defense_gan:sprawling", steps=3, restarts=2)
QUICK = [
    JPEG(),
    BitDepth(),
    Median(),
    TotalVariation(steps=10),
    ResizePad(),
    Smoothing(n=2),
    DeepImagePrior(steps=3, width=4),
    MovingTarget(),
    GAN,
]
CHANGES = [one for one in QUICK if hasattr(one, "exact")]
DRAWING = [TotalVariation(steps=10), ResizePad(), Smoothing(n=2), DeepImagePrior(steps=3, width=4), MovingTarget(), GAN]


def images(n=4, channels=3, height=20, width=13, seed=0):
    return torch.rand((n, channels, height, width), generator=torch.Generator().manual_seed(seed))


def pictures(defense, n, channels=3):
    """Images that a defense takes."""
    return images(n, 1, 28, 28) if defense is GAN else images(n, channels)


def shown(change, x, seed=0):
    """What a model behind a change is shown."""
    return change.exact(x, Streams.seeded(seed, range(len(x))))


class Flat(nn.Module):
    """The input as the logits."""

    def forward(self, x):
        return x.flatten(1)


@pytest.fixture(scope="module")
def digits():
    """A network of one dense layer that tells digits apart, and 40 digits that it gets right."""
    with torch.random.fork_rng(devices=[]):
        network = train(build("mnist-mlp(width=32)"), data.load("mnist-5k", split="train", limit=2000), Recipe(epochs=3))
    x, y = data.load("mnist-5k", limit=80).batch(0, 80)
    right = network.eval()(x).argmax(1) == y
    return network, x[right][:40], y[right][:40]


def test_jpeg_is_pillows():
    x = (255 * F.interpolate(images(4, 3, 6, 6), (32, 32), mode="bilinear")).round() / 255
    for image, ours in zip(x, shown(JPEG(60), x), strict=True):
        file = io.BytesIO()
        pixels = (255 * image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=60)
        theirs = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255
        assert float((ours - theirs).abs().mean()) < 1 / 255 < float((theirs - image).abs().mean())


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth_is_the_nearest_of_its_levels(bits):
    x = images()
    levels = torch.linspace(0, 1, 2**bits)
    z = shown(BitDepth(bits), x)
    torch.testing.assert_close((z - x).abs(), (x.unsqueeze(-1) - levels).abs().min(-1).values)
    assert len(z.unique()) <= 2**bits


@settings(max_examples=40, deadline=None)
@given(size=st.integers(2, 6), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 99))
def test_median_is_scipys(size, height, width, seed):
    x = images(2, 2, height, width, seed)
    theirs = ndimage.median_filter(x.numpy(), size=(1, 1, size, size))
    torch.testing.assert_close(shown(Median(size), x), torch.from_numpy(theirs), rtol=0, atol=0)


def energy(z, x, weight):
    return 0.5 * (z - x).square().sum((1, 2, 3)) + weight * _differences(z).square().sum(0).sqrt().sum((1, 2, 3))


@settings(max_examples=8, deadline=None)
@given(weight=st.floats(0.01, 0.3), seed=st.integers(0, 99))
def test_total_variation_has_the_least_energy(weight, seed):
    x = images(2, 2, 8, 6, seed).double()
    z = shown(TotalVariation(weight, drop=0.0, steps=600), x)
    low = energy(z, x, weight)
    assert bool((low < energy(x, x, weight)).all())
    for way in (x, torch.zeros_like(x), torch.ones_like(x), x.mean((2, 3), keepdim=True).expand_as(x)):
        assert bool((energy(z + 0.01 * (way - z), x, weight) >= low - 1e-4).all())


def test_total_variation_of_a_step_is_a_lower_step():
    """Two plateaus of w entries each come closer by lambda / w (Rudin, Osher and Fatemi in one dimension)."""
    x = torch.tensor([0.2] * 5 + [0.8] * 5).view(1, 1, 1, 10)
    z = shown(TotalVariation(0.1, drop=0.0, steps=2000), x)
    wanted = torch.tensor([0.22] * 5 + [0.78] * 5).view(1, 1, 1, 10)
    torch.testing.assert_close(z, wanted, rtol=0, atol=1e-4)


def test_total_variation_fills_what_is_dropped():
    x = torch.full((1, 1, 12, 12), 0.6)
    change = TotalVariation(0.01, drop=0.5, steps=500)
    torch.testing.assert_close(shown(change, x), x, rtol=0, atol=1e-3)
    torch.testing.assert_close(shown(TotalVariation(0.0, drop=0.0), images()), images())


@settings(max_examples=40, deadline=None)
@given(height=st.integers(5, 12), width=st.integers(5, 12), least=st.floats(0.5, 1), more=st.floats(0, 1))
def test_resize_pad_is_an_interpolation_on_a_field_of_zeros(height, width, least, more):
    x = images(5, 2, height, width) + 0.1
    change = ResizePad(least, least + more)
    z = shown(change, x)
    assert z.shape == (5, 2, *(round(change.most * n) for n in (height, width)))
    for image, whole in zip(z, x, strict=True):
        down, across = (image.sum(0).sum(1) > 0).nonzero(), (image.sum(0).sum(0) > 0).nonzero()
        box = image[:, int(down[0]) : int(down[-1]) + 1, int(across[0]) : int(across[-1]) + 1]
        resized = F.interpolate(whole.unsqueeze(0), box.shape[1:], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(box, resized, rtol=1e-4, atol=1e-5)
        assert box.shape[1] >= round(least * height)
        torch.testing.assert_close(image.sum(), box.sum())


def test_resize_pad_at_full_size_is_the_identity():
    x = images(3, 1, 28, 28)
    assert torch.equal(shown(ResizePad(1.0, 1.0), x), x)


def test_resize_pad_draws_every_size_and_place():
    z = shown(ResizePad(0.75, 1.0), torch.ones(4000, 1, 4, 4))
    boxes = [tuple((one[0] > 0).flatten().nonzero().flatten()[[0, -1]].tolist()) for one in z]
    share = {box: boxes.count(box) / len(boxes) for box in set(boxes)}
    # Half of them in full size, and half of the rest at either of four places.
    assert len(share) == 5
    assert share[0, 15] == pytest.approx(0.5, abs=0.03)
    assert min(share.values()) == pytest.approx(0.125, abs=0.03)


def test_smoothing_is_the_mean_of_probabilities():
    """Of a linear model of two classes, E sigmoid(m + s g): with probits in place of sigmoids it would be in closed form."""
    x = torch.tensor([[0.3], [-1.0], [2.0]]).repeat(1, 2).view(3, 1, 1, 2) * torch.tensor([1.0, 0.0])
    said = defend(Flat(), Smoothing(0.8, n=4_000))(x).softmax(1)
    g, weights = (torch.from_numpy(part).float() for part in np.polynomial.hermite_e.hermegauss(60))
    # Both logits are noisy: their difference has twice the variance.
    wanted = (torch.sigmoid(x[:, 0, 0, :1] + 0.8 * 2**0.5 * g) * weights).sum(1) / weights.sum()
    torch.testing.assert_close(said[:, 0], wanted, rtol=0, atol=0.03)


def test_a_deep_image_prior_comes_closer_with_its_steps():
    x = F.avg_pool2d(images(3, 2, 13, 14), 5, 1, 2)
    errors = [(shown(DeepImagePrior(steps, 8), x) - x).square().mean((1, 2, 3)) for steps in (1, 30, 150)]
    assert bool((errors[0] > errors[1]).all())
    assert bool((errors[1] > errors[2]).all())
    assert float(errors[2].max()) < 0.1 * float(x.var())


def test_a_deep_image_prior_learns_each_image_alone():
    x = images(3, 1, 8, 8)
    change = DeepImagePrior(5, 4)
    torch.testing.assert_close(shown(change, x)[:1], shown(change, x[:1]), rtol=1e-3, atol=1e-4)


def test_a_moving_target_asks_each_member_as_often():
    members = [lambda z, i=i: F.one_hot(torch.full((len(z),), i), 3).float() for i in range(3)]
    x = torch.zeros(3000, 1, 2, 2)
    said = Moving(members, 1)(x).argmax(1)
    counts = said.bincount(minlength=3)
    assert counts.sum() == 3000
    assert int(counts.min()) > 900
    # A row's answer is that of its own input.
    numbered = torch.arange(50.0).view(50, 1, 1, 1).expand(50, 1, 1, 2)
    assert torch.equal(Moving([Flat(), Flat()])(numbered), Flat()(numbered))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_shape_and_range_are_kept(change, channels):
    x = pictures(change, 3, channels)
    z = shown(change, x)
    assert z.shape == x.shape
    assert z.dtype == x.dtype
    assert float(z.min()) >= 0
    assert float(z.max()) <= 1


@pytest.mark.parametrize("defense", QUICK, ids=repr)
def test_answers_come_from_the_seed_and_not_from_the_global_state(defense):
    x = pictures(defense, 6)
    first, second = defend(Flat(), defense), defend(Flat(), defense)
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        answers = [first(x).clone() for _ in range(2)]
    torch.manual_seed(7)
    torch.testing.assert_close(torch.stack([second(x) for _ in range(2)]), torch.stack(answers))
    assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(7).get_state())
    torch.random.set_rng_state(before)
    assert torch.equal(answers[0], answers[1]) == (defense not in DRAWING)


@pytest.mark.parametrize("defense", DRAWING, ids=repr)
def test_inputs_of_a_batch_draw_alone(defense):
    x = pictures(defense, 1).expand(8, -1, -1, -1)
    whole = defend(Flat(), defense)(x)
    assert len(whole.unique(dim=0)) > 1
    torch.testing.assert_close(defend(Flat(), defense)(x[:3]), whole[:3], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("defense", QUICK, ids=repr)
def test_what_an_attack_is_told(defense, digits):
    """Gradients that are 0 are replaced, draws averaged, and the model is left as it was."""
    network, x, _ = digits
    model = defend(network, defense)
    made = model.adaptive(PGD(2))
    inner = made.attack if isinstance(made, Expect) else made
    assert isinstance(made, Expect) == (defense in DRAWING)
    z = x[:4].clone().requires_grad_(True)
    own, *_ = torch.autograd.grad(model(z).square().sum(), z)
    guide = inner.model if isinstance(inner, Adaptive) else model
    given, *_ = torch.autograd.grad(guide(z).square().sum(), z)
    assert bool((given.flatten(1).norm(dim=1) > 0).all())
    assert isinstance(inner, Adaptive) or bool((own.flatten(1).norm(dim=1) > 0).all())
    assert model.adaptive(RayS(10)).access == RayS(10).access
    assert model.adaptive(made) is made


@pytest.mark.parametrize("defense", [one for one in CHANGES if one.guide is not None], ids=repr)
def test_an_adaptive_attack_is_judged_by_the_model(defense):
    """The stand-in shows the network the same t(x) where nothing is drawn, and other draws where something is."""
    x = pictures(defense, 4)
    model = defend(Flat(), defense)
    made = model.adaptive(PGD(2))
    stand_in = (made.attack if isinstance(made, Expect) else made).model
    assert torch.equal(stand_in(x), model(x)) == (defense not in DRAWING)


@pytest.mark.parametrize("defense", [*QUICK[:6], MovingTarget((BitDepth(2), ResizePad()))], ids=repr)
def test_adaptive_is_at_least_as_strong(defense, digits):
    network, x, y = digits
    threat = Lp(math.inf, 0.1)
    result = evaluate(defend(network, defense), (x, y), threat=threat, attacks="pgd(steps=4)", alone=True)
    if result.robust_accuracy_naive is None:
        assert SAME in result.notes
        return
    rows = {row["attack"]: row["broke"] for row in result.by_attack()}
    # Two out of forty, for the luck of the draw.
    assert rows["adaptive pgd(steps=4)"] >= rows["pgd(steps=4)"] - 2 * (defense in DRAWING)
    assert result.robust_accuracy.count <= result.robust_accuracy_naive.count
    undefended = run(PGD(4), network, x, y, threat)
    assert int(undefended.success.sum()) > 20
    if not isinstance(defense, Smoothing):
        assert rows["adaptive pgd(steps=4)"] > 0


def test_a_chain_falls_as_its_parts_do(digits):
    network, x, y = digits
    model = defend(network, "bit-depth(bits=3)", "jpeg", MovingTarget((BitDepth(4), Median(2))))
    result = evaluate(model, (x, y), threat=Lp(math.inf, 0.1), attacks="pgd(steps=5)", limit=16)
    assert result.robust_accuracy_naive.value > 0.9
    assert result.robust_accuracy.value < 0.3
    assert result.run["votes"] == 5


def test_the_first_defense_sees_the_input_first():
    x = torch.full((1, 1, 1, 2), 0.4)
    square = type("Square", (BitDepth,), {"exact": lambda self, z, rng: z * z})()
    assert defend(Flat(), BitDepth(1), square)(x).tolist() == [[0.0, 0.0]]
    assert defend(Flat(), square, BitDepth(1))(x + 0.4).tolist() == [[1.0, 1.0]]
    assert defend(Flat(), BitDepth(1), square)(x + 0.2).tolist() == [[1.0, 1.0]]
    assert defend(Flat(), square, BitDepth(1))(x + 0.2).tolist() == [[0.0, 0.0]]


class Guarded(nn.Module):
    """A user's own defense, with the attack that its author declares."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.detach() + 0.0 * x)

    def adaptive(self, attack):
        return Adaptive(attack, self.model)


def test_a_defense_of_ones_own_declares_its_attack(digits, tmp_path):
    network, x, y = digits
    given = {"threat": Lp(math.inf, 0.1), "attacks": ["pgd(steps=5)", "fgsm"]}
    result = evaluate(Guarded(network), (x, y), out=tmp_path / "run", **given)
    plain = evaluate(network, (x, y), **given)
    assert result.run["attacks"] == ["fgsm", "pgd(steps=5)", "adaptive fgsm", "adaptive pgd(steps=5)"]
    assert result.run["adaptive"] == result.run["attacks"][2:]
    assert result.robust_accuracy_naive.value > 0.9
    assert result.robust_accuracy.value == pytest.approx(plain.robust_accuracy.value, abs=0.1)
    assert plain.robust_accuracy_naive is None
    assert plain.summary()["robust_accuracy_naive"] is None
    again = Evaluation.load(tmp_path / "run")
    assert again.robust_accuracy_naive == result.robust_accuracy_naive
    said = json.loads((tmp_path / "run/summary.json").read_text())
    assert said["robust_accuracy_naive"] == result.robust_accuracy_naive.to_json()
    broke = {row["attack"]: row["broke"] for row in said["attacks"]}
    naive = broke["fgsm"] + broke["pgd(steps=5)"]
    assert said["robust_accuracy_naive"]["count"] == said["clean_accuracy"]["count"] - naive


def test_a_layer_that_is_called_adaptive_declares_nothing(digits):
    network, x, y = digits
    model = nn.Sequential(network)
    model.adaptive = nn.Identity()
    assert evaluate(model, (x, y), threat="linf(0.1)", attacks="fgsm").run["attacks"] == ["fgsm"]


def test_an_adaptive_attack_that_is_none_is_refused(digits):
    network, x, y = digits
    model = nn.Sequential(network)
    model.adaptive = lambda attack: 3
    with pytest.raises(UsageError, match="the attack is 3"):
        evaluate(model, (x, y), threat="linf(0.1)", attacks="fgsm")


class Raises(nn.Sequential):
    @property
    def adaptive(self):
        raise RuntimeError("not now")


class Pools(nn.Sequential):
    def adaptive(self, x, size):
        return F.adaptive_avg_pool2d(x, size)


@pytest.mark.parametrize(("kind", "words"), [(Raises, "not now"), (Pools, "missing 1 required")])
def test_an_attribute_of_that_name_for_something_else_is_named(digits, kind, words):
    network, x, y = digits
    with pytest.raises(UsageError, match=f"the model's attribute 'adaptive' does not serve.*{words}.*another name"):
        evaluate(kind(network), (x, y), threat="linf(0.1)", attacks="fgsm")


def test_an_adaptive_attack_sees_no_more_than_the_adversary(digits):
    network, x, y = digits
    model = nn.Sequential(network)
    model.adaptive = lambda attack: PGD(3)
    with pytest.raises(UsageError, match="needs gradients; the adversary sees labels"):
        evaluate(model, (x, y), threat="linf(0.1)", attacks="rays(queries=20)", access="labels")


def test_members_of_other_classes_are_refused(digits):
    network, x, _ = digits
    other = nn.Sequential(nn.Flatten(), nn.Linear(784, 5))
    with pytest.raises(UsageError, match="the same classes"):
        Moving([network, other])(x)


def test_other_commands_say_that_they_are_naive(digits):
    network, x, y = digits
    planned = plan(models.wrap(Guarded(network)), from_tensors(x, y), threat="linf(0.1)", attacks="fgsm")
    assert [name for name, _ in planned.attacks] == ["fgsm"]
    assert NAIVE in planned.notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("jpeg(quality=0)", "quality is 0"),
        ("bit-depth(bits=0)", "bits is 0; it should be from 1 to 16"),
        ("median(size=1)", "size is 1; it should be at least 2"),
        ("total-variation(weight=-1)", "weight is -1"),
        ("total-variation(drop=1)", "drop is 1.0; it should be at least 0 and less than 1"),
        ("total-variation(steps=0)", "steps is 0"),
        ("resize-pad(least=0)", "least is 0"),
        ("resize-pad(least=1.2)", "most is 1.0; it should be at least 1.2"),
        ("resize-pad(seed=-1)", "seed is -1"),
        ("smoothing(sigma=0)", "sigma is 0"),
        ("smoothing(n=0)", "n is 0"),
        ("deep-image-prior(width=0)", "width is 0"),
        ("deep-image-prior(lr=0)", "lr is 0"),
        ("moving-target(transformations=[jpeg])", "one member only"),
        ("moving-target(transformations=[pgd])", "unknown defense 'pgd'"),
        ("moving-target(networks='none.safetensors')", "cannot read 'none.safetensors'|no file none.safetensors"),
        ("jepg", "did you mean 'jpeg'"),
    ],
)
def test_bad_settings(text, said):
    with pytest.raises(UsageError, match=said):
        defend(Flat(), text)


def test_there_is_something_to_defend_with():
    with pytest.raises(UsageError, match="there is no defense; name at least one of jpeg"):
        defend(Flat())
    with pytest.raises(UsageError, match=r"images \(N, C, H, W\); the inputs have shape \(2, 5\)"):
        defend(Flat(), "median")(torch.rand(2, 5))


@pytest.mark.parametrize("defense", [*QUICK, MovingTarget((JPEG(50), Median(2)), seed=3)], ids=repr)
def test_specs_say_what_there_is(defense):
    assert spec.parse(spec.show(defense, INFERENCE), INFERENCE, "defense") == defense


@pytest.fixture(scope="module")
def saved(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("inference") / "m.safetensors"
    checkpoint.save(path, digits[0], "mnist-mlp(width=32)")
    return str(path)


def test_the_command_line_shows_both_numbers(saved, tmp_path, capsys):
    words = ["attack", "--model", saved, "--data", "mnist-5k", "--limit", "20", "--threat", "linf(0.1)"]
    words += ["--attack", "pgd(steps=5)", "--pictures", "0", "--out", str(tmp_path / "run")]
    assert main([*words, "--defend", "bit-depth(bits=3)"]) == 0
    said = capsys.readouterr().out
    assert "robust accuracy (naive attacks only)" in said
    assert "robust accuracy (adaptive too)" in said
    result = Evaluation.load(tmp_path / "run")
    assert result.robust_accuracy.value < result.robust_accuracy_naive.value
    assert result.run["model"]["name"] == f"{saved} behind bit-depth(bits=3)"
    assert main([*words, "--defend", "bit-depth(bits=4)"]) == 2
    assert "model" in capsys.readouterr().err


def test_a_random_defense_gets_votes_on_the_command_line(saved, capsys):
    words = ["attack", "--model", saved, "--data", "mnist-5k", "--limit", "6", "--threat", "linf(0.1)"]
    words += ["--attack", "fgsm", "--defend", "resize-pad", "--defend", f"moving-target(networks='{saved}')"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "most of 5 answers decide" in said
    assert "never fooled once" in said
    assert main([*words, "--votes", "3"]) == 0
    assert "most of 5" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--defend", "median(size=1)"], "advkit: median: size is 1"),
        (["--defend", "jpeg", "--range", "0", "255"], "--defend is for images in [0, 1]"),
    ],
)
def test_misuse_is_one_sentence(saved, capsys, words, said):
    given = ["attack", "--model", saved, "--data", "mnist-5k", "--limit", "6", "--threat", "linf(0.1)", *words]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_table_of_defenses(saved, monkeypatch, capsys):
    words = ["--data", "mnist-5k", "--model", saved, "--examples", "10", "--steps", "3", "--threat", "linf(0.1)"]
    monkeypatch.setattr("sys.argv", ["defended", *words, "--defend", "bit-depth", "--defend", "median"])
    defended.main()
    _head, _rule, *lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in lines]
    assert [row[0] for row in rows] == ["none", "bit-depth", "median"]
    numbers = np.array([[float(cell) for cell in row[1:4]] for row in rows])
    assert (numbers[:, 2] <= numbers[:, 1]).all()
    assert numbers[1, 1] > numbers[1, 2]
