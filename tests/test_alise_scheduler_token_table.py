from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alise_scheduler.token_table import (
    PROPERTY_OF,
    TokenTableError,
    read_token_table,
    widened,
)
from predictor_fixtures import FIRST_WORD, VOCABULARY, table_arrays, write_table


def test_reads_kinds_and_words(tmp_path: Path) -> None:
    table = read_token_table(write_table(tmp_path / "t.npz"))
    assert table.vocabulary == VOCABULARY
    kinds = table.properties
    assert kinds[0, PROPERTY_OF["special"]]
    assert not kinds[4, PROPERTY_OF["special"]], "a newline is text"
    assert kinds[4, PROPERTY_OF["newline"]]
    assert kinds[9, PROPERTY_OF["fence"]]
    assert table.number[7] == 1
    assert table.begins_role[2]
    assert not table.begins_role[FIRST_WORD]
    assert table.weight[0] == 0
    assert table.weight[FIRST_WORD] > 0


def test_ids_out_of_range_share_the_last_row(tmp_path: Path) -> None:
    table = read_token_table(write_table(tmp_path / "t.npz"))
    assert table.rows([-1, 0, VOCABULARY, 2**40]).tolist() == [
        VOCABULARY,
        0,
        VOCABULARY,
        VOCABULARY,
    ]
    assert not table.embedding[VOCABULARY].any()


def test_fingerprint_is_of_the_source_not_of_rounding(tmp_path: Path) -> None:
    embedding = table_arrays()["embedding"]
    nudged = (embedding.astype(np.float32) * 1.001).astype(np.float16)
    first = read_token_table(write_table(tmp_path / "a.npz"))
    second = read_token_table(write_table(tmp_path / "b.npz", embedding=nudged))
    other = read_token_table(write_table(tmp_path / "c.npz", seed=1))
    assert first.fingerprint == second.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": np.int64(1)}, "version 1, expected 2"),
        ({"embedding": None}, "lacks the array 'embedding'"),
        ({"embedding": np.zeros((VOCABULARY, 3), np.float16)}, "shape"),
        ({"embedding": np.zeros((VOCABULARY, 256), np.float32)}, "float32"),
        ({"meaning": np.zeros((VOCABULARY - 1, 256), np.float16)}, "meaning of shape"),
        ({"embedding": np.full((VOCABULARY, 256), np.nan, np.float16)}, "finite"),
        ({"text_offsets": np.zeros(3, np.int64)}, "offsets"),
        ({"text_offsets": np.arange(VOCABULARY + 1, dtype=np.int64) * -1}, "ascend"),
        ({"source_sha256": np.zeros(3, np.uint8)}, "3 bytes"),
        ({"embedding": np.array([object()])}, "cannot read"),
    ],
)
def test_refuses_bad_tables_with_a_reason(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TokenTableError, match=message):
        read_token_table(write_table(tmp_path / "t.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04garbage", b"hello"])
def test_refuses_what_is_no_table(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(TokenTableError, match="cannot read"):
        read_token_table(path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TokenTableError, match="cannot read"):
        read_token_table(tmp_path / "none.npz")


def test_widening_is_exact_for_every_finite_half() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    np.testing.assert_array_equal(widened(halves), halves.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(widened(halves)), np.signbit(halves))
