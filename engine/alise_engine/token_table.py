"""The token table: what the sidecar may know of the served model's vocabulary, as one small file.

Projects the model's own input token embeddings to a few dimensions and writes them with each
token's surface text and its meaning (`token_meanings`), so that the sidecar turns token ids into
features by look-ups, without the model or its tokenizer. Does not know what the features are.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from alise_engine.token_meanings import token_meanings

FORMAT_VERSION: Final = 2
DIMENSIONS: Final = 256

_CHUNK_ROWS: Final = 8192
_INDEX_FILE: Final = "model.safetensors.index.json"
_EMBEDDING_NAMES: Final = (
    "model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "transformer.wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "transformer.word_embeddings.weight",
    "backbone.embeddings.weight",
    "embed_tokens.weight",
    "wte.weight",
)


class TokenTableUnavailable(RuntimeError):  # noqa: N818 - a state of the model, not a bug
    """No table can be made of this model; the message says why."""


def build_token_table(model_dir: Path, destination: Path) -> None:
    """Write the token table of the model in `model_dir` to `destination` (.npz), atomically.

    Arrays: `embedding` float16 [vocab, 256], the PCA projection of the input embeddings, scaled to
    a mean row norm of 1; `meaning` float16 [vocab, 256], of `token_meanings`; `text_bytes` uint8
    [total] and `text_offsets` int64 [vocab + 1], the surface text of each token (empty for special
    ones); `source_sha256` uint8 [32], of the unprojected embeddings and the texts;
    `format_version`. Reads the embeddings in chunks.

    Raises:
        TokenTableUnavailable: no readable safetensors embedding or no tokenizer.
        ImportError: WordLlama is not installed (the extra `engine` brings it).
    """
    texts = _token_texts(model_dir)
    path, name = _find_embedding(model_dir)
    try:
        projected, digest = _project(path, name)
    except Exception as error:
        raise TokenTableUnavailable(f"cannot read {name} in {path}: {error}") from error
    vocab = projected.shape[0]
    texts = (texts + [b""] * vocab)[:vocab]
    offsets = np.zeros(vocab + 1, dtype=np.int64)
    np.cumsum([len(text) for text in texts], out=offsets[1:])
    text_bytes = np.frombuffer(b"".join(texts), dtype=np.uint8)
    digest.update(text_bytes.tobytes())
    _write_atomically(
        destination,
        embedding=projected,
        meaning=token_meanings(texts),
        text_bytes=text_bytes,
        text_offsets=offsets,
        source_sha256=np.frombuffer(digest.digest(), dtype=np.uint8),
        format_version=np.int64(FORMAT_VERSION),
    )


def _find_embedding(model_dir: Path) -> tuple[Path, str]:
    from safetensors import SafetensorError, safe_open

    index = model_dir / _INDEX_FILE
    try:
        if index.is_file():
            shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
            for name in _EMBEDDING_NAMES:
                if name in shards:
                    return model_dir / shards[name], name
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt") as tensors:
                present = set(tensors.keys())
            for name in _EMBEDDING_NAMES:
                if name in present:
                    return path, name
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TokenTableUnavailable(f"unreadable weights in {model_dir}: {error}") from error
    raise TokenTableUnavailable(f"no token embedding in safetensors files of {model_dir}")


def _chunks(path: Path, name: str) -> Iterator[Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        rows = tensors.get_slice(name)
        for start in range(0, rows.get_shape()[0], _CHUNK_ROWS):
            yield rows[start : start + _CHUNK_ROWS]


def _project(path: Path, name: str) -> tuple[npt.NDArray[np.float16], Any]:
    """Return the projected embeddings [vocab, 256] and a hash of the unprojected ones."""
    import torch

    digest, count = hashlib.sha256(), 0
    total: Any = 0.0
    moment: Any = 0.0
    for rows in _chunks(path, name):
        digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        wide = rows.to(torch.float64)
        total, moment = total + wide.sum(0), moment + wide.T @ wide
        count += rows.shape[0]
    mean = total / count
    _, vectors = torch.linalg.eigh(moment / count - torch.outer(mean, mean))
    axes = vectors.flip(1)[:, :DIMENSIONS]
    # Eigenvectors have no sign of their own: fix it, so that every build gives the same table.
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    axes = axes * torch.sign(largest)
    parts = [((rows.to(torch.float64) - mean) @ axes).numpy() for rows in _chunks(path, name)]
    projected = np.concatenate(parts)
    if projected.shape[1] < DIMENSIONS:
        projected = np.pad(projected, ((0, 0), (0, DIMENSIONS - projected.shape[1])))
    norm = float(np.linalg.norm(projected, axis=1).mean())
    return (projected / max(norm, 1e-12)).astype(np.float16), digest


def _token_texts(model_dir: Path) -> list[bytes]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        size = len(tokenizer)
        tokens: list[str | None] = tokenizer.convert_ids_to_tokens(list(range(size)))
    except Exception as error:
        raise TokenTableUnavailable(f"no tokenizer in {model_dir}: {error}") from error
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
    spaces = sum(1 for t in tokens if t and t[0] == "Ġ")
    byte_of = _byte_of_character() if spaces > size // 20 else None
    return [
        b"" if token is None or i in special else _surface(token, None if i in added else byte_of)
        for i, token in enumerate(tokens)
    ]


def _surface(token: str, byte_of: dict[str, int] | None) -> bytes:
    if byte_of is not None and all(c in byte_of for c in token):
        return bytes(byte_of[c] for c in token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode("utf-8", "replace")


def _byte_of_character() -> dict[str, int]:
    """Return the inverse of GPT-2's printable alphabet for bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _write_atomically(destination: Path, **arrays: npt.NDArray[Any] | np.generic) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=destination.parent, prefix=destination.name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(destination)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
