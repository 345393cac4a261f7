"""The progress bar of a map: tqdm's, or a line on standard error where that is not installed."""

from __future__ import annotations

import time
from typing import Any


class PlainBar:
    """A progress line on standard error, for when tqdm is not installed."""

    def __init__(self, total: int | None, name: str) -> None:
        import sys

        self._out = sys.stderr
        self._total = total
        self._name = name
        self._done = 0
        self._began = time.monotonic()
        self._shown = 0.0

    def update(self, count: int) -> None:
        """Count, and show it at most ten times a second."""
        self._done += count
        now = time.monotonic()
        if now - self._shown >= 0.1 or self._done == self._total:
            self._shown = now
            self._show("\r")

    def _show(self, start: str) -> None:
        seconds = time.monotonic() - self._began
        of = f"/{self._total}" if self._total is not None else ""
        rate = self._done / seconds if seconds else 0.0
        self._out.write(f"{start}{self._name}: {self._done}{of} [{seconds:.1f} s, {rate:.0f}/s]")
        self._out.flush()

    def close(self) -> None:
        """End the line."""
        self._show("\r")
        self._out.write("\n")


def progress_bar(progress: bool | str, total: int | None, name: str) -> Any:
    """A bar to `update`, or None.

    Args:
        progress: False for none, True for one titled by the function, or the title.
        total: how many calls there are, if known.
        name: the function's name.
    """
    if progress is False:
        return None
    title = name if progress is True else str(progress)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return PlainBar(total, title)
    return tqdm(total=total, desc=title)
