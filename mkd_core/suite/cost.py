"""What a step costs: passes through the networks, time and memory beside SupOnly's, time beside its own passes; measured in one run, in turn."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..config import RunConfig
from ..data.stream import Crops
from ..evaluate import pick_device
from ..methods import Batch, Method
from ..models import SegNet
from ..train import build_method, make_batch, seed_step

CLASSES = 21


def costs(configs: dict[str, RunConfig], pairs: int = 5) -> pd.DataFrame:
    """One row a configuration; all are measured on random images of their own crop and batch, the first is what the others stand beside.

    gradient, plain   encoder passes with and without gradient, in labeled batches of images: 2.0 is one batch of labeled, one of unlabeled
    x time, x memory  a step against the first row's: median of alternating pairs; most bytes held at once beyond weights and batch
    x passes          a step against its own network passes alone, forward and backward on the same tensors: what the method adds
    ms                of the step
    """
    steps = {name: Step(config) for name, config in configs.items()}
    first = next(iter(steps.values()))
    base = first.memory()
    rows = {}
    for name, step in steps.items():
        calls = step.passes()
        beside, own, _ = ratio(step, first, pairs)
        beside = 1.0 if step is first else beside  # the unit, without the noise of measuring it against itself
        over, _, _ = ratio(step, lambda calls=calls: replay(calls), pairs)  # type: ignore[misc]
        gradient, plain = step.encoded
        rows[name] = [gradient, plain, beside, step.memory() / base, over, 1e3 * own]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["gradient", "plain", "x time", "x memory", "x passes", "ms"])


class Step:
    """A training step without loader and optimiser: forward, backward, teachers; of a later stage where a method trains in stages."""

    def __init__(self, config: RunConfig):
        self.device = pick_device(config.device)
        self.method: Method = build_method(config.model_copy(update={"weights": ""}), CLASSES).to(self.device).train()
        shape = (config.batch, *config.crop)
        seed_step(config.seed, 0)
        image, label = torch.randint(256, (2, shape[0], 3, *shape[1:]), dtype=torch.uint8), torch.randint(CLASSES, shape, dtype=torch.uint8)
        n = config.batch if self.method.unlabeled or self.method.stages else 0
        crops = Crops(image[0], label, image[1][:n], torch.ones(shape, dtype=torch.bool)[:n], label[:n])
        self.batch: Batch = make_batch(crops, config, self.method.views, self.device)
        self.encoded = (0.0, 0.0)

    def __call__(self) -> None:
        self.method.zero_grad(set_to_none=True)
        terms, _ = self.method(self.batch, 0.5)
        torch.stack([*terms.values()]).sum().backward()
        self.method.update(10)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return torch.cuda.max_memory_allocated(self.device) - before
        return peak_bytes(self)

    def passes(self) -> list[tuple[nn.Module, Any, bool]]:
        """(module, its input, with gradient?) of every outermost module that a step calls: networks, teachers, heads."""
        calls: list[tuple[nn.Module, Any, bool]] = []
        depth, encoders = 0, {net.encoder for net in self.method.modules() if isinstance(net, SegNet)}
        counts = {True: 0.0, False: 0.0}

        def enter(module: nn.Module, inputs: Any) -> None:
            nonlocal depth
            gradient = torch.is_grad_enabled()
            if depth == 0:
                calls.append((module, tree_map(lambda t: t.detach().requires_grad_(t.requires_grad and gradient), inputs), gradient))
            if module in encoders:
                counts[gradient] += len(inputs[0]) / len(self.batch.x)
            depth += 1

        def leave(*_: Any) -> None:
            nonlocal depth
            depth -= 1

        with ExitStack() as stack:
            for module in self.method.modules():
                if module is not self.method:
                    stack.callback(module.register_forward_pre_hook(enter).remove)
                    stack.callback(module.register_forward_hook(leave).remove)
            self()
        self.encoded = counts[True], counts[False]
        return calls


def replay(calls: Sequence[tuple[nn.Module, Any, bool]]) -> None:
    """The recorded passes alone: forward, and backward where there was a gradient."""
    for module, inputs, gradient in calls:
        with torch.set_grad_enabled(gradient):
            out = [t for t in tree_leaves(module(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        if out:
            torch.autograd.backward([t.float().mean() for t in out])
    if calls and next(calls[0][0].parameters()).is_cuda:
        torch.cuda.synchronize()


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], pairs: int = 5) -> tuple[float, float, float]:
    """(slow / fast, seconds of slow, seconds of fast): medians of alternating pairs; fast is repeated until it takes about a tenth of slow."""
    a, _ = seconds(slow), seconds(fast)  # warm-up
    slow_s, fast_s, b = [], [], min(seconds(fast) for _ in range(3))
    repeat = max(1, min(200, int(a / max(b, 1e-6) / 10)))
    for _ in range(pairs):
        slow_s.append(seconds(slow))
        fast_s.append(seconds(lambda: [fast() for _ in range(repeat)]) / repeat)
    return statistics.median(x / y for x, y in zip(slow_s, fast_s, strict=True)), statistics.median(slow_s), statistics.median(fast_s)


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def peak_bytes(f: Callable[[], Any]) -> int:
    """Most bytes that f held at once beyond what lay there before it, on a CPU."""
    with _Live() as live:
        f()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, as long as a tensor holds them; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()
        self.holders: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata in self.holders or storage._cdata not in given:
                    self._hold(t, storage._cdata, storage.nbytes())
        return out

    def _hold(self, t: Tensor, key: int, size: int) -> None:
        if key not in self.holders:
            self.live += size
            self.peak = max(self.peak, self.live)
        self.holders[key] = self.holders.get(key, 0) + 1
        weakref.finalize(t, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if not self.holders[key]:
            del self.holders[key]
            self.live -= size
