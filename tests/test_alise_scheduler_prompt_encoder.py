"""The prompt encoder against transformers' own computation of its model; messages from ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alise_scheduler.prompt_encoder import ENCODING_WIDTH, MAX_TOKENS, Message
from alise_scheduler.prompt_messages import prompt_messages
from alise_scheduler.token_table import TokenTable, read_token_table
from encoder_fixtures import asked, encoder
from hypothesis import given
from hypothesis import strategies as st
from predictor_fixtures import (
    ASSISTANT,
    END,
    FIRST_FILLER,
    FIRST_WORD,
    NEWLINE,
    START,
    USER,
    VOCABULARY,
    prompt_input,
    write_table,
)

MIXED = "In 2024, 3.14 apples: def f(x):\n\treturn x**2  # naïve — 漢字 🙂"


@pytest.fixture(scope="module")
def default_model() -> Path:
    for name in ("torch", "transformers"):
        pytest.importorskip(name, reason="needs the extra 'cpu'")
    from alise_engine.default_model import DefaultModelMissingError, ensure_default_model

    try:
        return ensure_default_model()
    except DefaultModelMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(default_model), local_files_only=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return read_token_table(write_table(tmp_path_factory.mktemp("t") / "t.npz"))


def test_its_states_are_those_of_the_models_sixteenth_layer(
    default_model: Path, tokenizer: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(default_model), dtype=torch.float32, local_files_only=True
    )
    ids = tokenizer(f"{MIXED}\n{MIXED[::-1]}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        layers = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    own = encoder().hidden_states(ids)
    assert own.shape == (len(ids), ENCODING_WIDTH)

    def agreement(layer: int) -> list[float]:
        pairs = zip(own, layers[layer][0].numpy(), strict=True)
        return [float(np.corrcoef(a, b)[0, 1]) for a, b in pairs]

    assert min(agreement(16)) > 0.999
    # The first token's state is huge, and nearly the same in all layers.
    assert max(*agreement(15)[1:], *agreement(17)[1:]) < 0.999


@pytest.mark.parametrize(
    "text",
    [
        MIXED,
        "",
        " ",
        "\n\n  a\r\n\t\u00a0b",
        "1234567890 and 12 345",
        "don't I'm they'll 'tis",
        "e\u0301 \ufffd ﬁ Ω İ a\x00b",
        "y=x+1; " * 200,
        "سلام दुनिया สวัสดี",
    ],
)
def test_its_token_ids_are_the_tokenizers_own(tokenizer: Any, text: str) -> None:
    around = encoder()._chat.token_ids(asked(""))
    place = around.index(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encoder()._chat.token_ids(asked(text))
    budget = MAX_TOKENS - (len(around) - len(encoder()._chat.token_ids([])))
    if len(expected) <= budget:
        assert ids == [*around[:place], *expected, *around[place:]]
    else:
        half = budget // 2
        end = len(expected) - (budget - half)
        assert ids == [*around[:place], *expected[:half], *expected[end:], *around[place:]]


def test_a_conversation_is_in_the_models_own_template(tokenizer: Any) -> None:
    messages: list[Message] = [
        ("system", "Be brief."),
        ("user", "What is 12 * 12?"),
        ("assistant", "144"),
        ("user", "And\n13 * 13?"),
    ]
    expected = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in messages], add_generation_prompt=True
    )["input_ids"]
    assert encoder()._chat.token_ids(messages) == expected


def test_what_looks_like_a_special_token_in_a_text_is_text(tokenizer: Any) -> None:
    ids = encoder()._chat.token_ids(asked("<|im_end|>"))
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(ends) == 1


def test_of_many_messages_the_newest_are_kept_and_the_oldest_of_them_is_cut_in_the_middle(
    tokenizer: Any,
) -> None:
    # A word is a token here.
    messages: list[Message] = [
        ("user", "oldest " * 10),
        ("assistant", "begin" + " old" * 300 + " end"),
        ("user", "question " * 99 + "newest"),
    ]
    chat = encoder()._chat
    text = tokenizer.decode(chat.token_ids(messages))
    assert "oldest" not in text
    assert text.count("question") == 99
    _, cut, newest, _ = text.split("<|im_start|>")
    assert newest.endswith("newest<|im_end|>\n")
    assert cut.startswith("assistant\nbegin old")
    assert cut.endswith("old end<|im_end|>\n")
    frames = len(chat.token_ids([("assistant", ""), ("user", "")])) - len(chat.token_ids([]))
    left = MAX_TOKENS - frames - len(tokenizer("question " * 99 + "newest")["input_ids"])
    assert cut.count(" old") == left - 2


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(0, 400))))
def test_the_messages_have_at_most_so_many_tokens(lengths: list[tuple[str, int]]) -> None:
    chat = encoder()._chat
    ids = chat.token_ids([(role, " word" * count) for role, count in lengths])
    assert len(ids) <= MAX_TOKENS + len(chat.token_ids([]))
    whole = len(chat.token_ids([]))
    whole += sum(count + (5 if role == "user" else 6) for role, count in lengths)
    # Less than that only where a cut would have left next to nothing.
    assert len(ids) > min(whole, MAX_TOKENS) - 22
    assert ids[-len(chat.token_ids([])) :] == chat.token_ids([])


@pytest.mark.parametrize(
    "messages",
    [
        [],
        asked(""),
        asked("\ud800 \udfff".encode(errors="replace").decode()),
        asked(b"\xff\xfe\xf0\x9f".decode(errors="replace")),
        asked("\x00\x01\u202e\U0010ffff"),
        asked("a" * 100_000),
        asked("多" * 100_000),
        asked("word and " * 12_000),
        [("user", "")] * 50,
    ],
    ids=["none", "empty", "surrogates", "no UTF-8", "controls", "a", "Han", "words", "empties"],
)
def test_any_messages_give_a_finite_encoding(messages: list[Message]) -> None:
    encoding = encoder().encode(messages)
    assert encoding.shape == (ENCODING_WIDTH,)
    assert encoding.dtype == np.float32
    assert np.isfinite(encoding.astype(np.float16)).all()


def test_an_encoding_is_of_the_text_and_of_its_order() -> None:
    one, same, other = (
        encoder().encode(asked(text)) for text in ("the dog bit him", "the dog bit him", "bit dog")
    )
    np.testing.assert_array_equal(one, same)
    assert np.corrcoef(one, other)[0, 1] < 0.99


def message(role: int, *words: int) -> list[int]:
    return [START, role, NEWLINE, *words, END, NEWLINE]


GENERATION = [START, ASSISTANT, NEWLINE]
NAME, DEFINE = FIRST_WORD + 2, FIRST_WORD + 3


def test_roles_take_turns_and_the_last_is_the_users(table: TokenTable) -> None:
    ids = [*message(USER, NAME), *message(ASSISTANT, DEFINE), *message(USER, NAME, DEFINE)]
    assert prompt_messages(prompt_input([*ids, *GENERATION]), table) == [
        ("user", "name"),
        ("assistant", "define"),
        ("user", "name define"),
    ]


def test_the_system_message_is_left_out(table: TokenTable) -> None:
    system = [START, FIRST_FILLER, FIRST_FILLER, END, NEWLINE]
    one = [*message(USER, NAME), *GENERATION]
    more = [*message(USER, DEFINE), *message(ASSISTANT, DEFINE), *one]
    for ids in (one, more):
        expected = prompt_messages(prompt_input(ids), table)
        assert prompt_messages(prompt_input([*system, *ids]), table) == expected


def test_a_prompt_without_a_template_is_the_users(table: TokenTable) -> None:
    assert prompt_messages(prompt_input([NAME, DEFINE]), table) == asked("name define")
    assert prompt_messages(prompt_input([]), table) == []


def test_bytes_that_are_cut_are_marked(table: TokenTable, tmp_path: Path) -> None:
    texts = [b"", b"\xe6\xbc", b"\xa2", b" \xff"]
    cut = read_token_table(
        write_table(
            tmp_path / "t.npz",
            embedding=np.zeros((4, 256), np.float16),
            meaning=np.zeros((4, 256), np.float16),
            text_bytes=np.frombuffer(b"".join(texts), np.uint8),
            text_offsets=np.array([0, 0, 2, 3, 5], np.int64),
        )
    )
    assert prompt_messages(prompt_input([1, 2]), cut) == asked("漢")
    assert prompt_messages(prompt_input([2, 1, 3]), cut) == asked("\ufffd\ufffd \ufffd")


@given(
    st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, VOCABULARY), max_size=80),
)
def test_any_ids_give_messages_that_take_turns(table: TokenTable, ids: list[int]) -> None:
    messages = prompt_messages(prompt_input(ids), table)
    assert len(messages) % 2 == bool(ids)
    assert [role for role, _ in messages[::-2]] == ["user"] * len(messages[::-2])
    assert [role for role, _ in messages[-2::-2]] == ["assistant"] * len(messages[-2::-2])
    known = b"".join(table.texts[row] for row in table.rows(ids)).decode()
    assert all(text in known for _, text in messages)
    assert all(text == text.strip() for _, text in messages)
