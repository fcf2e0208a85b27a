"""One line about the work that is under way."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


class Progress:
    """One line about the run: a single notebook output that is updated, or a line every few seconds in a terminal. Quiet: nothing."""

    def __init__(self, title: str, quiet: bool = False):
        self.title, self.quiet, self.handle, self.last = title, quiet, None, 0.0
        self.notebook = not quiet and "ipykernel" in sys.modules

    def __call__(self, text: str, now: bool = False) -> None:
        if self.quiet or (not now and time.monotonic() - self.last < (0.5 if self.notebook else 10)):
            return
        self.last = time.monotonic()
        line = f"{self.title}: {text}"
        if not self.notebook:
            print(line, flush=True)
            return
        from IPython.display import Pretty, display

        if self.handle is None:
            self.handle = display(Pretty(line), display_id=True)
        else:
            self.handle.update(Pretty(line))
        if path := os.environ.get(
            "MKD_PROGRESS"
        ):  # `mkd run` shows it in its terminal: papermill passes no updates on
            Path(path).write_text(line)
