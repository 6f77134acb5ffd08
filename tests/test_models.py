"""Loading models of every kind, refusing hostile files, and the look at a model before a run."""

import copy
import functools
import io
import json
import os
import pickle
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from advkit import models
from advkit.errors import ModelError, UsageError
from advkit.models import batch, checkpoint, exported, huggingface, networks
from advkit.models import sklearn as sklearn_models
from advkit.oracle import Access


@pytest.fixture
def x():
    return torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(108, 4)
        ).eval()


def gradient(module, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(module(x), torch.zeros(len(x), dtype=torch.int64), reduction="sum"), x)[0]


def test_every_network_and_every_suffix_is_in_the_list():
    listed = " ".join(models.MODELS)
    for suffix in models._FILES.keys() - {".pickle"}:
        assert suffix in listed
    assert set(networks.NETWORKS) <= set(models.MODELS)
    assert all(line and "\n" not in line for line in models.MODELS.values())


# Checkpoints


@pytest.fixture
def saved(tmp_path):
    module = networks.build("mnist-cnn(width=4, dense=8)", seed=3)
    path = tmp_path / "net.safetensors"
    checkpoint.save(path, module, "mnist-cnn(width=4, dense=8)", seed="3")
    return path, module


def test_a_checkpoint_comes_back(saved):
    path, module = saved
    model = models.load(str(path))
    x = torch.rand(3, 1, 28, 28)
    assert torch.equal(model.module(x), module.eval()(x))
    assert (model.access, model.name, model.notes) == (Access.GRADIENTS, str(path), ())
    # The same weights written again give other bytes, as the order of the metadata is not fixed, and are the same model.
    assert model.digest == models.wrap(module).digest
    assert not any(part.training for part in model.module.modules())
    tensors, metadata = checkpoint.read(path)
    assert metadata["seed"] == "3"
    assert metadata["architecture"] == "mnist-cnn(width=4, dense=8)"
    assert metadata["advkit"]
    assert tensors.keys() == module.state_dict().keys()


def test_a_save_that_fails_leaves_the_old_file(saved, monkeypatch):
    path, module = saved
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match=r"cannot write .* No space left on device"):
        checkpoint.save(path, module, "mnist-cnn")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_damaged_checkpoints_are_refused(saved, tmp_path):
    path, module = saved
    whole = path.read_bytes()
    for content in (whole[:-100], whole[:20], b"", bytes(range(256)) * 40):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="not a readable safetensors file"):
            models.load(str(path))
    for architecture, message in [
        ("mnist-cnn(width=5)", "do not fit the network"),
        ("resnet", "a network that advkit does not have: unknown network"),
        ("mnist-cnn(width=-4)", "the network's width is -4"),
        ("net.py:make", "cannot read the network"),
    ]:
        checkpoint.save(path, module, architecture)
        with pytest.raises(UsageError, match=message) as caught:
            models.load(str(path))
        assert "\n" not in str(caught.value)
    import safetensors.torch

    safetensors.torch.save_file(module.state_dict(), path)
    with pytest.raises(UsageError, match="does not say which network"):
        models.load(str(path))


# Python


def test_a_function_a_module_and_a_callable_of_a_file(tmp_path, net, x):
    path = tmp_path / "mine.py"
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    path.write_text(
        "import torch\nfrom torch import nn\nimport beside\n"
        "def make():\n"
        "    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), "
        "nn.Linear(108, 4))\n"
        f"    net.load_state_dict(torch.load({str(tmp_path / 'weights.pt')!r}, weights_only=True))\n"
        "    return net.train()\n"
        "made = make()\n"
        "def plain():\n    return lambda x: x.flatten(1)[:, :4]\n"
        "def wrong():\n    return 3\n"
        "def needs(x):\n    return x\n"
    )
    (tmp_path / "beside.py").write_text("")
    for name in ("make", "made"):
        model = models.load(f"{path}:{name}")
        assert torch.equal(model.module(x), net(x))
        assert model.digest == models.wrap(net).digest
    model = models.load(f"{path}:plain")
    assert torch.equal(model.module(x), x.flatten(1)[:, :4])
    before = model.digest
    path.write_text(path.read_text() + "# changed\n")
    assert models.load(f"{path}:plain").digest != before
    with pytest.raises(UsageError, match="returned int; it should return a module"):
        models.load(f"{path}:wrong")
    with pytest.raises(UsageError, match=r"raised TypeError: needs\(\) missing 1 required"):
        models.load(f"{path}:needs")
    with pytest.raises(UsageError, match="nothere"):
        models.load(f"{path}:nothere")


