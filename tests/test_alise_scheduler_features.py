import numpy as np
import pytest
from alise_scheduler.answer_features import (
    ANSWER_WIDTH,
    AnswerState,
    answer_bag,
    answer_features,
    fold,
)
from alise_scheduler.prompt_features import (
    BAG_BUCKETS,
    PROMPT_WIDTH,
    content_spans,
    prompt_features,
)
from alise_scheduler.token_table import TokenTable, read_token_table
from hypothesis import given, settings
from hypothesis import strategies as st
from predictor_fixtures import (
    ASSISTANT,
    END,
    FIRST_WORD,
    NEWLINE,
    START,
    USER,
    VOCABULARY,
    prompt_input,
    write_table,
)

ANY_IDS = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(0, VOCABULARY), max_size=80)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TokenTable:
    return read_token_table(write_table(tmp_path_factory.mktemp("t") / "t.npz"))


@given(
    ids=ANY_IDS,
    tokens=st.integers(0, 2**32 - 1),
    temperature=st.floats(),
    lora=st.text(max_size=8),
    with_table=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_any_prompt_gives_finite_features(
    table: TokenTable, ids: list[int], tokens: int, temperature: float, lora: str, with_table: bool
) -> None:
    prompt = prompt_input(
        ids,
        tokens,
        prompt_tokens=tokens,
        temperature=temperature,
        stop_strings=tokens,
        lora_name=lora,
    )
    features = prompt_features(prompt, table if with_table else None)
    assert features.dense.shape == (PROMPT_WIDTH,)
    assert np.isfinite(features.dense.astype(np.float16)).all()
    assert (np.diff(features.bag.astype(int)) > 0).all()
    assert (features.bag < BAG_BUCKETS).all()


def test_the_users_message_is_found_and_the_template_left_out(table: TokenTable) -> None:
    question = [FIRST_WORD, FIRST_WORD + 1]
    ids = [START, USER, NEWLINE, *question, END, NEWLINE, START, ASSISTANT, NEWLINE]
    rows = table.rows(ids)
    assert content_spans(rows, table.properties[rows], table) == [(3, 5)]
    with_system = [START, FIRST_WORD + 3, FIRST_WORD + 3, END, *ids]
    assert (
        prompt_features(prompt_input(ids), table).bag
        == prompt_features(prompt_input(with_system), table).bag
    ).all()


@given(ids=ANY_IDS.filter(bool), cuts=st.sets(st.integers(1, 79)))
@settings(max_examples=100, deadline=None)
def test_folding_in_parts_is_folding_at_once(
    table: TokenTable, ids: list[int], cuts: set[int]
) -> None:
    whole, parts = AnswerState(), AnswerState()
    whole.extend(ids, len(ids))
    done = 0
    for end in [*sorted(c for c in cuts if c < len(ids)), len(ids)]:
        parts.extend(ids[done:end], end)
        fold([parts, AnswerState()], table)
        done = end
    a, b = answer_features([whole], table), answer_features([parts], table)
    assert a.shape == (1, ANSWER_WIDTH)
    assert np.isfinite(a.astype(np.float16)).all()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert (whole.list_items, whole.list_number, whole.line_tokens) == (
        parts.list_items,
        parts.list_number,
        parts.line_tokens,
    )


def test_list_items_are_counted_at_line_starts_only(table: TokenTable) -> None:
    one, dash, word = 7, 8, FIRST_WORD
    state = AnswerState()
    ids = [word, one, NEWLINE, one, word, dash, NEWLINE, dash, word]
    state.extend(ids, len(ids))
    answer_features([state], table)
    assert (state.list_items, state.list_number, state.line_tokens) == (2, 1, 2)


@given(
    reports=st.lists(
        st.tuples(st.integers(0, 60), st.lists(st.integers(0, VOCABULARY - 1), max_size=30)),
        max_size=12,
    )
)
@settings(max_examples=100, deadline=None)
def test_extend_is_idempotent_and_tolerates_gaps(
    table: TokenTable, reports: list[tuple[int, list[int]]]
) -> None:
    once, twice = AnswerState(), AnswerState()
    for tokens, ids in reports:
        once.extend(ids, tokens)
        twice.extend(ids, tokens)
        twice.extend(ids, tokens)
    np.testing.assert_array_equal(answer_features([once], table), answer_features([twice], table))
    assert (answer_bag(once) == answer_bag(twice)).all()
    assert once.output_tokens == max([t for t, _ in reports], default=0)
    assert once.seen_tokens <= once.output_tokens
