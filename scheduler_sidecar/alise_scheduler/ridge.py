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
BagMatrix = npt.NDArray[np.bool_]

_MAX_BUCKETS: Final = 600
_BAG_WEIGHT: Final = 0.5
_LINEAR_WEIGHT: Final = 0.5
_BLOCK_WIDTH: Final = 0.25
_JOINT_WIDTH: Final = 0.5
_PENALTIES: Final = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_RANKS: Final = np.linspace(0.0, 1.0, 41)
_JITTER: Final = 1e-3
_ROWS_AT_ONCE: Final = 128
"""A block of kernels that stays in the cache."""


@dataclass(frozen=True, slots=True)
class Ridge:
    """A fitted model: ranks of the target, about 0 to 1, from rows and bags."""

    blocks: tuple[tuple[int, int], ...]
    mean: Array
    scale: Array  # of each column: 1 / (deviation * sqrt(width of its block)); 0 for constants
    landmarks: Array  # [width, m], scaled
    landmark_norms: Array  # [blocks, m]
    weights: Array  # [m]
    linear: Array  # [columns of the first block]
    buckets: npt.NDArray[np.int64]  # those that count
    bag_weights: Array  # [len(buckets), 2]: weight times idf, square of idf
    targets: Array  # [len(_RANKS)], the target at these ranks
    intercept: float

    def predict(self, rows: Array, bags: BagMatrix) -> Array:
        """Return ranks, float32 [n], of `rows` [n, width] and `bags` [n, BAG_BUCKETS]."""
        parts = range(0, len(rows), _ROWS_AT_ONCE)
        return np.concatenate(
            [self._ranks(rows[i : i + _ROWS_AT_ONCE], bags[i : i + _ROWS_AT_ONCE]) for i in parts]
        )

    def _ranks(self, rows: Array, bags: BagMatrix) -> Array:
        scaled = (rows - self.mean) * self.scale
        value = _kernel(scaled, self.landmarks, self.landmark_norms, self.blocks) @ self.weights
        value += scaled[:, slice(*self.blocks[0])] @ self.linear
        words = bags.take(self.buckets, axis=1).astype(np.float32) @ self.bag_weights
        value += words[:, 0] / np.sqrt(np.maximum(words[:, 1], 1e-12))
        value += np.float32(self.intercept)
        return value

    def to_target(self, ranks: Array) -> Array:
        """Return the target at `ranks`; those beyond 0 and 1 give the extremes."""
        result: Array = np.interp(ranks, _RANKS, self.targets).astype(np.float32)
        return result


def bag_matrix(bags: Sequence[Bag]) -> BagMatrix:
    """Return bool [len(bags), BAG_BUCKETS]: which buckets are in which bag."""
    matrix = np.zeros((len(bags), BAG_BUCKETS), dtype=np.bool_)
    for row, bag in zip(matrix, bags, strict=True):
        row[bag] = True
    return matrix


def _norms(scaled: Array, blocks: tuple[tuple[int, int], ...]) -> Array:
    return np.stack([np.square(scaled[:, a:b]).sum(1) for a, b in blocks])


def _kernel(
    scaled: Array, landmarks: Array, landmark_norms: Array, blocks: tuple[tuple[int, int], ...]
) -> Array:
    """Return the Gaussian kernels of the blocks and of all blocks together, added, [n, m]."""
    shape = (len(blocks) + 1, len(scaled), landmarks.shape[1])
    exponents = np.empty(shape, dtype=np.float32)
    own = -_BLOCK_WIDTH * _norms(scaled, blocks)
    others = -_BLOCK_WIDTH * landmark_norms
    for number, (a, b) in enumerate(blocks):
        part = exponents[number]
        np.matmul(scaled[:, a:b] * np.float32(2 * _BLOCK_WIDTH), landmarks[a:b], out=part)
        part += others[number]
        part += own[number][:, None]
    # Far from everything seen a block says nothing; the clip also keeps exp() normal.
    each, joint = exponents[:-1], exponents[-1]
    np.clip(each, -100.0 * _BLOCK_WIDTH, 0.0, out=each)
    each.sum(0, out=joint)
    joint *= _JOINT_WIDTH / _BLOCK_WIDTH
    np.maximum(joint, -50.0, out=joint)
    np.exp(exponents, out=exponents)
    total: Array = exponents.sum(0)
    return total


