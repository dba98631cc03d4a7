"""Features of a prompt: numbers about it, sums over its tokens, a hashed bag of its words.

Pure. Everything is a look-up of token ids in the token table and a sum; without a table only the
numeric features are set. Does not know lengths or models.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.token_table import (
    DIMENSIONS,
    PROPERTY_NAMES,
    PROPERTY_OF,
    TokenTable,
    widened,
)
from alise_scheduler.written_numbers import first_count

NUMERIC: Final = 13
ASKED: Final = 12
"""Column: log(1 + the number of items or sentences that the prompt seems to ask for)."""
LEXICAL: Final = NUMERIC + 2 * len(PROPERTY_NAMES)
PROMPT_WIDTH: Final = LEXICAL + 3 * DIMENSIONS
BAG_BUCKETS: Final = 4096
"""Two to the twelfth: buckets are the upper 12 bits of a hash."""

# How fast the opening's weight falls from token to token: what is to be done is said first.
_OPENING_TOKENS: Final = 8.0
_OPENING: Final = np.exp(-np.arange(64, dtype=np.float32) / _OPENING_TOKENS)

_MAX_BAG: Final = 512
_MAX_ROLE_TOKENS: Final = 4
_SPECIAL: Final = PROPERTY_OF["special"]
_SPACE: Final = PROPERTY_OF["space"]
_BIGRAM: Final = np.uint32(0x9E3779B1)
_OPENING_WORDS: Final = 3
_OPENING_SALT: Final = np.uint32(0x51ED270B)


@dataclass(frozen=True, slots=True)
class PromptInput:
    """What the contract's `Prompt` says of a prompt."""

    token_ids: npt.NDArray[np.int32]
    """All ids of a short prompt; the first and the last 512 of a longer one."""
    prompt_tokens: int
    max_tokens: int
    """0: unbounded."""
    temperature: float
    stop_strings: int
    lora_name: str


@dataclass(frozen=True, slots=True)
class PromptFeatures:
    """`dense` float32 [PROMPT_WIDTH]; `bag` uint16, sorted bucket numbers without repeats."""

    dense: npt.NDArray[np.float32]
    bag: npt.NDArray[np.uint16]
    encoding: npt.NDArray[np.float32] | None = None
    """[ENCODING_WIDTH], by the prompt encoder; None before it has come."""


def prompt_features(prompt: PromptInput, table: TokenTable | None) -> PromptFeatures:
    """Return the features of `prompt`; finite for any ids."""
    dense = np.zeros(PROMPT_WIDTH, dtype=np.float32)
    dense[:7] = _request_numbers(prompt)
    ids = prompt.token_ids
    lora = _lora_buckets(prompt.lora_name)
    if table is None or not len(ids):
        return PromptFeatures(dense, lora)
    rows = table.rows(ids)
    properties = table.properties[rows]
    spans = content_spans(rows, properties, table)
    start, end = spans[-1]
    own = rows[start:end]
    dense[7:ASKED] = _structure(spans, len(rows))
    dense[ASKED] = math.log1p(first_count(own, table))
    counts = np.ones(end - start, dtype=np.float32) @ properties[start:end].astype(np.float32)
    dense[NUMERIC:LEXICAL] = np.concatenate((np.log1p(counts), counts / len(own)))
    weight = table.weight[own]
    opening = _OPENING[: len(own)]
    head = own[: len(opening)]
    meaning = widened(table.meaning[own])
    vectors = (
        opening @ widened(table.embedding[head]) / opening.sum(),
        weight @ meaning / max(float(weight.sum()), 1e-6),
        opening @ meaning[: len(head)] / opening.sum(),
    )
    dense[LEXICAL:] = np.concatenate(vectors)
    bag = hashed_bag(table.word_hash[own])
    return PromptFeatures(dense, np.union1d(bag, lora) if len(lora) else bag)


def _request_numbers(prompt: PromptInput) -> tuple[float, ...]:
    temperature = prompt.temperature if math.isfinite(prompt.temperature) else 0.0
    lora = zlib.crc32(prompt.lora_name.encode()) % 997 / 997 if prompt.lora_name else -1.0
    return (
        math.log1p(max(prompt.prompt_tokens, 0)),
        math.log1p(max(prompt.max_tokens, 0)),
        float(prompt.max_tokens <= 0),
        min(max(temperature, 0.0), 4.0),
        float(temperature <= 0.0),
        float(min(max(prompt.stop_strings, 0), 16)),
        lora,
    )


def _lora_buckets(name: str) -> npt.NDArray[np.uint16]:
    if not name:
        return np.empty(0, dtype=np.uint16)
    return np.array([zlib.crc32(b"lora:" + name.encode()) % BAG_BUCKETS], dtype=np.uint16)


def content_spans(
    rows: npt.NDArray[np.int64], properties: npt.NDArray[np.uint8], table: TokenTable
) -> list[tuple[int, int]]:
    """Return (start, end) of each message of the prompt, in order; at least one.

    Special tokens part the messages. A role's name in front is cut off, and parts that are only
    a role or white space (the template's own) are left out, the generation prompt among them.
    """
    edges = [-1, *np.flatnonzero(properties[:, _SPECIAL]).tolist(), len(rows)]
    spaces = properties[:, _SPACE]
    spans = []
    for before, end in pairwise(edges):
        start = before + 1
        if start < end and table.begins_role[rows[start]]:
            line_end = start + 1
            while line_end < end and not spaces[line_end]:
                line_end += 1
            if line_end - start <= _MAX_ROLE_TOKENS:
                start = line_end
        while start < end and spaces[start]:
            start += 1
        if start < end:
            spans.append((start, end))
    return spans or [(0, len(rows))]


def _structure(spans: list[tuple[int, int]], total: int) -> tuple[float, ...]:
    lengths = [end - start for start, end in spans]
    return (
        math.log1p(lengths[-1]),
        float(min(len(lengths), 32)),
        # In a conversation the message before the user's last is the last answer.
        math.log1p(lengths[-2]) if len(lengths) > 2 else -1.0,
        math.log1p(sum(lengths[1::2]) / max(len(lengths[1::2]), 1)),
        lengths[-1] / total,
    )


def hashed_bag(word_hash: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Return the sorted buckets of the words, their pairs, and the opening words by place."""
    words = word_hash[word_hash != 0][:_MAX_BAG]
    opening = words[:_OPENING_WORDS] * _OPENING_SALT + np.arange(
        min(len(words), _OPENING_WORDS), dtype=np.uint32
    )
    buckets = np.concatenate((bag_buckets(words).ravel(), _bucket(opening)))
    buckets.sort()
    is_new = np.ones(len(buckets), dtype=np.bool_)
    np.not_equal(buckets[1:], buckets[:-1], out=is_new[1:])
    return buckets[is_new]


def bag_buckets(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    """Return uint16 [2, len(words)]: buckets of each word, and of its pair with the one before."""
    pairs = words.copy()
    pairs[1:] ^= words[:-1] * _BIGRAM
    return _bucket(np.concatenate((words, pairs))).reshape(2, -1)


def _bucket(hashes: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint16]:
    mixed: npt.NDArray[np.uint32] = hashes * np.uint32(2654435761) >> np.uint32(20)
    return mixed.astype(np.uint16)
