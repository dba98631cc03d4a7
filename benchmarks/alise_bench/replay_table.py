"""The file of recorded answers that the replay processor reads: prompt key -> answer tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

REPLAY_FILE_VARIABLE: Final = "ALISE_BENCH_REPLAY_FILE"


def write_replay_table(answers: Mapping[str, Sequence[int]], path: Path) -> None:
    """Write answers (each ends with the end-of-sequence token) by prompt key, as .npz."""
    lengths = [len(answer) for answer in answers.values()]
    with path.open("wb") as file:
        np.savez(
            file,
            keys=np.array(list(answers), dtype="S64"),
            ends=np.cumsum(lengths, dtype=np.int64),
            tokens=np.array([t for answer in answers.values() for t in answer], dtype=np.uint32),
        )


def read_replay_table(path: Path) -> dict[str, tuple[int, ...]]:
    """Return what `write_replay_table` wrote."""
    with np.load(path, allow_pickle=False) as file:
        keys, ends, tokens = file["keys"], file["ends"], file["tokens"]
    parts = np.split(tokens, ends[:-1])
    return {
        key.decode(): tuple(part.tolist()) for key, part in zip(keys.tolist(), parts, strict=True)
    }
