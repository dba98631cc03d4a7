"""What the benchmark says as it goes."""

from __future__ import annotations

import io
import math

import pytest
from alise_bench.progress import Progress
from rich.console import Console


@pytest.mark.parametrize(
    ("late_share", "is_said"), [(math.nan, False), (0.009, False), (0.05, True)]
)
def test_a_machine_that_is_too_slow_for_its_pace_is_named(late_share: float, is_said: bool) -> None:
    out = io.StringIO()
    Progress(Console(file=out, width=200)).pace(late_share)
    assert ("steps took 5.0% longer; choose a slower --pace profile" in out.getvalue()) == is_said
