import math
from pathlib import Path

import numpy as np
import pytest
from alise_scheduler.lengths import QUANTILE_LEVELS
from alise_scheduler.model_blob import ModelBlobError, models_from_bytes, models_to_bytes
from alise_scheduler.quality import QualityWindow
from alise_scheduler.quantile_model import fit_quantiles, pinball
from alise_scheduler.retrieval import fit_retrieval
from alise_scheduler.ridge import fit_ridge
from predictor_fixtures import conversations, taught, write_table


def test_ridge_held_out_predictions_are_those_of_a_fit_without_the_group() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4)).astype(np.float32)
    target = rows[:, 0] + 0.1 * rng.normal(size=60).astype(np.float32)
    noise = rng.normal(size=60).astype(np.float32)
    groups = np.repeat(np.arange(20), 3)
    bags = [np.empty(0, dtype=np.uint16)] * 60
    _, held_out = fit_ridge(rows, bags, target, groups, ((0, 4),), 60, rng)
    assert np.corrcoef(held_out, target)[0, 1] > 0.8
    _, held_out = fit_ridge(rows, bags, noise, groups, ((0, 4),), 60, rng)
    assert np.corrcoef(held_out, noise)[0, 1] < 0.4, "memorized noise would look like skill"


def test_ridge_learns_from_words_alone() -> None:
    rng = np.random.default_rng(0)
    bags = [np.array(sorted({i % 2, *rng.integers(2, 50, 4)}), dtype=np.uint16) for i in range(80)]
    target = np.array([float(i % 2) for i in range(80)], dtype=np.float32)
    rows = np.zeros((80, 2), dtype=np.float32)
    model, _ = fit_ridge(rows, bags, target, np.arange(80), ((0, 2),), 40, rng)
    long, short = model.predict(rows[:2], [np.array([1], np.uint16), np.array([0], np.uint16)])
    assert long > short


def test_retrieval_never_finds_the_row_itself() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8)).astype(np.float32)
    target = np.arange(40, dtype=np.float32)
    retrieval, own = fit_retrieval(rows, target)
    assert (own[:, 2] != target).all()
    assert retrieval.features(rows)[:, 2].tolist() == target.tolist()


def test_quantiles_cover_what_they_say() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1200, 3)).astype(np.float32)
    target = (rows[:, 0] + rng.normal(size=1200)).astype(np.float32)
    model = fit_quantiles(rows[:600], target[:600], np.arange(600), rng)
    predicted = model.predict(rows[600:])
    assert (np.diff(predicted, axis=1) >= 0).all()
    coverage = (target[600:, None] <= predicted).mean(0)
    np.testing.assert_allclose(coverage, QUANTILE_LEVELS, atol=0.07)


def test_pinball_is_least_at_the_true_quantiles() -> None:
    target = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    true = np.quantile(target, QUANTILE_LEVELS).astype(np.float32)
    best = pinball(np.tile(true, (4000, 1)), target).mean()
    for shift in (-0.3, 0.3):
        assert pinball(np.tile(true + shift, (4000, 1)), target).mean() > best


def test_models_survive_bytes(tmp_path: Path) -> None:
    predictor = taught(write_table(tmp_path / "t.npz"))
    models = predictor._models
    assert models is not None
    assert models.answer is not None
    blob = models_to_bytes(models)
    again = models_from_bytes(blob)
    jobs = [predictor.track(c.prompt) for c in conversations(20, seed=9)]
    for job, c in zip(jobs[10:], conversations(20, seed=9)[10:], strict=True):
        job.extend(c.answer_ids[:10], 10)
    before = predictor.predict(jobs)
    predictor._models = again
    assert predictor.predict(jobs) == before
    for bad in (b"", blob[: len(blob) // 2], b"x" + blob[1:]):
        with pytest.raises(ModelBlobError):
            models_from_bytes(bad)


def test_quality_figures_and_drift() -> None:
    window = QualityWindow(100)
    assert math.isnan(window.figures(0.1).tau_b)
    for i in range(1, 101):
        window.add((i / 2, i * 0.8, float(i), i * 1.2, i * 2.0), i)
    good = window.figures(expected_loss=0.2)
    assert (good.jobs, good.tau_b, good.mae_tokens, good.is_drifting) == (100, 1.0, 0.0, False)
    assert good.p50_coverage == good.p90_coverage == 1.0
    for i in range(1, 101):
        window.add((i / 2, i * 0.8, float(i), i * 1.2, i * 2.0), i * 10)
    assert window.figures(expected_loss=0.2).is_drifting
    window.forget_drift()
    assert not window.figures(expected_loss=0.2).is_drifting
