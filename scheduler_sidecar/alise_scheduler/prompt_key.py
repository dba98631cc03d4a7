"""The key by which benchmarks and tests recognize a prompt without keeping its text.

Pure. Only the oracle and recorded answers use it; predictions do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def prompt_key(token_ids: Sequence[int] | npt.NDArray[np.int32], prompt_tokens: int) -> str:
    """Return the SHA-256 (hex) of a prompt as the contract carries it.

    Args:
        token_ids: `Prompt.token_ids`: all of a short prompt, the first and last 512 of a longer.
        prompt_tokens: `Prompt.prompt_tokens`, the full length.

    Hashed are the ids and then the length, each as a little-endian 32-bit unsigned integer.
    """
    words = np.append(np.asarray(token_ids, dtype="<u4"), np.uint32(prompt_tokens))
    return hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()
