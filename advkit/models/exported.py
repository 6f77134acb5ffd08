"""Programs of ``torch.export`` (``*.pt2``), loaded without running what is in the file.

``torch.export.load`` is not safe for files of unknown origin: it unpickles weights, constants and sample inputs, loads
compiled libraries, executes the guards as Python source, evaluates the expressions of symbolic sizes, and calls operators by
names that reach through all of the package ``torch``. So the archive is not given to it. The parts that are data are read,
checked against what a plain program holds (tensor operators, names, sizes), and written to a fresh archive in memory; only
that archive is loaded.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from advkit.errors import UsageError, first_line
from advkit.models.batch import FixedBatch

_NAME = re.compile(r"[\w.:+-]*", re.ASCII)
_OPERATOR = re.compile(r"torch\.ops\.aten\.((?!__)\w+)\.((?!__)\w+)", re.ASCII)
_SCALAR = re.compile(
    r"_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_)"
    r"|torch\.sym_(max|min|ite|not|sqrt|float|int)|math\.(ceil|floor|trunc)"
)
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),.<>=&|~]*", re.ASCII)
# What sympy's srepr makes of a symbol; taken out before the rest is looked at.
_SYMBOL = re.compile(r"Symbol\('[a-z]{1,3}\d+'(, (positive|nonnegative|integer|real)=True)*\)", re.ASCII)
_WORD = re.compile(r"[^\W\d]\w*", re.ASCII)
_FUNCTION = re.compile(
    "Add|Mul|Pow|Integer|Rational|Float|Max|Min|Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|Where|Mod|PythonMod|ModularIndexing|Identity"
    "|FloorDiv|CleanDiv|CeilDiv|IntTrueDiv|FloatTrueDiv|CeilToInt|FloorToInt|TruncToInt|TruncToFloat|RoundToInt|ToFloat"
)
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_MARKS = ("archive_format", "archive_version", "byteorder", ".data/version")


class _Refused(Exception):
    """What there is in an archive that is not data, as the end of a sentence."""


def load(path: Path, device: torch.device, trust_pickle: bool) -> nn.Module:
    """The program as a module that takes any batch; gradients flow through it.

    Arguments:
        path: The archive that ``torch.export.save`` wrote.
        device: Where to put it; tensors that the program makes on the way are made there as well.
        trust_pickle: Whether to give the file to ``torch.export.load`` as it is, which can run any code in it.

    Raises:
        UsageError: The file is damaged, or holds more than data and tensor operators and is not trusted.
    """
    try:
        archive = io.BytesIO(path.read_bytes()) if trust_pickle else _plain(path)
        program = move_to_device_pass(torch.export.load(archive), device)
        module = program.module()
    except _Refused as error:
        raise UsageError(
            f"{path} holds {error}, and loading it can run any code in the file; "
            "if you trust where it comes from, add --trust-pickle (trust_pickle=True)"
        ) from None
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"cannot load {path} as a program of torch.export ({what}); export it again") from error
    return _batched(path, program, module)


def _batched(path: Path, program: Any, module: nn.Module) -> nn.Module:
    """The program's module behind one that takes any batch, as far as the program's own limits are known."""
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    if len(inputs) != 1 or not isinstance(inputs[0].meta.get("val"), torch.Tensor):
        raise UsageError(f"{path} holds a program of {len(names)} inputs; it should take one tensor")
    batch, *shape = inputs[0].meta["val"].shape
    sizes = [int(size) if is_concrete_int(size) else None for size in shape]
    if is_concrete_int(batch):
        return FixedBatch(_Program(module), sizes, int(batch), int(batch))
    limits = program.range_constraints.get(batch.node.expr)
    least, most = (limits.lower, limits.upper) if limits is not None else (1, None)
    return FixedBatch(_Program(module), sizes, max(1, int(least)), int(most) if most is not None and most.is_Integer else None)


class _Program(nn.Module):
    """An exported module, which refuses to be put in a mode: it stays in the one that it was exported in."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> Any:
        """What the program answers."""
        return self.module(x)

    def train(self, mode: bool = True) -> _Program:
        """Nothing changes."""
        return self


