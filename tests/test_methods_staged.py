"""ST++ and SimpleBaseline: their losses, what they label and in which order, what they keep."""

import copy
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from slow import IGNORE, ce
from tiny import CLASSES, batch, build, gradients, make
from torch import Tensor, nn

from mkd_core.augment import normalise
from mkd_core.augment.colour import apply_chosen
from mkd_core.methods import Batch, Method, noise
from mkd_core.methods.st_plus_plus import tta


def labeled_only(b: Batch) -> Batch:
    """What the first stage sees."""
    return replace(b, weak=b.weak[:0], strong=(), valid=b.valid[:0], label=b.label[:0])


@pytest.mark.parametrize("name", ["st_plus_plus", "simple_baseline"])
def test_the_first_stage_is_supervised(name):
    method, supervised = make(name), make("supervised")
    ours, theirs = method(labeled_only(batch()), 0.1)[0], supervised(labeled_only(batch()), 0.1)[0]
    assert ours.keys() == theirs.keys() and ours["sup"] == theirs["sup"]
    assert not method.unlabeled and method.views == 1


def test_stages():
    assert make("st_plus_plus").stages == (1 / 3, 2 / 3)
    assert make("st_plus_plus", selection=False).stages == make("simple_baseline").stages == (1 / 2,)
    assert make("simple_baseline", rounds=3).stages == (1 / 4, 2 / 4, 3 / 4)


@pytest.mark.parametrize("joint", [True, False])
def test_st_loss_is_one_mean_over_both_kinds_of_pixels(joint, monkeypatch):
    keep = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.7
    monkeypatch.setattr("mkd_core.methods.st_plus_plus.ratio_box", lambda *a: keep)
    method = make("st_plus_plus", joint=joint)
    net, b = copy.deepcopy(method.net), batch()
    torch.manual_seed(5)
    terms, _ = method(b, 0.5)
    torch.manual_seed(5)
    noise = torch.rand(b.weak.shape)  # grey levels anywhere in [0, 1]
    strong = torch.where(keep[:, None], b.strong[0], normalise(noise))
    z = net(torch.cat((b.x, strong))) if joint else torch.cat((net(b.x), net(strong)))
    y = torch.cat((b.y, torch.where(keep, b.label, IGNORE)))
    torch.testing.assert_close(sum(terms.values()), F.cross_entropy(z, y, ignore_index=IGNORE))
    torch.testing.assert_close(terms["pseudo"], ce(z[3:], y[3:], (y != IGNORE).sum()))


