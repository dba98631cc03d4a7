"""Vectors of what tokens mean, the same for every served model: WordLlama's static embeddings.

A served model's own embeddings say how it uses a token; these were trained to tell sentences of
like meaning, which predicts lengths where there are few samples. Does not know the served model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

DIMENSIONS: Final = 256


def token_meanings(texts: Sequence[bytes]) -> npt.NDArray[np.float16]:
    """Return float16 [len(texts), 256] of the tokens' surface texts; zeros for white space.

    The weights come with the package; nothing is downloaded.
    """
    import wordllama

    # Named as the cache: in its own folder the package looks for the tokenizer under a wrong name.
    package = Path(wordllama.__file__).parent
    model = wordllama.WordLlama.load(dim=DIMENSIONS, cache_dir=package, disable_download=True)
    # Without their spaces: the tokenizer puts one before each text itself.
    words = [text.decode("utf-8", "replace").strip() for text in texts]
    named = np.array([bool(word) for word in words], dtype=np.bool_)
    vectors = np.zeros((len(words), DIMENSIONS), dtype=np.float16)
    vectors[named] = model.embed([word for word in words if word])
    return vectors
