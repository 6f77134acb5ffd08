"""Whisper's networks as others compute them: transformers, or openai-whisper. Weights come from safetensors only.

Symbols: M mel bands, S = 2 F frames of them, F encoder states of width d, L tokens, V tokens that there are.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from advkit.errors import UsageError, first_line
from advkit.models import checkpoint

Step = Callable[[Tensor], Tensor]
"""Tokens that follow the ones before, (N, L), to the logits of what comes next, (N, V)."""


class Engine(Protocol):
    """An encoder, a decoder and a table of tokens."""

    def encode(self, mel: Tensor) -> Tensor:
        """Log-mel features (N, M, 2 F) to encoder states (N, F, d)."""

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        """The logits after each token, (N, L, V)."""

    def decoding(self, states: Tensor) -> contextlib.AbstractContextManager[Step]:
        """What decodes token by token and remembers what it computed."""

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens."""

    def special(self, name: str) -> int:
        """The token called ``<|name|>``."""

    def parts(self) -> Parts:
        """What the encoder is made of."""


class Layer(NamedTuple):
    """A layer of the encoder: attention and a network for each frame, each behind a normalization and beside a shortcut."""

    before: nn.Module
    query: nn.Module
    key: nn.Module
    value: nn.Module
    out: nn.Module
    heads: int
    between: nn.Module
    wide: nn.Module
    narrow: nn.Module


class Parts(NamedTuple):
    """An encoder: two convolutions, positions (F, d), layers and a last normalization."""

    first: nn.Module
    second: nn.Module
    positions: Tensor
    layers: tuple[Layer, ...]
    last: nn.Module


class Transformers(nn.Module):
    """The engine of Hugging Face transformers.

    Arguments:
        model: A WhisperForConditionalGeneration.
        tokens: A ``tokenizers.Tokenizer``.
    """

    def __init__(self, model: Any, tokens: Any) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = model.model.encoder, model.model.decoder, model.proj_out
        self._tokens = tokens

    def encode(self, mel: Tensor) -> Tensor:
        """Encoder states."""
        states: Tensor = self.encoder(mel).last_hidden_state
        return states

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Logits."""
        hidden = self.decoder(input_ids=tokens, encoder_hidden_states=states, use_cache=False).last_hidden_state
        logits: Tensor = self.head(hidden)
        return logits

    @contextlib.contextmanager
    def decoding(self, states: Tensor) -> Iterator[Step]:
        """A step with a cache."""
        past = None

        def step(tokens: Tensor) -> Tensor:
            nonlocal past
            out = self.decoder(input_ids=tokens, encoder_hidden_states=states, past_key_values=past, use_cache=True)
            past = out.past_key_values
            logits: Tensor = self.head(out.last_hidden_state[:, -1])
            return logits

        yield step

    def ids(self, text: str) -> list[int]:
        """Tokens."""
        return list(self._tokens.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """Text."""
        return str(self._tokens.decode(list(ids), skip_special_tokens=True))

    def special(self, name: str) -> int:
        """A token by its name."""
        found = self._tokens.token_to_id(f"<|{name}|>")
        if found is None:
            raise UsageError(f"the model's tokenizer.json has no token <|{name}|>; it should be Whisper's own")
        return int(found)

    def parts(self) -> Parts:
        """The encoder's parts."""
        layers = tuple(self._layer(layer) for layer in self.encoder.layers)
        encoder = self.encoder
        return Parts(encoder.conv1, encoder.conv2, encoder.embed_positions.weight, layers, encoder.layer_norm)

    def _layer(self, layer: Any) -> Layer:
        a = layer.self_attn
        attention = (a.q_proj, a.k_proj, a.v_proj, a.out_proj, a.num_heads)
        return Layer(layer.self_attn_layer_norm, *attention, layer.final_layer_norm, layer.fc1, layer.fc2)


