"""The chart's dashboard and alerts: each metric and label named exists, each query parses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import alise_engine.kv_tier.metrics as kv_tier_metrics
import alise_engine.metrics as engine_metrics
import pytest
import yaml
from alise_operator.metrics import Metrics as OperatorMetrics
from alise_scheduler.metrics import Metrics as SidecarMetrics
from prometheus_client import Counter, Gauge, Histogram

ROOT = Path(__file__).parent.parent
FILES = ROOT / "charts" / "alise-operator" / "files"
# What Prometheus adds to whatever it scrapes in a cluster.
TARGET_LABELS = {"namespace", "pod", "instance"}
VARIABLES = {"$__rate_interval": "5m", "$namespace": ".*", "$pod": ".*"}


def samples(name: str, kind: str) -> Iterator[str]:
    """Names of the samples that Prometheus stores of a metric."""
    if kind == "counter":
        yield f"{name.removesuffix('_total')}_total"
    elif kind == "histogram":
        yield from (f"{name}_{part}" for part in ("bucket", "sum", "count"))
    else:
        yield name


def ours() -> dict[str, set[str]]:
    """Samples that our code registers, and their labels."""
    found: dict[str, set[str]] = {}
    places = (vars(SidecarMetrics()), vars(OperatorMetrics()))
    for place in (*places, vars(engine_metrics), vars(kv_tier_metrics)):
        for metric in place.values():
            if isinstance(metric, Counter | Gauge | Histogram):
                for sample in samples(metric._name, metric._type):
                    found[sample] = {*metric._labelnames, "le"}
    return found


def vllms() -> dict[str, set[str]]:
    """Samples that the installed vLLM registers; its labels are the model's and the engine's."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    definition = re.compile(r"self\._(gauge|counter|histogram)_cls\(\s*name=\"(vllm:\w+)\"")
    return {
        sample: {"le", "model_name", "engine"}
        for kind, name in definition.findall(source)
        for sample in samples(name, kind)
    }


def queries() -> list[tuple[str, str]]:
    """(where, PromQL) of all panels and alerts."""
    dashboard = json.loads((FILES / "dashboard.json").read_text())
    found = [
        (panel["title"], target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    ]
    for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]:
        found += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


def with_values(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query, query
    return query


@pytest.mark.parametrize(("where", "query"), queries(), ids=lambda value: value[:60])
def test_every_metric_and_label_exists(where: str, query: str) -> None:
    pytest.importorskip("vllm", reason="needs the extra 'cpu' or 'cuda': vLLM's names are checked")
    known = ours() | vllms()
    named = re.findall(r"\b((?:alise|vllm)[_:]\w+)(?:\{([^}]*)\})?", query)
    assert named
    labels: set[str] = set()
    for name, selectors in named:
        assert name in known, name
        labels |= known[name]
        for label in re.findall(r"(\w+)\s*=", selectors):
            assert label in known[name] | TARGET_LABELS, f"{name} has no label {label}"
    for grouped in re.findall(r"\b(?:by|on) \(([^)]*)\)", query):
        for label in grouped.split(","):
            assert label.strip() in labels | TARGET_LABELS, label


def test_the_metrics_named_are_documented() -> None:
    documented = (ROOT / "docs" / "metrics.md").read_text()
    documented += (ROOT / "docs" / "operator.md").read_text()
    for _, query in queries():
        for name in re.findall(r"alise_\w+", query):
            stem = re.sub(r"_(bucket|sum|count)$", "", name)
            assert f"`{stem}`" in documented, stem


def test_every_query_parses(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install --no-install-recommends prometheus")
    rules = [
        {"record": f"q:{i}", "expr": with_values(query)} for i, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    for checked in (file, FILES / "alerts.yaml"):
        done = subprocess.run(
            [promtool, "check", "rules", str(checked)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_about_the_gain_fires_when_it_should(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool: apt-get install --no-install-recommends prometheus")
    ratio = 'alise_shadow_ratio{measure="mean_normalized_latency", pod="%s"}'
    series = [
        {"series": ratio % "bad", "values": "1.3x180"},
        {"series": 'alise_shadow_jobs{pod="bad"}', "values": "600x180"},
        {"series": ratio % "new", "values": "1.3x180"},
        {"series": 'alise_shadow_jobs{pod="new"}', "values": "60x180"},
        {"series": ratio % "good", "values": "0.5x180"},
        {"series": 'alise_shadow_jobs{pod="good"}', "values": "600x180"},
    ]

    def expected(at: str, alerts: list[dict[str, Any]]) -> dict[str, Any]:
        return {"eval_time": at, "alertname": "ALISEWorseThanFCFS", "exp_alerts": alerts}

    rule = next(
        rule
        for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"]
        for rule in group["rules"]
        if rule["alert"] == "ALISEWorseThanFCFS"
    )
    fired = {
        "exp_labels": {
            "severity": "warning", "measure": "mean_normalized_latency", "pod": "bad"
        },
        "exp_annotations": {
            "summary": rule["annotations"]["summary"].replace("{{ $labels.pod }}", "bad")
        },
    }  # fmt: skip
    test = {
        "interval": "1m",
        "input_series": series,
        "alert_rule_test": [expected("30m", []), expected("2h", [fired])],
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FILES / "alerts.yaml")], "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_can_be_imported_as_it_is() -> None:
    dashboard = json.loads((FILES / "dashboard.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