def fit_ridge(
    rows: Array,
    bags: BagMatrix,
    target: Array,
    groups: npt.NDArray[np.int64],
    strata: npt.NDArray[np.int64],
    blocks: tuple[tuple[int, int], ...],
    max_landmarks: int,
    rng: np.random.Generator,
) -> tuple[Ridge, Array]:
    """Fit on `rows` [n, width]; return the model and ranks predicted without each row's group.

    `groups` [n] ascend: rows of one job are next to each other. A rank is among the rows of the
    same number in `strata` [n]. The penalty is the one with the least squared error out of group.
    """
    mean, scale = _standardization(rows, blocks)
    scaled = (rows - mean) * scale
    chosen = np.sort(rng.permutation(len(rows))[:max_landmarks])
    landmarks = np.ascontiguousarray(scaled[chosen].T)
    norms = _norms(scaled[chosen], blocks)
    parts = range(0, len(rows), _ROWS_AT_ONCE)
    cross = np.vstack(
        [_kernel(scaled[i : i + _ROWS_AT_ONCE], landmarks, norms, blocks) for i in parts]
    ).astype(np.float64)
    lower = np.linalg.cholesky(cross[chosen] + _JITTER * np.eye(len(chosen)))
    half = solve_triangular(lower, np.eye(len(chosen)), lower=True).T
    buckets, idf = _inverse_frequency(bags)
    first = scaled[:, slice(*blocks[0])] * np.sqrt(_LINEAR_WEIGHT)
    design = np.hstack([cross @ half, first, _words(bags, buckets, idf)])
    center = design.mean(0)
    ranks = _ranks(target, strata)
    intercept = float(ranks.mean())
    coefficients, held_out = _solve(design - center, ranks - intercept, groups)
    kernel_end, linear_end = len(chosen), len(chosen) + first.shape[1]
    bag_weights = coefficients[linear_end:] * idf * np.sqrt(_BAG_WEIGHT)
    model = Ridge(
        blocks=blocks,
        mean=mean,
        scale=scale,
        landmarks=landmarks,
        landmark_norms=norms,
        weights=(half @ coefficients[:kernel_end]).astype(np.float32),
        linear=(coefficients[kernel_end:linear_end] * np.sqrt(_LINEAR_WEIGHT)).astype(np.float32),
        buckets=buckets,
        bag_weights=np.stack((bag_weights, np.square(idf)), axis=1).astype(np.float32),
        targets=np.quantile(target, _RANKS).astype(np.float32),
        intercept=intercept - float(center @ coefficients),
    )
    return model, (held_out + intercept).astype(np.float32)


def _ranks(target: Array, strata: npt.NDArray[np.int64]) -> Array:
    """Return the rank of each target in its stratum, 0 to 1; equal targets share theirs."""
    ranks = np.empty(len(target), dtype=np.float32)
    for stratum in np.unique(strata):
        own = strata == stratum
        ordered = np.sort(target[own])
        low = np.searchsorted(ordered, target[own])
        ranks[own] = (low + np.searchsorted(ordered, target[own], side="right")) / (2 * own.sum())
    return ranks


def _standardization(rows: Array, blocks: tuple[tuple[int, int], ...]) -> tuple[Array, Array]:
    deviation = rows.std(0)
    scale = np.zeros_like(deviation)
    for a, b in blocks:
        varies = deviation[a:b] > 1e-4
        scale[a:b][varies] = 1.0 / (deviation[a:b][varies] * np.sqrt(varies.sum()))
    return rows.mean(0), scale


def _inverse_frequency(bags: BagMatrix) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the buckets found in most bags, ascending, and their inverse document frequency."""
    counts = bags.sum(0)
    frequent = np.argsort(-counts, kind="stable")[:_MAX_BUCKETS]
    frequent = np.sort(frequent[counts[frequent] >= 2])
    idf = np.log((len(bags) + 1) / (counts[frequent] + 1)).astype(np.float32)
    return frequent[idf > 0], idf[idf > 0]


def _words(bags: BagMatrix, buckets: npt.NDArray[np.int64], idf: Array) -> npt.NDArray[np.float64]:
    """Return the bags' cosine features, [n, len(buckets)]."""
    matrix = bags[:, buckets] * idf
    norms = np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)
    result: npt.NDArray[np.float64] = (matrix / norms * np.sqrt(_BAG_WEIGHT)).astype(np.float64)
    return result


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
