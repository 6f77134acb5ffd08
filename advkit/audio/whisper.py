"""Whisper: an encoder of 30 seconds of sound, and a decoder that writes a text token by token.

Symbols: x is a waveform (N, T), F the number of encoder states and d their width, V the number of tokens, L that of a text's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from advkit.audio import whisper_engines
from advkit.audio.recogniser import Recogniser
from advkit.audio.text import check_said, normalise
from advkit.audio.whisper_engines import Engine
from advkit.errors import UsageError
from advkit.sound.features import Mel, decibels
from advkit.sound.threats import lengths

HOP = 160
"""From one frame of features to the next, in samples; an encoder state has two."""


@dataclass(frozen=True)
class _Taught:
    """What the last loss was computed from, and its likeliest tokens: whoever follows a loss asks next whether it is said."""

    outputs: Tensor
    version: int
    texts: tuple[str, ...]
    best: Tensor
    wanted: Tensor

    def is_of(self, outputs: Tensor, texts: Sequence[str]) -> bool:
        """Whether these are the same outputs in memory, unchanged, and the same texts."""
        same = outputs.data_ptr() == self.outputs.data_ptr() and outputs._version == self.version
        return same and outputs.shape == self.outputs.shape and tuple(texts) == self.texts


class Whisper(Recogniser):
    """A recogniser whose outputs are encoder states, (N, F, d); texts are decoded from them greedily, without timestamps.

    Radford, Kim, Xu, Brockman, McLeavey and Sutskever, 2022, "Robust speech recognition via large-scale weak supervision",
    https://arxiv.org/abs/2212.04356.

    Arguments:
        engine: The network.
        config: Its config.json.
        generation: Its generation_config.json: tokens that are never written, and how many there may be.
        name: Its spec.
    """

    def __init__(self, engine: Engine, config: dict[str, Any], generation: dict[str, Any], name: str = "") -> None:
        super().__init__()
        self.engine, self.name = engine, name
        self.mel = Mel(self.rate, 400, HOP, bands=config["num_mel_bins"], pad="reflect")
        self.frames: int = config["max_source_positions"]
        self.end: int = engine.special("endoftext")
        multilingual = config["vocab_size"] > 51864
        prompt = ("startoftranscript", *(("en", "transcribe") if multilingual else ()), "notimestamps")
        self.prompt = [engine.special(name) for name in prompt]
        self.most = min(generation.get("max_length") or math.inf, config["max_target_positions"] - len(self.prompt))
        never = torch.zeros(2, config["vocab_size"])
        never[:, generation.get("suppress_tokens") or []] = -math.inf
        never[0, generation.get("begin_suppress_tokens") or []] = -math.inf
        self.never: Tensor
        self._last: _Taught | None = None
        self.register_buffer("never", never, persistent=False)

    @property
    def seconds(self) -> float:  # type: ignore[override]
        """The longest sound that it takes."""
        return 2 * HOP * self.frames / self.rate

    def forward(self, x: Tensor) -> Tensor:
        """Encoder states, with shape (N, F, d).

        Raises:
            UsageError: A sound is longer than the model hears at once.
        """
        encoded: Tensor = self.engine.encode(self.features(x))
        return encoded

    def features(self, x: Tensor) -> Tensor:
        """Log-mel features, (N, M, 2 F): log10 of each band's power, at most 8 less than the row's greatest; then (it + 4) / 4.

        Raises:
            UsageError: As for :meth:`forward`.
        """
        most = 2 * HOP * self.frames
        if x.shape[1] > most and int(lengths(x).max()) > most:
            longest = int(lengths(x).max()) / self.rate
            raise UsageError(f"the sound lasts {longest:.1f} s; {self.name} hears {self.seconds:g} s at once")
        padded = F.pad(x[:, :most], (0, max(0, most - x.shape[1]))).to(self.never.dtype)
        # The frame that begins where the sound ends is not Whisper's.
        return (decibels(self.mel.mel(padded)[..., :-1], 80.0) / 10 + 4) / 4

    def text(self, outputs: Tensor) -> list[str]:
        """What the decoder writes, normalised."""
        return [normalise(self.engine.text(ids)) for ids in self.tokens(outputs)]

    @torch.no_grad()
    def tokens(self, outputs: Tensor) -> list[list[int]]:
        """The likeliest next token each time, until the end, without the prompt and the end; a list for each row."""
        n, device = len(outputs), outputs.device
        written = torch.empty(n, 0, dtype=torch.int64, device=device)
        with self.engine.decoding(outputs) as step:
            new = torch.tensor(self.prompt, device=device).expand(n, -1)
            for i in range(self.most):
                new = (step(new) + self.never[min(i, 1)]).argmax(-1, keepdim=True)
                written = torch.cat([written, new], 1)
                if bool((written == self.end).any(1).all()):
                    break
        return [self._until_end(row) for row in written.tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self.end)] if self.end in ids else ids

    def loss(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """-log of the probability of the text, written as :func:`written` writes it, (N,)."""
        logits, wanted = self._taught(outputs, texts)
        self._last = _Taught(outputs.detach(), outputs._version, tuple(texts), logits.detach().argmax(-1), wanted)
        each = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-1, reduction="none")
        return each.view_as(wanted).sum(1)

    @torch.no_grad()
    def says(self, outputs: Tensor, texts: Sequence[str]) -> Tensor:
        """Which rows say exactly their text, (N,) bool.

        One pass shows which token would follow each token of the text as it is usually written. Up to the first that differs,
        this is what decoding writes; only rows that still may say the text in other signs (a comma, a numeral) are decoded.
        """
        best, wanted = self._followed(outputs, texts)
        said = (best == wanted).all(1)
        for i in (~said).nonzero().squeeze(1).tolist():
            k = int((best[i] != wanted[i]).nonzero()[0])
            if self._may_become([*wanted[i, :k].tolist(), int(best[i, k])], texts[i]):
                said[i] = self.text(outputs[i : i + 1])[0] == normalise(texts[i])
        return said

    def _followed(self, outputs: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The likeliest token before each token of the texts, and the tokens, both (N, L), with -1 where a text has ended."""
        last = self._last
        if last is not None and last.is_of(outputs, texts):
            best, wanted = last.best, last.wanted
        else:
            logits, wanted = self._taught(outputs, texts)
            best = logits.argmax(-1)
        return torch.where(wanted == -1, -1, best), wanted

    def _may_become(self, ids: list[int], text: str) -> bool:
        """Whether a text that begins with these tokens may, normalised, be this one."""
        begun = self.engine.text(self._until_end(ids))
        if self.end in ids:
            return normalise(begun) == normalise(text)
        # More digits would be spelled in another way.
        return normalise(text).startswith(normalise(re.sub(r"\d+$", "", begun)))

    def _taught(self, outputs: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The logits before each token of the texts, (N, L, V), and the tokens, (N, L), with -1 where a text has ended."""
        ids = [[*self.engine.ids(written(text)), self.end] for text in texts]
        most = max(map(len, ids))
        wanted = torch.tensor([[*row, *[-1] * (most - len(row))] for row in ids], device=outputs.device)
        prompt = torch.tensor(self.prompt, device=outputs.device).expand(len(ids), -1)
        logits = self.engine.logits(torch.cat([prompt, wanted[:, :-1].clamp(min=0)], 1), outputs)[:, len(self.prompt) - 1 :]
        return logits + self.never[(torch.arange(most) > 0).long()], wanted

    def check_text(self, text: str) -> None:
        """Refuse a text of no words, or longer than the model writes.

        Raises:
            UsageError: It is.
        """
        ids = self.engine.ids(written(check_said(text)))
        if len(ids) >= self.most:
            raise UsageError(f"the text {text[:40]!r}... has {len(ids)} tokens; {self.name} writes fewer than {self.most}")
        if bool(self.never[1, ids].isinf().any()):
            raise UsageError(f"the text {text!r} has signs that {self.name} never writes")


class Nearly(nn.Module):
    """A Whisper's encoder that looks at the silence after one sound only now and then: a gradient costs a few times less.

    Most of its context is the silence that fills it up. What the layers say there changes little from step to step of an
    attack, so it is remembered, and computed anew every few calls; what they say about the sound is always computed, with all
    of the silence attended to. Where nothing has changed since, its answers are Whisper's.

    Arguments:
        whisper: The recogniser.
        seconds: How long the sound is; one second after it counts as part of it.
        every: After how many calls the silence is computed anew.
    """

    def __init__(self, whisper: Whisper, seconds: float, every: int = 10) -> None:
        super().__init__()
        self.whisper, self.every, self.calls = whisper, every, 0
        self.frames = min(whisper.frames, math.ceil((seconds + 1) * whisper.rate / (2 * HOP)))
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.silence = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        """Encoder states of one sound (1, T), with shape (1, F, d)."""
        features = self.whisper.features(x)
        if self.calls % self.every == 0:
            with torch.no_grad():
                states, seen = self._encode(features, [])
            self.silence, self.kept = (
                states[:, self.frames :],
                [(k[:, :, self.frames :], v[:, :, self.frames :]) for k, v in seen],
            )
        self.calls += 1
        # The convolutions look at two frames more.
        states, _ = self._encode(features[..., : 2 * self.frames + 4], self.kept)
        return torch.cat([states, self.silence], 1)

    def _encode(self, features: Tensor, kept: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """States, (1, F, d), and the keys and values of every layer, before those that are kept."""
        parts, seen = self.whisper.engine.parts(), []
        h = F.gelu(parts.second(F.gelu(parts.first(features)))).mT
        h = h[:, : self.frames] if kept else h
        h = h + parts.positions[: h.shape[1]]
        for i, layer in enumerate(parts.layers):
            n = layer.before(h)
            q, k, v = (
                part(n).unflatten(2, (layer.heads, -1)).transpose(1, 2) for part in (layer.query, layer.key, layer.value)
            )
            seen.append((k, v))
            if kept:
                k, v = torch.cat([k, kept[i][0]], 2), torch.cat([v, kept[i][1]], 2)
            h = h + layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            h = h + layer.narrow(F.gelu(layer.wide(layer.between(h))))
        return parts.last(h), seen


def written(text: str) -> str:
    """A text as Whisper writes one that it has no doubt about: a capital, a full stop, and a space before.

    >>> written("open the front door"), written("I'm late; am I?")
    (' Open the front door.', " I'm late am I.")
    """
    plain = re.sub(r"\bi\b", "I", normalise(text))
    return f" {plain[:1].upper()}{plain[1:]}."


def load(name: str) -> Whisper:
    """The model of a folder, or of a name on the Hugging Face hub; see :func:`advkit.audio.whisper_engines.load`."""
    engine, config, generation = whisper_engines.load(name)
    if Path(name).is_dir():
        name = Path(name).name
    return Whisper(engine, config, generation, f"whisper:{name}").eval()
