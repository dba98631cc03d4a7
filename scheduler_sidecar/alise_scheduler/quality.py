"""How good the predictions were: figures over a sliding window of finished jobs.

Pure but for the window itself. Does not know how predictions are made.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import kendalltau

from alise_scheduler.lengths import QUANTILE_LEVELS, Quantiles
from alise_scheduler.quantile_model import pinball

WINDOW_JOBS: Final = 500
_MIN_DRIFT_JOBS: Final = 50
_DRIFT_JOBS: Final = 100
_DRIFT_RATIO: Final = 1.3
_P50: Final = QUANTILE_LEVELS.index(0.5)
_P90: Final = QUANTILE_LEVELS.index(0.9)


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures at arrival over the newest finished jobs; NaN where there are too few."""

    jobs: int
    tau_b: float
    """Kendall's tau-b between the median prediction and the length."""
    mae_tokens: float
    p50_coverage: float
    """Share of lengths at or below the predicted median; ideally 0.5."""
    p90_coverage: float
    is_drifting: bool
    """Predictions have become clearly worse than they were on the holdout at training."""


class QualityWindow:
    """The newest finished jobs: what was predicted at arrival and what came."""

    def __init__(self, size: int = WINDOW_JOBS) -> None:
        self._pairs: deque[tuple[Quantiles, float]] = deque(maxlen=size)
        self._losses: deque[float] = deque(maxlen=_DRIFT_JOBS)

    def add(self, quantiles: Quantiles, length_tokens: int) -> None:
        """Score one prediction made at arrival; the length is the true one."""
        self._pairs.append((quantiles, float(length_tokens)))
        logs = np.log(np.array([quantiles], dtype=np.float32))
        target = np.array([math.log(max(length_tokens, 1))], dtype=np.float32)
        self._losses.append(float(pinball(logs, target)[0]))

    def forget_drift(self) -> None:
        """Start the drift's window anew: a new model answers for its own predictions only."""
        self._losses.clear()

    def is_drifting(self, expected_loss: float) -> bool:
        """Say whether the newest losses are clearly above `expected_loss` (NaN: unknown)."""
        losses = list(self._losses)
        if len(losses) < _MIN_DRIFT_JOBS or not math.isfinite(expected_loss):
            return False
        error = float(np.std(losses)) / math.sqrt(len(losses))
        return float(np.mean(losses)) - 2 * error > expected_loss * _DRIFT_RATIO

    def figures(self, expected_loss: float) -> Quality:
        """Return the window's figures."""
        drifting, pairs = self.is_drifting(expected_loss), list(self._pairs)
        if len(pairs) < 2:
            return Quality(len(pairs), math.nan, math.nan, math.nan, math.nan, drifting)
        predicted = np.array([quantiles for quantiles, _ in pairs])
        lengths = np.array([length for _, length in pairs])
        return Quality(
            jobs=len(pairs),
            tau_b=tau_b(predicted[:, _P50], lengths),
            mae_tokens=float(np.abs(predicted[:, _P50] - lengths).mean()),
            p50_coverage=float((lengths <= predicted[:, _P50]).mean()),
            p90_coverage=float((lengths <= predicted[:, _P90]).mean()),
            is_drifting=drifting,
        )


def tau_b(predicted: np.typing.ArrayLike, lengths: np.typing.ArrayLike) -> float:
    """Return Kendall's tau-b; NaN when either is constant."""
    return float(kendalltau(predicted, lengths).statistic)
