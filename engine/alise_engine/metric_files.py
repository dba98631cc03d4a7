"""Brings metrics of the engine's processes to the `/metrics` of vLLM's API server.

They count in files of a folder that the launcher names, by prometheus_client's own multi-process
mode. In the API server itself that mode is off, as with stock vLLM: it observes each token there,
and files would make it some 1% slower. (With several API servers vLLM turns the mode on for all
processes by itself, and there is nothing to do.) This module knows no metric.
"""

from __future__ import annotations

import multiprocessing
import os

from prometheus_client import REGISTRY, CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

METRICS_FOLDER = "ALISE_METRICS_FOLDER"
"""Environment variable with the folder, which is empty at start."""
_MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"

OWN_REGISTRY = CollectorRegistry()
"""Of our metrics: in the API server's process they only stand for those of the engine's."""


def collect() -> None:
    """Show the files' metrics among this process's own."""
    folder = os.environ.get(METRICS_FOLDER)
    if folder is not None and _MULTIPROCESS_FOLDER not in os.environ:
        MultiProcessCollector(REGISTRY, folder)  # type: ignore[no-untyped-call]


def count_in_files() -> None:
    """Let metrics made from now on count in files, if this is a process of the engine's."""
    folder = os.environ.get(METRICS_FOLDER)
    is_child = multiprocessing.parent_process() is not None
    if folder is not None and is_child and _MULTIPROCESS_FOLDER not in os.environ:
        os.environ[_MULTIPROCESS_FOLDER] = folder
        values.ValueClass = values.get_value_class()  # type: ignore[no-untyped-call]
