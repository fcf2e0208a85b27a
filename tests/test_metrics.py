"""Confusion, IoU and pseudo-label quality against loops over pixels."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mkd_core.metrics import PseudoLabelQuality, confusion_matrix, iou, miou

IGNORE = 255


def loop_iou(prediction: list[int], label: list[int], classes: int) -> list[float]:
    """Intersection over union of pixel sets, class by class; NaN for an empty union."""
    out = []
    for c in range(classes):
        hit = union = 0
        for p, t in zip(prediction, label, strict=True):
            if t != IGNORE:
                hit += p == c and t == c
                union += p == c or t == c
        out.append(100 * hit / union if union else math.nan)
    return out


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.data(), st.integers(2, 6), st.sampled_from([torch.uint8, torch.int64]))
def test_iou_is_the_loop_s(data, classes, dtype):
    of = st.integers(0, classes - 1)
    pixels = data.draw(st.lists(st.tuples(of, of | st.just(IGNORE)), min_size=1, max_size=40))
    prediction, label = ([p[i] for p in pixels] for i in (0, 1))
    half = len(pixels) // 2
    shape = (2, half) if half and len(pixels) % 2 == 0 else (len(pixels),)
    label_map = torch.tensor(label, dtype=dtype).view(shape)
    matrix = confusion_matrix(torch.tensor(prediction).view(shape), label_map, classes)
    assert matrix.dtype == torch.int64 and matrix.sum() == sum(t != IGNORE for t in label)
    assert matrix.tolist() == [[pixels.count((p, t)) for p in range(classes)] for t in range(classes)]
    expected = loop_iou(prediction, label, classes)
    assert iou(matrix).tolist() == pytest.approx(expected, nan_ok=True)
    present = [v for v in expected if not math.isnan(v)]
    assert miou(matrix) == pytest.approx(sum(present) / len(present) if present else math.nan, nan_ok=True)


def test_absent_spurious_and_many_classes():
    """A class that neither occurs nor is predicted leaves the mean; one that is only predicted counts as 0."""
    label = torch.tensor([0, 0, 1, 1, IGNORE])
    found = iou(confusion_matrix(torch.tensor([0, 0, 1, 1, 2]), label, 4)).tolist()
    assert found == pytest.approx([100, 100, math.nan, math.nan], nan_ok=True)
    mean = miou(confusion_matrix(torch.tensor([0, 0, 1, 2, 2]), label, 4))
    assert mean == pytest.approx((100 + 50 + 0) / 3)
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 81, (4, 50, 50), generator=g)
    label[torch.rand(label.shape, generator=g) < 0.1] = IGNORE
    prediction = torch.randint(0, 81, label.shape, generator=g)
    parts = sum(confusion_matrix(p, t, 81) for p, t in zip(prediction, label, strict=True))
    assert torch.equal(parts, confusion_matrix(prediction, label, 81))
    assert parts.sum() == (label != IGNORE).sum()


def test_pseudo_label_quality_is_the_loop_s():
    g = torch.Generator().manual_seed(0)
    threshold, classes = 0.6, 4
    quality = PseudoLabelQuality(classes, threshold)
    pixels: list[tuple[int, float, int]] = []
    for _ in range(3):
        prob = (2 * torch.randn(2, classes, 5, 7, generator=g)).softmax(1)
        prob[:, 3] = 0  # class 3 is never predicted
        label = torch.randint(0, classes, (2, 5, 7), generator=g)
        label[torch.rand(label.shape, generator=g) < 0.2] = IGNORE
        quality.update(prob, label)
        for b, i, j in np.ndindex(2, 5, 7):
            p = prob[b, :, i, j].tolist()
            pixels.append((p.index(max(p)), max(p), int(label[b, i, j])))
    known = [p for p in pixels if p[2] != IGNORE]
    kept = [p for p in known if p[1] >= threshold]
    assert 0 < len(kept) < len(known)
    found = quality.summary()
    assert found["threshold"] == threshold
    assert found["kept"] == pytest.approx(100 * len(kept) / len(known), abs=1e-3)
    assert found["accuracy"] == pytest.approx(100 * sum(p == t for p, _, t in kept) / len(kept), abs=1e-3)
    right = 100 * sum(p == t for p, _, t in known) / len(known)
    assert found["accuracy_all"] == pytest.approx(right, abs=1e-3)
    for c in range(classes):
        of_known, of_kept = [p for p in known if p[0] == c], [p for p in kept if p[0] == c]
        share = 100 * len(of_kept) / len(of_known) if of_known else None
        right = 100 * sum(t == c for _, _, t in of_kept) / len(of_kept) if of_kept else None
        assert found["kept_per_class"][c] == (share if share is None else pytest.approx(share, abs=1e-3))
        assert found["accuracy_per_class"][c] == (right if right is None else pytest.approx(right, abs=1e-3))
    assert found["kept_per_class"][3] is None
    quality = PseudoLabelQuality(3, 0.95)
    assert quality.summary()["kept"] is None and quality.summary()["accuracy"] is None
