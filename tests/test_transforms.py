"""Transforms: what each does, that a row's view is its own, that gradients pass; and the attack that looks through them."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from advkit import Lp, UsageError, perturb, run
from advkit.attacks import ATTACKS, FMN, PGD, Square
from advkit.combine import Expect
from advkit.spec import parse, show
from advkit.streams import Streams
from advkit.testing import CONTRACT, problem
from advkit.transforms import JPEG, TRANSFORMS, Blur, Brightness, Perspective, Print, Rotate, Scale, view

ALL = [make() for make in TRANSFORMS.values()]


def pictures(n=6, channels=3, height=24, width=32, seed=0):
    """Smooth images on the grid of 8 bits."""
    coarse = torch.rand((n, channels, height // 4, width // 4), generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    return (255 * x).round() / 255


def streams(n, seed=0):
    return Streams.seeded(seed, range(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", [*ALL, view("rotate+brightness+blur+print+jpeg")], ids=repr)
def test_a_view_keeps_shape_type_and_range_and_lets_gradients_pass(transform, dtype):
    x = pictures().to(dtype).requires_grad_(True)
    z = transform(x, streams(6), torch.arange(6))
    assert (z.shape, z.dtype) == (x.shape, dtype)
    assert bool(((z >= 0) & (z <= 1)).all())
    (g,) = torch.autograd.grad(z.square().sum(), x)
    assert g.isfinite().all()
    assert (g != 0).double().mean() > 0.5


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_a_view_depends_on_its_own_row_only(transform):
    x, rows = pictures(), torch.tensor([4, 1])
    whole = transform(x, streams(6), torch.arange(6))
    part = transform(x[rows], streams(6), rows)
    assert torch.allclose(part, whole[rows], atol=1e-6)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_the_gradient_is_that_of_finite_differences(transform):
    """But for JPEG, where it is the gradient of the same without rounding, whose differences are those of large steps."""
    x = (0.3 + 0.4 * pictures(1, height=8, width=8).double()).requires_grad_(True)
    look = lambda z: transform(z, streams(1), torch.zeros(1, dtype=torch.int64))
    rng = torch.Generator().manual_seed(1)
    w, d = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for _ in range(2))
    step = 0.3 / float(d.abs().max()) if isinstance(transform, JPEG) else 1e-6
    (g,) = torch.autograd.grad((w * look(x)).sum(), x)
    ahead, behind = (look(x.detach() + sign * step * d) for sign in (1, -1))
    slope = float((w * (ahead - behind)).sum()) / (2 * step)
    assert float((g * d).sum()) == pytest.approx(slope, rel=0.35 if isinstance(transform, JPEG) else 1e-4, abs=1e-6)


class Fixed(Streams):
    """Streams whose uniform numbers are all the same."""

    def __init__(self, n, value):
        super().__init__(torch.zeros(n, dtype=torch.int64))
        self.value = value

    def uniform(self, *shape, rows=None, dtype=torch.float32):
        return torch.full((len(rows), *shape), self.value, dtype=dtype)


def test_a_right_angle_is_a_right_angle():
    x = pictures(2, height=16, width=16)
    turned = Rotate(90.0)(x, Fixed(2, 1.0), torch.arange(2))
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-5)


def test_a_turn_of_an_oblong_image_keeps_lengths():
    """Half a turn maps the image onto itself; a quarter puts what was right of the centre above or below it."""
    x = torch.zeros(1, 1, 9, 17)
    x[0, 0, 4, 11] = 1.0
    turned = Rotate(90.0)(x, Fixed(1, 1.0), torch.arange(1))
    assert turned[0, 0].nonzero().tolist() in ([[1, 8]], [[7, 8]]) or float(turned[0, 0, [1, 7], 8].max()) > 0.99
    assert torch.allclose(Rotate(180.0)(x, Fixed(1, 1.0), torch.arange(1)), x.flip(2, 3), atol=1e-5)


def test_scale_two_shows_the_middle_at_twice_the_size():
    x = pictures(2, height=16, width=16)
    seen = Scale(2.0, 2.0)(x, streams(2), torch.arange(2))
    middle = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)[..., 8:24, 8:24]
    assert torch.allclose(seen, middle, atol=1e-5)


@pytest.mark.parametrize(
    "transform", [Rotate(0.0), Scale(1.0, 1.0), Perspective(0.0), Brightness(0.0, 0.0), Blur(0.01), Print(0.0, 0.0)], ids=repr
)
def test_no_strength_is_no_change(transform):
    x = pictures()
    assert torch.allclose(transform(x, streams(6), torch.arange(6)), x, atol=1e-5)


def test_perspective_moves_the_corners_where_it_should():
    """With all draws at their greatest every corner moves right and down by the same, which is a shift of the image."""
    x = pictures(1, height=16, width=16)
    seen = Perspective(0.25)(x, Fixed(1, 1.0), torch.arange(1))
    assert torch.allclose(seen[..., :14, :14], x[..., 2:, 2:], atol=1e-5)


def test_blur_keeps_what_is_even_and_evens_out_the_rest():
    flat, noise = torch.full((1, 1, 12, 12), 0.3), torch.rand((1, 1, 12, 12), generator=torch.Generator().manual_seed(0))
    look = lambda x: Blur(2.0)(x, Fixed(1, 0.5), torch.arange(1))
    assert torch.allclose(look(flat), flat, atol=1e-6)
    assert float(look(noise).var()) < 0.2 * float(noise.var())


def from_pillow(x, quality):
    read = []
    for image in (255 * x).round().byte():
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(file, "JPEG", quality=quality)
        levels = torch.from_numpy(np.array(Image.open(file)))
        read.append(levels.view(*levels.shape[:2], -1).permute(2, 0, 1) / 255)
    return torch.stack(read)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 32), (1, 32, 32), (3, 45, 51)])
def test_jpeg_is_pillows_within_one_level_in_the_mean(quality, channels, height, width):
    x = pictures(8, channels, 48, 52)[..., :height, :width]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    x = (255 * (x + 0.05 * noise)).round().clamp(0, 255) / 255
    file, ours = from_pillow(x, quality), JPEG(quality)(x, streams(8), torch.arange(8))
    assert float((ours - file).abs().mean()) * 255 < 1.0
    assert float((ours - file).abs().mean()) < 0.4 * float((file - x).abs().mean())


def test_a_view_is_read_in_its_order_and_says_what_it_knows():
    assert view("rotate(30)+brightness(0.1+0.1, contrast=0)+jpeg(70)").parts == (Rotate(30.0), Brightness(0.2, 0.0), JPEG(70))
    with pytest.raises(UsageError, match="blur, brightness, jpeg, perspective, print, rotate, scale"):
        view("rotate(30)+fog")
    for wrong in ("", "rotate+", "rotate(degrees=-1)", "scale(2, 1)", "jpeg(0)", "perspective(1)", "print(0.5)", "blur(0)"):
        with pytest.raises(UsageError):
            view(wrong)


def test_only_images_are_turned():
    with pytest.raises(UsageError, match=r"rotate changes images \(N, C, H, W\)"):
        run(Expect(PGD(2), 2, "rotate"), lambda z: z[:, :2], torch.tensor([[0.1, 0.9]]), torch.tensor([1]), Lp(2.0, 0.1))


def test_a_spec_with_a_view_is_read_back():
    attack = Expect(PGD(4), n=3, view="rotate(30)+jpeg(70)")
    assert parse('expect(pgd(steps=4), n=3, view="rotate(30)+jpeg(70)")', ATTACKS, "attack") == attack
    assert parse(show(attack, ATTACKS), ATTACKS, "attack") == attack


@pytest.mark.parametrize("attack", [Expect(PGD(2), 2, "rotate(30)+print"), Expect(Square(3), 2, "blur")], ids=repr)
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 8, 8)])
def test_expect_with_a_view_keeps_the_contract(attack, shape):
    for dtype in (torch.float32, torch.float64):
        task = problem(attack, math.inf, shape, dtype=dtype)
        for check in CONTRACT.values():
            check(task)


def test_expect_refuses_what_has_no_view():
    with pytest.raises(UsageError, match="leave view out"):
        Expect(ATTACKS["gaussian"](3), 2, "blur")
    with pytest.raises(UsageError, match="n is 0"):
        Expect(PGD(), 0)


def test_without_a_view_a_model_that_is_not_random_is_attacked_as_ever(linear):
    model, _w, x, y = linear(6)
    threat = Lp(2.0, 0.5, -math.inf, math.inf)
    for attack in (PGD(5, start=False), FMN(10)):
        alone, mean = (run(a, model, x, y, threat) for a in (attack, Expect(attack, 3)))
        assert torch.equal(alone.success, mean.success)
        assert torch.allclose(alone.x_adv, mean.x_adv, atol=1e-9)


class Noisy(torch.nn.Module):
    """A linear model that adds noise to its input, another at every call."""

    def __init__(self, w, scale):
        super().__init__()
        self.w, self.scale, self.rng = w, scale, torch.Generator().manual_seed(0)

    def forward(self, x):
        flip = torch.where(torch.rand(x.shape, generator=self.rng) < self.scale, -1.0, 1.0)
        score = (x * flip) @ self.w
        return torch.stack([-score, score], 1)


def test_the_mean_of_answers_points_where_one_answer_does_not():
    """Where the signs of a gradient are turned at random, steps along the mean get further."""
    w = torch.ones(50)
    x = torch.full((20, 50), 0.1)
    threat = Lp(math.inf, 0.5, -1.0, 1.0)
    y, rng = torch.ones(20, dtype=torch.int64), torch.Generator().manual_seed(0)
    attacks = PGD(4, start=False), Expect(PGD(4, start=False), 15)
    reached = [float((perturb(attack, Noisy(w, 0.4), x, y, threat, rng=rng) @ w).mean()) for attack in attacks]
    assert reached[1] < reached[0] - 5


def test_an_example_made_through_views_survives_them():
    """A model that looks at one row of pixels only; turned examples survive turns that undo plain ones."""
    w = torch.zeros(1, 15, 15)
    w[0, 7, 3:12] = torch.tensor([1.0, -1.0] * 4 + [1.0])
    model = lambda z: torch.stack([-(z - 0.5).flatten(1) @ w.flatten(), (z - 0.5).flatten(1) @ w.flatten()], 1) * 4
    x = torch.full((16, 1, 15, 15), 0.5) + 0.02 * w
    y = torch.ones(16, dtype=torch.int64)
    threat, seen = Lp(2.0, 0.5), view("rotate(60)")
    survived = []
    for attack in (PGD(20), Expect(PGD(20), 8, "rotate(60)")):
        result = run(attack, model, x, y, threat)
        assert result.success.all()
        looks = [model(seen(result.x_adv, streams(16, seed), torch.arange(16))).argmax(1) != y for seed in range(20)]
        survived.append(float(torch.stack(looks).double().mean()))
    assert survived[1] > survived[0] + 0.1
