"""The token table of the served model: reads the engine's file and looks at each token once.

Whatever features need of a token (its embedding, its kind, a hash of its word) is a row look-up
here, so that feature extraction never touches text. Does not know prompts or answers.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

FORMAT_VERSION: Final = 2
DIMENSIONS: Final = 256
MAX_VOCABULARY: Final = 2_000_000
MAX_TEXT_BYTES: Final = 256 << 20

# Patterns over a token's surface text, one column of `TokenTable.properties` each.
_PATTERNS: Final[dict[str, re.Pattern[bytes]]] = {
    name: re.compile(pattern)
    for name, pattern in {
        "special": rb"^\Z",
        "space": rb"^\s+\Z",
        "newline": rb"\n",
        "paragraph": rb"\n\s*\n",
        "digit": rb"^\s*\d+\Z",
        "punctuation": rb"^\s*[^\w\s]+\s*\Z",
        "bullet": rb"^\s*(?:[-*+]|\xe2\x80\xa2)\Z",
        "bold": rb"\*\*",
        "fence": rb"```|~~~",
        "heading": rb"^\s*#{1,6}\Z",
        "question": rb"\?",
        "exclamation": rb"!",
        "colon": rb":",
        "comma": rb",",
        "stop": rb"\.(?!\w)",
        "quote": rb"[\"']",
        "bracket": rb"[(){}\[\]<>=;_\\/]",
        "pipe": rb"\|",
        "capital": rb"^\s*[A-Z]",
        "shout": rb"^\s*[A-Z]{2,}\Z",
        "word": rb"^\s+[A-Za-z]",
        "long": rb"[a-z]{8,}",
        "foreign": rb"[\x80-\xff]",
    }.items()
}
PROPERTY_NAMES: Final = (*_PATTERNS, "characters")
PROPERTY_OF: Final = {name: index for index, name in enumerate(PROPERTY_NAMES)}
_ROLES: Final = (b"user", b"assistant", b"system", b"model", b"human", b"developer", b"tool")


_SIGN_AND_HALF: Final = np.int32(-(1 << 31) | 0x0FFFE000)
_NUMBER_WORDS: Final = {
    word: value
    for value, word in enumerate(
        b"one two three four five six seven eight nine ten eleven twelve".split(), start=1
    )
}


class TokenTableError(ValueError):
    """The file is no valid token table; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class TokenTable:
    """Per-token rows. The last row, index `vocabulary`, stands for any id out of range."""

    vocabulary: int
    embedding: npt.NDArray[np.float16]  # [vocabulary + 1, DIMENSIONS]
    meaning: npt.NDArray[np.float16]  # [vocabulary + 1, DIMENSIONS], alike for every served model
    properties: npt.NDArray[np.uint8]  # [vocabulary + 1, len(PROPERTY_NAMES)]
    word_hash: npt.NDArray[np.uint32]  # [vocabulary + 1], of the lower-cased word; 0: no word
    number: npt.NDArray[np.int32]  # [vocabulary + 1], of digits or a word up to "twelve", else 0
    is_digits: npt.NDArray[np.bool_]  # [vocabulary + 1], digits only, so it may go on a number
    weight: npt.NDArray[np.float32]  # [vocabulary + 1], how telling a token is; 0 for special ones
    begins_role: npt.NDArray[np.bool_]  # [vocabulary + 1], (part of) a chat role's name
    texts: tuple[bytes, ...]
    """[vocabulary + 1]; empty for special ones."""
    fingerprint: str
    """The same for the same model, wherever its table was made."""

    def rows(self, token_ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the row of each id; ids out of range share one row."""
        # Unsigned, negative ids are the largest.
        unsigned = np.ascontiguousarray(token_ids, dtype=np.int64).view(np.uint64)
        rows: npt.NDArray[np.int64] = np.minimum(unsigned, np.uint64(self.vocabulary)).view(
            np.int64
        )
        return rows


def read_token_table(path: Path) -> TokenTable:
    """Read and validate the token table at `path`.

    Raises:
        TokenTableError: missing, unreadable, too large, of another version or inconsistent.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {
                name: file[name]
                for name in file.files
                if file.zip.getinfo(f"{name}.npy").file_size
                <= MAX_VOCABULARY * DIMENSIONS * 2 + 1024
            }
    except Exception as error:
        raise TokenTableError(f"cannot read token table {path}: {error}") from error
    try:
        return _from_arrays(arrays)
    except KeyError as error:
        raise TokenTableError(f"token table {path} lacks the array {error}") from error
    except TokenTableError as error:
        raise TokenTableError(f"token table {path}: {error}") from error


def _from_arrays(arrays: dict[str, npt.NDArray[Any]]) -> TokenTable:
    version = arrays["format_version"]
    if version.ndim != 0 or version != FORMAT_VERSION:
        raise TokenTableError(f"format version {version}, expected {FORMAT_VERSION}")
    embedding, meaning, text = arrays["embedding"], arrays["meaning"], arrays["text_bytes"]
    offsets, digest = arrays["text_offsets"], arrays["source_sha256"]
    _check("embedding", embedding, np.float16, 2)
    _check("meaning", meaning, np.float16, 2)
    _check("text_bytes", text, np.uint8, 1)
    _check("text_offsets", offsets, np.int64, 1)
    _check("source_sha256", digest, np.uint8, 1)
    vocabulary, width = embedding.shape
    if not 0 < vocabulary <= MAX_VOCABULARY or width != DIMENSIONS:
        raise TokenTableError(f"embedding of shape {embedding.shape}")
    if meaning.shape != embedding.shape:
        raise TokenTableError(f"meaning of shape {meaning.shape}")
    if not np.isfinite(embedding).all() or not np.isfinite(meaning).all():
        raise TokenTableError("embedding or meaning holds values that are not finite")
    if len(text) > MAX_TEXT_BYTES or offsets.shape != (vocabulary + 1,):
        raise TokenTableError(f"text of {len(text)} bytes with {len(offsets)} offsets")
    if offsets[0] != 0 or offsets[-1] != len(text) or (np.diff(offsets) < 0).any():
        raise TokenTableError("text_offsets do not ascend from 0 to the end of text_bytes")
    if digest.shape != (32,):
        raise TokenTableError(f"source_sha256 of {len(digest)} bytes")
    blob, bounds = text.tobytes(), offsets.tolist()
    texts = [blob[a:b] for a, b in pairwise(bounds)]
    return _look_at(embedding, meaning, texts, digest.tobytes().hex()[:32])


def widened(halves: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Return finite `halves` as float32: as `astype`, five times as fast where NumPy has no F16C.

    The bits of sign, exponent and mantissa are put in their new places; 2^112 makes up for the
    difference of the exponents' biases, and is exact for denormals, too.
    """
    bits = halves.view(np.int16).astype(np.int32)
    bits <<= 13
    bits &= _SIGN_AND_HALF
    floats = bits.view(np.float32)
    floats *= np.float32(2.0**112)
    return floats


def _check(name: str, array: npt.NDArray[Any], dtype: type[np.generic], ndim: int) -> None:
    if array.dtype != dtype or array.ndim != ndim:
        raise TokenTableError(f"{name} has type {array.dtype} and {array.ndim} dimensions")


def _look_at(
    embedding: npt.NDArray[np.float16],
    meaning: npt.NDArray[np.float16],
    texts: list[bytes],
    source: str,
) -> TokenTable:
    texts = [*texts, b""]
    count = len(texts)
    properties = np.zeros((count, len(PROPERTY_NAMES)), dtype=np.uint8)
    for column, pattern in enumerate(_PATTERNS.values()):
        search = pattern.search
        properties[:, column] = [search(text) is not None for text in texts]
    properties[:, -1] = [min(len(text), 255) for text in texts]
    words = [text.strip().lower() for text in texts]
    numbers = [int(w) if len(w) <= 6 and w.isdigit() else _NUMBER_WORDS.get(w, 0) for w in words]
    # Byte-pair vocabularies are in order of merging, so a token's rank tells how common it is:
    # a smoothed inverse frequency (Arora et al. 2017) without counting anything. Common words
    # keep half their weight, as "how" and "list" say much about a length.
    frequency = 1.0 / (np.arange(count) + 100.0)
    weight = 0.5 + 0.5 * 1e-3 / (1e-3 + frequency / 2)
    return TokenTable(
        vocabulary=count - 1,
        embedding=np.vstack([embedding, np.zeros((1, DIMENSIONS), dtype=np.float16)]),
        meaning=np.vstack([meaning, np.zeros((1, DIMENSIONS), dtype=np.float16)]),
        properties=properties,
        word_hash=np.array([zlib.crc32(w) if w else 0 for w in words], dtype=np.uint32),
        number=np.array(numbers, dtype=np.int32),
        is_digits=np.array([t.isdigit() for t in texts]),
        weight=np.where(properties[:, 0], 0.0, weight).astype(np.float32),
        begins_role=np.array([len(t) > 1 and any(r.startswith(t) for r in _ROLES) for t in texts]),
        texts=tuple(texts),
        fingerprint=hashlib.sha256(f"{FORMAT_VERSION}:{source}".encode()).hexdigest()[:32],
    )
