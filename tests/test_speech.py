"""The harness for recognisers of speech: measures, recordings as they are found, rows, reports, gates, the command line."""

import errno
import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import advkit
from advkit import UsageError
from advkit.attacks import PGD
from advkit.attacks.audio import SPEECH_ATTACKS
from advkit.audio import clips, measures
from advkit.audio.channels import CHANNELS
from advkit.audio.clips import Clip
from advkit.audio.command import Made
from advkit.audio.loading import RECOGNISERS, load
from advkit.audio.recogniser import Recogniser, TextOnly
from advkit.audio.synthesis import VOICES, installed
from advkit.benchmarks import speech, speech_report
from advkit.benchmarks.gates import Gate
from advkit.benchmarks.speech import evaluate_speech
from advkit.benchmarks.speech_report import report
from advkit.benchmarks.speech_result import COLUMNS, Speech, decide, is_speech
from advkit.cli import main
from advkit.oracle import Access
from advkit.sound import wav

RATE = 8000
SHARED = Path(__file__).parents[1].parent / "shared"
TONES = {"yes": 400, "no": 700, "open the door": 1100, "call home": 1600}


def tone(text, seconds=0.5, level=0.2):
    """How a phrase sounds to :class:`Tones`, (T,)."""
    return level * torch.sin(2 * math.pi * TONES[text] / RATE * torch.arange(round(seconds * RATE)))


class Tones(Recogniser):
    """Hears the phrase of the loudest of four tones."""

    rate, name, seconds = RATE, "tones", 2.0

    def __init__(self):
        super().__init__()
        angle = 2 * math.pi * torch.tensor(list(TONES.values())).unsqueeze(1) / RATE * torch.arange(2 * RATE)
        self.register_buffer("waves", torch.polar(torch.ones_like(angle), angle))

    def forward(self, x):
        return ((x.to(torch.complex64) @ self.waves[:, : x.shape[1]].mT).abs() + 1e-3).log() * 5

    def text(self, outputs):
        return [list(TONES)[k] for k in outputs.argmax(1).tolist()]

    def loss(self, outputs, texts):
        return nn.functional.cross_entropy(outputs, torch.tensor([list(TONES).index(text) for text in texts]), reduction="none")

    def check_text(self, text):
        if text not in TONES:
            raise UsageError(f"tones cannot say {text!r}; it says {', '.join(TONES)}")


@dataclass(frozen=True)
class Whistle:
    """Makes a command out of its tone, said twice as fast as the voice."""

    level: float = 0.3
    needs_voice: bool = False
    access = Access.LABELS
    paper = "none"

    def make(self, text, recogniser, *, voice=None, listener=None, rng):
        return Made(tone(text, 0.25, self.level), queries=3, passes=1)


def clip(name="one", text="yes", seconds=0.5, **about):
    """A phrase over another that is nearly as loud."""
    return Clip(name, tone("no" if text is None else text, seconds) + tone("call home", seconds, 0.15), text, **about)


EAR = TextOnly(lambda x: "yes", RATE, "ear")
TARGETED = {"attack": "pgd(steps=20)", "target": "call home", "threat": "snr(5)"}


def wave(path, x=None, rate=RATE):
    path.parent.mkdir(parents=True, exist_ok=True)
    wav.write(path, tone("yes") if x is None else x, rate)
    return path


# Measures


@given(st.floats(-40, 60), st.floats(0.01, 0.9))
def test_the_ratio_is_that_of_the_noise_that_was_added(db, level):
    x = level * torch.sin(torch.arange(400, dtype=torch.float64))
    delta = torch.cos(torch.arange(400, dtype=torch.float64) * 1.7)
    delta *= x.norm() / delta.norm() * 10 ** (-db / 20)
    assert measures.snr(x, x + delta) == pytest.approx(db, abs=1e-6)
    louder = 20 * math.log10(float(delta.abs().max() / x.abs().max()))
    assert measures.db_x(x, x + delta) == pytest.approx(louder, abs=1e-6)


def test_no_change_is_infinitely_quiet():
    x = tone("yes")
    assert measures.snr(x, x) == math.inf
    assert measures.db_x(x, x) == -math.inf
    assert measures.share_above(x, x, RATE) == 0


def test_perceptual_measures_are_best_for_the_same_sound_and_none_where_they_are_not_defined():
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    rng = torch.Generator().manual_seed(0)
    envelope = torch.sin(torch.arange(RATE * 2) * 2 * math.pi * 3 / RATE).abs()
    x = 0.3 * envelope * torch.randn(RATE * 2, generator=rng).clamp(-3, 3) / 3
    noisy = x + 0.1 * torch.randn(len(x), generator=rng)
    assert measures.pesq(x, x, RATE) == pytest.approx(4.55, abs=0.1)
    assert measures.pesq(x, noisy, RATE) < 3
    assert measures.stoi(x, x, RATE) == pytest.approx(1, abs=1e-3)
    assert measures.stoi(x, noisy, RATE) < 0.95
    assert measures.pesq(x, noisy, 22_050) is None
    short = x[:1000]
    assert measures.pesq(short, short, RATE) is measures.stoi(short, short, RATE) is None


