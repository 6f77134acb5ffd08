import dataclasses
import math
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from advkit import spec
from advkit.attacks import ATTACKS, FGSM, PGD, Restarts, SaltAndPepper, Worst
from advkit.errors import UsageError
from advkit.threat import THREATS, Lp


@dataclasses.dataclass(frozen=True)
class Thing:
    count: int = 1
    size: float = 0.5
    flag: bool = False
    name: str = "a"
    maybe: float | None = None


TABLE = {"thing": Thing, "n-thing": partial(Thing, flag=True)}


@given(st.builds(Thing, st.integers(), st.floats(allow_nan=False), st.booleans(), st.sampled_from(["a", "b-c"])))
def test_show_and_parse_invert_each_other(thing):
    assert spec.parse(spec.show(thing, TABLE), TABLE, "thing") == thing


def test_forms():
    assert spec.parse("thing", TABLE, "thing") == Thing()
    assert spec.parse(" thing(3, size=8/255) ", TABLE, "thing") == Thing(3, 8 / 255)
    assert spec.parse("n-thing(size=-1e-3)", TABLE, "thing") == Thing(flag=True, size=-0.001)
    assert spec.parse("thing(size=2*(1+1), maybe=none)", TABLE, "thing") == Thing(size=4.0)
    assert spec.parse("thing(size=inf, flag=True)", TABLE, "thing") == Thing(size=math.inf, flag=True)


def test_attacks_and_threats():
    assert spec.parse("linf(8/255)", THREATS, "threat") == Lp(math.inf, 8 / 255)
    assert spec.parse("l2", THREATS, "threat", {"low": -1.0}) == Lp(2.0, low=-1.0)
    assert spec.parse("l2(1, low=0)", THREATS, "threat", {"low": -1.0}) == Lp(2.0, 1.0)
    assert spec.parse("salt-and-pepper(n=3)", ATTACKS, "attack") == SaltAndPepper(3)
    nested = spec.parse('worst([fgsm, restarts(pgd(steps=3, loss="margin"), n=2)])', ATTACKS, "attack")
    assert nested == Worst((FGSM(), Restarts(PGD(steps=3, loss="margin"), 2)))
    assert spec.parse(spec.show(nested, ATTACKS), ATTACKS, "attack") == nested


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("thin", r"unknown thing 'thin'; known are n-thing, thing; did you mean 'thing'\?"),
        ("thing(cuont=1)", "unknown setting of thing thing: 'cuont'; known are count.*did you mean 'count'"),
        ("thing(count=1.5)", "thing: count is 1.5; it should be of type int"),
        ("thing(count='x')", "thing: count is 'x'; it should be of type int"),
        ("thing(flag=1)", "thing: flag is 1; it should be of type bool"),
        ("thing(size=True)", "thing: size is True; it should be of type float"),
        ("thing(1, 2, True, 'a', 1, 2)", "takes 5 settings .* 6 given"),
        ("thing(1, count=2)", "two values for count"),
        ("thing(size=1/0)", "1 / 0 divides by zero"),
        ("thing(size=2**9)", r"cannot read '2 \*\* 9'"),
        ("thing(", "cannot read the thing"),
        ("", "cannot read the thing"),
        ("thing.other(1)", "cannot read the thing|should start with a name"),
        ("__import__('os').system('true')", "should start with a name"),
        ("thing(count=__import__('os'))", "unknown thing '__import__'"),
        ("thing(*[1])", "cannot read"),
        ("thing(**{'count': 1})", "cannot read|unknown setting"),
        ("(" * 500 + "thing" + ")" * 500, "cannot read the thing"),
    ],
)
def test_a_wrong_text_gets_a_sentence(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        spec.parse(text, TABLE, "thing")


@pytest.mark.parametrize(
    "text",
    [
        "pgd(steps=0)",
        "pgd(step=-1)",
        'pgd(loss="x")',
        "pgd(momentum=-1)",
        "fmn(gamma=0)",
        "square(queries=0)",
        "restarts(pgd, n=0)",
    ],
)
def test_a_wrong_value_gets_a_sentence(text):
    with pytest.raises(UsageError, match=r"it should be|unknown"):
        spec.parse(text, ATTACKS, "attack")


def test_a_setting_without_default_is_asked_for():
    with pytest.raises(UsageError, match="restarts needs a value for attack"):
        spec.parse("restarts", ATTACKS, "attack")
