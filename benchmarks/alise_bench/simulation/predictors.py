"""Who predicts lengths in a simulation: a noisy oracle, or a model as it serves.

All implement the protocol that the sidecar's own state asks of its predictor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from alise_scheduler.conversations import ConversationsError, build_table
from alise_scheduler.lengths import QUANTILE_LEVELS, Quantiles
from alise_scheduler.predictor import Outcome, Predictor, PredictorSettings, PromptInput
from alise_scheduler.prompt_encoder import PromptEncoder, encoder_model
from alise_scheduler.prompt_messages import prompt_messages
from alise_scheduler.token_table import TokenTableError
from scipy.special import ndtri

from alise_bench.errors import BenchError

_LEVELS: Final = tuple(float(z) for z in ndtri(QUANTILE_LEVELS))


@dataclass(frozen=True, slots=True)
class SimulatedPrompt(PromptInput):
    """A prompt, and what the sidecar must not know of it: for the simulated predictors alone."""

    number: int
    output_tokens: int


def simulated_prompt(
    number: int, prompt_tokens: int, output_tokens: int, token_ids: Sequence[int] = ()
) -> SimulatedPrompt:
    """Return the prompt of request `number`; `token_ids` where a model is to read it."""
    ids: npt.NDArray[np.int32] = np.asarray(token_ids, dtype=np.int32)
    return SimulatedPrompt(ids, prompt_tokens, 0, 0.0, 0, "", number, output_tokens)


@dataclass(slots=True)
class NoisyJob:
    """A job as the noisy oracle sees it."""

    prompt: SimulatedPrompt
    own_noise: float
    """Standard normal; what a model that was wrong about this prompt stays wrong by."""
    output_tokens: int = 0

    def extend(self, new_token_ids: Sequence[int], output_tokens: int) -> None:
        """Note how long the answer is."""
        del new_token_ids
        self.output_tokens = output_tokens


class NoisyPredictor:
    """The remaining length times exp(sigma z), z standard normal, and quantiles as wide as that.

    What is left of a job is predicted with fresh noise each time, half of whose variance is the
    job's own: a model that was wrong about a prompt tends to stay wrong.
    """

    model_version: Final = 1

    def __init__(self, sigma: float, seed: int) -> None:
        self._sigma = sigma
        self._seed = seed

    def track(self, prompt: PromptInput) -> Any:
        """Begin to follow a job."""
        assert isinstance(prompt, SimulatedPrompt)
        own = np.random.default_rng((self._seed, prompt.number)).standard_normal()
        return NoisyJob(prompt, float(own))

    def encode(self, prompt: PromptInput, job: Any, then: Callable[[], None]) -> None:
        """Do nothing: its noise stands for all that a predictor knows."""

    def predict(self, jobs: Sequence[Any]) -> list[Quantiles | None]:
        """Return quantiles of each job's remaining length, tokens."""
        return [self._quantiles(job) for job in jobs]

    def observe(self, job: Any, outcome: Outcome) -> None:
        """Learn nothing."""

    def _quantiles(self, job: NoisyJob) -> Quantiles:
        z = job.own_noise
        if job.output_tokens:
            drawn = np.random.default_rng((self._seed, job.prompt.number, job.output_tokens))
            z = (z + float(drawn.standard_normal())) / math.sqrt(2)
        left = max(job.prompt.output_tokens - job.output_tokens, 1)
        median = left * math.exp(self._sigma * z)
        return tuple(max(median * math.exp(self._sigma * level), 1.0) for level in _LEVELS)


@contextmanager
def token_table(model: Path) -> Iterator[Path]:
    """Yield the token table's file of the served model, whose folder `model` is.

    Raises `BenchError` if none can be made, or what is done with it finds that it is none.
    """
    with TemporaryDirectory() as folder:
        table = Path(folder) / "table.npz"
        try:
            build_table(model, table)
            yield table
        except (ConversationsError, TokenTableError) as error:
            raise BenchError(f"--model {model}: {error}") from error


def saved_predictors(state_dirs: Sequence[Path], model: Path) -> list[SavedPredictor]:
    """Return the predictor of each state folder; `model` is the folder of the served model.

    Raises `BenchError`.
    """
    with token_table(model) as table:
        return [SavedPredictor(state_dir, table) for state_dir in state_dirs]


class SavedPredictor:
    """The models of a sidecar's state folder, for requests whose tokens are known."""

    def __init__(self, state_dir: Path, token_table: Path) -> None:
        """`token_table` is that of the served model. Raises `BenchError`, `TokenTableError`."""
        if not state_dir.is_dir():
            raise BenchError(f"{state_dir}: no such folder of a predictor's state")
        self._predictor = Predictor(PredictorSettings(state_dir))
        self._predictor.load_token_table(token_table)
        self._encoder = PromptEncoder(path) if (path := encoder_model()) else None
        self._encodings: dict[bytes, npt.NDArray[np.float32]] = {}
        self.model_version = self._predictor.model_version
        if self.model_version == 0:
            raise BenchError(
                f"{state_dir}: no predictor for this model in it; `alise predictor train` makes one"
            )

    def track(self, prompt: PromptInput) -> Any:
        """Begin to follow a job."""
        return self._predictor.track(prompt)

    def encode(self, prompt: PromptInput, job: Any, then: Callable[[], None]) -> None:
        """Encode the prompt at once: what a sidecar takes for it is little beside a wait."""
        if self._encoder is None:
            return
        key = prompt.token_ids.tobytes()
        if key not in self._encodings:
            self._encodings[key] = self._encoder.encode(prompt_messages(prompt, job.table))
        job.set_encoding(self._encodings[key])
        then()

    def predict(self, jobs: Sequence[Any]) -> list[Quantiles | None]:
        """Return quantiles of each job's remaining length, tokens."""
        return self._predictor.predict(jobs)

    def observe(self, job: Any, outcome: Outcome) -> None:
        """Learn nothing, so that each system of a comparison meets the same predictor."""
