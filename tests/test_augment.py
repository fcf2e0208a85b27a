"""Augmentation: one geometry for image, label and validity; colour per sample; CutMix boxes by their published law."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from mkd_core.augment import FILL, MEAN, STD, STRONG, geometry, mix, normalise, partner, ratio_box, xor_boxes
from mkd_core.augment import colour as operations

IGNORE = 255
CELL = 12


def mosaic(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of 12 pixels, each of its own colour and label: wherever the image shows a pure colour, the label is known."""
    y, x = torch.arange(height)[:, None] // CELL, torch.arange(width)[None] // CELL
    label = (y * 9 + x).to(torch.uint8)  # unique below 9 columns
    return colour(label), label


def colour(label: torch.Tensor) -> torch.Tensor:
    index = label.int()
    return torch.stack([(index * a + b) % 256 for a, b in ((37, 11), (91, 60), (53, 200))]).to(torch.uint8)


views = st.fixed_dictionaries({
    "height": st.integers(30, 100), "width": st.integers(30, 100), "crop": st.tuples(*[st.sampled_from([32, 48, 64])] * 2),
    "low": st.floats(0.4, 1.0), "stretch": st.floats(1.0, 2.5), "base": st.sampled_from([0, 64]), "seed": st.integers(0, 10_000),
})  # fmt: skip


def view(v: dict, labeled: bool = True) -> tuple[torch.Tensor, ...]:
    image, label = mosaic(v["height"], v["width"])
    scale, rng = (v["low"], v["low"] * v["stretch"]), np.random.default_rng(v["seed"])
    return geometry(image, label if labeled else None, v["crop"], scale, v["base"], rng)


@settings(deadline=None, derandomize=True, max_examples=120)
@given(views)
def test_image_label_and_validity_share_one_geometry(v):
    image, label, valid = view(v)
    assert image.shape == (3, *v["crop"]) and label.shape == valid.shape == v["crop"]
    assert (image.dtype, label.dtype, valid.dtype) == (torch.uint8, torch.uint8, torch.bool)
    # A pixel of one pure colour with neighbours of the same colour lies inside a cell: its label is that cell's.
    padded = torch.nn.functional.pad(image.float()[None], (1, 1, 1, 1), mode="replicate")[0]
    around = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (3, H, W, 3, 3)
    sure = (around == image[..., None, None]).all((0, 3, 4)) & valid
    assert torch.equal(image[:, sure], colour(label)[:, sure])
    shrunk = v["low"] * (v["base"] / max(v["height"], v["width"]) if v["base"] else 1)
    assert sure.any() or shrunk < 0.5  # cells that shrink to a few pixels may have no inside
    # Padding, and nothing else, is the mean colour, IGNORE and invalid, and what is valid is one rectangle.
    assert torch.equal(label == IGNORE, ~valid)
    assert (image[:, ~valid] == torch.tensor(FILL, dtype=torch.uint8)[:, None]).all()
    assert torch.equal(valid, valid.any(1)[:, None] & valid.any(0)[None]) and valid.any()
    other, nothing, other_valid = view(v, labeled=False)
    assert torch.equal(image, other) and torch.equal(valid, other_valid) and (nothing == IGNORE).all()


def test_padding_is_zero_after_normalisation_and_scale_one_an_exact_cut():
    fill = (torch.tensor(FILL).float() / 255).view(1, 3, 1, 1)
    assert normalise(fill).abs().max() < 0.01
    image = torch.rand(2, 3, 4, 4)
    expected = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    torch.testing.assert_close(normalise(image), expected)
    image, label = mosaic(64, 80)
    out, out_label, valid = geometry(image, label, (64, 80), (1.0, 1.0), 0, np.random.default_rng(1))
    assert valid.all() and torch.equal(colour(out_label), out)
    assert torch.equal(out, image) or torch.equal(out.flip(-1), image)


