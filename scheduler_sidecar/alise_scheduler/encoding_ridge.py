"""From a prompt's encoding to a length: a linear ridge beside what other features say.

An encoding is a language model's own reading of the prompt, so a linear map says most of what it
knows. The rank that other features give goes in beside it: it is all there is where the encoder
knows nothing of a language or a domain. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from alise_scheduler.ridge import ranks_of
from alise_scheduler.ridge_solver import solve_ridge

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EncodingRidge:
    """A fitted model: ranks of the target from encodings, and from ranks by other features."""

    mean: Array  # [ENCODING_WIDTH + 1]: the encoding, and the other rank
    scale: Array
    weights: Array
    intercept: float

    def predict(self, encodings: Array, others: Array) -> Array:
        """Return ranks [n], of `encodings` [n, ENCODING_WIDTH] and the ranks by `others` [n]."""
        columns: Array = np.column_stack((encodings, others))
        scaled: Array = (columns - self.mean) * self.scale
        ranks: Array = scaled @ self.weights + np.float32(self.intercept)
        return ranks


def fit_encoding_ridge(
    encodings: Array,
    others: Array,
    target: Array,
    groups: npt.NDArray[np.int64],
    strata: npt.NDArray[np.int64],
) -> tuple[EncodingRidge, Array]:
    """Fit on rows as for `predict`; return the model and ranks predicted without each row's group.

    `groups` and `strata` [n] are as for `fit_ridge`; `others` must be out of group, too.
    """
    columns = np.column_stack((encodings, others))
    mean, deviation = columns.mean(0), columns.std(0)
    # The encoding as a whole counts as much as the other rank.
    share = np.ones(columns.shape[1])
    share[:-1] /= np.sqrt(encodings.shape[1])
    scale = np.where(deviation > 1e-6, share / np.maximum(deviation, 1e-6), 0.0)
    ranks = ranks_of(target, strata)
    intercept = float(ranks.mean())
    design = ((columns - mean) * scale).astype(np.float64)
    weights, held_out = solve_ridge(design, ranks - np.float32(intercept), groups)
    model = EncodingRidge(
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        weights=weights.astype(np.float32),
        intercept=intercept,
    )
    return model, (held_out + intercept).astype(np.float32)
