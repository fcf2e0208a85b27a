"""FDA: online moments against one-shot ones, the table against its definition, the bound against sampling."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mkd_core.semantics import ClassMoments

IGNORE = 255


def pixels(n: int, classes: int, channels: int, seed: int = 0, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (n,), generator=g)
    features = torch.randn(n, channels, generator=g) * (1 + label[:, None]) + label[:, None]
    label[torch.rand(n, generator=g) < ignored] = IGNORE
    return features, label


def one_shot(features: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and population variances of all pixels at once, in float64, class by class."""
    none = torch.zeros(features.shape[1], dtype=torch.float64)
    of = [features[label == c].double() for c in range(classes)]
    means = [mine.mean(0) if len(mine) else none for mine in of]
    variances = [mine.var(0, unbiased=False) if len(mine) else none for mine in of]
    return torch.tensor([*map(len, of)]).double(), torch.stack(means), torch.stack(variances)


def per_pixel(logits: Tensor, label: Tensor, weight: Tensor, var: Tensor, strength: float) -> Tensor:
    """Eq. (4) pixel by pixel: logits (N, C) + strength/2 (w_j - w_y)^T Sigma_y (w_j - w_y); not at IGNORE."""
    known = label != IGNORE
    y = label.masked_fill(~known, 0)
    v = weight[None] - weight[y][:, None]  # (N, C, A)
    raised = 0.5 * strength * (v * v * var[y][:, None]).sum(-1)
    return logits + raised * known[:, None]


@settings(deadline=None, derandomize=True, max_examples=20)
@given(
    cuts=st.lists(st.integers(0, 600), max_size=6), seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 1e-3, 1e3]))  # fmt: skip
def test_online_moments_are_the_one_shot_moments(cuts, seed, scale):
    features, label = pixels(600, 4, 5, seed)
    label[label == 2] = 1  # class 2 never occurs
    features *= scale
    moments = ClassMoments(4, 5)
    for part in torch.tensor_split(torch.arange(600), sorted(cuts)):  # empty parts included
        moments.update(features[part], label[part])
    count, mean, var = one_shot(features, label, 4)
    assert torch.equal(moments.count, count) and moments.count.dtype == torch.float64
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-5, atol=1e-6 * scale**2)
    assert (moments.count[2], moments.mean[2].abs().sum(), moments.var[2].abs().sum()) == (0, 0, 0)


@pytest.mark.parametrize("autocast", [False, True])
def test_variance_survives_a_large_offset(autocast):
    """Mean 30, standard deviation 0.01: E[f^2] - E[f]^2 in float32 has no correct digit there."""
    g = torch.Generator().manual_seed(0)
    features, label = 30 + 0.01 * torch.randn(8192, 8, generator=g), torch.randint(0, 2, (8192,), generator=g)
    moments = ClassMoments(2, 8)
    for part in torch.arange(8192).split(1000):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            moments.update(features[part], label[part])
    _, _, var = one_shot(features, label, 2)
    torch.testing.assert_close(moments.var.double(), var, rtol=1e-3, atol=0)
    naive = features.square().mean(0) - features.mean(0) ** 2
    assert ((naive - 1e-4).abs() / 1e-4).max() > 0.1  # the test is hard enough to tell


def test_counts_are_exact_saved_and_without_gradient():
    moments = ClassMoments(1, 2)
    moments.count.fill_(2.0**30 + 1)
    moments.update(torch.randn(3, 2), torch.zeros(3, dtype=torch.int64))
    assert moments.count.item() == 2.0**30 + 4
    features, label = pixels(50, 3, 4)
    moments = ClassMoments(3, 4)
    moments.update(features.requires_grad_(), label)
    assert not any(b.requires_grad for b in moments.buffers())
    assert set(moments.state_dict()) == {"count", "mean", "var"}


@pytest.mark.parametrize("classes, channels", [(4, 6), (21, 64)])
def test_table_is_the_per_pixel_definition_with_its_gradient(classes, channels):
    features, label = pixels(400, classes, channels, seed=3)
    moments = ClassMoments(classes, channels)
    moments.update(features, label)
    g = torch.Generator().manual_seed(4)
    weight = torch.randn(classes, channels, generator=g)
    logits = torch.randn(400, classes, generator=g)
    # the target of the loss need not be the label of the shift
    target = torch.randint(0, classes, (400,), generator=g)

    reference_logits = logits.double().requires_grad_()
    reference = per_pixel(reference_logits, label, weight.double(), moments.var.double(), 1.5)
    ours_logits = logits.view(1, 20, 20, classes).permute(0, 3, 1, 2).clone().requires_grad_()
    ours = ClassMoments.shift(ours_logits, label.view(1, 20, 20), moments.table(weight, 1.5))
    as_pixels = ours.permute(0, 2, 3, 1).reshape(400, classes)
    torch.testing.assert_close(as_pixels.double(), reference, rtol=1e-6, atol=1e-6)

    F.cross_entropy(reference, target).backward()
    F.cross_entropy(ours, target.view(1, 20, 20)).backward()
    ours_grad = ours_logits.grad.permute(0, 2, 3, 1).reshape(400, classes).double()
    torch.testing.assert_close(ours_grad, reference_logits.grad, rtol=1e-4, atol=1e-8)


def test_equation_4_bounds_the_expected_cross_entropy():
    """E over f~ ~ N(f, strength Sigma) of CE(W f~ + b, y) <= CE(shifted logits, y), with room."""
    g = torch.Generator().manual_seed(0)
    classes, channels, strength, y = 5, 16, 0.8, 2
    moments = ClassMoments(classes, channels)
    moments.update(*pixels(2000, classes, channels, ignored=0))
    weight, bias = 0.3 * torch.randn(classes, channels, generator=g), torch.randn(classes, generator=g)
    feature = torch.randn(channels, generator=g)
    noise = torch.randn(50_000, channels, generator=g) * (strength * moments.var[y]).sqrt()
    label = torch.full((1, 1, 1), y)
    noisy = (feature + noise) @ weight.T + bias
    expected = F.cross_entropy(noisy, torch.full((50_000,), y), reduction="none")
    logits = (weight @ feature + bias).view(1, -1, 1, 1)
    bound = F.cross_entropy(ClassMoments.shift(logits, label, moments.table(weight, strength)), label).item()
    plain = F.cross_entropy(logits, label).item()
    error = (expected.std() / 50_000**0.5).item()
    assert expected.mean().item() + 5 * error < bound
    # convex: the noise only makes it harder, so a shift of 0 is no bound
    assert plain < expected.mean().item() - 5 * error
