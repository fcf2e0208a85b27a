"""Every method: who gets a gradient, what reduces to what, and whole losses against slow references written from the specification."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import CLASSES, batch, build, gradients, make
from torch import Tensor, nn

from mkd_core import augment
from mkd_core.ema import EMA
from mkd_core.methods import METHODS, Batch, Method
from mkd_core.models import SegNet

IGNORE = 255
SOFT = 0.3  # a threshold that networks at their random start reach on some pixels

CASES: dict[str, tuple[str, dict]] = {
    "supervised": ("supervised", {}),
    "mean_teacher": ("mean_teacher", {}),
    "mean_teacher eval": ("mean_teacher", {"teacher_mode": "eval", "ema_buffers": "all"}),
    "cutmix_seg": ("cutmix_seg", {"threshold": SOFT}),
    "cutmix_seg no boxes": ("cutmix_seg", {"threshold": 0.0, "boxes": 0, "colour": False}),
    "cps": ("cps", {}),
    "cps joint": ("cps", {"joint": True, "on_labeled": False}),
    "cps cutmix": ("cps", {"boxes": 3, "weight": 1.0}),
    "mkd a": ("mkd", {"alpha": 0.0, "sda": False, "threshold": 0.0}),  # the rows of Table 4
    "mkd b": ("mkd", {"sda": False, "threshold": 0.0}),
    "mkd c": ("mkd", {"sda": False, "threshold": 0.0, "fda": 1.5}),
    "mkd d": ("mkd", {"alpha": 0.0, "threshold": 0.0}),
    "mkd e": ("mkd", {"threshold": 0.0}),
    "mkd f": ("mkd", {"threshold": SOFT}),
    "mkd f fda": ("mkd", {"threshold": SOFT, "fda": 1.5}),
    "mkd alone": ("mkd", {"threshold": SOFT, "beta": 0.0, "fda": 1.5}),
    "mkd d fda": ("mkd", {"alpha": 0.0, "threshold": 0.0, "fda": 1.5, "fda_label": "own"}),
    "mkd naive": ("mkd", {"threshold": SOFT, "mutual": False}),
    "mkd ss": ("mkd", {"threshold": SOFT, "select": "ss"}),
    "mkd both": ("mkd", {"threshold": SOFT, "select": "both", "denominator": "valid"}),
    "mkd labeled": ("mkd", {"threshold": SOFT, "on_labeled": True, "stride": 4}),
    "mkd teacher eval": ("mkd", {"threshold": 0.0, "teacher_mode": "eval", "ema_buffers": "all"}),
    "mkd beta": ("mkd", {"threshold": SOFT, "law": "beta", "fda": 1.0, "fda_ramp": "linear"}),
    "mkd pspnet": ("mkd", {"threshold": SOFT, "arch2": "pspnet", "fda": 1.0}),
    "advsemseg": ("advsemseg", {"threshold": SOFT, "start": 0.5, "width": 16}),
    "gct": ("gct", {"width": 16}),
    "u2pl": ("u2pl", {"dim": 16, "bank": 200}),
    "u2pl separate": ("u2pl", {"dim": 16, "bank": 200, "joint": False, "cutmix": 1.0, "contrast": 0.1}),
    "pc2seg": ("pc2seg", {"dim": 16}),
    "mkd released": (
        "mkd",
        {
            "decay": 0.6, "threshold": 0.0, "fda": 1.5, "stride": 8, "on_labeled": True, "ignore_padding": False, "fda_label": "own",
            "fda_on_teacher": True, "target_after_fda": True,
        },
    ),
    "fixmatch": ("fixmatch", {"threshold": SOFT}),
    "fixmatch separate": ("fixmatch", {"threshold": SOFT, "joint": False, "cutmix": 0.0}),
    "unimatch": ("unimatch", {"threshold": SOFT}),
    "unimatch one stream": ("unimatch", {"threshold": SOFT, "streams": 1, "feature": 0.0}),
    "speed": ("speed", {"threshold": SOFT, "grid": 4}),
    "vat": ("vat", {"threshold": SOFT}),
    "vat radius 0": ("vat", {"threshold": 0.0, "radius": 0.0}),
    "ps_mt": ("ps_mt", {"threshold": SOFT, "top": 2}),
    "ps_mt plain": ("ps_mt", {"threshold": 0.0, "vat": 0.0, "cutmix": False}),
    "st_plus_plus": ("st_plus_plus", {}),
    "self-training": ("st_plus_plus", {"selection": False, "cutout": 0.0, "joint": False}),
    "cct": ("cct", {}),
    "cct joint": ("cct", {"copies": 1, "bootstrap": 0.0, "joint": True}),
    "pseudoseg": ("pseudoseg", {}),
    "pseudoseg no background": ("pseudoseg", {"background": False}),
    "simple_baseline": ("simple_baseline", {}),
    "simple_baseline one norm": ("simple_baseline", {"dsbn": False}),
}  # fmt: skip

TERMS: dict[str, set[str]] = {  # where they are not sup and consistency
    "supervised": {"sup"},
    "cps": {"sup", "cross"},
    "mkd": {"sup", "st", "ss"},
    "advsemseg": {"sup", "adversarial", "adversarial_unlabeled", "self_training", "critic"},
    "gct": {"sup", "consistency", "correction", "critic"},
    "u2pl": {"sup", "unsup", "contrast"},
    "pc2seg": {"sup", "consistency", "contrast"},
    "fixmatch": {"sup", "strong"},
    "unimatch": {"sup", "strong", "feature"},
    "speed": {"sup", "strong", "entropymix", "relation"},
    "st_plus_plus": {"sup", "pseudo"},
    "pseudoseg": {"sup", "attention", "image", "consistency"},
    "simple_baseline": {"sup", "pseudo", "l2sp"},
}
# Parts of the network that a term leaves alone by definition.
UNREACHED = {
    ("cct", "consistency"): {"classifier"}, ("u2pl", "contrast"): {"classifier"}, ("pc2seg", "contrast"): {"classifier"}, ("pseudoseg", "image"): {"decoder", "classifier"},
    ("pseudoseg", "attention"): {"encoder", "decoder", "classifier"},
}  # fmt: skip


def students(method: Method) -> list[nn.Module]:
    return list(method.students) if hasattr(method, "students") else [method.net]


def teachers(method: Method) -> list[EMA]:
    return [m for name, m in method.named_modules() if isinstance(m, EMA) and isinstance(m.module, SegNet) and "checkpoints" not in name]


def test_every_method_has_a_case():
    assert {name for name, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_every_term_reaches_every_student_and_no_teacher(name):
    method = make(CASES[name][0], **CASES[name][1])
    for teacher in teachers(method):
        teacher.requires_grad_(True)  # even a teacher that could learn must not
        for p in teacher.parameters():
            p.data.mul_(1.2)  # an exact copy that sees the same image agrees, and nothing is to be learnt from it
    judge = [method.critic[0]] if method.critic else []
    for module in judge:
        list(module.modules())[-1].weight.data.mul_(20)  # one that has an opinion
    terms, stats = method(batch(size=64 if judge else 32), 0.7)
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())
    assert not any(s.requires_grad for s in stats.values()) and all(s.isfinite() for s in stats.values())
    expected = TERMS.get(CASES[name][0], {"sup", "consistency"})
    expected = expected - {
        term for term, weight in (("st", "alpha"), ("ss", "beta"), ("feature", "feature")) if CASES[name][1].get(weight) == 0
    }
    assert set(terms) == expected
    for key, term in terms.items():
        assert term > 0, key
        for number, student in enumerate(students(method), 1):
            for part in ("encoder", "decoder", "classifier"):
                wanted = key != "critic" and part not in UNREACHED.get((CASES[name][0], key), ())
                assert (gradients(term, getattr(student, part)) > 0) == wanted, f"{key} at the {part} of student {number}: {wanted}"
        for module in judge:
            assert (gradients(term, module) > 0) == (key == "critic"), f"{key} and the critic"
        for teacher in teachers(method):
            assert gradients(term, teacher) == 0, f"{key} reaches a teacher"
    fixed = {id(p) for teacher in teachers(method) for p in teacher.parameters()}
    free = {name: p for name, p in method.named_parameters() if p.requires_grad and id(p) not in fixed}
    found = torch.autograd.grad(sum(terms.values()), [*free.values()], allow_unused=True)
    assert not [name for name, g in zip(free, found, strict=True) if g is None], "parameters that nothing trains"


@pytest.mark.parametrize("name", CASES)
def test_teachers_start_as_copies_follow_their_student_and_are_not_optimised(name):
    method = make(CASES[name][0], **CASES[name][1])
    pairs = list(zip(students(method), teachers(method), strict=False))
    for student, teacher in pairs:
        for (key, a), b in zip(student.state_dict().items(), teacher.module.state_dict().values(), strict=True):
            assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), key
        assert not any(p.requires_grad for p in teacher.parameters())
    starts = [copy.deepcopy(t.module) for _, t in pairs]
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    terms, _ = method(batch(), 0.0)
    sum(terms.values()).backward()
    optimizer.step()
    for start, (_, teacher) in zip(starts, pairs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(start.parameters(), teacher.parameters(), strict=True))
    method.update(1)
    for start, (student, teacher) in zip(starts, pairs, strict=True):
        keep = min(0.5, teacher.decay) if teacher.warmup else teacher.decay
        for a, b, mine in zip(start.parameters(), student.parameters(), teacher.module.parameters(), strict=True):
            torch.testing.assert_close(mine, keep * a + (1 - keep) * b, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), teacher.parameters(), strict=True))


def test_two_students_start_differently():
    for name in ("cps", "mkd"):
        a, b = make(name).students
        assert not torch.equal(a.classifier.weight, b.classifier.weight)


@pytest.mark.parametrize("name", CASES)
def test_predictors_map_images_to_logits_and_the_first_is_the_reported_one(name):
    method = make(CASES[name][0], **CASES[name][1]).eval()
    first = {"mean_teacher": "student", "cutmix_seg": "teacher", "vat": "teacher", "u2pl": "teacher", "ps_mt": "teachers", "cct": "main",
             "cps": "student 1", "mkd": "student 1", "gct": "student 1", "pseudoseg": "decoder"}  # fmt: skip
    assert next(iter(method.predictors)) == first.get(CASES[name][0], "net")
    assert len(method.predictors) == len(students(method)) + len(teachers(method))
    with torch.no_grad():
        outputs = [net(torch.randn(1, 3, 32, 32)) for net in method.predictors.values()]
    assert all(out.shape == (1, CLASSES, 32, 32) for out in outputs)


# What reduces to what.


def test_mkd_without_teachers_and_strong_views_is_cps():
    """Row a of Table 4: alpha 0, sda off, beta b is CPS with weight b on unlabeled pixels, term for term and gradient for gradient."""
    mkd = make("mkd", alpha=0.0, sda=False, beta=1.5)
    cps = make("cps", weight=1.5, on_labeled=False)
    ours, _ = mkd(batch(), 0.3)
    theirs, _ = cps(batch(), 0.3)
    torch.testing.assert_close(ours["sup"], theirs["sup"])
    torch.testing.assert_close(ours["ss"], theirs["cross"])
    for mine, other in ((sum(ours.values()), sum(theirs.values())),):
        for a, b in zip(torch.autograd.grad(mine, [*mkd.parameters()]), torch.autograd.grad(other, [*cps.parameters()]), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name, off",
    [("mean_teacher", {"weight": 0.0}), ("cutmix_seg", {"weight": 0.0}), ("cps", {"weight": 0.0}), ("cps", {"weight": 0.0, "boxes": 3}),
     ("cct", {"weight": 0.0, "bootstrap": 0.0}), ("mkd", {"alpha": 0.0, "beta": 0.0}), ("mkd", {"alpha": 0.0, "beta": 0.0, "fda": 1.5, "sda": False})],
)  # fmt: skip
def test_weight_zero_is_supervised(name, off):
    """After three optimiser steps the (first) student has the weights of the supervised run, exactly."""
    results = []
    for method in (make(name, **off), make("supervised")):
        net = students(method)[0]
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05, momentum=0.9)
        for step in range(3):
            terms, _ = method(batch(step), step / 3)
            loss = torch.stack([*terms.values()]).sum()
            assert all(t == 0 for k, t in terms.items() if k != "sup")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            method.update(step + 1)
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_cutmix_seg_without_boxes_is_mean_teacher():
    """Up to the factor C: CutMix-Seg sums the squared distance over the classes, Mean Teacher averages it."""
    same = {"weight": 2.0, "decay": 0.9, "ema_buffers": "none"}
    mt = make("mean_teacher", **same)
    cutmix = make("cutmix_seg", boxes=0, threshold=0.0, colour=False, **same)
    for method in (mt, cutmix):
        for teacher in teachers(method):
            for p in teacher.parameters():
                p.data.mul_(1.3)  # else student and teacher agree
    a, b = mt(batch(), 0.5)[0], cutmix(batch(), 0.5)[0]
    torch.testing.assert_close(a["sup"], b["sup"])
    torch.testing.assert_close(CLASSES * a["consistency"], b["consistency"])
    assert a["consistency"] > 1e-4


def test_rampup_scales_the_unsupervised_terms_only():
    for name, keys in (("cps", ["cross"]), ("mean_teacher", ["consistency"]), ("mkd", ["st", "ss"])):
        options = {"threshold": SOFT} if name == "mkd" else {}
        losses = []
        for rampup in (0.0, 0.4):
            method = make(name, rampup=rampup, **options)
            torch.manual_seed(3)
            losses.append(method(batch(), 0.1)[0])
        plain, ramped = losses
        torch.testing.assert_close(plain["sup"], ramped["sup"])
        for key in keys:
            torch.testing.assert_close(plain[key] / 16, ramped[key])  # (0.1 / 0.4)^2


def test_weights_are_linear():
    for weights in ({"alpha": 3.0}, {"beta": 3.0}):
        torch.manual_seed(1)
        once = make("mkd", threshold=SOFT, alpha=1.0, beta=1.0)
        thrice = make("mkd", threshold=SOFT, **({"alpha": 1.0, "beta": 1.0} | weights))
        torch.manual_seed(2)
        a = once(batch(), 0.5)[0]
        torch.manual_seed(2)
        b = thrice(batch(), 0.5)[0]
        key = {"alpha": "st", "beta": "ss"}[next(iter(weights))]
        for k in a:
            torch.testing.assert_close((3 if k == key else 1) * a[k], b[k])


# Slow references.


def mixed(tensor: Tensor, mask: Tensor) -> Tensor:
    """M * own + (1 - M) * next, sample by sample."""
    out = []
    for i in range(len(tensor)):
        own, other = tensor[i], tensor[(i + 1) % len(tensor)]
        m = mask[i].to(tensor.dtype)
        out.append((m * own + (1 - m) * other) if tensor.dtype.is_floating_point else torch.where(mask[i], own, other))
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


def one_shot_table(net: nn.Module, seen: list[tuple[Tensor, Tensor]], strength: float, detach: bool = True) -> Tensor:
    """The C x C shifts of Eq. (4) from all (features (N, A), labels (N,)) so far, in float64, entry by entry."""
    features, label = (torch.cat([s[k] for s in seen]) for k in (0, 1))
    w = net.classifier.weight[:, :, 0, 0].double()
    w = w.detach() if detach else w
    table = torch.zeros(len(w), len(w), dtype=torch.float64)
    for c in range(len(w)):
        mine = features[label == c].double()
        sigma = mine.var(0, unbiased=False) if len(mine) else torch.zeros(w.shape[1]).double()
        for j in range(len(w)):
            v = w[j] - w[c]
            table[c, j] = strength / 2 * (v * sigma * v).sum()
    return table


def add_rows(logits: Tensor, label: Tensor, table: Tensor) -> Tensor:
    out = logits.clone()
    for c in range(len(table)):
        out = out + (label == c)[:, None] * table[c].to(out.dtype)[None, :, None, None]
    return out


def rows(features: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    return features.detach().permute(0, 2, 3, 1).reshape(-1, features.shape[1]), label.reshape(-1)


class Reference:
    """MKD written out from methods.md 6.2 and 6.3 for four separate networks: sup, st, ss of one step."""

    def __init__(self, method: Method):
        self.s = [copy.deepcopy(s) for s in method.students]
        self.t = [copy.deepcopy(t.module) for t in method.teachers]
        self.seen: list[list] = [[], [], [], []]

    def supervised(self, b: Batch) -> Tensor:
        return sum(ce(s(b.x), b.y) for s in self.s)

    def paper(
        self, b: Batch, mask: Tensor, *, alpha=1.5, beta=1.0, t_st=0.0, t_ss=0.0, mutual=True, fda=0.0, fda_detach=True, progress=0.0
    ) -> dict[str, Tensor]:
        """Unlabeled pixels inside the image at full resolution; Eq. (2), (3), (4), (7)."""
        size = b.weak.shape[-2:]
        x, v = mixed(b.strong[0], mask), mixed(b.valid, mask)
        z = [s(x) for s in self.s]
        with torch.no_grad():
            t = [mixed(net(b.weak), mask) for net in self.t]

        def target(logits: Tensor, threshold: float) -> Tensor:
            q, y = logits.detach().softmax(1).max(1)
            return torch.where(v & (q >= threshold), y, IGNORE)

        by_teacher, by_student = [target(k, t_st) for k in t], [target(k, t_ss) for k in z]
        from_teacher = by_teacher[::-1] if mutual else by_teacher  # for student 1, for student 2
        terms, self.tables = {"sup": self.supervised(b), "st": 0.0, "ss": 0.0}, []
        for i in (0, 1):
            z_st = z_ss = z[i]
            if fda:
                features = self.s[i].features(x)
                small = features.shape[-2:]
                self.seen[i] += [rows(self.s[i].features(b.x), coarse(b.y, small)), rows(features, coarse(from_teacher[i], small))]
                table = one_shot_table(self.s[i], self.seen[i], fda * (1 - (math.cos(math.pi * progress) + 1) / 2), fda_detach)
                assert table.max() > 1e-3  # else nothing is tested
                self.tables.append(table.detach())
                z_st, z_ss = add_rows(z[i], from_teacher[i], table), add_rows(z[i], by_student[1 - i], table)
            terms["st"] = terms["st"] + alpha * ce(z_st, from_teacher[i])
            terms["ss"] = terms["ss"] + beta * ce(z_ss, by_student[1 - i])
        self.kept = torch.stack([(y != IGNORE).sum() for y in by_teacher]).sum() / (2 * v.sum())
        assert size == z[0].shape[-2:]
        return terms

    def released(self, b: Batch, mask: Tensor, *, alpha=1.5, beta=1.0, fda=1.5, progress=0.0, threshold=0.0) -> dict[str, Tensor]:
        """Labeled and unlabeled pixels on the 1/8 grid, padding included; FDA on all four networks; argmax after FDA."""
        grid = [side // 8 for side in b.weak.shape[-2:]]
        x, m = mixed(b.strong[0], mask), coarse(mask, grid)
        y = coarse(b.y, grid)
        strength = fda * (1 - (math.cos(math.pi * progress) + 1) / 2)
        raw, shifted, self.flipped = [], [], 0
        for k, net in enumerate([*self.s, *self.t]):
            with torch.set_grad_enabled(k < 2):
                f_l, f_u = net.features(b.x), net.features(x if k < 2 else b.weak)
                z_l, z_u = (bilinear(net.classifier(f), grid) for f in (f_l, f_u))
                f_l, f_u = bilinear(f_l, grid), bilinear(f_u, grid)
                if k >= 2:
                    z_u, f_u = mixed(z_u, m), mixed(f_u, m)
            own = z_u.argmax(1)
            self.seen[k] += [rows(f_l, y), rows(f_u, own)]
            table = one_shot_table(net, self.seen[k], strength)
            raw.append(torch.cat([z_l, z_u]))
            shifted.append(torch.cat([add_rows(z_l, y, table), add_rows(z_u, own, table)]))
            self.flipped += int((raw[-1].argmax(1) != shifted[-1].argmax(1)).sum())
        targets = [z.argmax(1) for z in shifted]
        for k in (2, 3):
            if threshold:
                targets[k] = torch.where(raw[k].softmax(1).amax(1) >= threshold, targets[k], IGNORE)
        z1, z2 = shifted[:2]
        return {
            "sup": self.supervised(b),
            "st": alpha * (ce(z1, targets[3]) + ce(z2, targets[2])),
            "ss": beta * (ce(z1, targets[1]) + ce(z2, targets[0])),
        }


def fixed_mask(monkeypatch: pytest.MonkeyPatch, n: int = 3, size: int = 32, seed: int = 0) -> Tensor:
    """Blocks of 8 pixels drawn once; every CutMix gets this mask."""
    blocks = torch.rand(n, size // 8, size // 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    mask = mask.roll((3, 5), (1, 2))  # its edges lie on no grid
    for module in ("mkd", "cps", "cutmix_seg"):
        monkeypatch.setattr(f"mkd_core.methods.{module}.xor_boxes", lambda *args, **kwargs: mask)
    return mask


def sharpen(method: Method, seed: int = 7, factor: float = 4.0) -> Method:
    """Larger classifiers, and teachers that differ from their students: thresholds select a part, FDA matters."""
    g = torch.Generator().manual_seed(seed)
    for net in [*method.students, *(t.module for t in method.teachers)]:
        net.classifier.weight.data.mul_(factor)
    for teacher in method.teachers:
        for p in teacher.parameters():
            p.data.add_(0.1 * p.data.abs().mean() * torch.randn(p.shape, generator=g))
    return method


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor], method: Method, other: Reference) -> None:
    """Terms and the gradient of their sum."""
    for key in ("sup", "st", "ss"):
        torch.testing.assert_close(ours[key], reference[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    for mine, theirs in zip(method.students, other.s, strict=True):
        a = torch.autograd.grad(sum(ours.values()), [*mine.parameters()], retain_graph=True)
        b = torch.autograd.grad(sum(reference.values()), [*theirs.parameters()], retain_graph=True)
        norm = torch.stack([g.square().sum() for g in b]).sum().sqrt()
        difference = torch.stack([(g - h).square().sum() for g, h in zip(a, b, strict=True)]).sum().sqrt()
        assert difference < 1e-3 * norm


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0.0},
        {"threshold": 0.6},
        {"threshold": 0.6, "select": "ss"},
        {"threshold": 0.6, "select": "both"},
        {"threshold": 0.6, "mutual": False},
        {"threshold": 0.6, "fda": 1.5},
        {"threshold": 0.6, "fda": 1.5, "fda_detach": False},
        {"threshold": 0.0, "fda": 1.5, "mutual": False, "alpha": 0.7, "beta": 0.4},
        {"threshold": 0.6, "fda": 1.5, "arch2": "pspnet"},
    ],
    ids=str,
)
def test_mkd_paper_recipe_is_the_reference(options, monkeypatch):
    method, mask = sharpen(make("mkd", **options)), fixed_mask(monkeypatch)
    reference = Reference(method)
    select = options.get("select", "st")
    arguments = {k: v for k, v in options.items() if k in ("alpha", "beta", "mutual", "fda", "fda_detach")}
    arguments |= {"t_st": options["threshold"] if select != "ss" else 0.0, "t_ss": options["threshold"] if select != "st" else 0.0}
    for step in range(2):  # the second one meets moments that are not empty
        ours, stats = method(batch(step), 0.3 + step / 3)
        theirs = reference.paper(batch(step), mask, progress=0.3 + step / 3, **arguments)
        compare(ours, theirs, method, reference)
        torch.testing.assert_close(stats["kept"], reference.kept)
        assert ("shift" in stats) == bool(reference.tables)
        if reference.tables:
            torch.testing.assert_close(stats["shift"].double(), torch.stack(reference.tables).mean(), rtol=1e-4, atol=1e-6)
        assert (0.05 < stats["kept"] < 0.95) or arguments["t_st"] == 0


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_mkd_released_recipe_is_the_reference(threshold, monkeypatch):
    options = CASES["mkd released"][1] | {"threshold": threshold}
    method, mask = sharpen(make("mkd", **options), factor=6.0), fixed_mask(monkeypatch, n=4, size=64)
    reference = Reference(method)
    flipped = 0
    for step in range(2):
        b = batch(step, n=4, size=64)
        ours, _ = method(b, 0.5 + step / 3)
        theirs = reference.released(b, mask, progress=0.5 + step / 3, threshold=threshold)
        for k, moments in enumerate(method.moments):
            torch.testing.assert_close(
                moments.table(torch.eye(CLASSES, moments.mean.shape[1]), 1.0).double(),
                eye_table(reference.seen[k], moments.mean.shape[1]), rtol=1e-3, atol=1e-5, msg=lambda m, k=k: f"moments of network {k}: {m}",
            )  # fmt: skip
        compare(ours, theirs, method, reference)
        flipped += reference.flipped
    assert flipped > 0  # FDA raised a competitor above an argmax: before or after it is not the same


def eye_table(seen: list, channels: int) -> Tensor:
    net = nn.Module()
    net.classifier = nn.Conv2d(channels, CLASSES, 1)
    net.classifier.weight.data.copy_(torch.eye(CLASSES, channels)[:, :, None, None])
    return one_shot_table(net, seen, 1.0)


def test_the_strength_of_fda_grows_as_asked_for():
    """Every ramp at a moment is the constant one of that moment's strength."""

    def terms(progress: float, **options: Any) -> list[float]:
        method = sharpen(make("mkd", threshold=0.0, **options))
        torch.manual_seed(7)
        return [term.item() for term in method(batch(), progress)[0].values()]

    for progress in (0.05, 0.3, 0.9):
        for name, share in (("linear", progress), ("cosine", (1 - math.cos(math.pi * progress)) / 2), ("constant", 1.0)):
            assert terms(progress, fda=2.0, fda_ramp=name) == pytest.approx(terms(0.1, fda=2.0 * share, fda_ramp="constant")), name
    assert terms(0.3, fda=2.0, fda_ramp="linear") != pytest.approx(terms(0.3, fda=2.0))


