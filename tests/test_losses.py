"""Cross-entropy, pseudo-labels, distances and ramps against torch and against slow loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mkd_core.losses import confidence, cosine, cross_entropy, draw, hard_pixels, masked_mean  # isort: skip
from mkd_core.losses import percentiles, pseudo_label, ramp, squared_distance  # isort: skip

IGNORE = 255


def case(seed: int = 0, classes: int = 5, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, classes, 4, 6, generator=g, dtype=torch.float64)
    label = torch.randint(0, classes, (2, 4, 6), generator=g)
    label[torch.rand(label.shape, generator=g) < ignored] = IGNORE
    return logits, label


@settings(deadline=None, derandomize=True, max_examples=25)
@given(seed=st.integers(0, 10_000), ignored=st.sampled_from([0.0, 0.3, 0.9]))
def test_cross_entropy_is_torch_s_over_its_own_or_another_number_of_pixels(seed, ignored):
    logits, label = case(seed, ignored=ignored)
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum").item()
    count, over = int((label != IGNORE).sum()), torch.rand(label.shape) < 0.5
    assert cross_entropy(logits, label).item() == pytest.approx(total / max(count, 1), rel=1e-12)
    assert cross_entropy(logits, label, over=over).item() == pytest.approx(total / int(over.sum()), rel=1e-12)


def test_cross_entropy_has_torch_s_gradient_and_of_nothing_is_zero():
    logits, label = case()
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    cross_entropy(ours, label).backward()
    F.cross_entropy(theirs, label, ignore_index=IGNORE).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    logits.requires_grad_()
    for over in (None, torch.zeros_like(label, dtype=torch.bool)):
        loss = cross_entropy(logits, torch.full_like(label, IGNORE), over=over)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (gradient == 0).all()


def loop_ohem(logits: torch.Tensor, label: torch.Tensor, keep: int) -> tuple[float, int]:
    """Mean over the hard pixels and their number: g <= max(0.7, the keep-th smallest g), in plain Python."""
    pixels = []
    for b, i, j in np.ndindex(*label.shape):
        if (c := int(label[b, i, j])) != IGNORE:
            pixels.append(logits[b, :, i, j].softmax(0)[c].item())
    if len(pixels) > keep:
        limit = max(0.7, sorted(pixels)[keep - 1])
        pixels = [g for g in pixels if g <= limit]
    return -sum(math.log(g) for g in pixels) / max(1, len(pixels)), len(pixels)


@pytest.mark.parametrize("keep", [1, 10, 30, 40, 48, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_ohem_is_the_loop_s(keep, ignored):
    """Few: the threshold decides; many: the number; with fewer labelled pixels than it keeps, plain cross-entropy."""
    logits, label = case(3, classes=3, ignored=ignored)
    logits.scatter_add_(1, label.clamp_max(2)[:, None], torch.full((2, 1, 4, 6), 3.0, dtype=logits.dtype))
    hard = hard_pixels(logits, label, keep)
    loss, count = loop_ohem(logits, label, keep)
    assert int((hard != IGNORE).sum()) == count and torch.equal(hard[hard != IGNORE], label[hard != IGNORE])
    assert cross_entropy(logits, hard).item() == pytest.approx(loss, rel=1e-6)
    if keep >= int((label != IGNORE).sum()):
        assert torch.equal(hard, label)
    elif not ignored:
        assert keep <= count < label.numel() and (count > keep) == (keep <= 10)


def test_pseudo_label_keeps_all_at_zero_and_only_the_confident_above():
    logits, _ = case()
    prob = logits.softmax(1)
    # Eq. (2): one-hot of the argmax, no pixel left out
    assert torch.equal(pseudo_label(logits), prob.argmax(1))
    torch.testing.assert_close(confidence(logits), prob.amax(1))
    q = prob.amax(1)
    threshold = q.median().item() + 1e-9
    half = torch.tensor([0.5, 0.5], dtype=torch.float64).log().view(1, 2, 1, 1)
    assert [pseudo_label(half, 0.5 + e).item() for e in (-1e-12, 1e-12)] == [0, IGNORE]
    label = pseudo_label(logits, threshold)
    assert 0 < (label != IGNORE).sum() < label.numel()
    assert torch.equal(label != IGNORE, q >= threshold)
    assert torch.equal(label[label != IGNORE], prob.argmax(1)[label != IGNORE])
    assert (pseudo_label(logits, 1.1) == IGNORE).all()


def test_pseudo_label_leaves_invalid_pixels_out_and_has_no_graph():
    logits, _ = case()
    valid = torch.rand(2, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    for threshold in (0.0, 0.6):
        label = pseudo_label(logits.requires_grad_(), threshold, valid)
        assert (label[~valid] == IGNORE).all() and (label[valid] != IGNORE).any()
        assert label.dtype == torch.int64 and not confidence(logits).requires_grad


def test_confidence_and_squared_distance():
    logits = torch.tensor([[40.0, 0.0]]).view(1, 2, 1, 1)
    assert confidence(logits).item() == 1
    assert confidence(torch.zeros(1, 7, 1, 1)).item() == pytest.approx(1 / 7)
    a, b = case(0)[0].softmax(1), case(1)[0].softmax(1)
    by_hand = [sum((a[0, c, 1, 2] - b[0, c, 1, 2]).item() ** 2 for c in range(5)) / 5]
    assert squared_distance(a, b)[0, 1, 2].item() == pytest.approx(by_hand[0])
    torch.testing.assert_close(squared_distance(a, b).mean(), F.mse_loss(a, b))  # MSE_p of the specification
    values = torch.tensor([1.0, 2.0, 30.0])
    assert masked_mean(values, values < 3).item() == 1.5 and masked_mean(values, values < 0).item() == 0


def test_ramps_begin_and_end_where_they_should():
    assert [ramp(at, 0.2) for at in (0.0, 0.1, 0.2, 0.9)] == pytest.approx([0, 0.25, 1, 1])
    assert ramp(0.0, 0.0) == 1  # no ramp: as published, constant from the first step on
    for progress in (0.0, 0.2, 0.5, 0.99):
        # released code, ratio / 1.5
        assert cosine(progress) == pytest.approx(1 - (math.cos(math.pi * progress) + 1) / 2)
    assert cosine(0) == 0 and cosine(0.5) == pytest.approx(0.5) and cosine(1) == pytest.approx(1)


def test_percentiles_are_numpys():
    g = torch.Generator().manual_seed(0)
    values = torch.rand(3, 20, 20, generator=g)
    some, every = torch.rand(values.shape, generator=g) < 0.7, torch.ones_like(values) > 0
    for mask in (some, values < 0.001, every, values == values[1, 2, 3]):
        for share in (0.0, 0.013, 0.2, 0.5, 0.8, 1.0):
            expected = np.percentile(values[mask].numpy(), 100 * share) if mask.any() else math.inf
            assert math.isclose(percentiles(values, mask, (0.5, share))[1].item(), expected, rel_tol=1e-6)


def test_draw_is_a_random_subset():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]).bool()
    counts = torch.zeros(6)
    for _ in range(300):
        place, found = draw(mask, 2)
        assert found.sum(1).tolist() == [2, 0, 1] and place[2, 0] == 3
        assert place[0, 0] != place[0, 1] and mask[0, place[0]].all()
        counts[place[0]] += 1
    assert (counts[mask[0]] > 110).all()  # 150 each
    place, found = draw(mask, 100)
    expected = torch.tensor([[1] * 4 + [0] * 2, [0] * 6, [1] + [0] * 5]).bool()
    assert place.shape == (3, 6) and torch.equal(found, expected)
