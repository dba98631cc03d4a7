import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from alise_scheduler.answer_features import ANSWER_WIDTH
from alise_scheduler.predictor import Predictor, PredictorSettings
from alise_scheduler.prompt_encoder import ENCODING_WIDTH
from alise_scheduler.prompt_features import PROMPT_WIDTH, PromptFeatures
from alise_scheduler.sample_blob import (
    _HEADER,
    LAYOUT_VERSION,
    EncodedSample,
    SampleBlobError,
    decode,
    encode,
)
from alise_scheduler.store import FILE_NAME, SampleStore
from alise_scheduler.training import Sample, Snapshot
from predictor_fixtures import taught, write_table


def sample(number: int, snapshots: int = 2) -> EncodedSample:
    rng = np.random.default_rng(number)
    prompt = PromptFeatures(
        rng.normal(size=PROMPT_WIDTH).astype(np.float32), np.array([1, 5, 4095], dtype=np.uint16)
    )
    parts = tuple(
        Snapshot(
            8 << i,
            rng.normal(size=ANSWER_WIDTH).astype(np.float16),
            np.arange(i * 3, dtype=np.uint16),
        )
        for i in range(snapshots)
    )
    return encode(Sample(prompt, parts, number, number % 2 == 1))


def stored(folder: Path, fingerprint: str = "f", max_samples: int = 100) -> list[int]:
    samples, _ = SampleStore(folder, max_samples).load(fingerprint)
    return [s.output_tokens for s in samples]


def test_encoding_keeps_a_sample() -> None:
    again = decode(sample(3))
    assert (again.output_tokens, again.is_censored) == (3, True)
    assert encode(again) == sample(3)
    assert [s.output_tokens for s in again.snapshots] == [8, 16]
    assert again.snapshots[1].bag.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "change", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x", lambda b: b"\xff" * 99]
)
def test_decoding_refuses_other_bytes(change) -> None:  # type: ignore[no-untyped-def]
    good = sample(1)
    with pytest.raises(SampleBlobError):
        decode(EncodedSample(change(good.features), 1, False))


def with_encoding(encoding: npt.NDArray[np.float32] | None, snapshots: int = 2) -> Sample:
    plain = decode(sample(3, snapshots))
    return replace(plain, prompt=replace(plain.prompt, encoding=encoding))


def encoding_of(width: int = ENCODING_WIDTH) -> npt.NDArray[np.float32]:
    halves = np.random.default_rng(0).normal(size=width, scale=100).astype(np.float16)
    return halves.astype(np.float32)


@pytest.mark.parametrize("snapshots", [0, 2])
def test_the_prompts_encoding_is_kept_with_a_sample(snapshots: int) -> None:
    whole = with_encoding(encoding_of(), snapshots)
    again = decode(encode(whole))
    assert again.prompt.encoding is not None
    assert again.prompt.encoding.dtype == np.float32
    np.testing.assert_array_equal(again.prompt.encoding, encoding_of())
    np.testing.assert_array_equal(again.prompt.dense, whole.prompt.dense)
    assert [s.bag.tolist() for s in again.snapshots] == [s.bag.tolist() for s in whole.snapshots]
    without = with_encoding(None, snapshots)
    assert decode(encode(without)).prompt.encoding is None
    grown = len(encode(whole).features) - len(encode(without).features)
    assert grown == 2 * ENCODING_WIDTH


def test_the_largest_encoding_that_there_can_be_is_kept() -> None:
    again = decode(encode(with_encoding(np.full(ENCODING_WIDTH, -65_000.0, np.float32))))
    np.testing.assert_allclose(again.prompt.encoding, -65_000.0, rtol=1e-3)


@pytest.mark.parametrize(
    "encoding",
    [
        encoding_of(ENCODING_WIDTH - 1),
        encoding_of(ENCODING_WIDTH + 1),
        encoding_of(1),
        np.full(ENCODING_WIDTH, np.nan, np.float32),
        np.where(np.arange(ENCODING_WIDTH) == 7, np.inf, encoding_of()).astype(np.float32),
    ],
    ids=["narrow", "wide", "one number", "NaN", "infinite"],
)
def test_decoding_refuses_what_is_no_encoding(encoding: npt.NDArray[np.float32]) -> None:
    bad = encode(with_encoding(encoding))
    with pytest.raises(SampleBlobError, match="no encoding"):
        decode(bad)


def test_decoding_refuses_an_encoding_of_an_answer() -> None:
    good = encode(with_encoding(None, snapshots=1)).features
    at = len(encode(with_encoding(None, snapshots=0)).features)
    tokens, buckets, _ = _HEADER.unpack_from(good, at)
    header = _HEADER.pack(tokens, buckets, ENCODING_WIDTH)
    halves = encoding_of().astype(np.float16).tobytes()
    bad = good[:at] + header + good[at + len(header) :] + halves
    with pytest.raises(SampleBlobError, match="no encoding of a prompt"):
        decode(EncodedSample(bad, 3, False))


