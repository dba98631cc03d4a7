"""Samples to bytes and back: features as half-precision numbers, never token ids or text."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from alise_scheduler.answer_features import ANSWER_WIDTH
from alise_scheduler.prompt_encoder import ENCODING_WIDTH
from alise_scheduler.prompt_features import BAG_BUCKETS, PROMPT_WIDTH, PromptFeatures
from alise_scheduler.ridge import Bag
from alise_scheduler.training import Sample, Snapshot

LAYOUT_VERSION: Final = 6
"""Raise it when a feature changes its meaning or place, or a model its form."""

_HEADER: Final = struct.Struct("<III")
"""Output tokens (0: the prompt), buckets in the bag, width of the encoding (0: none)."""


class SampleBlobError(ValueError):
    """The bytes are no sample of this layout."""


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A finished job as it is kept in memory, stored and sent."""

    features: bytes
    output_tokens: int
    is_censored: bool


def encode(sample: Sample) -> EncodedSample:
    """Return `sample` with its features as bytes."""
    prompt = sample.prompt
    parts = [_part(0, prompt.dense.astype(np.float16), prompt.bag, prompt.encoding)]
    parts += [_part(s.output_tokens, s.dense, s.bag, None) for s in sample.snapshots]
    return EncodedSample(b"".join(parts), sample.output_tokens, sample.is_censored)


def decode(encoded: EncodedSample) -> Sample:
    """Return the sample of `encode`.

    Raises:
        SampleBlobError: anything that is not as written.
    """
    blob = encoded.features
    parts: list[tuple[int, npt.NDArray[np.float16], Bag]] = []
    encoding: npt.NDArray[np.float32] | None = None
    start, width = 0, PROMPT_WIDTH
    while start < len(blob) or not parts:
        if len(blob) < start + _HEADER.size:
            raise SampleBlobError("cut header")
        tokens, count, encoding_width = _HEADER.unpack_from(blob, start)
        start += _HEADER.size
        bag_end = start + 2 * (width + count)
        end = bag_end + 2 * encoding_width
        if len(blob) < end:
            raise SampleBlobError("cut features")
        dense = np.frombuffer(blob, np.float16, width, start)
        bag = np.frombuffer(blob, np.uint16, count, start + 2 * width)
        if not np.isfinite(dense).all() or (count and int(bag.max()) >= BAG_BUCKETS):
            raise SampleBlobError("values out of range")
        if encoding_width:
            encoding = np.frombuffer(blob, np.float16, encoding_width, bag_end).astype(np.float32)
            if parts or encoding_width != ENCODING_WIDTH or not np.isfinite(encoding).all():
                raise SampleBlobError("no encoding of a prompt")
        parts.append((tokens, dense, bag))
        start, width = end, ANSWER_WIDTH
    prompt = PromptFeatures(parts[0][1].astype(np.float32), parts[0][2], encoding)
    snapshots = tuple(Snapshot(*part) for part in parts[1:])
    return Sample(prompt, snapshots, encoded.output_tokens, encoded.is_censored)


def _part(
    output_tokens: int,
    dense: npt.NDArray[np.float16],
    bag: Bag,
    encoding: npt.NDArray[np.float32] | None,
) -> bytes:
    halves = b"" if encoding is None else encoding.astype(np.float16).tobytes()
    header = _HEADER.pack(output_tokens, len(bag), len(halves) // 2)
    return header + dense.tobytes() + bag.astype(np.uint16).tobytes() + halves
