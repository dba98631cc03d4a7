"""A prompt's messages, as text: from its token ids, by the token table. Pure."""

from __future__ import annotations

from alise_scheduler.prompt_encoder import Message
from alise_scheduler.prompt_features import PromptInput, content_spans
from alise_scheduler.token_table import TokenTable


def prompt_messages(prompt: PromptInput, table: TokenTable) -> list[Message]:
    """Return the messages of `prompt`, the last one a user's.

    Chat templates name roles in many ways: roles take turns here, and of an even number of
    messages, the first is the system's, which is left out: it says the same of all prompts.
    """
    rows = table.rows(prompt.token_ids)
    if not len(rows):
        return []
    spans = content_spans(rows, table.properties[rows], table)
    if len(spans) % 2 == 0:
        del spans[0]
    texts = [
        b"".join(table.texts[row] for row in rows[start:end].tolist())
        .decode(errors="replace")
        .strip()
        for start, end in spans
    ]
    return [("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
