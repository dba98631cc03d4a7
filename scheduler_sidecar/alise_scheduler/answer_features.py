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

from alise_scheduler.prompt_features import BAG_BUCKETS, bag_buckets
from alise_scheduler.token_table import PROPERTY_NAMES, PROPERTY_OF, TokenTable

ANSWER_DIMENSIONS: Final = 128
LAST_TOKENS: Final = 16
_PROPERTIES: Final = len(PROPERTY_NAMES)
STRUCTURE: Final = 5
ANSWER_LEXICAL: Final = STRUCTURE + 3 * _PROPERTIES
ANSWER_WIDTH: Final = ANSWER_LEXICAL + ANSWER_DIMENSIONS

_NEWLINE: Final = PROPERTY_OF["newline"]
_DIGIT: Final = PROPERTY_OF["digit"]
_BULLET: Final = PROPERTY_OF["bullet"]
_HEADING: Final = PROPERTY_OF["heading"]


@dataclass(slots=True)
class AnswerState:
    """Running sums over the tokens of one answer that have been seen."""

    output_tokens: int = 0
    seen_tokens: int = 0
    pending: list[int] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)  # rows of the last tokens
    # Of the tokens' properties and embeddings.
    sums: npt.NDArray[np.float32] = field(
        default_factory=lambda: np.zeros(_PROPERTIES + ANSWER_DIMENSIONS, dtype=np.float32)
    )
    bag: npt.NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros(BAG_BUCKETS, dtype=np.bool_)
    )
    list_items: int = 0
    list_number: int = 0
    line_tokens: int = 0

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
    # Each job's part begins with its last old token: a list item is known by the newline before.
    parts = [
        [state.tail[-1] if state.tail else table.vocabulary, *state.pending] for state in states
    ]
    sizes = np.array([len(part) for part in parts])
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    rows = table.rows(np.fromiter(chain.from_iterable(parts), dtype=np.int64))
    kinds = table.properties[rows]
    is_old = np.zeros(len(rows), dtype=np.bool_)
    is_old[starts] = True
    new_line = kinds[:, _NEWLINE] > 0
    item = (kinds[:, _DIGIT] | kinds[:, _BULLET] | kinds[:, _HEADING]) > 0
    item[1:] &= new_line[:-1]
    item &= ~is_old
    number = np.where(item, table.number[rows], 0)
    position = np.where(new_line & ~is_old, np.arange(len(rows)), -1)
    fresh = np.empty((len(rows), _PROPERTIES + ANSWER_DIMENSIONS), dtype=np.float32)
    fresh[:, :_PROPERTIES] = kinds
    fresh[:, _PROPERTIES:] = table.embedding[rows, :ANSWER_DIMENSIONS]
    fresh[is_old] = 0.0
    sums = np.add.reduceat(fresh, starts)
    items = np.add.reduceat(item.astype(np.int64), starts).tolist()
    numbers = np.maximum.reduceat(number, starts).tolist()
    last_newline = np.maximum.reduceat(position, starts).tolist()
    # A word's bucket and its pair's, side by side: a job's are one slice.
    buckets = bag_buckets(table.word_hash[rows]).T.astype(np.intp).ravel()
    row_list, size_list = rows.tolist(), sizes.tolist()
    for index, (state, start, size) in enumerate(
        zip(states, starts.tolist(), size_list, strict=True)
    ):
        state.sums += sums[index]
        state.bag[buckets[2 * (start + 1) : 2 * (start + size)]] = True
        state.list_items += items[index]
        state.list_number = numbers[index] or state.list_number
        newest = last_newline[index]
        state.line_tokens = (
            start + size - 1 - newest if newest >= 0 else state.line_tokens + size - 1
        )
        state.tail = [*state.tail, *row_list[start + 1 : start + size]][-LAST_TOKENS:]
        state.seen_tokens += size - 1
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
    dense[:, 1:STRUCTURE] = np.log1p(
        [
            (state.list_items, state.list_number, state.line_tokens, state.seen_tokens)
            for state in states
        ]
    )
    seen = np.array([[max(state.seen_tokens, 1)] for state in states], dtype=np.float32)
    sums = np.array([state.sums for state in states])
    counts = sums[:, :_PROPERTIES]
    tails = [state.tail or [table.vocabulary] for state in states]
    starts = np.concatenate(([0], np.cumsum([len(tail) for tail in tails])[:-1]))
    rows = np.fromiter(chain.from_iterable(tails), dtype=np.int64)
    # Cast first: reduceat with a type of its own goes through buffers.
    last = np.add.reduceat(table.properties[rows].astype(np.float32), starts)
    end = STRUCTURE
    for block in (np.log1p(counts), counts / seen, last):
        dense[:, end : end + _PROPERTIES] = block
        end += _PROPERTIES
    dense[:, end:] = sums[:, _PROPERTIES:] / seen
    return dense


def answer_bag(state: AnswerState) -> npt.NDArray[np.uint16]:
    """Return the buckets of the words and word pairs that have been seen."""
    return np.flatnonzero(state.bag).astype(np.uint16)
