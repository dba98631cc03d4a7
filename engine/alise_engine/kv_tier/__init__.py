"""The KV tier: KV cache of preempted jobs, quantized to INT8, kept in host memory.

decisions -> scheduler (what to store, evict, load) -> manager (which host slot holds what)
-> worker (copies between device and host) -> quantization, host_memory. docs/kv-tier.md walks
one preemption through them.
"""
