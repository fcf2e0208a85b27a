"""make bench: speed and memory of the parts as ratios against their plain forms, measured side by side in one run.

A ratio is the median of alternating pairs, its range beside it; extra memory is the most that was held at once
(mkd_core/suite/cost.py).
"""

from __future__ import annotations

import time

import torch
from tiny import build, config
from torch import Tensor

from mkd_core.ema import EMA
from mkd_core.methods import METHODS
from mkd_core.metrics import confusion_matrix
from mkd_core.semantics import ClassMoments
from mkd_core.suite.cost import costs, peak_bytes, ratio

N, C, A = 16_384, 21, 256  # pixels, classes, channels: 4 crops of VOC at 1/8


def line(what: str, value: float, note: str = "", target: float | None = None) -> None:
    verdict = "" if target is None else f"  (target {target:g}: {'met' if value >= target else 'MISSED'})"
    print(f"{what:<66} {value:>9,.1f} x{verdict}  {note}", flush=True)


def span(ends: tuple[float, float]) -> str:
    return f"{ends[0]:,.1f} .. {ends[1]:,.1f}"


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
    r, spread, slow, fast = ratio(per_pixel, table, pairs=3)
    line(
        f"FDA, table against {N} x {C} x {A}: time",
        r,
        f"{span(spread)}, {1e3 * slow:.0f} ms -> {1e3 * fast:.2f} ms",
        100,
    )
    slow_b, fast_b = peak_bytes(per_pixel), peak_bytes(table)
    line(
        "FDA: extra memory, result included",
        slow_b / fast_b,
        f"{slow_b / 2**20:.0f} MiB -> {fast_b / 2**20:.1f} MiB",
    )
    extra = fast_b - logits.numel() * 4, slow_b - logits.numel() * 4
    line(
        "FDA: extra memory beyond the result",
        extra[1] / extra[0],
        f"{extra[1] / 2**20:.0f} MiB -> {extra[0] / 2**20:.1f} MiB",
        100,
    )
    print(
        f"FDA: largest relative difference from float64: {error:.1e} ({'met' if error <= 1e-6 else 'MISSED'}: 1e-6)"
    )

    few, label, moments = features[: N // 4], label[: N // 4], ClassMoments(C, A)

    def expanded() -> Tensor:  # released form: features expanded to N x C x A and masked
        one_hot = torch.nn.functional.one_hot(label, C).float()
        by_class = few[:, None] * one_hot[..., None]
        amount = one_hot.sum(0)[:, None]
        mean = by_class.sum(0) / amount
        return ((by_class - mean) * one_hot[..., None]).square().sum(0) / amount

    moments.update(few, label)
    torch.testing.assert_close(expanded(), moments.var, rtol=1e-3, atol=1e-5)
    r, spread, slow, fast = ratio(expanded, lambda: moments.update(few, label), pairs=3)
    line(
        f"class moments of {N // 4} pixels, products against expansion: time",
        r,
        f"{span(spread)}, {1e3 * slow:.0f} ms -> {1e3 * fast:.1f} ms",
    )
    slow_b, fast_b = peak_bytes(expanded), peak_bytes(lambda: moments.update(few, label))
    line(
        "class moments: extra memory",
        slow_b / fast_b,
        f"{slow_b / 2**20:.0f} MiB -> {fast_b / 2**20:.0f} MiB",
    )


def parts() -> None:
    label, prediction = torch.randint(0, C, (1, 375, 500)), torch.randint(0, C, (1, 375, 500))
    label[:, :20] = 255

    def masks() -> Tensor:
        return torch.stack(
            [torch.stack([((label == t) & (prediction == p)).sum() for p in range(C)]) for t in range(C)]
        )

    assert torch.equal(masks(), confusion_matrix(prediction, label, C))
    r, spread, slow, fast = ratio(masks, lambda: confusion_matrix(prediction, label, C), pairs=3)
    line(
        "confusion matrix, one bincount against C x C masks: time",
        r,
        f"{span(spread)}, {1e3 * slow:.0f} ms -> {1e3 * fast:.1f} ms",
    )

    net = build()
    teacher, plain = EMA(net, 0.99), EMA(net, 0.99)

    @torch.no_grad()
    def loop() -> None:
        for own, other in zip(plain.module.parameters(), net.parameters(), strict=True):
            own.mul_(0.99).add_(other, alpha=0.01)

    r, spread, slow, fast = ratio(loop, lambda: teacher.update(net, 1000), pairs=15)
    line(
        "EMA, foreach against a loop over parameters: time",
        r,
        f"{span(spread)}, {1e3 * slow:.2f} ms -> {1e3 * fast:.2f} ms",
    )


def steps() -> None:
    """Every method's step beside supervised's and beside as many passes through its first network alone.

    A ResNet-18 with the decoder of the paper's networks: beside smaller networks a step is mostly the overhead of torch's calls.
    """
    real = {"encoder": "resnet18", "channels": 256, "crop": (192, 192), "batch": 4}
    frame = costs({method: config(method, **real) for method in METHODS}, pairs=3)
    over = [f"{method} {value:.2f}" for method, value in frame["x passes"].items() if value > 1.15]
    print(f"\n{frame.round(2)}\nmore than 1.15 x its own passes: {', '.join(over) or 'none'}")


if __name__ == "__main__":
    started = time.perf_counter()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread")
    fda()
    parts()
    steps()
    print(f"{time.perf_counter() - started:.0f} s")
