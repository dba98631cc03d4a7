"""docs/metrics.md and the sidecar's registry list the same metrics."""

from __future__ import annotations

import re
from pathlib import Path

from alise_scheduler.metrics import Metrics
from prometheus_client import Counter, Gauge, Histogram

DOCS = Path(__file__).parent.parent / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(alise_\w+)` \| (\w+) \|(.*?)\| (.+) \|$", re.MULTILINE)


def test_docs_list_exactly_the_registry() -> None:
    sidecar = DOCS.read_text().split("## Engine")[0]
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", re.sub(r": [^;]*$", "", labels))))
        for name, kind, labels, _ in ROW.findall(sidecar)
    }
    registered = {}
    for metric in vars(Metrics()).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            suffix = "_total" if isinstance(metric, Counter) else ""
            registered[metric._name + suffix] = (metric._type, set(metric._labelnames))
    assert documented == registered
