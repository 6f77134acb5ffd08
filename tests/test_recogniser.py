import jiwer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from advkit import run
from advkit.attacks import ATTACKS
from advkit.audio.recogniser import Recogniser, TextOnly, goal
from advkit.audio.text import Contains, Exact, Wer, cer, check_said, normalise, wer
from advkit.errors import ModelError, UsageError
from advkit.oracle import Access
from advkit.sound.wav import quantised
from advkit.threat import Level, Snr

SAID = ("yes", "no", "maybe")


class Tones(Recogniser):
    """Hears the word whose frequency is the loudest."""

    rate = 1000
    name = "tones"

    def __init__(self) -> None:
        super().__init__()
        t = torch.arange(200) / self.rate
        self.register_buffer("waves", torch.stack([torch.sin(2 * torch.pi * f * t) for f in (50, 120, 210)]))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.waves[:, : x.shape[1]].T.to(x.dtype)).abs() / 10

    def text(self, outputs: Tensor) -> list[str]:
        return [SAID[k] for k in outputs.argmax(1).tolist()]

    def loss(self, outputs: Tensor, texts: list[str]) -> Tensor:
        labels = torch.tensor([SAID.index(text) for text in texts])
        return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")

    def check_text(self, text: str) -> None:
        if normalise(text) not in SAID:
            raise UsageError(f"tones cannot say {text!r}; it says {', '.join(SAID)}")


def _sounds(n: int = 3) -> Tensor:
    return 0.5 * Tones().waves[torch.arange(n) % 3]


@pytest.mark.parametrize("name", ["pgd", "fgsm", "apgd", "bim", "fmn", "ddn", "square"])
def test_attacks_of_the_kernel_make_a_recogniser_say_a_text(name):
    ear, x = Tones(), _sounds()
    threat = Level(-1) if name in ("fgsm", "apgd", "bim", "square") else Snr() if name in ("fmn", "ddn") else Snr(1)
    result = run(ATTACKS[name](), ear, x, torch.tensor([1, 1, 1]), threat, goal=goal(ear, SAID, targeted=True))
    assert result.success.tolist() == [True, True, True]
    assert result.distance[1] == 0
    assert ear.transcribe(result.x_adv) == ["no", "no", "no"]


def test_the_quietest_change_of_a_tone_is_known():
    # From 0.5 and 0.05 of two orthogonal tones to 0.275 of each.
    ear = Tones()
    x = 0.5 * ear.waves[:1] + 0.05 * ear.waves[1:2]
    found = run(ATTACKS["ddn"](steps=200), ear, x, torch.tensor([1]), Snr(), goal=goal(ear, SAID, targeted=True))
    assert found.distance[0] == pytest.approx(0.225 * 2**0.5 / (0.5**2 + 0.05**2) ** 0.5, rel=0.02)


def test_untargeted_with_a_word_error_rate():
    ear, x, y = Tones(), _sounds(), torch.arange(3)
    result = run(ATTACKS["pgd"](), ear, x, y, Snr(1), goal=goal(ear, SAID, match=Wer(0.5)))
    assert bool(result.success.all())
    assert all(wer(SAID[k], said) > 0.5 for k, said in enumerate(ear.transcribe(result.x_adv)))


@pytest.mark.parametrize("name", ["deepfool", "fab"])
def test_attacks_that_compare_classes_say_that_there_are_none(name):
    ear = Tones()
    with pytest.raises(UsageError, match="compares classes"):
        run(ATTACKS[name](), ear, _sounds(), torch.arange(3), Snr(), goal=goal(ear, SAID))


def test_a_target_that_cannot_be_said_is_refused_before_the_attack():
    with pytest.raises(UsageError, match="tones cannot say 'sesame'"):
        goal(Tones(), ("sesame",), targeted=True)


def test_a_function_from_sounds_to_texts_is_a_recogniser():
    heard = []

    def hear(x: Tensor) -> str:
        heard.append(len(x))
        return "Yes!" if x.abs().max() > 0.2 else "No."

    ear = TextOnly(hear, rate=1000, name="own")
    x = torch.zeros(2, 100)
    x[0, :40], x[1, :70] = 0.5, 0.1
    assert ear.transcribe(x) == ["yes", "no"]
    assert heard == [40, 70]
    labels = {"goal": goal(ear, SAID, targeted=True), "access": Access.LABELS}
    assert bool(ear.says(ear(x), ["yes", "no"]).all())
    with pytest.raises(UsageError, match="the adversary sees labels only"):
        run(ATTACKS["pgd"](), ear, x, torch.tensor([1, 1]), Snr(0), **labels)
    with pytest.raises(UsageError, match="answers with texts only"):
        ear.loss(ear(x), ["yes", "no"])


def test_a_long_text_is_whole():
    said = " ".join(["word"] * 400)
    assert TextOnly(lambda x: said).transcribe(torch.ones(1, 10)) == [said]


@pytest.mark.parametrize(("hear", "said"), [(lambda x: 3, "returned int"), (lambda x: 1 / 0, "raised ZeroDivisionError")])
def test_a_function_that_fails_is_named(hear, said):
    with pytest.raises(ModelError, match=said):
        TextOnly(hear, name="own").transcribe(torch.ones(1, 10))


@given(st.text(alphabet="abc '-.9", max_size=30))
def test_normalising_is_idempotent(text):
    assert normalise(normalise(text)) == normalise(text)


@given(
    st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6), st.lists(st.sampled_from(["a", "b", "d"]), max_size=6)
)
def test_error_rates_are_those_of_jiwer(wanted, heard):
    wanted, heard = " ".join(wanted), " ".join(heard)
    assert wer(wanted.upper() + "!", heard) == jiwer.wer(wanted, heard)
    assert cer(wanted, heard) == jiwer.cer(wanted, heard)
    assert Exact()(wanted, heard) == (wanted == heard)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Call 911, please.", "call nine one one please"),
        ("at 7:05 on the 12th", "at seven zero five on the twelve th"),
        ("30 and 21", "thirty and twenty one"),
        ("Send $100 or $2000.", "send one hundred dollars or two thousand dollars"),
        (
            "'Don\N{RIGHT SINGLE QUOTATION MARK}t' -- \N{LATIN SMALL LETTER E WITH ACUTE}t\N{LATIN SMALL LETTER E WITH ACUTE}",
            "don't \xe9t\xe9",
        ),
        ("...", ""),
    ],
)
def test_what_is_left_of_a_text(text, plain):
    assert normalise(text) == plain


def test_matches():
    assert Contains()("the door", "Open the door!")
    assert not Contains()("the do", "Open the door!")
    assert Wer(0.5)("open the door", "open door")
    assert not Wer(0.3)("open the door", "open door")
    with pytest.raises(UsageError, match="wer: most is -1"):
        Wer(-1)
    with pytest.raises(UsageError, match="at least one word"):
        check_said("?!")


def test_without_a_random_start_no_answer_depends_on_padding():
    ear, x, y = Tones(), _sounds()[:, :150], torch.arange(3)
    long = torch.cat([x, torch.zeros(3, 50)], 1)
    short, padded = (run(ATTACKS["bim"](), ear, z, y, Level(-3), goal=goal(ear, SAID)) for z in (x, long))
    assert torch.allclose(short.x_adv, padded.x_adv[:, :150], atol=1e-6)
    assert not padded.x_adv[:, 150:].any()
    assert quantised(padded.x_adv)[:, 150:].abs().max() == 0
