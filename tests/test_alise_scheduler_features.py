import numpy as np
import pytest
from alise_scheduler.answer_features import (
    ANSWER_WIDTH,
    LINES,
    AnswerState,
    answer_bag,
    answer_features,
    fold,
)
from alise_scheduler.answer_lines import LINE_FEATURES, projected
from alise_scheduler.prompt_features import (
    ASKED,
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
    np.testing.assert_array_equal(whole.marks, parts.marks)


ONE, DASH, WORD = 7, 8, FIRST_WORD


def lines_of(table: TokenTable, ids: list[int]) -> dict[str, float]:
    """Return the features of the lines of an answer by name, counts as counts."""
    state = AnswerState()
    state.extend(ids, len(ids))
    row = np.expm1(answer_features([state], table)[0, LINES])
    names = ("number", "pace", "since", "items", "bullets", "headings", "bolds", "digits", "marked")
    return dict(zip(names, row.round(4).tolist(), strict=False))


def test_list_items_are_counted_near_line_starts_only(table: TokenTable) -> None:
    lines = lines_of(table, [WORD] * 4 + [ONE, NEWLINE, ONE, WORD, DASH, NEWLINE, DASH, WORD])
    assert (lines["number"], lines["items"], lines["bullets"], lines["marked"]) == (1, 1, 1, 2)


def test_a_number_of_several_tokens_is_one_item(table: TokenTable) -> None:
    lines = lines_of(table, [DASH, ONE, ONE, WORD, NEWLINE, WORD, WORD, WORD, ONE])
    assert (lines["number"], lines["items"]) == (11, 1)


def test_the_pace_is_from_item_to_item(table: TokenTable) -> None:
    item = [ONE, WORD, WORD, WORD, NEWLINE]
    lines = lines_of(table, [WORD, NEWLINE, *item * 3, WORD])
    assert (lines["items"], lines["pace"], lines["since"]) == (3, 5, 6)


def test_what_is_left_of_a_list_is_the_items_still_missing_at_its_pace() -> None:
    lines = np.zeros((3, LINE_FEATURES), dtype=np.float32)
    lines[:, :3] = np.log1p([3, 20, 5])
    left, missing, is_list = projected(lines, np.log1p(np.float32([5, 0, 2]))).T
    np.testing.assert_allclose(np.expm1(left), [2 * 20 + 20 - 5, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(np.expm1(missing), [2, 0, 0], rtol=1e-4)
    assert is_list.tolist() == [1, 0, 0], "asked for none, or already beyond"


def test_the_count_asked_for_is_found_in_the_prompt(table: TokenTable) -> None:
    def asked(*ids: int) -> float:
        return round(float(np.expm1(prompt_features(prompt_input([*ids]), table).dense[ASKED])), 3)

    assert asked(WORD, ONE, ONE, WORD) == 11
    assert asked(WORD, ONE, WORD) == 0, "one thing is no list"
    assert asked(WORD, ONE, ONE, ONE, WORD) == 0, "111 is no count"


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
