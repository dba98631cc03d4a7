import math
from pathlib import Path

import numpy as np
import pytest
import xgboost
from alise_scheduler.conditioning import conditioned
from alise_scheduler.lengths import QUANTILE_LEVELS, mass_points, remaining_after
from alise_scheduler.model_blob import ModelBlobError, models_from_bytes, models_to_bytes
from alise_scheduler.quality import QualityWindow
from alise_scheduler.quantile_model import fit_quantiles, pinball
from alise_scheduler.retrieval import MAX_STORED, fit_retrieval
from alise_scheduler.ridge import bag_matrix, fit_ridge
from alise_scheduler.ridge_solver import PENALTIES, solve_ridge
from alise_scheduler.training import best_share
from alise_scheduler.trees import DEPTH, flatten
from hypothesis import given
from hypothesis import strategies as st
from predictor_fixtures import conversations, taught, write_table


def test_ridge_held_out_predictions_are_those_of_a_fit_without_the_group() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4)).astype(np.float32)
    target = rows[:, 0] + 0.1 * rng.normal(size=60).astype(np.float32)
    noise = rng.normal(size=60).astype(np.float32)
    groups = np.repeat(np.arange(20), 3)
    bags, one = bag_matrix([np.empty(0, dtype=np.uint16)] * 60), np.zeros(60, dtype=np.int64)
    _, held_out = fit_ridge(rows, bags, target, groups, one, ((0, 4),), 60, rng)
    assert np.corrcoef(held_out, target)[0, 1] > 0.8
    _, held_out = fit_ridge(rows, bags, noise, groups, one, ((0, 4),), 60, rng)
    assert np.corrcoef(held_out, noise)[0, 1] < 0.4, "memorized noise would look like skill"


def test_predictions_out_of_group_are_those_of_a_fit_without_it() -> None:
    rng = np.random.default_rng(0)
    design, target = rng.normal(size=(30, 8)), rng.normal(size=30)
    groups = np.repeat(np.arange(10), 3)
    _, held_out = solve_ridge(
        design - design.mean(0), (target - target.mean()).astype(np.float32), groups
    )
    errors = []
    for penalty in PENALTIES:
        refitted = np.empty(30)
        for group in range(10):
            own = groups == group
            center, mean = design[~own].mean(0), target[~own].mean()
            rows = design[~own] - center
            weights = np.linalg.solve(
                rows.T @ rows + penalty * np.eye(8), rows.T @ (target[~own] - mean)
            )
            refitted[own] = mean + (design[own] - center) @ weights
        errors.append(np.abs(held_out + target.mean() - refitted).max())
    assert min(errors) < 1e-5, "the intercept, too, must not have seen the group"


def test_ridge_learns_from_words_alone() -> None:
    rng = np.random.default_rng(0)
    bags = bag_matrix([np.array([i % 2, *rng.integers(2, 50, 4)], np.uint16) for i in range(80)])
    target = np.array([float(i % 2) for i in range(80)], dtype=np.float32)
    rows = np.zeros((80, 2), dtype=np.float32)
    one = np.zeros(80, dtype=np.int64)
    model, _ = fit_ridge(rows, bags, target, np.arange(80), one, ((0, 2),), 40, rng)
    words = bag_matrix([np.array([1], np.uint16), np.array([0], np.uint16)])
    long, short = model.predict(rows[:2], words)
    assert long > short


def test_ridge_ranks_within_strata() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 2)).astype(np.float32)
    stratum = np.arange(120) % 2
    target = (rows[:, 0] + 100.0 * stratum).astype(np.float32)
    bags = bag_matrix([np.empty(0, dtype=np.uint16)] * 120)
    model, _ = fit_ridge(rows, bags, target, np.arange(120), stratum, ((0, 2),), 60, rng)
    ranks = model.predict(rows, bags)
    assert np.corrcoef(ranks, rows[:, 0])[0, 1] > 0.95
    assert abs(ranks[stratum == 0].mean() - ranks[stratum == 1].mean()) < 0.1


