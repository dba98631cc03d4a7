"""`alise simulate --folds`: models of the data set itself, none of which knows what it predicts."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from alise_bench.dataset import Conversation as Row
from alise_bench.dataset import Item
from alise_bench.errors import BenchError
from alise_bench.simulation import cross_fitting
from alise_bench.simulation.cli import app
from alise_bench.simulation.compare import metrics_of, simulate
from alise_bench.simulation.cross_fitting import CrossFittedPredictor, fit_folds
from alise_bench.simulation.profiles import load_profile
from alise_bench.simulation.systems import ALISE, FCFS
from alise_bench.simulation.workload import capacity_per_s, lengths_of, poisson_items
from alise_scheduler.evaluation import Conversation
from predictor_fixtures import conversations, write_table
from scipy.stats import kendalltau
from typer.testing import CliRunner

ROWS = conversations(180)
FOLDS = 3


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> CrossFittedPredictor:
    return fit_folds(ROWS, FOLDS, write_table(tmp_path_factory.mktemp("t") / "t.npz"))


def _median(predictor: CrossFittedPredictor, row: Conversation) -> float:
    (quantiles,) = predictor.predict([predictor.track(row.prompt)])
    assert quantiles is not None
    return quantiles[2]


def test_no_row_is_predicted_by_models_that_learned_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learned: list[set[bytes]] = []

    class Taught:
        model_version = 1

    def trained_on(rows: Sequence[Conversation], table: Path) -> Taught:
        learned.append({row.prompt.token_ids.tobytes() for row in rows})
        return Taught()

    monkeypatch.setattr(cross_fitting, "trained_on", trained_on)
    predictor = fit_folds(ROWS, FOLDS, tmp_path / "table.npz")
    for row in ROWS:
        ids = row.prompt.token_ids.tobytes()
        own = predictor.fold_of(row.prompt)
        assert [ids in learned[fold] for fold in range(FOLDS)] == [
            fold != own for fold in range(FOLDS)
        ]


def test_the_other_folds_tell_a_rows_length(fitted: CrossFittedPredictor) -> None:
    told = [_median(fitted, row) for row in ROWS]
    assert kendalltau(told, [len(row.answer_ids) for row in ROWS])[0] > 0.5


def test_jobs_of_several_folds_are_predicted_together_as_one_by_one(
    fitted: CrossFittedPredictor,
) -> None:
    together = fitted.predict([fitted.track(row.prompt) for row in ROWS[:20]])
    medians = [quantiles[2] for quantiles in together if quantiles is not None]
    alone = [_median(fitted, row) for row in ROWS[:20]]
    assert medians == pytest.approx(alone, rel=1e-4)  # sums in float32


def test_a_simulation_goes_by_them(fitted: CrossFittedPredictor) -> None:
    profile = load_profile("smollm2-cpu")
    items = [
        Item(str(i), str(i), tuple(row.prompt.token_ids.tolist()), row.answer_ids, Row("", (), ""))
        for i, row in enumerate(ROWS)
    ]
    rate = 1.2 * capacity_per_s(lengths_of(items), profile.hardware)
    requests = poisson_items(items, rate, 200, seed=0)
    fcfs, alise = (
        metrics_of(simulate(system, requests, profile, sigma=0.0, predictor=fitted))
        for system in (FCFS, ALISE)
    )
    assert alise.normalized_latency_s < 0.8 * fcfs.normalized_latency_s


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.npz")
    with pytest.raises(BenchError, match=r"--folds 2: no model of 10 rows .*; more rows"):
        fit_folds(ROWS[:20], 2, table)


def test_lengths_alone_cannot_be_learned_from(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"arrival_s": 0, "prompt_tokens": 5, "output_tokens": 5}\n' * 2)
    ended = CliRunner().invoke(app, ["--trace", str(trace), "--folds", "2"])
    assert ended.exit_code == 1
    assert "pass --dataset too" in ended.output
    line = ["--trace", str(trace), "--folds", "2", "--predictor", str(tmp_path)]
    ended = CliRunner().invoke(app, line)
    assert "one of them" in ended.output