def test_noise_has_the_power_and_the_length_of_the_sound():
    x = 0.1 * tone("no", 2.0)
    drawn = measures.noise(x, torch.Generator().manual_seed(1))
    assert drawn.shape == x.shape
    assert float(drawn.norm()) == pytest.approx(float(x.norm()), rel=1e-4)


@pytest.mark.parametrize("length", [RATE // 3, RATE // 2, RATE, 2 * RATE])
def test_sped_up_has_the_length_and_the_pitch(length):
    fast = measures.sped_up(tone("no", 1.0), length)
    assert fast.shape == (length,)
    assert float(torch.fft.rfft(fast).abs().argmax()) * RATE / length == pytest.approx(700, abs=16)
    assert float(fast[1000:-1000].abs().max()) == pytest.approx(0.2, rel=0.15)


@pytest.mark.slow
def test_sped_up_is_librosas_phase_vocoder():
    effects = pytest.importorskip("librosa.effects")
    x = torch.randn(6000, generator=torch.Generator().manual_seed(0)).mul(0.1)
    theirs = effects.time_stretch(x.numpy(), rate=1.5, n_fft=measures.WINDOW)
    assert torch.allclose(measures.sped_up(x, 4000), torch.from_numpy(theirs), atol=1e-3)


# Recordings


def test_a_single_file_is_a_clip_and_the_text_beside_it_is_what_is_said(tmp_path):
    wave(tmp_path / "one.wav")
    (tmp_path / "one.txt").write_text("Yes!\n")
    (found,), notes = clips.load(tmp_path / "one.wav", RATE, 30)
    assert (found.name, found.text, found.target, notes) == ("one", "yes", None, ())
    assert torch.equal(found.x, wav.quantised(tone("yes")))


LISTS = {
    "metadata.csv": 'file_name,transcription\nc/a.wav,"Open, the door"\nc/b.wav,no\n',
    "metadata.csv ": "a|Open 1|open, the door\nb|No.|no\n",
    "x-1.trans.txt": "a OPEN THE DOOR\nb NO\n",
    "read_data.txt": "x/a.wav,x/b.wav\nOPEN THE DOOR,NO\nCall home,YES\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_transcripts_are_found_as_data_sets_have_them(name, tmp_path):
    for one in "ab":
        wave(tmp_path / "c" / f"{one}.wav")
    (tmp_path / name.strip()).write_text(LISTS[name])
    found, _ = clips.load(tmp_path, RATE, 30)
    assert [one.text for one in found] == ["open the door", "no"]
    assert [one.target for one in found] == (["call home", "yes"] if name == "read_data.txt" else [None, None])


def test_a_clip_without_a_transcript_has_no_text_and_a_limit_takes_the_first(tmp_path):
    for one in "ba":
        wave(tmp_path / f"{one}.wav")
    assert [(one.name, one.text) for one in clips.load(tmp_path, RATE, 30, limit=1)[0]] == [("a", None)]


def test_what_was_changed_on_the_way_is_said(tmp_path):
    for one in "abcdef":
        wave(tmp_path / f"{one}.wav", rate=16_000)
    _, notes = clips.load(tmp_path, RATE, 30)
    assert notes[0] == "a.wav has 16000 samples a second and was resampled to 8000"
    assert len(notes) == 3
    assert notes[-1].startswith("and 4 notes more")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, "holds no sounds"),
        ({"a/x.wav": None, "b/x.wav": None}, "two sounds called x"),
        ({"x.wav": torch.zeros(800)}, "nothing but digital silence"),
        ({"x.wav": 0.1 * torch.ones(3 * RATE)}, "lasts 3 s"),
        ({"x.wav": None, "metadata.csv": "a,b,c\n1,2,3\n"}, "file_name and transcription"),
        ({"x.wav": None, "metadata.csv": "file_name,label\nx.wav,2\n"}, "beside file_name it should have transcription"),
        ({"x.wav": None, "read_data.txt": "x.wav,y.wav\nyes\n"}, "lines of 2, 1 entries"),
        ({"x.wav": None, "x.txt": b"\xff\xfe"}, "not text in UTF-8"),
        ({"x.wav": None, "metadata.csv": f"file_name,text\nx.wav,{'a' * 200_000}\n"}, "field larger than field limit"),
    ],
)
def test_recordings_that_cannot_be_used_are_refused_in_a_sentence(files, sentence, tmp_path):
    for name, content in files.items():
        if name.endswith(".wav"):
            wave(tmp_path / name, content)
        else:
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=sentence):
        clips.load(tmp_path, RATE, 2.0)


