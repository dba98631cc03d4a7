from pathlib import Path

import pytest
from alise_bench.learning import RECOVERED_WITHIN, Curve, learning_curves, recovery
from alise_bench.learning_picture import draw_learning
from predictor_fixtures import OTHER_MEAN_LENGTH, conversations, write_table


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> list[Curve]:
    table = write_table(tmp_path_factory.mktemp("t") / "t.npz")
    first, then = conversations(150), conversations(260, seed=1, mean_length=OTHER_MEAN_LENGTH)
    return learning_curves(first, then, table, seed=0)


def test_before_the_first_model_nothing_is_known_and_then_it_learns(curves: list[Curve]) -> None:
    first = curves[0]
    assert (first.at(0), first.points[0].model_version) == (0.0, 0)
    assert first.at(50) == 0.0
    assert first.at(105) > 0.5


def test_after_a_switch_it_recovers_by_its_own_schedule(curves: list[Curve]) -> None:
    _, switched, fresh = curves
    assert switched.at(0) < -0.3, "what it had learned is now wrong"
    assert fresh.at(150) > 0.5
    assert recovery(curves, 150) < RECOVERED_WITHIN


def test_the_picture_has_a_panel_for_each(curves: list[Curve], tmp_path: Path) -> None:
    assert len(draw_learning(curves, "a", "b").axes) == 2
    assert len(draw_learning(curves[:1], "a", "").axes) == 1
