"""XGBoost quantile regression of log-lengths, with a correction of its coverage.

Pure given its inputs. Trees are few and shallow, so that a single row predicts fast and a few
hundred samples suffice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost

from alise_scheduler.lengths import QUANTILE_LEVELS
from alise_scheduler.trees import DEPTH, Trees, flatten

Array = npt.NDArray[np.float32]

_FOLDS: Final = 4
_TREES: Final = 60


@dataclass(frozen=True, slots=True)
class QuantileModel:
    """Quantiles of log-lengths at `QUANTILE_LEVELS`."""

    trees: Trees
    shifts: Array  # [levels], added to the trees' quantiles

    def predict(self, rows: Array) -> Array:
        """Return float32 [n, levels], ascending in each row."""
        return np.sort(self.trees.predict(rows) + self.shifts, axis=1)


def fit_quantiles(
    rows: Array, target: Array, groups: npt.NDArray[np.int64], rng: np.random.Generator
) -> tuple[QuantileModel, Array]:
    """Fit on `rows` [n, width], rising with the first column; return also held-out quantiles.

    The coverage is corrected on folds that part the `groups`, and so are the quantiles held out.
    """
    unique = np.unique(groups)
    fold_of = dict(zip(unique.tolist(), rng.permutation(len(unique)) % _FOLDS, strict=True))
    fold = np.array([fold_of[group] for group in groups.tolist()])
    held_out = np.zeros((len(rows), len(QUANTILE_LEVELS)), dtype=np.float32)
    for number in range(_FOLDS):
        test = fold == number
        if test.any() and not test.all():
            booster = _train(rows[~test], target[~test])
            held_out[test] = booster.inplace_predict(rows[test]).reshape(-1, len(QUANTILE_LEVELS))
    errors = target[:, None] - held_out
    shifts = np.array(
        [np.quantile(errors[:, i], level) for i, level in enumerate(QUANTILE_LEVELS)],
        dtype=np.float32,
    )
    trees = flatten(_train(rows, target), rows.shape[1], len(QUANTILE_LEVELS))
    return QuantileModel(trees, shifts), np.sort(held_out + shifts, axis=1)


def _train(rows: Array, target: Array) -> Any:
    parameters = {
        "objective": "reg:quantileerror",
        "quantile_alpha": list(QUANTILE_LEVELS),
        "tree_method": "hist",
        "max_bin": 64,
        "max_depth": DEPTH,
        "monotone_constraints": (1,) + (0,) * (rows.shape[1] - 1),
        "eta": 0.09,
        "subsample": 0.7,
        "min_child_weight": max(8.0, math.sqrt(len(rows)) / 2),
        "reg_lambda": 5.0,
        "nthread": 1,
        "seed": 1,
    }
    return xgboost.train(
        parameters, xgboost.QuantileDMatrix(rows, target, max_bin=64, nthread=1), _TREES
    )


def pinball(log_quantiles: Array, target: Array) -> Array:
    """Return the mean pinball loss over the levels, for each row."""
    levels = np.array(QUANTILE_LEVELS, dtype=np.float32)
    error = target[:, None] - log_quantiles
    result: Array = np.maximum(levels * error, (levels - 1) * error).mean(1)
    return result
