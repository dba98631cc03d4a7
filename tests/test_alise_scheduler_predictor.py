import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from alise_scheduler import predictor as predictor_module
from alise_scheduler.evaluation import evaluate
from alise_scheduler.predictor import Outcome, Predictor, PredictorSettings, TokenTableError
from alise_scheduler.quality import tau_b
from alise_scheduler.train_worker import TrainRequest
from alise_scheduler.trainer import Trained
from alise_scheduler.training import Models
from hypothesis import given, settings
from hypothesis import strategies as st
from predictor_fixtures import (
    VOCABULARY,
    conversation,
    conversations,
    finish,
    prompt_input,
    taught,
    write_table,
)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("t") / "t.npz")


@pytest.fixture(scope="module")
def learned(table: Path) -> Predictor:
    return taught(table)


def test_before_the_first_model_there_is_no_estimate(table: Path) -> None:
    predictor = Predictor(PredictorSettings())
    predictor.load_token_table(table)
    assert predictor.predict([predictor.track(prompt_input([5, 6]))]) == [None]
    assert (predictor.model_version, predictor.model_trained_unix_s) == (0, 0.0)


def test_learns_the_rule_and_the_answers_hint(table: Path) -> None:
    report = evaluate(conversations(260), table, 0.6, seeds=1)
    assert report.tau_b > 0.5
    assert report.tau_b_remaining[32] > report.tau_b_remaining_by_prompt[32] + 0.1


@given(
    ids=st.lists(st.integers(-5, VOCABULARY + 5), max_size=40),
    max_tokens=st.integers(0, 500),
    answer=st.lists(st.integers(-5, VOCABULARY + 5), max_size=120),
)
@settings(max_examples=60, deadline=None)
def test_quantiles_are_sorted_finite_and_within_max_tokens(
    learned: Predictor, ids: list[int], max_tokens: int, answer: list[int]
) -> None:
    job = learned.track(prompt_input(ids, max_tokens))
    for _ in range(2):
        (quantiles,) = learned.predict([job])
        assert quantiles is not None
        assert list(quantiles) == sorted(quantiles)
        assert np.isfinite(quantiles).all()
        assert quantiles[0] >= 1
        if max_tokens:
            assert quantiles[-1] <= max(max_tokens - job.output_tokens, 1)
        job.extend(answer, len(answer))
    job.extend(answer[-3:], len(answer))
    assert job.output_tokens == len(answer)


def test_a_batch_predicts_what_single_calls_do(learned: Predictor) -> None:
    some = conversations(12, seed=5)
    ages = [0, 5, 20, 70] * 3  # of no model of answers, of the first, of the second
    jobs, same = ([learned.track(c.prompt) for c in some] for _ in range(2))
    for a, b, c, tokens in zip(jobs, same, some, ages, strict=True):
        for job in (a, b):
            job.extend(c.answer_ids[:tokens], tokens)
    single = [learned.predict([job])[0] for job in jobs]
    np.testing.assert_allclose(learned.predict(same), single, rtol=1e-3)


def test_extend_stores_what_was_seen_at_each_milestone(learned: Predictor) -> None:
    job = learned.track(prompt_input([10, 11]))
    job.extend(range(10, 30), 20)
    job.extend([12], 40)  # a gap
    job.extend([12], 40)
    assert [s.output_tokens for s in job.snapshots] == [8, 16, 32]


def test_a_flood_of_aborted_jobs_does_not_make_answers_look_short(table: Path) -> None:
    predictor = taught(table)
    probes = [predictor.track(c.prompt) for c in conversations(60, seed=3)]
    before = np.array(predictor.predict(probes))[:, 2]
    for one in conversations(300, seed=4):
        finish(predictor, one, Outcome.CENSORED, cut=3)
    for one in conversations(40, seed=5):
        finish(predictor, one)
    predictor.train_now()
    after = np.array(predictor.predict(probes))[:, 2]
    assert np.median(after / before) > 0.8
    assert tau_b(before, after) > 0.6


def test_jobs_capped_at_a_limit_count_as_longer_than_it(table: Path) -> None:
    predictor = taught(table)
    longs = [c for c in conversations(200, seed=6) if len(c.answer_ids) > 200]
    probes = [predictor.track(c.prompt) for c in longs]
    for one in conversations(150, seed=7):
        cut = min(len(one.answer_ids), 100)
        is_cut = cut < len(one.answer_ids)
        finish(predictor, one, Outcome.CENSORED if is_cut else Outcome.COMPLETE, cut=cut)
    predictor.train_now()
    assert np.median(np.array(predictor.predict(probes))[:, 2]) > 150


def test_only_censored_jobs_give_no_model(table: Path) -> None:
    predictor = Predictor(PredictorSettings())
    predictor.load_token_table(table)
    for one in conversations(100):
        finish(predictor, one, Outcome.CENSORED, cut=5)
    assert not predictor.train_now()


def test_noise_gives_no_model(table: Path) -> None:
    predictor = Predictor(PredictorSettings())
    predictor.load_token_table(table)
    rng = np.random.default_rng(0)
    for one in conversations(120):
        job = predictor.track(one.prompt)
        job.extend([], int(rng.lognormal(4, 1)) + 1)
        predictor.observe(job, Outcome.COMPLETE)
    predictor.train_now()
    # A model of noise may win narrowly; it must then be about the plain distribution.
    if predictor.model_version:
        predicted = predictor.predict([predictor.track(c.prompt) for c in conversations(60, 8)])
        assert np.std(np.log(np.array(predicted)[:, 2])) < 0.6