@pytest.mark.parametrize("base, unit", [(0, 40), (32, 32)])
def test_scale_law(base, unit):
    """The long side becomes r times its own length, or r times `base`, r uniform; the aspect stays."""
    image, label = mosaic(20, 40)
    rs, ratios = [], []
    for seed in range(400):
        valid = geometry(image, label, (96, 96), (0.5, 2.0), base, np.random.default_rng(seed))[2]
        rs.append(valid.any(0).sum().item() / unit)
        ratios.append(valid.any(0).sum().item() / valid.any(1).sum().item())
    assert min(rs) >= 0.5 - 1 / unit and max(rs) <= 2.0 + 1 / unit
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        assert np.quantile(rs, q) == pytest.approx(0.5 + 1.5 * q, abs=0.12)
    assert np.mean(ratios) == pytest.approx(2, abs=0.05)


def ramp(height: int = 60, width: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    """Image value 3 x and label x: both tell where a pixel comes from."""
    x = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return (3 * x).expand(3, -1, -1).contiguous(), x.contiguous()


@pytest.mark.parametrize("factor", [0.5, 0.7, 1.0, 1.6, 2.0])
def test_magnification_and_alignment(factor):
    """The content is magnified by the factor, and labels are where their pixels are: within a third of a pixel of the view on average."""
    image, label = ramp()
    shift, slope = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        out, out_label, valid = geometry(image, label, (32, 32), (factor, factor), 0, rng)
        rows, columns = (valid.any(axis).nonzero().flatten() for axis in (1, 0))
        values = out[0, rows[0], columns].float() / 3
        slope.append(abs((values[-3] - values[2]).item()) / (len(columns) - 5))
        shift.append((out_label[rows[0], columns].float() - values).mean().item())
    # The scaled window has a whole number of pixels: half a source pixel in 32 / factor at most.
    assert abs(32 * np.mean(slope) - 32 / factor) <= 0.5
    assert abs(np.mean(shift)) * factor <= 0.3 and max(map(abs, shift)) < 1


def test_flip_half_of_the_time_and_every_place_is_reached():
    image, label = ramp()
    flips, lefts, tops = 0, [], []
    for seed in range(300):
        out, _, _ = geometry(image, label, (32, 32), (1.0, 1.0), 0, np.random.default_rng(seed))
        flips += int(out[0, 0, 0] > out[0, 0, -1])
        lefts.append(int(out[0, 0].min()) // 3)
        rng = np.random.default_rng(seed)
        tops.append(int(geometry(image.transpose(1, 2), label.T, (32, 32), (1.0, 1.0), 0, rng)[1].min()))
    assert 120 < flips < 180
    assert min(lefts) == 0 and max(lefts) == 80 - 32 and np.mean(lefts) == pytest.approx(24, abs=3)
    assert min(tops) == 0 and max(tops) == 80 - 32


OPERATIONS = ("brightness", "contrast", "saturation", "hue", "colour_jitter", "blur", "distort")


def photos(n: int = 4, size: int = 16, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    return low + (high - low) * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_sample_draws_its_own_parameters(name):
    torch.manual_seed(0)
    out = getattr(operations, name)(photos(1).expand(6, -1, -1, -1))
    assert out.shape == (6, 3, 16, 16) and out.min() >= 0 and out.max() <= 1
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in combinations(out, 2))


@pytest.mark.parametrize("name", [*STRONG, "distort", "greyscale", "equalize", "solarize"])
def test_colour_stays_in_range_and_leaves_its_input_alone(name):
    torch.manual_seed(1)
    images = photos(16)
    before = images.clone()
    operation = STRONG.get(name) or getattr(operations, name)
    out = operation(images)
    assert torch.equal(images, before) and out.shape == images.shape and out.dtype == images.dtype
    assert out.isfinite().all() and out.min() >= -1e-6 and out.max() <= 1 + 1e-6
    assert (name == "none") == torch.equal(out, images)


def fixed(*values: float):
    """A draw of per-sample parameters that are these, one a sample."""
    return lambda images, low, high: torch.tensor(values).view(-1, 1, 1, 1)[: len(images)]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvision_s(name):
    images, amounts = photos(3), (0.5, 1.0, 1.4)
    ours = getattr(operations, name)(images, draw=fixed(*amounts))
    for image, amount, out in zip(images, amounts, ours, strict=True):
        torch.testing.assert_close(out, getattr(TF, f"adjust_{name}")(image, amount), atol=2e-3, rtol=0)


def test_blur_and_fixed_operations_are_torchvision_s():
    images, sigmas = photos(3), (0.1, 0.8, 2.0)
    for image, sigma, out in zip(images, sigmas, operations.blur(images, draw=fixed(*sigmas)), strict=True):
        torch.testing.assert_close(out, TF.gaussian_blur(image, [7, 7], [sigma, sigma]), atol=1e-5, rtol=0)
    images = photos(3)
    grey = TF.rgb_to_grayscale(images, 3)
    torch.testing.assert_close(operations.greyscale(images), grey, atol=1e-3, rtol=0)
    torch.testing.assert_close(operations.solarize(images), TF.solarize(images, 0.5))
    assert torch.equal(operations.equalize(images), torch.stack([TF.equalize(i) for i in images]))


def test_hue_turns_chroma_and_keeps_luma():
    images = photos(3, low=0.4, high=0.6)  # far from the bounds: nothing is clamped
    same, quarter, half = operations.hue(images, draw=fixed(0.0, 0.25, 0.5))
    torch.testing.assert_close(same, images[0], atol=1e-5, rtol=0)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for out, image in ((quarter, images[1]), (half, images[2])):
        torch.testing.assert_close((out * luma).sum(0), (image * luma).sum(0), atol=1e-3, rtol=0)
        assert not torch.allclose(out, image, atol=0.02)
    grey = (images[2] * luma).sum(0)
    # Half a turn is the opposite colour; grey has no hue.
    torch.testing.assert_close(half - grey, grey - images[2], atol=2e-3, rtol=0)
    grey = operations.greyscale(images)
    torch.testing.assert_close(operations.hue(grey), grey, atol=2e-3, rtol=0)


def test_one_of_applies_exactly_one_operation_with_its_frequency(monkeypatch):
    weights = {"colour_jitter": 0.3, "blur": 0.5, "equalize": 0.1, "solarize": 0.1, "greyscale": 0.5}  # 1.5
    for k, name in enumerate(weights):
        monkeypatch.setattr(operations, name, lambda images, draw=None, add=10**k: images + add)
    torch.manual_seed(0)
    out = operations.one_of(torch.zeros(6000, 3, 1, 1))
    assert (out == out[:, :1]).all()
    counts = [(out[:, 0, 0, 0] == 10**k).sum().item() for k in range(5)]
    assert sum(counts) == 6000  # one, and only one, per image
    for count, weight in zip(counts, weights.values(), strict=True):
        p = weight / 1.5
        assert abs(count - 6000 * p) < 4 * math.sqrt(6000 * p * (1 - p))


def test_chain_frequencies(monkeypatch):
    for k, name in enumerate(("colour_jitter", "greyscale", "blur")):
        monkeypatch.setattr(operations, name, lambda images, draw=None, add=10**k: images + add)
    torch.manual_seed(0)
    out = operations.chain(torch.zeros(4000, 3, 1, 1))[:, 0, 0, 0].int()
    for k, p in enumerate((0.8, 0.2, 0.5)):
        assert (out // 10**k % 10).float().mean().item() == pytest.approx(p, abs=0.035)


@pytest.mark.parametrize("name", ["chain", "distort"])
@pytest.mark.parametrize("size", [16, 33])
def test_what_is_not_computed_changes_nothing(name, size, monkeypatch):
    """On a CPU an operation runs on the images drawn for it alone; the numbers are those of the whole batch."""

    def whole(images, operation, probability):
        coin = torch.rand(len(images), 1, 1, 1) < probability
        return torch.where(coin, operation(images), images)

    for seed in range(8):
        images = photos(1 + seed, size)
        torch.manual_seed(seed)
        part, after = getattr(operations, name)(images), torch.rand(1)
        with monkeypatch.context() as patch:
            patch.setattr(operations, "_sometimes", whole)
            torch.manual_seed(seed)
            assert torch.equal(getattr(operations, name)(images), part) and torch.equal(torch.rand(1), after)


def test_distort_leaves_one_image_in_sixteen_alone():
    torch.manual_seed(0)
    images = photos(1).expand(1600, -1, -1, -1)
    alone = (operations.distort(images) == images).flatten(1).all(1).sum().item()
    assert 60 < alone < 145  # 100 expected, four standard deviations
    # an even grey knows neither saturation nor hue: one in four is neither shifted nor scaled, about black
    grey = torch.full((1600, 3, 2, 2), 0.4)
    alone = (operations.distort(grey) - grey).abs().flatten(1).amax(1).less(1e-4).sum().item()
    assert 330 < alone < 470  # 400 expected, four standard deviations


def test_boxes_have_the_published_area():
    torch.manual_seed(0)
    area = xor_boxes(6000, (64, 64)).float().mean((1, 2))
    assert area.mean().item() == pytest.approx(0.252, abs=0.005)
    assert area.std().item() == pytest.approx(0.069, abs=0.005)


@pytest.mark.parametrize("boxes", [1, 3])
def test_boxes_toggle_as_in_a_slow_loop(boxes):
    """The rule of methods.md 1.3, box by box, from the same draws."""
    torch.manual_seed(5)
    ours = xor_boxes(20, (40, 56), boxes=boxes, area=(0.25, 0.5))
    torch.manual_seed(5)
    p = torch.empty(20, boxes).uniform_(0.25, 0.5)
    u, v = torch.rand(20, boxes), torch.rand(20, boxes, 2)
    overlaps = 0
    for i in range(20):
        mask = np.zeros((40, 56), int)
        for k in range(boxes):
            y = math.exp(float(u[i, k]) * math.log(float(p[i, k])))
            x = float(p[i, k]) / y
            h, w = round(y * math.sqrt(1 / boxes) * 40), round(x * math.sqrt(1 / boxes) * 56)
            top, left = round((40 - h) * float(v[i, k, 0])), round((56 - w) * float(v[i, k, 1]))
            mask[top : top + h, left : left + w] += 1
        overlaps += int((mask == 2).any())
        assert np.array_equal(mask % 2 == 1, ours[i].numpy())
    assert overlaps > 5 or boxes == 1


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 17))
def test_a_partner_is_never_the_image_itself_and_everybody_is_one(n):
    index = torch.arange(n)
    assert (partner(index) != index).all() and sorted(partner(index).tolist()) == index.tolist()


def test_mix_mixes_images_labels_confidences_and_validity_alike():
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, 200, (5, 16, 16), generator=g)
    mask = xor_boxes(5, (16, 16))
    mixed = mix(label, mask)
    for i, y, x in np.ndindex(5, 16, 16):
        assert mixed[i, y, x] == label[i if mask[i, y, x] else (i + 1) % 5, y, x]
    images = torch.stack([label, label + 1, 2 * label], 1).float()
    torch.testing.assert_close(mix(images, mask), torch.stack([mixed, mixed + 1, 2 * mixed], 1).float())
    assert torch.equal(mix(label / 200, mask), mixed / 200)
    assert torch.equal(mix(label > 100, mask), mixed > 100) and mix(label > 100, mask).dtype == torch.bool
    assert 0 < mask.sum() < mask.numel() and xor_boxes(3, (8, 8), boxes=0).all()


@pytest.mark.parametrize("size", [(32, 320), (320, 32), (16, 16)])
def test_the_box_of_unimatch_in_long_crops(size):
    """Where no box of the area and ratio fits, it is cut off; never more than its area."""
    torch.manual_seed(0)
    outside = ratio_box(200, size, probability=1.0).float().mean((1, 2))
    assert outside.min() >= 0.6 and (outside < 1).float().mean() > 0.9
