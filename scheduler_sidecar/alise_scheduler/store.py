"""The sample store: features and outcomes of finished jobs, and the models, in one SQLite file.

A thread of its own commits at most every second, so that a kill loses at most the last second;
the write-ahead log keeps the file whole. Trouble with the disk costs persistence, never service:
it is logged once and counted, and writing goes on when the disk does.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from alise_scheduler.model_blob import ModelBlobError, models_from_bytes, models_to_bytes
from alise_scheduler.sample_blob import LAYOUT_VERSION, EncodedSample, SampleBlobError, decode
from alise_scheduler.trainer import Trained
from alise_scheduler.training import Models

FILE_NAME: Final = "predictor.sqlite3"
COMMIT_INTERVAL_S: Final = 0.8

_MAX_PENDING: Final = 10_000
_PRUNE_EVERY: Final = 256
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS samples (
  id INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint TEXT NOT NULL, output_tokens INTEGER NOT NULL,
  is_censored INTEGER NOT NULL, features BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS models (
  fingerprint TEXT PRIMARY KEY, version INTEGER NOT NULL, trained_unix_s REAL NOT NULL,
  samples_seen INTEGER NOT NULL, loss REAL, learned_from INTEGER NOT NULL, blob BLOB NOT NULL);
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Models with what is known of them, ready to be written."""

    trained: Trained
    blob: bytes

    @staticmethod
    def of(models: Models, trained: Trained) -> StoredModel:
        """Return them as bytes."""
        return StoredModel(trained, models_to_bytes(models))


class SampleStore:
    """Samples and models by the token table's fingerprint, in `state_dir`."""

    def __init__(self, state_dir: Path, max_samples: int) -> None:
        self.path = state_dir / FILE_NAME
        self.write_failures = 0
        self._max_samples = max_samples
        self._pending: deque[tuple[str, EncodedSample]] = deque(maxlen=_MAX_PENDING)
        self._models: dict[str, StoredModel] = {}
        self._unpruned = _PRUNE_EVERY
        self._failing = False
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the writer."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write what is pending (one attempt) and stop."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=10.0)
        else:
            self.flush()

    def add(self, fingerprint: str, sample: EncodedSample) -> None:
        """Queue a sample; returns at once."""
        self._pending.append((fingerprint, sample))
        self._wake.set()

    def put_model(self, fingerprint: str, model: StoredModel) -> None:
        """Queue the models; returns at once."""
        self._models[fingerprint] = model
        self._wake.set()

    def load(self, fingerprint: str) -> tuple[list[EncodedSample], tuple[Models, Trained] | None]:
        """Return the newest samples, oldest first, and the models; empty when there are none.

        A file that is damaged or of another layout is set aside.
        """
        if not self.path.exists():
            return [], None
        try:
            with contextlib.closing(self._connect()) as connection:
                if connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise sqlite3.DatabaseError("quick_check failed")
                rows = connection.execute(
                    "SELECT features, output_tokens, is_censored FROM samples"
                    " WHERE fingerprint = ? ORDER BY id DESC LIMIT ?",
                    (fingerprint, self._max_samples),
                ).fetchall()
                samples = [EncodedSample(row[0], row[1], bool(row[2])) for row in rows[::-1]]
                for sample in samples:
                    decode(sample)
                return samples, self._load_model(connection, fingerprint)
        except sqlite3.OperationalError as error:
            self._failed(error)
        except (sqlite3.DatabaseError, SampleBlobError, ModelBlobError) as error:
            self._set_aside("damaged", error)
        return [], None

    def flush(self) -> bool:
        """Write what is pending in this thread; return whether all is on disk."""
        batch, models = list(self._pending), dict(self._models)
        try:
            self._write(batch, models)
        except sqlite3.OperationalError as error:
            self._failed(error)
            return False
        except sqlite3.DatabaseError as error:
            self._set_aside("damaged", error)
            return False
        except OSError as error:
            self._failed(error)
            return False
        for _ in batch:
            self._pending.popleft()
        for fingerprint, model in models.items():
            if self._models.get(fingerprint) is model:
                del self._models[fingerprint]
        if self._failing:
            self._failing = False
            _log.warning("sample store %s can be written again", self.path)
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._stop.wait(COMMIT_INTERVAL_S)
            self._wake.clear()
            try:
                if not self.flush() and not self._stop.is_set():
                    self._wake.set()
            except Exception:
                _log.exception("sample store: writer failed")

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=5.0)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, LAYOUT_VERSION):
                connection.close()
                self._set_aside("incompatible", f"layout {version}, expected {LAYOUT_VERSION}")
                connection = sqlite3.connect(self.path, timeout=5.0)
            connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("PRAGMA journal_size_limit=16777216")
            connection.execute(f"PRAGMA user_version={LAYOUT_VERSION}")
            connection.executescript(_SCHEMA)
        except BaseException:
            connection.close()
            raise
        return connection

    def _write(
        self, batch: list[tuple[str, EncodedSample]], models: dict[str, StoredModel]
    ) -> None:
        if not batch and not models:
            return
        with contextlib.closing(self._connect()) as connection:
            with connection:
                connection.executemany(
                    "INSERT INTO samples (fingerprint, output_tokens, is_censored, features)"
                    " VALUES (?, ?, ?, ?)",
                    [
                        (fingerprint, s.output_tokens, s.is_censored, s.features)
                        for fingerprint, s in batch
                    ],
                )
                for fingerprint, model in models.items():
                    t = model.trained
                    connection.execute(
                        "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?, ?, ?, ?)",
                        (
                            fingerprint,
                            t.version,
                            t.trained_unix_s,
                            t.samples_seen,
                            t.loss,
                            t.learned_from,
                            model.blob,
                        ),
                    )
            self._unpruned += len(batch)
            if self._unpruned >= _PRUNE_EVERY:
                self._prune(connection)

    def _prune(self, connection: sqlite3.Connection) -> None:
        # The bound is over all served models: the oldest samples go, whosever they are.
        with connection:
            connection.execute(
                "DELETE FROM samples WHERE id <="
                " (SELECT id FROM samples ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (self._max_samples,),
            )
        # As a script: execute() would stop after the first page.
        connection.executescript("PRAGMA incremental_vacuum")
        self._unpruned = 0

    def _load_model(
        self, connection: sqlite3.Connection, fingerprint: str
    ) -> tuple[Models, Trained] | None:
        row = connection.execute(
            "SELECT version, trained_unix_s, samples_seen, loss, learned_from, blob FROM models"
            " WHERE fingerprint = ?",
            (fingerprint,),
        ).fetchone()
        if row is None:
            return None
        loss = float("nan") if row[3] is None else float(row[3])
        return models_from_bytes(row[5]), Trained(row[0], row[1], row[2], loss, row[4])

    def _failed(self, error: Exception) -> None:
        self.write_failures += 1
        if not self._failing:
            self._failing = True
            _log.warning("sample store %s: %s; going on in memory", self.path, error)

    def _set_aside(self, why: str, error: object) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S")
        for suffix in ("", "-wal", "-shm"):
            part = self.path.with_name(self.path.name + suffix)
            with contextlib.suppress(FileNotFoundError):
                part.replace(self.path.with_name(f"{self.path.name}.{why}-{stamp}{suffix}"))
        _log.warning("sample store %s is %s (%s): set aside", self.path, why, error)