def test_the_law_draws_the_mask_of_images_and_labels(monkeypatch):
    """Under one mask all laws are one method; each asks for its own."""
    mask = augment.xor_boxes(3, (32, 32))
    drawn: list[str] = []
    for name in ("xor_boxes", "half_box", "ratio_box", "beta_box"):
        monkeypatch.setattr(f"mkd_core.methods.mkd.{name}", lambda *args, name=name, **kwargs: drawn.append(name) or mask)
    found = [
        [t.item() for t in sharpen(make("mkd", threshold=0.0, law=law))(batch(), 0.5)[0].values()]
        for law in ("xor", "half", "ratio", "beta")
    ]
    assert drawn == ["xor_boxes", "half_box", "ratio_box", "beta_box"] and found[0] == found[1] == found[2] == found[3]
    with pytest.raises(ValueError, match="boxes belongs to law='xor'"):
        make("mkd", law="half", boxes=1)


def test_denominator_valid_counts_the_pixels_inside_the_image(monkeypatch):
    mask = fixed_mask(monkeypatch)
    selected, valid = (sharpen(make("mkd", threshold=0.6, denominator=d)) for d in ("selected", "valid"))
    reference = Reference(selected)
    b = batch()
    a, c = selected(b, 0.5)[0], valid(b, 0.5)[0]
    v = mixed(b.valid, mask)
    z = [s(mixed(b.strong[0], mask)) for s in reference.s]
    q = [mixed(t(b.weak), mask).softmax(1).max(1) for t in reference.t]
    targets = [torch.where(v & (p >= 0.6), y, IGNORE) for p, y in q]
    torch.testing.assert_close(c["st"], 1.5 * (ce(z[0], targets[1], v.sum()) + ce(z[1], targets[0], v.sum())), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(a["ss"], c["ss"])
    assert c["st"] < a["st"]


def test_mkd_without_strong_augmentation_mixes_nothing(monkeypatch):
    monkeypatch.setattr("mkd_core.methods.mkd.xor_boxes", lambda *a, **k: pytest.fail("sda is off"))
    method = sharpen(make("mkd", sda=False, threshold=0.0))
    reference = Reference(method)
    b = batch()
    everywhere = torch.ones_like(b.valid)
    theirs = reference.paper(Batch(b.x, b.y, b.weak, (b.weak,), b.valid, b.label), everywhere)
    compare(method(b, 0.2)[0], theirs, method, reference)


def test_teachers_predict_in_the_mode_that_was_asked_for(monkeypatch):
    mask = fixed_mask(monkeypatch)
    for mode in ("train", "eval"):
        method = sharpen(make("mkd", threshold=0.0, teacher_mode=mode))
        for net in [*method.students, *(t.module for t in method.teachers)]:
            for m in net.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.running_mean.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
        reference = Reference(method)
        for t in reference.t:
            t.train(mode == "train")
        compare(method(batch(), 0.2)[0], reference.paper(batch(), mask), method, reference)


def test_padding_carries_no_pseudo_label(monkeypatch):
    """What lies under the padding changes nothing, in methods whose networks see pixels one by one."""
    fixed_mask(monkeypatch)

    class Pointwise(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Conv2d(3, 6, 1)
            self.classifier = nn.Conv2d(6, CLASSES, 1)

        def features(self, x: Tensor) -> Tensor:
            return self.encoder(x).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x))

    b = batch()
    noise = torch.randn(b.weak.shape) * (~b.valid)[:, None]
    other = Batch(b.x, b.y, b.weak + noise, (b.strong[0] - 2 * noise,), b.valid, b.label)
    assert (noise != 0).any()
    for name, options in (("mkd", {"threshold": 0.0, "fda": 1.0}), ("mkd", {"threshold": 0.26}), ("cps", {}), ("cps", {"boxes": 3}),
                          ("mean_teacher", {}), ("cutmix_seg", {"threshold": 0.26})):  # fmt: skip
        losses = []
        for view in (b, other):
            torch.manual_seed(0)
            method = METHODS[name](lambda **_: Pointwise(), **options)
            losses.append(method(view, 0.5)[0])
        for key in losses[0]:
            torch.testing.assert_close(losses[0][key], losses[1][key], msg=lambda m, n=name, k=key: f"{n} {k}: {m}")
    counted = METHODS["mkd"](lambda **_: Pointwise(), threshold=0.0, ignore_padding=False)
    assert counted(b, 0.5)[0]["ss"] != counted(other, 0.5)[0]["ss"]  # and with ignore_padding off it does


