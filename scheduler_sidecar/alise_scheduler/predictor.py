"""The predictor: answer lengths from prompts and answers so far, learned from finished jobs.

Holds the current models, swaps in better ones, scores its own predictions. Knows nothing of
gRPC, seconds or priorities. `track`, `predict` and `observe` are for one thread (the server's);
training has a process of its own and the disk a thread: neither blocks it.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from threadpoolctl import threadpool_limits

from alise_scheduler.encoder_worker import EncoderWorker
from alise_scheduler.forecast import forecast
from alise_scheduler.lengths import Quantiles
from alise_scheduler.prompt_features import PromptInput
from alise_scheduler.prompt_messages import prompt_messages
from alise_scheduler.quality import Quality, QualityWindow
from alise_scheduler.sample_blob import EncodedSample, encode
from alise_scheduler.store import SampleStore, StoredModel
from alise_scheduler.token_table import TokenTable, TokenTableError, read_token_table
from alise_scheduler.tracked_job import Outcome, TrackedJob
from alise_scheduler.train_worker import (
    TrainRequest,
    TrainWorkerError,
    start_worker,
    train_here,
    train_in_worker,
)
from alise_scheduler.trainer import UNTRAINED, Trained
from alise_scheduler.training import Array, Models

__all__ = [
    "Outcome",
    "Predictor",
    "PredictorSettings",
    "PromptInput",
    "Quality",
    "TokenTableError",
    "TrackedJob",
]

_NO_TABLE: Final = "numeric"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PredictorSettings:
    """Settings; sizes are in jobs."""

    state_dir: Path | None = None
    """None: memory only."""
    max_samples: int = 8_000
    min_samples: int = 64
    """Finished jobs before the first model."""
    retrain_after: int = 32
    """Least number of new jobs between two trainings."""
    retrain_growth: float = 0.25
    """Later trainings wait for this share of new jobs."""
    quality_window: int = 500
    encoder_model: Path | None = None
    """The prompt encoder's weights; None: predictions go by look-ups alone."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What is known of a served model before its jobs come."""

    table: TokenTable | None
    fingerprint: str
    samples: Sequence[EncodedSample]
    fitted: tuple[Models, Trained] | None


