"""A trained network as a graph of layers that bounds understand.

Symbols: v_0 is the input and v_i the value of node i, of shape (N, *); W and b are the weight and bias of an affine layer;
A holds the coefficients of K linear functions of a value, with shape (N, K, *).
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from advkit.errors import UsageError, first_line
from advkit.models.networks import Normalize

Shape = tuple[int, ...]
Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""The mean and variance, each (C,), of the batch at a BatchNorm, by the layer's name."""


@dataclass(frozen=True)
class Affine:
    """v -> W v + b.

    Arguments:
        product: (v, W) to W v, batch-first; linear in both.
        transposed: (A, W, shape) to A W, where A is (M, *) and a row of the result has the shape.
        weight: W; None where its entries are fixed and not negative, as in a mean or a reshape.
        bias: b, which broadcasts against one row of W v; None for 0.
        mixes: Whether an entry of W v depends on more than one of v.
    """

    product: Callable[[Tensor, Any], Tensor]
    transposed: Callable[[Tensor, Any, Shape], Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None
    mixes: bool = True

    def __call__(self, v: Tensor) -> Tensor:
        """W v + b."""
        value = self.product(v, self.weight)
        return value if self.bias is None else value + self.bias

    def spread(self, r: Tensor) -> Tensor:
        """|W| r: the radius of W v + b where that of v is r."""
        return self.product(r, None if self.weight is None else self.weight.abs())

    def back(self, a: Tensor, shape: Shape) -> tuple[Tensor, Tensor | float]:
        """A (W v + b) as A' v + b', with A' (N, K, *shape) and b' (N, K)."""
        moved = self.transposed(a.flatten(0, 1), self.weight, shape).view(*a.shape[:2], *shape)
        return moved, 0.0 if self.bias is None else (a * self.bias).flatten(2).sum(2)

    def to(self, dtype: torch.dtype) -> Affine:
        """The same in another precision."""
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        return dataclasses.replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class ReLU:
    """v -> max(v, 0)."""

    def __call__(self, v: Tensor) -> Tensor:
        """The positive part."""
        return v.clamp(min=0.0)


@dataclass(frozen=True)
class MaxPool:
    """The greatest entry of each window of a (N, C, H, W) value.

    Arguments:
        kernel: Height and width of a window.
        stride: From one to the next.
        padding: Rows and columns of -inf around the value.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]

    def __call__(self, v: Tensor) -> Tensor:
        """The maxima, with shape (N, C, H', W')."""
        return F.max_pool2d(v, self.kernel, self.stride, self.padding)

    def windows(self, v: Tensor) -> Tensor:
        """The entries of each window, with shape (N, C, window, H' W'); padding is -inf."""
        high, wide = self.padding
        # Unfolding multiplies by 0 where it pads, and 0 times -inf is NaN: a finite stand-in for it.
        padded = F.pad(v, (wide, wide, high, high), value=-torch.finfo(v.dtype).max / 4)
        flat = F.unfold(padded.flatten(0, 1).unsqueeze(1), self.kernel, stride=self.stride)
        return flat.view(*v.shape[:2], *flat.shape[1:])

    def back(self, a: Tensor, shape: Shape) -> Tensor:
        """The transpose of ``windows``: (M, C, window, H' W') to (M, *shape), with entries in several windows added."""
        high, wide = self.padding
        padded = (shape[1] + 2 * high, shape[2] + 2 * wide)
        whole = F.fold(a.flatten(0, 1), padded, self.kernel, stride=self.stride)
        return whole[..., high : padded[0] - high, wide : padded[1] - wide].reshape(len(a), *shape)


@dataclass(frozen=True)
class Add:
    """(v, w) -> v + w."""

    def __call__(self, v: Tensor, w: Tensor) -> Tensor:
        """The sum."""
        return v + w


Layer = Affine | ReLU | MaxPool | Add


@dataclass(frozen=True)
class Node:
    """A layer in the graph.

    Attributes:
        name: Of the layer in the model.
        layer: What it computes; None for the input.
        inputs: The numbers of the nodes whose values it takes.
        shape: Of one row of its value.
    """

    name: str
    layer: Layer | None
    inputs: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Network:
    """Nodes in the order of computation: node 0 is the input, the last one the logits.

    Attributes:
        nodes: The nodes.
    """

    nodes: tuple[Node, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, classes)."""
        values = [x]
        for node in self.nodes[1:]:
            assert node.layer is not None
            values.append(node.layer(*(values[i] for i in node.inputs)))
        return values[-1]

    @property
    def bent(self) -> tuple[int, ...]:
        """The numbers of the nodes whose values enter a ReLU or a maximum: those that need bounds, in order."""
        return tuple(sorted({node.inputs[0] for node in self.nodes if isinstance(node.layer, ReLU | MaxPool)}))

    @property
    def boxes(self) -> tuple[bool, ...]:
        """Whether intervals are exact at each node where the input's are: at most one layer up to it mixes entries."""
        mixed = [0]
        for node in self.nodes[1:]:
            mixed.append(mixed[node.inputs[0]] + node.layer.mixes if isinstance(node.layer, Affine) else 2)
        return tuple(count <= 1 for count in mixed)

    @property
    def relus(self) -> tuple[int, ...]:
        """The numbers of the nodes whose values enter a ReLU, in order."""
        return tuple(sorted({node.inputs[0] for node in self.nodes if isinstance(node.layer, ReLU)}))


def trace(model: nn.Module, x: Tensor, dtype: torch.dtype | None = None, statistics: Statistics | None = None) -> Network:
    """The graph of a model, in evaluation mode but for the statistics that are given.

    Gradients pass to the model's parameters.

    Arguments:
        model: Layers of the kinds below, in modules of any nesting, with additions.
        x: Inputs of the shape (N, *) that the graph is for; their values do not matter.
        dtype: The precision of the graph; by default, that of the model.
        statistics: For a BatchNorm in training mode, what it normalizes by, as :func:`observe` finds it.

    Raises:
        UsageError: A layer that has no bounds here, or a model whose path depends on its input.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is of type {type(model).__name__}; bounds need a module, whose layers can be read")
    root = nn.Sequential(model)
    try:
        graph = _Tracer().trace(root)
    except Exception as error:  # whatever the model's own code raises on a stand-in for its input
        raise UsageError(f"the model's layers cannot be read ({first_line(error)}); {_ALLOWED}") from error
    return _Reader(dict(root.named_modules()), dtype, statistics or {}).read(graph, x)


def observe(model: nn.Module, x: Tensor) -> tuple[Tensor, Statistics]:
    """The model's logits, (N, classes), and the mean and variance of the batch at each BatchNorm that is in training mode."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
        channels = given[0].transpose(0, 1).flatten(1)
        seen[name] = channels.mean(1), channels.var(1, correction=0)

    hooks = [part.register_forward_pre_hook(partial(note, name)) for name, part in _learning(model)]
    try:
        return model(x), seen
    finally:
        for hook in hooks:
            hook.remove()


def learns_statistics(model: nn.Module) -> bool:
    """Whether a BatchNorm of the model is in training mode."""
    return bool(_learning(model))


def _learning(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, _NORMS) and part.training]


