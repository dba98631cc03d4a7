"""Retrieval: the lengths of the most similar past prompts.

A plain matrix product over a bounded set of stored, projected rows: at a few thousand rows it
is faster than any index. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

NEIGHBOURS: Final = 12
MAX_STORED: Final = 2048
RETRIEVAL_WIDTH: Final = 4
_PROJECTED: Final = 64


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Stored prompts, projected to unit vectors, with their log-lengths."""

    mean: Array
    projection: Array  # [width, _PROJECTED]
    stored: Array  # [m, _PROJECTED]
    target: Array  # [m]

    def features(self, rows: Array, own: npt.NDArray[np.int64] | None = None) -> Array:
        """Return float32 [n, RETRIEVAL_WIDTH]: mean, spread, nearest and similarity of neighbours.

        `own` gives the stored index of each row (-1: none), so that a row never retrieves itself.
        """
        centered: Array = rows - self.mean
        similarity = _unit(centered @ self.projection) @ self.stored.T
        if own is not None:
            has = np.flatnonzero(own >= 0)
            similarity[has, own[has]] = -2.0
        count = min(NEIGHBOURS, similarity.shape[1])
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        close = np.take_along_axis(similarity, nearest, axis=1)
        lengths = self.target[nearest]
        weight = np.exp(8.0 * (close - close.max(1, keepdims=True)))
        weight /= weight.sum(1, keepdims=True)
        mean = (weight * lengths).sum(1)
        spread = np.sqrt((weight * np.square(lengths - mean[:, None])).sum(1))
        best = np.take_along_axis(lengths, close.argmax(1)[:, None], axis=1)[:, 0]
        return np.stack([mean, spread, best, close.max(1)], axis=1).astype(np.float32)


def fit_retrieval(rows: Array, target: Array) -> tuple[Retrieval, Array]:
    """Store the newest `MAX_STORED` of `rows`; return the features of all, each without itself."""
    mean = rows.mean(0)
    deviation = rows.std(0)
    scale = np.where(deviation > 1e-4, 1.0 / np.maximum(deviation, 1e-4), 0.0)
    centered = (rows - mean) * scale
    moment = centered.T @ centered / len(rows)
    _, axes = np.linalg.eigh(moment.astype(np.float64))
    projection = (axes[:, ::-1][:, :_PROJECTED] * scale[:, None]).astype(np.float32)
    kept = slice(max(len(rows) - MAX_STORED, 0), len(rows))
    stored = _unit((rows[kept] - mean) @ projection)
    retrieval = Retrieval(mean.astype(np.float32), projection, stored, target[kept].copy())
    own = np.arange(len(rows)) - kept.start
    return retrieval, retrieval.features(rows, own)


def _unit(vectors: npt.NDArray[np.floating[Any]]) -> Array:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units: Array = (vectors / np.maximum(norms, 1e-6)).astype(np.float32)
    return units
