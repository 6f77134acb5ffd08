"""Small networks that can be trained in a minute or an hour on a laptop, and the table of their names.

Those of images take pixels in [0, 1], with the data set's normalization inside the network, so that attacks work on pixels;
those of speech take waveforms in [-1, 1].
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit import spec
from advkit.errors import UsageError
from advkit.gan.ssgan import Classifier
from advkit.models.spoken import KeywordCNN, SpeechCTC
from advkit.spec import Table


class Normalize(nn.Module):
    """(x - mean) / std, per channel; x has shape (N, C, *).

    Arguments:
        mean: One value a channel.
        std: One value a channel, greater than 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The normalized input, with the shape of x."""
        if x.shape[1] != len(self.mean):
            raise ValueError(f"the network takes {len(self.mean)} channels and got {x.shape[1]}")
        shape = (-1, *(1,) * (x.ndim - 2))
        return (x - self.mean.view(shape)) / self.std.view(shape)


MNIST_NORMALIZE = ((0.1307,), (0.3081,))
CIFAR_NORMALIZE = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@dataclass(frozen=True)
class MnistCNN:
    """Two convolutions and two dense layers for (N, 1, 28, 28) in [0, 1] and ten classes.

    Arguments:
        width: Channels of the first convolution; the second has twice as many.
        dense: Units of the hidden dense layer.
    """

    width: int = 32
    dense: int = 128

    def __post_init__(self) -> None:
        spec.check_at_least("the network's width", self.width, 1)
        spec.check_at_least("the network's dense", self.dense, 1)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return nn.Sequential(
            Normalize(*MNIST_NORMALIZE),
            nn.Conv2d(1, self.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width, 2 * self.width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * self.width * 49, self.dense),
            nn.ReLU(),
            nn.Linear(self.dense, 10),
        )


@dataclass(frozen=True)
class MnistSmall:
    """The small network of certified training for (N, 1, 28, 28) in [0, 1] and ten classes, without maxima.

    Two convolutions of stride 2 and two dense layers (Wong and Kolter, 2018, https://arxiv.org/abs/1711.00851).

    Arguments:
        norm: Whether batch normalization precedes each ReLU.
    """

    norm: bool = False

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        hidden: list[tuple[nn.Module, nn.Module]] = [
            (nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16)),
            (nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32)),
            (nn.Linear(32 * 49, 100), nn.BatchNorm1d(100)),
        ]
        blocks = [[layer, norm, nn.ReLU()] if self.norm else [layer, nn.ReLU()] for layer, norm in hidden]
        return nn.Sequential(*blocks[0], *blocks[1], nn.Flatten(), *blocks[2], nn.Linear(100, 10))


@dataclass(frozen=True)
class MnistTrades:
    """The small network of the authors of TRADES for (N, 1, 28, 28) in [0, 1] and ten classes.

    Four convolutions, and dense layers with dropout (Zhang et al., 2019, https://arxiv.org/abs/1901.08573).
    """

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return nn.Sequential(
            nn.Conv2d(1, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 16, 200),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(200, 200),
            nn.ReLU(),
            nn.Linear(200, 10),
        )


@dataclass(frozen=True)
class MnistMLP:
    """Dense layers for (N, 1, 28, 28) in [0, 1] and ten classes.

    Arguments:
        width: Units of each hidden layer.
        depth: How many hidden layers.
    """

    width: int = 256
    depth: int = 2

    def __post_init__(self) -> None:
        spec.check_at_least("the network's width", self.width, 1)
        spec.check_at_least("the network's depth", self.depth, 1)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        sizes = [784, *[self.width] * self.depth]
        hidden = [(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        layers = [layer for pair in hidden for layer in pair]
        return nn.Sequential(Normalize(*MNIST_NORMALIZE), nn.Flatten(), *layers, nn.Linear(sizes[-1], 10))


@dataclass(frozen=True)
class MnistSSL:
    """Dense layers with normalized weights and noise for (N, 1, 28, 28) in [0, 1] and ten classes: the classifier of ``ssgan``.

    Arguments:
        minibatch: Kernels of minibatch discrimination, which tell drawings from data and leave the logits alone; 0 for none.
    """

    minibatch: int = 0

    def __post_init__(self) -> None:
        spec.check_whole("the network's minibatch", self.minibatch, 0)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return Classifier(784, 10, self.minibatch)


class Residual(nn.Module):
    """A residual block with normalization first (He et al., 2016, https://arxiv.org/abs/1603.05027).

    Arguments:
        c_in: Channels of the input.
        c_out: Channels of the output.
        stride: Of the first convolution.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 or c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, c_in, H, W) to (N, c_out, H / stride, W / stride)."""
        h = F.relu(self.norm_1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv_2(F.relu(self.norm_2(self.conv_1(h))))


@dataclass(frozen=True)
class CifarResNet:
    """A pre-activation residual network for (N, 3, 32, 32) in [0, 1] and ten classes.

    Arguments:
        width: Channels of the first stage; each later stage has twice as many.
        blocks: Blocks in each of the three stages.
    """

    width: int = 16
    blocks: int = 1

    def __post_init__(self) -> None:
        spec.check_at_least("the network's width", self.width, 1)
        spec.check_at_least("the network's blocks", self.blocks, 1)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return _resnet(self.width, self.blocks, stages=3)


@dataclass(frozen=True)
class PreActResNet18:
    """The pre-activation ResNet-18 of the literature for (N, 3, 32, 32) in [0, 1] and ten classes: 11 million weights."""

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return _resnet(64, 2, stages=4)


def _resnet(width: int, blocks: int, stages: int) -> nn.Module:
    """Residual blocks in stages, each after the first with half the resolution and twice the channels."""
    layers: list[nn.Module] = [Normalize(*CIFAR_NORMALIZE), nn.Conv2d(3, width, 3, padding=1, bias=False)]
    channels = width
    for stage in range(stages):
        for block in range(blocks):
            c_out = width * 2**stage
            layers.append(Residual(channels, c_out, 2 if stage and not block else 1))
            channels = c_out
    head = [nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers, *head)


NETWORKS: Table = {
    "mnist-cnn": MnistCNN,
    "mnist-mlp": MnistMLP,
    "mnist-small": MnistSmall,
    "mnist-trades": MnistTrades,
    "mnist-ssl": MnistSSL,
    "cifar-resnet": CifarResNet,
    "preact-resnet18": PreActResNet18,
    "keyword-cnn": KeywordCNN,
    "speech-ctc": SpeechCTC,
}
"""The networks that a spec may name: ``mnist-cnn(width=16)``."""


def build(text: str, seed: int = 0) -> nn.Module:
    """The network that a spec names, with weights drawn from ``seed``; the global generator is left as it was.

    Raises:
        UsageError: An unknown name or setting, a size less than 1, or a network that does not fit in memory.
    """
    network = spec.parse(text, NETWORKS, "network")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return network.build()
        except (RuntimeError, MemoryError, OverflowError, TypeError):  # what torch raises, by how much too large it is
            raise UsageError(f"the network {text!r} does not fit in memory; give it a smaller width or depth") from None
