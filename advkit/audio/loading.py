"""Recognisers by name: what a spec on the command line may be."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from advkit.audio.recogniser import Recogniser, TextOnly
from advkit.errors import UsageError
from advkit.models import checkpoint, find_device
from advkit.python import resolve

RECOGNISERS = {
    "pocketsphinx": "PocketSphinx with its US English model; pocketsphinx(grammar=...) and more settings",
    "whisper:FOLDER": "a Whisper in the format of transformers: config.json, tokenizer.json and safetensors",
    "whisper:ORG/NAME": "the same from the Hugging Face hub, downloaded",
    "ctc:FOLDER": "a network of transformers for CTC: wav2vec2, HuBERT and their kin",
    "ctc:ORG/NAME": "the same from the Hugging Face hub, downloaded",
    "FILE.safetensors": "a network for CTC that advkit trained",
    "text:FILE.py:FUNCTION": "a function of your own, from a waveform (T,) at 16 kHz, float32 of numpy, to a text",
}
"""The kinds of spec that :func:`load` understands."""


def is_recogniser(spec: str) -> bool:
    """Whether a spec names a recogniser of speech, so that ``--model`` is loaded by :func:`load`.

    >>> is_recogniser("whisper:openai/whisper-tiny.en"), is_recogniser("pocketsphinx(wip=1)"), is_recogniser("model.onnx")
    (True, True, False)
    """
    return _kind(spec) in _LOADERS or _has_alphabet(Path(spec))


def load(spec: str, device: str = "cpu") -> Recogniser:
    """The recogniser that a spec names, on a device, in evaluation mode.

    Arguments:
        spec: One of the kinds in :data:`RECOGNISERS`.
        device: Where to put it: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        UsageError: There is no such recogniser, or it cannot be loaded, or a package that it needs is missing.
    """
    where = find_device(device)
    if Path(spec).suffix == ".safetensors":
        return _trained(spec).to(where).eval()
    kind = _kind(spec)
    if kind not in _LOADERS:
        raise _unknown(spec, kind)
    return _LOADERS[kind](spec).to(where).eval()


def _kind(spec: str) -> str:
    """What a spec begins with: ``whisper:`` or ``pocketsphinx``."""
    head, colon, _ = spec.strip().partition(":")
    name = head.partition("(")[0].strip()
    return name if name == "pocketsphinx" else name + colon


def _unknown(spec: str, kind: str) -> UsageError:
    close = difflib.get_close_matches(kind.rstrip(":"), [name.rstrip(":") for name in _LOADERS], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return UsageError(f"unknown recogniser {spec!r}; a recogniser is one of {', '.join(RECOGNISERS)}{hint}")


def _has_alphabet(path: Path) -> bool:
    """Whether a checkpoint is of a network that says letters."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        return hasattr(checkpoint.load(path)[0], "alphabet")
    except UsageError:
        # Whoever loads it as a classifier says what is wrong with it.
        return False


def _trained(spec: str) -> Recogniser:
    from advkit.audio.ctc import CTC

    network: nn.Module = checkpoint.load(spec)[0]
    if not hasattr(network, "alphabet"):
        raise UsageError(f"{spec} holds a classifier; a recogniser is a network for CTC, as speech-ctc is")
    return CTC(network, name=spec)


def _pocketsphinx(spec: str) -> Recogniser:
    from advkit.audio import sphinx

    return sphinx.load(spec)


def _whisper(spec: str) -> Recogniser:
    from advkit.audio import whisper

    return whisper.load(_rest(spec))


def _ctc(spec: str) -> Recogniser:
    from advkit.audio import ctc

    return ctc.load(_rest(spec))


def _function(spec: str) -> Recogniser:
    hear = resolve(_rest(spec), "recogniser")

    def heard(x: Tensor) -> str:
        text: str = hear(x.numpy())
        return text

    return TextOnly(heard, name=spec)


def _rest(spec: str) -> str:
    kind, _, rest = spec.strip().partition(":")
    if not rest.strip():
        kinds = [known for known in RECOGNISERS if known.startswith(f"{kind}:")]
        raise UsageError(f"the recogniser {spec!r} names nothing; write {' or '.join(kinds)}")
    return rest.strip()


_LOADERS: dict[str, Callable[[str], Recogniser]] = {
    "pocketsphinx": _pocketsphinx,
    "whisper:": _whisper,
    "ctc:": _ctc,
    "text:": _function,
}
