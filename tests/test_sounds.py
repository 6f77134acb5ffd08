import dataclasses
import io
import math
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from advkit.benchmarks.evaluate import evaluate
from advkit.data import Data, from_tensors, load
from advkit.data.sounds import LEVELS, strings
from advkit.errors import UsageError
from advkit.norms import lp_norm
from advkit.sound import wav
from advkit.sound.threats import Level, Snr, lengths

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
FSDD = str(SHARED / "fsdd")
needs_fsdd = pytest.mark.skipif(not Path(FSDD).is_dir(), reason="the spoken digits are not in ../shared/data")
datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
RATE = 8000


def tone(n, seed=0, height=0.5):
    """A sound of n samples of 16 bits, the last of which is not 0."""
    return np.random.default_rng(seed).integers(1, round(32767 * height), n).astype(np.int16)


def file_of(samples, rate=RATE):
    buffer = io.BytesIO()
    wavfile.write(buffer, rate, samples)
    return buffer.getvalue()


def wide(samples):
    """A WAV file of 24 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(3)
        file.setframerate(RATE)
        file.writeframes(b"".join((256 * int(v)).to_bytes(3, "little", signed=True) for v in samples))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Writes a folder of sounds for each class."""

    def write(classes):
        for name, files in classes.items():
            (tmp_path / name).mkdir()
            for i, content in enumerate(files):
                (tmp_path / name / f"{i}.wav").write_bytes(content)
        return str(tmp_path)

    return write


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes sounds in the hub's layout."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(files, labels, speakers, names=("no", "yes")):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        rows = {"audio": [{"bytes": file, "path": None} for file in files], "label": labels, "speaker": speakers}
        label, speaker = datasets.ClassLabel(names=list(names)), datasets.Value("string")
        kinds = {"audio": datasets.Audio(), "label": label, "speaker": speaker}
        # Not through Dataset.from_dict, which wants torchcodec.
        table = pyarrow.Table.from_pydict(rows, schema=datasets.Features(kinds).arrow_schema)
        parquet.write_table(table, folder / "train-00000-of-00001.parquet")
        return str(folder)

    return write


def test_a_folder_of_sounds_is_waveforms_at_one_rate_that_end_in_zeros(folder):
    long, short = tone(900), tone(300, 1)
    data = load(folder({"no": [file_of(long)], "yes": [file_of(short)]}))
    x, y = data.batch(0, 2)
    assert (x.shape, x.dtype, y.tolist(), data.classes) == ((2, 900), torch.float32, [0, 1], ("no", "yes"))
    assert (data.kind, data.low, data.high, data.rate, data.levels, data.notes) == ("waveform", -1, 1, RATE, LEVELS, ())
    assert torch.equal(x[0] * 32768, torch.from_numpy(long).float())
    assert lengths(x).tolist() == [900, 300]
    assert data.select(torch.tensor([1])).rate == data.limited(1, 0).rate == RATE


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ([file_of(np.stack([tone(400), tone(400, 1)], 1)), file_of(tone(400))], "1 of 2 sounds have several channels"),
        ([file_of(tone(400))] * 2 + [file_of(tone(800), 16000)], "1 of 3 sounds have another rate and were resampled to 8000"),
    ],
)
def test_what_is_changed_on_the_way_is_said(folder, files, note):
    data = load(folder({"no": files[:1], "yes": files[1:]}))
    assert len(data.notes) == 1
    assert note in data.notes[0]
    x, _ = data.batch(0, len(data))
    assert x.shape == (len(files), 400)
    assert torch.equal(x, wav.quantised(x))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(file_of((tone(400) // 256 + 128).astype(np.uint8)), id="8 bits"),
        pytest.param(wide(tone(400)), id="24 bits"),
        pytest.param(file_of(tone(400).astype(np.float32) / 32768), id="floats"),
    ],
)
def test_other_widths_are_the_same_sound(folder, content):
    x, _ = load(folder({"no": [content], "yes": [file_of(tone(400))]})).batch(0, 2)
    assert (x[0] - x[1]).abs().max() <= (1 / 128 if "8" in str(content[34]) and content[34] == 8 else 0)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (file_of(np.zeros(400, np.int16)), "nothing but digital silence"),
        (file_of(np.zeros(0, np.int16)), "no samples"),
        (file_of(tone(601 * 1000), 1000), "lasts 601 s"),
        (b"", "cannot read"),
        (b"RIFF0000WAVE", "cannot read"),
        (file_of(tone(400))[:30], "cannot read"),
    ],
)
def test_what_is_no_sound_is_named_in_a_sentence(folder, content, says):
    with pytest.raises(UsageError, match=says) as raised:
        load(folder({"no": [file_of(tone(400))], "yes": [content]}))
    assert "yes/0.wav" in str(raised.value)


