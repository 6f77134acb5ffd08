import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from advkit import Access, AccessError, Evaluation, Lp, UsageError, evaluate
from advkit.attacks import PGD, Uniform
from advkit.benchmarks import folder
from advkit.benchmarks.pictures import save_curve, save_pictures
from advkit.models import wrap


@pytest.fixture(scope="module")
def digits():
    """A linear classifier of 6x6 images that is right on most of them, and 40 8-bit images."""
    rng = torch.Generator().manual_seed(0)
    means = torch.rand(4, 1, 6, 6, generator=rng)
    y = torch.arange(40) % 4
    x = ((means[y] + 0.5 * torch.randn(40, 1, 6, 6, generator=rng)).clamp(0, 1) * 255).round().to(torch.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with torch.no_grad():
        model[1].weight.copy_(20 * (means - 0.5).flatten(1))
        model[1].bias.copy_(-20 * (means.flatten(1) ** 2).sum(1) / 2 + 10 * means.flatten(1).sum(1))
    return model, (x, y)


OPTIONS = {"threat": "linf(0.2)", "attacks": ["fgsm", "pgd(steps=5)"], "batch_size": 8}


def _predictions(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


def test_every_number_follows_from_the_examples(digits):
    model, (x, y) = digits
    result = evaluate(model, (x, y), **OPTIONS)
    examples, table = result.examples(), result.table()
    right = _predictions(model, examples["x"]) == y
    broken = right & (_predictions(model, examples["x_adv"]) != y)
    assert 0 < int(broken.sum()) < int(right.sum()) < 40
    assert result.clean_accuracy.count == int(right.sum())
    assert result.robust_accuracy.count == int((right & ~broken).sum())
    assert result.success_rate.count == int(broken.sum())
    assert result.success_rate.of == int(right.sum())
    assert table["success"].tolist() == broken.tolist()
    assert Lp(math.inf, 0.2).allows(examples["x_adv"], examples["x"]).all()
    distance = (examples["x_adv"] - examples["x"]).abs().flatten(1).amax(1)
    assert np.allclose(table["distance"][table["success"]].astype(float), distance[broken])
    saved = examples["x_8bit"].float() / 255
    as_files = right & (_predictions(model, saved) != y)
    assert table["success_8bit"].tolist() == as_files.tolist()
    assert ((saved - examples["x"]).abs() <= 0.2 + 1e-6).all()
    assert result.robust_accuracy_8bit.count == int((right & ~as_files).sum())


def test_counts_equal_what_the_model_saw(digits):
    model, (x, y) = digits
    seen = []

    def counting(z):
        seen.append(len(z))
        return model(z)

    wrapped = wrap(counting)
    evaluate(wrapped, (x, y), **OPTIONS)
    looked = 2 * 4  # the look at the model before the run: two passes of four examples
    result = evaluate(wrapped, (x, y), **OPTIONS)
    summary = result.summary()
    assert summary["forwards"] + summary["checks"] == sum(seen) // 2 - looked


def test_the_batch_size_does_not_matter(digits):
    model, data = digits
    options = {**OPTIONS, "attacks": ["pgd(steps=5)", "uniform(n=5)", "square(queries=20)"]}
    tables = [evaluate(model, data, **{**options, "batch_size": size}).table() for size in (1, 7, 40)]
    for other in tables[1:]:
        assert tables[0].drop(columns="distance").equals(other.drop(columns="distance"))
        assert np.allclose(tables[0]["distance"].astype(float), other["distance"].astype(float), equal_nan=True, atol=1e-6)


def test_later_attacks_run_on_what_is_left_and_alone_on_all(digits):
    model, data = digits
    result = evaluate(model, data, **OPTIONS)
    first, second = result.by_attack()
    assert (first["attack"], second["attack"]) == ("fgsm", "pgd(steps=5)")
    assert second["examples"] == first["examples"] - first["broke"]
    assert second["robust_accuracy_alone"] is None
    alone = evaluate(model, data, **OPTIONS, alone=True)
    assert alone.robust_accuracy == result.robust_accuracy
    assert [row["examples"] for row in alone.by_attack()] == [first["examples"]] * 2
    pgd = evaluate(model, data, **{**OPTIONS, "attacks": "pgd(steps=5)"})
    assert alone.by_attack()[1]["robust_accuracy_alone"]["count"] == pgd.robust_accuracy.count


def test_cheap_attacks_come_first(digits):
    model, data = digits
    result = evaluate(model, data, threat="linf(0.2)", attacks=["square(queries=50)", "pgd(steps=5)", "fgsm"])
    assert result.run["attacks"] == ["fgsm", "pgd(steps=5)", "square(queries=50)"]


@pytest.mark.parametrize("goal", ["next", "random", "least-likely", 2])
def test_targets(digits, goal):
    model, (x, y) = digits
    result = evaluate(model, (x, y), threat="linf(0.5)", attacks="pgd(steps=20)", goal=goal, quantize=False)
    table = result.table()
    assert (table["target"] != table["label"]).all()
    hit = table[table["success"]]
    assert len(hit)
    assert (hit["adversarial"] == hit["target"]).all()
    if goal == 2:
        assert set(table["label"]) == {0, 1, 3}
        assert "10 examples of class 2 are left out" in result.notes[-1]
    if goal == "next":
        assert (table["target"] == (table["label"] + 1) % 4).all()
    if goal == "random":
        again = evaluate(model, (x, y), threat="linf(0.5)", attacks="fgsm", goal=goal, batch_size=3)
        assert again.table()["target"].tolist() == table["target"].tolist()


def test_the_closest_of_several_attacks_and_the_curve(digits):
    model, data = digits
    one = evaluate(model, data, threat="l2", attacks="fmn(steps=10)")
    two = evaluate(model, data, threat="l2", attacks=["fmn(steps=10)", "fmn(steps=60)"])
    a, b = (result.table()["distance"].astype(float) for result in (one, two))
    a, b = a.fillna(np.inf), b.fillna(np.inf)
    assert (b <= a).all()
    assert (b < a).any()
    curve = two.curve([0.1, 0.5, 1.0])
    for point in curve:
        fixed = two.table()
        robust = (fixed["correct"] & ~(fixed["distance"].astype(float) <= point["eps"])).sum()
        assert point["count"] == robust
    default = two.curve()
    assert len(default) == 10
    assert default[-1]["value"] < default[0]["value"]


def test_a_budget_and_access_are_kept(digits):
    model, data = digits
    result = evaluate(model, data, threat="linf(0.05)", attacks="square(queries=100)", access="scores", budget=7)
    assert max(row["forwards"] for row in result.rows) == 7
    with pytest.raises(AccessError, match=r"pgd needs gradients; the adversary sees scores; attacks that do .*square"):
        evaluate(model, data, threat="linf(0.05)", attacks="pgd", access="scores")
    labels = evaluate(model, data, threat="linf(0.05)", access="labels", limit=4, budget=20)
    assert sorted(labels.run["attacks"]) == ["rays", "uniform(n=10)"]
    labels = evaluate(model, data, threat="l1(1)", access="labels", limit=4)
    assert any("only noise" in note for note in labels.notes)


def test_attacks_may_be_objects_of_ones_own(digits):
    model, data = digits
    result = evaluate(model, data, threat=Lp(math.inf, 0.2), attacks=[PGD(3), Uniform(2)])
    assert result.run["attacks"] == ["uniform(n=2)", "pgd(steps=3)"]


def test_a_waveform_keeps_its_range():
    rng = torch.Generator().manual_seed(0)
    x = 1.8 * torch.rand(6, 1, 50, generator=rng) - 0.9
    weights = torch.randn(50, 3, generator=rng)
    model = lambda z: z.flatten(1) @ weights
    y = model(x).argmax(1)
    result = evaluate(model, (x, y), threat="linf(0.01)", attacks="pgd(steps=5)")
    assert result.run["threat"] == "linf(eps=0.01, low=-1.0)"
    assert any("[-1, 1]" in note for note in result.notes)
    x_adv = result.examples()["x_adv"]
    assert float((x_adv - x).abs().max()) <= 0.01 + 1e-6
    assert float(x_adv.min()) < -0.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attacks": "pgdd"}, "unknown attack 'pgdd'; .* did you mean 'pgd'"),
        ({"attacks": "standart"}, "unknown attack 'standart'; .* did you mean 'standard'"),
        ({"attacks": []}, "there is no attack to run"),
        ({"attacks": ["fgsm", "fgsm"]}, "named twice"),
        ({"threat": "linf"}, "PGD searches inside a fixed radius|FGSM searches"),
        ({"threat": "l0(3)"}, "FGSM does not serve l_0; it serves"),
        ({"threat": "linf(-1)"}, "eps is -1"),
        ({"goal": "nxt"}, "the goal is 'nxt'; it should be untargeted, a class number"),
        ({"goal": 9}, "the target is class 9; the model has classes 0 to 3"),
        ({"access": "all"}, "unknown access 'all'; known are gradients, labels, scores"),
        ({"budget": 0}, "budget is 0"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"limit": 0}, "the limit is 0"),
        ({"limit": 2.5}, "the limit is 2.5"),
        ({"batch_size": 2.5}, "batch size is 2.5"),
        ({"budget": 1.5}, "budget is 1.5"),
        ({"threat": 0.3}, "the threat model is 0.3"),
        ({"attacks": PGD}, "it should be an attack"),
        ({"seed": -1}, "the seed is -1"),
        ({"device": "tpu9"}, "device"),
    ],
)
def test_bad_settings_get_a_sentence(digits, change, sentence):
    model, data = digits
    with pytest.raises(UsageError, match=sentence):
        evaluate(model, data, **{**OPTIONS, **change})


