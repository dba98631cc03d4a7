"""The picture of learning: tau-b against finished jobs, and around a switch of the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from alise_bench.learning import RECOVERED_AFTER_JOBS, RECOVERED_WITHIN, Curve

# Okabe and Ito's colours, as in the other pictures.
_STYLE: Final = {
    "first": ("#0072B2", "-"),
    "switched": ("#D55E00", "-"),
    "fresh": ("#000000", "--"),
}


def draw_learning(curves: Sequence[Curve], first: str, then: str) -> Figure:
    """Draw the means over seeds, with their range; `first` and `then` name the data sets."""
    figure = Figure(figsize=(9 if then else 5, 4))
    axes = figure.subplots(1, 2 if then else 1, sharey=True, squeeze=False)[0]
    _curve(axes[0], curves, "first", "learning from nothing")
    axes[0].set_title(first)
    axes[0].set_ylabel("Kendall's tau-b on prompts not seen")
    if then:
        _curve(axes[1], curves, "fresh", "learning from nothing")
        _curve(axes[1], curves, "switched", f"having learned {first}")
        axes[1].set_title(f"then {then}")
        axes[1].axvline(RECOVERED_AFTER_JOBS, color="0.6", lw=0.8)
    for one in axes:
        one.set_xlabel("finished jobs" if one is axes[0] else "finished jobs since the switch")
        one.legend(loc="lower right")
        one.grid(alpha=0.3)
    return figure


def _curve(axes: Axes, curves: Sequence[Curve], name: str, label: str) -> None:
    own = [curve for curve in curves if curve.name == name]
    jobs = range(own[0].jobs + 1)
    taus = np.array([[curve.at(number) for number in jobs] for curve in own])
    colour, line = _STYLE[name]
    axes.plot(jobs, taus.mean(0), line, color=colour, label=label)
    axes.fill_between(jobs, taus.min(0), taus.max(0), color=colour, alpha=0.15, lw=0)
    if name == "fresh":
        goal = taus.mean(0) - RECOVERED_WITHIN
        axes.plot(jobs, goal, ":", color=colour, lw=0.8, label=f"{RECOVERED_WITHIN} less: the goal")