def test_a_prediction_costs_no_more_after_many_samples() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(3000, 6)).astype(np.float32)
    target, groups = rows[:, 0], np.arange(3000)
    bags = bag_matrix([rng.integers(0, 4096, 5).astype(np.uint16) for _ in range(3000)])
    ridge, _ = fit_ridge(rows, bags, target, groups, np.zeros_like(groups), ((0, 6),), 64, rng)
    assert ridge.landmarks.shape == (6, 64)
    assert len(ridge.buckets) <= 600
    retrieval, _ = fit_retrieval(rows, target)
    assert retrieval.stored.shape[1] == MAX_STORED < 3000
    assert (retrieval.target == target[-MAX_STORED:]).all()


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
    model, held_out = fit_quantiles(rows[:600], target[:600], np.arange(600), DEPTH, rng)
    predicted = model.predict(rows[600:])
    assert (np.diff(predicted, axis=1) >= 0).all()
    coverage = (target[600:, None] <= predicted).mean(0)
    np.testing.assert_allclose(coverage, QUANTILE_LEVELS, atol=0.07)
    np.testing.assert_allclose((target[:600, None] <= held_out).mean(0), QUANTILE_LEVELS, atol=0.02)


@pytest.mark.parametrize("count", [30, 400])
def test_flat_trees_are_xgboosts_own(count: int) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(count, 5)).astype(np.float32).round(1)
    target = (rows[:, 0] * rows[:, 1] + rng.normal(size=count)).astype(np.float32)
    parameters = {
        "objective": "reg:quantileerror",
        "quantile_alpha": list(QUANTILE_LEVELS),
        "max_depth": DEPTH,
        "min_child_weight": 8.0,
        "nthread": 1,
    }
    booster = xgboost.train(parameters, xgboost.QuantileDMatrix(rows, target), 20)
    trees = flatten(booster, 5, len(QUANTILE_LEVELS))
    # Rounded, many values lie on a threshold; 700 rows are more than one block.
    probes = rng.normal(size=(700, 5), scale=2).astype(np.float32).round(1)
    np.testing.assert_allclose(
        trees.predict(probes), booster.inplace_predict(probes), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(trees.predict(probes[:1])[0], trees.predict(probes)[0])


@given(
    logs=st.lists(st.floats(0.0, 12.0), min_size=5, max_size=5),
    lived=st.lists(st.integers(1, 5000), min_size=1, max_size=4),
)
def test_conditioning_rows_is_conditioning_one_by_one(logs: list[float], lived: list[int]) -> None:
    row = np.sort(np.array(logs, dtype=np.float32))
    together = np.exp(conditioned(np.tile(row, (len(lived), 1)), np.array(lived)))
    for tokens, got in zip(lived, together, strict=True):
        exact = tuple(np.exp(row.astype(float)).tolist())
        # Close to a point, rounding alone may rule it out.
        if min(abs(point - tokens) for point in mass_points(exact)) > 1e-3 * tokens:
            left = remaining_after(exact, tokens)
            expected = np.maximum(np.quantile(left, QUANTILE_LEVELS), 1.0)
            np.testing.assert_allclose(got, expected, rtol=2e-2)


def test_the_blend_follows_whichever_was_better_on_jobs_held_out() -> None:
    rng = np.random.default_rng(0)
    target = rng.normal(size=400).astype(np.float32)
    good = np.tile(target[:, None], (1, 5)) + rng.normal(scale=0.1, size=(400, 1))
    bad = rng.normal(size=(400, 1)) + np.zeros((400, 5))
    good, bad = good.astype(np.float32), bad.astype(np.float32)
    assert best_share(good, bad, target) < 0.2
    assert best_share(bad, good, target) > 0.8
    equal = (target[:, None] + rng.normal(scale=0.1, size=(400, 1)) + np.zeros((400, 5))).astype(
        np.float32
    )
    assert 0.2 < best_share(good, equal, target) < 0.8


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
    assert [model.from_tokens for model in models.answers] == [8, 64]
    blob = models_to_bytes(models)
    again = models_from_bytes(blob)
    jobs = [predictor.track(c.prompt) for c in conversations(20, seed=9)]
    for job, c in zip(jobs[10:], conversations(20, seed=9)[10:], strict=True):
        tokens = min(len(c.answer_ids), 70)
        job.extend(c.answer_ids[:tokens], tokens)
    assert {job.output_tokens >= 64 for job in jobs[10:]} == {False, True}
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
