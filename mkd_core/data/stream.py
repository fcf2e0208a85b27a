"""Endless training streams: sample k of a stream depends on (seed, stream, k) alone, so any step can be resumed or replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..augment import geometry
from .base import SegDataset


class Stream:
    """Sample k: the images in a new random order every pass, each with a weak view of its own. Streams of other names are independent.

    block: what is left of a pass and does not fill a block is dropped, so a batch of that size never holds an image twice (CutMix).
    """

    def __init__(
        self, dataset: SegDataset, ids: Sequence[str], *, name: str, seed: int, labeled: bool, crop: tuple[int, int],
        scale: tuple[float, float], base: int, block: int = 1,
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
        """(image (3, h, w) uint8, label (h, w) uint8, valid (h, w) bool); the label of an unlabeled stream is never read."""
        id = self.id(k)
        label = self.dataset.label(id) if self.labeled else None
        return geometry(self.dataset.image(id), label, self.crop, self.scale, self.base, np.random.default_rng([*self.key, k, 1]))


@lru_cache(maxsize=8)
def _order(key: tuple[int, int], turn: int, n: int) -> np.ndarray:
    return np.random.default_rng([*key, turn, 0]).permutation(n)


class Steps(Dataset):
    """Item s: the tensors of training step s, (image, label) of the labeled stream and (image, valid, label) of the unlabeled one, if any."""

    def __init__(self, labeled: Stream, unlabeled: Stream | None, batch: int):
        self.labeled, self.unlabeled, self.batch = labeled, unlabeled, batch

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        ks = range(step * self.batch, (step + 1) * self.batch)
        x, y, _ = map(torch.stack, zip(*(self.labeled[k] for k in ks), strict=True))
        if self.unlabeled is None:
            return x, y
        u, label, valid = map(torch.stack, zip(*(self.unlabeled[k] for k in ks), strict=True))
        return x, y, u, valid, label

    def ids(self, step: int) -> tuple[list[str], list[str]]:
        """The labeled and unlabeled images of a step."""
        ks = range(step * self.batch, (step + 1) * self.batch)
        return [self.labeled.id(k) for k in ks], [self.unlabeled.id(k) for k in ks] if self.unlabeled else []

    def batches(self, start: int, stop: int, workers: int, pin: bool) -> Iterator[tuple[Tensor, ...]]:
        """Steps start .. stop - 1; the number of workers changes nothing but the speed."""
        return iter(DataLoader(self, batch_size=None, sampler=range(start, stop), num_workers=workers, pin_memory=pin))