def test_cps_is_the_reference(monkeypatch):
    """methods.md 5.1: labeled and unlabeled pixels in one mean; released: padding counts."""
    for ignore in (True, False):
        method = make("cps", weight=6.0, ignore_padding=ignore)
        f = [copy.deepcopy(s) for s in method.students]
        b = batch()
        z = [torch.cat([net(b.x), net(b.weak)]) for net in f]
        inside = torch.cat([b.y != IGNORE, b.valid]) if ignore else torch.ones(6, 32, 32, dtype=torch.bool)
        y = [torch.where(inside, k.argmax(1), IGNORE) for k in z]
        ours = method(b, 0.5)[0]
        torch.testing.assert_close(ours["cross"], 6.0 * (ce(z[0], y[1]) + ce(z[1], y[0])), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["sup"], ce(z[0][:3], b.y) + ce(z[1][:3], b.y), rtol=1e-5, atol=1e-6)


def test_cps_with_cutmix_is_the_reference(monkeypatch):
    """methods.md 5.2: logits of the clean images mixed, then argmax; unlabeled pixels only."""
    mask = fixed_mask(monkeypatch)
    method = make("cps", weight=1.0, boxes=3)
    f = [copy.deepcopy(s) for s in method.students]
    b = batch()
    v = mixed(b.valid, mask)
    y = [torch.where(v, mixed(net(b.weak), mask).argmax(1), IGNORE) for net in f]
    z = [net(mixed(b.weak, mask)) for net in f]
    torch.testing.assert_close(method(b, 0.5)[0]["cross"], ce(z[0], y[1]) + ce(z[1], y[0]), rtol=1e-5, atol=1e-6)


