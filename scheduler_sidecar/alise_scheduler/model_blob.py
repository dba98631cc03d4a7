"""Models to bytes and back, without pickle: a damaged or foreign file cannot run code."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from alise_scheduler.encoding_ridge import EncodingRidge
from alise_scheduler.quantile_model import QuantileModel
from alise_scheduler.retrieval import Retrieval
from alise_scheduler.ridge import Ridge
from alise_scheduler.training import AnswerModel, ArrivalModel, EncodingModel, Models
from alise_scheduler.trees import Trees

_RIDGE = (
    "mean",
    "scale",
    "axes",
    "landmarks",
    "landmark_norms",
    "weights",
    "linear",
    "targets",
    "buckets",
    "bag_weights",
)
_ENCODING_RIDGE = ("mean", "scale", "weights")
_RETRIEVAL = ("projection", "center", "stored", "target")
_TREES = ("features", "thresholds", "leaves", "base")


class ModelBlobError(ValueError):
    """The bytes are no models of this version."""


def models_to_bytes(models: Models) -> bytes:
    """Return the models as an .npz."""
    arrays: dict[str, Any] = {}
    _put_ridge(arrays, "arrival", models.arrival.ridge)
    _put_quantiles(arrays, "arrival", models.arrival.quantiles)
    for name in _RETRIEVAL:
        arrays[f"retrieval.{name}"] = getattr(models.arrival.retrieval, name)
    if models.encoding is not None:
        _put_encoding_ridge(arrays, "encoding", models.encoding.ridge)
        arrays["encoding.targets"] = models.encoding.targets
        _put_quantiles(arrays, "encoding", models.encoding.quantiles)
    for number, model in enumerate(models.answers):
        prefix = _answer_prefix(number)
        _put_ridge(arrays, prefix, model.ridge)
        if model.encoding_ridge is not None:
            _put_encoding_ridge(arrays, f"{prefix}.encoding", model.encoding_ridge)
        _put_quantiles(arrays, prefix, model.quantiles)
        arrays[f"{prefix}.share"] = np.float64(model.share)
        arrays[f"{prefix}.from_tokens"] = np.int64(model.from_tokens)
    arrays["answers"] = np.int64(len(models.answers))
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def models_from_bytes(blob: bytes) -> Models:
    """Return the models of `models_to_bytes`.

    Raises:
        ModelBlobError: anything that is not as written.
    """
    try:
        with np.load(io.BytesIO(blob), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        retrieval = Retrieval(*(arrays[f"retrieval.{name}"] for name in _RETRIEVAL))
        arrival = ArrivalModel(_ridge(arrays, "arrival"), retrieval, _quantiles(arrays, "arrival"))
        prefixes = map(_answer_prefix, range(int(arrays["answers"])))
        encoding = _encoding(arrays)
        return Models(arrival, encoding, tuple(_answer(arrays, prefix) for prefix in prefixes))
    except Exception as error:
        raise ModelBlobError(f"unreadable model: {error}") from error


def _encoding(arrays: dict[str, Any]) -> EncodingModel | None:
    ridge = _encoding_ridge(arrays, "encoding")
    if ridge is None:
        return None
    return EncodingModel(ridge, arrays["encoding.targets"], _quantiles(arrays, "encoding"))


def _put_encoding_ridge(arrays: dict[str, Any], prefix: str, ridge: EncodingRidge) -> None:
    arrays[f"{prefix}.intercept"] = np.float64(ridge.intercept)
    for name in _ENCODING_RIDGE:
        arrays[f"{prefix}.{name}"] = getattr(ridge, name)


def _encoding_ridge(arrays: dict[str, Any], prefix: str) -> EncodingRidge | None:
    if f"{prefix}.intercept" not in arrays:
        return None
    fields = {name: arrays[f"{prefix}.{name}"] for name in _ENCODING_RIDGE}
    return EncodingRidge(intercept=float(arrays[f"{prefix}.intercept"]), **fields)


def _answer_prefix(number: int) -> str:
    return f"answer{number}"


def _answer(arrays: dict[str, Any], prefix: str) -> AnswerModel:
    return AnswerModel(
        from_tokens=int(arrays[f"{prefix}.from_tokens"]),
        ridge=_ridge(arrays, prefix),
        encoding_ridge=_encoding_ridge(arrays, f"{prefix}.encoding"),
        quantiles=_quantiles(arrays, prefix),
        share=float(arrays[f"{prefix}.share"]),
    )


def _put_ridge(arrays: dict[str, Any], prefix: str, ridge: Ridge) -> None:
    arrays[f"{prefix}.blocks"] = np.array(ridge.blocks, dtype=np.int64)
    arrays[f"{prefix}.intercept"] = np.float64(ridge.intercept)
    for name in _RIDGE:
        arrays[f"{prefix}.{name}"] = getattr(ridge, name)


def _ridge(arrays: dict[str, Any], prefix: str) -> Ridge:
    blocks = tuple((int(a), int(b)) for a, b in arrays[f"{prefix}.blocks"])
    fields = {name: arrays[f"{prefix}.{name}"] for name in _RIDGE}
    return Ridge(blocks=blocks, intercept=float(arrays[f"{prefix}.intercept"]), **fields)


def _put_quantiles(arrays: dict[str, Any], prefix: str, model: QuantileModel) -> None:
    arrays[f"{prefix}.plane"] = model.plane
    arrays[f"{prefix}.shifts"] = model.shifts
    for name in _TREES:
        arrays[f"{prefix}.trees.{name}"] = getattr(model.trees, name)


def _quantiles(arrays: dict[str, Any], prefix: str) -> QuantileModel:
    trees = Trees(*(arrays[f"{prefix}.trees.{name}"] for name in _TREES))
    return QuantileModel(arrays[f"{prefix}.plane"], trees, arrays[f"{prefix}.shifts"])
