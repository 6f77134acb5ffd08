"""Transfer: the attacks against closed forms and a peer, ensembles, the matrix, the command."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import advkit
from advkit import Access, Lp, UsageError, data, perturb, run
from advkit.attacks import BIM, DI, FMN, MIFGSM, NIFGSM, SI, TI, VMI, Admix, Square
from advkit.benchmarks.peers import peer
from advkit.cli import main, parser
from advkit.errors import ModelError
from advkit.losses import ce
from advkit.models import Model, networks
from advkit.norms import dual, lp_norm
from advkit.oracle import Oracle
from advkit.streams import Streams
from advkit.surrogates import Ensemble, transfer
from advkit.train import RECIPES, Recipe, train

FREE = {"low": -math.inf, "high": math.inf}
LINF = Lp(math.inf, 0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Probe:
    """An attack that takes gradients at x and keeps them."""

    access, norms, minimum, paper, cost = Access.GRADIENTS, (math.inf, 2.0, 1.0), False, "probe", 99

    def __init__(self, times=1):
        self.times, self.seen = times, []

    def __call__(self, oracle, x, threat, rng):
        self.seen = [oracle.grad(x, ce)[1] for _ in range(self.times)]
        return x


def probe(wrapper, model, x, y, times=1, threat=LINF, **options):
    inner = Probe(times)
    perturb(wrapper(inner, **options), model, x, y, threat, rng=generator())
    return inner.seen


@pytest.fixture
def smooth():
    """A smooth network on images of 6 x 8 with two channels, in float64, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(96, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    x = torch.rand(5, 2, 6, 8, dtype=torch.float64)
    return model, x, model(x).argmax(1)


def gradient(model, z, y):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)[0]


@pytest.mark.parametrize("p", [2.0, math.inf])
@pytest.mark.parametrize("attack", [MIFGSM(), NIFGSM(), VMI(MIFGSM(), 2), SI(NIFGSM(), 3)], ids=repr)
def test_a_linear_model_falls_exactly_when_the_radius_exceeds_the_distance(linear, attack, p):
    model, w, x, y = linear(6)
    true = (x @ w).abs() / lp_norm(w.unsqueeze(0), dual(p))
    ordered = true.sort().values
    gap = int((ordered[9:24] / ordered[8:23]).argmax()) + 8
    result = run(attack, model, x, y, Lp(p, float((ordered[gap] + ordered[gap + 1]) / 2), **FREE))
    assert torch.equal(result.success, true < ordered[gap + 1])


@pytest.mark.parametrize("attack", [MIFGSM(momentum=0.0), NIFGSM(momentum=0.0)])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_without_momentum_it_is_the_basic_iterative_method(smooth, attack, p):
    model, x, y = smooth
    ours, bim = (perturb(a, model, x, y, Lp(p, 0.2), rng=generator()) for a in (attack, BIM(10)))
    assert torch.allclose(ours, bim)


def test_momentum_sums_the_gradients_of_equal_length(smooth):
    model, x, y = smooth
    g0 = gradient(model, x, y)
    x1 = (x + 0.1 * g0.sign()).clamp(0, 1)
    g1 = gradient(model, x1, y)
    v = g0 / lp_norm(g0, 1).view(-1, 1, 1, 1) + g1 / lp_norm(g1, 1).view(-1, 1, 1, 1)
    expected = LINF.project(x1 + 0.1 * v.sign(), x)
    assert torch.allclose(perturb(MIFGSM(2), model, x, y, LINF, rng=generator()), expected)


def test_the_look_ahead_is_as_long_as_a_step(smooth):
    """The second gradient is taken a step (alpha in l_2) further along the first one."""
    model, x, y = smooth
    asked = []
    spy = nn.Module()
    spy.forward = lambda z: (asked.append(z.detach().clone()), model(z))[1]
    perturb(NIFGSM(2), spy, x, y, Lp(2.0, 0.2, **FREE), rng=generator())
    g = gradient(model, x, y)
    unit = g / lp_norm(g, 2).view(-1, 1, 1, 1)
    assert torch.allclose(asked[1], x + 0.1 * unit + 0.1 * unit)