def test_mean_teacher_is_the_reference():
    method = make("mean_teacher")
    for p in method.teacher.parameters():
        p.data.mul_(1.2)
    s, t = copy.deepcopy(method.net), copy.deepcopy(method.teacher.module)
    b = batch(padded=False)
    expected = 100 * F.mse_loss(s(b.weak).softmax(1), t(b.weak).softmax(1))  # 100, mean over pixels and classes
    torch.testing.assert_close(method(b, 0.5)[0]["consistency"], expected, rtol=1e-5, atol=1e-6)


def test_cutmix_seg_is_the_reference(monkeypatch):
    """methods.md 4: VAR_p between the student's view of the mix and the mix of the teacher's logits, times the share of confident pixels."""
    mask = fixed_mask(monkeypatch)
    method = make("cutmix_seg", threshold=0.35, weight=3.0)
    for p in method.teacher.parameters():
        p.data.mul_(1.2)
    s, t = copy.deepcopy(method.net), copy.deepcopy(method.teacher.module)
    b = batch(padded=False)
    target = mixed(t(b.weak), mask).softmax(1)
    conf = (target.amax(1) >= 0.35).float().mean()
    assert 0.05 < conf < 0.95
    expected = 3.0 * conf * (s(mixed(b.strong[0], mask)).softmax(1) - target).square().sum(1).mean()
    torch.testing.assert_close(method(b, 0.5)[0]["consistency"], expected, rtol=1e-5, atol=1e-6)


