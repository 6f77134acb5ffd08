import errno
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advkit.benchmarks import folder
from advkit.cli import main
from advkit.models import checkpoint, networks

from .conftest import SHARED


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of a small network, trained by the command."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    assert main(["train", "--model", "mnist-mlp(width=32)", "--data", "mnist-5k", "--epochs", "3", "--out", str(path)]) == 0
    return path


def attack(model, out=None, *more, data="mnist-5k", threat="linf(0.1)", name="pgd(steps=3)", limit="40"):
    words = ["attack", "--model", str(model), "--data", str(data), "--threat", threat, "--limit", limit, "--batch-size", "16"]
    return [*words, *(["--attack", name] if name else []), *(["--out", str(out)] if out else []), *more]


def test_the_main_job(digits, tmp_path, capsys):
    assert main(attack(digits, tmp_path / "run", "--alone", "--pictures", "5")) == 0
    printed = capsys.readouterr().out
    for words in ("clean accuracy", "robust accuracy", "8-bit", "attack success", "pgd(steps=3)", "linf(eps=0.1)"):
        assert words in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json",
        "records.jsonl",
        "times.jsonl",
        "summary.json",
        "examples",
        "pictures",
        "files",
    }
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["schema"] == "advkit/summary/1"
    assert summary["examples"] == 40
    assert 0.7 < summary["clean_accuracy"]["value"] <= 1
    assert summary["robust_accuracy"]["value"] < summary["clean_accuracy"]["value"]
    assert len((tmp_path / "run" / "records.jsonl").read_text().splitlines()) == 40
    assert len(list((tmp_path / "run" / "pictures").iterdir())) == 5


def test_the_closest_examples_give_a_curve(digits, tmp_path, capsys):
    assert main(attack(digits, tmp_path / "run", threat="l2", name="fmn(steps=20)")) == 0
    assert "robust accuracy over the radius" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "curve.png") as image:
        assert image.format == "PNG"


def test_defaults_targets_and_access(digits, capsys):
    assert main(attack(digits, None, "--access", "labels", "--budget", "30", name=None, limit="10")) == 0
    assert "rays" in capsys.readouterr().out
    assert main(attack(digits, None, "--target", "3", "--budget", "2", limit="20")) == 0
    printed = capsys.readouterr().out
    assert "note: 2 examples of class 3 are left out" in printed
    assert "not pushed to target 3" in printed


@pytest.mark.parametrize("what", ["attacks", "suites", "threats", "models", "data", "defenses"])
def test_lists(what, capsys):
    assert main(["list", what]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 1
    assert all("  " in line for line in lines)


def test_a_model_and_data_of_ones_own(tmp_path, capsys):
    np.savez(tmp_path / "d.npz", x=np.arange(24, dtype=np.uint8).reshape(6, 4) * 10, y=np.array([0, 1, 0, 1, 0, 1]))
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def model():\n    return lambda x: x[:, :2] * torch.tensor([1.0, 1.01])\n"
        "def data(split):\n    return torch.linspace(-1, 1, 12).reshape(6, 2), torch.arange(6) % 2\n"
    )
    assert main(attack(f"{tmp_path}/mine.py:model", data=tmp_path / "d.npz", threat="l2(0.5)")) == 0
    assert "clean accuracy" in capsys.readouterr().out
    assert main(attack(f"{tmp_path}/mine.py:model", data=f"{tmp_path}/mine.py:data", threat="linf(0.1)")) == 0
    assert "note: " in capsys.readouterr().out


