"""A pytest fixture that attacks a model in its own test suite. Nothing heavy is imported before a test uses it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import pytest

from advkit.errors import UsageError

if TYPE_CHECKING:
    from advkit.benchmarks.gates import Gate
    from advkit.benchmarks.plan import Plan
    from advkit.benchmarks.result import Evaluation

_SAID = pytest.StashKey[list[str]]()
_PROPERTY = "robustness"

P = ParamSpec("P")
T = TypeVar("T")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--robustness-out``."""
    group = parser.getgroup("advkit", "robustness (advkit)")
    group.addoption("--robustness-out", metavar="DIR", type=Path, help="keep each evaluation's rows and examples in a folder")


def pytest_configure(config: pytest.Config) -> None:
    """Start without a requirement."""
    out = _folder(config)
    if out is not None and out.exists() and not out.is_dir():
        raise pytest.UsageError(f"--robustness-out is {out}, which is a file; it should be a folder")
    config.stash[_SAID] = []
    config.pluginmanager.register(_Summary())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Send what was said with the report of the test, which is all that comes back from a worker of pytest-xdist."""
    report = yield
    said = item.config.stash[_SAID]
    report.user_properties += [(_PROPERTY, sentence) for sentence in said]
    said.clear()
    return report


class _Summary:
    """Says what each requirement came to, as one that too few examples decide passes too."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.said += [str(sentence) for name, sentence in report.user_properties if name == _PROPERTY]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.said:
            terminalreporter.section("robustness")
            for sentence in self.said:
                terminalreporter.line(sentence)


def _folder(config: pytest.Config) -> Path | None:
    """The folder that is given; a test may change the working directory."""
    out = config.getoption("--robustness-out")
    return None if out is None else config.invocation_params.dir / out


@pytest.fixture(scope="session")
def robustness(pytestconfig: pytest.Config) -> Robustness:
    """Attack a model: ``robustness(model, data, threat="linf(0.1)")``; see :class:`Robustness`."""
    return Robustness(_folder(pytestconfig), pytestconfig.stash[_SAID])


def _brief(call: Callable[P, T]) -> Callable[P, T]:
    """The same, whose UsageError comes from the line of the test: the sentence says all, and what caused it stays."""

    @functools.wraps(call)
    def brief(*args: P.args, **kwargs: P.kwargs) -> T:
        __tracebackhide__ = True
        try:
            return call(*args, **kwargs)
        except UsageError as error:
            raise error.with_traceback(None) from error.__cause__

    return brief


class Robustness:
    """Evaluations of a test session; the same one is made once.

    Arguments:
        out: A folder for the folders of the evaluations; None to keep nothing.
        said: Where sentences on what was required are added.
    """

    def __init__(self, out: Path | None = None, said: list[str] | None = None) -> None:
        self.out, self.said = out, [] if said is None else said
        self._made: dict[str, Evaluation] = {}

    @_brief
    def __call__(
        self, model: Any, data: Any, *, threat: Any, limit: int | None = None, split: str = "test", **given: Any
    ) -> Evaluation:
        """What :func:`advkit.evaluate` finds.

        Arguments:
            model: As evaluate's.
            data: As evaluate's.
            threat: As evaluate's: ``linf(8/255)``.
            limit: At most how many examples, with the classes in proportion.
            split: Which part of a data set that is named.
            given: The other arguments of evaluate but ``out`` and ``report``: attacks, access, seed and so on.

        Raises:
            UsageError: As evaluate.
        """
        from advkit import models
        from advkit.benchmarks.evaluate import examples_of
        from advkit.benchmarks.plan import plan

        loaded = models.load(model, device=given.get("device", "cpu")) if isinstance(model, str) else models.wrap(model)
        examples = examples_of(data, split, limit, given.get("seed", 0))
        planned = plan(loaded, examples, threat=threat, **given)
        key = hashlib.sha256(json.dumps(planned.identity(), sort_keys=True).encode()).hexdigest()[:16]
        if key not in self._made:
            name = re.sub(r"[^\w.-]+", "-", Path(loaded.name).name).strip("-.") or "model"
            self._made[key] = self._execute(planned, f"{name}-{key}")
        return self._made[key]

    def _execute(self, plan: Plan, name: str) -> Evaluation:
        from advkit.benchmarks.evaluate import execute

        if self.out is None:
            return execute(plan, None, None)
        self.out.mkdir(parents=True, exist_ok=True)
        with _in_turn(self.out / f".{name}.lock"):
            return execute(plan, self.out / name, None)

    @_brief
    def require(self, model: Any, data: Any, gate: str, **given: Any) -> Evaluation:
        """Fail the test if the model is significantly worse than a gate asks for.

        Where the 95 % interval reaches both sides of the number, the test passes: too few examples to say, which the summary
        at the end of the session mentions.

        Arguments:
            model: As evaluate's.
            data: As evaluate's.
            gate: ``robust[linf(8/255)] >= 0.45``, ``clean >= 98 %``, ``median[l2] >= 1.5`` or ``area[l2] >= 0.3``; its threat
                model is what is attacked.
            given: As the call's.

        Raises:
            UsageError: The gate cannot be read, or as evaluate.

        >>> import torch
        >>> x = torch.full((60, 1, 3, 3), 0.2)
        >>> fits = Robustness().require(lambda z: z.flatten(1), (x, x.flatten(1).argmax(1)), "clean >= 90 %")
        >>> fits.clean_accuracy.count
        60
        """
        __tracebackhide__ = True
        from advkit.benchmarks.gates import Gate, decide
        from advkit.benchmarks.records import of_evaluation

        parsed = Gate.parse(gate)
        if "threat" in given:
            raise UsageError(f"a threat model is given beside the gate {gate!r}, which names its own; leave it out")
        result = self(model, data, **{**given, **_attacked(parsed)})
        for decision in decide(parsed, of_evaluation(result)):
            self.said.append(decision.sentence)
            if decision.verdict == "failed":
                pytest.fail(_why(decision.sentence, result), pytrace=False)
        return result


@contextlib.contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """Wait for the other workers of pytest-xdist that make the same evaluation, where a system has locks."""
    with path.open("w") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _attacked(gate: Gate) -> dict[str, Any]:
    """The threat model that a gate is on."""
    from advkit.threat import BALLS

    if gate.quantity == "clean":
        # Answers to clean inputs are part of every evaluation; this is the least of one.
        return {"threat": "linf(0.001)", "attacks": "uniform(n=1)", "quantize": False}
    if gate.family not in BALLS or gate.quantity != "robust":
        return {"threat": gate.family}
    return {"threat": f"{gate.family}({gate.eps!r})"}


def _why(sentence: str, result: Evaluation) -> str:
    broke = [f"  {row['attack']} broke {row['broke']} of {row['examples']}" for row in result.by_attack() if row["examples"]]
    kept = f"rows and examples: {result.folder}" if result.folder else "with --robustness-out DIR the examples are kept"
    lines = [sentence, f"clean accuracy {result.clean_accuracy}, {len(result.rows)} examples of {result.run['data']['name']}"]
    return "\n".join([*lines, *broke, kept])
