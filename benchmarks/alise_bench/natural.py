"""Natural mode: the model's own answers, made once and kept.

They train the predictor (prompts that are not asked) and are the true lengths that the oracles
are told. Greedy decoding depends a little on the batch, so a later answer may differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alise_bench.client import Answer
from alise_bench.dataset import Item


def answers_to_json(items: Sequence[Item], answers: Sequence[Answer]) -> dict[str, Any]:
    """Return the answers by prompt key, without those that failed or are empty."""
    return {
        item.key: {"token_ids": answer.token_ids, "text": answer.text}
        for item, answer in zip(items, answers, strict=True)
        if answer.row.error is None and answer.text.strip()
    }


def with_answers(items: Sequence[Item], file: Path) -> tuple[Item, ...]:
    """Return the items that have an answer in `file`, with it."""
    answers = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        dataclasses.replace(
            item,
            answer_ids=tuple(answers[item.key]["token_ids"]),
            conversation=dataclasses.replace(item.conversation, response=answers[item.key]["text"]),
        )
        for item in items
        if item.key in answers
    )