def test_checkpoints_are_the_network_after_one_and_two_thirds_of_the_first_stage():
    method = make("st_plus_plus")
    b = labeled_only(batch(size=16))
    for step in range(1, 31):  # the first stage has 10 steps
        method(b, (step - 1) / 30)
        with torch.no_grad():
            for t in (*method.net.parameters(), *(t for t in method.net.buffers() if t.is_floating_point())):
                t.fill_(step)
        method.update(step)
    for checkpoint, step in zip(method.checkpoints, (4, 7), strict=True):  # the first at or after 3.3 and 6.7
        state = [t for t in checkpoint.state_dict().values() if t.is_floating_point()]
        assert len(state) > 50 and all((t == step).all() for t in state)
    assert not make("st_plus_plus", selection=False).checkpoints


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Mean IoU by counting pixels one by one; a class in neither map does not count."""
    ious = []
    for c in range(CLASSES):
        both = either = 0
        for p, q in zip(a.flat, b.flat, strict=True):
            both += int(p == c and q == c)
            either += int(p == c or q == c)
        if either:
            ious.append(both / either)
    return sum(ious) / len(ious)


def predictions(method: Method, n: int) -> tuple[list[Tensor], dict[int, list[np.ndarray]]]:
    """Images whose first value is their number, and what each of the three networks predicts for them."""
    rng = np.random.default_rng(0)
    maps: dict[int, list[np.ndarray]] = {}
    for net in (*method.checkpoints, method.net):
        maps[id(net)] = [rng.integers(0, 1 + (i + 1) % CLASSES, (6, 8)) for i in range(n)]
    for i in range(n):  # the checkpoints agree with the last network more or less
        for net in method.checkpoints:
            same = rng.random((6, 8)) < rng.random()
            maps[id(net)][i] = np.where(same, maps[id(method.net)][i], maps[id(net)][i])
    return [torch.full((1, 3, 6, 8), float(i)) for i in range(n)], maps


def test_st_plus_plus_labels_the_reliable_half_first_and_then_the_rest():
    method, n = make("st_plus_plus", scales=(1.0,)), 9
    images, maps = predictions(method, n)
    asked = []

    def prob(net: nn.Module, x: Tensor) -> Tensor:
        i = int(x[0, 0, 0, 0])
        asked.append((id(net), len(x)))
        one = F.one_hot(torch.from_numpy(maps[id(net)][i]), CLASSES).permute(2, 0, 1).float()
        return torch.stack([one, one.flip(-1)][: len(x)])

    last = maps[id(method.net)]
    scores = [sum(agreement(maps[id(c)][i], last[i]) for c in method.checkpoints) / 2 for i in range(n)]
    pairs = [[(maps[id(c)][i], last[i]) for c in method.checkpoints] for i in range(n)]
    zeros = [sum(agreement(a, b) * len({*a.flat, *b.flat}) for a, b in of) for of in pairs]
    best = sorted(range(n), key=lambda i: -scores[i])[:5]
    others = sorted(range(n), key=lambda i: -zeros[i])[:5]
    assert set(best) != set(others)  # which counting an absent class as 0 would choose
    old = copy.deepcopy(method.net.state_dict())
    torch.manual_seed(3)
    found = dict(method.relabel(1, images, prob, set()))
    assert list(found) == best
    for i, label in found.items():
        assert (label.numpy() == last[i]).all()
    torch.manual_seed(3)
    fresh = build().state_dict()
    assert all(torch.equal(t, fresh[k]) for k, t in method.net.state_dict().items())
    assert not torch.equal(old["classifier.weight"], fresh["classifier.weight"])
    asked.clear()
    rest = dict(method.relabel(2, images, prob, set(best)))
    assert set(rest) == set(range(n)) - set(best)
    assert {net for net, _ in asked} == {id(method.net)}  # nothing is ranked any more


def test_test_time_augmentation_is_the_loop():
    torch.manual_seed(0)
    net = nn.Conv2d(3, CLASSES, 3, padding=1)
    image = torch.randn(1, 3, 10, 14)
    scales = (0.5, 0.75, 1.0, 1.5, 2.0)
    total = torch.zeros(1, CLASSES, 10, 14)
    for scale in scales:
        for flip in (False, True):
            x = F.interpolate(image, (int(10 * scale), int(14 * scale)), mode="bilinear", align_corners=False)
            p = net(x.flip(3) if flip else x).softmax(1)
            total += F.interpolate(p.flip(3) if flip else p, (10, 14), mode="bilinear", align_corners=False)
    found = tta(lambda net, x: net(x).softmax(1), net, image, scales)
    torch.testing.assert_close(found, total / 10)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 10, 14))


def unlike(method: Method) -> Method:
    """The other BatchNorm layers, and the network that labeled, are no copies any more."""
    g = torch.Generator().manual_seed(1)
    for t in (*method.norms.parameters(), *method.labeler.parameters()):
        t.data += 0.1 * torch.randn(t.shape, generator=g)
    method.net.classifier.weight.data *= 20  # some pixels are sure
    return method


def with_other_norms(method: Method) -> nn.Module:
    """A network of its own that holds the other BatchNorm layers as modules."""
    net = copy.deepcopy(method.net)
    for name, norm in zip(method.names, method.norms, strict=True):
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, copy.deepcopy(norm))
    return net


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_simple_baseline_loss_is_the_loop(beta):
    method = unlike(make("simple_baseline", beta=beta))
    b = batch()
    z = with_other_norms(method)(b.strong[0]).softmax(1).detach().double()
    total, n, sure = 0.0, 0, 0
    for i, r, c in product(range(3), range(32), range(32)):
        y = int(b.label[i, r, c])
        if y == IGNORE:
            continue
        p = z[i, :, r, c].tolist()
        q = max(p)
        sure += q > 0.8
        q = 1.0 if q > 0.8 else q
        rce = -sum(p[k] * math.log(1.0 if k == y else 1e-4) for k in range(CLASSES))
        total += (1 - q) * -math.log(p[y]) + beta * q * rce
        n += 1
    assert 0.05 < sure / n < 0.95
    assert method(b, 0.6)[0]["pseudo"].item() == pytest.approx(total / n, rel=1e-4)


def test_strong_images_have_batchnorm_of_their_own():
    method = unlike(make("simple_baseline"))
    b = batch()
    other, own = with_other_norms(method), copy.deepcopy(method.net)
    terms, _ = method(b, 0.6)
    own(b.x), other(b.strong[0])
    for name, norm in zip(method.names, method.norms, strict=True):
        pairs = (norm, other.get_submodule(name)), (method.net.get_submodule(name), own.get_submodule(name))
        for mine, theirs in pairs:
            assert mine.num_batches_tracked == 1
            torch.testing.assert_close(mine.running_mean, theirs.running_mean)
            torch.testing.assert_close(mine.running_var, theirs.running_var)
        assert not torch.equal(norm.running_mean, method.net.get_submodule(name).running_mean)
    own_norms = nn.ModuleList([method.net.get_submodule(name) for name in method.names])
    assert gradients(terms["pseudo"], method.norms) > 0 == gradients(terms["sup"], method.norms)
    assert gradients(terms["sup"], own_norms) > 0 == gradients(terms["pseudo"], own_norms)
    assert len(method.names) > 10 and gradients(terms["pseudo"], method.net.classifier) > 0
    assert all(gradients(t, method.labeler) == 0 for t in terms.values())
    shared = make("simple_baseline", dsbn=False)
    assert not shared.names
    first = next(m for m in shared.net.modules() if isinstance(m, nn.BatchNorm2d))
    assert gradients(shared(b, 0.6)[0]["pseudo"], first) > 0


def test_l2sp_is_the_loop():
    method = unlike(make("simple_baseline", l2sp=0.01))
    expected = 0.0
    for (name, p), anchor in zip(method.net.named_parameters(), method.labeler.parameters(), strict=True):
        expected += (p - (anchor if p.ndim > 1 else 0)).double().square().sum().item()
        assert p.ndim > 1 or "bias" in name or p.shape[0] > 1
    expected += sum(p.double().square().sum().item() for m in method.norms for p in (m.weight, m.bias))
    term = method(batch(), 0.6)[0]["l2sp"]
    assert term.item() == pytest.approx(0.01 * expected, rel=1e-4)
    kernel = method.net.classifier.weight
    (found,) = torch.autograd.grad(term, kernel)
    torch.testing.assert_close(found, 0.02 * (kernel - method.labeler.classifier.weight))
    at_start = make("simple_baseline")
    sum(at_start(batch(), 0.6)[0].values()).backward()  # the distance is 0, where a norm has no derivative
    assert all(p.grad.isfinite().all() for p in at_start.parameters() if p.grad is not None)
    assert "l2sp" not in make("simple_baseline", l2sp=0.0)(batch(), 0.6)[0]


def test_simple_baseline_goes_on_from_the_network_that_labeled():
    method = unlike(make("simple_baseline", scales=(1.0,))).eval()
    before = copy.deepcopy(method.net.state_dict())
    images = [torch.randn(1, 3, 16, 16) for _ in range(4)]
    with torch.no_grad():
        found = dict(method.relabel(1, images, lambda net, x: net(x).softmax(1), {0, 1}))
    assert list(found) == [0, 1, 2, 3] and all(label.shape == (16, 16) for label in found.values())
    for state in (method.net.state_dict(), method.labeler.state_dict()):
        assert all(torch.equal(t, before[k]) for k, t in state.items())
    for key, t in method.other_norms().items():
        assert torch.equal(t, before[key]) and t.data_ptr() != method.net.state_dict()[key].data_ptr()


def test_three_of_draws_three_different_operators_of_seventeen_in_their_order(monkeypatch):
    operations = (lambda x: x + 1, lambda x: 3 * x, lambda x: x - 5, lambda x: x * 0)
    choice = torch.tensor([[0, 1], [1, 0], [2, 1], [3, 2]])
    out = apply_chosen(operations, choice, torch.full((4, 3, 1, 1), 2.0))
    assert out[:, 0, 0, 0].tolist() == [9, 9, 1, 0]
    drawn = []

    def keep(operations, choice, images):
        assert len(operations) == 17
        drawn.append(choice)
        return images

    with monkeypatch.context() as m:
        m.setattr(noise, "apply_chosen", keep)
        noise.three_of(torch.rand(6000, 3, 1, 1))
    (choice,) = drawn
    assert choice.shape == (6000, 3) and (choice.sort(1).values.diff(dim=1) > 0).all()
    assert (torch.bincount(choice.flatten(), minlength=17) / 6000 - 3 / 17).abs().max() < 0.03
    images = torch.rand(64, 3, 24, 24)
    kept = images.clone()
    out = noise.three_of(images)
    assert out.shape == images.shape and out.isfinite().all() and torch.equal(images, kept)
    assert out.min() >= 0 and out.max() <= 1
    changed = (out != images).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    for _ in range(3):
        noise.three_of(images[:1]), noise.three_of(images[:2])


def test_operators_do_what_they_say():
    torch.manual_seed(0)
    images = torch.full((400, 3, 16, 16), 0.5)
    gauss = noise.gaussian_noise(images) - images
    assert gauss.std().item() == pytest.approx(14 / 255, rel=0.02)
    poisson = (noise.poisson_noise(images) - images) * 255
    assert torch.equal(poisson[:, 0], poisson[:, 2]) and (poisson - poisson.round()).abs().max() < 1e-3
    assert poisson.abs().mean().item() == pytest.approx(12.6, rel=0.02) and abs(poisson.mean().item()) < 0.3
    share = (noise.dropout(images) == 0).float().mean((1, 2, 3))
    assert 0.15 < share.min() < 0.25 and 0.45 < share.max() < 0.55
    coarse = (noise.coarse_dropout(images) == 0).float()
    assert coarse.mean().item() == pytest.approx(0.2, abs=0.01)
    blocks = coarse.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (blocks.amax(-1) == blocks.amin(-1)).all()
    factor = noise.multiply(0.5 * images)[:, :, 0, 0] / 0.25
    assert 0.25 <= factor.min() < 0.3 and 2.4 < factor.max() <= 2.5 and (factor[:, 0] != factor[:, 1]).all()
    pepper = noise.salt_and_pepper(images)
    hit = (pepper != 0.5).float().mean((1, 2, 3))
    assert hit.max() < 0.13 and hit.mean().item() == pytest.approx(0.05, abs=0.005)
    assert set(pepper.unique().tolist()) == {0.0, 0.5, 1.0}
    coloured = torch.rand(50, 3, 4, 4)
    shuffled = noise.channel_shuffle(coloured)
    assert torch.equal(shuffled.sort(1).values, coloured.sort(1).values)
    pairs = zip(shuffled, coloured, strict=True)
    orders = {tuple((s[:, None] == c[None]).all((2, 3)).float().argmax(1).tolist()) for s, c in pairs}
    assert len(orders) == 6
