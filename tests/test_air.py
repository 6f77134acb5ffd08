"""What happens to a sound on its way: each transform's laws, rooms and filters in closed form, attacks that look through."""

import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit import UsageError, perturb
from advkit.attacks import FGSM, PGD
from advkit.audio.channels import CHANNELS, channel
from advkit.combine import Expect
from advkit.norms import lp_norm
from advkit.sound import wav
from advkit.sound.air import (
    Band,
    Gain,
    Noise,
    Resample,
    _aligned,
    _simulated,
    at,
    convolved,
    play,
    resampled,
    rooms,
    there_and_back,
)
from advkit.sound.codecs import GSM, MP3, Opus, Vorbis
from advkit.sound.filters import Average, Median, Quantise, Reclock, Squeeze
from advkit.sound.threats import Snr, lengths
from advkit.spec import parse, show
from advkit.streams import Streams
from advkit.transforms import SOUNDS, view

SHARED = Path(__file__).parents[1].parent / "shared" / "data" / "speech" / "rooms"
pytest.importorskip("pyroomacoustics")
SIMPLE = [make() for name, make in SOUNDS.items() if name not in ("room", "impulse")]
ALL = [*SIMPLE, SOUNDS["room"](rooms=2)]
OWN = [transform for transform in ALL if not transform.straight]


def sounds(n=3, t=4000, seed=0, ends=(4000, 2700, 3500)):
    """Noise whose spectrum falls as that of speech, and rows that end."""
    noise = torch.randn((n, t), generator=torch.Generator().manual_seed(seed))
    x = convolved(noise, 0.8 ** torch.arange(40))
    x = 0.4 * x / x.abs().amax(1, keepdim=True)
    for row, end in enumerate(ends[:n]):
        x[row, end:] = 0
    return x


