"""Threat models in decibels, and files of sounds."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import wavfile

from advkit import run, spec
from advkit.attacks import FMN, PGD
from advkit.errors import UsageError
from advkit.sound import wav
from advkit.sound.threats import Level, Snr, lengths, sounding
from advkit.sound.wav import quantised
from advkit.streams import Streams
from advkit.threat import THREATS

SEEDS = st.integers(0, 9999)


def sounds(seed, n=4, samples=60, peak=0.5):
    """Noise of different lengths and levels, with silence inside and at the end."""
    rng = torch.Generator().manual_seed(seed)
    x = peak * (2 * torch.rand(n, samples, generator=rng, dtype=torch.float64) - 1)
    x *= 10 ** (-torch.rand(n, 1, generator=rng, dtype=torch.float64))
    x[0, :5], x[1, 20:30], x[2, 40:] = 0.0, 0.0, 0.0
    return x


def db(ratio):
    return 20 * ratio.log10()


@pytest.mark.parametrize("row", [[0.1, 0.0, 0.2], [0.0, 0.0, 0.0], [0.0, 0.0, 0.3], [0.5, 0.0, 0.0]])
@given(zeros=st.integers(0, 5))
def test_a_sound_ends_where_only_zeros_follow(row, zeros):
    x = torch.tensor([row + [0.0] * zeros])
    expected = max((i + 1 for i, v in enumerate(row) if v), default=0)
    assert lengths(x).tolist() == [expected]
    assert sounding(x).tolist() == [[i < expected for i in range(3 + zeros)]]


@given(seed=SEEDS, least=st.floats(-10, 60))
@settings(max_examples=40, deadline=None)
def test_at_the_radius_the_ratio_is_the_one_given(seed, least):
    x = 1e-3 * sounds(seed)
    for threat, ratio in (
        (Snr(least), lambda delta: db(x.norm(dim=1) / delta.norm(dim=1))),
        (Level(-least), lambda delta: db(x.abs().amax(1) / delta.abs().amax(1))),
    ):
        theta = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        theta = torch.where(sounding(x), theta, 0.0)
        theta *= threat.eps / torch.linalg.vector_norm(theta, threat.p, dim=1, keepdim=True)
        y = threat.apply(x, theta)
        assert torch.allclose(ratio(y - x), torch.full((4,), least, dtype=x.dtype), atol=1e-6)
        assert torch.allclose(threat.ball.distance(theta, threat.zero(x)).log10(), torch.tensor(-least / 20, dtype=x.dtype))


@pytest.mark.parametrize("threat", [Snr(0), Snr(30), Level(0), Level(-40)])
@given(seed=SEEDS, zeros=st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_whatever_theta_is_the_sound_is_in_the_range_and_its_end_stays(threat, seed, zeros):
    x = sounds(seed, peak=1.0)
    x = x / x.abs().amax(1, keepdim=True)
    theta = threat.ball.start(threat.zero(x), Streams.seeded(seed, range(len(x))))
    y = threat.apply(x, theta)
    assert bool(threat.allows(y, x).all())
    assert float(y.abs().max()) <= 1
    assert torch.equal(y[2, 40:], x[2, 40:])
    # Silence inside a sound is part of it.
    assert bool((y[1, 20:30] != 0).any())
    assert torch.equal(threat.apply(x, threat.zero(x)), x)
    longer, wide = (torch.nn.functional.pad(part, (0, zeros)) for part in (x, theta))
    assert torch.equal(threat.apply(longer, wide)[:, : x.shape[1]], y)
    assert torch.allclose(threat.apply(x[1:2], theta[1:2]), y[1:2])


@pytest.mark.parametrize("threat", [Snr(), Level()])
def test_without_a_number_everything_in_the_range_is_allowed(threat):
    assert threat.eps == threat.ball.eps == math.inf
    x = sounds(0)
    assert threat.allows(torch.ones_like(x), x).all()
    assert not threat.allows(1.01 * torch.ones_like(x), x).any()
    assert not threat.allows(torch.full_like(x, math.nan), x).any()


def test_the_gradient_is_that_of_the_sum():
    x = sounds(0)
    for threat in (Snr(20), Level(-20)):
        assert torch.autograd.gradcheck(lambda theta, t=threat: t.apply(x, theta), threat.zero(x).requires_grad_())


@given(seed=SEEDS, least=st.sampled_from([0.0, 20.0, 60.0, 90.0]))
@settings(max_examples=20, deadline=None)
def test_what_is_rounded_to_16_bits_stays_inside_the_radius(seed, least):
    x = quantised(sounds(seed))
    for threat in (Snr(least), Level(-least)):
        theta = threat.ball.start(threat.zero(x), Streams.seeded(seed, range(len(x))))
        theta = threat.eps * theta / torch.linalg.vector_norm(theta, threat.p, dim=1, keepdim=True)
        y = threat.apply(x, theta)
        z = threat.snap(y, x, 65_536)
        assert torch.equal(quantised(z), z)
        assert float((z - y).abs().max()) <= 1 / 32768
        size = torch.linalg.vector_norm(z - x, threat.p, dim=1)
        assert bool((size <= threat.eps * threat.size(x) * (1 + 1e-6)).all())
        assert torch.equal(Snr().snap(y, x, 65_536), quantised(y))


@pytest.mark.parametrize(
    ("text", "threat"),
    [("snr(30)", Snr(30.0)), ("linf_db(-40)", Level(-40.0)), ("snr", Snr()), ("linf_db", Level())],
)
def test_threats_have_specs(text, threat):
    assert spec.parse(text, THREATS, "threat model") == threat
    assert spec.parse(spec.show(threat, THREATS), THREATS, "threat model") == threat


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Snr(math.nan), "db is nan"),
        (lambda: Level(0, low=1.0, high=0.0), "low less than high"),
        (lambda: Snr(0, high=math.inf), "two finite numbers"),
        (lambda: Snr(0).zero(torch.zeros(3, 5)), "3 of 3 waveforms are digital silence"),
        (lambda: Level(0).zero(torch.ones(1, 2, 3)), r"shape \(1, 2, 3\); this threat model changes waveforms"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_the_quietest_success_against_a_linear_model_is_the_known_one(linear):
    """Its distance is that to the plane, relative to the length of the sound."""
    model, w, x, y = linear(40)
    x = 0.1 * x
    y = (x @ w > 0).long()
    known = (x @ w).abs() / w.norm() / x.norm(dim=1)
    result = run(FMN(100), model, x, y, Snr())
    assert bool(result.success.all())
    assert torch.allclose(result.distance, known, rtol=0.02)
    level = (x @ w).abs() / w.abs().sum() / x.abs().amax(1)
    for share, expected in ((0.99, 0.0), (1.01, 1.0)):
        rows = [
            run(PGD(1, step=9.0), model, x[i : i + 1], y[i : i + 1], Level(20 * math.log10(share * float(level[i]))))
            for i in range(8)
        ]
        assert sum(float(one.success) for one in rows) == 8 * expected


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_16_bits_are_what_a_file_holds(tmp_path_factory, seed):
    x = 3 * sounds(seed)[seed % 4].float()
    path = tmp_path_factory.mktemp("wav") / "one.wav"
    wav.write(path, x, 16_000)
    read, notes = wav.read(path, 16_000)
    assert notes == ()
    assert torch.equal(read, quantised(x))
    assert torch.equal(quantised(read), read)
    assert float((quantised(x) - x.clamp(-1, 1)).abs().max()) <= 1 / 32768


WIDTHS = [("uint8", 128, 128, 1 / 256), ("int16", 2**15, 0, 2**-16), ("int32", 2**31, 0, 1e-7), ("float32", 1, 0, 1e-7)]


@pytest.mark.parametrize(("dtype", "full", "zero", "off"), WIDTHS)
def test_files_of_other_widths_are_read(tmp_path, dtype, full, zero, off):
    x = 0.8 * np.sin(np.arange(500) / 9)
    samples = zero + full * x
    wavfile.write(tmp_path / "x.wav", 8000, samples.astype(dtype) if full == 1 else samples.round().astype(dtype))
    read, notes = wav.read(tmp_path / "x.wav", 8000)
    assert notes == ()
    assert float((read - torch.from_numpy(x)).abs().max()) <= off + 1e-7


def test_24_bits_are_read(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    x = 0.8 * np.sin(np.arange(500) / 9)
    for name, subtype in (("x.wav", "PCM_24"), ("x.flac", "PCM_24")):
        soundfile.write(tmp_path / name, x, 8000, subtype=subtype)
        read, _ = wav.read(tmp_path / name, 8000)
        assert float((read - torch.from_numpy(x).float()).abs().max()) <= 1e-6


def test_channels_are_averaged_and_other_rates_resampled_and_that_is_said(tmp_path):
    t = np.arange(8000) / 8000
    both = np.stack([np.sin(2 * np.pi * 440 * t), np.zeros(8000)], 1).astype(np.float32)
    wavfile.write(tmp_path / "x.wav", 8000, both)
    read, notes = wav.read(tmp_path / "x.wav", 16_000)
    assert len(notes) == 2
    assert "2 channels" in notes[0]
    assert "8000 samples a second and was resampled to 16000" in notes[1]
    expected = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(16_000) / 16_000)
    assert float((read - expected)[500:-500].abs().max()) < 2e-3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (np.zeros(0, np.int16), "holds no samples"),
        (np.zeros(100, np.int16), "nothing but digital silence"),
        (np.array([0.1, np.nan], np.float32), "NaN or infinite"),
        (np.ones(130 * 8000, np.int16), r"lasts 130 s at 8000 samples a second; it should .* last at most 120 s"),
        (b"RIFFwhat", "cannot read .* as a WAV file"),
    ],
)
def test_files_that_hold_no_sound_are_refused(tmp_path, content, said):
    path = tmp_path / "x.wav"
    path.write_bytes(content) if isinstance(content, bytes) else wavfile.write(path, 8000, content)
    with pytest.raises(UsageError, match=said):
        wav.read(path, 8000)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"there is no file .*nothing\.wav"):
        wav.read(tmp_path / "nothing.wav", 8000)