# torch.export


def export(net, x, path, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.export.save(torch.export.export(net, (x,), **settings), path)
    return str(path)


@pytest.fixture
def fixed(tmp_path, net, x):
    return export(net, x[:1], tmp_path / "fixed.pt2")


@pytest.mark.parametrize("kind", ["any batch", "batch of 1", "batch of 2", "at least 2", "at most 3"])
def test_an_exported_program_takes_any_batch(tmp_path, net, x, kind):
    dims = {
        "any batch": torch.export.Dim("n"),
        "at least 2": torch.export.Dim.DYNAMIC,
        "at most 3": torch.export.Dim("n", max=3),
    }
    settings = {"dynamic_shapes": ({0: dims[kind]},)} if kind in dims else {}
    model = models.load(export(net, x[: 1 if kind == "batch of 1" else 2], tmp_path / "net.pt2", **settings))
    assert model.access is Access.GRADIENTS
    for n in (1, 2, 5):
        torch.testing.assert_close(model.module(x[:n]), net(x[:n]))
    torch.testing.assert_close(gradient(model.module, x), gradient(net, x))
    with pytest.raises(ModelError, match=r"examples of shape \(1, 8, 8\) and got \(1, 9, 9\); --size"):
        model.module(torch.rand(2, 1, 9, 9))


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rewrite(path, changed):
    """The archive with some of its parts replaced or added."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(parts)).partition("/")[0]
    parts |= {f"{root}/{name}": content for name, content in changed(parts, root).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def edit(path, old, new):
    """The archive with a piece of its program replaced."""

    def changed(parts, root):
        program = parts[f"{root}/models/model.json"].decode()
        assert old in program
        return {"models/model.json": program.replace(old, new).encode()}

    rewrite(path, changed)


def pickled(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def test_the_payload_works(fixed, tmp_path):
    """What the tests below guard against does happen when the file is trusted."""
    mark = tmp_path / "mark"
    rewrite(fixed, lambda *_: {"data/sample_inputs/model.pt": pickled(Payload(mark))})
    with pytest.raises(UsageError):
        models.load(fixed, trust_pickle=True)
    assert mark.exists()


def test_sample_inputs_are_not_unpickled(fixed, tmp_path, net, x):
    mark = tmp_path / "mark"
    rewrite(fixed, lambda *_: {"data/sample_inputs/model.pt": pickled(Payload(mark))})
    torch.testing.assert_close(models.load(fixed).module(x), net(x))
    assert not mark.exists()


def test_guards_are_not_executed(fixed, tmp_path, net, x):
    mark = tmp_path / "mark"
    edit(
        fixed,
        '"guards_code": []',
        json.dumps("@")[1:-1].replace("@", f"\"guards_code\": [\"__import__('os').mkdir('{mark}')\"]"),
    )
    torch.testing.assert_close(models.load(fixed).module(x), net(x))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '{"as_int": 108}',
            '{"as_expr": {"expr_str": "__import__(\'os\').mkdir(\'@\')", "hint": {"as_int": 108}}}',
            "expression",
        ),
        ('{"as_int": 108}', '{"as_expr": {"expr_str": "exec(chr(49))", "hint": {"as_int": 108}}}', "expression 'exec"),
        ("torch.ops.aten.relu.default", "torch.os.mkdir", "a call of 'torch.os.mkdir'"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.save.default", "a call of"),
        ("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "a call of"),
        ("torch.ops.aten.relu.default", "_operator.methodcaller", "a call of"),
        ("torch.ops.aten.relu.default", "#custom:op", "a call of"),
        ('"p_0_weight"', "\"p_0_weight=__import__('os').mkdir('@')\"", "the text .p_0_weight="),
        ('\\"builtins.tuple\\", \\"context\\": \\"null\\"', '\\"builtins.tuple\\", \\"context\\": \\"{}\\"', "a container"),
    ],
)
def test_programs_that_are_more_than_data_are_refused(fixed, tmp_path, old, new, message):
    mark = tmp_path / "mark"
    edit(fixed, old, new.replace("@", str(mark)))
    with pytest.raises(UsageError, match=f"holds .*{message}.*--trust-pickle"):
        models.load(fixed)
    assert not mark.exists()


def test_pickled_weights_and_machine_code_are_refused(fixed, tmp_path):
    mark = tmp_path / "mark"
    whole = Path(fixed).read_bytes()

    def weights(parts, root):
        config = json.loads(parts[f"{root}/data/weights/model_weights_config.json"])
        config["config"]["0.weight"]["use_pickle"] = True
        return {
            "data/weights/model_weights_config.json": json.dumps(config).encode(),
            "data/weights/weight_0": pickled(Payload(mark)),
        }

    def constant(parts, root):
        entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
        config = json.dumps({"config": {"thing": entry}}).encode()
        return {
            "data/constants/model_constants_config.json": config,
            "data/constants/opaque_obj_0": pickle.dumps(Payload(mark)),
        }

    for changed, message in [
        (weights, "pickled tensors or objects"),
        (constant, "pickled tensors or objects"),
        (lambda *_: {"data/weights/model.pt": pickled(Payload(mark))}, "pickled weights"),
        (lambda *_: {"serialized_exported_program.json": b"{}"}, "pickled weights"),
        (lambda *_: {"data/aotinductor/model/a.so": b""}, "compiled machine code"),
    ]:
        Path(fixed).write_bytes(whole)
        rewrite(fixed, changed)
        with pytest.raises(UsageError, match=message):
            models.load(fixed)
    assert not mark.exists()


def test_damaged_programs_are_refused(fixed):
    whole = Path(fixed).read_bytes()
    for content in (whole[:-500], b"PK", bytes(range(256)) * 40):
        Path(fixed).write_bytes(content)
        with pytest.raises(UsageError, match=r"cannot load .* as a program"):
            models.load(fixed)


def test_expressions_of_free_sizes_are_read():
    for text in ("Symbol('s31', positive=True, integer=True)", "Add(Mul(Integer(2), Symbol('s0', integer=True)), Integer(-1))"):
        exported._check_text("expr_str", text)


# ONNX


def graph(net, path, batch=None, softmax=False):
    """The dense layer and a ReLU, by hand."""
    import onnx
    from onnx import helper

    weight, bias = net[-1].weight.detach().numpy(), net[-1].bias.detach().numpy()
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("Gemm", ["h", "w", "b"], ["z" if softmax else "y"], transB=1),
        *([helper.make_node("Softmax", ["z"], ["y"], axis=1)] if softmax else []),
    ]
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 108])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 4])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


@pytest.mark.parametrize("size", [None, 1, 2])
def test_an_onnx_graph_gives_scores(tmp_path, net, size):
    model = models.load(graph(net, tmp_path / "net.onnx", size))
    x = torch.randn(5, 108)
    for n in (1, 2, 5):
        torch.testing.assert_close(model.module(x[:n]), net[-1](x[:n].relu()), rtol=1e-4, atol=1e-5)
    assert model.access is Access.SCORES
    assert model.module(x).dtype == torch.float32
    assert model.module(x.double()).dtype == torch.float64
    assert "no gradients" in model.notes[0]
    with pytest.raises(ModelError, match=r"shape \(108\) and got \(1, 8, 8\)"):
        model.module(torch.rand(2, 1, 8, 8))


def test_a_softmax_at_the_end_is_noted(tmp_path, net):
    path = graph(net, tmp_path / "net.onnx", softmax=True)
    model = models.load(path)
    assert "ends in a softmax" in model.notes[1]
    logits = models.load(path, probabilities=True).module(torch.ones(2, 108))
    torch.testing.assert_close(logits, net[-1](torch.ones(2, 108)).log_softmax(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("wrong", "access"), [(0.0, Access.GRADIENTS), (0.1, Access.SCORES)])
def test_a_conversion_is_used_only_if_it_agrees(tmp_path, net, monkeypatch, wrong, access):
    class Converted(nn.Module):
        def forward(self, x):
            return net[-1](x.relu()) + wrong

    fake = types.SimpleNamespace(convert=lambda path: Converted())
    monkeypatch.setitem(sys.modules, "onnx2torch", fake)
    model = models.load(graph(net, tmp_path / "net.onnx"))
    assert model.access is access
    assert ("agrees with ONNX Runtime" in model.notes[0]) == (access is Access.GRADIENTS)
    assert model.module(torch.rand(2, 108).requires_grad_()).requires_grad == (access is Access.GRADIENTS)


def test_damaged_graphs_and_missing_packages(tmp_path, net, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(UsageError, match="ONNX Runtime cannot read"):
        models.load(str(path))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r'pip install "advkit\[onnx\]"'):
        models.load(graph(net, path))


# transformers


@pytest.fixture
def vit(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **settings)).eval()
    classifier.save_pretrained(tmp_path / "vit")
    processor = {"do_resize": True, "size": {"height": 8, "width": 8}, "resample": 2, "do_rescale": True}
    processor |= {"rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(processor))
    return tmp_path / "vit", classifier


def test_a_classifier_of_transformers_takes_pixels(vit):
    path, classifier = vit
    model = models.load(str(path))
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(model.module(x), classifier(pixel_values=(x - mean) / std).logits)
    assert model.access is Access.GRADIENTS
    assert model.notes == ()
    large = torch.rand(2, 3, 16, 20)
    small = F.interpolate(large, (8, 8), mode="bilinear", antialias=True)
    torch.testing.assert_close(model.module(large), classifier(pixel_values=(small - mean) / std).logits)
    assert (gradient(model.module, large) != 0).float().mean() > 0.9


def test_a_processor_that_is_missing_is_noted(vit):
    path, classifier = vit
    (path / "preprocessor_config.json").unlink()
    model = models.load(str(path))
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(model.module(x), classifier(pixel_values=x).logits)
    assert "no preprocessor_config.json" in model.notes[0]


def test_folders_that_are_not_classifiers_with_safe_weights(vit, tmp_path, monkeypatch):
    path, _ = vit
    weights = path / "model.safetensors"
    tensors, metadata = checkpoint.read(weights)
    import safetensors.torch

    safetensors.torch.save_file({k: v for k, v in tensors.items() if "classifier" not in k}, weights, metadata)
    with pytest.raises(UsageError, match="lack classifier"):
        models.load(str(path))
    weights.rename(path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="pickled weights only"):
        models.load(str(path))
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(UsageError, match="no weights"):
        models.load(str(path))
    weights.write_bytes(b"")
    with pytest.raises(UsageError, match="transformers cannot load"):
        models.load(str(path))
    (path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="not an image classifier"):
        models.load(str(path))
    with pytest.raises(UsageError, match=r"the folder .* has no config"):
        models.load(str(tmp_path))
    with pytest.raises(UsageError, match="not one of the Hugging Face hub"):
        models.load("hf:../somewhere/else")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r'pip install "advkit\[hf\]"'):
        models.load(str(path))


def test_the_steps_of_processors():
    x = torch.rand(1, 3, 20, 30)
    plain = {"do_normalize": False}
    short = huggingface.Pixels({**plain, "size": {"shortest_edge": 10}, "resample": 3, "do_center_crop": True, "crop_size": 8})
    wanted = F.interpolate(x, (10, 15), mode="bicubic", antialias=True).clamp(0, 1)[:, :, 1:9, 3:11]
    torch.testing.assert_close(short(x), wanted)
    padded = huggingface.Pixels({**plain, "do_center_crop": True, "crop_size": {"height": 24, "width": 30}})
    torch.testing.assert_close(padded(x), F.pad(x, (0, 0, 2, 2)))
    bytes_ = huggingface.Pixels({**plain, "do_rescale": False, "do_flip_channel_order": True})
    torch.testing.assert_close(bytes_(x), x.flip(1) * 255)
    centred = huggingface.Pixels({**plain, "rescale_factor": 1 / 127.5, "rescale_offset": True})
    torch.testing.assert_close(centred(x), x * 2 - 1)
    convnext = huggingface.Pixels({**plain, "size": {"shortest_edge": 7}, "crop_pct": 0.875, "resample": 0})
    torch.testing.assert_close(convnext(x), F.interpolate(x, (8, 12), mode="nearest-exact")[:, :, :7, 2:9])
    for settings, message in [
        ({"do_pad": True}, "do_pad"),
        ({"size": 8, "resample": 1}, "by method 1"),
        ({"size": {"a": 1}}, "size is"),
    ]:
        with pytest.raises(UsageError, match=message):
            huggingface.Pixels(settings)


# scikit-learn


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1, 2], 10)
    return rng.normal(size=(30, 4)) + y[:, None], y


def dump(estimator, path):
    path.write_bytes(pickle.dumps(estimator))
    return str(path)


def test_classifiers_of_scikit_learn(tmp_path, rows):
    import joblib
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = rows
    z = torch.from_numpy(x).view(30, 1, 2, 2)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    joblib.dump(pipeline, tmp_path / "a.joblib")
    for path in (str(tmp_path / "a.joblib"), dump(pipeline, tmp_path / "a.pkl")):
        model = models.load(path, trust_pickle=True)
        np.testing.assert_allclose(model.module(z).exp().numpy(), pipeline.predict_proba(x), rtol=1e-6)
        assert (model.access, model.notes) == (Access.SCORES, ())
    assert model.module(z.float()).dtype == torch.float32

    ridge = RidgeClassifier().fit(x, y == 1)
    model = models.load(dump(ridge, tmp_path / "b.pickle"), trust_pickle=True)
    s = ridge.decision_function(x)
    np.testing.assert_allclose(model.module(z).numpy(), np.stack([-s, s], 1))
    assert model.access is Access.SCORES

    nearest = NearestCentroid().fit(x, 2 * y)
    nearest.__class__ = type("Labels", (NearestCentroid,), {"predict_proba": property(), "decision_function": property()})
    module = sklearn_models.SklearnModule(nearest)
    assert module.method == "predict"
    assert module(z).shape == (30, 5)
    np.testing.assert_array_equal(module(z).argmax(1).numpy(), nearest.predict(x))


def test_columns_are_classes(tmp_path, rows):
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.svm import SVC

    x, y = rows
    z = torch.from_numpy(x)
    odd = LogisticRegression().fit(x, 2 * y + 1)
    outputs = models.load(dump(odd, tmp_path / "a.pkl"), trust_pickle=True).module(z)
    assert outputs.shape == (30, 6)
    assert outputs.isfinite().all()
    np.testing.assert_array_equal(outputs.argmax(1).numpy(), odd.predict(x))
    named = models.load(dump(LogisticRegression().fit(x, np.array(list("cat"))[y]), tmp_path / "b.pkl"), trust_pickle=True)
    assert "counted from 0: a, c, t" in named.notes[0]
    pairs = models.load(dump(SVC(decision_function_shape="ovo").fit(x, y), tmp_path / "c.pkl"), trust_pickle=True)
    assert pairs.access is Access.LABELS
    for thing, message in [(LinearRegression().fit(x, y), "without classes"), ({"a": 1}, "holds dict")]:
        with pytest.raises(UsageError, match=message):
            models.load(dump(thing, tmp_path / "d.pkl"), trust_pickle=True)


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".joblib", ".pt", ".pth", ".bin", ".ckpt"])
def test_a_pickle_runs_only_if_it_is_trusted(tmp_path, suffix):
    mark, path = tmp_path / "mark", tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(UsageError, match="--trust-pickle" if suffix in models._FILES else "pickled checkpoint"):
        models.load(str(path))
    assert not mark.exists()
    with pytest.raises(UsageError):
        models.load(str(path), trust_pickle=True)
    assert mark.exists() == (suffix in models._FILES)


# Specs and devices


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist-cnn", "a network without weights; train it first, as in advkit train --model mnist-cnn"),
        ("mnist-cnn(width=16)", "advkit train --model mnist-cnn"),
        ("mnist-cn", "unknown model 'mnist-cn'; .*FILE.onnx.*did you mean 'mnist-cnn'"),
        ("model.h5", "unknown model 'model.h5'; a model is one of FILE.safetensors"),
        ("gone.onnx", "there is no file gone.onnx"),
        ("gone.safetensors", "there is no file gone.safetensors"),
        ("gone.pkl", "there is no file gone.pkl"),
    ],
)
def test_specs_that_name_no_model(spec, message):
    with pytest.raises(UsageError, match=message):
        models.load(spec)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "hpu", "privateuseone"])
def test_devices_that_are_not_there(saved, device):
    with pytest.raises(UsageError, match=f"cannot use the device '{device}'"):
        models.load(str(saved[0]), device=device)


def test_fixed_batches_are_padded_with_real_examples():
    sizes = []

    def inner(x):
        sizes.append(len(x))
        assert (x != 0).all()
        return x * 2

    x = torch.rand(7, 3) + 1
    assert torch.equal(batch.FixedBatch(inner, (3,), 4, 4)(x), x * 2)
    assert sizes == [4, 4]


# wrap and inspect


def test_wrap(net):
    model = models.wrap(net)
    assert (model.name, model.access, model.notes) == ("Sequential", Access.GRADIENTS, ())
    assert models.wrap(model) is model
    assert models.wrap(net, "mine").name == "mine"
    assert models.wrap(nn.Sequential(net, nn.Identity())).digest != model.digest
    before = model.digest
    with torch.no_grad():
        net[1].running_mean[0] += 1
    assert models.wrap(net).digest != before
    assert models.wrap(gradient).digest != models.wrap(export).digest
    assert len(models.wrap(torch.relu).digest) == 64
    with pytest.raises(UsageError, match="of type int"):
        models.wrap(3)


def scaled(k, by=1.0, *, base=None):
    return lambda x, by=by: x.flatten(1) @ k * by + (0 if base is None else base)


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return x * self.by


class Called:
    def __init__(self, w):
        self.w = w

    def __call__(self, x):
        return x @ self.w

    def run(self, x):
        return x @ self.w


def test_the_digest_is_of_what_a_model_computes():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    w, v = torch.ones(3, 3), torch.zeros(3, 3)
    kinds = [
        nn.Sequential(a, nn.ReLU()),
        nn.Sequential(a, nn.Sigmoid()),
        nn.Sequential(a, nn.LeakyReLU(0.1)),
        nn.Sequential(b, nn.ReLU()),
        Scaled(1.0),
        Scaled(2.0),
        nn.TransformerEncoderLayer(4, 2, activation=F.relu),
        nn.TransformerEncoderLayer(4, 2, activation=F.gelu),
        scaled(w),
        scaled(v),
        scaled(w.numpy()),
        scaled(w, 2.0),
        scaled(w, base=[v, w]),
        scaled(w, base=[v, v]),
        scaled(a),
        scaled(b),
        functools.partial(gradient, a),
        functools.partial(gradient, b),
        functools.partial(gradient, module=a),
        Called(w),
        Called(v),
        Called(w).run,
        Called(v).run,
        torch.relu,
        torch.sigmoid,
        np.exp,
        np.tanh,
        *[lambda x: x * 1, lambda x: x * 2],
        torch.fx.symbolic_trace(Scaled(1.0)),
        torch.fx.symbolic_trace(Scaled(2.0)),
        scaled(torch.ones(2, 2).to_sparse()),
        scaled(torch.ones(2, device="meta")),
        nn.LazyLinear(3),
    ]
    kinds[7].load_state_dict(kinds[6].state_dict())
    digests = [models.wrap(kind).digest for kind in kinds]
    assert len(set(digests)) == len(kinds)
    assert digests == [models.wrap(kind).digest for kind in kinds]
    assert models.wrap(scaled(w.clone())).digest == digests[8]
    assert models.wrap(copy.deepcopy(kinds[0])).digest == digests[0]
    loop = lambda x: loop(x)
    assert len(models.wrap(loop).digest) == 64


def test_the_digest_is_the_same_in_two_processes(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "W = torch.arange(9.0).reshape(3, 3)\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.act = torch.tanh\n"
        "        self.names = {'a', 'b', 'c'}\n"
        "        self.other = object()\n"
        "    def extra_repr(self):\n        return f'{make} {self.other}'\n"
        "    def forward(self, x):\n        return self.act(x @ W) if x.ndim in {1, 2, 3} else x\n"
        "def make():\n    net, held = Net(), object()\n    return lambda x: net(x) if held else W\n"
    )
    code = (
        "import torch; from advkit import models\nprint([models.load(f'mine.py:{name}').digest for name in ('Net', 'make')])\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert len(runs[0]) > 64
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist-cnn(width=0)", "the network's width is 0; it should be at least 1"),
        ("mnist-cnn(dense=0)", "the network's dense is 0"),
        ("mnist-mlp(width=-1)", "the network's width is -1"),
        ("mnist-mlp(depth=0)", "the network's depth is 0"),
        ("cifar-resnet(blocks=0)", "the network's blocks is 0"),
        ("mnist-mlp(width=1000000000)", "does not fit in memory"),
        ("mnist-mlp(width=100000000000000000000000)", "does not fit in memory"),
    ],
)
def test_networks_of_an_impossible_size(spec, message):
    with pytest.raises(UsageError, match=message):
        networks.build(spec)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"settings are \[\]"),
        ({"image_mean": [0.5]}, "image_std is None"),
        ({"image_mean": [0.5], "image_std": [0.0]}, "greater than 0"),
        ({"image_mean": [0.5], "image_std": [0.5, 0.5]}, "one number a channel"),
        ({"image_mean": "x", "image_std": [1.0]}, "image_mean is 'x'"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"size": "x"}, "size is 'x'"),
        ({"size": {"height": "a", "width": 2}}, "size is {'height': 'a'"),
        ({"size": {"height": None, "width": 2}}, "size is {'height': None"),
        ({"size": 0}, "size is 0"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 2}}, "advkit knows height and width, in"),
        ({"size": 3, "resample": [1]}, r"method \[1\]"),
        ({"size": 3, "resample": "x"}, "method 'x'"),
        ({"size": {"shortest_edge": 3}, "crop_pct": 0}, "crop_pct is 0"),
    ],
)
def test_image_processors_with_wrong_settings(settings, message):
    with pytest.raises(UsageError, match=message):
        huggingface.Pixels(settings)


def test_image_processors_that_cannot_be_read(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "preprocessor_config.json"
    assert huggingface._settings(str(tmp_path), local=True) is None
    for file, name in [(path, path.name), (tmp_path / "processor_config.json", "processor_config.json")]:
        file.write_text('{"do_normalize": tru')
        with pytest.raises(UsageError, match=f"cannot read {name} of"):
            huggingface._settings(str(tmp_path), local=True)
        file.write_text('{"size": 3}')
        assert huggingface._settings(str(tmp_path), local=True) == {"size": 3}
    file.write_text('{"image_processor": {"size": 4}}')
    assert huggingface._settings(str(tmp_path), local=True) == {"size": 4}


def test_inputs_of_another_dtype_are_explained(net, x, y):
    with pytest.raises(ModelError, match=r"layer '0' is in torch.float32 and got torch.float64; .*x.to\(torch.float32\)"):
        models.inspect(models.wrap(net), x.double(), y)
    assert models.inspect(models.wrap(net.double()), x.double(), y) == ()


def test_probabilities_become_logits(net, x):
    soft = nn.Sequential(net, nn.Softmax(1))
    model = models.wrap(soft, probabilities=True)
    torch.testing.assert_close(model.module(x), net(x).log_softmax(1))
    assert "logarithm" in model.notes[0]
    assert models.inspect(model, x, torch.zeros(5, dtype=torch.int64)) == ()
    assert models.wrap(lambda x: torch.eye(2)[:1], probabilities=True).module(x).isfinite().all()


@pytest.fixture
def y():
    return torch.tensor([0, 1, 2, 3, 0])


def test_a_good_model_passes_and_is_left_as_it_was(net, x, y):
    net[3].train()
    net[0].weight.requires_grad_(False)
    flags = [part.training for part in net.modules()], [p.requires_grad for p in net.parameters()]
    hooks = [len(part._forward_pre_hooks) for part in net.modules()]
    (note,) = models.inspect(models.wrap(net), x, y, classes=4)
    assert "in training mode" in note
    assert flags == ([part.training for part in net.modules()], [p.requires_grad for p in net.parameters()])
    assert hooks == [len(part._forward_pre_hooks) for part in net.modules()]
    assert models.inspect(models.wrap(net.eval()), x[:1], y[:1]) == ()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 3, 8, 8), "layer '0' takes 1 channels and got 3 for inputs of shape"),
        ((5, 1, 9, 9), r"layer '5' takes 108 features and got 147 .*\(1, 9, 9\); .*--size"),
        ((5, 1, 2, 2), r"layer '0' got maps of \(2, 2\).* too small .*--size"),
        ((5, 64), "layer '0' takes a batch of 3 dimensions an example"),
    ],
)
def test_inputs_of_another_shape_are_explained(net, y, shape, message):
    with pytest.raises(ModelError, match=message):
        models.inspect(models.wrap(net), torch.rand(shape), y)
    assert not any(part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.flatten(1).sum(1), r"shape \(4,\) .*\(N, K\) logits"),
        (lambda x: x.flatten(1)[:, :1], "K at least 2"),
        (lambda x: x.flatten(1) * torch.nan, "NaN"),
        (lambda x: x.flatten(1).softmax(1), "rows sum to 1.*layer before the softmax.*--probabilities"),
        (lambda x: [][0], "raised IndexError"),
    ],
)
def test_answers_that_are_not_logits(x, y, function, message):
    with pytest.raises(ModelError, match=message):
        models.inspect(models.wrap(function), x, y)


def test_labels_that_are_not_the_models(net, x, y):
    model = models.wrap(net)
    with pytest.raises(UsageError, match="between 0 and 4; the model has classes 0 to 3"):
        models.inspect(model, x, torch.tensor([0, 0, 0, 0, 4]))
    with pytest.raises(UsageError, match="between -1 and 3"):
        models.inspect(model, x, torch.tensor([0, 1, 2, 3, -1]))
    with pytest.raises(UsageError, match="should be integers"):
        models.inspect(model, x, y.float())
    with pytest.raises(UsageError, match="data has 10 classes and the model has 4"):
        models.inspect(model, x, y, classes=10)
    (note,) = models.inspect(model, x, y.clamp(max=1), classes=2)
    assert "4 classes and the data 2" in note


def test_random_models_and_other_devices(net, x, y):
    rng = torch.Generator().manual_seed(0)
    (note,) = models.inspect(models.wrap(lambda x: net(x) + torch.rand(4, generator=rng)), x, y)
    assert "is random" in note
    with pytest.raises(UsageError, match="on cpu and the inputs are on meta"):
        models.inspect(models.wrap(net), x.to("meta"), y)


def test_labels_only_are_no_probabilities(x, y):
    said = models.Model(lambda x: torch.eye(4)[x.flatten(1)[:, 0].long()], "labels", Access.LABELS, "")
    assert models.inspect(said, x, y) == ()