def test_a_folder_without_sounds_or_with_images_too_is_refused(folder, tmp_path):
    path = folder({"no": [file_of(tone(400))], "yes": []})
    (tmp_path / "yes" / "x.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"1 of 2 files one folder below .* are sounds and the rest images"):
        load(path)
    (tmp_path / "no" / "0.wav").unlink()
    (tmp_path / "yes" / "x.png").unlink()
    with pytest.raises(UsageError, match=r"there is no image one folder below .* a folder of images or of sounds"):
        load(path)


def test_a_range_or_a_size_is_not_for_sounds(folder):
    path = folder({"no": [file_of(tone(400))], "yes": [file_of(tone(400))]})
    with pytest.raises(UsageError, match="leave --size out"):
        load(path, size=32)
    with pytest.raises(UsageError, match="go from -1 to 1"):
        load(path, low=0, high=1)
    assert load(path, low=-1, high=1).high == 1
    with pytest.raises(UsageError, match="has no column 'speaker'"):
        load(f"{path}@speaker=a")


def test_sounds_of_the_hub_are_those_of_a_folder(hub, tmp_path):
    files = [file_of(tone(300 + i, i)) for i in range(4)]
    there = load(hub(files, [0, 1, 0, 1], ["a", "b", "a", "c"]), split="train")
    for k, content in zip([0, 1, 0, 1], files, strict=True):
        (tmp_path / "plain" / ("no", "yes")[k]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "plain" / ("no", "yes")[k] / f"{len(content)}.wav").write_bytes(content)
    here = load(str(tmp_path / "plain"))
    assert (there.rate, there.kind, there.classes) == (here.rate, here.kind, here.classes)
    assert torch.equal(there.batch(0, 4)[0][[0, 2, 1, 3]], here.batch(0, 4)[0])


def test_a_speaker_is_held_out(hub):
    path = hub([file_of(tone(300 + i, i)) for i in range(5)], [0, 1, 0, 1, 0], ["a", "b", "a", "c", "b"])
    train, test = (load(f"{path}@speaker=b", split=split) for split in ("train", "test"))
    assert (lengths(train.batch(0, 9)[0]).tolist(), lengths(test.batch(0, 9)[0]).tolist()) == ([300, 302, 303], [301, 304])
    assert (train.y.tolist(), test.y.tolist()) == ([0, 0, 1], [1, 0])
    with pytest.raises(UsageError, match=r"no column 'town'; its columns are audio, label, speaker"):
        load(f"{path}@town=b")
    with pytest.raises(UsageError, match=r"speaker is 'd'; some examples should have the value, of a, b, c"):
        load(f"{path}@speaker=d")


def test_damaged_parquet_is_refused(hub):
    path = hub([file_of(tone(300))], [0], ["a"])
    file = Path(path) / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot load"):
        load(path, split="train")
    with pytest.raises(UsageError, match="cannot read example 1"):
        load(hub([file_of(tone(300)), b"RIFF"], [0, 1], ["a", "b"]), split="train")


def words(n=12, classes=("no", "yes")):
    """Sounds of different lengths whose samples say which word they are."""
    x = torch.zeros(n, 400)
    for i in range(n):
        x[i, : 200 + 10 * i] = (1 + i % len(classes)) / 8
    data = from_tensors(x, torch.arange(n) % len(classes), low=-1.0, high=1.0, classes=classes)
    return dataclasses.replace(data, rate=1000)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99))
