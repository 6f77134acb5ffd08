"""ONNX graphs, run by ONNX Runtime, or as torch modules with gradients where onnx2torch is installed and agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advkit.errors import UsageError, first_line
from advkit.models.batch import FixedBatch
from advkit.oracle import Access, logits_of

_TYPES = {"tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16}
_AGREE = 1e-3


class OnnxModule(nn.Module):
    """One session of ONNX Runtime, as a module from tensors to tensors; it has no gradients.

    Arguments:
        session: An ``onnxruntime.InferenceSession`` with one input.
        output: The name of the output that holds the logits.
    """

    def __init__(self, session: Any, output: str) -> None:
        super().__init__()
        self.session, self.output = session, output
        self.input = session.get_inputs()[0].name
        self.dtype = _TYPES[session.get_inputs()[0].type]

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, K), dtype and device of x."""
        given = x.detach().cpu().numpy().astype(self.dtype)
        (outputs,) = self.session.run([self.output], {self.input: given})
        return torch.from_numpy(outputs).to(x)


def load(path: Path) -> tuple[nn.Module, Access, tuple[str, ...]]:
    """The graph as a module, what it can answer, and what to know of it.

    Raises:
        UsageError: ONNX Runtime is not installed or cannot read the file, or the graph is not a classifier of one input.
    """
    session = _session(path)
    inputs = session.get_inputs()
    if len(inputs) != 1 or inputs[0].type not in _TYPES:
        kinds = ", ".join(f"{given.name}: {given.type}" for given in inputs)
        raise UsageError(f"{path} takes {kinds}; it should take one input of floats")
    if not inputs[0].shape:
        raise UsageError(f"{path} takes a single number; it should take a batch of examples")
    plain = OnnxModule(session, _output(path, session))
    batch, *shape = [size if isinstance(size, int) else None for size in inputs[0].shape]
    limits = (batch, batch) if batch else (1, None)
    module = FixedBatch(plain, shape, *limits)
    notes = _softmax(path, plain.output)
    converted, note = _converted(path, session, plain.output, module)
    if converted is None:
        return module, Access.SCORES, (note, *notes)
    return FixedBatch(converted, shape, *limits), Access.GRADIENTS, (note, *notes)


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError(f'{path} needs ONNX Runtime, which is not installed; run pip install "advkit[onnx]"') from None
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(path, providers=providers)
    except Exception as error:
        raise UsageError(f"ONNX Runtime cannot read {path}: {first_line(error)}") from error


def _output(path: Path, session: Any) -> str:
    """The output named logits, or the first of floats with two dimensions."""
    outputs = session.get_outputs()
    floats = [output for output in outputs if output.type in _TYPES]
    named = [output.name for output in floats if output.name == "logits"]
    flat = [output.name for output in floats if len(output.shape or ()) == 2]
    if not named and not flat:
        kinds = ", ".join(f"{output.name}: {output.type} {output.shape}" for output in outputs)
        raise UsageError(f"{path} answers with {kinds}; one output should be logits of shape (N, K)")
    return (named + flat)[0]


def _softmax(path: Path, output: str) -> tuple[str, ...]:
    """A note, if the logits come out of a softmax. Seen only where the package onnx is installed."""
    try:
        import onnx
    except ImportError:
        return ()
    graph = onnx.load(path, load_external_data=False).graph
    last = next((node.op_type for node in graph.node if output in node.output), "")
    if last != "Softmax":
        return ()
    return ("the graph ends in a softmax, so it answers with probabilities; use --probabilities (probabilities=True)",)


def _converted(path: Path, session: Any, output: str, module: FixedBatch) -> tuple[nn.Module | None, str]:
    """The graph as a torch module, if onnx2torch makes one that agrees with ONNX Runtime; and a note on what happened."""
    scores = "the graph runs in ONNX Runtime, which gives scores and no gradients"
    try:
        import onnx2torch
    except ImportError:
        return None, f"{scores}; with the package onnx2torch installed, attacks that need gradients work too"
    if None in module.shape:
        return None, f"{scores}; its input has no fixed shape, so a conversion by onnx2torch could not be checked"
    x = torch.rand(module.least, *[int(size or 1) for size in module.shape], generator=torch.Generator().manual_seed(0))
    names = [output.name for output in session.get_outputs()]
    try:
        converted = _Picked(onnx2torch.convert(str(path)), names.index(output)).eval()
        with torch.no_grad():
            difference = float((converted(x) - module(x)).abs().max())
    except Exception as error:
        return None, f"{scores}; onnx2torch could not convert it ({type(error).__name__})"
    if not difference <= _AGREE:
        return None, f"{scores}; what onnx2torch made of it differs from it by {difference:.2g} and is not used"
    return converted, f"the graph was converted by onnx2torch for its gradients and agrees with ONNX Runtime to {_AGREE:g}"


class _Picked(nn.Module):
    """One of several outputs."""

    def __init__(self, inner: nn.Module, index: int) -> None:
        super().__init__()
        self.inner, self.index = inner, index

    def forward(self, x: Tensor) -> Tensor:
        """The output of this index."""
        outputs = self.inner(x)
        return outputs[self.index] if isinstance(outputs, tuple | list) else logits_of(outputs)
