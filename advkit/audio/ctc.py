"""Recognisers that say a character, or nothing, in every frame: connectionist temporal classification.

Symbols: x is a waveform (N, T), F the number of frames, V that of signs: the characters and the blank.

Graves, Fernandez, Gomez and Schmidhuber, 2006, "Connectionist temporal classification: labelling unsegmented sequence data with
recurrent neural networks", https://doi.org/10.1145/1143844.1143891.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.audio.recogniser import Recogniser
from advkit.audio.text import check_said, normalise
from advkit.audio.whisper_engines import hidden_torchvision, quietly
from advkit.errors import UsageError, first_line
from advkit.sound.threats import lengths

NEVER = -1e4
"""The log-probability of every sign but the blank in frames after the end of a sound: that of no sum."""
SPACES = (" ", "|")
"""What alphabets have between words."""


class CTC(Recogniser):
    """A network (N, T) -> (N, F, V) of log-probabilities as a recogniser: the likeliest sign of each frame is what is heard.

    Frames after the end of a sound hold the blank for certain, so they change neither the text nor the loss.

    Arguments:
        network: The network. It has ``alphabet``, the V signs; ``rate``; and ``frames(lengths)``, how many frames it makes of
            so many samples, int64 (N,) to int64 (N,). Signs of more than one character are never heard.
        blank: Which sign says nothing.
        name: Its spec.
    """

    def __init__(self, network: nn.Module, blank: int = 0, name: str = "") -> None:
        super().__init__()
        self.network, self.blank, self.name = network, blank, name
        self.rate = int(network.rate)  # type: ignore[arg-type]
        signs: list[str] = [" " if sign in SPACES else sign.lower() for sign in network.alphabet]  # type: ignore[union-attr]
        self.signs = ["" if i == blank or len(sign) != 1 else sign for i, sign in enumerate(signs)]
        self.numbers = {sign: i for i, sign in reversed(list(enumerate(self.signs))) if sign}

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, with shape (N, F, V)."""
        said: Tensor = self.network(x)
        sounding = torch.arange(said.shape[1], device=x.device) < self.network.frames(lengths(x)).unsqueeze(1)  # type: ignore[operator]
        nothing = torch.full_like(said[:1, :1], NEVER)
        nothing[..., self.blank] = 0
        return torch.where(sounding.unsqueeze(2), said, nothing)

    def text(self, outputs: Tensor) -> list[str]:
        """The likeliest sign of each frame, repeated ones once, without blanks."""
        best = outputs.argmax(2)
        return [normalise("".join(self.signs[i] for i in row.unique_consecutive().tolist())) for row in best]

    def loss(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """-log of the probability of the text, over all ways to say it, (N,).

        Raises:
            UsageError: A text needs more frames than a sound has, or signs that the network does not have.
        """
        wanted = [self._spelled(text) for text in texts]
        self._check_frames(outputs, wanted, texts)
        n = torch.tensor([len(row) for row in wanted])
        frames = torch.full_like(n, outputs.shape[1])
        flat = torch.tensor([i for row in wanted for i in row], device=outputs.device)
        return F.ctc_loss(outputs.transpose(0, 1), flat, frames, n, blank=self.blank, reduction="none")

    def _check_frames(self, outputs: Tensor, wanted: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
        """Between two signs that are the same there is a blank."""
        have = (outputs.detach().amin(2) > NEVER).sum(1).tolist()
        for row, frames, text in zip(wanted, have, texts, strict=True):
            need = len(row) + sum(a == b for a, b in itertools.pairwise(row))
            if need > frames:
                raise UsageError(
                    f"the text {text!r} needs {need} frames and the sound has {frames}; give a shorter text or a longer sound"
                )

    def _spelled(self, text: str) -> list[int]:
        self.check_text(text)
        return [self.numbers[letter] for letter in normalise(text)]

    def check_text(self, text: str) -> None:
        """Refuse a text with characters that the network does not have.

        Raises:
            UsageError: It has some.
        """
        missing = sorted(set(check_said(text)) - self.numbers.keys())
        if missing:
            known = "".join(sorted(self.numbers))
            who = self.name or "the network"
            raise UsageError(f"the text {text!r} has {missing}, which {who} cannot say; it says {known!r}")


class Pretrained(nn.Module):
    """A CTC network of transformers: waveforms to log-probabilities, each sound alone, so that no padding is heard.

    Arguments:
        model: A model for CTC that takes waveforms: Wav2Vec2ForCTC, HubertForCTC.
        alphabet: Its signs.
        rate: Samples a second.
        normalised: Whether it takes sounds of mean 0 and variance 1.
    """

    def __init__(self, model: Any, alphabet: Sequence[str], rate: int, normalised: bool) -> None:
        super().__init__()
        self.model, self.alphabet, self.rate, self.normalised = model, tuple(alphabet), rate, normalised

    def frames(self, n: Tensor) -> Tensor:
        """How many frames so many samples make, (N,)."""
        for width, step in zip(self.model.config.conv_kernel, self.model.config.conv_stride, strict=True):
            n = (n - width).div(step, rounding_mode="floor") + 1
        return n.clamp(min=0)

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities, with shape (N, F, V); zeros where a sound has no more frames.

        Raises:
            UsageError: A sound is too short for a frame.
        """
        n = lengths(x)
        if not bool((self.frames(n) > 0).all()):
            raise UsageError(f"a sound has {int(n.min())} samples, which are too few for a frame of the recogniser")
        out = x.new_zeros(len(x), int(self.frames(n).max()), len(self.alphabet))
        for length in n.unique().tolist():
            rows = (n == length).nonzero().squeeze(1)
            said = self._said(x[rows, :length])
            out = out.index_put((rows.unsqueeze(1), torch.arange(said.shape[1], device=x.device)), said)
        return out

    def _said(self, x: Tensor) -> Tensor:
        if self.normalised:
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-7).sqrt()
        logits: Tensor = self.model(x).logits
        return logits.log_softmax(2)


def load(name: str) -> CTC:
    """The recogniser of a folder in the format of transformers, or of a name on the Hugging Face hub, which is downloaded.

    Raises:
        UsageError: transformers is not installed, or this is no CTC network with safetensors weights and a vocab.json.
    """
    local = Path(name).is_dir()
    if not local and (Path(name).suffix or name.count("/") != 1):
        raise UsageError(f"there is no folder {name}; write ctc:FOLDER, or ctc:ORG/NAME for one of the Hugging Face hub")
    if local and not list(Path(name).glob("*.safetensors")):
        raise UsageError(f"{name} has no .safetensors file; pickled weights are not loaded, save them with save_pretrained")
    with hidden_torchvision():
        try:
            from transformers import AutoModelForCTC
        except ImportError:
            raise UsageError(f'{name} needs transformers, which is not installed; run pip install "advkit[hf]"') from None
        try:
            options = {"use_safetensors": True, "trust_remote_code": False, "local_files_only": local}
            with quietly():
                # Code in the repository is not run, and pickled weights are not read.
                model, info = AutoModelForCTC.from_pretrained(name, **options, output_loading_info=True)
        except Exception as error:
            raise UsageError(f"transformers cannot load {name} ({type(error).__name__}: {first_line(error)})") from error
        vocabulary = _settings(name, "vocab.json", local)
        processor = _settings(name, "preprocessor_config.json", local)
    if info["missing_keys"]:
        raise UsageError(f"the weights of {name} lack {', '.join(sorted(info['missing_keys'])[:3])}; it is not trained for CTC")
    if not hasattr(model.config, "conv_kernel"):
        raise UsageError(f"{name} is a {model.config.model_type}, which takes no waveforms; advkit knows wav2vec2 and its kin")
    alphabet = [""] * model.config.vocab_size
    for sign, i in vocabulary.items():
        alphabet[i] = sign
    rate, scaled = processor.get("sampling_rate", 16_000), processor.get("do_normalize", True)
    network = Pretrained(model.float(), alphabet, rate, scaled)
    return CTC(network, model.config.pad_token_id, f"ctc:{Path(name).name if local else name}").eval()


def _settings(name: str, file: str, local: bool) -> dict[str, Any]:
    """The contents of a file of JSON that comes with the model; empty where there is none."""
    from transformers.utils import cached_file

    try:
        path = cached_file(name, file, local_files_only=local, _raise_exceptions_for_missing_entries=False)
        content = json.loads(Path(path).read_text("utf-8")) if path else {}
    except Exception as error:
        raise UsageError(f"cannot read {file} of {name}: {first_line(error)}; it should be JSON") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file} of {name} is no JSON object, {{...}}")
    return content
