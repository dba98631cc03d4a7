"""The operator's Prometheus metrics; docs/operator.md lists the same ones for readers."""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """All metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.reconciles = Counter(
            "alise_operator_reconciles",
            "Reconciles by result: done, retried, failed or skipped (another operator leads).",
            ["result"],
            registry=registry,
        )
        self.reconcile_s = Histogram(
            "alise_operator_reconcile_seconds",
            "Time of one reconcile.",
            buckets=_BUCKETS_S,
            registry=registry,
        )
        self.requests = Counter(
            "alise_operator_api_requests",
            "Requests to the API server beside watches, by verb, kind and status code.",
            ["verb", "kind", "code"],
            registry=registry,
        )
        self.queued = Gauge(
            "alise_operator_queue_length", "Services that wait for a reconcile.", registry=registry
        )
        self.services = Gauge(
            "alise_operator_services", "Services that are watched.", registry=registry
        )
        self.ready = Gauge(
            "alise_operator_service_ready",
            "1 while the service's condition Ready is true; absent while it is scaled to zero.",
            ["namespace", "name"],
            registry=registry,
        )
        self.missed_events = Counter(
            "alise_operator_missed_events",
            "Changes that an audit found and no watch had told of, by kind.",
            ["kind"],
            registry=registry,
        )