def test_lists_of_anything_open_no_file_and_rows_that_are_cut_off_name_none(tmp_path):
    wave(tmp_path / "x.wav")
    (tmp_path / "metadata.csv").write_text("text,file_name\nno,../../x.flac\nyes,/dev/y.wav\ncut\n")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "._x.wav").write_bytes(b"what a system writes beside a sound")
    assert [(one.name, one.text) for one in clips.load(tmp_path, RATE, 30)[0]] == [("x", "no")]


def test_folders_below_that_of_a_single_file_are_not_its_own(tmp_path):
    wave(tmp_path / "x.wav")
    (tmp_path / "below").mkdir()
    (tmp_path / "below/metadata.csv").write_text("file_name,label\nx.png,3\n")
    assert clips.load(tmp_path / "x.wav", RATE, 30)[0][0].text is None


def header(kind=1, channels=1, rate=RATE, bits=16, samples=100, width=2):
    """A WAV file of ones, whatever its header says."""
    body = b"\1" * (samples * width)
    about = struct.pack("<HHIIHH", kind, channels, rate, rate * width % 2**32, width, bits)
    size = struct.pack("<I", 28 + len(body))
    return b"RIFF" + size + b"WAVEfmt \x10\0\0\0" + about + b"data" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (header(samples=200 * RATE), "lasts 200 s"),
        # Another rate is 16 million taps of a filter away.
        (header(rate=15_999_989), "1000 to 384000 samples a second"),
        (header(channels=33, width=66), "33 channels; it should have at most 32"),
        (header(rate=0), "at 0 samples a second"),
    ],
)
def test_what_a_header_says_is_refused_before_a_sound_is_decoded(content, sentence, monkeypatch):
    from scipy.io import wavfile

    monkeypatch.setattr(wavfile, "read", lambda file: pytest.fail("it was decoded"))
    with pytest.raises(UsageError, match=sentence):
        wav.decode(content, "x.wav")


@pytest.mark.parametrize("content", [b"", b"hello", header()[:30], header(channels=0), header(width=0)])
def test_what_is_no_sound_is_refused_in_a_sentence(content):
    pytest.importorskip("soundfile")
    with pytest.raises(UsageError, match=r"cannot read x\.wav as"):
        wav.decode(content, "x.wav")