def test_ti_is_a_convolution_with_a_gaussian(smooth):
    model, x, y = smooth
    (g,) = probe(TI, model, x, y, sigma=0.9)
    index = torch.arange(-2, 3, dtype=torch.float64)
    one = torch.exp(-0.5 * (index / 0.9) ** 2)
    kernel = torch.outer(one, one) / one.sum() ** 2
    expected = F.conv2d(gradient(model, x, y), kernel.expand(2, 1, 5, 5), padding=2, groups=2)
    assert torch.allclose(g, expected)


def test_ti_smooths_rows_without_height_over_the_last_axis(linear):
    model, _w, x, y = linear(7)
    (g,) = probe(TI, model, x, y, threat=Lp(math.inf, 0.2, **FREE), sigma=1.0)
    index = torch.arange(-3, 4, dtype=torch.float64)
    kernel = torch.exp(-0.5 * index**2)
    expected = F.conv1d(gradient(model, x, y).unsqueeze(1), (kernel / kernel.sum()).view(1, 1, -1), padding=3)
    assert torch.allclose(g, expected.squeeze(1))


def test_si_is_the_mean_over_scaled_copies(smooth):
    model, x, y = smooth
    (g,) = probe(SI, model, x, y, m=3)
    expected = sum(gradient(model, x / 2**i, y) / 2**i for i in range(3)) / 3
    assert torch.allclose(g, expected)


def test_vmi_adds_the_variance_around_the_iterate_before(smooth):
    model, x, y = smooth
    first, second = probe(VMI, model, x, y, times=2, n=400, beta=10.0)
    plain = gradient(model, x, y)
    assert torch.allclose(first, plain)
    noise = 2.0 * (2 * torch.rand(400, *x.shape, generator=generator(), dtype=x.dtype) - 1)
    around = torch.stack([gradient(model, x + r, y) for r in noise])
    error = 4 * around.std(0) / math.sqrt(200)
    assert ((second - around.mean(0)).abs() <= error).double().mean() > 0.99
    assert ((plain - around.mean(0)).abs() > error).double().mean() > 0.1