class OpenAI(nn.Module):
    """The engine of openai-whisper.

    Arguments:
        model: A whisper.model.Whisper.
        tokens: A whisper.tokenizer.Tokenizer.
    """

    def __init__(self, model: Any, tokens: Any) -> None:
        super().__init__()
        self.model = model
        self._tokens = tokens

    def encode(self, mel: Tensor) -> Tensor:
        """Encoder states."""
        states: Tensor = self.model.encoder(mel)
        return states

    def logits(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model.decoder(tokens, states)
        return logits

    @contextlib.contextmanager
    def decoding(self, states: Tensor) -> Iterator[Step]:
        """A step with a cache."""
        cache, hooks = self.model.install_kv_cache_hooks()
        try:
            yield lambda tokens: self.model.decoder(tokens, states, kv_cache=cache)[:, -1]
        finally:
            for hook in hooks:
                hook.remove()

    def ids(self, text: str) -> list[int]:
        """Tokens."""
        return list(self._tokens.encode(text))

    def text(self, ids: Sequence[int]) -> str:
        """Text."""
        return str(self._tokens.decode([token for token in ids if token < self._tokens.eot]))

    def special(self, name: str) -> int:
        """A token by its name."""
        return int(self._tokens.special_tokens[f"<|{name}|>"])

    def parts(self) -> Parts:
        """The encoder's parts."""
        encoder = self.model.encoder
        layers = tuple(self._layer(block) for block in encoder.blocks)
        return Parts(encoder.conv1, encoder.conv2, encoder.positional_embedding, layers, encoder.ln_post)

    def _layer(self, block: Any) -> Layer:
        a = block.attn
        return Layer(block.attn_ln, a.query, a.key, a.value, a.out, a.n_head, block.mlp_ln, block.mlp[0], block.mlp[2])


def load(name: str) -> tuple[Engine, dict[str, Any], dict[str, Any]]:
    """The network of a folder or of a hub's name, its config.json and its generation_config.json.

    Arguments:
        name: A folder in the format of transformers, or ``org/name`` on the Hugging Face hub, which is downloaded.

    Raises:
        UsageError: Neither package is installed, or it is no Whisper with safetensors weights.
    """
    local = Path(name).is_dir()
    if local:
        _check_folder(Path(name))
    elif Path(name).suffix or name.count("/") != 1:
        raise UsageError(f"there is no folder {name}; write whisper:FOLDER, or whisper:ORG/NAME for the Hugging Face hub")
    if _has("transformers"):
        return _transformers(name, local)
    if local and _has("whisper"):
        return openai(Path(name))
    raise UsageError(f'{name} needs transformers, which is not installed; run pip install "advkit[hf]"')


def _has(package: str) -> bool:
    with hidden_torchvision():
        try:
            __import__(package)
        except ImportError:
            return False
    return True


@contextlib.contextmanager
def hidden_torchvision() -> Iterator[None]:
    """Without torchvision: speech has no use for it, and one that does not fit torch keeps transformers from being imported."""
    if "torchvision" in sys.modules:
        yield
        return
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torchvision"]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the bars that transformers draws while it loads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    config = _json(folder / "config.json")
    if config.get("model_type") != "whisper":
        raise UsageError(f"{folder} holds a model of type {config.get('model_type')!r}; it should be 'whisper'")
    if not list(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} has no .safetensors file; pickled weights are not loaded, save them with save_pretrained")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {first_line(error)}; it should be JSON") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is no JSON object, {{...}}")
    return content


def _transformers(name: str, local: bool) -> tuple[Engine, dict[str, Any], dict[str, Any]]:
    with hidden_torchvision():
        from tokenizers import Tokenizer
        from transformers import WhisperForConditionalGeneration
        from transformers.utils import cached_file

        try:
            with quietly():
                # Code in the repository is not run, and pickled weights are not read.
                model, info = WhisperForConditionalGeneration.from_pretrained(
                    name,
                    use_safetensors=True,
                    trust_remote_code=False,
                    local_files_only=local,
                    output_loading_info=True,
                    dtype=torch.float32,
                )
            tokens = Tokenizer.from_file(str(cached_file(name, "tokenizer.json", local_files_only=local)))
        except Exception as error:
            raise UsageError(f"transformers cannot load {name} ({type(error).__name__}: {first_line(error)})") from error
    if info["missing_keys"]:
        raise UsageError(f"the weights of {name} lack {', '.join(sorted(info['missing_keys'])[:3])}; it is no trained Whisper")
    return Transformers(model, tokens), model.config.to_dict(), model.generation_config.to_dict()


_NAMES = {
    r"^model\.": "",
    r"\.layers\.": ".blocks.",
    r"self_attn_layer_norm": "attn_ln",
    r"encoder_attn_layer_norm": "cross_attn_ln",
    r"final_layer_norm": "mlp_ln",
    r"self_attn": "attn",
    r"encoder_attn": "cross_attn",
    r"q_proj": "query",
    r"k_proj": "key",
    r"v_proj": "value",
    r"out_proj": "out",
    r"\.fc1\.": ".mlp.0.",
    r"\.fc2\.": ".mlp.2.",
    r"embed_positions\.weight": "positional_embedding",
    r"embed_tokens": "token_embedding",
    r"encoder\.layer_norm": "encoder.ln_post",
    r"decoder\.layer_norm": "decoder.ln",
}
"""What transformers calls a tensor, to what openai-whisper calls it."""


def openai(folder: Path) -> tuple[Engine, dict[str, Any], dict[str, Any]]:
    """What :func:`load` gives for a folder, computed by openai-whisper.

    Raises:
        UsageError: The folder does not hold all of Whisper's tensors in one file.
    """
    from whisper.model import ModelDimensions, Whisper
    from whisper.tokenizer import get_tokenizer

    config = _json(folder / "config.json")
    tensors, _ = checkpoint.read(folder / "model.safetensors")
    sizes = [config[f"{side}_{what}"] for side in ("encoder", "decoder") for what in ("attention_heads", "layers")]
    d = config["d_model"]
    audio = (config["num_mel_bins"], config["max_source_positions"], d, *sizes[:2])
    model = Whisper(ModelDimensions(*audio, config["vocab_size"], config["max_target_positions"], d, *sizes[2:]))
    try:
        model.load_state_dict({_renamed(name): tensor.float() for name, tensor in tensors.items() if name != "proj_out.weight"})
    except RuntimeError as error:
        raise UsageError(f"the tensors of {folder} do not make a Whisper: {first_line(error)}") from None
    with warnings.catch_warnings():
        # It leaves its table of tokens open.
        warnings.simplefilter("ignore", ResourceWarning)
        tokens = get_tokenizer(model.is_multilingual, num_languages=model.num_languages, language="en", task="transcribe")
    return OpenAI(model, tokens), config, _json(folder / "generation_config.json")


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = re.sub(theirs, ours, name)
    return name