_NORMS = nn.BatchNorm1d | nn.BatchNorm2d
_ALLOWED = (
    "bounds know Linear, Conv2d, BatchNorm, Normalize, average and maximum pooling, Flatten, Dropout, Identity, ReLU and sums"
)


class _Tracer(fx.Tracer):
    """Records the calls of the layers that have bounds, and of whatever else torch brings."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Not their subclasses, which may compute something else.
        return type(m) in _MODULES or super().is_leaf_module(m, module_qualified_name)


class _Reader:
    """Turns a traced graph into a network."""

    def __init__(self, modules: dict[str, nn.Module], dtype: torch.dtype | None, statistics: Statistics) -> None:
        self.modules, self.dtype, self.statistics = modules, dtype, statistics
        self.nodes: list[Node] = []
        self.number: dict[fx.Node, int] = {}

    def read(self, graph: fx.Graph, x: Tensor) -> Network:
        self.nodes.append(Node("input", None, (), tuple(x.shape[1:])))
        needed = _needed(graph)
        for node in graph.nodes:
            if self._overwrites(node) and not self._owned(node.all_input_nodes[0]):
                raise UsageError(
                    f"the layer {_name(node)!r} changes in place a value that is used elsewhere; bounds need one that does not"
                )
            if node.op == "placeholder":
                self.number[node] = 0
            elif node in needed and node.op != "output":
                self._add(node, x)
        return Network(tuple(self.nodes))

    def _add(self, node: fx.Node, x: Tensor) -> None:
        inputs, name = tuple(self.number[given] for given in _values(node)), _name(node)
        if not inputs:
            raise UsageError(f"the model uses {name!r}, numbers of its own that no layer holds; {_ALLOWED}")
        shapes = [self.nodes[i].shape for i in inputs]
        try:
            layer = self._layer(node, shapes)
            layer = layer.to(self.dtype) if isinstance(layer, Affine) and self.dtype is not None else layer
            dtype = layer.weight.dtype if isinstance(layer, Affine) and layer.weight is not None else torch.float32
            with torch.no_grad():
                value = layer(*(torch.zeros(1, *shape, dtype=dtype, device=x.device) for shape in shapes))
        except UsageError as error:
            raise UsageError(f"the layer {name or 'model'!r} {error}") from None
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise UsageError(
                f"the layer {name!r} cannot take values of shape {shapes[0]} ({first_line(error)}); give inputs that fit"
            ) from error
        self.number[node] = len(self.nodes)
        self.nodes.append(Node(name, layer, inputs, tuple(value.shape[1:])))

    def _overwrites(self, node: fx.Node) -> bool:
        """Whether a node changes the value that it takes."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return bool(getattr(module, "inplace", False)) and not isinstance(module, _DROPOUTS)
        name = str(getattr(node.target, "__name__", node.target))
        told = name.endswith("_") or node.target in _INPLACE or "out" in node.kwargs or bool(node.kwargs.get("inplace"))
        return told and node.op.startswith("call_") and bool(node.all_input_nodes)

    def _owned(self, node: fx.Node) -> bool:
        """Whether a node's value, and what it may be a view of, has one use only."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        fresh = node.target in _FRESH if module is None else type(module) in _MODULES and not isinstance(module, _VIEWS)
        users = [user for user in node.users if user.target != "size" and user.target is not getattr]
        if len(users) != 1 or node.op == "placeholder":
            return False
        return (fresh and not self._overwrites(node)) or self._owned(node.all_input_nodes[0])

    def _layer(self, node: fx.Node, shapes: list[Shape]) -> Layer:
        shape = shapes[0]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) not in _MODULES:
                raise UsageError(f"is a {type(module).__name__}, which has no bounds; {_ALLOWED}")
            if isinstance(module, _NORMS):
                return _batch_norm(module, shape, self.statistics.get(str(node.target).removeprefix("0.")))
            return _MODULES[type(module)](module, shape)
        if len(set(shapes)) > 1:
            raise UsageError(f"adds values of the shapes {' and '.join(map(str, shapes))}; bounds know sums of one shape")
        if node.target not in _FUNCTIONS:
            raise UsageError(f"calls {getattr(node.target, '__name__', node.target)}, which has no bounds; {_ALLOWED}")
        return _FUNCTIONS[node.target](node, shape)


def _values(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values a layer takes: one, or two where they are added; the sizes that a reshape is given are not."""
    if node.target in _SUMS:
        return [given for given in node.args if isinstance(given, fx.Node)]
    return list(node.all_input_nodes[:1])


