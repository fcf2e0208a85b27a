"""One line about the work under way, printed now and then."""

import time


class Progress:
    """Print `title: text` every ten seconds at first, ever more rarely later: some hundred lines in a day. Quiet: print nothing.

    Plain lines, since papermill passes them on to the terminal and keeps them in the notebook.
    """

    def __init__(self, title: str, quiet: bool = False):
        self.title, self.quiet = title, quiet
        self.began, self.last = time.monotonic(), float("-inf")

    def __call__(self, text: str, now: bool = False) -> None:
        if now or self.due:
            self.last = time.monotonic()
            if not self.quiet:
                print(f"{self.title}: {text}", flush=True)

    @property
    def due(self) -> bool:
        """Whether the next text would be printed."""
        interval = min(300.0, max(10.0, (self.last - self.began) / 20))
        return not self.quiet and time.monotonic() - self.last >= interval
