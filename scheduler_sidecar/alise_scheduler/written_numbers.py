"""Numbers in a text, put together from tokens: many tokenizers give each digit one of its own.

Pure; does not know what the numbers count.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.token_table import PROPERTY_OF, TokenTable

LARGEST: Final = 99
"""No list asks for more items."""

_CAP: Final = 1_000_000
_DIGIT: Final = PROPERTY_OF["digit"]
_CHARACTERS: Final = PROPERTY_OF["characters"]


def numbers(
    rows: npt.NDArray[np.int64], table: TokenTable
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return the value of the number that ends with each token (0: none), and which go on one.

    `rows` [n] are rows of `table`; of "1", "0" the values are 1 and 10, and the second goes on.
    """
    values = table.number[rows].astype(np.int64)
    goes_on = table.is_digits[rows]
    goes_on[1:] &= table.properties[rows[:-1], _DIGIT] > 0
    goes_on[:1] = False
    for i in np.flatnonzero(goes_on).tolist():
        shifted = values[i - 1] * 10 ** min(int(table.properties[rows[i], _CHARACTERS]), 6)
        values[i] = min(shifted + values[i], _CAP)
    return values, goes_on


def first_count(rows: npt.NDArray[np.int64], table: TokenTable) -> int:
    """Return the first number from 2 to `LARGEST` ("ten ideas", "in 3 sentences"); 0: none."""
    values, goes_on = numbers(rows, table)
    ends = np.append(~goes_on[1:], True) if len(rows) else goes_on
    found = np.flatnonzero(ends & (values >= 2) & (values <= LARGEST))
    return int(values[found[0]]) if len(found) else 0
