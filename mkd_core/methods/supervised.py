"""SupOnly: ordinary training on the labeled list, the reference of every gain.   L = CE(f(x), y)"""

from .base import Batch, Build, Method, Terms


class Supervised(Method):
    """Cross-entropy at full crop resolution. As many steps as the semi-supervised runs (our choice; sources
    differ)."""

    label, colour, passes, terms = "SupOnly", "#8a8a8a", (1, 0), ("sup",)
    unlabeled = False

    def __init__(self, build: Build):
        super().__init__()
        self.net = build()

    def forward(self, batch: Batch, progress: float) -> tuple[Terms, Terms]:
        return {"sup": self.supervised(self.net(batch.x), batch.y)}, {}
