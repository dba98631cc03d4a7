"""What the user sees while the benchmark runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

_LATE_SHARE: Final = 0.01  # near capacity, a wait multiplies what the speed does


class Progress:
    """Steps as lines, requests as a bar (on a terminal only)."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def step(self, what: str) -> None:
        """Say what begins now."""
        self._console.print(f"[bold]{what}[/bold]", highlight=False)

    def note(self, what: str) -> None:
        """Say what came out of a step."""
        self._console.print(f"  {what}", highlight=False)

    def pace(self, late_share: float) -> None:
        """Say so if the machine missed its pace (`EngineCounts.late_share`; NaN: it has none)."""
        if late_share > _LATE_SHARE:
            self.note(
                f"[yellow]this machine does not hold the pace: its steps took {late_share:.1%} "
                "longer; choose a slower --pace profile[/yellow]"
            )

    @contextlib.contextmanager
    def requests(self, total: int) -> Iterator[Callable[[], None]]:
        """Show `total` requests under way; call the result once for each that is done."""
        columns = (TextColumn("  requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        disable = not self._console.is_terminal
        with Bar(*columns, console=self._console, transient=True, disable=disable) as bar:
            task = bar.add_task("requests", total=total)
            yield lambda: bar.advance(task)
