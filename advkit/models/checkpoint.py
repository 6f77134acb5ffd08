"""advkit's own checkpoints: a safetensors file whose metadata says which network the tensors belong to.

Nothing in such a file is code; the network is built from the table of names and settings, never from the file.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from advkit.errors import UsageError
from advkit.models import networks
from advkit.tensors import read as read
from advkit.tensors import telling
from advkit.tensors import write as write
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
    # A file of several networks says where the one of its architecture is.
    prefix = metadata.get("prefix", "")
    tensors = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    try:
        module = networks.build(metadata["architecture"])
        module.load_state_dict(tensors)
    except UsageError as error:
        raise UsageError(f"{path} holds a network that advkit does not have: {error}") from None
    except Exception as error:
        what = f"the tensors in {path} do not fit the network {metadata['architecture']!r}"
        raise UsageError(f"{what} that it names: {telling(error)}") from None
    return module, metadata
