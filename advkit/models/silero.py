"""Silero VAD, a detector of speech, as a classifier of sounds: class 1 is speech.

Symbols: x is a batch of waveforms (N, T) at 16 kHz, cut into F chunks of 512 samples, p_f the probability of speech in the
f-th. The network is written here anew; its weights come from the package's ONNX file, and none of its code runs. (Those in
its safetensors file are of another training and give other probabilities than the detector that people use.)
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.errors import UsageError

CHUNK = 512
"""The samples of a chunk."""

CONTEXT = 64
"""The samples before a chunk that are heard with it, and those mirrored at its end."""

DITHER = 1e-12
"""What is added to the power of each bin: the root of a silent one has no gradient."""


class Silero(nn.Module):
    """Waveforms (N, T) at 16 kHz to logits (N, 2): no speech, and speech somewhere.

    The second logit is that of the chunk that is most like speech, max_f log(p_f / (1 - p_f)), the first is 0: speech is
    heard where any p_f is more than one half, which is the package's threshold. Its gradient is that of the logarithm of the
    sum of exp, in which every chunk of speech has a part, not only the loudest. A chunk after the end of a sound is not heard.

    Silero Team, 2021, "Silero VAD: pre-trained enterprise-grade voice activity detector",
    https://github.com/snakers4/silero-vad.

    Attributes:
        rate: Samples a second.
    """

    rate = 16_000

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, 1, 1)
        self.conv2 = nn.Conv1d(128, 64, 3, 2, 1)
        self.conv3 = nn.Conv1d(64, 64, 3, 2, 1)
        self.conv4 = nn.Conv1d(64, 128, 3, 1, 1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, 2)."""
        if x.ndim != 2:
            raise UsageError(f"silero-vad hears sounds (N, T); the inputs have shape {tuple(x.shape)}")
        # Whole chunks of zeros after a sound are not heard, whatever the batch.
        last = torch.arange(1, x.shape[1] + 1, device=x.device)
        chunks = (torch.where(x != 0, last, 0).amax(1).clamp(min=1) + CHUNK - 1) // CHUNK
        logits = self.chunks(x)
        late = torch.arange(logits.shape[1], device=x.device) >= chunks.unsqueeze(1)
        logits = logits.masked_fill(late, -torch.inf)
        smooth = logits.logsumexp(1)
        speech = smooth + (logits.amax(1) - smooth).detach()
        return torch.stack([torch.zeros_like(speech), speech], 1)

    def chunks(self, x: Tensor) -> Tensor:
        """log(p_f / (1 - p_f)) of each chunk, for waveforms (N, T), with shape (N, F)."""
        padded = F.pad(x, (CONTEXT, -x.shape[1] % CHUNK))
        windows = padded.unfold(1, CONTEXT + CHUNK, CHUNK)
        n, f, _ = windows.shape
        h = self._encoded(windows.flatten(0, 1)).view(n, f, -1)
        state = h.new_zeros(n, 128), h.new_zeros(n, 128)
        said = []
        for chunk in h.unbind(1):
            state = self.lstm_cell(chunk, state)
            said.append(self.final_conv(state[0].relu().unsqueeze(2)).flatten(1))
        return torch.cat(said, 1)

    def _encoded(self, windows: Tensor) -> Tensor:
        """What the recurrent layer is told of each chunk with its context, (M, 576) to (M, 128)."""
        mirrored = F.pad(windows, (0, CONTEXT), mode="reflect")
        real, imaginary = self.stft_conv(mirrored.unsqueeze(1)).chunk(2, 1)
        h = (real.square() + imaginary.square() + DITHER).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = layer(h).relu()
        return h.squeeze(2)


def load() -> Silero:
    """The detector with the weights of the installed package ``silero-vad``, in evaluation mode.

    Raises:
        UsageError: The package, or onnx, is not installed, or its version has no such weights.
    """
    file = weights()
    found = _arrays(file)
    network = Silero()
    try:
        network.load_state_dict({ours: found[theirs] for ours, theirs in NAMES.items()} | _recurrent(found))
    except (KeyError, RuntimeError):
        raise UsageError(f"{file} holds other weights than those of silero-vad 6.2; pip install {PACKAGE}") from None
    return network.eval()


NAMES = {
    "stft_conv.weight": "stft.forward_basis_buffer",
    **{f"conv{i + 1}.{kind}": f"encoder.{i}.{kind}" for i in range(4) for kind in ("weight", "bias")},
    "final_conv.weight": "output.weight",
    "final_conv.bias": "output.bias",
}
"""Ours, and those of the file, but for the recurrent layer."""

PACKAGE = "--no-deps 'silero-vad==6.2.3' onnx"
"""What has to be installed."""


def weights() -> Path:
    """The file of the weights in the installed package, found without importing it.

    Raises:
        UsageError: There is none.
    """
    try:
        files = importlib.metadata.files("silero-vad") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "silero_vad_16k_sequence.onnx":
            return Path(str(file.locate()))
    raise UsageError(f"the weights of silero-vad are not here; pip install {PACKAGE}")


def _arrays(file: Path) -> dict[str, Tensor]:
    """The constants of an ONNX graph, by name."""
    try:
        import onnx
    except ImportError:
        raise UsageError(f"reading the weights of silero-vad needs onnx; pip install {PACKAGE}") from None
    graph = onnx.load(str(file)).graph
    return {array.name: torch.from_numpy(onnx.numpy_helper.to_array(array).copy()) for array in graph.initializer}


def _recurrent(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the recurrent layer, which have no telling names; ONNX has its gates in the order i, o, f, c."""
    w, r, b = (found[name][0] for name in sorted(name for name in found if name.startswith("onnx::LSTM")))
    parts = {"weight_ih": w, "weight_hh": r, "bias_ih": b[: len(b) // 2], "bias_hh": b[len(b) // 2 :]}
    gates = {name: part.chunk(4) for name, part in parts.items()}
    return {f"lstm_cell.{name}": torch.cat([i, f, c, o]) for name, (i, o, f, c) in gates.items()}
