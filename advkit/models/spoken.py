"""Small networks for spoken words: a classifier of keywords, and a recogniser of sentences by their letters.

Symbols: x is a batch of waveforms (N, T) in [-1, 1], M the mel bands, F the frames, K the classes, V the letters. Neither
network hears trailing zeros: frames after a sound are nothing, at every layer, so no answer depends on the batch. How loud a
sound is makes no difference either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from advkit.sound.features import Mel
from advkit.sound.threats import lengths
from advkit.spec import check_whole

FLOOR = 1e-5
"""What is added to each band's power, as a share of the loudest frame's: 50 dB below it, nothing is heard."""
QUIETEST = 1e-16
"""The least power that the loudest frame is taken to have; with less, gradients overflow."""
BLOCK = 16
"""Batches are cut after their longest sound, to a multiple of so many frames."""
ALPHABET = ("", " ", "'", *"abcdefghijklmnopqrstuvwxyz")
"""The letters of sentences; the first is CTC's blank."""


@dataclass(frozen=True)
class Varied:
    """What another speaker, microphone or room would change, drawn for each sound in training.

    Time and the mel axis are stretched (Jaitly and Hinton, 2013, "Vocal tract length perturbation (VTLP) improves speech
    recognition"), the bands are made louder and softer by a smooth curve, and a stripe of bands and one of frames are left out
    (Park et al., 2019, "SpecAugment", https://arxiv.org/abs/1904.08779). The draws come from torch's global generator, as
    dropout's do.

    Arguments:
        pace: The most that time is stretched or compressed by, as a share.
        pitch: The same of the mel axis.
        colour: The standard deviation of each of the curve's three parts, in dB.
        hole: The most of all bands, and of all frames, that is left out, as a share.
    """

    pace: float = 0.25
    pitch: float = 0.15
    colour: float = 1.0
    hole: float = 0.1

    def coloured(self, power: Tensor) -> Tensor:
        """The power (N, M, F) through another microphone."""
        n, bands, _ = power.shape
        place = torch.linspace(0, torch.pi, bands, device=power.device)
        parts = torch.stack([torch.cos(k * place) for k in (1, 2, 3)])
        gain = self.colour * torch.randn(n, 3, device=power.device) @ parts
        return power * (10 ** (gain / 10)).unsqueeze(2)

    def stretched(self, spectrum: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """The spectra (N, M, F), and which of their frames are heard (N, F), at another pace and pitch."""
        n, bands, frames = spectrum.shape
        pace, pitch = (1 + most * (2 * torch.rand(n, 1, device=spectrum.device) - 1) for most in (self.pace, self.pitch))
        room = int(frames * (1 + self.pace)) + 1
        time = torch.arange(room, device=spectrum.device) / pace / max(1, frames - 1)
        band = (torch.arange(bands, device=spectrum.device) / pitch / (bands - 1)).clamp(max=1)
        grid = torch.stack(torch.broadcast_tensors(time.unsqueeze(1), band.unsqueeze(2)), 3)
        spectrum = F.grid_sample(spectrum.unsqueeze(1), 2 * grid - 1, align_corners=True).squeeze(1)
        heard = _first((heard.sum(1) * pace.squeeze(1)).long().clamp(min=1), room)
        left = ~self._stripe(torch.full_like(heard[:, 0], bands, dtype=torch.int64), bands).unsqueeze(2)
        return spectrum * left * (heard & ~self._stripe(heard.sum(1), room)).unsqueeze(1), heard

    def _stripe(self, of: Tensor, size: int) -> Tensor:
        """Some neighbours among the first ``of`` (N,) entries, (N, size) bool."""
        width = self.hole * torch.rand(len(of), device=of.device) * of
        start = torch.rand(len(of), device=of.device) * (of - width)
        return _first(start + width, size) & ~_first(start, size)


def _first(n: Tensor, size: int) -> Tensor:
    """Which of ``size`` entries are among the first n (N,), (N, size) bool."""
    return torch.arange(size, device=n.device) < n.unsqueeze(1)


class LogMel(nn.Module):
    """Waveforms (N, T) to log-mel spectra (N, M, F) relative to each sound's loudest frame, 0 after its end.

    Arguments:
        rate: Samples a second.
        bands: M.
        hop: From one frame to the next, in samples.
        levelled: The share of each band's mean over time that is taken from it, as it is the speaker's or the microphone's own.
        varied: What is changed in training.
    """

    def __init__(self, rate: int, bands: int, hop: int, *, levelled: float = 0.0, varied: Varied | None = None) -> None:
        super().__init__()
        self.mel = Mel(rate, n_fft=max(hop, rate * 32 // 1000), hop=hop, bands=bands, low=60.0)
        self.levelled, self.varied = levelled, varied

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames sounds of so many samples have, (N,) int64."""
        return samples // self.mel.hop + 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The spectra, (N, M, F), and which frames are of the sound, (N, F) bool."""
        samples, block = lengths(x), BLOCK * self.mel.hop
        # In whole blocks, as a library that prepares each shape anew is slow where every batch has another.
        power = self.mel.mel(x[:, : block * (1 + int(samples.max()) // block)])
        heard = _first(self.frames(samples), power.shape[2])
        varied = self.varied if self.training else None
        power = varied.coloured(power) if varied else power
        loudest = (power.mean(1) * heard).amax(1).clamp(min=QUIETEST)
        spectrum = (power / loudest.view(-1, 1, 1) + FLOOR).log() * heard.unsqueeze(1)
        mean = spectrum.sum(2) / heard.sum(1, keepdim=True)
        spectrum = (spectrum - self.levelled * mean.unsqueeze(2)) * heard.unsqueeze(1)
        return varied.stretched(spectrum, heard) if varied else (spectrum, heard)


class Heard(nn.Module):
    """A convolution with normalization, in which frames after a sound stay nothing.

    Arguments:
        conv: Over (bands and) frames.
        norm: Of its channels.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, h: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
        """(N, c_in, *, F) and (N, F) to (N, c_out, *, F / stride) and (N, F / stride)."""
        heard = heard[:, :: self.conv.stride[-1]]
        h = F.relu(self.norm(self.conv(h)))
        return h * heard.view(len(h), *(1,) * (h.ndim - 2), -1), heard


class Keywords(nn.Module):
    """Waveforms to logits of words; ``KeywordCNN`` says of what form.

    Attributes:
        rate: Samples a second.
    """

    def __init__(self, settings: KeywordCNN) -> None:
        super().__init__()
        self.rate, width = settings.rate, settings.width
        self.mel = LogMel(self.rate, 32, self.rate // 64, levelled=0.6, varied=Varied())
        sizes = [(1, width, 5, 1), (width, 2 * width, 3, 2), (2 * width, 2 * width, 3, 1), (2 * width, 4 * width, 3, 1)]
        convs = [nn.Conv2d(c_in, c_out, k, (2, stride), k // 2, bias=False) for c_in, c_out, k, stride in sizes]
        self.layers = nn.ModuleList(Heard(conv, nn.BatchNorm2d(conv.out_channels)) for conv in convs)
        self.drop, self.dense = nn.Dropout(0.2), nn.Linear(8 * width, settings.words)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) to (N, K)."""
        spectrum, heard = self.mel(x)
        h = spectrum.unsqueeze(1)
        for layer in self.layers:
            h, heard = layer(h, heard)
        h = h.mean(2)
        mean = h.sum(2) / heard.sum(1, keepdim=True)
        z: Tensor = self.dense(self.drop(torch.cat([mean, h.amax(2)], 1)))
        return z


@dataclass(frozen=True)
class KeywordCNN:
    """A classifier of spoken words, for waveforms (N, T) in [-1, 1] at one rate.

    A log-mel spectrum, four convolutions over bands and time, and the mean and the greatest value of each channel.

    Arguments:
        rate: Samples a second.
        words: How many words there are to tell apart.
        width: Channels of the first convolution; the last has four times as many.
    """

    rate: int = 8000
    words: int = 10
    width: int = 24

    def __post_init__(self) -> None:
        check_whole("the network's rate", self.rate, 2000)
        check_whole("the network's words", self.words, 2)
        check_whole("the network's width", self.width, 1)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return Keywords(self)


class Letters(nn.Module):
    """Waveforms to log-probabilities of letters; ``SpeechCTC`` says of what form.

    All frames after the end of a sound are the same; ``advkit.audio.ctc`` leaves them out.

    Attributes:
        rate: Samples a second.
        alphabet: The letters; the first is the blank.
    """

    def __init__(self, settings: SpeechCTC) -> None:
        super().__init__()
        self.rate, self.alphabet, width = settings.rate, ALPHABET, settings.width
        self.mel = LogMel(self.rate, 40, self.rate // 80)
        convs = nn.Conv1d(40, width, 5, 1, 2, bias=False), nn.Conv1d(width, width, 5, 2, 2, bias=False)
        self.layers = nn.ModuleList(Heard(conv, nn.BatchNorm1d(width)) for conv in convs)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.drop, self.dense = nn.Dropout(0.2), nn.Linear(2 * width, len(ALPHABET))

    def frames(self, samples: Tensor) -> Tensor:
        """How many frames of the answer are of sounds with so many samples, (N,) int64."""
        return (self.mel.frames(samples) + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) to (N, F, V)."""
        h, heard = self.mel(x)
        for layer in self.layers:
            h, heard = layer(h, heard)
        packed = pack_padded_sequence(self.drop(h).mT, heard.sum(1).cpu(), batch_first=True, enforce_sorted=False)
        # As many frames as the batch has room for, however long its longest sound.
        room = int(self.frames(torch.tensor(x.shape[1])))
        h, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=room)
        z: Tensor = self.dense(self.drop(h))
        return z.log_softmax(2)


@dataclass(frozen=True)
class SpeechCTC:
    """A recogniser of sentences by their letters, for waveforms (N, T) in [-1, 1] at one rate.

    A log-mel spectrum, two convolutions over time, a recurrent layer in both directions, and the log-probabilities of each
    frame's letter, which CTC aligns (Graves et al., 2006, https://doi.org/10.1145/1143844.1143891).

    Arguments:
        rate: Samples a second.
        width: Channels of the convolutions, and units of each direction.
    """

    rate: int = 8000
    width: int = 96

    def __post_init__(self) -> None:
        check_whole("the network's rate", self.rate, 2000)
        check_whole("the network's width", self.width, 1)

    def build(self) -> nn.Module:
        """The network, with fresh weights."""
        return Letters(self)
