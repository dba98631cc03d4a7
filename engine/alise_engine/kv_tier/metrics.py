"""What the KV tier counts, on the engine's own `/metrics`; docs/metrics.md lists them.

Apart from the scheduler's, as the workers' processes have these too: a gauge that somebody never
sets counts as 0.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge

from alise_engine.metric_files import OWN_REGISTRY, count_in_files

count_in_files()

BYTES_HELD = Gauge(
    "alise_kv_tier_held_bytes",
    "Host memory that holds KV of live jobs.",
    multiprocess_mode="livesum",
    registry=OWN_REGISTRY,
)
BYTES_MOVED = Counter(
    "alise_kv_tier_moved_bytes",
    "Bytes copied between device and host, as stored (quantized).",
    ["direction"],
    registry=OWN_REGISTRY,
)
BANDWIDTH = Gauge(
    "alise_kv_tier_bandwidth_bytes_per_second",
    "Measured speed of copies, in bytes as stored, quantizing included.",
    ["direction"],
    multiprocess_mode="livemax",
    registry=OWN_REGISTRY,
)
LOOKUPS = Counter(
    "alise_kv_tier_lookups",
    "Returns of preempted jobs by what the tier had of them; all but `hit` are misses by cause.",
    ["result"],
    registry=OWN_REGISTRY,
)
RESTORED_TOKENS = Counter(
    "alise_kv_tier_restored_tokens",
    "Tokens that came back from host memory: recomputing them was avoided.",
    registry=OWN_REGISTRY,
)
PREFETCHES = Counter(
    "alise_kv_tier_prefetches",
    "Copies that came back before their job's turn, by whether they were there in time.",
    ["result"],
    registry=OWN_REGISTRY,
)
CHECKSUM_FAILURES = Counter(
    "alise_kv_tier_checksum_failures",
    "Blocks in host memory that were damaged, or never written, when they were to be loaded.",
    registry=OWN_REGISTRY,
)
FAILURES = Counter(
    "alise_kv_tier_failed_copies",
    "Copies that raised an error; the blocks were computed again.",
    ["direction"],
    registry=OWN_REGISTRY,
)
QUANTIZATION_ERROR = Gauge(
    "alise_kv_tier_quantization_relative_error",
    "Root mean square error of stored KV over its root mean square, of a sampled store.",
    multiprocess_mode="livemax",
    registry=OWN_REGISTRY,
)
