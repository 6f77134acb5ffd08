"""The plots of a report: inline SVG whose colours are CSS variables, so that one drawing serves light and dark pages.

``--c1`` to ``--c8`` are the models' colours, ``--line`` that of the grid; text has the colour of the text around it. Models are
told apart by colour and by mark; the page has the legend, for a name may be anything.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advkit.benchmarks.statistics import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

COLOURS = 8
MARKS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
"""The marks as the plots and as a legend write them."""

LINE = "#c0ffee"
"""Stands for ``--line`` in a drawing, as _colour stands for the models' colours."""


@dataclass(frozen=True)
class Series:
    """What a plot shows of one model.

    Attributes:
        number: Its number, from 0: its colour and mark.
        points: (radius, robust accuracy), least radius first; or (number of the seed, robust accuracy).
        suspect: Whether its numbers cannot be trusted: hollow marks and a dashed line.
    """

    number: int
    points: Sequence[tuple[float, Rate]]
    suspect: bool = False


@dataclass(frozen=True)
class Place:
    """A model in the plane of clean and robust accuracy.

    Attributes:
        number: Its number, from 0: its colour and mark.
        clean: Its clean accuracy.
        robust: Its robust accuracy.
        seconds: What its training took; None where that is not known.
        suspect: Whether the robust accuracy cannot be trusted: a hollow mark.
    """

    number: int
    clean: Rate
    robust: Rate
    seconds: float | None = None
    suspect: bool = False


def mark(number: int) -> str:
    """The sign of a model in a legend.

    >>> mark(0), mark(1)
    ('●', '■')
    >>> len({(mark(i), colour_of(i)) for i in range(64)})
    64
    """
    return MARKS[_shape(number)]


def colour_of(number: int) -> int:
    """The number of a model's colour, from 1."""
    return number % COLOURS + 1


