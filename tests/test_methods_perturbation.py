"""CCT and PseudoSeg, against slow loops: perturbations, annealed cross-entropy, activation maps, fusion."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from slow import IGNORE, bilinear, ce, close
from tiny import CLASSES, batch, make
from torch import Tensor

from mkd_core.augment import square
from mkd_core.methods import cct
from mkd_core.methods.pseudoseg import fuse

# CCT.


@pytest.mark.parametrize("copies, joint", [(2, False), (1, True)])
def test_cct_is_the_loop(copies, joint, monkeypatch):
    """Decoders and perturbations in turn; mean over pixels inside the image, classes and decoders."""

    def perturb(f: Tensor, label: Tensor, classes: int, k: int) -> Tensor:
        return f * (1 - 0.1 * k) + 0.02 * k * (label == k % classes)[:, None]

    perturbations = tuple(partial(perturb, k=k) for k in range(6))
    monkeypatch.setattr(cct, "PERTURBATIONS", perturbations)
    method = make("cct", copies=copies, joint=joint, weight=3.0, rampup=0.5)
    assert len(method.auxiliary) == 6 * copies
    net, b = copy.deepcopy(method.net), batch()
    terms, _ = method(b, 0.25)
    f = net.features(torch.cat((b.x, b.weak)))[3:] if joint else [net.features(b.x), net.features(b.weak)][1]
    main = net.classifier(f)
    target, label = main.softmax(1).detach(), main.argmax(1)
    total, n = 0.0, 0
    scale = 32 // f.shape[-1]
    for k, decoder in enumerate(method.auxiliary):
        p = decoder(perturbations[k % 6](f, label, CLASSES)).softmax(1)
        for i, r, c in product(range(3), range(f.shape[2]), range(f.shape[3])):
            if b.valid[i, r * scale, c * scale]:
                total += (p[i, :, r, c] - target[i, :, r, c]).square().mean().item()
                n += 1
    assert 0 < n < len(method.auxiliary) * 3 * f[0, 0].numel()  # there is padding
    assert terms["consistency"].item() == pytest.approx(3.0 * 0.25 * total / n, rel=1e-4)


def slow_abce(logits: Tensor, y: Tensor, threshold: float) -> float:
    kept = []
    for i, r, c in product(*map(range, y.shape)):
        if y[i, r, c] != IGNORE:
            p = logits[i, :, r, c].double().softmax(0)[y[i, r, c]].item()
            if p < threshold:
                kept.append(-math.log(p))
    return sum(kept) / len(kept) if kept else 0.0


@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0, 2.0])
def test_annealed_cross_entropy_is_the_loop(progress):
    b, grown = batch(), 1 - math.exp(-5 * min(1, progress))
    logits = 3 * torch.randn(3, CLASSES, 32, 32, generator=torch.Generator().manual_seed(1))
    found = cct.annealed_cross_entropy(logits, b.y, progress)
    assert found.item() == pytest.approx(slow_abce(logits, b.y, 0.25 + 0.74 * grown), rel=1e-4)


def test_annealed_cross_entropy_grows_over_its_share_of_training():
    b = batch()
    net = copy.deepcopy(make("cct").net)
    for bootstrap, progress in ((0.4, 0.1), (0.4, 0.9), (0.0, 0.1)):
        found = make("cct", bootstrap=bootstrap)(b, progress)[0]["sup"]
        logits = net(b.x)
        net.load_state_dict(make("cct").net.state_dict())
        expected = F.cross_entropy(logits, b.y, ignore_index=IGNORE)
        if bootstrap:
            expected = cct.annealed_cross_entropy(logits, b.y, progress / bootstrap)
        torch.testing.assert_close(found, expected)
    sure = torch.zeros(1, CLASSES, 4, 4)
    sure[:, 1] = 20
    loss = cct.annealed_cross_entropy(sure.requires_grad_(), torch.ones(1, 4, 4, dtype=torch.int64), 0.5)
    loss.backward()
    assert loss == 0 and sure.grad.isfinite().all()  # nothing is kept: zero, not NaN


def test_perturbations():
    torch.manual_seed(0)
    f = torch.rand(4, 64, 8, 10) + 0.1
    label = torch.randint(0, CLASSES, (4, 8, 10))
    channels = (cct.dropout(f, label, CLASSES) / f).flatten(2)
    assert (channels == channels[..., :1]).all() and set(channels.unique().tolist()) == {0.0, 2.0}
    noise = cct.feature_noise(f, label, CLASSES) / f - 1
    torch.testing.assert_close(noise, noise[:1].expand_as(noise))
    assert -0.3001 < noise.min() < -0.29 and 0.29 < noise.max() < 0.3001
    assert torch.equal(cct.context(f, label, CLASSES) + cct.objects(f, label, CLASSES), f)
    assert (cct.context(f, label, CLASSES)[0, :, label[0] == 0] == 0).all()
    assert (cct.objects(f, label, CLASSES)[0, :, label[0] > 0] == 0).all()
    cuts = set()
    f = torch.rand(1, 3, 30, 30)
    attention = f[0].mean(0)
    for _ in range(200):
        kept = (cct.feature_drop(f, label, CLASSES) != 0).all(1)[0]
        assert (attention[kept].max() < attention[~kept].min()) and not kept[attention == attention.max()]
        cuts.add((attention[~kept].min() / attention.max()).item())
    assert 0.69 < min(cuts) < 0.73 and 0.87 < max(cuts) < 0.93


def test_guided_cutout_erases_a_part_of_each_predicted_box():
    torch.manual_seed(0)
    label = torch.zeros(2, 24, 40, dtype=torch.int64)
    label[0, 2:13, 5:26] = 1  # spans 10 and 20: erased 4 x 8
    label[0, 6:9, 7:9] = 0  # a hole changes no box
    label[0, 18, 30], label[0, 23, 39] = 3, 3  # two pixels of a class: its box spans 5 and 9: 2 x 3
    places = {1: set(), 3: set()}
    for _ in range(300):
        out = cct.guided_cutout(torch.ones(2, 5, 24, 40), label, CLASSES)
        assert (out[1] == 1).all()  # no object, nothing to erase
        assert (out[0] == out[0, :1]).all()
        erased = out[0, 0] == 0
        boxes = (1, (slice(2, 13), slice(5, 26)), [4, 8]), (3, (slice(18, 24), slice(30, 40)), [2, 3])
        for name, (rows, columns), size in boxes:
            found = erased[rows, columns].nonzero()
            first, last = found.amin(0), found.amax(0)
            # one full rectangle
            assert (last - first + 1).tolist() == size and len(found) == size[0] * size[1]
            places[name].add(tuple(first.tolist()))
        assert erased.sum() == 4 * 8 + 2 * 3
    for name, room in ((1, (6, 12)), (3, (3, 5))):  # anywhere in the box: floor(0.6 span) + 1 places a side
        tops, lefts = ({p[axis] for p in places[name]} for axis in (0, 1))
        assert tops == set(range(room[0] + 1)) and lefts == set(range(room[1] + 1))


def test_fusion_is_the_loop():
    g = torch.Generator().manual_seed(0)
    z, a = 3 * torch.randn(2, CLASSES, 3, 4, generator=g), torch.randn(2, CLASSES, 3, 4, generator=g)
    values = [*z.double().flatten().tolist(), *a.double().flatten().tolist()]
    norm = math.sqrt(sum(v * v for v in values) / len(values))  # one scalar for both maps and the whole batch
    for temperature in (0.5, 1.0, 2.0):
        found = fuse(z, a, temperature)
        for i, r, c in ((i, r, c) for i in range(2) for r in range(3) for c in range(4)):
            p = [math.exp(v / norm) for v in z[i, :, r, c].double().tolist()]
            q = [math.exp(v / norm) for v in a[i, :, r, c].double().tolist()]
            mean = [(x / sum(p) + y / sum(q)) / 2 for x, y in zip(p, q, strict=True)]
            sharp = [m ** (1 / temperature) for m in mean]
            for k in range(CLASSES):
                assert found[i, k, r, c].item() == pytest.approx(sharp[k] / sum(sharp), rel=1e-4)
    torch.testing.assert_close(fuse(7 * z, 7 * a, 0.5), fuse(z, a, 0.5))
    assert fuse(z, a, 0.5).amax(1).mean() > fuse(z, a, 1.0).amax(1).mean()


@pytest.mark.parametrize("background", [True, False])
def test_sgc_map_is_grad_cam_spread_by_attention(background):
    """Grad-CAM by autograd, attention pixel by pixel."""
    torch.manual_seed(0)
    method = make("pseudoseg", background=background, width=8)
    method.image_classifier.weight.data.normal_()
    maps = [torch.randn(2, 192, 6, 6), torch.rand(2, 96, 3, 3)]  # the last two of the encoder, of two sizes
    classes = CLASSES - background
    present = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])[:, :classes]
    valid = torch.ones(2, 12, 12, dtype=torch.bool)
    valid[1, 4:] = False  # the lower two rows of the grid are padding
    last = maps[1].clone().requires_grad_()
    scores = method.image_classifier(last.mean((2, 3)))
    cam = torch.zeros(2, classes, 3, 3)
    for i in range(2):
        for c in range(classes):
            (gradient,) = torch.autograd.grad(scores[i, c], last, retain_graph=True)
            weights = gradient[i].mean((1, 2))
            one = (weights[:, None, None] * maps[1][i]).sum(0).relu() * present[i, c]
            cam[i, c] = one / one.max() if one.max() > 0 else one
    seen = torch.cat((F.interpolate(maps[0], (3, 3), mode="bilinear", align_corners=False), maps[1]), 1)
    q, k = method.query(seen).flatten(2), method.key(seen).flatten(2)
    spread = cam.clone().flatten(2)
    for i in range(2):
        keys = [n for n in range(9) if valid[i, n // 3 * 4, n % 3 * 4]]
        for n in range(9):
            similarity = [math.exp((q[i, :, n] @ k[i, :, m]).item() / math.sqrt(8)) for m in keys]
            for m, s in zip(keys, similarity, strict=True):
                spread[i, :, n] += s / sum(similarity) * cam[i, :, m // 3, m % 3]
    spread = spread.view_as(cam)
    score = torch.cat((2 - spread.amax(1, keepdim=True), spread), 1) if background else spread
    assert 0.2 < spread.max() <= 2 and len(keys) == 3
    expected = copy.deepcopy(method.calibrate)(score)
    torch.testing.assert_close(method.sgc(maps, present, valid), expected, rtol=1e-3, atol=1e-4)


def test_classes_of_an_image_images_without_any_and_squares():
    y = torch.full((2, 8, 8), IGNORE)
    y[0, 0, 0], y[0, 1, 1], y[1, 3, 3] = 2, 0, 3
    assert make("pseudoseg").classes_of(y).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert make("pseudoseg", background=False).classes_of(y).tolist() == [[1, 0, 1, 0], [0, 0, 0, 1]]
    method = make("pseudoseg")
    maps = [torch.randn(2, 192, 2, 2), torch.rand(2, 96, 2, 2)]
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1] = False
    seen = []
    method.calibrate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert method.sgc(maps, torch.zeros(2, CLASSES - 1), valid).isfinite().all()
    assert (seen[0][:, 0] == 2).all() and (seen[0][:, 1:] == 0).all()
    masks = square(500, (40, 60), share=0.2)
    erased = ~masks
    assert (erased.sum((1, 2)) == 64).all()
    assert (erased.any(2).sum(1) == 8).all() and (erased.any(1).sum(1) == 8).all()
    tops, lefts = erased.any(2).float().argmax(1), erased.any(1).float().argmax(1)
    assert set(tops.tolist()) == set(range(33)) and set(lefts.tolist()) == set(range(53))
    assert square(3, (32, 32), share=0.0).all()


def test_pseudoseg_terms_are_the_definition(monkeypatch):
    keep = torch.ones(3, 32, 32, dtype=torch.bool)
    keep[:, 8:20, 4:24] = False
    monkeypatch.setattr("mkd_core.methods.pseudoseg.square", lambda *a: keep)
    method = make("pseudoseg", weight=2.0, rampup=0.5)
    method.image_classifier.weight.data.normal_(0, 0.5)  # some classes are predicted, some are not
    other, b = copy.deepcopy(method), batch()
    terms, _ = method(b, 0.25)
    net = other.net
    maps = net.encoder(b.x)
    close(terms["sup"], ce(bilinear(net.classifier(net.decoder(maps)), (32, 32)), b.y))
    present = torch.stack([torch.stack([(y == c).any() for c in range(1, CLASSES)]) for y in b.y]).float()
    scores = other.image_classifier(maps[-1].mean((2, 3)))
    p = scores.sigmoid()
    close(terms["image"], -(present * p.log() + (1 - present) * (1 - p).log()).mean())
    attention = F.interpolate(other.sgc(maps, present, b.y != IGNORE), (32, 32), mode="bilinear")
    torch.testing.assert_close(terms["attention"], F.cross_entropy(attention, b.y, ignore_index=IGNORE))
    maps = net.encoder(b.weak)
    decoder = net.classifier(net.decoder(maps))
    predicted = (other.image_classifier(maps[-1].mean((2, 3))).sigmoid() >= 0.5).float()
    assert 0 < predicted.mean() < 1
    spread = F.interpolate(other.sgc(maps, predicted, b.valid), decoder.shape[-2:], mode="bilinear")
    target = fuse(decoder, spread, 0.5).detach()
    z = net.classifier(net.features(torch.where(keep[:, None], b.strong[0], 0.0)))
    step = 32 // z.shape[-1]
    counted = (b.valid & keep)[:, ::step, ::step]
    per_pixel = -(target * z.softmax(1).log()).sum(1)
    close(terms["consistency"], 2 * 0.25 * per_pixel[counted].mean())
