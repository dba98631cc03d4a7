"""Data sets: bad rows by line, what is left out, and that no test prompt is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alise_bench.dataset import (
    Conversation,
    Item,
    load_dataset,
    packaged_dataset,
    split_for_repeat,
    tokenize,
    write_training_file,
)
from alise_bench.errors import BenchError
from hypothesis import given
from hypothesis import strategies as st


class WordTokenizer:
    """A tokenizer as transformers' are, of words: token = length of the word; 0 ends."""

    all_special_ids = (0,)
    eos_token_id = 0

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [0 if word == "<end>" else len(word) for word in text.split()]

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert add_generation_prompt
        assert not tokenize
        return " ".join(m["content"] for m in messages) + " assistant"


def conversation(prompt: str, response: str | None = "ok", id_: str = "x") -> Conversation:
    return Conversation(id_, (("user", prompt),), response)


def items(count: int) -> list[Item]:
    return [
        Item(str(n), f"key{n}", (n,), (1, 0), conversation(f"prompt {n}")) for n in range(count)
    ]


@given(
    count=st.integers(4, 60),
    share=st.floats(0.05, 0.75),
    repeat=st.integers(0, 9),
    seed=st.integers(0, 2**31),
)
def test_splits_are_disjoint_and_whole(count: int, share: float, repeat: int, seed: int) -> None:
    all_items = items(count)
    size = max(1, int(count * share))
    split = split_for_repeat(all_items, size, repeat, seed)
    assert len(split.test) == size
    assert {i.key for i in split.test}.isdisjoint(i.key for i in split.train)
    assert {i.key for i in (*split.test, *split.train)} == {i.key for i in all_items}
    assert split == split_for_repeat(all_items, size, repeat, seed)


def test_repeats_ask_different_prompts_while_there_are_enough() -> None:
    asked = [{i.key for i in split_for_repeat(items(30), 10, r, 5).test} for r in range(3)]
    assert len(set.union(*asked)) == 30


def test_too_many_requests_leave_nothing_to_train_on() -> None:
    with pytest.raises(BenchError, match="at most 7"):
        split_for_repeat(items(10), 8, 0, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "line 2: a JSON object is needed, this is a list"),
        ('{"response": "a"}', "line 2: no field 'messages'"),
        ('{"messages": [], "response": "a"}', "line 2: `messages` is empty"),
        ('{"messages": [{"role": "user"}], "response": "a"}', "line 2: no field 'content'"),
        ('{"messages": [{"role": "user", "content": 5}]}', "line 2: `content` must be a text"),
        ('{"messages": [{"role": "user", "content": "hi"}]}', "line 2: no field 'response'"),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}], "response": "b"})
    file = tmp_path / "data.jsonl"
    file.write_text(f"{good}\n{line}\n")
    with pytest.raises(BenchError, match=message):
        load_dataset(file, need_response=True)


def test_repeated_prompts_are_dropped(tmp_path: Path) -> None:
    rows = [
        {"id": n, "messages": [{"role": "user", "content": c}], "response": f"r{n}"}
        for n, c in enumerate(["a", "b", "a"])
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    loaded = load_dataset(file, need_response=True)
    assert [(row.id, row.response) for row in loaded] == [("0", "r0"), ("1", "r1")]


def test_the_packaged_prompts_are_good_for_natural_mode() -> None:
    rows = load_dataset(packaged_dataset(), need_response=False)
    assert len(rows) >= 100
    with pytest.raises(BenchError, match="no field 'response'"):
        load_dataset(packaged_dataset(), need_response=True)


def test_what_cannot_be_replayed_is_left_out_and_counted() -> None:
    rows = [
        conversation("one two", "a bb ccc"),
        conversation("one two three four five", "a"),
        conversation("one", "a a a a a a"),
        conversation("four", "a <end> b"),
        conversation("eno owt", "same lengths of words, so the same tokens"),
    ]
    result = tokenize(rows, WordTokenizer(), max_model_len=10, max_tokens=6, with_answers=True)
    assert [(i.prompt_ids, i.answer_ids) for i in result.items] == [((3, 3, 9), (1, 2, 3, 0))]
    assert sum(result.left_out.values()) == 4
    assert result.left_out["answer holds special tokens"] == 1


def test_training_file_holds_what_it_is_given_and_no_more(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    write_training_file(items(2), file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[1] == {
        "id": "1",
        "messages": [{"role": "user", "content": "prompt 1"}],
        "response": "ok",
    }
