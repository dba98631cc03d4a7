"""Kernel ridge regression over blocks of features and a hashed bag of words.

The kernel adds a Gaussian for each block of (standardized) columns, one over all blocks, a
linear part for the first block and the cosine of the bags (by inverse document frequency). Few
landmarks (Nystroem) keep a prediction at one small matrix product. What is regressed is the
target's rank: a squared error of log-lengths would be ruled by a few very short answers. Fitting
also gives out-of-group predictions in closed form, to be features of a second model (stacking).
Pure; does not know what the columns mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_triangular

from alise_scheduler.prompt_features import BAG_BUCKETS

Array = npt.NDArray[np.float32]
Bag = npt.NDArray[np.uint16]

_MAX_BUCKETS: Final = 600
_BAG_WEIGHT: Final = 0.5
_LINEAR_WEIGHT: Final = 0.5
_BLOCK_WIDTH: Final = 0.25
_JOINT_WIDTH: Final = 0.5
_PENALTIES: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_RANKS: Final = np.linspace(0.0, 1.0, 41)
_JITTER: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Ridge:
    """A fitted model: ranks of the target, about 0 to 1, from rows and bags."""

    blocks: tuple[tuple[int, int], ...]
    mean: Array
    scale: Array  # of each column: 1 / (deviation * sqrt(width of its block)); 0 for constants
    landmarks: Array  # [m, width], scaled
    landmark_norms: Array  # [blocks, m]
    weights: Array  # [m]
    linear: Array  # [columns of the first block]
    bag_idf: Array  # [BAG_BUCKETS], 0 for buckets that are not used
    bag_weights: Array  # [BAG_BUCKETS], times idf
    targets: Array  # [len(_RANKS)], the target at these ranks
    intercept: float

    def predict(self, rows: Array, bags: Sequence[Bag]) -> Array:
        """Return ranks, float32 [n]."""
        scaled = (rows - self.mean) * self.scale
        value = _kernel(scaled, self.landmarks, self.landmark_norms, self.blocks) @ self.weights
        value += scaled[:, slice(*self.blocks[0])] @ self.linear
        result: Array = value + self._words(bags) + np.float32(self.intercept)
        return result

    def _words(self, bags: Sequence[Bag]) -> Array:
        row = np.repeat(np.arange(len(bags)), [len(bag) for bag in bags])
        buckets = np.concatenate(bags)
        total = np.bincount(row, self.bag_weights[buckets], len(bags))
        norms = np.sqrt(np.bincount(row, np.square(self.bag_idf[buckets]), len(bags)))
        result: Array = (total / np.maximum(norms, 1e-6)).astype(np.float32)
        return result

    def to_target(self, ranks: Array) -> Array:
        """Return the target at `ranks`; those beyond 0 and 1 give the extremes."""
        result: Array = np.interp(ranks, _RANKS, self.targets).astype(np.float32)
        return result


def _norms(scaled: Array, blocks: tuple[tuple[int, int], ...]) -> Array:
    return np.stack([np.square(scaled[:, a:b]).sum(1) for a, b in blocks])


def _kernel(
    scaled: Array, landmarks: Array, landmark_norms: Array, blocks: tuple[tuple[int, int], ...]
) -> Array:
    """Return the Gaussian kernels of the blocks and of all blocks together, added, [n, m]."""
    joint = np.zeros((len(scaled), len(landmarks)), dtype=np.float32)
    total = np.zeros_like(joint)
    for (a, b), norms in zip(blocks, landmark_norms, strict=True):
        own = scaled[:, a:b]
        distance = own @ landmarks[:, a:b].T
        distance *= -2.0
        distance += norms
        distance += np.square(own).sum(1)[:, None]
        # Far from everything seen a block says nothing; the clip also keeps exp() normal.
        np.clip(distance, 0.0, 100.0, out=distance)
        joint -= distance
        distance *= -_BLOCK_WIDTH
        total += np.exp(distance, out=distance)
    joint *= _JOINT_WIDTH
    np.maximum(joint, -50.0, out=joint)
    total += np.exp(joint, out=joint)
    return total


def fit_ridge(
    rows: Array,
    bags: Sequence[Bag],
    target: Array,
    groups: npt.NDArray[np.int64],
    blocks: tuple[tuple[int, int], ...],
    max_landmarks: int,
    rng: np.random.Generator,
) -> tuple[Ridge, Array]:
    """Fit on `rows` [n, width]; return the model and ranks predicted without each row's group.

    `groups` ascend: rows of one job are next to each other. The penalty is the one with the
    least squared error out of group.
    """
    mean, scale = _standardization(rows, blocks)
    scaled = (rows - mean) * scale
    chosen = np.sort(rng.permutation(len(rows))[:max_landmarks])
    landmarks = scaled[chosen]
    norms = _norms(landmarks, blocks)
    cross = _kernel(scaled, landmarks, norms, blocks).astype(np.float64)
    lower = np.linalg.cholesky(cross[chosen] + _JITTER * np.eye(len(chosen)))
    half = solve_triangular(lower, np.eye(len(chosen)), lower=True).T
    idf = _inverse_frequency(bags)
    columns = np.flatnonzero(idf)
    first = scaled[:, slice(*blocks[0])] * np.sqrt(_LINEAR_WEIGHT)
    design = np.hstack([cross @ half, first, _bag_matrix(bags, idf, columns)])
    center = design.mean(0)
    ranks = _ranks(target)
    intercept = float(ranks.mean())
    coefficients, held_out = _solve(design - center, ranks - intercept, groups)
    kernel_end, linear_end = len(chosen), len(chosen) + first.shape[1]
    bag_weights = np.zeros(BAG_BUCKETS, dtype=np.float32)
    bag_weights[columns] = coefficients[linear_end:] * idf[columns] * np.sqrt(_BAG_WEIGHT)
    model = Ridge(
        blocks=blocks,
        mean=mean,
        scale=scale,
        landmarks=landmarks,
        landmark_norms=norms,
        weights=(half @ coefficients[:kernel_end]).astype(np.float32),
        linear=(coefficients[kernel_end:linear_end] * np.sqrt(_LINEAR_WEIGHT)).astype(np.float32),
        bag_idf=idf,
        bag_weights=bag_weights,
        targets=np.quantile(target, _RANKS).astype(np.float32),
        intercept=intercept - float(center @ coefficients),
    )
    return model, (held_out + intercept).astype(np.float32)


def _ranks(target: Array) -> Array:
    """Return the rank of each target among all, 0 to 1; equal targets share theirs."""
    ordered = np.sort(target)
    low, high = np.searchsorted(ordered, target), np.searchsorted(ordered, target, side="right")
    return ((low + high) / (2 * len(target))).astype(np.float32)


def _standardization(rows: Array, blocks: tuple[tuple[int, int], ...]) -> tuple[Array, Array]:
    deviation = rows.std(0)
    scale = np.zeros_like(deviation)
    for a, b in blocks:
        varies = deviation[a:b] > 1e-4
        scale[a:b][varies] = 1.0 / (deviation[a:b][varies] * np.sqrt(varies.sum()))
    return rows.mean(0), scale


def _inverse_frequency(bags: Sequence[Bag]) -> Array:
    counts = np.bincount(np.concatenate(bags), minlength=BAG_BUCKETS) if len(bags) else None
    idf = np.zeros(BAG_BUCKETS, dtype=np.float32)
    if counts is None:
        return idf
    frequent = np.argsort(-counts, kind="stable")[:_MAX_BUCKETS]
    frequent = frequent[counts[frequent] >= 2]
    idf[frequent] = np.log((len(bags) + 1) / (counts[frequent] + 1))
    return idf


def _bag_matrix(
    bags: Sequence[Bag], idf: Array, columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    matrix = np.zeros((len(bags), BAG_BUCKETS), dtype=np.float32)
    for row, bag in zip(matrix, bags, strict=True):
        own = idf[bag]
        row[bag] = own / max(float(np.linalg.norm(own)), 1e-6)
    result: npt.NDArray[np.float64] = matrix[:, columns] * np.sqrt(_BAG_WEIGHT)
    return result.astype(np.float64)


def _solve(
    design: npt.NDArray[np.float64], target: Array, groups: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return ridge coefficients and out-of-group predictions, by one eigendecomposition."""
    count, width = design.shape
    if count <= width:
        squares, left = np.linalg.eigh(design @ design.T)
    else:
        squares, right = np.linalg.eigh(design.T @ design)
        left = design @ right / np.sqrt(np.maximum(squares, 1e-9))
    kept = squares > 1e-7 * max(float(squares[-1]), 1e-12)
    squares, left = squares[kept], left[:, kept]
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), count]
    best: tuple[float, float, npt.NDArray[np.float64]] | None = None
    for penalty in _PENALTIES:
        held_out = _out_of_group(left, squares / (squares + penalty), target, edges)
        error = float(np.square(target - held_out).mean())
        if best is None or error < best[0]:
            best = (error, penalty, held_out)
    assert best is not None
    dual = left @ ((left.T @ target) / (squares + best[1]))
    return design.T @ dual, best[2]


def _out_of_group(
    left: npt.NDArray[np.float64],
    shrink: npt.NDArray[np.float64],
    target: Array,
    edges: list[int],
) -> npt.NDArray[np.float64]:
    # With the hat matrix H, the residuals of a left-out group g are (I - H_gg)^-1 (y - Hy)_g.
    residual = target - left @ (shrink * (left.T @ target))
    held_out = np.empty(len(target))
    weighted = left * shrink
    for a, b in pairwise(edges):
        hat = weighted[a:b] @ left[a:b].T
        held_out[a:b] = np.linalg.solve(np.eye(b - a) * (1 + 1e-9) - hat, residual[a:b])
    return target - held_out
