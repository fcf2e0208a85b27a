"""What a training step costs: encoder passes, time and memory beside SupOnly's, time beside its networks alone."""

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile

from ..config import RunConfig
from ..evaluate import autocast, pick_device
from ..methods import Batch, Method
from ..models import SegNet
from ..train import build_method, seed_step

CLASSES = 21
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells every start and stop otherwise


def costs(configs: dict[str, RunConfig], pairs: int = 5) -> pd.DataFrame:
    """One row a configuration, measured on random images of its own crop and batch; the first row is the unit.

    gradient, plain   encoder passes with and without gradient, in labeled batches of images
    x time, x memory  a step against the first row's: median of alternating pairs; most bytes held at once
    x passes          a step against as many passes through its first network alone: what the method adds
    ms                of the step
    """
    steps = {name: Step(config) for name, config in configs.items()}
    first = next(iter(steps.values()))
    base, rows = peak_bytes(first), {}
    for name, step in steps.items():
        gradient, plain = step.passes()
        beside = ratio(step, first, pairs)[0] if step is not first else 1.0
        over, _, seconds, _ = ratio(step, partial(step.networks, gradient, plain), pairs)
        rows[name] = [gradient, plain, beside, peak_bytes(step) / base, over, 1e3 * seconds]
    columns = ["gradient", "plain", "x time", "x memory", "x passes", "ms"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


class Step:
    """A training step without loader and optimiser: forward, backward, teachers; of a later stage where there are stages."""

    def __init__(self, config: RunConfig, classes: int = CLASSES):
        device, bare = pick_device(config.device), config.model_copy(update={"weights": "", "weights2": ""})
        self.method: Method = build_method(bare, classes).to(device).train()
        seed_step(config.seed, 0)
        x = torch.randn(config.batch, 3, *config.crop, device=device)
        y = torch.randint(classes, (config.batch, *config.crop), device=device)
        self.autocast = partial(autocast, config.precision, device)
        u = len(x) if self.method.unlabeled or self.method.stages else 0
        strong = tuple(x[:u].roll(1, 3) for _ in range(self.method.views if u else 0))
        self.batch = Batch(x, y, x[:u], strong, torch.ones_like(y[:u], dtype=torch.bool), y[:u])

    def __call__(self) -> None:
        with self.autocast():
            terms, _ = self.method(self.batch, 0.5)
        torch.stack([t.float() for t in terms.values()]).sum().backward()
        self.method.update(10)
        self.method.zero_grad(set_to_none=True)

    def passes(self) -> tuple[float, float]:
        """Images that a step sends through encoders, with and without gradient, in labeled batches."""
        counts = {True: 0, False: 0}

        def count(_: Any, inputs: Any) -> None:
            counts[torch.is_grad_enabled()] += len(inputs[0])

        encoders = {net.encoder for net in self.method.modules() if isinstance(net, SegNet)}
        hooks = [encoder.register_forward_pre_hook(count) for encoder in encoders]
        self()
        for hook in hooks:
            hook.remove()
        return counts[True] / len(self.batch.x), counts[False] / len(self.batch.x)

    def networks(self, gradient: float, plain: float) -> None:
        """As many passes through the first network and nothing else."""
        net = next(net for net in self.method.modules() if isinstance(net, SegNet))
        for _ in range(round(gradient)):
            with self.autocast():
                logits = net(self.batch.x)
            logits.float().mean().backward()
        with torch.no_grad(), self.autocast():
            for _ in range(round(plain)):
                net(self.batch.x)
        net.zero_grad(set_to_none=True)


def ratio(
    slow: Callable[[], Any], fast: Callable[[], Any], pairs: int = 5
) -> tuple[float, tuple[float, float], float, float]:
    """Median and range of slow / fast over alternating pairs, median seconds of slow and of fast.

    One thread without a GPU is measured by its CPU time, which stands other work on the machine.
    """
    # Here, because its import looks for compilers: two seconds, and a line on stderr.
    from torch.utils.benchmark import Timer

    threads = torch.get_num_threads()
    clock: Any = {} if threads > 1 or torch.cuda.is_available() else {"timer": time.process_time}
    timers = [Timer("f()", globals={"f": f}, num_threads=threads, **clock) for f in (slow, fast)]
    times = [[timer.blocked_autorange(min_run_time=0.05).median for timer in timers] for _ in range(pairs)]
    ratios = [a / b for a, b in times]
    slow_s, fast_s = map(statistics.median, zip(*times, strict=True))
    return statistics.median(ratios), (min(ratios), max(ratios)), slow_s, fast_s


def peak_bytes(f: Callable[[], Any]) -> int:
    """Most bytes that f held at once beyond what lay there before: of the GPU if f uses it, else of the CPU."""
    f()  # what is made once
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        if (peak := torch.cuda.max_memory_allocated() - before) > 0:
            return peak
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
