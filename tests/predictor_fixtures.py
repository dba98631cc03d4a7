"""A small vocabulary, and conversations whose lengths follow a rule that can be learned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from alise_scheduler.evaluation import Conversation
from alise_scheduler.predictor import Outcome, Predictor, PredictorSettings, PromptInput
from alise_scheduler.token_table import DIMENSIONS

BASE_TEXTS = [b"", b"", b"user", b"assistant", b"\n", b".", b"?", b"1", b"-", b"```"]
WORDS = ["essay", "list", "name", "define"]
FILLER = ["".join(p) for p in itertools.product("bcdfg", "aeiou", "lmnr")]
TEXTS = BASE_TEXTS + [f" {w}".encode() for w in WORDS + FILLER]
VOCABULARY = len(TEXTS)
START, END, USER, ASSISTANT, NEWLINE = 0, 1, 2, 3, 4
FIRST_WORD = len(BASE_TEXTS)
FIRST_FILLER = FIRST_WORD + len(WORDS)
MEAN_LENGTH = {"essay": 300, "list": 120, "name": 20, "define": 50}
OTHER_MEAN_LENGTH = {"essay": 20, "list": 50, "name": 300, "define": 120}


def table_arrays(seed: int = 0) -> dict[str, Any]:
    """Return the arrays of a valid token table."""
    rng = np.random.default_rng(seed)
    offsets = np.zeros(VOCABULARY + 1, dtype=np.int64)
    np.cumsum([len(t) for t in TEXTS], out=offsets[1:])
    embedding = rng.normal(size=(VOCABULARY, DIMENSIONS)) / DIMENSIONS**0.5
    return {
        "embedding": embedding.astype(np.float16),
        "meaning": embedding[::-1].astype(np.float16),
        "text_bytes": np.frombuffer(b"".join(TEXTS), dtype=np.uint8),
        "text_offsets": offsets,
        "source_sha256": np.full(32, seed, dtype=np.uint8),
        "format_version": np.int64(2),
    }


def write_table(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a token table; `changes` replace arrays, None leaves one out."""
    arrays = {k: v for k, v in {**table_arrays(seed), **changes}.items() if v is not None}
    np.savez(path, **arrays)
    return path


def prompt_input(ids: list[int], max_tokens: int = 0, **changes: Any) -> PromptInput:
    """Return a prompt of these ids."""
    fields: dict[str, Any] = {
        "token_ids": np.array(ids, dtype=np.int32),
        "prompt_tokens": len(ids),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "stop_strings": 0,
        "lora_name": "",
    }
    return PromptInput(**{**fields, **changes})


def conversation(
    rng: np.random.Generator, scale: float = 1.0, mean_length: dict[str, int] = MEAN_LENGTH
) -> Conversation:
    """Return one: the first word of the prompt sets the length, the answer's first words hint."""
    word = int(rng.integers(len(WORDS)))
    filler = rng.integers(FIRST_FILLER, VOCABULARY, size=int(rng.integers(4, 12))).tolist()
    ids = [START, USER, NEWLINE, FIRST_WORD + word, *filler, END, START, ASSISTANT, NEWLINE]
    is_long = bool(rng.integers(2))
    mean = mean_length[WORDS[word]] * scale * (1.6 if is_long else 0.6)
    length = max(int(mean * rng.lognormal(0.0, 0.2)), 1)
    opening = [FIRST_FILLER + (1 if is_long else 2)] * 6
    answer = [*opening, *rng.integers(FIRST_FILLER, VOCABULARY, size=length).tolist()][:length]
    return Conversation(prompt_input(ids), tuple(answer))


def conversations(
    count: int, seed: int = 0, scale: float = 1.0, mean_length: dict[str, int] = MEAN_LENGTH
) -> list[Conversation]:
    """Return `count` of them."""
    rng = np.random.default_rng(seed)
    return [conversation(rng, scale, mean_length) for _ in range(count)]


def finish(
    predictor: Predictor, one: Conversation, outcome: Outcome = Outcome.COMPLETE, cut: int = 0
) -> None:
    """Let one job arrive, be predicted, and end (after `cut` tokens, if set)."""
    job = predictor.track(one.prompt)
    predictor.predict([job])
    answer = one.answer_ids[: cut or len(one.answer_ids)]
    job.extend(answer, len(answer))
    predictor.observe(job, outcome)


def taught(table: Path, count: int = 150, **settings: Any) -> Predictor:
    """Return a predictor with a model."""
    predictor = Predictor(PredictorSettings(**settings))
    predictor.load_token_table(table)
    for one in conversations(count):
        finish(predictor, one)
    assert predictor.train_now()
    return predictor
