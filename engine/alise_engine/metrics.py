"""What the scheduler plug-in counts, shown on the engine's own `/metrics`.

vLLM's API server collects these from the engine's processes (`metric_files`). Written by the
stream's thread and once in a reporting interval, never in a hot loop. docs/metrics.md lists them.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from alise_engine.metric_files import OWN_REGISTRY, count_in_files

count_in_files()

SIDECAR_CONNECTED = Gauge(
    "alise_engine_sidecar_connected",
    "1 while there is a stream to the scheduler sidecar, 0 while jobs are ordered without it.",
    multiprocess_mode="livemin",
    registry=OWN_REGISTRY,
)
RANKED_JOBS = Gauge(
    "alise_engine_ranked_jobs",
    "Live jobs with a priority from the sidecar; the others are ordered by arrival (FCFS).",
    multiprocess_mode="livesum",
    registry=OWN_REGISTRY,
)
LIVE_JOBS = Gauge(
    "alise_engine_live_jobs",
    "Jobs that are queued or running.",
    multiprocess_mode="livesum",
    registry=OWN_REGISTRY,
)
PREEMPTIONS = Counter(
    "alise_engine_preemptions",
    "Running jobs that dispatch preempted for a better waiting one.",
    registry=OWN_REGISTRY,
)
PREEMPTED_TOKENS = Counter(
    "alise_engine_preempted_tokens",
    "Tokens whose KV left the device by preemptions, dispatch's and vLLM's own.",
    registry=OWN_REGISTRY,
)
RECOMPUTED_TOKENS = Counter(
    "alise_engine_recomputed_tokens",
    "Of the preempted tokens, those that were computed again; the others came back from the "
    "device's prefix cache or the KV tier.",
    registry=OWN_REGISTRY,
)
ESTIMATES_REFUSED = Counter(
    "alise_engine_estimates_refused",
    "Estimates from the sidecar that were not finite, or negative.",
    registry=OWN_REGISTRY,
)
ESTIMATES_UNKNOWN = Counter(
    "alise_engine_estimates_unknown_job",
    "Estimates for jobs that have ended meanwhile, or never were.",
    registry=OWN_REGISTRY,
)