def test_a_file_is_what_its_first_bytes_say(tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    x = tone("yes").numpy()
    for kind in ({"format": "FLAC"}, {"format": "WAV", "subtype": "ULAW"}, {"format": "WAVEX"}, {"format": "RF64"}):
        soundfile.write(tmp_path / "x.wav", x, RATE, **kind)
        read, notes = wav.read(tmp_path / "x.wav", RATE)
        assert (len(read), notes) == (len(x), ())
        assert torch.allclose(read, torch.from_numpy(x), atol=0.01)
    soundfile.write(tmp_path / "x.wav", torch.ones(200 * RATE).numpy(), RATE, format="FLAC")
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(UsageError, match="lasts 200 s"):
        wav.read(tmp_path / "x.wav", RATE)


def test_phrases_are_normalised_and_a_file_has_one_a_line(tmp_path):
    (tmp_path / "phrases.txt").write_text("Call home!\n\nyes\n")
    assert clips.phrases(["No.", f"@{tmp_path}/phrases.txt"], "--say") == ["no", "call home", "yes"]
    for typed, sentence in ((["..."], "at least one word"), (["@nowhere.txt"], "there is no file nowhere.txt")):
        with pytest.raises(UsageError, match=sentence):
            clips.phrases(typed, "--say")


# Rows


def test_a_row_says_what_is_heard_in_the_file(tmp_path):
    result = evaluate_speech(
        Tones(), [clip(), clip("two", None, 0.6)], **TARGETED, listener=EAR, over=["noise(20)", "gain"], out=tmp_path / "run"
    )
    assert [set(row) for row in result.rows] == [set(COLUMNS)] * 2
    for row in result.rows:
        again, _ = wav.read(tmp_path / "run" / row["files"]["adversarial"], RATE)
        original, _ = wav.read(tmp_path / "run" / row["files"]["original"], RATE)
        assert Tones().transcribe(again.unsqueeze(0)) == [row["after"]] == ["call home"]
        assert row["success"]
        assert row["snr"] == pytest.approx(measures.snr(original, again))
        assert row["snr"] >= 5 - 1e-3
        assert (row["target_wer"], row["wer"] > 0, row["proxy"]) == (0, True, "yes")
        assert row["controls"]["clean"]["heard"] == row["before"] == row["reference"]
        assert set(row["controls"]) == {"clean", "noise"}
        assert 0 < row["channels"]["noise(20)"]["count"] <= row["channels"]["noise(20)"]["of"] == speech.DRAWS
    assert [row["reference"] for row in result.rows] == ["yes", "no"]
    assert [row["proxy_wer"] for row in result.rows] == [0, 1]
    assert "1 of 2 clips nobody wrote down" in result.notes[0]
    assert is_speech(tmp_path / "run")


def test_digital_silence_at_the_end_of_a_clip_stays(tmp_path):
    x = torch.cat([clip().x, torch.zeros(500)])
    (row,) = evaluate_speech(Tones(), [Clip("one", x, "yes")], **TARGETED, out=tmp_path / "run").rows
    again, _ = wav.read(tmp_path / "run" / row["files"]["adversarial"], RATE)
    assert row["success"]
    assert (len(again), float(again[-500:].abs().max())) == (len(x), 0)


def test_clips_of_like_and_of_long_names_have_files_of_their_own(tmp_path):
    names = ["a b", "a-b", "../" + "x" * 300]
    rows = evaluate_speech(Tones(), [clip(name) for name in names], **TARGETED, out=tmp_path / "run").rows
    assert [row["name"] for row in rows] == names
    assert len({row["files"]["adversarial"] for row in rows}) == 3
    assert len(list((tmp_path / "run/clips").iterdir())) == 9


def test_controls_say_how_often_they_are_heard_as_wanted():
    given = {"attack": "pgd(steps=10)", "target": "call home", "threat": "snr(5)"}
    already = Clip("already", tone("call home"), "yes")
    result = evaluate_speech(Tones(), [clip(), already], **given)
    assert [row["success"] for row in result.rows] == [True, True]
    assert [row["controls"]["clean"]["success"] for row in result.rows] == [False, True]
    counts = {part["sound"]: part["success"]["count"] for part in result.controls()}
    assert (counts["attack"], counts["clean"]) == (2, 1)


def test_the_same_in_batches_and_without_a_folder():
    given = (Tones(), [clip(), clip("two", "no"), clip("three", "yes")])
    one, several = (evaluate_speech(*given, **TARGETED, batch_size=size) for size in (1, 3))
    for row, other in zip(one.rows, several.rows, strict=True):
        measured = ("snr", "db_x", "above", "pesq", "stoi")
        assert [row[name] for name in measured] == pytest.approx([other[name] for name in measured], rel=1e-3)
        assert {**row, "seconds": 0, **dict.fromkeys(measured)} == {**other, "seconds": 0, **dict.fromkeys(measured)}


def test_untargeted_ends_with_the_last_iterate_and_counts_lost_words():
    result = evaluate_speech(Tones(), [clip()], attack="pgd(steps=10)", threat="snr(3)")
    (row,) = result.rows
    assert (row["target"], row["target_wer"], result.run["match"], result.run["goal"]) == (None, None, "wer", "untargeted")
    assert row["success"] == (row["wer"] > 0.5)
    assert row["snr"] == pytest.approx(3, abs=0.1)
    assert row["passes"] == 20


def test_a_budget_is_kept_and_ends_an_untargeted_attack_at_its_first_success():
    (row,) = evaluate_speech(Tones(), [clip()], attack="pgd(steps=30)", threat="snr(3)", budget=5).rows
    assert row["queries"] <= 5


def test_the_quietest_success_is_searched_where_there_is_no_radius():
    wide = evaluate_speech(Tones(), [clip()], attack="pgd(steps=20)", target="call home", threat="snr(5)").rows[0]
    near = evaluate_speech(Tones(), [clip()], attack="fmn(steps=60)", target="call home", threat="snr").rows[0]
    assert near["success"]
    assert near["snr"] > wide["snr"]


def test_one_perturbation_is_learned_from_half_of_the_clips_and_tried_on_the_rest():
    four = [clip(name, seconds=0.5) for name in "abcd"]
    result = evaluate_speech(Tones(), four, attack="universal(steps=30)", threat="snr(0)")
    assert [row["name"] for row in result.rows] == ["b", "d"]
    assert "learned from 2 clips" in result.notes[-1]
    assert all(row["success"] and row["snr"] == pytest.approx(0, abs=0.2) for row in result.rows)
    for other, sentence in (({"data": four[:1]}, "two clips or more"), ({"data": four, "target": "no"}, "has no target")):
        with pytest.raises(UsageError, match=sentence):
            evaluate_speech(Tones(), **{"attack": "universal", "threat": "snr(0)", **other})


def test_commands_have_the_three_controls_and_no_ratio():
    said = [Clip("voice", tone("open the door", 0.5))]
    result = evaluate_speech(Tones(), said, attack=Whistle(), say="Open the door!", listener=EAR)
    (row,) = result.rows
    assert row["name"] == row["reference"] == row["target"] == "open the door"
    assert row["files"]["adversarial"] == "clips/1-open-the-door.adversarial.wav"
    assert set(row["controls"]) == {"clean", "fast", "noise"}
    assert row["controls"]["clean"]["heard"] == "open the door"
    assert row["snr"] is row["pesq"] is None
    assert (row["success"], row["queries"], row["passes"]) == (True, 3, 1)
    assert set(row["files"]) == {"adversarial", "original"}
    assert (result.hidden.count, result.hidden.of) == (1, 1)
    assert [part["sound"] for part in result.controls()] == ["attack", "clean", "fast", "noise"]


def test_a_command_that_needs_no_voice_does_without_a_synthesiser(monkeypatch):
    from advkit.audio import synthesis

    def none(*_, **__):
        raise UsageError("no synthesiser is installed")

    monkeypatch.setattr(synthesis, "speak", none)
    row = evaluate_speech(Tones(), attack=Whistle(), say=["yes", "no"]).rows[1]
    assert (row["success"], row["before"], set(row["controls"])) == (True, None, {"noise"})
    with pytest.raises(UsageError, match="no synthesiser"):
        evaluate_speech(Tones(), attack=Whistle(needs_voice=True), say="yes")


def test_targets_one_for_all_one_for_each_and_those_of_the_data():
    two = [clip(target="no"), clip("two", "no", target="yes")]
    given = {"attack": "fgsm", "threat": "snr(0)"}
    for target, wanted in (("No", ["no", "no"]), (["no", "yes"], ["no", "yes"]), ("@", ["no", "yes"])):
        assert [row["target"] for row in evaluate_speech(Tones(), two, target=target, **given).rows] == wanted


def test_a_run_that_was_stopped_goes_on(tmp_path):
    given = (Tones(), [clip(), clip("two", "no"), clip("three")])
    whole = evaluate_speech(*given, **TARGETED, out=tmp_path / "whole")

    def stop(share, text):
        if share > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_speech(*given, **TARGETED, out=tmp_path / "run", report=stop)
    rows = (tmp_path / "run/rows.jsonl").read_text()
    assert rows.count("\n") == 2
    # A line that a power cut left half written does not count.
    (tmp_path / "run/rows.jsonl").write_text(rows + '{"index": 2, "na')
    asked = []
    again = evaluate_speech(*given, **TARGETED, out=tmp_path / "run", report=lambda share, text: asked.append(text))
    assert asked[:3] == ["2 of 2 heard as wanted, now three" + end for end in ("", ", asked 1 times", ", asked 2 times")]
    assert (tmp_path / "run/rows.jsonl").read_text().startswith(rows)
    assert [{**row, "seconds": 0} for row in again.rows] == [{**row, "seconds": 0} for row in whole.rows]
    with pytest.raises(UsageError, match="another run"):
        evaluate_speech(*given, **{**TARGETED, "target": "yes"}, out=tmp_path / "run")


def test_a_batch_of_which_a_part_was_written_is_done_again(tmp_path):
    given = {**TARGETED, "batch_size": 2, "out": tmp_path / "run"}
    two = [clip(), clip("two", "no")]
    evaluate_speech(Tones(), [*two, clip("three")], **given)
    rows = (tmp_path / "run/rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/rows.jsonl").write_text(rows[0])
    again = evaluate_speech(Tones(), [*two, clip("three")], **given)
    assert [{**row, "seconds": 0} for row in again.rows] == [{**json.loads(row), "seconds": 0} for row in rows]


def test_a_full_disk_costs_one_sound(tmp_path, monkeypatch):
    given, write = (Tones(), [clip(), clip("two", "no")]), wav.write

    def full(path, x, rate):
        if "two" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, x, rate)

    monkeypatch.setattr(wav, "write", full)
    with pytest.raises(UsageError, match=r"No space left on device: .*what was finished before is kept"):
        evaluate_speech(*given, **TARGETED, out=tmp_path / "run")
    assert len(Speech.load(tmp_path / "run").rows) == 1
    monkeypatch.setattr(wav, "write", write)
    assert len(evaluate_speech(*given, **TARGETED, out=tmp_path / "run").rows) == 2


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"attack": "nothing"}, "unknown attack"),
        ({"attack": PGD}, "it should be an attack"),
        ({"threat": None}, "needs a threat model"),
        ({"threat": "rotation(10)"}, "changes images"),
        ({"threat": "snr"}, "none was given"),
        ({"data": None}, "changes recordings, and none was given"),
        ({"say": "yes"}, "changes a recording and says nothing"),
        ({"target": ["yes", "no", "yes"]}, "3 targets for 1 clips"),
        ({"target": "@"}, "list no target for one"),
        ({"target": "sesame"}, "cannot say 'sesame'"),
        ({"target": "?!"}, "at least one word"),
        ({"match": "nearly"}, "unknown match"),
        ({"over": ["tunnel"]}, "tunnel"),
        ({"access": "labels"}, "needs gradients"),
        ({"limit": 0}, "at least 1"),
        ({"data": [Clip("x", torch.zeros(100))]}, "not silent"),
        ({"data": [Clip("x", torch.full((100,), 1e-6))]}, "not silent"),
        ({"data": [Clip("x", torch.full((100,), 1.1))]}, r"in \[-1, 1\]"),
        ({"data": [Clip("x", torch.full((100,), math.nan))]}, r"in \[-1, 1\]"),
        ({"data": [clip(seconds=2.1)]}, "clip one is too long; it should last at most 2 s"),
        ({"stand_in": EAR}, "changes recordings, which has no stand_in"),
        ({"voice": "flite-slt"}, "changes recordings, which has no voice"),
        ({"attack": "universal", "target": None, "budget": 3}, "which has no budget"),
        ({"attack": Whistle(), "say": "yes", "target": None, "threat": None, "voice": "x"}, "leaves no voice"),
        ({"data": [clip(seconds=0.1)], "attack": Whistle()}, "none was given; give one with say"),
        ({"attack": Whistle(), "say": "yes"}, "has no target"),
        ({"attack": Whistle(), "say": ["yes", "no"], "target": None, "threat": None}, "2 commands and 1 recordings"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(changed, sentence):
    given = {"data": [clip()], **TARGETED, **changed}
    with pytest.raises(UsageError, match=sentence):
        evaluate_speech(Tones(), **given)


def test_the_listener_was_never_asked_by_the_attack():
    command = {"attack": Whistle(), "say": "yes"}
    for others in ({"stand_in": EAR}, {"recogniser": EAR}, {"listener": Tones()}):
        with pytest.raises(UsageError, match="which the attack has never asked"):
            evaluate_speech(**{"recogniser": Tones(), **command, "listener": EAR, **others})


def test_the_stand_in_is_given_to_the_attack():
    asked = []

    @dataclass(frozen=True)
    class Asks(Whistle):
        def make(self, text, recogniser, *, voice=None, listener=None, rng):
            asked.append(listener)
            return super().make(text, recogniser, rng=rng)

    evaluate_speech(Tones(), attack=Asks(), say="yes", stand_in=EAR, data=[Clip("v", tone("yes"))])
    assert asked == [EAR]


# Reports and gates


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two clips, one of them with a name that is no HTML."""
    path = tmp_path_factory.mktemp("speech") / "run"
    ear = TextOnly(lambda x: "yes", RATE, "<ear>")
    evaluate_speech(Tones(), [clip("a <b>"), clip("two", "no")], **TARGETED, listener=ear, over=["noise"], out=path)
    return path


def test_the_page_is_one_file_with_the_sounds_in_it(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(speech_report, "MOST", 1)
    result = Speech.load(folder)
    paths = report(result, tmp_path / "report")
    assert [path.name for path in paths] == ["report.html", "junit.xml", "summary.json", "sounds.csv"]
    text = paths[0].read_text(encoding="utf-8")
    assert text.count('src="data:audio/wav;base64,') == 3
    assert len(re.findall("<svg", text)) == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert "a &lt;b&gt;" in text
    assert "<b>" not in text
    assert "&lt;ear&gt;" in text
    assert "a second recogniser that the attack never asked" in text
    summary = json.loads(paths[2].read_text())
    assert summary["success"]["count"] == summary["examples"] == 2
    assert summary == {"title": "pgd(steps=20) on tones", **json.loads((folder / "summary.json").read_text())}
    assert paths[3].read_text().splitlines()[0].startswith("index,name,reference,target,before,after,success")


def test_the_page_says_where_an_attack_found_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(speech_report.plots, "sound", lambda *_: "")
    given = {**TARGETED, "threat": "snr(60)"}
    result = evaluate_speech(Tones(), [clip()], **given, out=tmp_path / "run")
    assert (result.rows[0]["success"], result.rows[0]["snr"], result.rows[0]["after"]) == (False, None, "yes")
    text = report(result, tmp_path / "report")[0].read_text(encoding="utf-8")
    assert "the attack found nothing, and the clean sound stays" in text


def test_gates_are_decided_by_the_interval(folder):
    result = Speech.load(folder)
    gates = ("success >= 10 %", "success <= 10 %", "snr > 90", "wer >= 0")
    assert [decide(Gate.parse(gate), result).verdict for gate in gates] == ["passed", "failed", "failed", "passed"]
    undecided = decide(Gate.parse("success <= 50 %"), result)
    assert (undecided.verdict, undecided.ok) == ("undecided", True)
    assert not decide(Gate.parse("success <= 50 %"), result, strict=True).ok
    for gate, sentence in (("clean >= 0.5", "for classifiers"), ("success[other] > 0", "unknown model")):
        with pytest.raises(UsageError, match=sentence):
            decide(Gate.parse(gate), result)


@pytest.fixture
def unseen(monkeypatch):
    """Reports without drawings, which take time."""
    monkeypatch.setattr(speech_report, "MOST", 0)


def test_the_command_writes_the_report_and_fails_where_a_gate_does(folder, unseen, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "a")]) == 0
    assert str(tmp_path / "a/report.html") in capsys.readouterr().out
    assert main(["report", str(folder), "--out", str(tmp_path / "b"), "--require", "success <= 10 %", "--title", "T"]) == 1
    assert "gate failed: success on tones is 100.00 %" in capsys.readouterr().out
    assert "success &lt;= 10 %" in (tmp_path / "b/report.html").read_text()
    assert "2 more are in the folder of the run" in (tmp_path / "b/report.html").read_text()
    assert 'failures="1"' in (tmp_path / "b/junit.xml").read_text()
    assert main(["report", str(folder), "--out", str(folder)]) == 2


def test_a_row_that_was_spoilt_is_refused(folder, tmp_path):
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[0])
    elsewhere = {"adversarial": "clips/../../secret.wav"}
    spoilt = {"snr": "loud", "success": 1, "wer": math.nan, "cer": math.inf, "files": elsewhere}
    for key, value in spoilt.items():
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, key: value}) + "\n")
        with pytest.raises(UsageError, match=f"damaged \\({key} is"):
            Speech.load(tmp_path)
    for key, value in (("controls", {"clean": 3}), ("channels", {"noise": {"count": "1", "of": 8}})):
        (tmp_path / "rows.jsonl").write_text(json.dumps({**row, key: value}) + "\n")
        with pytest.raises(UsageError, match="damaged"):
            Speech.load(tmp_path)
    run = json.loads((folder / "run.json").read_text())
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert Speech.load(tmp_path).success.count == 1
    for spoilt in ({"kind": "speech"}, {**run, "rate": 1}, {**run, "listener": {"name": 3}}, {**run, "over": []}):
        (tmp_path / "run.json").write_text(json.dumps(spoilt))
        with pytest.raises(UsageError, match="damaged"):
            Speech.load(tmp_path)


# The command line


@pytest.fixture
def known(monkeypatch):
    """``tones`` and ``ear`` as recognisers that a spec may name."""
    from advkit.audio import loading

    made = {"tones": Tones, "ear": lambda: EAR}
    monkeypatch.setattr(loading, "is_recogniser", lambda spec: spec in made)
    monkeypatch.setattr(loading, "load", lambda spec, **_: made[spec]())


def test_a_recording_is_attacked_from_the_command_line(known, unseen, tmp_path, capsys):
    wave(tmp_path / "clip.wav", clip().x)
    typed = ["attack", "--model", "tones", "--data", str(tmp_path / "clip.wav"), "--target", "call home", "--attack", "pgd"]
    typed += ["--threat", "snr(5)", "--listener", "ear", "--out", str(tmp_path / "run")]
    assert main(typed) == 0
    printed = capsys.readouterr().out
    assert "heard as wanted" in printed
    assert "noise of that length and level" in printed
    assert (tmp_path / "run/report/report.html").exists()
    before = (tmp_path / "run/rows.jsonl").read_bytes()
    assert main(typed) == 0
    assert (tmp_path / "run/rows.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["--model", "tones", "--data", "x", "--attack", "fgsm", "--size", "3"], "--size is for classifiers"),
        (["--model", "tones", "--data", "x", "--attack", "fgsm", "--pictures", "3"], "--pictures is for classifiers"),
        (["--model", "tones", "--data", "x"], "name one attack"),
        (["--model", "tones", "--data", "x", "--attack", "fgsm", "--attack", "pgd"], "name one attack"),
        (["--model", "tones", "--attack", "fgsm"], "recordings with --data, or commands with --say"),
        (["--model", "tones", "--attack", "fgsm", "--threat", "snr(5)", "--data", "nowhere"], "no file or folder nowhere"),
        (["--model", "m.pt2", "--data", "x", "--threat", "l2", "--say", "yes"], "--say is for recognisers"),
        (["--model", "m.pt2", "--data", "x", "--threat", "l2", "--stand-in", "x"], "--stand-in is for recognisers"),
        (["--model", "m.pt2", "--threat", "l2"], "--data is missing"),
        (["--model", "m.pt2", "--data", "mnist-5k"], "--threat is missing"),
    ],
)
def test_options_that_make_no_sense_are_refused(known, typed, sentence, capsys):
    assert main(["attack", *typed]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_sounds_of_any_width_and_rate_are_read_and_what_was_changed_is_said(known, tmp_path, capsys):
    soundfile = pytest.importorskip("soundfile")
    x = clip(seconds=1.0).x.numpy()
    soundfile.write(tmp_path / "one.wav", x[:4000], RATE, subtype="PCM_24")
    soundfile.write(tmp_path / "three.wav", x[:4000], RATE, subtype="PCM_U8")
    soundfile.write(tmp_path / "two.wav", torch.stack([clip(seconds=0.5).x] * 2, 1).numpy(), 2 * RATE)
    typed = ["attack", "--model", "tones", "--data", str(tmp_path), "--attack", "fgsm", "--threat", "snr(0)"]
    assert main(typed) == 0
    printed = capsys.readouterr().out
    assert "note: two.wav has 2 channels, which are averaged" in printed
    assert "note: two.wav has 16000 samples a second and was resampled to 8000" in printed


@pytest.mark.parametrize(
    ("x", "sentence"),
    [(torch.zeros(0), "holds no samples"), (torch.ones(600 * RATE), "lasts 600 s"), (None, "cannot read")],
)
def test_sounds_that_are_none_are_refused_in_one_line(known, tmp_path, x, sentence, capsys):
    path = tmp_path / "x.wav"
    if x is None:
        path.write_bytes(b"RIFF, but no more")
    else:
        wav.write(path, x, RATE)
    typed = [
        "attack",
        "--model",
        "tones",
        "--data",
        str(path),
        "--attack",
        "fgsm",
        "--threat",
        "snr(0)",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(typed) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_the_report_of_a_classifier_takes_gates_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("advkit.benchmarks.report.report", lambda records, out, decisions: [])
    x = torch.rand((20, 1, 5, 5), generator=torch.Generator().manual_seed(0))
    model = lambda z: z.flatten(1)[:, :10]
    advkit.evaluate(model, (x, model(x).argmax(1)), threat="linf(0.4)", attacks="fgsm", out=tmp_path / "run")
    typed = ["report", str(tmp_path / "run"), "--require"]
    assert main([*typed, "clean >= 50 %", "--require", "robust[linf(0.4)] >= 90 %"]) == 1
    printed = capsys.readouterr().out
    assert "gate passed: clean" in printed
    assert "gate failed: robust" in printed
    assert main([*typed, "success <= 10 %"]) == 2
    assert "for recognisers of speech" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["channels", "recognisers", "speech-attacks", "voices"])
def test_what_may_be_named_is_listed(name, capsys):
    assert main(["list", name]) == 0
    tables = {"channels": CHANNELS, "recognisers": RECOGNISERS, "speech-attacks": SPEECH_ATTACKS, "voices": VOICES}
    printed = capsys.readouterr().out.splitlines()
    assert [re.split(r"  |\(", line)[0] for line in printed] == list(tables[name])


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["hidden-voice", "mangle(queries=8, voices='')"])
def test_a_command_for_pocketsphinx_from_the_command_line(attack, tmp_path, capsys):
    pytest.importorskip("pocketsphinx")
    if not installed():
        pytest.skip("no synthesiser of speech is installed")
    out = tmp_path / "run"
    typed = ["attack", "--model", "pocketsphinx", "--attack", attack, "--say", "Turn on airplane mode!", "--out", str(out)]
    assert main(typed) == 0
    (row,) = Speech.load(out).rows
    x, _ = wav.read(out / row["files"]["adversarial"], 16_000)
    assert load("pocketsphinx").transcribe(x.unsqueeze(0)) == [row["after"]] == ["turn on airplane mode"]
    assert row["controls"]["noise"]["heard"] != "turn on airplane mode"
    assert set(row["controls"]) == {"clean", "fast", "noise"}


@pytest.mark.slow
def test_a_recording_says_something_else_to_whisper(tmp_path):
    folder, sound = SHARED / "models/whisper-tiny", SHARED / "data/speech/wakewords/alexa_test.wav"
    if not folder.exists() or not sound.exists():
        pytest.skip("there is no ../shared with Whisper and the wake words")
    given = {"attack": "cw(steps=80)", "target": "open the front door", "threat": "snr(20)"}
    (row,) = evaluate_speech(f"whisper:{folder}", sound, **given, out=tmp_path / "run").rows
    assert row["after"] == "open the front door"
    assert row["snr"] >= 20 - 1e-3


def test_the_page_describes_every_field_of_a_row():
    page = (Path(__file__).parents[1] / "docs/speech.md").read_text(encoding="utf-8")
    table = page.split("| field | what it is |\n| --- | --- |\n")[1].split("\n\n")[0]
    assert {name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])} == set(COLUMNS)