def _name(node: fx.Node) -> str:
    """What the model calls a layer."""
    return str(node.target).removeprefix("0.") if node.op == "call_module" else node.name


def _logits(given: Any) -> fx.Node:
    """The node of the logits in what a model returns, as ``oracle.logits_of`` finds them."""
    if isinstance(given, dict) and "logits" in given:
        return _logits(given["logits"])
    if isinstance(given, tuple | list) and given:
        return _logits(given[0])
    if isinstance(given, fx.Node):
        return given
    raise UsageError(f"the model returns a {type(given).__name__} in which bounds find no logits; it should return its logits")


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the logits depend on."""
    found: set[fx.Node] = set()
    queue = [_logits(node.args[0]) for node in graph.nodes if node.op == "output"]
    while queue:
        node = queue.pop()
        found.add(node)
        queue += [given for given in _values(node) if given not in found]
    return found


def check_plain(model: nn.Module) -> None:
    """Refuse a model of which a module does something that its settings do not show.

    Raises:
        UsageError: A module has a hook or a method ``forward`` of its own, or stays in training mode.
    """
    for name, part in model.named_modules():
        who = f"the layer {name!r}" if name else "the model"
        if part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            raise UsageError(
                f"{who} has a hook, or a forward of its own, which may do anything; bounds need a model without hooks"
            )
        if part.training:
            raise UsageError(f"{who} stays in training mode; bounds need a model that eval() puts in evaluation mode")


def _linear(module: nn.Linear, shape: Shape) -> Affine:
    return Affine(lambda v, w: v @ w.T, lambda a, w, _shape: a @ w, module.weight, module.bias)


def _check_image(shape: Shape) -> None:
    if len(shape) != 3:
        raise UsageError(f"takes images and gets values of shape {shape}; give it (C, H, W)")


def _conv(module: nn.Conv2d, shape: Shape) -> Affine:
    _check_image(shape)
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise UsageError(f"has padding {module.padding!r} of {module.padding_mode}; bounds know a number of zeros")
    settings: dict[str, Any] = {
        "stride": module.stride,
        "padding": module.padding,
        "dilation": module.dilation,
        "groups": module.groups,
    }

    def transposed(a: Tensor, w: Tensor, shape: Shape) -> Tensor:
        return conv2d_input((len(a), *shape), w, a, **settings)

    bias = None if module.bias is None else module.bias.view(-1, 1, 1)
    return Affine(lambda v, w: F.conv2d(v, w, **settings), transposed, module.weight, bias)


def _scale(scale: Tensor, shift: Tensor, shape: Shape) -> Affine:
    """Scale times v plus shift, channel by channel."""
    if len(scale) != shape[0]:
        raise UsageError(f"takes {len(scale)} channels and gets {shape[0]}; give it as many")
    channels = (-1, *(1,) * (len(shape) - 1))
    return Affine(lambda v, w: v * w, lambda a, w, _shape: a * w, scale.view(channels), shift.view(channels), mixes=False)


def _batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape, observed: tuple[Tensor, Tensor] | None = None) -> Affine:
    mean, var = (module.running_mean, module.running_var) if observed is None else observed
    if mean is None or var is None:
        raise UsageError("keeps no running statistics, so one answer depends on the others; bounds need those it keeps")
    scale = (var + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight
    return _scale(scale, -mean * scale if module.bias is None else module.bias - mean * scale, shape)


def _normalize(module: Normalize, shape: Shape) -> Affine:
    return _scale(1.0 / module.std, -module.mean / module.std, shape)


def _fixed(function: Callable[[Tensor], Tensor], shape: Shape) -> Affine:
    """The means of windows: a linear function whose coefficients are not negative."""
    _check_image(shape)
    if bool((function(torch.ones(1, *shape)) < 0).any()):
        raise UsageError("divides by a number less than 0; bounds know means")

    def transposed(a: Tensor, _w: None, shape: Shape) -> Tensor:
        return torch.func.vjp(function, a.new_zeros(len(a), *shape))[1](a)[0]

    return Affine(lambda v, _w: function(v), transposed)


def _flatten(start_dim: int = 0, end_dim: int = -1, *, shape: Shape) -> Affine:
    if (start_dim, end_dim) != (1, -1):
        raise UsageError(f"flattens dimensions {start_dim} to {end_dim} of {shape}; bounds know 1 to -1, all of a row")
    return Affine(lambda v, _w: v.flatten(1), lambda a, _w, shape: a.reshape(len(a), *shape), mixes=False)


def _identity(_module: nn.Module, _shape: Shape) -> Affine:
    return Affine(lambda v, _w: v, lambda a, _w, _shape: a, mixes=False)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _max_pool(
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
    *,
    shape: Shape,
) -> MaxPool:
    _check_image(shape)
    if _pair(dilation) != (1, 1) or ceil_mode or return_indices:
        raise UsageError("is a maximum with dilation, ceil_mode or return_indices; bounds know it without them")
    return MaxPool(_pair(kernel_size), _pair(stride or kernel_size), _pair(padding))


def _viewed(node: fx.Node, shape: Shape) -> Affine:
    """``x.view(n, -1)``: a flatten, however it is written."""
    sizes = node.args[1:]
    if len(sizes) != 2 or sizes[1] not in (-1, math.prod(shape)):
        raise UsageError(f"reshapes values of shape {shape} to {sizes}; bounds know (N, {math.prod(shape)}), or nn.Flatten()")
    return _flatten(1, -1, shape=shape)


def _with(make: Callable[..., Layer]) -> Callable[[fx.Node, Shape], Layer]:
    """A layer from the settings that a node gives its function."""

    def from_node(node: fx.Node, shape: Shape) -> Layer:
        given, named = _settings(node)
        return make(*given, **named, shape=shape)

    return from_node


def _settings(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a node gives its function beside the value."""
    return node.args[1:], {name: value for name, value in node.kwargs.items() if name != "input"}


