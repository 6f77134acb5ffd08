"""Patches: where they lie, what they cover, that they are learned; and the command."""

import json
import math

import pytest
import torch
from PIL import Image

from advkit import UsageError
from advkit.attacks.patch import Patch
from advkit.cli import main
from advkit.errors import AccessError
from advkit.models import checkpoint
from advkit.streams import Streams


def streams(n, seed=0):
    return Streams.seeded(seed, range(n))


def paste(attack, n=64, side=40, seed=0):
    """White patches on black images."""
    return attack.paste(torch.zeros(n, 1, side, side), torch.ones(1, 5, 5), streams(n, seed))


@pytest.mark.parametrize("shape", ["circle", "square"])
@pytest.mark.parametrize(("rotation", "scale"), [(0.0, 0.0), (180.0, 0.0), (45.0, 0.3)])
def test_a_patch_covers_its_share_and_lies_on_the_image(shape, rotation, scale):
    z = paste(Patch(share=0.1, shape=shape, rotation=rotation, scale=scale))
    covered = z.mean((1, 2, 3))
    assert float(covered.mean()) == pytest.approx(0.1 * (1 + scale**2 / 3), rel=0.03 if scale == 0 else 0.15)
    if scale == 0:
        assert float(covered.min()) > 0.09
        assert float(covered.max()) < 0.11


def test_places_are_all_over_the_image():
    seen = paste(Patch(share=0.05), n=400).mean((0, 1))
    assert float(seen[4:-4, 4:-4].min()) > 0
    quarters = torch.stack([half.mean() for part in seen.chunk(2) for half in part.chunk(2, 1)])
    assert float(quarters.max() / quarters.min()) < 1.4


def test_what_is_not_covered_stays_and_a_place_is_a_rows_own():
    attack, x = (
        Patch(share=0.1, rotation=30.0, scale=0.2),
        torch.rand((8, 3, 20, 20), generator=torch.Generator().manual_seed(0)),
    )
    patch = torch.full((3, 4, 4), 2.0)
    z = attack.paste(x, patch, streams(8))
    assert float((z == x).double().mean()) > 0.8
    part = attack.paste(x[3:5], patch, Streams(streams(8).keys[3:5]))
    assert torch.equal(part, z[3:5])


def test_a_quarter_turn_turns_the_patch():
    """On an image that the patch fills up to its corners, only the angle is left to chance."""
    attack = Patch(share=math.pi / 4 * 0.98, rotation=180.0, scale=0.0)
    patch = torch.zeros(1, 8, 8)
    patch[:, :4] = 1.0
    z = attack.paste(torch.full((200, 1, 16, 16), 0.5), patch, streams(200))
    up, left = z[:, 0, :8].mean((1, 2)), z[:, 0, :, :8].mean((1, 2))
    angle = torch.atan2(up - 0.5, left - 0.5)
    assert float(angle.min()) < -2.5
    assert float(angle.max()) > 2.5


class Reds(torch.nn.Module):
    """Says 1 where the reddest window of 3 x 3 is redder than the threshold."""

    def forward(self, x):
        red = torch.nn.functional.avg_pool2d(x[:, :1] - x[:, 1:].mean(1, keepdim=True), 3, 1).flatten(1).logsumexp(1)
        return torch.stack([torch.zeros_like(red), 20 * (red - math.log(14 * 14) - 0.06)], 1)


