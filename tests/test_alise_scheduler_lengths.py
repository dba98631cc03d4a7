"""Lengths as distributions."""

from __future__ import annotations

import math

import pytest
from alise_scheduler.lengths import mass_points, mean, remaining_after
from hypothesis import given
from hypothesis import strategies as st

quantiles = st.lists(st.floats(1.0, 1e5), min_size=5, max_size=5).map(lambda q: tuple(sorted(q)))


@given(quantiles)
def test_mass_points_ascend_and_are_at_least_one_token(levels) -> None:
    points = mass_points(levels)
    assert list(points) == sorted(points)
    assert 1.0 <= points[0] <= points[-1] < math.inf


@given(quantiles)
def test_mass_points_keep_the_quantiles(levels) -> None:
    points = mass_points(levels)
    for level, value in zip((0.1, 0.25, 0.5, 0.75, 0.9), levels, strict=True):
        below = sum(p <= value * (1 + 1e-9) for p in points) / len(points)
        assert below >= level - 0.05


@given(quantiles, st.floats(0.0, 1e6))
def test_something_always_remains(levels, lived) -> None:
    points = remaining_after(levels, lived)
    assert points
    assert all(0 < p < math.inf for p in points)


@given(quantiles, st.floats(0.0, 1e5))
def test_living_on_rules_out_only_the_shorter_lengths(levels, lived) -> None:
    points = mass_points(levels)
    if any(p > lived for p in points):
        longer = [p for p in points if p > lived]
        assert mean(remaining_after(levels, lived)) == pytest.approx(
            sum(longer) / len(longer) - lived, abs=1e-6, rel=1e-6
        )


def test_a_job_that_outlived_its_distribution_is_expected_to_go_on() -> None:
    assert mean(remaining_after((10, 20, 30, 40, 50), 1000)) == pytest.approx(350)
    assert mean(remaining_after((1, 1, 1, 1, 1), 2)) == pytest.approx(8)
