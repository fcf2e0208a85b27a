"""Methods with a critic or a contrastive term, against slow loops: AdvSemSeg, GCT, U2PL, PC2Seg."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slow import IGNORE, close, fix, mixed
from tiny import CLASSES, batch, config, gradients, make
from torch import Tensor, nn

from mkd_core.augment import half_box
from mkd_core.losses import sigmoid
from mkd_core.methods import Method
from mkd_core.methods.gct import flaw_map, handle
from mkd_core.runner import run
from mkd_core.train import build_method, make_optimizers

ADAM = {"critic_lr": 3e-4}
CRITICS = {"advsemseg": {"threshold": 0.3, "start": 0.0, "width": 8} | ADAM, "gct": {"width": 8} | ADAM}


@pytest.mark.parametrize("name, options", [*CRITICS.items(), ("u2pl", {"dim": 8, "bank": 50})])
def test_critics_and_memories_are_trained_and_saved_a_critic_by_an_adam_of_its_own(name, options, tmp_path):
    c = config(name, options=options, steps=2)
    run(c, tmp_path, quiet=True)
    saved, fresh = torch.load(tmp_path / c.id / "checkpoint.pt", weights_only=True), build_method(c, 5)
    parts = ("discriminator", "detector", "head.", "bank")
    own = [k for k in fresh.state_dict() if k.startswith(parts) and "num" not in k]
    assert own and all(not torch.equal(fresh.state_dict()[k], saved["method"][k]) for k in own)
    optimizers = make_optimizers(c, fresh)
    assert len(saved["optimizers"]) == len(optimizers) == (2 if fresh.critic else 1)
    ours, *theirs = ({id(p) for g in o.param_groups for p in g["params"]} for o in optimizers)
    if fresh.critic:
        assert theirs == [{id(p) for p in fresh.critic[0].parameters()}] and not ours & theirs[0]
        assert isinstance(optimizers[1], torch.optim.Adam)
        assert optimizers[1].defaults["betas"] == (0.9, 0.99) and optimizers[1].defaults["lr"] == 3e-4
    assert ours.union(*theirs) == {id(p) for p in fresh.parameters() if p.requires_grad}


def adversary(**options) -> Method:
    """One whose discriminator sees differences."""
    method = make("advsemseg", **{"start": 0.0} | options)
    for m in method.discriminator:
        if isinstance(m, nn.Conv2d):
            m.weight.data.mul_(2)
    return method


def test_advsemseg_is_the_reference():
    """Pixel by pixel."""
    method, b = adversary(), batch(size=64)
    net, judge = copy.deepcopy(method.net), copy.deepcopy(method.discriminator)
    prob, prob_u = net(b.x).softmax(1), net(b.weak).softmax(1)

    def score(p: Tensor) -> Tensor:  # D's probability of "real" at full size
        for layer in judge:
            p = layer(p)
        return F.interpolate(p, b.y.shape[-2:], mode="bilinear", align_corners=False)[:, 0].sigmoid()

    real_x, real_u = score(prob), score(prob_u)
    method.threshold = real_u.median().item()  # a part of the pixels is trusted
    truth = torch.zeros_like(prob)
    sums = {k: [] for k in ("adversarial", "adversarial_unlabeled", "self_training", "fake", "real")}
    for i, r, c in product(range(len(b.y)), range(64), range(64)):
        if b.y[i, r, c] != IGNORE:
            truth[i, b.y[i, r, c], r, c] = 1
    real_y = score(truth)
    for i, r, c in product(range(len(b.y)), range(64), range(64)):
        if b.y[i, r, c] != IGNORE:
            sums["adversarial"].append(-real_x[i, r, c].log())
            sums["fake"].append(-(1 - real_x[i, r, c]).log())
            sums["real"].append(-real_y[i, r, c].log())
        if b.valid[i, r, c]:
            sums["adversarial_unlabeled"].append(-real_u[i, r, c].log())
            sums["fake"].append(-(1 - real_u[i, r, c]).log())
            if real_u[i, r, c] >= method.threshold:
                sums["self_training"].append(-prob_u[i, :, r, c].max().log())
    share = len(sums["self_training"]) / len(sums["adversarial_unlabeled"])
    assert 0.05 < share < 0.95
    mean = {k: torch.stack(v).mean() for k, v in sums.items()}
    terms, stats = method(b, 0.5)
    close(terms["adversarial"], 0.01 * mean["adversarial"])
    close(1000 * terms["adversarial_unlabeled"], mean["adversarial_unlabeled"])
    close(terms["self_training"], 0.1 * mean["self_training"])
    close(terms["critic"], (mean["fake"] + mean["real"]) / 2)
    torch.testing.assert_close(stats["trusted"], torch.tensor(share))


def test_advsemseg_trains_itself_from_its_start_and_on_trusted_pixels_only():
    b = batch()
    early, late = (adversary(start=0.25)(b, progress)[0]["self_training"] for progress in (0.249, 0.25))
    assert early == 0 < late
    terms, stats = adversary(threshold=1.0)(b, 0.5)  # nothing is selected
    assert terms["self_training"] == 0 and stats["trusted"] == 0
    assert adversary(threshold=0.0)(b, 0.5)[1]["trusted"] == 1


@pytest.mark.parametrize("name", CRITICS)
def test_a_critic_that_learns_tells_right_from_wrong(name):
    """Alone, on one batch, its loss falls from the start; and then AdvSemSeg's adversarial term is large."""
    method, b = make(name, width=16), batch(padded=name == "advsemseg")
    optimizer = torch.optim.Adam(method.critic[0].parameters(), 1e-3)
    found = []
    for _ in range(16):
        optimizer.zero_grad()
        found.append(method(b, 0.0)[0])
        found[-1]["critic"].backward()
        optimizer.step()
    assert found[-1]["critic"] < 0.45 * found[0]["critic"]
    if name == "advsemseg":
        assert abs(found[0]["critic"].item() - math.log(2)) < 0.05
        assert found[-1]["adversarial"] > 2 * found[0]["adversarial"]