def _bad_files(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(_Evil(str(tmp_path / "owned"))))
    np.savez(tmp_path / "nan.npz", x=np.full((3, 1, 28, 28), np.nan), y=np.zeros(3, int))
    np.savez(tmp_path / "wide.npz", x=np.full((3, 1, 28, 28), 7.0), y=np.zeros(3, int))
    np.savez(tmp_path / "labels.npz", x=np.zeros((3, 1, 28, 28), np.uint8), y=np.array([0, 1, 10]))
    np.savez(tmp_path / "late.npz", x=np.zeros((40, 28, 28), np.uint8), y=np.arange(40) % 11)
    np.savez(tmp_path / "floats.npz", x=np.full((40, 1, 28, 28), 0.25, np.float32), y=np.arange(40) % 10)
    np.savez(tmp_path / "colour.npz", x=np.zeros((3, 28, 28, 3), np.uint8), y=np.zeros(3, int))
    np.savez(tmp_path / "small.npz", x=np.zeros((3, 20, 20), np.uint8), y=np.zeros(3, int))
    np.savez(tmp_path / "empty.npz", x=np.zeros((0, 28, 28), np.uint8), y=np.zeros(0, int))
    (tmp_path / "raises.py").write_text("def model():\n    def f(x):\n        raise KeyError('inside')\n    return f\n")
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"\x89PNG no")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "pdg"}, "unknown attack 'pdg'"),
        ({"name": "pgd(step_size=1)"}, "unknown setting of attack pgd: 'step_size'"),
        ({"name": "pgd("}, "cannot read the attack 'pgd('"),
        ({"threat": "l3(1)"}, "unknown threat 'l3'"),
        ({"threat": "linf"}, "searches inside a fixed radius"),
        ({"data": "mnist-6k"}, "unknown data 'mnist-6k'"),
        ({"data": "{tmp}/nothere.npz"}, "there is no file"),
        ({"data": "{tmp}/nan.npz"}, "NaN"),
        ({"data": "{tmp}/wide.npz"}, "7"),
        ({"data": "{tmp}/labels.npz"}, "classes 0 to 9"),
        ({"data": "{tmp}/colour.npz"}, "the network takes 1 channels and got 3"),
        ({"data": "{tmp}/small.npz"}, "takes 784 features and got 400"),
        ({"data": "{tmp}/empty.npz"}, "empty|no examples|at least one"),
        ({"data": "{tmp}/images"}, "1.png"),
        ({"model": "resnet"}, "unknown model 'resnet'"),
        ({"model": "mnist-cnn"}, "without weights; train it first"),
        ({"model": "{tmp}/none.safetensors"}, "there is no file"),
        ({"model": "{tmp}/cut.safetensors"}, "not a readable safetensors file"),
        ({"model": "{tmp}/evil.pkl"}, "--trust-pickle"),
        ({"model": "{tmp}/raises.py:model"}, "raised KeyError"),
        ({"out": "{tmp}/full"}, "holds other files"),
        ({"limit": "0"}, "the limit is 0"),
        ({"more": ("--device", "cuda:7")}, "cannot use the device"),
        ({"more": ("--target", "zebra")}, "the goal is 'zebra'"),
        ({"more": ("--access", "scores")}, "pgd(steps=3) needs gradients"),
        ({"more": ("--split", "validation")}, "validation"),
        ({"more": ("--range", "1", "0")}, "range"),
        ({"more": ("--range", "nan", "1")}, "range"),
        ({"more": ("--target", "\u00b2")}, "the goal is"),
        ({"more": ("--target", "9" * 30)}, "the goal is"),
        ({"more": ("--seed", str(2**70))}, "the seed is"),
        ({"more": ("--seed", "-1")}, "the seed is"),
        ({"more": ("--budget", "1" + 20 * "0")}, "budget is 1"),
        ({"more": ("--batch-size", "1" + 20 * "0")}, "batch size is 1"),
        ({"more": ("--pictures", "-1")}, "--pictures is -1"),
        ({"more": ("--device", "hpu")}, "cannot use the device"),
        ({"more": ("--quantize",), "data": "{tmp}/floats.npz"}, "there is no grid to round to"),
        ({"data": "{tmp}/late.npz"}, "classes 0 to 9"),
        ({"name": "restarts(3)"}, "restarts: attack is 3; it should be another, of type Attack"),
        ({"name": "worst(pgd)"}, "it should be a list of others"),
        ({"name": "worst([])"}, "worst needs at least one attack"),
        ({"name": "pgd(steps=1e400)"}, "a number is too large"),
        ({"name": "pgd(step=" + 900 * "1+" + "1)"}, "cannot read the attack"),
        ({"name": "pgd(steps=" + 700 * "-" + "1)"}, "cannot read the attack"),
        ({"threat": "linf(1" + 400 * "0" + ")"}, "too large"),
        ({"threat": "linf(nan)"}, "nan"),
        ({"threat": "l0(0.5)"}, "how many entries may change"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(digits, tmp_path, capsys, change, sentence):
    _bad_files(tmp_path)
    change = {key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value for key, value in change.items()}
    more, out, model = change.pop("more", ()), change.pop("out", None), change.pop("model", digits)
    assert main(attack(model, out, *more, **change)) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("advkit: ")
    assert printed.err.count("\n") == 1
    assert any(part in printed.err for part in sentence.split("|")), printed.err
    assert not (tmp_path / "owned").exists()


def test_words_the_parser_does_not_know(capsys):
    for words in ([], ["atack"], ["attack"], ["attack", "--modle", "x"], ["list", "atacks"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2
        assert "usage: advkit" in capsys.readouterr().err


def test_a_folder_of_another_run(digits, tmp_path, capsys):
    assert main(attack(digits, tmp_path / "run")) == 0
    assert main(attack(digits, tmp_path / "run", "--seed", "1")) == 2
    assert "; seed was 0, now 1); give --out another folder" in capsys.readouterr().err


def test_a_full_disk(digits, tmp_path, capsys, monkeypatch):
    original, left = folder.append, [3]

    def append(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "records.jsonl")
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(folder, "append", append)
        assert main(attack(digits, tmp_path / "run")) == 2
    assert "No space left on device: records.jsonl; what was finished before is kept" in capsys.readouterr().err
    assert main(attack(digits, tmp_path / "run")) == 0
    assert main(attack(digits, tmp_path / "whole")) == 0
    assert (tmp_path / "run/records.jsonl").read_bytes() == (tmp_path / "whole/records.jsonl").read_bytes()


def _command(arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "advkit", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # What a shell starts in the background ignores Ctrl-C, and so would this process.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, env=environment, **pipes, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def test_two_processes_do_not_write_to_one_folder(digits, tmp_path, capsys):
    slow = attack(digits, tmp_path / "run", name="square(queries=100000)", limit="200", threat="linf(0.001)")
    with _command(slow, cwd=tmp_path) as process:
        for _ in range(600):
            if (tmp_path / "run" / "run.json").exists():
                break
            time.sleep(0.1)
        assert main(slow) == 2
        assert "another process is writing to" in capsys.readouterr().err
        process.kill()


def test_output_that_nobody_reads(digits, tmp_path):
    words = " ".join(f"'{word}'" for word in attack(digits, limit="5"))
    command = f"{sys.executable} -m advkit {words}"
    for line, codes in (
        (f"{command} | true", (0, 141)),
        (f"{command} >&-", (0,)),
        (f"{sys.executable} -m advkit list models | head -1", (0, 141)),
    ):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
        assert done.returncode in codes
        assert "Traceback" not in done.stderr


def test_ctrl_c_keeps_what_is_finished(digits, tmp_path):
    arguments = attack(digits, tmp_path / "run", name="square(queries=100000)", limit="200", threat="linf(0.001)")
    arguments += ["--attack", "fgsm"]
    with _command(arguments, cwd=tmp_path) as process:
        for _ in range(600):
            if (tmp_path / "run" / "run.json").exists():
                break
            time.sleep(0.1)
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.strip().splitlines()[-1].startswith("advkit: stopped; what was finished and has an --out is kept")
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_the_same(digits, tmp_path):
    chance = random.Random(0)
    arguments = attack(
        digits, tmp_path / "killed", name='restarts(pgd(steps=20, loss="margin"), n=4)', limit="1000", threat="linf(0.02)"
    )
    kills = 0
    while kills < 20:
        with _command(arguments, cwd=tmp_path) as process:
            try:
                process.wait(timeout=chance.uniform(1.0, 5.0))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            else:
                assert process.returncode == 0
                # It ended before it could be killed: start anew.
                (tmp_path / "killed").rename(tmp_path / f"ended{kills}")
    assert main(arguments) == 0
    assert main([*arguments[:-2], "--out", str(tmp_path / "whole")]) == 0
    for name in ("run.json", "records.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path in (tmp_path / "whole" / "examples").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / "examples" / path.name).read_bytes()


@pytest.mark.slow
def test_a_disk_that_takes_no_more(digits, tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    with _command(attack(digits, tmp_path / "run"), cwd=tmp_path, preexec_fn=limit) as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("advkit: File too large")


@pytest.mark.slow
def test_the_networks_learn_mnist(tmp_path, capsys):
    if not (SHARED / "mnist").exists():
        pytest.skip("the folder ../shared/data/mnist is not there")
    out = tmp_path / "m.safetensors"
    assert main(["train", "--model", "mnist-cnn", "--data", str(SHARED / "mnist"), "--out", str(out)]) == 0
    accuracy = float(capsys.readouterr().out.split("test split ")[1].split(" %")[0])
    assert accuracy >= 98.8


@pytest.mark.slow
def test_the_embedded_digits_are_enough_for_96_per_cent(tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert main(["train", "--model", "mnist-cnn", "--data", "mnist-5k", "--out", str(out)]) == 0
    accuracy = float(capsys.readouterr().out.split("test split ")[1].split(" %")[0])
    assert accuracy >= 96.0


def test_training_says_what_is_wrong(tmp_path, capsys):
    words = ["train", "--model", "mnist-mlp(width=8)", "--data", "mnist-5k", "--limit", "50"]
    for more, sentence in (
        (["--out", "m.bin"], "a checkpoint is a file that ends in .safetensors"),
        (["--out", f"{tmp_path}/m.safetensors", "--threat", "linf(0.3)"], "--threat was given without --defense"),
        (["--out", f"{tmp_path}/m.safetensors", "--defense", "pgd"], "the defense pgd needs a threat model to withstand"),
        (["--out", f"{tmp_path}/m.safetensors", "--defense", "trade", "--threat", "linf(0.3)"], "unknown defense 'trade'"),
        (["--out", f"{tmp_path}/m.safetensors", "--defense", "pgd", "--threat", "linf"], "searches inside a fixed radius"),
        (["--out", f"{tmp_path}/m.safetensors", "--epochs", "0"], "epochs is 0"),
    ):
        assert main([*words, *more]) == 2
        err = capsys.readouterr().err
        assert sentence in err
        assert err.count("\n") == 1
    assert main([*words[:2], "resnet9000", *words[3:], "--out", "m.safetensors"]) == 2
    assert "unknown network 'resnet9000'" in capsys.readouterr().err
    assert main([*words[:4], "nothere.npz", "--out", "m.safetensors"]) == 2
    capsys.readouterr()


def test_a_probability_model_can_be_attacked_when_said_so(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def model():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Softmax(1))\n"
    )
    words = attack(f"{tmp_path}/mine.py:model")
    assert main(words) == 2
    assert "--probabilities" in capsys.readouterr().err
    assert main([*words, "--probabilities"]) == 0
    assert "logarithm" in capsys.readouterr().out


def test_a_checkpoint_of_another_architecture_is_explained(tmp_path, capsys):
    checkpoint.save(tmp_path / "c.safetensors", networks.build("cifar-resnet"), "cifar-resnet")
    images = torch.zeros(4, 32, 40, dtype=torch.uint8).numpy()
    np.savez(tmp_path / "d.npz", x=images, y=np.zeros(4, int))
    assert main(attack(tmp_path / "c.safetensors", data=tmp_path / "d.npz")) == 2
    assert "the network takes 3 channels and got 1" in capsys.readouterr().err
