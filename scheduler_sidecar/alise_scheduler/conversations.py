"""Recorded conversations from JSON Lines to token ids, by the served model's own tokenizer.

A row is `{"messages": [{"role", "content"}, ...], "response": "..."}` or `{"prompt", "response"}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from alise_scheduler.evaluation import Conversation
from alise_scheduler.predictor import PromptInput
from alise_scheduler.prompt_encoder import PromptEncoder, encoder_model
from alise_scheduler.prompt_messages import prompt_messages
from alise_scheduler.token_table import read_token_table

_EDGE_TOKENS: Final = 512


class ConversationsError(ValueError):
    """The file or the model cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file."""

    messages: list[dict[str, str]]
    response: str


def read_rows(path: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of `path` and, for each bad line, its number and what is wrong with it.

    Raises:
        ConversationsError: the file cannot be read.
    """
    rows, problems = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    rows.append(_parse(json.loads(line)))
                except (ValueError, RecursionError) as error:
                    problems.append(f"line {number}: {error}")
    except OSError as error:
        raise ConversationsError(f"cannot read {path}: {error.strerror}") from error
    return rows, problems


def _parse(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    if not isinstance(messages, list) or not messages:
        raise ValueError('neither a list "messages" nor a string "prompt"')
    for message in messages:
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError('a message without a string "role" and "content"')
    if not isinstance(row.get("response"), str):
        raise ValueError('no string "response"')
    return Row([{k: m[k] for k in ("role", "content")} for m in messages], row["response"])


def load_tokenizer(model_dir: Path) -> Any:
    """Return the tokenizer of the model in `model_dir`.

    Raises:
        ConversationsError: transformers is missing, or there is no tokenizer.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConversationsError(
            "this needs transformers: install the extra, pip install 'alise[cpu]'"
        ) from error
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:
        raise ConversationsError(f"no tokenizer in {model_dir}: {error}") from error


def build_table(model_dir: Path, destination: Path) -> None:
    """Write the token table of the model in `model_dir`, as the engine does.

    Raises:
        ConversationsError: the engine's package is missing, or no table can be made.
    """
    try:
        from alise_engine.token_table import TokenTableUnavailable, build_token_table

        build_token_table(model_dir, destination)
    except ImportError as error:
        raise ConversationsError(
            f"this needs the engine's packages ({error.name} is missing): install the extra,"
            " pip install 'alise[cpu]'"
        ) from error
    except TokenTableUnavailable as error:
        raise ConversationsError(f"no token table: {error}") from error


def tokenize(
    rows: list[Row], tokenizer: Any, on_row: Callable[[], Any] = lambda: None
) -> list[Conversation]:
    """Return the rows as the engine would see them; an answer ends with one end-of-text token."""
    conversations = []
    for row in rows:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                row.messages, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer("\n\n".join(m["content"] for m in row.messages))["input_ids"]
        answer = tokenizer(row.response, add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        conversations.append(
            Conversation(_prompt(ids), (*answer, end if isinstance(end, int) else 0))
        )
        on_row()
    return conversations


def encoded(
    conversations: list[Conversation], table: Path, on_row: Callable[[], Any] = lambda: None
) -> list[Conversation]:
    """Return the conversations with their prompts' encodings; unchanged without an encoder."""
    path = encoder_model()
    if path is None:
        return conversations
    encoder, tokens = PromptEncoder(path), read_token_table(table)
    result = []
    for one in conversations:
        messages = prompt_messages(one.prompt, tokens)
        result.append(replace(one, encoding=encoder.encode(messages)))
        on_row()
    return result


def _prompt(ids: list[int]) -> PromptInput:
    kept = ids if len(ids) <= 2 * _EDGE_TOKENS else ids[:_EDGE_TOKENS] + ids[-_EDGE_TOKENS:]
    return PromptInput(
        token_ids=np.array(kept, dtype=np.int32),
        prompt_tokens=len(ids),
        max_tokens=0,
        temperature=0.0,
        stop_strings=0,
        lora_name="",
    )
