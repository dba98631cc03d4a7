"""The lines of an answer so far: list items, their numbers, headings, and how fast they come.

What is left of a structured answer shows in its structure: item 3 of the 10 that were asked for,
40 tokens an item. Pure arithmetic on table rows, over many jobs at once; does not know lengths.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.token_table import PROPERTY_OF, TokenTable
from alise_scheduler.written_numbers import LARGEST, numbers

Array = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CONTEXT_TOKENS: Final = 4
"""Old tokens that new ones are read with: a list's number may span them."""

# What is kept of each answer, by column. Positions count tokens of the answer from 0.
_SEEN, _ITEMS, _BULLETS, _HEADINGS, _BOLDS, _DIGITS, _MARKED, _COLONS, _LINES, _FENCES = range(10)
_NUMBER, _LAST_NEWLINE, _LAST_ITEM, _LAST_MARKED, _LONGEST = range(10, 15)
_FIRST_NEWLINE, _FIRST_ITEM, _FIRST_MARKED = range(15, 18)
_SUMS: Final = slice(_ITEMS, _NUMBER)
_NONE_YET: Final = 1 << 30
NO_MARKS: Final = np.array([0] * 11 + [-1] * 4 + [_NONE_YET] * 3, dtype=np.int64)

_NEWLINE: Final = PROPERTY_OF["newline"]
_DIGIT: Final = PROPERTY_OF["digit"]
_COLON: Final = PROPERTY_OF["colon"]
_FENCE: Final = PROPERTY_OF["fence"]
_MARKS: Final = [PROPERTY_OF[name] for name in ("bullet", "heading", "bold", "digit")]
# An item's number may stand behind "**" or "Step".
_NUMBER_PLACES: Final = 3

# Columns of `line_features` that `projected` reads.
_LAST_NUMBER, _PACE, _SINCE = range(3)
LINE_FEATURES: Final = 21


def fold_lines(
    marks: Ints, rows: Ints, kinds: npt.NDArray[np.uint8], starts: Ints, table: TokenTable
) -> Ints:
    """Return `marks` [jobs, columns] after the jobs' new tokens.

    `rows` [n] holds for each job, from its place in `starts` on, a row that is no token, then its
    last `CONTEXT_TOKENS` old tokens, then the new ones; `kinds` [n] are the rows' properties.
    """
    skipped = CONTEXT_TOKENS + 1
    count, index = len(rows), np.arange(len(rows))
    sizes = np.diff(np.append(starts, count))
    job = np.repeat(np.arange(len(starts)), sizes)
    place = index - starts[job] - skipped
    is_new = place >= 0
    position = marks[job, _SEEN] + place
    newline = (kinds[:, _NEWLINE] > 0) & is_new
    before = np.empty(count, dtype=np.int64)
    before[0] = -1
    before[1:] = np.maximum.accumulate(np.where(newline, index, -1))[:-1]
    line_start = np.where(before >= starts[job], position[before], marks[job, _LAST_NEWLINE]) + 1
    offset = position - line_start

    begins_line = (offset == 0) & is_new
    kind = (kinds[:, _MARKS] > 0) & begins_line[:, None]
    marked = kind.any(1)
    digit = kinds[:, _DIGIT] > 0
    values, goes_on = numbers(rows, table)
    opens = digit & ~goes_on & (offset >= 0) & (offset < _NUMBER_PLACES)
    opens &= ~((offset >= 1) & _shifted(digit, 1)) & ~((offset >= 2) & _shifted(digit, 2))
    second = goes_on & _shifted(opens, 1)
    is_number = (opens | second | (goes_on & _shifted(second, 1))) & is_new
    opens &= is_new
    colon = newline & ((kinds[:, _COLON] > 0) | _shifted(kinds[:, _COLON] > 0, 1))

    result: Ints = marks.copy()
    result[:, _SEEN] += sizes - skipped
    fence = (kinds[:, _FENCE] > 0) & is_new
    flags = np.column_stack((opens, kind, marked, colon, newline, fence))
    result[:, _SUMS] += np.add.reduceat(flags, starts, dtype=np.int64)
    newest = np.maximum.reduceat(np.where(is_number, index, -1), starts)
    numbered = newest >= 0
    result[numbered, _NUMBER] = np.minimum(values[newest[numbered]], LARGEST + 1)
    for column, flag, value in (
        (_LAST_NEWLINE, newline, position),
        (_LAST_ITEM, opens, position),
        (_LAST_MARKED, marked, position),
        (_LONGEST, newline, offset),
    ):
        largest = np.maximum.reduceat(np.where(flag, value, -1), starts)
        result[:, column] = np.maximum(result[:, column], largest)
    for column, flag in (
        (_FIRST_NEWLINE, newline),
        (_FIRST_ITEM, opens),
        (_FIRST_MARKED, marked),
    ):
        smallest = np.minimum.reduceat(np.where(flag, position, _NONE_YET), starts)
        result[:, column] = np.minimum(result[:, column], smallest)
    return result


def line_features(marks: Ints) -> Array:
    """Return float32 [jobs, LINE_FEATURES] of `marks`: counts and distances in log(1 + tokens)."""
    m = marks.astype(np.float32).T
    seen, items, marked, lines = m[_SEEN], m[_ITEMS], m[_MARKED], m[_LINES]
    current = seen - 1 - m[_LAST_NEWLINE]
    logs = (
        m[_NUMBER],
        _pace(seen, items, m[_FIRST_ITEM], m[_LAST_ITEM]),
        np.where(items > 0, seen - m[_LAST_ITEM], seen),
        items,
        *m[_BULLETS : _DIGITS + 1],
        marked,
        _pace(seen, marked, m[_FIRST_MARKED], m[_LAST_MARKED]),
        np.where(marked > 0, seen - m[_LAST_MARKED], seen),
        np.minimum(m[_FIRST_MARKED], seen),
        lines,
        seen / (lines + 1),
        np.maximum(m[_LONGEST], current),
        current,
        np.minimum(m[_FIRST_NEWLINE], seen),
        m[_COLONS],
    )
    shares = (marked / (lines + 1), m[_FENCES] % 2, m[_FENCES] > 0)
    return np.stack((*np.log1p(logs), *shares), axis=1).astype(np.float32)


def projected(lines: Array, log_asked: Array) -> Array:
    """Return float32 [n, 3]: log tokens left, items left, and whether there is such a projection.

    It is the pace so far, for the items still missing of those asked for. `lines` as of
    `line_features`, `log_asked` [n] is log(1 + items asked for), 0 for none.
    """
    number, pace, since = np.expm1(lines[:, [_LAST_NUMBER, _PACE, _SINCE]].T)
    asked = np.expm1(log_asked)
    is_list = (asked > 0.5) & (number > 0.5) & (number < asked + 0.5)
    missing = np.where(is_list, asked - number, 0.0)
    left = np.where(is_list, np.maximum(missing * pace + pace - since, 1.0), 0.0)
    return np.stack((np.log1p(left), np.log1p(missing), is_list), axis=1).astype(np.float32)


def _pace(seen: Array, count: Array, first: Array, last: Array) -> Array:
    """Return tokens from one to the next; with a single one, so far."""
    one = np.where(count > 0, seen - first, 0.0)
    return np.where(count > 1, (last - first) / np.maximum(count - 1, 1), one).astype(np.float32)


def _shifted(flags: npt.NDArray[np.bool_], by: int) -> npt.NDArray[np.bool_]:
    """Return for each place the flag of the place `by` before it."""
    result = np.zeros_like(flags)
    result[by:] = flags[:-by]
    return result
