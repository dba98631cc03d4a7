"""Prompts and recorded answers: reading, tokenizing, splitting.

A row of a data set is `{"id", "messages": [{"role", "content"}...], "response"}` (`response` is
needed in recorded mode only). This module does not know how answers are replayed or judged.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from alise_bench.errors import BenchError
from alise_bench.keys import key_of


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a data set."""

    id: str
    messages: tuple[tuple[str, str], ...]
    """(role, content), oldest first."""
    response: str | None


@dataclass(frozen=True, slots=True)
class Item:
    """A conversation in the served model's tokens."""

    id: str
    key: str
    """`key_of` the prompt: what answers and true lengths are looked up by."""
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """With the end-of-sequence token; empty when unknown."""
    conversation: Conversation

    @property
    def output_tokens(self) -> int:
        """Return the true output length, tokens."""
        return len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class Split:
    """The prompts of one repeat: what is asked, and what the predictor was trained on."""

    test: tuple[Item, ...]
    train: tuple[Item, ...]


def packaged_dataset() -> Path:
    """Return the prompt set that ships with the package (no answers: natural mode)."""
    return Path(str(resources.files("alise_bench") / "data" / "prompts.jsonl"))


def load_dataset(path: Path, *, need_response: bool) -> tuple[Conversation, ...]:
    """Read a JSONL data set, dropping repeated prompts (the first stays).

    Raises `BenchError` naming file, line and what is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"--dataset {path}: {error}") from error
    unique: dict[tuple[tuple[str, str], ...], Conversation] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = _conversation(json.loads(line), number, need_response=need_response)
            except (ValueError, KeyError, TypeError) as error:
                raise BenchError(f"--dataset {path}, line {number}: {_reason(error)}") from error
            unique.setdefault(row.messages, row)
    if not unique:
        raise BenchError(f"--dataset {path}: no rows in it")
    return tuple(unique.values())


def _reason(error: Exception) -> str:
    return f"no field {error}" if isinstance(error, KeyError) else str(error)


def _conversation(row: Any, number: int, *, need_response: bool) -> Conversation:
    if not isinstance(row, dict):
        raise TypeError(f"a JSON object is needed, this is a {type(row).__name__}")
    messages = tuple((_text(m, "role"), _text(m, "content")) for m in row["messages"])
    if not messages:
        raise ValueError("`messages` is empty")
    response = _text(row, "response") if need_response else row.get("response")
    return Conversation(str(row.get("id", number)), messages, response)


def _text(mapping: dict[str, Any], field: str) -> str:
    value = mapping[field]
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{field}` must be a text that is not empty")
    return value


@dataclass(frozen=True, slots=True)
class Tokenized:
    """The usable rows, and how many were left out for which reason."""

    items: tuple[Item, ...]
    left_out: dict[str, int]


def tokenize(
    rows: Sequence[Conversation],
    tokenizer: Any,
    *,
    max_model_len: int,
    max_tokens: int,
    with_answers: bool,
) -> Tokenized:
    """Render each row with the model's chat template (`tokenizer` is a transformers tokenizer).

    A row is left out if its prompt and `max_tokens` exceed the context, if its answer exceeds
    `max_tokens` or holds special tokens (it would end early), or if its key is not unique.
    """
    items: dict[str, Item] = {}
    left_out: Counter[str] = Counter()
    special = set(tokenizer.all_special_ids)
    for row in rows:
        answer: tuple[int, ...] = ()
        if with_answers:
            assert row.response is not None, "load_dataset(need_response=True) checks this"
            answer = tuple(tokenizer.encode(row.response, add_special_tokens=False))
        prompt = _prompt_ids(row, tokenizer)
        key = key_of(prompt)
        if len(prompt) + max_tokens > max_model_len:
            left_out["prompt and --max-tokens exceed the context"] += 1
        elif len(answer) + 1 > max_tokens:
            left_out["answer exceeds --max-tokens"] += 1
        elif not special.isdisjoint(answer):
            left_out["answer holds special tokens"] += 1
        elif key in items:
            left_out["same prompt key as another row"] += 1
        else:
            ids = (*answer, tokenizer.eos_token_id) if with_answers else ()
            items[key] = Item(row.id, key, prompt, ids, row)
    return Tokenized(tuple(items.values()), dict(left_out))


def _prompt_ids(row: Conversation, tokenizer: Any) -> tuple[int, ...]:
    messages = [{"role": role, "content": content} for role, content in row.messages]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def split_for_repeat(items: Sequence[Item], test_size: int, repeat: int, seed: int) -> Split:
    """Return the split of one repeat: `test_size` prompts to ask, all others to train on.

    One seeded order of all prompts; each repeat asks the next `test_size` of it (around the
    end), so repeats ask different prompts as long as there are enough. No prompt is in both
    parts. Raises `BenchError` if fewer than a quarter would be left to train on.
    """
    if test_size > len(items) * 3 // 4:
        raise BenchError(
            f"--requests {test_size} is too many: the data set has {len(items)} usable prompts, "
            f"and a quarter must be left to train the predictor (at most {len(items) * 3 // 4})"
        )
    order = np.random.default_rng(seed).permutation(len(items))
    turned = [items[int(i)] for i in np.roll(order, -repeat * test_size)]
    return Split(test=tuple(turned[:test_size]), train=tuple(turned[test_size:]))


def write_training_file(items: Sequence[Item], path: Path) -> None:
    """Write `items` as the JSONL that `alise predictor train` reads (prompts and answers)."""
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            messages = [{"role": r, "content": c} for r, c in item.conversation.messages]
            row = {"id": item.id, "messages": messages, "response": item.conversation.response}
            file.write(json.dumps(row) + "\n")


def fingerprint(items: Sequence[Item]) -> str:
    """Return a digest of prompts and answers: resuming must meet the same data."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(item.key.encode())
        digest.update(np.asarray(item.answer_ids, dtype="<u4").tobytes())
    return digest.hexdigest()[:16]
