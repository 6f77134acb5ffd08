"""advkit's own checkpoints: a safetensors file whose metadata says which network the tensors belong to.

Nothing in such a file is code; the network is built from the table of names and settings, never from the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from advkit.errors import UsageError
from advkit.models import networks
from advkit.version import __version__


def save(path: str | Path, module: nn.Module, architecture: str, **metadata: str) -> None:
    """Write a module's state; whoever reads the path meanwhile sees the old file or the new one, never a part.

    Arguments:
        path: Where to write, a file that ends in .safetensors.
        module: The network.
        architecture: What :func:`advkit.models.networks.build` makes it from: ``mnist-cnn(width=16)``.
        metadata: What else to note beside "advkit" (the version) and "architecture".

    Raises:
        UsageError: The file cannot be written.
    """
    write(path, module.state_dict(), {**metadata, "advkit": __version__, "architecture": architecture})


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text to a safetensors file, whole or not at all.

    Raises:
        UsageError: The file cannot be written.
    """
    # Copies, because the format refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(safetensors.torch.save(copies, metadata))
        os.replace(part, path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        UsageError: There is no such file, or it is damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}; give the path of a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable safetensors file ({_line(error)}); it may be cut off") from None


def load(path: str | Path) -> tuple[nn.Module, dict[str, str]]:
    """The network in a checkpoint that :func:`save` wrote, and the metadata.

    Raises:
        UsageError: The file is damaged, was written by another program, or its tensors do not fit its network.
    """
    tensors, metadata = read(path)
    if "architecture" not in metadata:
        raise UsageError(
            f"{path} does not say which network it belongs to, as advkit's checkpoints do; "
            "give the folder of a Hugging Face model, or a file.py:function that builds the network and loads it"
        )
    try:
        module = networks.build(metadata["architecture"])
        module.load_state_dict(tensors)
    except UsageError as error:
        raise UsageError(f"{path} holds a network that advkit does not have: {error}") from None
    except Exception as error:
        what = f"the tensors in {path} do not fit the network {metadata['architecture']!r}"
        raise UsageError(f"{what} that it names: {_line(error)}") from None
    return module, metadata


def _line(error: Exception) -> str:
    """The most telling line of an error: torch's state dict errors open with a heading."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else (lines or [type(error).__name__])[0]).rstrip(". ")