def test_joint_forward_shares_batch_statistics():
    for name in ("cps", "mean_teacher", "cutmix_seg"):
        torch.manual_seed(0)
        separate, joint = make(name), make(name, joint=True)
        assert separate(batch(), 0.5)[0]["sup"] != joint(batch(), 0.5)[0]["sup"]
    joint = make("mean_teacher", joint=True)
    net = copy.deepcopy(joint.net)
    b = batch()
    torch.testing.assert_close(joint(b, 0.5)[0]["sup"], ce(net(torch.cat([b.x, b.weak]))[:3], b.y), rtol=1e-5, atol=1e-6)


def test_nothing_selected_is_zero_not_nan():
    method = make("mkd", threshold=0.999999)
    terms, stats = method(batch(), 0.5)
    assert terms["st"] == 0 and terms["ss"] > 0 and stats["kept"] == 0
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


def test_contradictions_and_small_batches():
    with pytest.raises(ValueError, match="fda_label"):
        make("mkd", fda_on_teacher=True)
    assert make("mkd").min_batch == 2 and make("mkd", sda=False).min_batch == 1 and make("mkd", boxes=0).min_batch == 1
    assert make("cps").min_batch == 1 and make("cps", boxes=3).min_batch == 2


def test_heterogeneous_branches():
    method = make("mkd", arch2="pspnet", threshold=SOFT)
    assert [s.stride for s in method.students] == [16, 8] == [t.module.stride for t in method.teachers]
    assert type(method.students[0].decoder) is not type(method.students[1].decoder)


@pytest.mark.parametrize("name", CASES)
def test_saved_and_loaded_state_continues_alike(name):
    """State is submodules and buffers: a fresh method with the loaded state gives the same next terms."""
    torch.manual_seed(0)
    method = make(CASES[name][0], **CASES[name][1])
    method(batch(0), 0.2)
    method.update(1)
    other = make(CASES[name][0], seed=9, **CASES[name][1])
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    results = []
    for m in (method, other):
        torch.manual_seed(4)
        results.append(m(batch(1), 0.6)[0])
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key


def test_build_is_called_once_per_student():
    calls = []

    def counted(**options):
        calls.append(options)
        return build(**options)

    METHODS["mkd"](counted, arch2="pspnet")
    assert calls == [{}, {"arch": "pspnet"}]
