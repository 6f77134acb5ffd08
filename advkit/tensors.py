"""Tensors and text in safetensors files: nothing in such a file is code."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from advkit.errors import UsageError


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and text, whole or not at all: whoever reads the path meanwhile sees the old file or the new one.

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
    """The tensors and the metadata of a file.

    Raises:
        UsageError: There is no such file, or it is damaged.
    """
    if not Path(path).is_file():
        raise UsageError(f"there is no file {path}; give the path of a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is not a readable safetensors file ({telling(error)}); it may be cut off") from None


def telling(error: Exception) -> str:
    """The most telling line of an error: torch's state dict errors open with a heading."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return (lines[1] if len(lines) > 1 else (lines or [type(error).__name__])[0]).rstrip(". ")