class Predictor:
    """Predicts what remains of jobs, learns from those that finished."""

    def __init__(self, settings: PredictorSettings) -> None:
        # Small products in several threads cost far more than they gain, on cores that serve.
        threadpool_limits(limits=1, user_api="blas")
        self._settings = settings
        self._table: TokenTable | None = None
        self._fingerprint = _NO_TABLE
        self._models: Models | None = None
        self._trained = UNTRAINED
        self._samples: deque[EncodedSample] = deque(maxlen=settings.max_samples)
        self._seen = 0
        self._next_training = settings.min_samples
        self._next_drift_training = 0
        self._window = QualityWindow(settings.quality_window)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._trainer: threading.Thread | None = None
        self._worker: subprocess.Popen[bytes] | None = None
        self.encoder: EncoderWorker | None = None
        """None without one, and before `start`."""
        self.store = (
            SampleStore(settings.state_dir, settings.max_samples) if settings.state_dir else None
        )
        self._adopt(self._kept_for(None))

    @property
    def model_version(self) -> int:
        """0 before the first model; grows with each."""
        return self._trained.version

    @property
    def model_trained_unix_s(self) -> float:
        """When the present model was trained; 0 without one."""
        return self._trained.trained_unix_s

    @property
    def sample_count(self) -> int:
        """Samples kept for training."""
        return len(self._samples)

    def load_token_table(self, path: Path) -> None:
        """Read the token table at `path`, and predict for its model: `read` and `serve`.

        Raises:
            TokenTableError: no valid table; the predictor stays as it is.
        """
        self.serve(self.read(path))

    def read(self, path: Path) -> ServedModel:
        """Return the token table at `path`, with the samples and models kept for it.

        Takes seconds for a large vocabulary, and may be called from any thread.

        Raises:
            TokenTableError: no valid table.
        """
        return self._kept_for(read_token_table(path))

    def serve(self, model: ServedModel) -> None:
        """Predict for jobs of `model`; those tracked before with another get nothing further."""
        if model.fingerprint != self._fingerprint:
            self._adopt(model)

    def start(self, deliver: Callable[[Callable[[], None]], object]) -> None:
        """Start the threads that train and write; `deliver` runs what it gets on the caller's."""
        if self._trainer is None:
            if self._settings.encoder_model is not None:
                self.encoder = EncoderWorker(self._settings.encoder_model, deliver)
            if self.store:
                self.store.start()
            self._trainer = threading.Thread(target=self._train_loop, name="trainer", daemon=True)
            self._trainer.start()

    def close(self) -> None:
        """Write what is pending and stop; a training in progress is given up."""
        self._stopping = True
        self._wake.set()
        if self._worker is not None:
            self._worker.kill()
        if self.encoder is not None:
            self.encoder.close()
        if self._trainer is not None:
            self._trainer.join(timeout=5.0)
        if self.store:
            self.store.close()

    def track(self, prompt: PromptInput) -> TrackedJob:
        """Return a job for `prompt`, to be passed to the other methods."""
        return TrackedJob(prompt, self._table)

    def encode(self, prompt: PromptInput, job: TrackedJob, then: Callable[[], None]) -> None:
        """Have the prompt of `job` encoded in the background; `then` its prediction is worth more.

        It may never be called: without an encoder, or when there is no time.
        """
        if self.encoder is None or job.table is None:
            return

        def take(encoding: Array) -> None:
            job.set_encoding(encoding)
            then()

        self.encoder.submit(prompt_messages(prompt, job.table), take)

    def predict(self, jobs: Sequence[TrackedJob]) -> list[Quantiles | None]:
        """Return for each job quantiles of its *remaining* length, tokens; None without a model."""
        models = self._models
        result: list[Quantiles | None] = [None] * len(jobs)
        if models is None:
            return result
        known = [i for i, job in enumerate(jobs) if job.table is self._table]
        for i, quantiles in zip(known, forecast([jobs[i] for i in known], models), strict=True):
            result[i] = quantiles
            if jobs[i].output_tokens == 0:
                jobs[i].first = quantiles
        return result

    def observe(self, job: TrackedJob, outcome: Outcome) -> None:
        """Learn from a job that has ended with its present `output_tokens`."""
        if job.table is not self._table or job.output_tokens == 0:
            return
        sample = encode(job.sample(outcome))
        with self._lock:
            self._samples.append(sample)
            self._seen += 1
            if job.first is not None and outcome is Outcome.COMPLETE:
                self._window.add(job.first, job.output_tokens)
            due = self._seen >= self._next_training or (
                self._window.is_drifting(self._trained.loss)
                and self._seen >= self._next_drift_training
            )
        if self.store:
            self.store.add(self._fingerprint, sample)
        if due:
            self._wake.set()

    def quality(self) -> Quality:
        """Return figures over the newest finished jobs."""
        with self._lock:
            return self._window.figures(self._trained.loss)

    def train_now(self) -> bool:
        """Train on the samples kept, in this process; return whether new models are in use."""
        request, fingerprint = self._request()
        return self._replace(train_here(request), request, fingerprint)

    def train_if_due(self) -> bool:
        """Train in this process when the schedule says so: for replays, in place of `start`."""
        if not self._wake.is_set():
            return False
        self._wake.clear()
        return self.train_now()

    def _request(self) -> tuple[TrainRequest, str]:
        with self._lock:
            request = TrainRequest(
                samples=tuple(self._samples),
                seen=self._seen,
                current=self._models,
                trained=self._trained,
                now_unix_s=time.time(),
            )
            return request, self._fingerprint

    def _replace(
        self, fitted: tuple[Models, Trained] | None, request: TrainRequest, fingerprint: str
    ) -> bool:
        with self._lock:
            if fingerprint != self._fingerprint:
                return False  # its counts are of jobs of another served model
            trained = fitted[1] if fitted else self._trained
            self._next_training = request.seen + self._pause(request.seen, trained)
            self._next_drift_training = request.seen + self._settings.retrain_after
            if fitted is None:
                return False
            self._models, self._trained = fitted
            self._window.forget_drift()
        if self.store:
            self.store.put_model(fingerprint, StoredModel.of(*fitted))
        _log.info("model %d trained on %d samples", fitted[1].version, len(request.samples))
        return True

    def _pause(self, seen: int, trained: Trained) -> int:
        """Return how many further jobs to wait for: a share of those that count for learning."""
        counting = min(seen - trained.learned_from, self._settings.max_samples)
        return max(self._settings.retrain_after, int(counting * self._settings.retrain_growth))

    def _train_loop(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stopping:
                return
            request, fingerprint = self._request()
            fitted = None
            try:
                self._worker = start_worker()
                if self._stopping:
                    self._worker.kill()
                fitted = train_in_worker(self._worker, request)
            except (OSError, TrainWorkerError) as error:
                # The present model goes on; the next schedule tries again.
                if not self._stopping:
                    _log.warning("no new model: %s", error)
            self._replace(fitted, request, fingerprint)

    def _kept_for(self, table: TokenTable | None) -> ServedModel:
        fingerprint = table.fingerprint if table else _NO_TABLE
        samples, fitted = self.store.load(fingerprint) if self.store else ([], None)
        return ServedModel(table, fingerprint, samples, fitted)

    def _adopt(self, model: ServedModel) -> None:
        with self._lock:
            self._table, self._fingerprint = model.table, model.fingerprint
            self._samples = deque(model.samples, maxlen=self._settings.max_samples)
            self._models, self._trained = model.fitted or (None, UNTRAINED)
            self._seen = max(len(model.samples), self._trained.samples_seen)
            self._window = QualityWindow(self._settings.quality_window)
            self._next_drift_training = 0
            learned = self._trained.samples_seen
            self._next_training = max(
                self._settings.min_samples, learned + self._pause(learned, self._trained)
            )
        if self._models is None and len(model.samples) >= self._settings.min_samples:
            self._wake.set()
