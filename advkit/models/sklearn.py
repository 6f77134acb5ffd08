"""Estimators and pipelines of scikit-learn, from pickles that the user trusts."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advkit.errors import UsageError, first_line
from advkit.oracle import Access

_MOST_CLASSES = 100_000

Rows = NDArray[np.float64]


class SklearnModule(nn.Module):
    """A classifier of scikit-learn over flattened rows, as a module; it has no gradients.

    The answers are the logarithm of ``predict_proba``, or ``decision_function``, or 1 for the label that ``predict`` names
    and 0 for the others. Where the classes are integers, column k is class k.

    Arguments:
        estimator: A fitted classifier with ``classes_``.
    """

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator
        self.classes = np.asarray(estimator.classes_)
        self.method = _method(estimator)
        self.columns = _columns(self.classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits, with shape (N, K), dtype and device of x."""
        rows = x.detach().flatten(1).cpu().numpy().astype(np.float64)
        answers = self._scores(rows)
        if answers.shape[1] != int(self.columns.max()) + 1:
            # A class that the estimator never saw is less likely than all that it did.
            full = np.repeat(answers.min(1, keepdims=True) - 1, int(self.columns.max()) + 1, axis=1)
            full[:, self.columns] = answers
            answers = full
        return torch.from_numpy(answers).to(x)

    def _scores(self, rows: Rows) -> Rows:
        if self.method == "predict_proba":
            return np.log(np.maximum(self.estimator.predict_proba(rows), np.finfo(np.float64).tiny))
        if self.method == "decision_function":
            scores = np.asarray(self.estimator.decision_function(rows), dtype=np.float64)
            return np.stack([-scores, scores], 1) if scores.ndim == 1 else scores
        said = np.asarray(self.estimator.predict(rows))
        return (said[:, None] == self.classes[None, :]).astype(np.float64)


def _method(estimator: Any) -> str:
    if hasattr(estimator, "predict_proba"):
        return "predict_proba"
    # One against one gives a column for each pair of classes, not for each class.
    pairs = [value for key, value in estimator.get_params().items() if key.endswith("decision_function_shape")]
    return "decision_function" if hasattr(estimator, "decision_function") and "ovo" not in pairs else "predict"


def _columns(classes: NDArray[Any]) -> NDArray[np.intp]:
    """The column of each class: its own number, if all are numbers of classes, or else its place."""
    if np.issubdtype(classes.dtype, np.integer) and classes.min() >= 0 and classes.max() < _MOST_CLASSES:
        return classes.astype(np.intp)
    return np.arange(len(classes), dtype=np.intp)


def load(path: Path, trust_pickle: bool) -> tuple[nn.Module, Access, tuple[str, ...]]:
    """The classifier as a module, what it can answer, and what to know of it.

    Arguments:
        path: A pickle, or a file of joblib.
        trust_pickle: Whether the user said that the file may run code.

    Raises:
        UsageError: The file is not trusted or not readable, or holds something other than a fitted classifier.
    """
    if not trust_pickle:
        raise UsageError(
            f"{path} is a pickle, and loading a pickle can run any code that is in it; "
            "if you trust where it comes from, add --trust-pickle (trust_pickle=True)"
        )
    estimator, notes = _unpickle(path)
    if not hasattr(estimator, "predict") or not hasattr(estimator, "get_params"):
        raise UsageError(f"{path} holds {type(estimator).__name__}; it should hold an estimator of scikit-learn")
    if not hasattr(estimator, "classes_"):
        raise UsageError(f"{path} holds {type(estimator).__name__} without classes; it should be a fitted classifier")
    module = SklearnModule(estimator)
    if not np.array_equal(module.columns, module.classes):
        shown = ", ".join(str(name) for name in module.classes[:10])
        notes = (*notes, f"label k stands for the k-th of the classifier's classes, counted from 0: {shown}")
    return module, Access.LABELS if module.method == "predict" else Access.SCORES, notes


def _unpickle(path: Path) -> tuple[Any, tuple[str, ...]]:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator = _read(path)
    except ImportError as error:
        raise UsageError(f'{path} needs {error.name}, which is not installed; run pip install "advkit[sklearn]"') from error
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"cannot read {path} ({what}); it should be a pickled estimator") from error
    return estimator, tuple(dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught))


def _read(path: Path) -> Any:
    if path.suffix == ".joblib":
        import joblib

        return joblib.load(path)
    with path.open("rb") as file:
        return pickle.load(file)
