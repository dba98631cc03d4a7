"""What JSON can hold of a report."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """Return `value` with None for each NaN, which JSON does not know, however deep."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
