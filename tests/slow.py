"""What the tests of the methods share: slow references written from the specification, confident networks."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import make
from torch import Tensor, nn

from mkd_core.methods import Method

IGNORE = 255
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)


def sharp(name: str, factor: float = 4.0, **options) -> Method:
    """A method with confident networks, and teachers that differ from their students."""
    method = make(name, **options)
    g = torch.Generator().manual_seed(7)
    for i, net in enumerate(m for m in method.modules() if hasattr(m, "classifier")):
        net.classifier.weight.data.mul_(factor)
        for p in net.parameters() if i else ():
            p.data.add_(0.2 * p.data.abs().mean() * torch.randn(p.shape, generator=g))
    return method


def blocks(n: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """A mask of blocks of 8 pixels whose edges lie on no grid."""
    drawn = torch.rand(n, size // 8, size // 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    return drawn.repeat_interleave(8, 1).repeat_interleave(8, 2).roll((3, 5), (1, 2))


def fix(monkeypatch: pytest.MonkeyPatch, target: str, *masks: Tensor) -> Tensor:
    """The masks that a method draws (as "cps.xor_boxes") are these in turn, or one of blocks."""
    masks = masks or (blocks(),)
    upcoming = iter(masks * 8)
    monkeypatch.setattr(f"mkd_core.methods.{target}", lambda *args, **kwargs: next(upcoming))
    return masks[0]


def owner(mask: Tensor, i: int, r: int, c: int) -> int:
    """Whose pixel (r, c) of mixed sample i is."""
    return i if mask[i, r, c] else (i + 1) % len(mask)


def mixed(tensor: Tensor, mask: Tensor) -> Tensor:
    """M * own + (1 - M) * next, sample by sample."""
    out = []
    for i in range(len(tensor)):
        own, other, m = tensor[i], tensor[(i + 1) % len(tensor)], mask[i].to(tensor.dtype)
        smooth = tensor.is_floating_point()
        out.append(m * own + (1 - m) * other if smooth else torch.where(mask[i], own, other))
    return torch.stack(out)


def ce(logits: Tensor, target: Tensor, count: Tensor | int | None = None) -> Tensor:
    """-log softmax at the target, summed over target != 255, divided by their number or by `count`."""
    total, n = logits.new_zeros(()), 0
    logs = logits.log_softmax(1)
    for c in range(logits.shape[1]):
        total = total - logs[:, c][target == c].sum()
        n += int((target == c).sum())
    return total / max(1, n if count is None else int(count))


def bilinear(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)


def coarse(label: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest neighbour by strides: every k-th pixel."""
    k = label.shape[-1] // size[-1]
    return label[..., ::k, ::k]


def same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], mine: nn.Module, other: nn.Module, rtol: float = 2e-3
) -> None:
    """Terms, and the gradient of each up to `rtol` of its length, the terms up to a 20th of it."""
    assert ours.keys() == theirs.keys()
    for key in ours:
        close(ours[key], theirs[key], rtol=rtol / 20, msg=lambda m, k=key: f"{k}: {m}")
        how = {"retain_graph": True, "allow_unused": True}
        pairs = ((ours, mine), (theirs, other))
        a, b = (torch.autograd.grad(t[key], [*net.parameters()], **how) for t, net in pairs)
        pairs = [(g, h) for g, h in zip(a, b, strict=True) if g is not None or h is not None]
        norm = torch.stack([h.square().sum() for _, h in pairs]).sum().sqrt()
        assert torch.stack([(g - h).square().sum() for g, h in pairs]).sum().sqrt() < rtol * norm, key