def streams(n, seed=0):
    return Streams.seeded(seed, range(n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_a_transform_keeps_shape_type_range_and_end_and_lets_gradients_pass(transform, dtype):
    x = sounds().to(dtype).requires_grad_(True)
    z = transform(x, streams(3), torch.arange(3))
    assert (z.shape, z.dtype) == (x.shape, dtype)
    assert float(z.detach().abs().max()) <= 1
    assert torch.equal(lengths(z), lengths(x))
    (g,) = torch.autograd.grad(z.square().sum(), x)
    assert g.isfinite().all()
    assert (g[x != 0] != 0).double().mean() > 0.3
    silence = torch.zeros(1, 900, dtype=dtype, requires_grad=True)
    quiet = transform(silence, streams(1), torch.arange(1))
    assert not quiet.any()
    assert torch.autograd.grad(quiet.sum(), silence)[0].isfinite().all()


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_a_sound_does_not_depend_on_the_rest_of_the_batch_nor_on_its_padding(transform):
    x, row = sounds(), torch.tensor([1])
    whole = transform(x, streams(3), torch.arange(3))
    alone = transform(x[row, :2800], streams(3), row)
    assert torch.allclose(alone, whole[row, :2800], atol=2e-6)


@pytest.mark.parametrize("transform", OWN, ids=repr)
def test_the_gradient_is_that_of_finite_differences(transform):
    rng = torch.Generator().manual_seed(1)
    x = sounds(1, 600, ends=(600,)).double().requires_grad_(True)
    hear = lambda x: transform(x, streams(1), torch.zeros(1, dtype=torch.int64))
    w, d = (torch.randn(x.shape, generator=rng, dtype=torch.float64) for _ in range(2))
    (g,) = torch.autograd.grad((w * hear(x)).sum(), x)
    ahead, behind = (hear(x.detach() + step * d) for step in (1e-7, -1e-7))
    assert float((g * d).sum()) == pytest.approx(float((w * (ahead - behind)).sum()) / 2e-7, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("transform", [one for one in ALL if one.straight], ids=repr)
def test_what_rounds_has_the_gradient_of_the_identity(transform):
    x = sounds().requires_grad_(True)
    w = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (g,) = torch.autograd.grad((w * transform(x, streams(3), torch.arange(3))).sum(), x)
    expected = torch.where(x != 0, w, 0.0)
    if isinstance(transform, GSM):  # there is a line of half the rate in between
        assert float(torch.cosine_similarity(g, expected, 1).min()) > 0.6
    else:
        assert torch.allclose(g, expected)


def test_every_transform_can_be_written_down():
    for transform in ALL:
        assert parse(show(transform, SOUNDS), SOUNDS, "transform") == transform


# Rooms


def test_rooms_come_from_their_generator_alone_and_leave_others_alone():
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = (rooms(2, 8000, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert (before[0] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())
    assert torch.equal(first, again)
    assert first.shape == (2, 2400)
    assert first.norm(dim=1).tolist() == pytest.approx([1, 1], abs=0.02)
    assert float((first - other).norm()) > 0.5


def test_the_direct_sound_comes_first_and_early_in_every_room():
    bank = rooms(4, 16_000, torch.Generator().manual_seed(0))
    for rir in bank:
        loud = int((rir.abs() >= rir.abs().max() / 2).nonzero()[0])
        assert loud == 16


def test_sound_falls_by_sixty_decibels_in_the_reverberation_time():
    """Schroeder, 1965: the energy still to come falls in a straight line; here by 20 dB in a third of the time."""
    import pyroomacoustics

    u = torch.tensor([0.5] * 3 + [0.2, 0.3, 0.4, 0.8, 0.7, 0.6] + [0.0], dtype=torch.float64)
    rir = _simulated(pyroomacoustics, u, 16_000, (0.3, 0.3))
    left = rir.square().flip(0).cumsum(0).flip(0)
    db = 10 * (left / left[0]).log10()
    begin, end = (int((db < level).nonzero()[0]) for level in (-5, -25))
    assert 3 * (end - begin) / 16_000 == pytest.approx(0.3, rel=0.35)


def test_a_room_is_a_convolution_at_the_level_of_the_sound():
    x = sounds().double()
    rir = torch.randn((3, 50), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = play(x, rir)
    for row, end in enumerate((4000, 2700, 3500)):
        expected = np.convolve(x[row, :end].numpy(), rir[row].numpy())[:end]
        scale = float(x[row].norm()) / np.linalg.norm(expected)
        assert np.allclose(z[row, :end], scale * expected, atol=1e-12)
    assert torch.allclose(play(x[0], rir[0]), z[0])
    click = torch.zeros(1, 100).index_fill_(1, torch.tensor([0]), 0.5)
    assert torch.allclose(play(click, torch.tensor([1.0])), click)


def test_an_impulse_response_is_cut_to_its_direct_sound():
    rir = torch.zeros(3000, dtype=torch.float64)
    rir[2000], rir[2100] = 0.6, -1.0
    cut = _aligned(rir, 16_000, 500)
    assert cut.nonzero().flatten().tolist() == [16, 116]
    assert float(cut.norm()) == pytest.approx(1)


def test_the_rooms_of_a_bank_are_all_visited():
    x = sounds(1).expand(40, -1)
    z = SOUNDS["room"](rooms=3)(x, streams(40), torch.arange(40))
    assert len({tuple(row[:50].tolist()) for row in z}) == 3


def test_a_measured_room_is_read_from_its_file(tmp_path):
    rir = torch.zeros(800)
    rir[100], rir[300] = 0.8, 0.4
    wav.write(tmp_path / "rir.wav", rir, 8000)
    x = sounds()
    z = channel(f"impulse('{tmp_path / 'rir.wav'}')")(x, 8000, torch.Generator())
    assert torch.allclose(z, play(x, _aligned(wav.quantised(rir), 8000, 800)), atol=1e-6)


def test_real_rooms_differ_from_the_simulated_ones():
    if not SHARED.is_dir():
        pytest.skip("the measured rooms are not here")
    x = sounds(1, 8000, ends=(8000,))
    for name in ("rir1", "rir2"):
        z = channel(f"impulse('{SHARED / name}.wav')")(x, 16_000, torch.Generator())
        assert float(lp_norm(z, 2)) == pytest.approx(float(lp_norm(x, 2)), rel=0.01)
        assert float((z - x).norm()) > 0.2 * float(x.norm())


# Noise, level, bands, rates


@settings(max_examples=20, deadline=None)
@given(snr=st.floats(-5, 60), seed=st.integers(0, 99))
def test_noise_has_its_ratio_over_the_sound(snr, seed):
    x = 0.1 * sounds().double()
    z = Noise(snr)(x, streams(3, seed), torch.arange(3))
    assert (20 * (x.norm(dim=1) / (z - x).norm(dim=1)).log10()).tolist() == pytest.approx([snr] * 3, abs=1e-6)


def test_white_noise_is_white_and_new_each_time():
    x = torch.full((1, 40_000), 0.01, dtype=torch.float64)
    rng = streams(1)
    first, second = (Noise(20)(x, rng, torch.arange(1)) - x for _ in range(2))
    unit = (first / first.std())[0]
    assert float((unit.pow(4)).mean()) == pytest.approx(3, abs=0.1)
    assert abs(float((unit[1:] * unit[:-1]).mean())) < 0.02
    assert abs(float(torch.cosine_similarity(first, second)[0])) < 0.02


def test_recorded_noise_is_a_part_of_its_file(tmp_path):
    noise = 0.5 * torch.sin(torch.arange(1000) * 0.1)
    wav.write(tmp_path / "noise.wav", noise, 16_000)
    x = torch.full((2, 3000), 0.2)
    added = Noise(10, str(tmp_path / "noise.wav"))(x, streams(2), torch.arange(2)) - x
    period = wav.quantised(noise)
    for row in added:
        match = max(float(torch.cosine_similarity(row[:1000], period.roll(k), 0)) for k in range(1000))
        assert match > 0.9999
        assert torch.allclose(row[:1000], row[1000:2000], atol=1e-6)


def test_gain_is_in_its_range_and_no_gain_is_no_change():
    x = sounds(1, 50, ends=(50,)).expand(200, -1)
    z = Gain(6)(x, streams(200), torch.arange(200))
    db = 20 * (z.norm(dim=1) / x.norm(dim=1)).log10()
    assert -6.01 < float(db.min()) < -5.5
    assert 5.5 < float(db.max()) < 6.01
    assert torch.equal(Gain(0)(x, streams(200), torch.arange(200)), x)


def tones(*hertz, rate=16_000, t=8000):
    place = torch.arange(t, dtype=torch.float64) / rate
    return torch.stack([0.5 * torch.sin(2 * math.pi * f * place) for f in hertz])


def test_a_band_keeps_what_is_inside_and_nothing_else():
    x = tones(100, 200, 450, 1000, 3200, 3600, 7000)
    z = Band()(x, streams(7), torch.arange(7))[:, 500:-500]
    ratio = z.norm(dim=1) / x[:, 500:-500].norm(dim=1)
    assert ratio.tolist() == pytest.approx([0, 0, 1, 1, 1, 0, 0], abs=0.02)
    assert torch.allclose(z[2:5], x[2:5, 500:-500], atol=0.02)
    assert torch.equal(Band(0, 9000)(x, streams(7), torch.arange(7)), x)


@pytest.mark.parametrize(("own", "rate"), [(16_000, 8000), (8000, 16_000), (16_000, 11_025), (22_050, 16_000)])
def test_resampling_gives_the_samples_of_the_same_tone(own, rate):
    low = min(own, rate)
    hertz = (110, 0.3 * low, 0.4 * low)
    new = resampled(tones(*hertz, rate=own), own, rate)
    assert new.shape[1] == math.ceil(8000 * rate / own)
    expected = tones(*hertz, rate=rate, t=new.shape[1])
    assert torch.allclose(new[:, 200:-200], expected[:, 200:-200], atol=0.005)


def test_downsampling_takes_away_what_is_above_half_the_rate():
    x = tones(1000, 3000, 5000, 7000)
    z = Resample(8000)(x, streams(4), torch.arange(4))[:, 200:-200]
    assert (z.norm(dim=1) / x[:, 200:-200].norm(dim=1)).tolist() == pytest.approx([1, 1, 0, 0], abs=0.01)
    assert torch.allclose(there_and_back(x, 16_000, 16_000), x)


def test_a_random_rate_is_one_of_a_hundred_and_in_its_range():
    x = tones(3000).expand(30, -1)
    z = Reclock(0.3, 0.5)(x, streams(30), torch.arange(30))
    kept = z[:, 200:-200].norm(dim=1) / x[:, 200:-200].norm(dim=1)
    # 3 kHz needs a rate of 6 kHz, 0.375 of 16.
    assert float(kept.min()) < 0.05
    assert float(kept.max()) > 0.9


# Filters


def test_quantise_rounds_to_its_levels():
    x = torch.tensor([[0.1, -0.3, 0.74, -1.0, 0.2]])
    for loudest in (1.0, 0.25):
        expected = [loudest * level for level in (0, -0.5, 0.5, -1, 0)]
        assert Quantise(5)(loudest * x, streams(1), torch.arange(1))[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_a_sound_whose_end_is_silenced_is_as_long_as_it_was():
    """A recogniser does not hear trailing zeros: it would hear a shorter sound, which may be too short for what is said."""
    x = torch.cat([torch.full((1, 50), 0.5), torch.full((1, 50), 0.01), torch.zeros(1, 20)], 1).requires_grad_(True)
    z = Quantise(5)(x, streams(1), torch.arange(1))
    assert lengths(z).tolist() == [100]
    assert float(z[:, 50:].detach().abs().max()) < 1e-9
    (g,) = torch.autograd.grad(z.sum(), x)
    assert bool((g[:, :100] == 1).all())


def test_median_and_average_are_what_they_are_called():
    x = torch.tensor([[0.1, 0.5, 0.3, -0.2, 0.4]])
    hear = lambda change: change(x, streams(1), torch.arange(1))[0].tolist()
    assert hear(Median(3)) == pytest.approx([0.1, 0.3, 0.3, 0.3, 0], abs=1e-7)
    assert hear(Average(3)) == pytest.approx([0.2, 0.3, 0.2, 1 / 6, 1 / 15])


def test_squeezing_leaves_out_the_quiet_tone_and_nothing_where_nothing_is_quiet():
    loud, quiet = tones(1000)[0], 0.01 * tones(3000)[0]
    x = (loud + quiet).unsqueeze(0)
    hear = lambda db: Squeeze(db)(x, streams(1), torch.arange(1))[0]
    assert torch.allclose(hear(1000.0), x[0], atol=1e-6)
    left = hear(30.0)
    assert float(left @ loud) == pytest.approx(float(loud @ loud), rel=0.01)
    assert abs(float(left @ quiet)) < 0.1 * float(quiet @ quiet)


# Codecs


@pytest.mark.parametrize(
    ("codec", "coarser"),
    [(MP3(64), MP3(16)), (MP3(64, rate=8000), MP3(16, rate=8000)), (Opus(64), Opus(8)), (Vorbis(0.9), Vorbis(0))],
    ids=repr,
)
def test_a_codec_is_aligned_and_fewer_bits_are_worse(codec, coarser):
    pytest.importorskip("soundfile")
    x = sounds(2, 16_000, ends=(16_000, 9001))
    error = [(one(x, streams(2), torch.arange(2)) - x).norm(dim=1) / x.norm(dim=1) for one in (codec, coarser)]
    assert float(error[0].max()) < 0.3
    assert bool((error[0] < 0.8 * error[1]).all())


def test_an_mp3_file_has_its_bit_rate(monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    sizes, write = [], soundfile.write

    def counted(file, samples, rate, **how):
        write(file, samples, rate, **how)
        sizes.append(8 * file.tell() / len(samples) * rate / 1000)

    monkeypatch.setattr(soundfile, "write", counted)
    x = sounds(1, 32_000, ends=(32_000,))
    for codec in (MP3(16), MP3(32), MP3(64), MP3(24, rate=8000), MP3(56, rate=8000)):
        codec(x, streams(1), torch.arange(1))
        assert sizes.pop() == pytest.approx(codec.kbps, rel=0.1)


def test_a_telephone_has_no_treble():
    pytest.importorskip("soundfile")
    x = tones(1000, 6000).float()
    z = GSM()(x, streams(2), torch.arange(2))[:, 500:-500]
    ratio = z.norm(dim=1) / x[:, 500:-500].norm(dim=1)
    assert float(ratio[0]) > 0.7
    assert float(ratio[1]) < 0.05


def test_what_libsndfile_refuses_is_one_sentence(monkeypatch):
    soundfile = pytest.importorskip("soundfile")

    def refused(file, *_, **__):
        raise RuntimeError(f"Error opening {file!r}: Error : No such codec.")

    monkeypatch.setattr(soundfile, "write", refused)
    with pytest.raises(UsageError, match=r"^gsm: soundfile cannot code 8000 samples a second: No such codec$"):
        GSM()(sounds(1), streams(1), torch.arange(1))


# Channels and views


def test_a_channel_is_its_parts_in_their_order_at_the_rate_of_the_sound():
    x = sounds()
    over = channel("band(300, 2000)+quantise(31)+gain(3)")
    first, again = (over(x, 8000, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    rng, rows = Streams.of(torch.Generator().manual_seed(1), 3), torch.arange(3)
    assert torch.equal(first, Gain(3)(Quantise(31)(Band(300, 2000, 8000)(x, rng, rows), rng, rows), rng, rows))
    assert at(Band(), 8000) == Band(rate=8000)
    assert at(Gain(), 8000) == Gain()


OVER = {"room": "room(2)", "resample": "resample(4000)"}


@pytest.mark.parametrize("name", [name for name in CHANNELS if name != "impulse"])
@pytest.mark.parametrize("rate", [8000, 16_000])
def test_every_channel_serves_both_rates_of_speech(name, rate):
    over = channel(OVER.get(name, name))
    over.check(rate)
    z = over(sounds(1, 2000, ends=(2000,)), rate, torch.Generator().manual_seed(0))
    assert z.shape == (1, 2000)
    assert bool((z.abs() > 1e-3).any())


@pytest.mark.parametrize(("text", "rate"), [("resample(8000)", 8000), ("gain(3)+band(4500, 7000)", 8000), ("opus", 22_050)])
def test_a_channel_that_does_not_know_a_rate_can_be_refused_before_an_attack(text, rate):
    channel(text).check(16_000)
    with pytest.raises(UsageError):
        channel(text).check(rate)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("echo", "unknown transform 'echo'; known are"),
        ("rotate(3)", "changes images"),
        ("room+rotate", "unknown transform 'rotate'; known are average, band"),
        ("room(rooms=0)", "room: rooms"),
        ("room(least=0.1)", "room: least is 0.1; it should be at least 0.15"),
        ("room(most=2)", "room: most"),
        ("impulse('none.wav')", "there is no file none.wav"),
        ("noise(-7000)", "noise: snr is -7000.0; it should be from -100 to 100 decibels"),
        ("noise(20, file='none.wav')", "there is no file none.wav"),
        ("gain(-1)", "gain: db"),
        ("gain(4000)", "gain: db is 4000.0; it should be from 0 to 100 decibels"),
        ("band(3000, 300)", "band: low is 3000.0 and high 300.0"),
        ("resample(10)", "resample: to is 10"),
        ("resample(16000)", "resample: to is 16000; it should be less than 16000, the rate of the sounds"),
        ("resample(15999)", "they should have a greater common divisor than 1"),
        ("gsm(rate=22051)", "they should have a greater common divisor than 1"),
        ("mp3(33)", "mp3: kbps is 33; it should be one of 16, 24"),
        ("mp3(rate=44100)", "mp3: rate is 44100"),
        ("opus(5)", "opus: kbps is 5"),
        ("opus(rate=22050)", "opus: rate is 22050; it should be one of 8000, 12000"),
        ("vorbis(2)", "vorbis: quality"),
        ("quantise(4)", "it should be odd"),
        ("median(2)", "median: size"),
        ("average(4)", "it should be odd"),
        ("squeeze(0)", "squeeze: db"),
        ("reclock(0.9, 0.5)", "reclock: most"),
        ("reclock(0.01)", "reclock: least"),
    ],
)
def test_what_is_wrong_is_one_sentence(text, says):
    with pytest.raises(UsageError) as caught:
        channel(text)
    assert says in str(caught.value)


@pytest.mark.parametrize("transform", ALL, ids=repr)
def test_images_are_refused(transform):
    with pytest.raises(UsageError, match=r"changes sounds \(N, T\)"):
        transform(torch.rand(2, 1, 8, 8), streams(2), torch.arange(2))


def test_without_pyroomacoustics_there_is_a_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyroomacoustics", None)
    with pytest.raises(UsageError, match="pip install pyroomacoustics"):
        rooms(1, 8000, torch.Generator())


class Pitch(torch.nn.Module):
    """Two classes: which of two tones a sound has more of."""

    def forward(self, x):
        low, high = tones(500, 2000, t=x.shape[1]).to(x)
        return torch.stack([(x @ low).abs(), (x @ high).abs()], 1) / 1000


def test_the_gradient_through_a_view_of_sounds_is_that_of_the_view():
    """One step of FGSM behind a band without the high tone goes nowhere; behind a gain it goes where it would have gone."""
    x = 0.2 * tones(500).float() + 0.05 * tones(1100).float()
    y = torch.zeros(1, dtype=torch.int64)
    step = lambda attack: perturb(attack, Pitch(), x, y, Snr(10), rng=torch.Generator()) - x
    plain, behind_gain = step(FGSM()), step(Expect(FGSM(), 1, "gain(3)"))
    assert torch.allclose(plain, behind_gain, atol=1e-6)
    high = lambda d: float((d @ tones(2000).float().T).abs()) / float(d.norm())
    deaf = step(Expect(FGSM(), 1, "band(0, 900)"))
    assert high(deaf) < 0.01 * high(plain)


def test_a_view_is_at_the_rate_of_the_model():
    model, x, y = Pitch(), 0.2 * tones(500).float(), torch.zeros(1, dtype=torch.int64)
    step = lambda view: perturb(Expect(FGSM(), 1, view), model, x, y, Snr(10), rng=torch.Generator().manual_seed(0))
    model.rate = 8000
    assert torch.equal(step("band(0, 900)"), step("band(0, 900, rate=8000)"))
    del model.rate
    assert not torch.equal(step("band(0, 900)"), step("band(0, 900, rate=8000)"))


def test_an_attack_through_a_room_works_in_that_room():
    """A tone arrives there with another phase, and this model hears the phase."""
    room = "room(1, seed=3, rate=8000)"
    x = 0.3 * tones(500, rate=8000, t=2000).float().repeat(6, 1)
    x += 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(6, dtype=torch.int64)

    def phase(x):
        low, high = tones(500, 2000, rate=8000, t=x.shape[1]).to(x)
        return torch.stack([(x @ low).abs(), x @ high], 1) / 1000

    def margin(attack):
        x_adv = perturb(attack, phase, x, y, Snr(5), rng=torch.Generator().manual_seed(0))
        outputs = phase(view(room)(x_adv, streams(6), torch.arange(6)))
        return outputs[:, 1] - outputs[:, 0]

    assert bool((margin(Expect(PGD(10), 2, room)) > margin(PGD(10))).all())


def test_convolution_can_begin_late():
    x, h = sounds(1, 100, ends=(100,)).double(), torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert np.allclose(convolved(x, h, 4)[0], np.convolve(x[0], h, "same"))
    assert "rate" not in inspect.signature(convolved).parameters
