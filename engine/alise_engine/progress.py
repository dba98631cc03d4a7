"""What the launcher shows while the engine prepares, and the engine's own log.

On a terminal: a spinner with the newest log line, and the whole log only if the start fails.
Elsewhere: one line for each phase, and the log as it comes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import IO

from rich.console import Console
from rich.markup import escape

_KEPT_LINES = 200
_SHOWN_CHARACTERS = 90


class StartDisplay:
    """A context in which phases are shown; after `done` the engine's log passes through."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._phase = ""
        self._began_s = time.monotonic()
        self._kept: deque[str] = deque(maxlen=_KEPT_LINES)
        self._is_passing_through = self._status is None

    def __enter__(self) -> StartDisplay:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop_spinner()

    def phase(self, text: str) -> None:
        """Show what is being done now, and how long it took to get here."""
        self._phase = text
        self._line(text)
        self._show("")

    def done(self, text: str) -> None:
        """End the display with `text`; the log passes through from here on."""
        self._is_passing_through = True
        self._stop_spinner()
        self._line(text)

    def failed(self) -> None:
        """Print what was held back of the log."""
        self._stop_spinner()
        if not self._is_passing_through:
            sys.stdout.write("".join(self._kept))
            sys.stdout.flush()

    def follow(self, log: IO[bytes]) -> None:
        """Read `log` to its end in the background."""
        threading.Thread(target=self._follow, args=(log,), daemon=True, name="alise-log").start()

    def _follow(self, log: IO[bytes]) -> None:
        for raw in log:
            line = raw.decode(errors="replace")
            if self._is_passing_through:
                sys.stdout.write(line)
                sys.stdout.flush()
            else:
                self._kept.append(line)
                self._show(line.strip())

    def _line(self, text: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        # Unwrapped: the ready line holds a command to paste.
        self._console.print(f"{elapsed_s:5.1f} s  {escape(text)}", soft_wrap=True, highlight=False)

    def _show(self, line: str) -> None:
        if self._status is not None:
            tail = f" [dim]{escape(line[-_SHOWN_CHARACTERS:])}" if line else ""
            self._status.update(f"{escape(self._phase)}{tail}")

    def _stop_spinner(self) -> None:
        if self._status is not None:
            self._status.stop()