def test_samples_come_back_in_order_and_by_fingerprint(tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "deep" / "folder", 100)
    for n in range(5):
        store.add("f" if n < 3 else "g", sample(n))
    store.close()
    assert stored(tmp_path / "deep" / "folder") == [0, 1, 2]
    assert stored(tmp_path / "deep" / "folder", "g") == [3, 4]


def test_the_oldest_go_and_the_file_shrinks(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, 50)
    for _ in range(4):
        for n in range(300):
            store.add("f", sample(n))
        assert store.flush()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        assert connection.execute("SELECT count(*) FROM samples").fetchone()[0] <= 50
    connection.close()
    size_bytes = sum(f.stat().st_size for f in tmp_path.iterdir())
    assert size_bytes < 50 * len(sample(1).features) * 2 + 400_000
    assert stored(tmp_path, max_samples=3) == [297, 298, 299]


@pytest.mark.parametrize("damage", ["garbage", "header", "middle"])
def test_a_damaged_file_is_set_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SampleStore(tmp_path, 100)
    for n in range(40):
        store.add("f", sample(n))
    store.close()
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content = bytearray(b"not a database at all" * 300)
    elif damage == "header":
        content[:64] = b"\0" * 64
    else:
        for start in range(8192, len(content), 4096):
            content[start : start + 200] = b"\xa5" * 200
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert stored(tmp_path) == []
    assert "set aside" in caplog.text
    assert [p for p in tmp_path.iterdir() if ".damaged-" in p.name]
    again = SampleStore(tmp_path, 100)
    again.add("f", sample(7))
    again.close()
    assert stored(tmp_path) == [7]


def test_an_older_layout_is_set_aside_and_the_predictor_starts_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_table(tmp_path / "t.npz")
    taught(table, 64, state_dir=tmp_path).close()
    connection = sqlite3.connect(tmp_path / FILE_NAME)
    # As the layout before this one was.
    connection.execute("ALTER TABLE models DROP COLUMN learned_from")
    connection.execute(f"PRAGMA user_version={LAYOUT_VERSION - 1}")
    connection.close()
    again = Predictor(PredictorSettings(tmp_path))
    again.load_token_table(table)
    assert (again.model_version, again.sample_count) == (0, 0)
    expected = f"(layout {LAYOUT_VERSION - 1}, expected {LAYOUT_VERSION}): set aside"
    assert expected in caplog.text
    assert [p for p in tmp_path.iterdir() if ".incompatible-" in p.name]
    again.close()
    taught(table, 64, state_dir=tmp_path).close()
    once_more = Predictor(PredictorSettings(tmp_path))
    once_more.load_token_table(table)
    assert (once_more.model_version, once_more.sample_count) == (1, 64)
    once_more.close()


def test_kill_9_loses_at_most_the_last_second(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_alise_scheduler_store import SampleStore, sample
        store = SampleStore(Path(sys.argv[1]), 100_000)
        store.start()
        blobs = [sample(n % 50) for n in range(50)]
        n = 0
        while True:
            one = blobs[n % 50]
            store.add("f", type(one)(one.features, n, False))
            print(n, time.monotonic(), flush=True)
            n += 1
            time.sleep(0.002)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    added: list[tuple[int, float]] = []
    while not added or added[-1][1] - added[0][1] < 3.0:
        number, at_s = child.stdout.readline().split()
        added.append((int(number), float(at_s)))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    kept = stored(tmp_path, max_samples=100_000)
    assert kept == list(range(len(kept))), "a prefix: nothing missing in between"
    # A second, and as much again for a machine that is busy with other things.
    due = [n for n, at_s in added if at_s < added[-1][1] - 2.0]
    assert len(kept) >= len(due) > 0


def test_a_folder_that_cannot_be_written_costs_persistence_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the folder should be")
    store = SampleStore(blocked, 100)
    assert store.load("f") == ([], None)
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            store.add("f", sample(n))
            assert not store.flush()
    assert store.write_failures == 3
    assert caplog.text.count("going on in memory") == 1
    blocked.unlink()
    assert store.flush()
    assert stored(blocked) == [0, 1, 2]


def _run_with_file_limit(folder: Path, limit_bytes: int) -> str:
    code = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from test_alise_scheduler_store import SampleStore, sample, stored
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = SampleStore(Path(sys.argv[1]), 10_000)
        store.add("f", sample(0))
        assert store.flush()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), hard))
        for n in range(1, 400):
            store.add("f", sample(n % 50))
        full = store.flush()
        failures = store.write_failures
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print(full, failures, store.flush(), len(stored(Path(sys.argv[1]), max_samples=10_000)))
        """
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(Path(__file__).parent), str(limit_bytes)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_full_disk_is_survived_and_recovered_from(tmp_path: Path) -> None:
    assert _run_with_file_limit(tmp_path, 200_000) == "False 1 True 400"


def test_the_writer_needs_no_call_to_commit(tmp_path: Path) -> None:
    store = SampleStore(tmp_path, 100)
    store.start()
    store.add("f", sample(1))
    deadline_s = time.monotonic() + 20
    while stored(tmp_path) != [1]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    store.close()
