"""Predictions by encodings: where they tell more than look-ups, where they tell nothing."""

from __future__ import annotations

import asyncio
import shutil
import signal
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from alise_scheduler.evaluation import Conversation, evaluate, split, trained_on
from alise_scheduler.model_blob import models_from_bytes, models_to_bytes
from alise_scheduler.predictor import Predictor, PredictorSettings
from alise_scheduler.prompt_encoder import ENCODING_WIDTH
from alise_scheduler.quality import tau_b
from alise_scheduler.tracked_job import TrackedJob
from alise_scheduler.v1 import scheduler_pb2 as pb
from encoder_fixtures import (
    ANIMALS,
    PLACES,
    TAUGHT,
    encoder_file,
    teach_words,
    told_by_encodings,
    word_ids,
    write_words_table,
)
from live_server import free_port
from patience import eventually
from predictor_fixtures import conversations, prompt_input, taught, write_table
from scheduler_fakes import engine
from test_alise_scheduler_cli import started


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("t") / "t.npz")


@pytest.fixture(scope="module")
def learned(table: Path) -> Predictor:
    predictor = trained_on(told_by_encodings(240, seed=1, by_words=True), table)
    assert predictor._models is not None
    assert predictor._models.encoding is not None
    return predictor


@pytest.fixture(scope="module")
def taught_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a token table, "t.npz", and what was learned with it, "state"."""
    folder = tmp_path_factory.mktemp("words")
    teach_words(write_words_table(folder / "t.npz"), folder / "state")
    return folder


def tracked(predictor: Predictor, some: list[Conversation], *, encoded: bool) -> list[TrackedJob]:
    return [one.tracked_by(predictor) if encoded else predictor.track(one.prompt) for one in some]


def order_of(predictor: Predictor, some: list[Conversation], *, encoded: bool) -> float:
    """Return how well the predictor orders `some` by length."""
    predicted = predictor.predict(tracked(predictor, some, encoded=encoded))
    lengths = np.array([len(one.answer_ids) for one in some])
    return tau_b(np.array(predicted)[:, 2], lengths)


def test_encodings_tell_lengths_where_words_do_not(table: Path) -> None:
    train, test = split(told_by_encodings(300, seed=0), 0.7, seed=0)
    predictor = trained_on(train, table)
    assert order_of(predictor, test, encoded=False) < 0.3
    assert order_of(predictor, test, encoded=True) > 0.7


def test_the_report_says_what_encodings_add(table: Path) -> None:
    report = evaluate(told_by_encodings(240, seed=2, by_words=True), table, 0.7, seeds=1)
    assert report.tau_b > report.tau_b_by_look_ups + 0.1
    assert report.tau_b_by_look_ups > 0.2
    # What an answer tells comes on top, and does not push the encoding aside.
    assert report.tau_b_remaining[32] > report.tau_b_by_look_ups
    assert report.p90_coverage > 0.7
    without = [replace(one, encoding=None) for one in told_by_encodings(240, seed=2, by_words=True)]
    plain = evaluate(without, table, 0.7, seeds=1)
    assert plain.tau_b == plain.tau_b_by_look_ups


def test_encodings_that_tell_nothing_do_no_harm(table: Path) -> None:
    rng = np.random.default_rng(0)
    noisy = [
        replace(one, encoding=rng.normal(size=ENCODING_WIDTH).astype(np.float32))
        for one in conversations(300)
    ]
    train, test = split(noisy, 0.7, seed=0)
    predictor = trained_on(train, table)
    by_look_ups = order_of(predictor, test, encoded=False)
    assert by_look_ups > 0.5
    assert order_of(predictor, test, encoded=True) > by_look_ups - 0.05


def test_jobs_with_and_without_encodings_teach_together(table: Path) -> None:
    train, test = split(told_by_encodings(300, seed=3, by_words=True), 0.7, seed=0)
    mixed = [replace(one, encoding=None) if i % 2 else one for i, one in enumerate(train)]
    half = [one for one in mixed if one.encoding is not None]
    predictor, of_half = trained_on(mixed, table), trained_on(half, table)
    by_look_ups = order_of(predictor, test, encoded=False)
    assert by_look_ups > 0.2
    assert by_look_ups > order_of(of_half, test, encoded=False) - 0.05
    assert order_of(predictor, test, encoded=True) > by_look_ups + 0.1


def test_a_few_encodings_give_no_model_of_them(table: Path) -> None:
    some = told_by_encodings(120, seed=0, by_words=True)
    few = [replace(one, encoding=None) if i >= 40 else one for i, one in enumerate(some)]
    predictor = trained_on(few, table)
    assert predictor._models is not None
    assert predictor._models.encoding is None
    assert order_of(predictor, some, encoded=True) == order_of(predictor, some, encoded=False)


def test_an_encoding_that_comes_later_changes_the_prediction_at_any_age(learned: Predictor) -> None:
    some = told_by_encodings(40, seed=5, by_words=True)
    for age in (0, 5, 20, 70):
        long = [one for one in some if len(one.answer_ids) > age]
        late, early = (tracked(learned, long, encoded=is_early) for is_early in (False, True))
        for job, same, one in zip(late, early, long, strict=True):
            for each in (job, same):
                each.extend(one.answer_ids[:age], age)
        before = np.array(learned.predict(late))
        for job, one in zip(late, long, strict=True):
            assert one.encoding is not None
            job.set_encoding(one.encoding)
        after = np.array(learned.predict(late))
        assert np.abs(np.log(after / before))[:, 2].max() > 0.2
        np.testing.assert_allclose(after, np.array(learned.predict(early)), rtol=1e-3)


def test_a_batch_of_encoded_and_other_jobs_is_predicted_as_one_by_one(learned: Predictor) -> None:
    some = told_by_encodings(12, seed=6)
    mixed = [replace(one, encoding=None) if i % 3 else one for i, one in enumerate(some)]
    single = [learned.predict([job])[0] for job in tracked(learned, mixed, encoded=True)]
    together = learned.predict(tracked(learned, mixed, encoded=True))
    np.testing.assert_allclose(together, single, rtol=1e-3)  # type: ignore[arg-type]


def test_models_of_encodings_survive_bytes(learned: Predictor) -> None:
    some = told_by_encodings(20, seed=7)
    before = learned.predict(tracked(learned, some, encoded=True))
    models = learned._models
    assert models is not None
    again = Predictor(PredictorSettings())
    again._table, again._models = learned._table, models_from_bytes(models_to_bytes(models))
    assert again.predict(tracked(again, some, encoded=True)) == before
    assert again.predict(tracked(again, some, encoded=False)) != before


def test_a_restarted_predictor_has_its_encodings(table: Path, tmp_path: Path) -> None:
    train, test = told_by_encodings(150, seed=8), told_by_encodings(60, seed=9)
    first = trained_on(train, table, tmp_path)
    before = first.predict(tracked(first, test, encoded=True))
    first.close()
    again = Predictor(PredictorSettings(tmp_path))
    again.load_token_table(table)
    assert again.predict(tracked(again, test, encoded=True)) == before
    # Nor are those of the samples lost: a predictor without models learns from them anew.
    again._models = None
    assert again.train_now()
    assert order_of(again, test, encoded=True) > 0.6
    again.close()


def test_an_encoder_that_cannot_start_leaves_the_look_ups(table: Path, tmp_path: Path) -> None:
    predictor = taught(table, encoder_model=tmp_path / "none.gguf")
    called: list[bool] = []
    one = conversations(1, seed=9)[0]
    job = predictor.track(one.prompt)
    predictor.encode(one.prompt, job, lambda: called.append(True))  # it has not been started
    expected = predictor.predict([job])
    assert expected != [None]
    predictor.start(lambda call: call())
    try:
        predictor.encode(one.prompt, job, lambda: called.append(True))
        assert predictor.encoder is not None
        eventually(lambda: not predictor.encoder._pending)  # type: ignore[union-attr]
        assert predictor.predict([job]) == expected
    finally:
        predictor.close()
    assert (called, job.features.encoding) == ([], None)


def test_words_never_seen_are_told_apart_by_reading_them(taught_words: Path) -> None:
    predictor = Predictor(PredictorSettings(taught_words / "state", encoder_model=encoder_file()))
    predictor.load_token_table(taught_words / "t.npz")
    prompts = [prompt_input(word_ids(w)) for w in (*ANIMALS[TAUGHT:], *PLACES[TAUGHT:])]
    jobs = [predictor.track(prompt) for prompt in prompts]
    came: list[int] = []
    is_place = np.arange(len(jobs)) >= len(ANIMALS) - TAUGHT

    def ratio() -> float:
        medians = np.log(np.array(predictor.predict(jobs))[:, 2])
        return float(np.exp(medians[is_place].mean() - medians[~is_place].mean()))

    assert 0.5 < ratio() < 2
    predictor.start(lambda call: call())
    try:
        for number, (prompt, job) in enumerate(zip(prompts, jobs, strict=True)):
            predictor.encode(prompt, job, lambda number=number: came.append(number))  # type: ignore[misc]
        eventually(lambda: len(came) == len(jobs))
    finally:
        predictor.close()
    assert came == list(range(len(jobs)))
    assert ratio() > 4


def arrival(job_id: str, word: str) -> pb.Event:
    ids = word_ids(word)
    prompt = pb.Prompt(token_ids=ids, prompt_tokens=len(ids))
    return pb.Event(arrived=pb.JobArrived(job_id=job_id, arrival_s=1.0, prompt=prompt))


@pytest.mark.parametrize("has_encoder", [True, False])
def test_the_sidecar_reads_prompts_and_then_tells_the_engine_better_estimates(
    has_encoder: bool, taught_words: Path, tmp_path: Path
) -> None:
    encoder_file()
    shutil.copytree(taught_words, tmp_path, dirs_exist_ok=True)
    port = free_port()

    def encoded_prompts() -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if line.startswith("alise_encodings_total{")]

    async def scenario(target: str) -> None:
        async with engine(target, table="t.npz") as stream:
            await stream.send(arrival("short", ANIMALS[-1]), arrival("long", PLACES[-1]))
            first = await stream.estimates("short", "long")
            if not has_encoder:
                for _ in range(4):  # messages, of which the emptiest come twice in a second
                    assert not (await stream.read()).update.estimates
                return
            second = await stream.estimates("short", "long")
            for job_id in ("short", "long"):
                assert second[job_id].remaining_tokens != first[job_id].remaining_tokens
            assert second["long"].remaining_tokens > 3 * second["short"].remaining_tokens

    # With a gamma of its own, what it learns of rates and lengths is no news.
    options = ["--metrics-port", str(port), "--gamma", "0.05"]
    options += [] if has_encoder else ["--no-encoder"]
    with started(tmp_path, *options) as (process, target):
        asyncio.run(scenario(target))
        children = psutil.Process(process.pid).children(recursive=True)
        readers = [c for c in children if "alise_scheduler.encoder_worker" in c.cmdline()]
        assert len(readers) == has_encoder
        if has_encoder:
            eventually(lambda: encoded_prompts() == ['alise_encodings_total{result="encoded"} 2.0'])
        else:
            assert encoded_prompts() == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 0
        assert not [child for child in children if child.is_running()]
