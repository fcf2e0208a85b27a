"""Endless training streams: sample k depends on (seed, stream, k) alone, so any step can be replayed."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .. import parallel
from ..augment import geometry
from .base import SegDataset


class Stream:
    """Images in a new random order every pass, each sample with a weak view of its own.

    name   streams of other names are independent
    block  what is left of a pass and does not fill a block is dropped, so that a batch of that size
           never holds an image twice (CutMix)
    """

    def __init__(
        self, dataset: SegDataset, ids: Sequence[str], *, name: str, seed: int, labeled: bool,
        crop: tuple[int, int], scale: tuple[float, float], base: int, block: int = 1,
    ):  # fmt: skip
        self.dataset, self.ids, self.labeled = dataset, list(ids), labeled
        self.key = (seed, int.from_bytes(name.encode(), "big"))
        self.turn = len(self.ids) - len(self.ids) % block if block <= len(self.ids) else len(self.ids)
        self.crop, self.scale, self.base = crop, scale, base

    def id(self, k: int) -> str:
        """The image of sample k."""
        turn, i = divmod(k, self.turn)
        return self.ids[_order(self.key, turn, len(self.ids))[i]]

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return image (3, h, w) uint8, label (h, w) uint8, valid (h, w) bool."""
        id = self.id(k)
        label = self.dataset.label(id) if self.labeled else None
        rng = np.random.default_rng([*self.key, k, 1])
        return geometry(self.dataset.image(id), label, self.crop, self.scale, self.base, rng)


@lru_cache(maxsize=8)
def _order(key: tuple[int, int], turn: int, n: int) -> np.ndarray:
    return np.random.default_rng([*key, turn, 0]).permutation(n)


class Crops(NamedTuple):
    """What one training step is made from, as files hold it; U = 0 where no unlabeled images are wanted."""

    x: Tensor  # (B, 3, h, w) uint8, labeled images
    y: Tensor  # (B, h, w) uint8, their labels
    u: Tensor  # (U, 3, h, w) uint8, unlabeled images
    valid: Tensor  # (U, h, w) bool, False on their padding
    label: Tensor  # (U, h, w) uint8, their pseudo-labels; all IGNORE where there are none


class Steps(Dataset):
    """Item s: the Crops of training step s, this process's rows of them."""

    def __init__(self, labeled: Stream, unlabeled: Stream | None, batch: int):
        self.labeled, self.unlabeled, self.batch = labeled, unlabeled, batch
        self.rank, self.processes = parallel.rank(), parallel.world()  # here: loaders are no part of them

    def __getitem__(self, step: int) -> Crops:
        x, y, inside = self._stack(self.labeled, step)
        u, label, valid = self._stack(self.unlabeled, step) if self.unlabeled else (x[:0], y[:0], inside[:0])
        return Crops(x, y, u, valid, label)

    def _stack(self, stream: Stream, step: int) -> list[Tensor]:
        rows, first = self.batch // self.processes, step * self.batch
        samples = [stream[first + self.rank * rows + i] for i in range(rows)]
        return [torch.stack(part) for part in zip(*samples, strict=True)]

    def ids(self, step: int) -> tuple[list[str], list[str]]:
        """Return the labeled and unlabeled images of a step."""
        ks = range(step * self.batch, (step + 1) * self.batch)
        return [self.labeled.id(k) for k in ks], [self.unlabeled.id(k) for k in ks] if self.unlabeled else []

    def batches(self, start: int, stop: int, workers: int, pin: bool) -> Iterator[Crops]:
        """Load steps start .. stop - 1; the number of workers changes nothing but the speed."""
        order = range(start, stop)
        return iter(DataLoader(self, batch_size=None, sampler=order, num_workers=workers, pin_memory=pin))
