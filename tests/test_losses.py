import pytest
import torch

from advkit.losses import LOSSES, ce, dlr, dlr_targeted, kl, margin, towards_dlr, towards_margin

Z = torch.tensor([[3.0, 1.0, 0.5, -1.0], [0.0, 2.0, 1.5, 1.0]])
Y = torch.tensor([0, 2])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3, 4, 10])
def test_per_example_and_low_where_the_outputs_say_y(name, k):
    y = torch.arange(k)
    z = 5 * torch.eye(k) + 0.1 * torch.randn(k, k, generator=torch.Generator().manual_seed(0))
    low, high = LOSSES[name](z, y), LOSSES[name](z, (y + 1) % k)
    assert low.shape == (k,)
    assert (low < high).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("k", [2, 3, 10])
def test_gradients_are_finite(name, k):
    z = torch.randn(5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: LOSSES[name](z, torch.tensor([0, 1, 0, 1, 1])), z)


def test_values():
    assert torch.allclose(margin(Z, Y), torch.tensor([-2.0, 0.5]))
    assert torch.allclose(dlr(Z, Y), torch.tensor([-2.0 / 2.5, 0.5 / 1.0]))
    assert torch.allclose(dlr_targeted(Z, Y), torch.tensor([-2.0 / (3.0 + 0.25), 0.5 / (2.0 - 0.5)]))
    assert torch.allclose(ce(Z, Y), -Z.log_softmax(1)[torch.arange(2), Y])
    assert torch.allclose(kl(Z, Z), torch.zeros(2), atol=1e-6)
    assert torch.equal(kl(Z, Y), ce(Z, Y))


def test_dlr_is_free_of_scale_and_offset():
    assert torch.allclose(dlr(7 * Z + 3, Y), dlr(Z, Y))


def test_margin_is_positive_exactly_where_another_class_wins():
    z = torch.randn(100, 5, generator=torch.Generator().manual_seed(2))
    y = torch.randint(5, (100,), generator=torch.Generator().manual_seed(3))
    assert torch.equal(margin(z, y) > 0, z.argmax(1) != y)


def test_losses_towards_a_class():
    t = torch.tensor([1, 1])
    assert torch.allclose(towards_margin(Z, Y, t), torch.tensor([-2.0, 0.5]))
    assert torch.allclose(towards_margin(Z, Y, torch.tensor([[1, 2], [1, 0]])), torch.tensor([[-2.0, -2.5], [0.5, -1.5]]))
    assert torch.allclose(towards_dlr(Z, Y, t), torch.tensor([-2.0 / (3.0 + 0.25), 0.5 / (2.0 - 0.5)]))
    two = Z[:, :2]
    assert torch.equal(towards_dlr(two, torch.tensor([0, 0]), t), towards_margin(two, torch.tensor([0, 0]), t))
    assert torch.allclose(towards_dlr(3 * Z + 1, Y, t), towards_dlr(Z, Y, t))
