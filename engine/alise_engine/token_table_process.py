"""Makes the token table in a process of its own, so that the engine's threads don't feel it.

Finds the served model's files (a folder, or a snapshot in the hub's cache that vLLM has already
filled) and keeps one table for each model in the shared folder.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from alise_engine.token_table import FORMAT_VERSION, TokenTableUnavailable, build_token_table

logger = logging.getLogger("vllm.alise.token_table")

_TIMEOUT_S = 600.0
_LOWEST_PRIORITY = 19


def ensure_token_table(
    model: str, revision: str | None, download_dir: str | None, shared_dir: Path
) -> str:
    """Return the name of the model's table in `shared_dir`, making it if needed; "" without one.

    Blocks for seconds (a large vocabulary: a minute). Never raises: a model without a table is
    predicted from fewer features.
    """
    try:
        model_dir = _model_dir(model, revision, download_dir)
        name = f"tokens-{_fingerprint(model_dir)}.npz"
        if not (shared_dir / name).is_file():
            shared_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            command = [sys.executable, "-m", __name__, str(model_dir), str(shared_dir / name)]
            subprocess.run(command, check=True, timeout=_TIMEOUT_S, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1:] or [f"exit status {error.returncode}"]
        logger.warning("No token table, predictions use fewer features: %s", reason[0])
        return ""
    except Exception as error:
        logger.warning("No token table, predictions use fewer features: %s", error)
        return ""
    return name


def _model_dir(model: str, revision: str | None, download_dir: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True)
    )


def _fingerprint(model_dir: Path) -> str:
    """Name a model's files by where they are, how large and how old: cheap to compute."""
    parts = [str(FORMAT_VERSION), str(model_dir.resolve())]
    for path in sorted(model_dir.iterdir()):
        status = path.stat()
        parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def main() -> None:
    """Make the table of the model folder named first in the file named second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args()
    os.nice(_LOWEST_PRIORITY)
    try:
        build_token_table(arguments.model_dir, arguments.destination)
    except TokenTableUnavailable as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
