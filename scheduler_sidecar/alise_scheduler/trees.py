"""Boosted trees as flat arrays: all trees of a model are walked at once, without XGBoost.

A call of XGBoost costs a quarter of a millisecond before it looks at the first row; jobs arrive
one by one. Trees are padded to complete ones of `DEPTH` levels. Pure; gives XGBoost's own sums.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

DEPTH: Final = 3
_INNER: Final = 2**DEPTH - 1
_LEAVES: Final = 2**DEPTH
_ROWS_AT_ONCE: Final = 64


@dataclass(frozen=True, slots=True)
class Trees:
    """Complete trees; nodes are level by level, so that each level is one slice."""

    features: npt.NDArray[np.int64]  # [_INNER * trees], the column that a node looks at
    thresholds: Array  # [_INNER * trees, 1], below: left; infinite where there is no split
    leaves: Array  # [_LEAVES * trees], by number of the leaf from the left, then tree
    base: Array  # [outputs], the sum without trees; tree i adds to output i % outputs

    def predict(self, rows: Array) -> Array:
        """Return float32 [n, outputs]; `rows` float32 [n, columns] without NaN."""
        parts = range(0, len(rows), _ROWS_AT_ONCE)
        return np.concatenate([self._sums(rows[i : i + _ROWS_AT_ONCE]) for i in parts])

    def _sums(self, rows: Array) -> Array:
        trees = len(self.leaves) // _LEAVES
        goes_right = np.ascontiguousarray(rows.T).take(self.features, axis=0) >= self.thresholds
        node = goes_right.reshape(_INNER, trees, len(rows))
        # Bits instead of np.where: several times as fast on arrays of this size.
        first = node[0]
        second = node[1] ^ (first & (node[1] ^ node[2]))
        left = node[3] ^ (second & (node[3] ^ node[4]))
        right = node[5] ^ (second & (node[5] ^ node[6]))
        third = left ^ (first & (left ^ right))
        leaf = first * np.uint16(4) + second * np.uint16(2) + third
        leaf *= np.uint16(trees)
        leaf += np.arange(trees, dtype=np.uint16)[:, None]
        values = self.leaves.take(leaf).reshape(-1, len(self.base), len(rows))
        sums: Array = values.sum(0).T + self.base
        return sums


def flatten(booster: Any, columns: int, outputs: int) -> Trees:
    """Return the trees of an XGBoost `booster`, none deeper than `DEPTH`."""
    model = json.loads(booster.save_raw(raw_format="json"))["learner"]
    sources = model["gradient_booster"]["model"]["trees"]
    assert model["gradient_booster"]["model"]["tree_info"] == [
        i % outputs for i in range(len(sources))
    ]
    features = np.zeros((_INNER, len(sources)), dtype=np.int64)
    thresholds = np.full((_INNER, len(sources)), np.inf, dtype=np.float32)
    leaves = np.zeros((_LEAVES, len(sources)), dtype=np.float32)
    for number, tree in enumerate(sources):
        places = [0]  # the source's node for each of ours, level by level
        for place in range(_INNER):
            node = places[place]
            if tree["left_children"][node] < 0:
                places += [node, node]  # the threshold is infinite: only the left one is reached
                continue
            features[place, number] = tree["split_indices"][node]
            thresholds[place, number] = tree["split_conditions"][node]
            places += [tree["left_children"][node], tree["right_children"][node]]
        # XGBoost keeps a leaf's value where an inner node has its threshold.
        leaves[:, number] = [tree["split_conditions"][node] for node in places[_INNER:]]
    flat = Trees(
        features.ravel(), thresholds.reshape(-1, 1), leaves.ravel(), np.zeros(outputs, np.float32)
    )
    zeros = np.zeros((1, columns), dtype=np.float32)
    base = booster.inplace_predict(zeros).reshape(outputs) - flat.predict(zeros)[0]
    return Trees(flat.features, flat.thresholds, flat.leaves, base.astype(np.float32))
