"""XGBoost quantile regression of log-lengths, with a correction of its coverage.

The trees add to a plane in the first two columns: trees alone give many jobs the same quantiles,
and so lose the order that a rank in the first column gives them. Pure given its inputs. Trees are
few and shallow, so that a single row predicts fast and a few hundred samples suffice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import xgboost

from alise_scheduler.lengths import QUANTILE_LEVELS
from alise_scheduler.trees import Trees, flatten

Array = npt.NDArray[np.float32]

_FOLDS: Final = 4
_TREES: Final = 60


@dataclass(frozen=True, slots=True)
class QuantileModel:
    """Quantiles of log-lengths at `QUANTILE_LEVELS`."""

    plane: Array  # [3], the intercept and the slopes of the first two columns
    trees: Trees
    shifts: Array  # [levels], added to the trees' quantiles

    def predict(self, rows: Array) -> Array:
        """Return float32 [n, levels], ascending in each row."""
        quantiles = self.trees.predict(rows) + self.shifts + _on_plane(self.plane, rows)[:, None]
        return np.sort(quantiles, axis=1)


def fit_quantiles(
    rows: Array,
    target: Array,
    groups: npt.NDArray[np.int64],
    depth: int,
    rng: np.random.Generator,
) -> tuple[QuantileModel, Array]:
    """Fit on `rows` [n, width], trees of `depth`; return also held-out quantiles.

    `depth` is `trees.DEPTH` at most. The coverage is corrected on folds that part the `groups`, and
    so are the quantiles held out.
    """
    unique = np.unique(groups)
    fold_of = dict(zip(unique.tolist(), rng.permutation(len(unique)) % _FOLDS, strict=True))
    fold = np.array([fold_of[group] for group in groups.tolist()])
    held_out = np.zeros((len(rows), len(QUANTILE_LEVELS)), dtype=np.float32)
    for number in range(_FOLDS):
        test = fold == number
        if test.any() and not test.all():
            plane, booster = _train(rows[~test], target[~test], depth)
            added = booster.inplace_predict(rows[test]).reshape(-1, len(QUANTILE_LEVELS))
            held_out[test] = added + _on_plane(plane, rows[test])[:, None]
    errors = target[:, None] - held_out
    shifts = np.array(
        [np.quantile(errors[:, i], level) for i, level in enumerate(QUANTILE_LEVELS)],
        dtype=np.float32,
    )
    plane, booster = _train(rows, target, depth)
    trees = flatten(booster, rows.shape[1], len(QUANTILE_LEVELS))
    return QuantileModel(plane, trees, shifts), np.sort(held_out + shifts, axis=1)


def _on_plane(plane: Array, rows: Array) -> Array:
    values: Array = plane[0] + rows[:, :2] @ plane[1:]
    return values


def _train(rows: Array, target: Array, depth: int) -> tuple[Array, Any]:
    """Return the plane and the booster of what is left to add to it."""
    design = np.column_stack((np.ones(len(rows)), rows[:, :2].astype(np.float64)))
    plane = np.linalg.lstsq(design, target, rcond=None)[0].astype(np.float32)
    left = target - _on_plane(plane, rows)
    parameters = {
        "objective": "reg:quantileerror",
        "quantile_alpha": list(QUANTILE_LEVELS),
        "tree_method": "hist",
        "max_bin": 64,
        "max_depth": depth,
        "eta": 0.09,
        "subsample": 0.7,
        "min_child_weight": max(8.0, math.sqrt(len(rows)) / 2),
        "reg_lambda": 5.0,
        "nthread": 1,
        "seed": 1,
    }
    data = xgboost.QuantileDMatrix(rows, left, max_bin=64, nthread=1)
    return plane, xgboost.train(parameters, data, _TREES)


def pinball(log_quantiles: Array, target: Array) -> Array:
    """Return the mean pinball loss over the levels, for each row."""
    levels = np.array(QUANTILE_LEVELS, dtype=np.float32)
    error = target[:, None] - log_quantiles
    result: Array = np.maximum(levels * error, (levels - 1) * error).mean(1)
    return result