def test_drift_is_noticed_and_learned(table: Path) -> None:
    predictor = taught(table)
    for one in conversations(80, seed=3):
        finish(predictor, one)
    assert not predictor.quality().is_drifting
    for one in conversations(140, seed=4, scale=6.0):
        finish(predictor, one)
    assert predictor.quality().is_drifting
    assert predictor.train_now()
    assert predictor.model_version == 2
    assert not predictor.quality().is_drifting


def test_quality_is_of_predictions_made_at_arrival(table: Path) -> None:
    predictor = taught(table)
    for one in conversations(60, seed=3):
        finish(predictor, one)
    quality = predictor.quality()
    assert quality.jobs == 60
    assert quality.tau_b > 0.4
    assert 0.3 < quality.p50_coverage < 0.7


def test_without_a_table_prompt_length_is_all_that_counts() -> None:
    predictor = Predictor(PredictorSettings())
    rng = np.random.default_rng(0)
    for _ in range(120):
        tokens = int(rng.integers(5, 500))
        job = predictor.track(prompt_input([5] * 5, prompt_tokens=tokens))
        job.extend([], int(tokens * rng.lognormal(0, 0.2)) + 1)
        predictor.observe(job, Outcome.COMPLETE)
    assert predictor.train_now()
    short, long = predictor.predict(
        [predictor.track(prompt_input([5], prompt_tokens=n)) for n in (20, 400)]
    )
    assert short is not None
    assert long is not None
    assert long[2] > 3 * short[2]


def test_a_bad_table_changes_nothing(learned: Predictor, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no")
    version = learned.model_version
    with pytest.raises(TokenTableError):
        learned.load_token_table(tmp_path / "bad.npz")
    assert learned.model_version == version
    assert learned.predict([learned.track(prompt_input([10]))]) != [None]


def test_samples_of_another_served_model_do_not_mix(tmp_path: Path) -> None:
    first, second = write_table(tmp_path / "a.npz"), write_table(tmp_path / "b.npz", seed=1)
    predictor = taught(first, state_dir=tmp_path / "state")
    old = predictor.track(prompt_input([10]))
    predictor.load_token_table(second)
    assert (predictor.model_version, predictor.sample_count) == (0, 0)
    assert predictor.predict([old]) == [None]
    predictor.observe(old, Outcome.COMPLETE)
    assert predictor.sample_count == 0
    predictor.close()
    again = Predictor(PredictorSettings(tmp_path / "state"))
    again.load_token_table(first)
    assert (again.model_version, again.sample_count) == (1, 150)


def test_a_training_that_ends_under_another_served_model_changes_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = write_table(tmp_path / "a.npz"), write_table(tmp_path / "b.npz", seed=1)
    predictor = taught(first, count=300)
    real = predictor_module.train_here

    def train_while_another_engine_connects(request: TrainRequest) -> tuple[Models, Trained] | None:
        fitted = real(request)
        predictor.load_token_table(second)
        return fitted

    monkeypatch.setattr(predictor_module, "train_here", train_while_another_engine_connects)
    assert not predictor.train_if_due()
    monkeypatch.setattr(predictor_module, "train_here", real)
    for one in conversations(64):
        finish(predictor, one)
    assert predictor.train_if_due()


def test_a_restarted_predictor_predicts_at_once_and_the_same(table: Path, tmp_path: Path) -> None:
    predictor = taught(table, state_dir=tmp_path)
    probes = conversations(10, seed=9)
    before = predictor.predict([predictor.track(c.prompt) for c in probes])
    predictor.close()
    again = Predictor(PredictorSettings(tmp_path))
    again.load_token_table(table)
    assert again.predict([again.track(c.prompt) for c in probes]) == before
    assert again.model_trained_unix_s > 0


def test_trains_in_the_background_on_its_schedule(table: Path) -> None:
    predictor = Predictor(PredictorSettings(min_samples=80))
    predictor.load_token_table(table)
    predictor.start(lambda call: call())
    try:
        for one in conversations(79):
            finish(predictor, one)
        time.sleep(0.3)
        assert predictor._worker is None
        finish(predictor, conversation(np.random.default_rng(5)))
        _wait_for(lambda: predictor.model_version == 1)
        assert predictor._next_training > 100
    finally:
        predictor.close()


def test_a_dying_trainer_is_survived(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = predictor_module.start_worker

    def start_and_kill() -> subprocess.Popen[bytes]:
        worker = real()
        worker.kill()
        monkeypatch.setattr(predictor_module, "start_worker", real)
        return worker

    monkeypatch.setattr(predictor_module, "start_worker", start_and_kill)
    predictor = Predictor(PredictorSettings(min_samples=80, retrain_after=1, retrain_growth=0.0))
    predictor.load_token_table(table)
    predictor.start(lambda call: call())
    try:
        for one in conversations(80):
            finish(predictor, one)
        _wait_for(lambda: predictor_module.start_worker is real)
        _wait_for(lambda: predictor._next_training == 81)
        finish(predictor, conversation(np.random.default_rng(5)))
        _wait_for(lambda: predictor.model_version == 1)
    finally:
        predictor.close()


def _wait_for(condition: object, timeout_s: float = 240.0) -> None:
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