@pytest.mark.parametrize("shape", [(2, 6, 8), (3, 9), (12,), (1, 2, 5, 4)])
def test_di_shows_a_smaller_input_somewhere_on_a_ground_of_zeros(shape):
    """What is shown of a constant input: ones in a box of the size that was drawn, each row its own."""
    shown = []

    def model(z):
        shown.append(z.detach().clone())
        return z.flatten(1)[:, :2]

    x = torch.ones(64, *shape)
    perturb(DI(Probe(), p=1.0, least=0.5), model, x, torch.zeros(64, dtype=torch.int64), LINF, rng=generator())
    (z,) = shown
    assert set(z.unique().tolist()) == {0.0, 1.0}
    axes = [-2, -1] if len(shape) > 2 else [-1]
    for axis in axes:
        line = z.flatten(1).view(64, -1, *z.shape[2:] if len(shape) > 1 else z.shape[1:]).amax(1).movedim(axis, -1)
        sizes = line.reshape(64, -1, line.shape[-1]).amax(1).sum(1)
        n = shape[axis]
        assert set(sizes.tolist()) == set(range(n // 2, n))
    assert len({tuple(row.flatten().tolist()) for row in z}) > 2


def test_di_keeps_the_picture_and_leaves_it_alone_with_the_rest_of_the_probability():
    shown = []

    def model(z):
        shown.append(z.detach().clone())
        return z.flatten(1)[:, :2]

    x = torch.linspace(0.2, 0.8, 16).expand(400, 1, 16, 16).contiguous()
    y = torch.zeros(400, dtype=torch.int64)
    perturb(DI(Probe(), p=0.3, least=0.8), model, x, y, Lp(math.inf, 0.2, -1.0, 1.0), rng=generator())
    (z,) = shown
    same = (z == x).flatten(1).all(1)
    assert 0.62 < float(same.float().mean()) < 0.78
    # A ramp that is resized is a steeper ramp between the same ends.
    for row in z[~same][:20]:
        inside = row[0][row[0].amax(1) > 0][0]
        ramp = inside[inside > 0]
        assert bool((ramp.diff() > 0).all())
        assert float(ramp[0]) == pytest.approx(0.2, abs=0.03)
        assert float(ramp[-1]) == pytest.approx(0.8, abs=0.03)


def test_di_passes_the_gradient_of_what_was_shown(smooth):
    model, x, y = smooth
    rng = Streams.seeded(0, range(5))
    seen = []

    def watched(z):
        seen.append(z)
        return model(z)

    oracle = Oracle(watched, x, y, LINF, track=False)
    inner = Probe()
    DI(inner, p=1.0, least=0.6)(oracle, x, LINF, rng)
    # The map is linear: the gradient paired with x is that of what was shown, paired with it.
    shown = seen[0].detach()
    left = (inner.seen[0] * x).flatten(1).sum(1)
    assert torch.allclose(left, (gradient(model, shown, y) * shown).flatten(1).sum(1))


def test_admix_mixes_in_one_image_of_the_data_at_each_scale():
    digits = data.load("mnist-5k", split="train", limit=500)
    bank = digits.batch(0, 500)[0]
    shown = []

    def model(z):
        shown.append(z.detach().clone())
        return z.flatten(1)[:, :10]

    x, y = data.load("mnist-5k", limit=20).batch(0, 20)
    perturb(Admix(Probe(), data="mnist-5k", n=2, m=3, eta=0.5), model, x, y, LINF, rng=generator())
    assert len(shown) == 6
    for i, z in enumerate(shown):
        other = (z * 2 ** (i % 3) - x) / 0.5
        far = torch.cdist(other.flatten(1), bank.flatten(1)).amin(1)
        assert float(far.max()) < 0.05
    assert not torch.equal(shown[0], shown[3])


def test_admix_without_data_mixes_in_noise_over_the_range_of_the_row():
    shown = []

    def model(z):
        shown.append(z.detach().clone())
        return z.flatten(1)[:, :2]

    x = 0.3 + 0.4 * torch.rand(6, 1, 32, 32, generator=generator())
    perturb(Admix(Probe(), n=1, m=1, eta=1.0), model, x, torch.zeros(6, dtype=torch.int64), LINF, rng=generator())
    other = (shown[0] - x).flatten(1)
    assert torch.allclose(other.amin(1), x.flatten(1).amin(1), atol=1e-6)
    assert torch.allclose(other.amax(1), x.flatten(1).amax(1), atol=1e-6)
    # Neighbours are alike, as in pictures and not in white noise.
    image = other.view(6, 32, 32) - other.mean(1).view(6, 1, 1)
    assert float((image[..., 1:] * image[..., :-1]).mean() / image.square().mean()) > 0.5


def test_admix_says_which_shape_the_data_should_have(smooth):
    model, x, y = smooth
    with pytest.raises(UsageError, match=r"shape \(1, 28, 28\) into inputs of shape \(2, 6, 8\)"):
        perturb(Admix(MIFGSM(), data="mnist-5k"), model, x, y, LINF, rng=generator())


@pytest.mark.parametrize("wrapper", [DI, TI, SI, VMI, Admix])
def test_wrappers_refuse_an_attack_without_gradients(wrapper):
    with pytest.raises(UsageError, match="changes gradients and Square takes none"):
        wrapper(Square())


@pytest.mark.parametrize(
    "make",
    [
        lambda: DI(MIFGSM(), p=1.5),
        lambda: DI(MIFGSM(), least=0.0),
        lambda: TI(MIFGSM(), sigma=0.0),
        lambda: SI(MIFGSM(), m=0),
        lambda: VMI(MIFGSM(), n=0),
        lambda: VMI(MIFGSM(), beta=-1.0),
        lambda: Admix(MIFGSM(), eta=0.0),
        lambda: MIFGSM(steps=0),
        lambda: NIFGSM(momentum=-1.0),
    ],
)
def test_wrong_settings_are_refused(make):
    with pytest.raises(UsageError, match="it should be"):
        make()


def test_wrappers_around_wrappers_see_what_the_inner_one_made(smooth):
    """si(di(...)): the copies of one resized input; di(si(...)): each copy resized for itself."""
    model, x, y = smooth
    shown = []

    def watched(z):
        shown.append(z.detach().clone())
        return model(z)

    perturb(SI(DI(Probe(), p=1.0, least=0.5), m=2), watched, x, y, LINF, rng=generator())
    assert torch.allclose(shown[1], shown[0] / 2)
    shown.clear()
    perturb(DI(SI(Probe(), m=2), p=1.0, least=0.5), watched, x, y, LINF, rng=generator())
    assert not torch.allclose(shown[1], shown[0] / 2)


def test_an_ensemble_is_the_mean_of_logits():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    x = torch.randn(5, 3)
    both = Ensemble([a, lambda z: {"logits": b(z)}])
    assert torch.allclose(both(x), (a(x) + b(x)) / 2)
    assert [id(p) for p in both.parameters()] == [id(p) for p in a.parameters()]
    with pytest.raises(ModelError, match="should have the same classes"):
        Ensemble([a, nn.Linear(3, 5)])(x)
    with pytest.raises(UsageError, match="at least one model"):
        Ensemble([])


def test_transfer_counts_what_the_target_says(linear):
    """Two linear models: examples of one move x along its weights, which moves the other's score by the cosine."""
    model, w, x, y = linear(6)
    other = lambda z: model(z) * torch.tensor([1.0, 1.0], dtype=z.dtype) + torch.tensor([0.0, 1.0], dtype=z.dtype)
    threat = Lp(2.0, 0.7, **FREE)
    shown = transfer(MIFGSM(), model, other, x, y, threat)
    sign = torch.where(y == 0, 1.0, -1.0).unsqueeze(1)
    expected = x + 0.7 * sign * w / w.norm()
    assert torch.allclose(shown.x_adv, expected)
    assert torch.equal(shown.surrogate, (expected @ w > 0).long() != y)
    assert torch.equal(shown.success, (expected @ w + 1 > 0).long() != y)
    with pytest.raises(UsageError, match="give a radius"):
        transfer(FMN(), model, other, x, y, Lp(2.0, **FREE))


@pytest.fixture(scope="module")
def trained():
    """Three small networks on digits."""
    digits = data.load("mnist-5k", split="train")
    with torch.random.fork_rng(devices=[]):
        return {
            name: train(networks.build(network, seed), digits, Recipe(epochs=3))
            for seed, (name, network) in enumerate(
                {"a": "mnist-mlp(width=32)", "b": "mnist-mlp(width=48, depth=1)", "c": "mnist-mlp(width=24, depth=3)"}.items()
            )
        }


def test_the_matrix_counts_what_transfer_finds(trained):
    examples = data.load("mnist-5k", limit=60)
    matrix = advkit.transfer_matrix(trained, examples, threat="linf(0.1)", attack="mi-fgsm", batch_size=25)
    assert matrix.surrogates == ("a", "b", "c", "all others")
    assert matrix.targets == ("a", "b", "c")
    x, y = examples.batch(0, 60)
    right = {name: model(x).argmax(1) == y for name, model in trained.items()}
    assert {name: rate.count for name, rate in matrix.clean.items()} == {name: int(r.sum()) for name, r in right.items()}

    def expected(surrogate, right_s, target):
        both = right_s & right[target]
        shown = transfer(MIFGSM(), surrogate, trained[target], x[both], y[both], Lp(math.inf, 0.1))
        return int(shown.success.sum()), int(both.sum())

    for s in trained:
        for t in trained:
            cell = matrix.fooled[s, t]
            assert (cell.count, cell.of) == expected(trained[s], right[s], t)
    others = Ensemble([trained["a"], trained["b"]])
    cell = matrix.fooled["all others", "c"]
    assert (cell.count, cell.of) == expected(others, others(x).argmax(1) == y, "c")
    assert cell.low < cell.value < cell.high


def test_the_matrix_does_not_depend_on_batches_or_on_the_other_models(trained):
    given = {"threat": "linf(0.1)", "attack": "di(mi-fgsm(steps=3), p=1)", "limit": 40}
    whole = advkit.transfer_matrix(trained, "mnist-5k", **given)
    parts = advkit.transfer_matrix(trained, "mnist-5k", batch_size=7, **given)
    assert whole.fooled == parts.fooled
    two = advkit.transfer_matrix({name: trained[name] for name in "ab"}, "mnist-5k", **given)
    assert two.surrogates == ("a", "b")
    assert all(two.fooled[pair] == whole.fooled[pair] for pair in two.fooled)


def test_a_model_without_gradients_is_a_target_only(trained):
    box = Model(lambda x: trained["c"](x.detach()), "box", Access.SCORES, "0" * 64)
    models = {"a": trained["a"], "b": trained["b"], "box": box}
    given = {"threat": "linf(0.1)", "attack": "mi-fgsm", "limit": 40}
    matrix = advkit.transfer_matrix(models, "mnist-5k", **given)
    assert set(matrix.fooled) == {*((s, t) for s in "ab" for t in models), ("all others", "box")}
    assert any("box does not give the gradients" in note for note in matrix.notes)
    whole = advkit.transfer_matrix(trained, "mnist-5k", **given)
    assert matrix.fooled["all others", "box"] == whole.fooled["all others", "c"]
    with pytest.raises(UsageError, match="none of the models gives"):
        advkit.transfer_matrix({"box": box, "same": box}, "mnist-5k", **given)


def test_what_the_matrix_gives_and_writes(trained, tmp_path):
    matrix = advkit.transfer_matrix(trained, "mnist-5k", threat="linf(0.1)", attack=BIM(2), limit=30)
    rows, table = matrix.to_pandas(), matrix.table()
    assert list(rows.columns) == ["surrogate", "target", "fooled", "of", "rate", "low", "high"]
    assert len(rows) == 12
    assert table.shape == (4, 3)
    for row in rows.itertuples():
        assert row.rate == row.fooled / row.of == table.loc[row.surrogate, row.target]
    matrix.save(tmp_path / "who.csv")
    matrix.save(tmp_path / "folder")
    assert pd.read_csv(tmp_path / "who.csv").fooled.tolist() == rows.fooled.tolist()
    assert (tmp_path / "folder" / "transfer.csv").read_text() == (tmp_path / "who.csv").read_text()
    said = json.loads((tmp_path / "folder" / "run.json").read_text())
    assert said["threat"] == "linf(eps=0.1)"
    assert set(said["models"]) == set(said["clean"]) == set(trained)
    with pytest.raises(UsageError, match="in the way"):
        matrix.save(tmp_path / "folder" / "run.json")


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ("a.safetensors", {}, "should be a list of at least two"),
        ([nn.Flatten()], {}, "takes at least two"),
        ([nn.Flatten(), nn.Flatten()], {}, "two models have the same name"),
        (None, {"threat": "linf"}, "none was given"),
        (None, {"threat": "l2", "attack": "fmn"}, "give a radius"),
        (None, {"threat": "l1(3)"}, "does not serve l_1"),
        (None, {"limit": 0}, "the limit is 0"),
        (None, {"batch_size": 0}, "batch size is 0"),
    ],
)
def test_what_a_matrix_refuses(trained, models, options, message):
    given = {"threat": "linf(0.1)", "limit": 20, **options}
    with pytest.raises(UsageError, match=message):
        advkit.transfer_matrix(trained if models is None else models, "mnist-5k", **given)