def _plain(path: Path) -> io.BytesIO:
    """A fresh archive with what is data in this one."""
    with zipfile.ZipFile(path) as archive:
        parts = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    _check_parts(set(parts))
    kept = {name: content for name, content in parts.items() if name in _MARKS}
    kept["models/model.json"] = _dump(_program(json.loads(parts["models/model.json"])))
    for folder in ("weights", "constants"):
        config = json.loads(parts[f"data/{folder}/model_{folder}_config.json"])
        kept[f"data/{folder}/model_{folder}_config.json"] = _dump(config)
        for name in _payload(config):
            kept[f"data/{folder}/{name}"] = parts[f"data/{folder}/{name}"]
    # Empty stands for "no sample inputs"; those in the file are a pickle.
    kept["data/sample_inputs/model.pt"] = b""
    return _pack(kept)


def _check_parts(names: set[str]) -> None:
    programs = {name for name in names if name.startswith("models/")}
    if "serialized_exported_program.json" in names or {"data/weights/model.pt", "data/constants/model.pt"} & names:
        raise _Refused("pickled weights, as files of older versions of torch do")
    if any(name.startswith("data/aotinductor/") for name in names):
        raise _Refused("compiled machine code")
    if programs != {"models/model.json"}:
        raise ValueError(f"it should hold one program, named model, and holds {len(programs)}")


def _dump(thing: Any) -> bytes:
    return json.dumps(thing).encode()


def _pack(parts: dict[str, bytes]) -> io.BytesIO:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(f"model/{name}", content)
    packed.seek(0)
    return packed


def _payload(config: Any) -> list[str]:
    """The files of raw numbers that a table of tensors names."""
    names = []
    for entry in config["config"].values():
        if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"], re.ASCII):
            raise _Refused("pickled tensors or objects")
        names.append(entry["path_name"])
    return names


def _program(program: dict[str, Any]) -> dict[str, Any]:
    """The program without its guards, which are source code (the shapes are checked without them), and without remarks."""
    program["guards_code"] = []
    return _checked("", program)


def _checked(key: str, part: Any) -> Any:
    if isinstance(part, dict):
        for name in part:
            _check_text("", name)
        return {name: {} if name == "metadata" else _checked(name, value) for name, value in part.items()}
    if isinstance(part, list):
        return [_checked(key, value) for value in part]
    if isinstance(part, str):
        _check_text(key, part)
    return part


def _check_text(key: str, text: str) -> None:
    """Refuse a string that torch would evaluate, execute or import from."""
    if key in ("target", "as_operator"):
        _check_operator(text)
    elif key == "expr_str":
        rest = _SYMBOL.sub("1", text)
        if not _EXPRESSION.fullmatch(rest) or not all(_FUNCTION.fullmatch(word) for word in _WORD.findall(rest)):
            raise _Refused(f"the expression {text[:60]!r} as a size")
    elif key in ("in_spec", "out_spec"):
        if text:
            _check_tree(json.loads(text)[1])
    elif not _NAME.fullmatch(text):
        raise _Refused(f"the text {text[:60]!r}")


def _check_operator(text: str) -> None:
    if _SCALAR.fullmatch(text):
        return
    found = _OPERATOR.fullmatch(text)
    if found and found[1] != "from_file":
        op = getattr(getattr(torch.ops.aten, found[1], None), found[2], None)
        # Operators that only TorchScript has, such as aten::save, have no kernel here.
        if isinstance(op, torch._ops.OpOverload) and torch._C._dispatch_has_kernel(op.name()):
            return
    raise _Refused(f"a call of {text[:60]!r}, which is not a tensor operator of torch")


def _check_tree(tree: dict[str, Any]) -> None:
    """Refuse containers other than Python's: the description of an enum names a module to import."""
    context = json.loads(tree["context"]) if isinstance(tree["context"], str) else tree["context"]
    keys = context if isinstance(context, list) else [context]
    if tree["type"] not in _CONTAINERS or not all(key is None or isinstance(key, str | int) for key in keys):
        raise _Refused(f"a container of type {str(tree['type'])[:60]!r}")
    for child in tree["children_spec"]:
        _check_tree(child)