def test_strings_say_what_their_sounds_are(most, seed):
    data = strings(words(), most, seed)
    again = strings(words(), most, seed)
    x, y = data.batch(0, len(data))
    assert (data.digest(), data.rate, data.kind) == (again.digest(), 1000, "waveform")
    for row, k in zip(x, y.tolist(), strict=True):
        marks = torch.unique_consecutive(row[: int(lengths(row[None]))])
        heard = [("no", "yes")[round(float(mark) * 8) - 1] for mark in marks if mark]
        assert " ".join(heard) == data.classes[k]
        assert len(heard) <= most


def test_strings_of_what_are_no_words_are_refused():
    with pytest.raises(UsageError, match="strings are made of sounds"):
        load("strings:mnist-5k")
    with pytest.raises(UsageError, match="the most words"):
        strings(words(), 0)


@pytest.mark.parametrize("threat", [Snr(20), Snr(70), Level(-30), Level(-85), Snr(), Level()])
def test_a_file_of_16_bits_stays_inside_the_threat(threat):
    x = wav.quantised(0.1 * torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).clamp(-1, 1))
    eps = min(threat.eps, 0.5)
    theta = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    theta *= (eps / lp_norm(theta, threat.p)).unsqueeze(1)
    saved = threat.snap(threat.apply(x, theta), x, LEVELS)
    assert torch.equal(saved, wav.quantised(saved))
    assert (lp_norm(saved - x, threat.p) <= threat.eps * threat.size(x) * (1 + 1e-5)).all()
    assert (saved - threat.apply(x, theta)).abs().max() <= 1 / 32768


@pytest.mark.parametrize("threat", [Snr(33.0), Level(-21.0)])
def test_a_threat_of_another_radius(threat):
    half = threat.with_eps(threat.eps / 2)
    assert half.eps == pytest.approx(threat.eps / 2)
    assert abs(half.db - threat.db) == pytest.approx(20 * math.log10(2))
    assert (half.low, half.high) == (threat.low, threat.high)


def test_a_success_counts_as_the_file_that_holds_it():
    """The model hears the last bit of a sample only: what is rounded away is no success."""
    x = torch.full((4, 50), 100 / 32768)
    data = from_tensors(x, torch.zeros(4, dtype=torch.int64), low=-1.0, high=1.0)
    data = dataclasses.replace(data, levels=LEVELS, rate=RATE)

    def model(z):
        moved = (z - 100 / 32768).abs().amax(1) * 32768
        return torch.stack([0.2 - moved, moved - 0.2], 1)

    quiet, loud = (evaluate(model, data, threat=Level(db), attacks="pgd(steps=5)") for db in (-48, -36))
    assert (quiet.robust_accuracy.value, quiet.robust_accuracy_8bit.value) == (0, 1)
    assert (loud.robust_accuracy.value, loud.robust_accuracy_8bit.value) == (0, 0)
    stored = loud.examples()["x_16bit"]
    assert stored.dtype == torch.int16
    assert (model(stored / 32768).argmax(1) == 1).all()


@needs_fsdd
def test_the_spoken_digits():
    data = load(FSDD, limit=20)
    assert (data.rate, data.kind, data.classes[7], data.y.bincount().tolist()) == (8000, "waveform", "seven", [2] * 10)
    assert isinstance(data, Data)
    held = load(f"{FSDD}@speaker=theo", limit=10)
    assert (len(held), held.rate) == (10, 8000)