@pytest.mark.slow
def test_momentum_diversity_smoothing_variance_and_ensembles_help(trained):
    """What the papers claim, from a convolutional network to a dense one: each beats what it is built on."""
    digits = data.load("mnist-5k", split="train")
    cnn = train(networks.build("mnist-cnn(width=8, dense=32)"), digits, RECIPES["mnist-cnn"].for_examples(len(digits)))
    target = trained["a"]
    x, y = data.load("mnist-5k").batch(0, 400)
    right = (cnn(x).argmax(1) == y) & (target(x).argmax(1) == y)

    def fooled(attack, surrogate=cnn, shown_to=target):
        return int(transfer(attack, surrogate, shown_to, x[right], y[right], Lp(math.inf, 0.2)).success.sum())

    momentum = fooled(MIFGSM())
    assert momentum > fooled(BIM(10))
    assert min(fooled(wrapper(MIFGSM())) for wrapper in (DI, TI, VMI)) > momentum
    dense = list(trained.values())
    assert fooled(MIFGSM(), Ensemble(dense), cnn) > max(fooled(MIFGSM(), model, cnn) for model in dense)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "attack"), [("MIFGSM", MIFGSM()), ("NIFGSM", NIFGSM()), ("SINIFGSM", SI(NIFGSM()))])
