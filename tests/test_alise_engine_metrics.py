"""The engine's metrics and the list of them in docs/metrics.md are the same."""

from __future__ import annotations

import re
from pathlib import Path

from alise_engine import metrics
from alise_engine.kv_tier import metrics as tier_metrics
from prometheus_client import Counter, Gauge

DOCS = Path(__file__).parents[1] / "docs" / "metrics.md"


def test_documented_metrics_are_the_metrics() -> None:
    section = DOCS.read_text().partition("## Engine")[2]
    documented = dict(re.findall(r"^\| `(alise_\w+)` \| (\w+) \|", section, re.M))
    actual = {}
    for metric in (*vars(metrics).values(), *vars(tier_metrics).values()):
        if isinstance(metric, Counter):
            actual[f"{metric._name}_total"] = "counter"
        elif isinstance(metric, Gauge):
            actual[metric._name] = "gauge"
    assert documented == actual