def test_bad_data_and_models_get_a_sentence(digits):
    model, (x, y) = digits
    with pytest.raises(UsageError, match="should be a pair"):
        evaluate(model, 3, **OPTIONS)
    with pytest.raises(UsageError, match="between 4 and 4; the model has classes 0 to 3"):
        evaluate(model, (x, torch.full((40,), 4)), **OPTIONS)
    with pytest.raises(UsageError, match="probabilities"):
        evaluate(nn.Sequential(model, nn.Softmax(1)), (x, y), **OPTIONS)
    with pytest.raises(UsageError, match=r"5 channels|36 features"):
        evaluate(model, (x[:, :, :5], y), **OPTIONS)
    with pytest.raises(UsageError, match="threat model's range is"):
        evaluate(model, (x, y), **{**OPTIONS, "threat": Lp(math.inf, 0.1, 0.4, 0.6)})


class _Interrupted(Exception):
    pass


def _bytes(path):
    return {file.relative_to(path): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def _without_times(path):
    content = _bytes(path)
    summary = json.loads(content.pop(next(file for file in content if file.name == "summary.json")))
    times = content.pop(next(file for file in content if file.name == "times.jsonl")).decode().splitlines()
    summary.pop("seconds")
    for attack in summary["attacks"]:
        attack.pop("seconds")
    return content, summary, [{**json.loads(line), "seconds": 0} for line in times]


def _cut_off(monkeypatch, cut, call):
    """Whether ``call`` was interrupted at its write number ``cut``."""
    left = [cut]

    def counted(original):
        def write(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise _Interrupted
            return original(*arguments)

        return write

    with monkeypatch.context() as patch:
        for name in ("replace", "append"):
            patch.setattr(folder, name, counted(getattr(folder, name)))
        try:
            call()
        except _Interrupted:
            return True
    return False


def _tear(path):
    """Take the end off a file, as a machine that stops in the middle of a write does."""
    if path.exists():
        path.write_bytes(path.read_bytes()[:-7])


def test_a_run_that_was_cut_off_anywhere_ends_the_same(digits, tmp_path, monkeypatch):
    model, data = digits
    evaluate(model, data, **OPTIONS, out=tmp_path / "whole")
    expected = _without_times(tmp_path / "whole")
    cut, part = 1, tmp_path / "cut1"
    while _cut_off(monkeypatch, cut, lambda part=part: evaluate(model, data, **OPTIONS, out=part)):
        if cut % 3 == 0:
            _tear(part / "records.jsonl")
            _tear(part / "times.jsonl")
        evaluate(model, data, **OPTIONS, out=part)
        assert _without_times(part) == expected
        cut += 1
        part = tmp_path / f"cut{cut}"
    assert cut > 15


def test_a_finished_run_is_not_run_again(digits, tmp_path):
    model, data = digits
    first = evaluate(model, data, **OPTIONS, out=tmp_path / "run")
    before = _bytes(tmp_path / "run")
    statuses = []
    again = evaluate(model, data, **OPTIONS, out=tmp_path / "run", report=statuses.append)
    assert not statuses
    assert _bytes(tmp_path / "run") == before
    assert again.rows == first.rows


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"attacks": "fgsm"}, {"threat": "linf(0.1)"}, {"limit": 8}, {"goal": "next"}, {"budget": 3}]
)
def test_a_folder_of_another_run_is_refused(digits, tmp_path, change):
    model, data = digits
    evaluate(model, data, **OPTIONS, out=tmp_path / "run")
    with pytest.raises(UsageError, match="holds another run"):
        evaluate(model, data, **{**OPTIONS, **change}, out=tmp_path / "run")