def _shape(number: int) -> str:
    """The mark of a model; models of one colour have different ones."""
    return list(MARKS)[(number + number // COLOURS) % len(MARKS)]


def curves(series: Sequence[Series], label: str, *, everywhere: bool) -> str:
    """Robust accuracy over the radius, with intervals, as SVG.

    Arguments:
        series: A series a model.
        label: What the radius is.
        everywhere: Whether the accuracy is known at every radius. If not, marks stand at the radii that were attacked, and
            between two of them a band from one accuracy to the other: it never rises with the radius, so it is in there.
    """
    with _figure(4.8, 3.3) as (axes, out):
        for one in series:
            (_curve if everywhere else _steps)(axes, one)
        axes.set(xlabel=label, ylabel="robust accuracy (%)", ylim=(-1.5, 101.5))
        axes.set_xlim(left=0) if everywhere else axes.margins(x=0.04)
    return _inline(out, "Robust accuracy over the radius")


def _curve(axes: Axes, one: Series) -> None:
    x, y, low, high = _columns(one.points)
    colour = _colour(one.number)
    axes.plot(x, y, color=colour, linewidth=1.8, linestyle="--" if one.suspect else "-")
    axes.plot(x[:: len(x) // 8 or 1], y[:: len(x) // 8 or 1], **_dots(one))
    axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _steps(axes: Axes, one: Series) -> None:
    from matplotlib.patches import Rectangle

    x, y, low, high = _columns(one.points)
    colour = _colour(one.number)
    for i in range(len(x) - 1):
        corners = (x[i], y[i + 1]), x[i + 1] - x[i], y[i] - y[i + 1]
        axes.add_patch(Rectangle(*corners, facecolor=colour, edgecolor="none", alpha=0.07))
        axes.add_patch(Rectangle(*corners, facecolor="none", edgecolor=colour, alpha=0.4, linewidth=0.7))
    axes.errorbar(x, y, [_less(y, low), _less(high, y)], **_dots(one), elinewidth=1.4, capsize=3, ecolor=colour)


def pareto(places: Sequence[Place], label: str) -> str:
    """Clean beside robust accuracy with intervals, a mark's area growing with the training's time, as SVG.

    The line is the front: no model is better in both than a model on it.

    Arguments:
        places: Where each model is.
        label: Under which threat model.
    """
    most = max((place.seconds or 0 for place in places), default=0)
    with _figure(4.8, 3.3) as (axes, out):
        best = sorted(
            (places[i] for i in front([(p.clean.value, p.robust.value) for p in places])), key=lambda p: p.clean.value
        )
        x, y = ([100 * getattr(p, name).value for p in best] for name in ("clean", "robust"))
        axes.plot([-20, *x, x[-1]], [y[0], *y, -20], "k--", drawstyle="steps-pre", linewidth=1, alpha=0.5, zorder=1)
        for place in places:
            (a, b), (low, lower), (high, higher) = _percent(place, "value"), _percent(place, "low"), _percent(place, "high")
            colour = _colour(place.number)
            axes.errorbar(a, b, [[b - lower], [higher - b]], [[a - low], [high - a]], fmt="none", ecolor=colour, elinewidth=1.4)
            size = 6 + 12 * (place.seconds / most) ** 0.5 if place.seconds and most else 8
            axes.plot(a, b, **_dots(place, size))
        limits = {"xlim": _room([p.clean for p in places]), "ylim": _room([p.robust for p in places])}
        axes.set(xlabel="clean accuracy (%)", ylabel=f"robust accuracy (%), {label}", **limits)
        for axis in (axes.xaxis, axes.yaxis):
            (low, high), ticks = axis.get_view_interval(), axis.get_ticklocs()
            axis.set_ticks([tick for tick in ticks if max(0, low) <= tick <= min(100, high)])
    return _inline(out, "Clean and robust accuracy of each model")


def _room(rates: Sequence[Rate]) -> tuple[float, float]:
    """The ends of an axis in percent: those of the intervals, with room for the marks."""
    low, high = 100 * min(rate.low for rate in rates), 100 * max(rate.high for rate in rates)
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _percent(place: Place, name: str) -> tuple[float, float]:
    return 100 * getattr(place.clean, name), 100 * getattr(place.robust, name)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The numbers of the points to which no other is as good in both and better in one (V. Pareto, 1906).

    >>> front([(0.99, 0.0), (0.97, 0.9), (0.96, 0.8)])
    [0, 1]
    """
    return [i for i, (x, y) in enumerate(points) if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points)]


def spread(rows: Sequence[Series], label: str) -> str:
    """The robust accuracy with each seed alone, a line a model, as SVG.

    Arguments:
        rows: A series a model, with a point a seed.
        label: Under which threat model.
    """
    with _figure(4.8, 0.8 + 0.32 * len(rows)) as (axes, out):
        for i, one in enumerate(rows):
            values = [100 * rate.value for _, rate in one.points]
            axes.plot([min(values), max(values)], [i, i], color=_colour(one.number), linewidth=1.4)
            axes.plot(values, [i] * len(values), **_dots(one))
        axes.set(xlabel=f"robust accuracy (%), {label}, each seed alone", yticks=[], ylim=(len(rows) - 0.5, -0.5))
        axes.spines["left"].set_visible(False)
    return _inline(out, "Robust accuracy with each seed alone")


def _columns(points: Sequence[tuple[float, Rate]]) -> tuple[list[float], ...]:
    percents = ([100 * getattr(rate, name) for _, rate in points] for name in ("value", "low", "high"))
    return [eps for eps, _ in points], *percents


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [max(0.0, u - v) for u, v in zip(a, b, strict=True)]


def _colour(number: int) -> str:
    return f"#c0ff{colour_of(number):02x}"


def _dots(one: Series | Place, size: float = 6) -> dict[str, Any]:
    edge = _colour(one.number)
    fill = "none" if one.suspect else edge
    return {"linestyle": "none", "marker": _shape(one.number), "color": edge, "markerfacecolor": fill, "markersize": size}


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Axes, io.StringIO]]:
    """The axes of a figure in inches, and where its SVG is written at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "advkit", "font.size": 9, "axes.linewidth": 0.8, "text.parse_math": False}
    ):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=LINE, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes, out
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def _inline(out: io.StringIO, title: str) -> str:
    """The drawing as an element of a page: no header, colours as variables, the page's fonts, identifiers of its own."""
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    view, body = text[: text.index(">")], text[text.index(">") + 1 :]
    body = re.sub(r"#c0ff0(\d)", r"var(--c\1)", body.replace(LINE, "var(--line)")).replace("#000000", "currentColor")
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    own = hashlib.sha256(body.encode()).hexdigest()[:8]
    body = re.sub(r'((?<= id=")|(?<=href="#)|(?<=url\(#))', f"p{own}-", body)
    size = re.search(r'viewBox="[^"]*"', view)
    return f'<svg class="plot" role="img" aria-label="{title}" {size[0] if size else ""}>{body.rstrip()}'


WINDOW = 512
"""Samples of a spectrum of a spectrogram."""

DEEP = 80.0
"""How many decibels below the loudest a spectrogram shows."""


def sound(x: Tensor, rate: int, top: float, loudest: float) -> str:
    """The waveform of a sound above its spectrogram, as SVG.

    Arguments:
        x: Samples (T,) in [-1, 1].
        rate: Samples a second.
        top: The greatest amplitude that the waveform's axis shows.
        loudest: The power, as :func:`spectrum_of` has it, that is 0 dB, so that drawings beside each other can be compared.
    """
    seconds = len(x) / rate
    with _figure(3.6, 2.6) as (axes, out):
        figure = axes.figure
        axes.remove()
        upper, lower = figure.subplots(2, sharex=True, height_ratios=(1, 2))
        at, low, high = _envelope(x, rate)
        upper.fill_between(at, low, high, color=_colour(0), linewidth=0.5)
        upper.set(ylim=(-top, top), yticks=[])
        power = spectrum_of(x)
        levels = 10 * (power.clamp(min=1e-12) / max(loudest, 1e-12)).log10()
        extent = (0, seconds, 0, rate / 2000)
        lower.imshow(levels.numpy(), cmap="magma", vmin=-DEEP, vmax=0, origin="lower", aspect="auto", extent=extent)
        lower.set(xlabel="seconds", ylabel="kHz", xlim=(0, seconds))
        for part in (upper, lower):
            part.set_facecolor("none")
            part.spines[["top", "right"]].set_visible(False)
    return _inline(out, "Waveform and spectrogram")


def spectrum_of(x: Tensor) -> Tensor:
    """The power of a sound (T,) by frequency, low first, and time, at most 400 times, with shape (WINDOW / 2 + 1, times)."""
    import torch

    hop = max(WINDOW // 4, len(x) // 400)
    padded = torch.nn.functional.pad(x.float(), (0, max(0, WINDOW - len(x))))
    return torch.stft(padded, WINDOW, hop, window=torch.hann_window(WINDOW), return_complex=True, center=False).abs().square()


def _envelope(x: Tensor, rate: int) -> tuple[list[float], list[float], list[float]]:
    """The times of at most 500 parts of a sound, and the least and greatest sample of each."""
    parts = x.float().split(max(1, len(x) // 500))
    ends = [part.aminmax() for part in parts]
    times = [i * len(parts[0]) / rate for i in range(len(parts))]
    return times, [float(end.min) for end in ends], [float(end.max) for end in ends]
