"""Features of an answer so far: running sums over its tokens, kept for each job in progress.

Pure arithmetic on table rows. Tokens are folded in batches over many jobs, as single folds would
cost more than the prediction. Does not know lengths or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from alise_scheduler.answer_lines import (
    CONTEXT_TOKENS,
    LINE_FEATURES,
    NO_MARKS,
    fold_lines,
    line_features,
)
from alise_scheduler.prompt_features import BAG_BUCKETS, bag_buckets
from alise_scheduler.token_table import PROPERTY_NAMES, TokenTable

_PROPERTIES: Final = len(PROPERTY_NAMES)
LINES: Final = slice(1, 1 + LINE_FEATURES)
ANSWER_WIDTH: Final = LINES.stop + _PROPERTIES

_NO_TOKEN: Final = -1


@dataclass(slots=True)
class AnswerState:
    """Running sums over the tokens of one answer that have been seen."""

    output_tokens: int = 0
    seen_tokens: int = 0
    pending: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=lambda: [_NO_TOKEN] * CONTEXT_TOKENS)  # the last rows
    sums: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(_PROPERTIES, dtype=np.float32)
    )  # of the tokens' properties
    bag: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(BAG_BUCKETS, dtype=np.bool_)
    )
    marks: npt.NDArray[np.int64] = field(default_factory=NO_MARKS.copy)  # of its lines

    def extend(self, new_token_ids: Sequence[int], output_tokens: int) -> None:
        """Note tokens; the last of `new_token_ids` is number `output_tokens` of the answer."""
        fresh = output_tokens - self.output_tokens
        if fresh <= 0:
            return
        self.pending.extend(new_token_ids[-fresh:])
        self.output_tokens = output_tokens


def fold(states: Sequence[AnswerState], table: TokenTable) -> None:
    """Take the pending tokens of all `states` into their sums."""
    states = [state for state in states if state.pending]
    if not states:
        return
    # Each job's part begins with a row that is no token and its last old tokens.
    parts = [[_NO_TOKEN, *state.tail, *state.pending] for state in states]
    sizes = np.array([len(part) for part in parts])
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    rows = table.rows(np.fromiter(chain.from_iterable(parts), np.int64, int(sizes.sum())))
    kinds = table.properties.take(rows, axis=0)
    old = starts[:, None] + np.arange(CONTEXT_TOKENS + 1)
    is_new = np.ones(len(rows), dtype=np.bool_)
    is_new[old] = False
    fresh = kinds[is_new].astype(np.float32)
    added = sizes - (CONTEXT_TOKENS + 1)
    ends = np.concatenate(([0], np.cumsum(added)))
    # A sparse product adds up rows several times as fast as np.add.reduceat.
    ones = np.ones(len(fresh), dtype=np.float32)
    sums = csr_matrix((ones, np.arange(len(fresh)), ends), (len(states), len(fresh))) @ fresh
    marks = fold_lines(np.array([state.marks for state in states]), rows, kinds, starts, table)
    # A word's bucket and its pair's, side by side: a job's are one slice.
    buckets = bag_buckets(table.word_hash[rows])[:, is_new].T.astype(np.intp).ravel()
    tails = rows[(starts + sizes)[:, None] - np.arange(CONTEXT_TOKENS, 0, -1)].tolist()
    # Into arrays of their own: a slice would keep the whole batch alive as long as its job.
    for state, add, lines, tail, count, end in zip(
        states, sums, marks, tails, added.tolist(), ends[1:].tolist(), strict=True
    ):
        state.sums += add
        state.bag[buckets[2 * (end - count) : 2 * end]] = True
        state.marks[:] = lines
        state.tail = tail
        state.seen_tokens += count
        state.pending.clear()


def answer_features(
    states: Sequence[AnswerState], table: TokenTable | None
) -> npt.NDArray[np.float32]:
    """Return float32 [len(states), ANSWER_WIDTH]; folds what is pending first."""
    dense = np.zeros((len(states), ANSWER_WIDTH), dtype=np.float32)
    dense[:, 0] = np.log1p([state.output_tokens for state in states])
    if table is None or not states:
        return dense
    fold(states, table)
    dense[:, LINES] = line_features(np.array([state.marks for state in states]))
    seen = np.array([[max(state.seen_tokens, 1)] for state in states], dtype=np.float32)
    dense[:, LINES.stop :] = np.array([state.sums for state in states]) / seen
    return dense


def answer_bag(state: AnswerState) -> npt.NDArray[np.uint16]:
    """Return the buckets of the words and word pairs that have been seen."""
    return np.flatnonzero(state.bag).astype(np.uint16)