def test_another_model_or_other_data_are_another_run(digits, tmp_path):
    model, (x, y) = digits
    evaluate(model, (x, y), **OPTIONS, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"holds another run .*data"):
        evaluate(model, (255 - x, y), **OPTIONS, out=tmp_path / "run")
    other = nn.Sequential(nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(UsageError, match=r"holds another run .*model"):
        evaluate(other, (x, y), **OPTIONS, out=tmp_path / "run")


def test_folders_that_cannot_be_used(digits, tmp_path):
    model, data = digits
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        evaluate(model, data, **OPTIONS, out=tmp_path / "full")
    with pytest.raises(UsageError, match="is a file"):
        evaluate(model, data, **OPTIONS, out=tmp_path / "full" / "thesis.txt")
    evaluate(model, data, **OPTIONS, out=tmp_path / "run")
    for name, content in (("records", b"{]\n"), ("records", b"\xff\xfe\n"), ("records", b"[]\n"), ("times", b"{}\n")):
        kept = (tmp_path / "run" / f"{name}.jsonl").read_bytes()
        (tmp_path / "run" / f"{name}.jsonl").write_bytes(content)
        with pytest.raises(UsageError, match=rf"{name}.jsonl is damaged"):
            evaluate(model, data, **OPTIONS, out=tmp_path / "run")
        (tmp_path / "run" / f"{name}.jsonl").write_bytes(kept)
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "records.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(UsageError, match="are not those of this run"):
        evaluate(model, data, **OPTIONS, out=tmp_path / "run")
    (tmp_path / "run" / "records.jsonl").write_text("".join(lines))
    next((tmp_path / "run" / "examples").iterdir()).write_bytes(b"cut")
    with pytest.raises(UsageError, match="are damaged"):
        Evaluation.load(tmp_path / "run").examples()
    with pytest.raises(UsageError, match="holds no run"):
        Evaluation.load(tmp_path / "full")


def test_save_and_load_give_back_the_same(digits, tmp_path):
    model, data = digits
    result = evaluate(model, data, **OPTIONS)
    result.save(tmp_path / "saved")
    loaded = Evaluation.load(tmp_path / "saved")
    assert loaded.rows == result.rows
    assert loaded.summary() == result.summary()
    for name, tensor in result.examples().items():
        assert torch.equal(loaded.examples()[name], tensor)
    evaluate(model, data, **OPTIONS, out=tmp_path / "kept")
    assert _without_times(tmp_path / "kept") == _without_times(tmp_path / "saved")


def test_pictures_are_the_examples(digits, tmp_path):
    model, data = digits
    result = evaluate(model, data, **OPTIONS)
    count = save_pictures(result, tmp_path, limit=3)
    assert count == 3
    files, pictures = (sorted((tmp_path / name).iterdir()) for name in ("files", "pictures"))
    assert [file.name for file in files] == [picture.name for picture in pictures]
    for file in files:
        index = int(file.name.split("-")[0])
        row = next(row for row in result.rows if row["index"] == index)
        with Image.open(file) as image:
            pixels = torch.as_tensor(np.asarray(image).copy())
        assert torch.equal(pixels, result.examples()["x_8bit"][index, 0])
        assert int(_predictions(model, pixels.view(1, 1, 6, 6) / 255)) == row["adversarial_8bit"] != row["label"]
        assert file.name == f"{index:06d}-{row['label']}-as-{row['adversarial_8bit']}.png"
    with Image.open(pictures[0]) as wide:
        assert wide.size == (3 * 6 * 19, 6 * 19)
    closest = evaluate(model, data, threat="linf", attacks="fmn(steps=5)")
    save_curve(closest.curve([0.1, 0.2]), 0.9, "radius", tmp_path / "curve.png")
    with pytest.raises(UsageError, match="gives no curve"):
        result.curve()
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size[0] > 500


def test_a_setting_that_failed_does_not_claim_the_folder(digits, tmp_path):
    model, data = digits
    with pytest.raises(UsageError, match="the target is class 9"):
        evaluate(model, data, **OPTIONS, goal=9, out=tmp_path / "run")
    assert len(evaluate(model, data, **OPTIONS, goal=2, out=tmp_path / "run").rows) == 30


def test_models_that_compute_something_else_are_another_run(digits, tmp_path):
    _, (x, y) = digits
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(36, 4), act, nn.Linear(4, 4)) for act in (nn.ReLU(), nn.Sigmoid())]
    networks[1].load_state_dict(networks[0].state_dict())
    evaluate(networks[0], (x, y), **OPTIONS, out=tmp_path / "run")
    with pytest.raises(UsageError, match="holds another run"):
        evaluate(networks[1], (x, y), **OPTIONS, out=tmp_path / "run")


