"""Layers that generators and discriminators are made of.

Symbols: h is a batch of hidden units, (N, F), or of maps, (N, C, H, W).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm


class Noise(nn.Module):
    """h + sigma * n, n standard normal, in training; h in evaluation.

    Arguments:
        sigma: The standard deviation.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, h: Tensor) -> Tensor:
        """The input with noise, with the shape of h."""
        return h + self.sigma * torch.randn_like(h) if self.training else h

    def extra_repr(self) -> str:
        """The standard deviation."""
        return f"sigma={self.sigma}"


class Dense(nn.Module):
    r"""A dense layer with normalized weights, s * (v / ||v||) h + b, one s for each unit.

    Salimans and Kingma, 2016, "Weight normalization", https://arxiv.org/abs/1602.07868.

    Arguments:
        inward: How many units come in.
        outward: How many go out.
        scaled: Whether s is learned; if not, it stays what :meth:`initialize` made of it.
    """

    scale: Tensor

    def __init__(self, inward: int, outward: int, scaled: bool = False) -> None:
        super().__init__()
        self.v = nn.Parameter(0.1 * torch.randn(outward, inward))
        self.bias = nn.Parameter(torch.zeros(outward))
        if scaled:
            self.scale = nn.Parameter(torch.ones(outward))
        else:
            self.register_buffer("scale", torch.ones(outward))

    def forward(self, h: Tensor) -> Tensor:
        """(N, inward) to (N, outward)."""
        return F.linear(h, self.v * (self.scale / (self.v.square().sum(1) + 1e-6).sqrt()).unsqueeze(1), self.bias)

    @torch.no_grad()
    def initialize(self, h: Tensor) -> None:
        """Choose s and b so that each unit has mean 0 and deviation 1 over a batch of inputs, (N, inward)."""
        at = self(h) - self.bias
        deviation = at.std(0, unbiased=False).clamp(min=1e-6)
        self.scale.div_(deviation)
        self.bias.copy_(-at.mean(0) / deviation)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.v.shape[1]}, {self.v.shape[0]}, scaled={isinstance(self.scale, nn.Parameter)}"


class Scored(nn.Module):
    """A discriminator: hidden units, and a score of them, high where an input seems to be data.

    Arguments:
        body: Inputs (N, *) to hidden units (N, F).
        head: Hidden units to scores (N, 1).
        beside: More hidden units, (N, F) to (N, B), that see a whole batch: see :class:`MinibatchDiscrimination`.
    """

    def __init__(self, body: nn.Module, head: nn.Module, beside: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.head, self.beside = body, head, beside

    def features(self, x: Tensor) -> Tensor:
        """The hidden units, with shape (N, F)."""
        return self.body(x)

    def score(self, f: Tensor, y: Tensor | None = None) -> Tensor:
        """The scores of hidden units, with shape (N,); it knows no classes."""
        return self.head(f if self.beside is None else torch.cat([f, self.beside(f)], 1)).squeeze(1)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The scores of inputs (N, *), with shape (N,)."""
        return self.score(self.features(x), y)


class MinibatchDiscrimination(nn.Module):
    r"""How close each example is to the others of its batch: o(h_i)_b = sum over j != i of exp(-||M_ib - M_jb||_1), M = h T.

    Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen, 2016, "Improved techniques for training GANs",
    https://arxiv.org/abs/1606.03498. A generator that draws the same thing again and again is seen by it.

    Arguments:
        inward: How many units come in.
        kernels: B, how many numbers come out.
        size: Entries of each row of M_i.
    """

    def __init__(self, inward: int, kernels: int, size: int = 16) -> None:
        super().__init__()
        self.kernels, self.size = kernels, size
        self.t = nn.Parameter(0.05 * torch.randn(inward, kernels * size))

    def forward(self, h: Tensor) -> Tensor:
        """(N, inward) to (N, kernels)."""
        m = (h @ self.t).view(-1, self.kernels, self.size)
        gaps = (m.unsqueeze(0) - m.unsqueeze(1)).abs().sum(3)
        # Each example is at no distance from itself.
        return (-gaps).exp().sum(1) - 1


class SelfAttention(nn.Module):
    r"""h + gamma * attention(h), gamma 0 at the start, so that near things are learned before far ones.

    Zhang, Goodfellow, Metaxas and Odena, 2019, "Self-attention generative adversarial networks",
    https://arxiv.org/abs/1805.08318. As in BigGAN, keys and values are pooled to a quarter of the places.

    Arguments:
        channels: Of h, at least 8.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = (spectral_norm(nn.Conv2d(channels, inner, 1, bias=False)) for _ in range(2))
        self.value = spectral_norm(nn.Conv2d(channels, channels // 2, 1, bias=False))
        self.out = spectral_norm(nn.Conv2d(channels // 2, channels, 1, bias=False))
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        """(N, C, H, W), H and W even, to the same shape."""
        queries = self.query(h).flatten(2).mT
        keys, values = (F.max_pool2d(part(h), 2).flatten(2) for part in (self.key, self.value))
        weights = (queries @ keys).softmax(2)
        return h + self.gamma * self.out((weights @ values.mT).mT.unflatten(2, h.shape[2:]))


class ConditionalNorm(nn.Module):
    r"""Batch normalization whose scale and shift follow a code: (1 + W_1 c) * norm(h) + W_2 c.

    De Vries et al., 2017, "Modulating early visual processing by language", https://arxiv.org/abs/1707.00683; in GANs, Brock,
    Donahue and Simonyan, 2019, https://arxiv.org/abs/1809.11096.

    Arguments:
        channels: Of h.
        code: Entries of c.
    """

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale, self.shift = (nn.Linear(code, channels, bias=False) for _ in range(2))
        for part in (self.scale, self.shift):
            # Little at first: a code that scales at random what is drawn is noise that must be unlearned.
            nn.init.normal_(part.weight, 0.0, 0.02)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Maps (N, C, H, W) and codes (N, code) to maps of the same shape."""
        scale, shift = (part(c).unsqueeze(2).unsqueeze(3) for part in (self.scale, self.shift))
        return self.norm(h) * (1 + scale) + shift
