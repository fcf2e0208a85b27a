"""make bench: speed and memory of the parts as ratios against their plain forms, measured side by side in one run.

A ratio is the median of alternating pairs after a warm-up; extra memory is the most that the tensors made on the way held at once.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from tiny import batch, build, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mkd_core.ema import EMA
from mkd_core.metrics import confusion_matrix
from mkd_core.semantics import ClassMoments

N, C, A = 16_384, 21, 256  # pixels, classes, channels: 4 crops of VOC at 1/8


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def ratio(slow: Callable[[], Any], fast: Callable[[], Any], pairs: int = 5) -> tuple[float, float, float]:
    """(slow / fast, seconds of slow, seconds of fast); fast is repeated until it takes about a tenth of slow."""
    a, b = seconds(slow), seconds(fast)  # warm-up
    slow_s, fast_s, b = [], [], min(seconds(fast) for _ in range(3))
    repeat = max(1, min(200, int(a / max(b, 1e-6) / 10)))
    for _ in range(pairs):
        slow_s.append(seconds(slow))
        fast_s.append(seconds(lambda: [fast() for _ in range(repeat)]) / repeat)
    return statistics.median(x / y for x, y in zip(slow_s, fast_s, strict=True)), statistics.median(slow_s), statistics.median(fast_s)


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


def peak_bytes(f: Callable[[], Any]) -> int:
    """Most bytes that f held at once beyond what lay there before it."""
    with _Live() as live:
        f()
    return live.peak


def line(what: str, value: float, note: str = "", target: float | None = None) -> None:
    verdict = "" if target is None else f"  (target {target:g}: {'met' if value >= target else 'MISSED'})"
    print(f"{what:<66} {value:>9,.1f} x{verdict}  {note}", flush=True)


def fda() -> None:
    g = torch.Generator().manual_seed(0)
    logits, label = torch.randn(N, C, generator=g), torch.randint(0, C, (N,), generator=g)
    weight, features = 0.1 * torch.randn(C, A, generator=g), torch.randn(N, A, generator=g)
    moments = ClassMoments(C, A)
    moments.update(features, label)

    def per_pixel(of: Tensor | slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        w, y = weight.to(dtype), label[of]
        v = w[None] - w[y][:, None]  # (N, C, A)
        return logits[of].to(dtype) + 0.75 * (v.square() * moments.var.to(dtype)[y][:, None]).sum(-1)

    as_maps, label_map = logits.T.reshape(1, C, 128, 128), label.view(1, 128, 128)

    def table() -> Tensor:
        return ClassMoments.shift(as_maps, label_map, moments.table(weight, 1.5))

    exact = torch.cat([per_pixel(part, torch.float64) for part in torch.arange(N).chunk(16)])
    error = ((table()[0].flatten(1).T.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
    r, slow, fast = ratio(per_pixel, table, pairs=2)
    line(f"FDA, table against {N} x {C} x {A}: time", r, f"{1e3 * slow:.0f} ms -> {1e3 * fast:.2f} ms", 100)
    slow_b, fast_b = peak_bytes(per_pixel), peak_bytes(table)
    line("FDA: extra memory, result included", slow_b / fast_b, f"{slow_b / 2**20:.0f} MiB -> {fast_b / 2**20:.1f} MiB")
    extra = fast_b - logits.numel() * 4, slow_b - logits.numel() * 4
    line("FDA: extra memory beyond the result", extra[1] / extra[0], f"{extra[1] / 2**20:.0f} MiB -> {extra[0] / 2**20:.1f} MiB", 100)
    print(f"FDA: largest relative difference from float64: {error:.1e} ({'met' if error <= 1e-6 else 'MISSED'}: 1e-6)")

    few, label, moments = features[: N // 4], label[: N // 4], ClassMoments(C, A)

    def expanded() -> Tensor:  # released form: features expanded to N x C x A and masked
        one_hot = torch.nn.functional.one_hot(label, C).float()
        by_class = few[:, None] * one_hot[..., None]
        amount = one_hot.sum(0)[:, None]
        mean = by_class.sum(0) / amount
        return ((by_class - mean) * one_hot[..., None]).square().sum(0) / amount

    moments.update(few, label)
    torch.testing.assert_close(expanded(), moments.var, rtol=1e-3, atol=1e-5)
    r, slow, fast = ratio(expanded, lambda: moments.update(few, label), pairs=2)
    line(f"class moments of {N // 4} pixels, products against expansion: time", r, f"{1e3 * slow:.0f} ms -> {1e3 * fast:.1f} ms")
    slow_b, fast_b = peak_bytes(expanded), peak_bytes(lambda: moments.update(few, label))
    line("class moments: extra memory", slow_b / fast_b, f"{slow_b / 2**20:.0f} MiB -> {fast_b / 2**20:.0f} MiB")


def parts() -> None:
    label, prediction = torch.randint(0, C, (1, 375, 500)), torch.randint(0, C, (1, 375, 500))
    label[:, :20] = 255

    def masks() -> Tensor:
        return torch.stack([torch.stack([((label == t) & (prediction == p)).sum() for p in range(C)]) for t in range(C)])

    assert torch.equal(masks(), confusion_matrix(prediction, label, C))
    r, slow, fast = ratio(masks, lambda: confusion_matrix(prediction, label, C), pairs=3)
    line("confusion matrix, one bincount against C x C masks: time", r, f"{1e3 * slow:.0f} ms -> {1e3 * fast:.1f} ms")

    net = build()
    teacher, plain = EMA(net, 0.99), EMA(net, 0.99)

    @torch.no_grad()
    def loop() -> None:
        for own, other in zip(plain.module.parameters(), net.parameters(), strict=True):
            own.mul_(0.99).add_(other, alpha=0.01)

    r, slow, fast = ratio(loop, lambda: teacher.update(net, 1000), pairs=15)
    line("EMA, foreach against a loop over parameters: time", r, f"{1e3 * slow:.2f} ms -> {1e3 * fast:.2f} ms")


def steps() -> None:
    """Cost of a step beside supervised's, and beside the forward and backward passes that its equation needs."""
    b = batch(n=8, size=48)
    cases: dict[str, tuple[str, dict, int, int]] = {  # passes of one batch: with gradient, without
        "supervised": ("supervised", {}, 1, 0), "mean_teacher": ("mean_teacher", {}, 2, 1), "cutmix_seg": ("cutmix_seg", {}, 2, 1),
        "cps": ("cps", {}, 4, 0), "cps + CutMix": ("cps", {"boxes": 3}, 4, 2), "mkd paper": ("mkd", {}, 4, 2), "mkd paper + FDA": ("mkd", {"fda": 1.5}, 4, 2),
        "mkd released": ("mkd", {"fda": 1.5, "stride": 8, "on_labeled": True, "ignore_padding": False, "threshold": 0.0, "decay": 0.6,
                                 "fda_label": "own", "fda_on_teacher": True, "target_after_fda": True}, 4, 4),
    }  # fmt: skip
    bare = build()

    def train_pass() -> None:
        bare(b.x).mean().backward()

    @torch.no_grad()
    def plain_pass() -> None:
        bare(b.x)

    base = make("supervised")
    for name, (method, options, with_gradient, without) in cases.items():
        m = make(method, **options)

        def step(m: torch.nn.Module = m) -> None:
            terms, _ = m(b, 0.5)
            torch.stack([*terms.values()]).sum().backward()
            m.update(10)

        def passes(g: int = with_gradient, n: int = without) -> None:
            for _ in range(g):
                train_pass()
            for _ in range(n):
                plain_pass()

        r, _, _ = ratio(step, lambda: step(base), pairs=5)
        over, own, _ = ratio(step, passes, pairs=5)
        line(f"step of {name}, against supervised", r, f"{over:.2f} x its {with_gradient} + {without} passes, {1e3 * own:.0f} ms")


if __name__ == "__main__":
    started = time.perf_counter()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread")
    fda()
    parts()
    steps()
    print(f"{time.perf_counter() - started:.0f} s")