def test_queries_are_those_of_the_attacks(digits):
    model, data = digits
    result = evaluate(model, data, threat="linf(0.03)", attacks="square(queries=30)")
    assert result.summary()["forwards_of_broken"]["q95"] <= 31


def test_an_attack_that_is_no_dataclass_is_refused(digits):
    class Mine:
        access, norms, minimum, paper, cost = Access.LABELS, (math.inf,), False, "mine", 1

        def __call__(self, oracle, x, threat, rng):
            return x

    model, data = digits
    with pytest.raises(UsageError, match="the attack Mine is not a dataclass"):
        evaluate(model, data, threat="linf(0.1)", attacks=Mine())


def test_gradients_of_any_scale_are_followed(digits):
    model, (x, y) = digits
    found = []
    for scale in (1e-24, 1.0, 1e15):
        result = evaluate(
            lambda z, s=scale: s * model(z).double(), (x, y), threat="l2(1)", attacks=['bim(loss="margin")', "fmn"], alone=True
        )
        found.append([row["broke"] for row in result.by_attack()])
    assert found[0] == found[1] == found[2]
    assert found[0][0] > 0


@pytest.mark.parametrize("key", ["model", "data", "threat", "attacks", "seed", "batch_size", "alone", "access", "advkit"])
def test_a_run_that_lacks_something_is_said_to_be_damaged(key, tmp_path):
    x = torch.rand(6, 1, 4, 4)
    evaluate(
        lambda z: z.flatten(1)[:, :3], (x, torch.zeros(6, dtype=torch.int64)), threat="linf(0.1)", attacks="fgsm", out=tmp_path
    )
    run = json.loads((tmp_path / "run.json").read_text())
    for wrong in ({}, {key: {}} if key != "threat" else {key: 3}):
        (tmp_path / "run.json").write_text(json.dumps({**{k: v for k, v in run.items() if k != key}, **wrong}))
        with pytest.raises(UsageError, match=rf"is damaged \(its {key}"):
            Evaluation.load(tmp_path)