def test_a_patch_that_is_easy_is_found():
    x = 0.5 + 0.1 * torch.rand((64, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    y = torch.zeros(64, dtype=torch.int64)
    model, attack, rates = Reds(), Patch(share=0.1, steps=40, batch_size=16), []
    patch = attack.fit(model, x[:32], y[:32], 1, rng=torch.Generator().manual_seed(0), report=lambda at: rates.append(at.rate))
    assert not bool((model(x).argmax(1) == 1).any())
    assert bool((model(attack.paste(x[32:], patch, streams(32))).argmax(1) == 1).all())
    assert float(patch[0].mean()) > 0.8
    assert float(patch[1:].mean()) < 0.2
    assert rates[0] < rates[-1]
    again = attack.fit(model, x[:32], y[:32], 1, rng=torch.Generator().manual_seed(0))
    assert torch.equal(patch, again)


def test_another_range_of_the_data_is_kept():
    x = -1 + 2 * torch.rand((16, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    y = torch.zeros(16, dtype=torch.int64)
    patch = Patch(share=0.1, steps=20).fit(Reds(), x, y, 1, low=-1.0, high=1.0, rng=torch.Generator().manual_seed(0))
    assert float(patch.min()) == -1.0
    assert float(patch.max()) == 1.0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": "star"}, "known are circle, square"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.0}, "share is 1.0"),
        ({"scale": 1.0}, "scale is 1.0"),
        ({"rotation": 270.0}, "rotation is 270.0"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_a_wrong_setting_is_refused(given, said):
    with pytest.raises(UsageError, match=said):
        Patch(**given)


def test_what_cannot_be_learned_is_refused():
    x, y, rng = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), torch.Generator()
    with pytest.raises(UsageError, match="every image is of class 0"):
        Patch(steps=1).fit(Reds(), x, y, 0, rng=rng)
    with pytest.raises(UsageError, match="classes 0 to 1"):
        Patch(steps=1).fit(Reds(), x, y, 7, rng=rng)
    with pytest.raises(UsageError, match=r"images \(N, C, H, W\)"):
        Patch(steps=1).fit(Reds(), x.flatten(1), y, 1, rng=rng)
    with pytest.raises(UsageError, match="give a smaller share"):
        Patch(share=0.8).fit(Reds(), x, y, 1, rng=rng)
    with pytest.raises(AccessError, match="no gradient"):
        Patch(steps=1).fit(lambda z: Reds()(z).detach(), x, y, 1, rng=rng)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of a small network, trained by the command."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    assert main(["train", "--model", "mnist-mlp(width=32)", "--data", "mnist-5k", "--epochs", "3", "--out", str(path)]) == 0
    return path


def command(model, *more):
    words = ["patch", "--model", str(model), "--data", "mnist-5k", "--target", "3", "--steps", "30", "--fit-limit", "300"]
    return [*words, "--limit", "100", *more]


def test_the_command_learns_tries_and_keeps(digits, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command(digits, "--share", "0.3", "--steps", "60", "--transfer-to", str(digits), "--out", str(out))) == 0
    assert "says 3, of other classes" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["schema"], summary["target"], summary["steps"]) == ("advkit/patch/1", 3, 60)
    first, second = summary["models"]
    assert first == second
    assert first["success"]["value"] > first["before"]["value"] + 0.2
    assert first["success"]["low"] < first["success"]["value"] < first["success"]["high"]
    assert first["success"]["of"] == 90
    assert first["accuracy"]["value"] < first["accuracy_before"]["value"]
    tensors, about = checkpoint.read(out / "patch.safetensors")
    assert tensors["patch"].shape[0] == 1
    assert about["share"] == "0.3"
    with Image.open(out / "patch.png") as picture:
        assert min(picture.size) >= 112
    names = [path.stem for path in (out / "pictures").iterdir()]
    assert len(names) == 8
    assert all(name.endswith("-as-3") and "-3-as" not in name for name in names)


def test_the_command_is_the_same_every_time(digits, tmp_path):
    for name in ("a", "b"):
        assert main(command(digits, "--out", str(tmp_path / name))) == 0
    a, b = ((tmp_path / name / "summary.json").read_bytes() for name in ("a", "b"))
    assert a == b


def test_stopping_keeps_the_patch_so_far(digits, tmp_path, monkeypatch, capsys):
    from advkit import stochastic

    class Stopped(stochastic._Batches):
        def next(self):
            self.asked = getattr(self, "asked", 0) + 1
            if self.asked == 6:
                raise KeyboardInterrupt
            return super().next()

    monkeypatch.setattr(stochastic, "_Batches", Stopped)
    assert main(command(digits, "--out", str(tmp_path))) == 0
    assert "stopped after step 5 of 30" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 5


def test_data_with_one_split_is_cut_in_half(digits, tmp_path, capsys):
    (tmp_path / "some.py").write_text(
        "import torch\ndef load():\n    x = torch.rand((60, 1, 28, 28), generator=torch.Generator().manual_seed(0))\n"
        "    return x, torch.arange(60) % 10\n"
    )
    words = ["patch", "--model", str(digits), "--data", f"{tmp_path / 'some.py'}:load", "--target", "3", "--steps", "2"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "half of it is learned from" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["learned_from"] == 30
    assert summary["models"][0]["accuracy"]["of"] == 30


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--target", "12"], "the model has classes 0 to 9"),
        (["--share", "2"], "share is 2.0"),
        (["--shape", "star"], "known are circle, square"),
        (["--data", "nothing"], "unknown data"),
        (["--transfer-to", "nothing.safetensors"], "nothing.safetensors"),
        (["--seed", "-1"], "the seed is -1"),
    ],
)
def test_what_is_wrong_is_one_sentence(digits, more, said, capsys):
    assert main([*command(digits), *more]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
