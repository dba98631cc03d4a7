"""Retrieval: the lengths of the most similar past prompts.

A plain matrix product over a bounded set of stored, projected rows: at a few thousand rows it
is faster than any index. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

NEIGHBOURS: Final = 12
MAX_STORED: Final = 1024
RETRIEVAL_WIDTH: Final = 4
_PROJECTED: Final = 64
_SHARPNESS: Final = np.float32(8.0)
_ROWS_AT_ONCE: Final = 128


@dataclass(frozen=True, slots=True)
class Retrieval:
    """Stored prompts, projected to unit vectors, with their log-lengths."""

    projection: Array  # [width, _PROJECTED]
    center: Array  # [_PROJECTED], of the mean
    stored: Array  # [_PROJECTED, m]
    target: Array  # [m]

    def features(self, rows: Array, own: npt.NDArray[np.int64] | None = None) -> Array:
        """Return float32 [n, RETRIEVAL_WIDTH]: mean, spread, nearest and similarity of neighbours.

        `own` gives the stored index of each row (-1: none), so that a row never retrieves itself.
        """
        parts = range(0, len(rows), _ROWS_AT_ONCE)
        return np.concatenate(
            [
                self._features(
                    rows[i : i + _ROWS_AT_ONCE], None if own is None else own[i : i + _ROWS_AT_ONCE]
                )
                for i in parts
            ]
        )

    def _features(self, rows: Array, own: npt.NDArray[np.int64] | None) -> Array:
        similarity = _unit(rows @ self.projection - self.center) @ self.stored
        if own is not None:
            has = np.flatnonzero(own >= 0)
            similarity[has, own[has]] = -2.0
        count = min(NEIGHBOURS, similarity.shape[1])
        nearest = similarity.argpartition(similarity.shape[1] - count, axis=1)[:, -count:]
        close = similarity[np.arange(len(rows))[:, None], nearest]
        lengths = self.target[nearest]
        weight = np.exp(_SHARPNESS * close)
        total = weight.sum(1)
        mean = (weight * lengths).sum(1) / total
        variance = (weight * np.square(lengths - mean[:, None])).sum(1) / total
        best = close.argmax(1)
        every = np.arange(len(rows))
        return np.stack((mean, np.sqrt(variance), lengths[every, best], close[every, best]), axis=1)


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
    retrieval = Retrieval(
        projection, mean @ projection, np.ascontiguousarray(stored.T), target[kept].copy()
    )
    own = np.arange(len(rows)) - kept.start
    return retrieval, retrieval.features(rows, own)


def _unit(vectors: Array) -> Array:
    norms = np.sqrt(np.square(vectors).sum(1, keepdims=True))
    units: Array = vectors / np.maximum(norms, np.float32(1e-6))
    return units