def test_the_same_examples_as_torchattacks(smooth, name, attack):
    torchattacks = peer("torchattacks")
    if torchattacks is None:
        pytest.skip("torchattacks is not installed")
    model, x, y = smooth
    theirs = getattr(torchattacks, name)(model, eps=0.2, alpha=0.02, steps=10)(x, y)
    ours = perturb(attack, model, x, y, LINF, rng=generator())
    assert float(((ours - theirs).abs() > 1e-6).double().mean()) < 0.01


@pytest.fixture(scope="module")
def files(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, network in (("a", "mnist-mlp(width=32)"), ("b", "mnist-mlp(width=48, depth=1)")):
        advkit.models.checkpoint.save(folder / f"{name}.safetensors", trained[name], network)
    return folder


def words(files, *more, threat="linf(0.1)"):
    models = [word for name in "ab" for word in ("--model", str(files / f"{name}.safetensors"))]
    return ["transfer", *models, "--data", "mnist-5k", "--threat", threat, "--limit", "20", *more]


def test_the_command(files, tmp_path, capsys):
    assert main(words(files, "--attack", "mi-fgsm(steps=2)", "--out", str(tmp_path / "who.csv"))) == 0
    printed = capsys.readouterr().out
    for word in ("on a.safetensors", "on b.safetensors", "clean accuracy", "mi-fgsm(steps=2)", "linf(eps=0.1)"):
        assert word in printed
    rows = pd.read_csv(tmp_path / "who.csv")
    assert [Path(name).name for name in rows.target] == ["a.safetensors", "b.safetensors"] * 2
    assert f"{100 * rows.rate[1]:.2f} %" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attack", "mi"], "unknown attack 'mi'"),
        (["--attack", "di(square)"], "changes gradients and Square takes none"),
        (["--model", "{a}"], "give at least two with --model, each once"),
        (["--model", "nothing.safetensors"], "there is no file nothing.safetensors"),
        (["--out", "{a}"], "is in the way"),
        (["--device", "tpu9"], "cannot use the device"),
    ],
)
def test_misuse_is_one_sentence(files, capsys, more, message):
    assert main(words(files, *(word.format(a=files / "a.safetensors") for word in more))) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_every_option_of_the_command_is_described():
    (subparsers,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    options = {o for a in subparsers.choices["transfer"]._actions for o in a.option_strings if o.startswith("--")}
    page = (Path(__file__).parents[1] / "docs" / "transfer.md").read_text(encoding="utf-8")
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page))
    assert options - {"--help"} <= said
    assert all(f"`{name}" in page for name in ("mi-fgsm", "ni-fgsm", "di", "ti", "si", "vmi", "admix"))
