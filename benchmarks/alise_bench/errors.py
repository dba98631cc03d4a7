"""The error that a user of the benchmark can act on."""

from __future__ import annotations


class BenchError(Exception):
    """The benchmark cannot go on; the message says what to change."""
