"""A paced engine: how long its steps are, and what counts towards them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from alise_bench.pace import Hold, step_seconds
from alise_scheduler.cost_model import StepCost


class Clock:
    """Time that passes only when somebody takes it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def take(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.mark.parametrize(
    ("layers_s", "logits_s", "between_s", "whole_s"),
    [
        (0.3, 0.1, 0.0, 1.0),
        (0.3, 0.1, 0.25, 1.25),  # copies of KV are not the model's time: they come on top
        (0.9, 0.3, 0.0, 1.2),  # a machine that is too slow is not made slower
    ],
)
def test_a_step_is_held_until_its_time_is_up(
    layers_s: float, logits_s: float, between_s: float, whole_s: float
) -> None:
    clock = Clock()
    hold = Hold(clock, clock.take)
    layers, logits = hold.counted(clock.take), hold.ending(clock.take)
    for step in (1, 2):
        hold.begin(1.0)
        layers(layers_s)
        clock.take(between_s)
        logits(logits_s)
        assert clock.now_s == pytest.approx(step * whole_s)
    late_s = max(layers_s + logits_s - 1.0, 0.0)
    assert (hold.steps, hold.paced_s) == (2, 2.0)
    assert hold.late_s == pytest.approx(2 * late_s)


def test_without_a_step_nothing_is_held() -> None:
    clock = Clock()
    hold = Hold(clock, clock.take)
    assert hold.counted(lambda: clock.take(0.5))() is None  # warming up
    assert hold.ending(lambda: "logits")() == "logits"
    assert clock.now_s == 0.5
    assert (hold.steps, hold.late_s) == (0, 0.0)


def test_a_steps_time_is_that_of_its_work() -> None:
    scheduled = SimpleNamespace(
        num_scheduled_tokens={"new": 7, "restored": 3, "a": 1, "b": 1},
        scheduled_new_reqs=[SimpleNamespace(req_id="new", num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["restored", "a", "b"], num_computed_tokens=[50, 100, 200]
        ),
    )
    assert step_seconds(scheduled, StepCost(1.0, 0.1, 0.01, 0.001)) == pytest.approx(
        1.0 + 0.1 * 10 + 0.01 * 2 + 0.001 * 300
    )