def slow_blur(image: np.ndarray, side: int) -> np.ndarray:
    """In two dimensions at once, pixel by pixel, reflected at the borders."""
    side += side % 2 == 0
    sigma, half, n = 0.3 * ((side - 1) * 0.5 - 1) + 0.8, side // 2, len(image)
    weight = np.array([math.exp(-((k - half) ** 2) / (2 * sigma**2)) for k in range(side)])
    kernel, padded = np.outer(weight, weight) / weight.sum() ** 2, np.pad(image, half, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side))
    return np.array([[(kernel * windows[r, c]).sum() for c in range(n)] for r in range(n)])


def slow_scaled(image: np.ndarray) -> Tensor:
    return torch.tensor((image - image.min()) / (image.max() - image.min() + 1e-9)).float()


def test_gct_flaw_map_and_handled_flaw_are_the_reference():
    """|onehot - p| summed, halved, blurred, dilated, blurred, scaled to [0, 1]."""
    b, n = batch(n=2), 32
    prob = torch.randn(2, CLASSES, n, n, generator=torch.Generator().manual_seed(1)).mul(2).softmax(1)
    for p, y, ours in zip(prob, b.y, flaw_map(prob, b.y), strict=True):
        flaw, around = np.zeros((n, n)), np.zeros((n, n))
        for r, c in product(range(n), range(n)):
            if y[r, c] != IGNORE:
                flaw[r, c] = 0.5 * sum(abs(float(k == y[r, c]) - float(p[k, r, c])) for k in range(CLASSES))
        flaw = slow_blur(flaw, n // 8)
        for r, c in product(range(n), range(n)):
            around[r, c] = flaw[max(0, r - 1) : r + 2, max(0, c - 1) : c + 2].max()
        close(ours, slow_scaled(slow_blur(around, n // 4)), atol=1e-5)
        assert ours.min() == 0 and ours.max() > 0.999
    perfect = F.one_hot(b.y.masked_fill(b.y == IGNORE, 0), CLASSES).movedim(-1, 1).float()
    assert (flaw_map(perfect, b.y) == 0).all()
    raw = torch.randn(2, 48, 48, generator=torch.Generator().manual_seed(1))
    for f, ours in zip(raw, handle(raw), strict=True):
        close(ours, slow_scaled(slow_blur(np.maximum(f.numpy(), 0), 48 // 16)), atol=1e-5)
    faint = torch.stack((torch.full((48, 48), -1.0), 0.09 * torch.rand(48, 48), torch.rand(48, 48)))
    assert handle(faint).amax((1, 2)).tolist() == [0, 0, 1]  # each image by itself


def detected(method: Method, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """A detector that says the same whatever it sees: raw and handled flaw of both networks."""
    g = torch.Generator().manual_seed(2)
    raw, handled = ([torch.rand(6, 32, 32, generator=g) for _ in range(2)] for _ in range(2))
    calls, known = [], {f.data_ptr(): h for f, h in zip(raw, handled, strict=True)}

    def detector(images: Tensor, prob: Tensor) -> Tensor:
        calls.append(len(images))
        return raw[(len(calls) - 1) % 2][: len(images)]

    monkeypatch.setattr(method.detector, "forward", detector)
    monkeypatch.setattr("mkd_core.methods.gct.handle", lambda f: known[f.data_ptr()])
    return raw, handled


def test_gct_terms_are_the_reference(monkeypatch):
    """Who follows whom, pixel by pixel."""
    method, b = make("gct", rampup=0.0), batch()
    nets = copy.deepcopy(method.students)
    raw, handled = detected(method, monkeypatch)
    probs = [torch.cat((net(b.x), net(b.weak))).softmax(1) for net in nets]
    inside = torch.cat((b.y != IGNORE, b.valid))
    distance, correction, error, count = [], [], [], 0
    truth = [flaw_map(p[:3].detach(), b.y) for p in probs]
    for i, r, c in product(range(6), range(32), range(32)):
        if not inside[i, r, c]:
            continue
        count += 1
        flaw = [1.0 if h[i, r, c] > 0.6 else float(h[i, r, c]) for h in handled]
        for k in (0, 1):
            if flaw[1 - k] < flaw[k]:
                distance.append((probs[k][i, :, r, c] - probs[1 - k][i, :, r, c]).square().mean())
            if min(flaw) == 1:
                correction.append(raw[k][i, r, c] ** 2)
            if i < 3:
                error.append((raw[k][i, r, c] - truth[k][i, r, c]) ** 2)
    terms, stats = method(b, 0.0)
    close(terms["consistency"], 100 * torch.stack(distance).sum() / count)
    close(terms["correction"], torch.stack(correction).sum() / count)
    close(terms["critic"], 10 * torch.stack(error).mean())
    torch.testing.assert_close(stats["both_bad"], torch.tensor(len(correction) / 2 / count))
    assert 0.05 < stats["both_bad"] < 0.95


@pytest.mark.parametrize("better", [0, 1])
def test_gct_the_network_with_more_flaw_follows_the_other(better, monkeypatch):
    method = make("gct", rampup=0.0)
    _, handled = detected(method, monkeypatch)
    for k, h in enumerate(handled):
        h.fill_(0.2 if k == better else 0.5)
    consistency = method(batch(), 0.5)[0]["consistency"]
    reached = [gradients(consistency, student) for student in method.students]
    assert reached[better] == 0 < reached[1 - better]
    for h in handled:
        h.fill_(0.7)  # both bad: nobody follows, both are to be corrected
    assert method(batch(), 0.5)[0]["consistency"] == 0


def test_gct_ramp_and_weights():
    assert math.isclose(sigmoid(0.0, 0.09), math.exp(-5))
    assert sigmoid(0.09, 0.09) == sigmoid(0.5, 0.09) == sigmoid(0.0, 0.0) == 1
    assert math.isclose(sigmoid(0.045, 0.09), math.exp(-1.25))
    at = {}
    for progress in (0.0, 0.045, 0.09):
        method = make("gct", width=16)
        method.detector.layers[-1].weight.data.mul_(20)
        at[progress] = method(batch(size=64), progress)[0]
    for key, change in (("consistency", math.exp(-5)), ("sup", 1.0), ("correction", 1.0), ("critic", 1.0)):
        assert at[0.09][key] > 0
        torch.testing.assert_close(at[0.0][key], change * at[0.09][key])


def test_half_box_is_the_released_law():
    """One box of half the area, wider than half the image, anywhere inside; the rest is the own image."""
    torch.manual_seed(0)
    height, width = 48, 64
    masks = half_box(400, (height, width), probability=1.0)
    own, edges = [], []
    for mask in masks:
        rows, columns = (~mask).any(1).nonzero().flatten(), (~mask).any(0).nonzero().flatten()
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        tall, wide = int(bottom - top), int(right - left)
        assert not mask[top:bottom, left:right].any() and (~mask).sum() == tall * wide  # one rectangle
        assert width // 2 + 1 <= wide < width and tall == round(height * width / 2 / wide)
        own.append(mask.float().mean())
        edges.append((top == 0, bottom == height, left == 0, right == width))
    assert abs(torch.stack(own).mean() - 0.5) < 0.005 and torch.tensor(edges).any(0).all()
    assert half_box(3, (32, 32), probability=0.0).all()
    coins = torch.stack([half_box(4, (32, 32)).flatten(1).all(1) for _ in range(60)])
    assert (coins == coins[:, :1]).all() and 15 < coins[:, 0].sum() < 45  # one coin a batch


def pixels(seed: int = 0, classes: int = 5, side: int = 6) -> dict[str, Tensor]:
    """For `contrastive`: two labeled, two unlabeled images; class 2 never occurs, class 3 is never sure."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, (4, side, side), generator=g)
    label[label == 2] = 4
    label[torch.rand(label.shape, generator=g) < 0.1] = IGNORE
    prob = torch.randn(4, classes, side, side, generator=g).mul(2).softmax(1)
    prob[:, 3] = torch.minimum(prob[:, 3], torch.tensor(0.29))
    inside = label != IGNORE
    sure, doubtful = (inside & (torch.rand(label.shape, generator=g) < share) for share in (0.6, 0.5))
    sure[:2], doubtful[:2] = inside[:2], inside[:2]
    own, theirs = (torch.randn(4, 8, side, side, generator=g) for _ in range(2))
    return dict(own=own.requires_grad_(), theirs=theirs, prob=prob, label=label, sure=sure, doubtful=doubtful)


def u2pl(classes: int = 5, **options) -> Method:
    """With a memory for `contrastive` alone: its networks have another number of classes."""
    method = make("u2pl", **{"dim": 8, "bank": 400} | options)
    method.bank = torch.zeros(classes, method.bank.shape[1], 8)
    method.seen = torch.zeros(classes, dtype=torch.int64)
    return method


def same_gradient(found: Tensor, expected: Tensor, to: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, to)[0] for loss in (found, expected)))


def places_of(prob: Tensor) -> list[int]:
    """The place of every class in the order of one pixel's probabilities, the likeliest at 0."""
    return [sum(bool(other > p) for other in prob) for p in prob]


def test_u2pl_contrast_is_the_reference(monkeypatch):
    """Pixel by pixel; every class has one key, stored many times, and all of its anchors are used."""
    method, data = u2pl(anchors=1000, negatives=7), pixels()
    key = torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
    method.bank.copy_(F.normalize(key, dim=1)[:, None].expand_as(method.bank))
    method.seen.copy_(torch.tensor([400, 10_000, 400, 400, 0]))  # class 4 has no key yet
    monkeypatch.setattr(method, "_remember", lambda *args: None)
    losses, present, anchors = [], 0, {}
    for c in range(5):
        mine, means = [], []
        for i, r, q in product(range(4), range(6), range(6)):
            if data["label"][i, r, q] == c and data["sure"][i, r, q]:
                means.append(data["theirs"][i, :, r, q])
                if data["prob"][i, c, r, q] > 0.3:
                    mine.append(data["own"][i, :, r, q])
        present += bool(means)
        anchors[c] = len(mine)
        if not mine or not method.seen[c]:
            continue
        mean, of_class = torch.stack(means).mean(0), []
        for z in mine:
            similar = torch.cosine_similarity(z, mean, dim=0) / 0.5
            others = 7 * (torch.cosine_similarity(z, key[c], dim=0) / 0.5).exp()
            of_class.append(-(similar.exp() / (similar.exp() + others)).log())
        losses.append(torch.stack(of_class).mean())
    assert anchors[2] == anchors[3] == 0 and min(anchors[c] for c in (0, 1, 4)) >= 3
    assert len(losses) == 2 and present == 4
    expected = torch.stack(losses).sum() / present
    same_gradient(method.contrastive(**data, labeled=2), expected, data["own"])


def test_u2pl_negatives_are_what_a_pixel_is_probably_not():
    """Unlabeled: doubtful, the class at place 3 or later; labeled: not the true one, among the first 3.

    The released mask also asked that the (pseudo-)label be the class: no labeled negative was left.
    """
    method, data = u2pl(bank=2000, low_rank=3, high_rank=4), pixels()
    method.contrastive(**data, labeled=2)
    labeled = 0
    for c in range(5):
        expected = []
        for i, r, q in product(range(4), range(6), range(6)):
            place = places_of(data["prob"][i, :, r, q])[c]
            if i < 2:
                is_negative = data["label"][i, r, q] not in (c, IGNORE) and place < 3
                labeled += is_negative
            else:
                is_negative = bool(data["doubtful"][i, r, q]) and place == 3
            if is_negative:
                expected.append(F.normalize(data["theirs"][i, :, r, q], dim=0))
        assert 3 < len(expected) == method.seen[c]
        stored, wanted = method.bank[c, : len(expected)], torch.stack(expected)
        assert torch.allclose(stored[stored[:, 0].argsort()], wanted[wanted[:, 0].argsort()])
        assert (method.bank[c, len(expected) :] == 0).all()
    assert labeled > 20


def test_u2pl_memory_is_bounded_and_drops_the_oldest():
    method = u2pl(classes=2, bank=30)  # three keys a step at most
    pushed = {0: [], 1: []}
    for step in range(25):
        vectors = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(step)), dim=1)
        chosen = torch.zeros(2, 10, dtype=torch.bool)
        chosen[0, :7] = True
        chosen[1, 3] = step % 2 == 0
        before = int(method.seen[0])
        method._remember(3 * vectors, chosen)
        pushed[0] += [method.bank[0, k % 30].clone() for k in range(before, before + 3)]
        pushed[1] += [vectors[3]] if step % 2 == 0 else []
        assert all(any(torch.allclose(k, v) for v in vectors[:7]) for k in pushed[0][-3:])
    assert method.seen.tolist() == [75, 13] and method.bank.shape == (2, 30, 8)
    for c in (0, 1):
        kept = pushed[c][-30:]
        assert len(kept) == min(30, len(pushed[c]))
        assert all(any(torch.allclose(k, slot) for slot in method.bank[c]) for k in kept)
    assert (method.bank[1, 13:] == 0).all()


def test_u2pl_draws_keys_from_the_filled_part_only():
    method, data = u2pl(negatives=300), pixels()
    method.bank.fill_(float("nan"))
    method.seen.fill_(0)
    method.contrastive(**data, labeled=2)  # fills some slots
    method.bank[:, 399] = 1.0
    method.seen.clamp_(max=5)
    method._remember = lambda *args: None
    assert method.contrastive(**data, labeled=2).isfinite()


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_u2pl_pseudo_labels_are_the_reference(progress, monkeypatch):
    """Labels by the teacher in eval mode on the plain image, entropy in train mode on the mixed one."""
    method, b = make("u2pl", dim=8, bank=50, drop=0.4), batch(n=3)
    for p in method.teacher.parameters():
        p.data.mul_(1.3)
    mask = fix(monkeypatch, "u2pl.half_box")
    given, drop = [], 0.4 * (1 - progress)
    monkeypatch.setattr(method, "contrastive", lambda *args: given.extend(args) or args[0].sum())
    net, teacher = copy.deepcopy(method.net), copy.deepcopy(method.teacher.module)
    label, valid = mixed(teacher.eval()(b.weak).argmax(1), mask), mixed(b.valid, mask)
    x = torch.cat((b.x, mixed(b.weak, mask)))
    prob = teacher.train()(x).softmax(1).detach()
    entropies = -(prob * (prob + 1e-10).log()).sum(1)[3:]
    low, high = np.percentile(entropies[valid].numpy(), [100 * drop, 100 - 100 * drop])
    losses, z = [], net(x)[3:].log_softmax(1)
    for i, r, c in product(range(3), range(32), range(32)):
        if valid[i, r, c] and entropies[i, r, c] <= high:
            losses.append(-z[i, label[i, r, c], r, c])
    expected = torch.stack(losses).mean() * int(valid.sum()) / len(losses)
    terms, stats = method(b, progress)
    close(terms["unsup"], expected)
    assert abs(stats["kept"].item() - (1 - drop)) < 0.01
    own, theirs, _, *maps, labeled = given
    known = b.y != IGNORE
    sure, doubtful = valid & (entropies <= low), valid & (entropies >= high)
    expected = [(b.y, label.masked_fill(~valid, IGNORE)), (known, sure), (known, doubtful)]
    for found, pair in zip(maps, expected, strict=True):  # on the grid of the features: pixel (4 i, 4 j)
        assert torch.equal(found, torch.cat(pair)[:, ::4, ::4])
    assert labeled == 3 and not theirs.requires_grad and own.requires_grad


def test_u2pl_the_teacher_labels_in_eval_mode_and_learns_its_statistics_in_train_mode():
    method, modes = make("u2pl", dim=8, bank=50), []
    teacher = method.teacher.module
    teacher.encoder.register_forward_pre_hook(lambda net, args: modes.append((net.training, len(args[0]))))
    norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    running = [m.running_mean.clone() for m in norms]
    method(batch(), 0.5)
    assert modes == [(False, 3), (True, 6)]
    assert all(not torch.equal(a, m.running_mean) for a, m in zip(running, norms, strict=True))
    method.eval()
    method(batch(), 0.5)  # does not put its teacher back into train mode
    assert not method.teacher.module.training and not method.head_teacher.module.training
    assert [make("u2pl", dim=8, bank=50, cutmix=share).min_batch for share in (0.5, 0.0)] == [2, 1]


def in_order(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Every pixel is an anchor, in its own place."""
    return torch.arange(mask.shape[1]).expand(len(mask), -1), mask


def test_pc2seg_contrast_is_the_reference(monkeypatch):
    """InfoNCE and the law of its negatives, pair by pair."""
    method, g = make("pc2seg", dim=8, negatives=5), torch.Generator().manual_seed(0)
    own, keys = (torch.randn(3, 8, 2, 2, generator=g) for _ in range(2))
    prob = torch.randn(3, CLASSES, 2, 2, generator=g).mul(3).softmax(1)
    valid = torch.ones(3, 2, 2, dtype=torch.bool)
    valid[0, 1, 1] = valid[2, 0, 0] = False
    pick = torch.tensor([[(i + 4 + k) % 12 for k in (0, 1, 2, 1, 3)] for i in range(12)])  # of the next image
    weights = []
    monkeypatch.setattr("mkd_core.methods.pc2seg.draw", in_order)
    monkeypatch.setattr(torch, "multinomial", lambda w, n, replacement: weights.append(w) or pick)
    own.requires_grad_()
    found = method.contrastive(own, keys, prob, valid)
    flat = [*product(range(3), range(2), range(2))]
    losses = []
    for a, (i, r, c) in enumerate(flat):
        for b, (j, s, d) in enumerate(flat):
            law = 1 - (prob[i, :, r, c] * prob[j, :, s, d]).sum() if i != j and valid[j, s, d] else 0.0
            assert math.isclose(weights[0][a, b], law, rel_tol=1e-4, abs_tol=1e-7)
        if valid[i, r, c]:
            z = [torch.cosine_similarity(own[i, :, r, c], keys[j, :, s, d], dim=0) / 0.1
                 for j, s, d in ((i, r, c), *(flat[k] for k in pick[a]))]  # fmt: skip
            losses.append(-(z[0].exp() / torch.stack(z).exp().sum()).log())
    same_gradient(found, torch.stack(losses).mean(), own)


def test_pc2seg_without_a_partner_is_zero_and_its_consistency_the_squared_distance_of_unit_vectors():
    method = make("pc2seg", dim=8)
    one = torch.zeros(2, 4, 4, dtype=torch.bool)
    for valid in (one, torch.stack((~one[0], one[1]))):
        own, prob = torch.randn(2, 8, 4, 4, requires_grad=True), torch.rand(2, CLASSES, 4, 4).softmax(1)
        loss = method.contrastive(own, torch.randn(2, 8, 4, 4), prob, valid)
        assert loss == 0 and torch.autograd.grad(loss, own)[0].isfinite().all()
    method, b = make("pc2seg", dim=8), batch()
    net = copy.deepcopy(method.net)
    weak, strong = (F.normalize(net(v).softmax(1), dim=1) for v in (b.weak, b.strong[0]))
    expected = ((strong - weak).square().sum(1) / 2)[b.valid].mean()
    close(method(b, 0.5)[0]["consistency"], expected)