def _rest(node: fx.Node) -> Callable[[Tensor], Tensor]:
    """The function that a node calls, with its settings."""
    function: Any = node.target
    given, named = _settings(node)
    return lambda v: function(v, *given, **named)


def _add(node: fx.Node, _shape: Shape) -> Add:
    if len(_values(node)) != 2 or node.kwargs:
        raise UsageError("adds a number or a scaled value; bounds know the sum of two values")
    return Add()


_MODULES: dict[type[nn.Module], Callable[[Any, Shape], Layer]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    Normalize: _normalize,
    nn.ReLU: lambda _module, _shape: ReLU(),
    nn.MaxPool2d: lambda m, shape: _max_pool(
        m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices, shape=shape
    ),
    nn.AvgPool2d: _fixed,
    nn.AdaptiveAvgPool2d: _fixed,
    nn.Flatten: lambda m, shape: _flatten(m.start_dim, m.end_dim, shape=shape),
    nn.Dropout: _identity,
    nn.Dropout2d: _identity,
    nn.Identity: _identity,
}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (F.relu, torch.relu, "relu", "relu_")
_FUNCTIONS: dict[Any, Callable[[fx.Node, Shape], Layer]] = {
    **dict.fromkeys(_SUMS, _add),
    **dict.fromkeys(_RELUS, lambda _node, _shape: ReLU()),
    **dict.fromkeys((torch.flatten, "flatten"), _with(_flatten)),
    **dict.fromkeys(("view", "reshape"), _viewed),
    F.max_pool2d: _with(_max_pool),
    **dict.fromkeys((F.avg_pool2d, F.adaptive_avg_pool2d), lambda node, shape: _fixed(_rest(node), shape)),
}
_DROPOUTS = nn.Dropout | nn.Dropout2d
_VIEWS = _DROPOUTS | nn.Flatten | nn.Identity
_FRESH = (operator.add, torch.add, "add", F.relu, torch.relu, "relu", F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_INPLACE = tuple(getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"))
