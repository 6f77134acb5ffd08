"""The same answers on a GPU as on a CPU."""

import math

import pytest
import torch

from advkit import Lp, evaluate, run
from advkit.attacks import FMN, PGD, Square
from advkit.data import load
from advkit.defenses import NFGSM, train
from advkit.models import networks
from advkit.train import Recipe

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("attack", [PGD(10), FMN(20), Square(50)], ids=repr)
def test_a_gpu_gives_the_same_rows(attack):
    model = networks.build("mnist-cnn(width=8)").double()
    x = torch.rand(16, 1, 28, 28, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    threat = Lp(math.inf, 0.05)
    cpu = run(attack, model, x, y, threat, rng=torch.Generator().manual_seed(0))
    gpu = run(attack, model.cuda(), x.cuda(), y.cuda(), threat, rng=torch.Generator().manual_seed(0))
    assert torch.equal(cpu.success, gpu.success.cpu())
    assert torch.equal(cpu.forwards, gpu.forwards.cpu())
    assert torch.allclose(cpu.x_adv, gpu.x_adv.cpu(), atol=1e-6)


def test_an_evaluation_on_a_gpu():
    model = networks.build("mnist-cnn(width=8)").cuda()
    result = evaluate(model, "mnist-5k", threat="linf(0.1)", attacks=["fgsm", "square(queries=20)"], limit=50, device="cuda")
    assert len(result.rows) == 50


def test_training_on_a_gpu_in_mixed_precision():
    digits = load("mnist-5k", split="train")
    recipe = Recipe(epochs=3, batch_size=100, lr=0.05, precision="bfloat16")
    trained = train(networks.build("mnist-cnn(width=8)"), digits, NFGSM(Lp(math.inf, 0.1)), recipe, device="cuda")
    assert next(trained.model.parameters()).is_cuda
    assert trained.history[-1].robust > 0.5
