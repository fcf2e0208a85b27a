"""MKD and its ablations: equal at the defaults, the paper's tables as options, slow references."""

import copy
import inspect
import math

import pytest
import torch
from slow import IGNORE, bilinear, blocks, ce, close, coarse, fix, mixed, sharp
from test_methods import RELEASED
from tiny import CLASSES, batch, config, make
from torch import Tensor

from mkd_core import augment
from mkd_core.config import RunConfig
from mkd_core.methods import METHODS, Batch, Method
from mkd_core.train import build_method


def trained(name: str, options: dict, steps: int = 4) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Terms of each step of SGD and the state after the last one: weights, teachers, moments."""
    method, found = make(name, **options), []
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(step)
        terms, stats = method(batch(step), step / steps)
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimizer.step()
        method.update(step + 1)
        found.append({k: t.detach() for k, t in terms.items()} | {"kept": stats["kept"]})
    return found, method.state_dict()


@pytest.mark.parametrize("options", [
    {"threshold": 0.3}, {"threshold": 0.3, "fda": 1.5}, {"threshold": 0.0, "boxes": 0, "ema_buffers": "all"},
    {"alpha": 0.7, "beta": 0.4, "rampup": 0.5, "decay": 0.6, "boxes": 1, "fda": 0.5}], ids=str)  # fmt: skip
def test_mkd_ablation_at_its_defaults_is_mkd_bit_for_bit(options):
    (ours, mine), (theirs, other) = trained("mkd", options), trained("mkd_ablation", options)
    assert all(list(a) == list(b) for a, b in zip(ours, theirs, strict=True)) and mine.keys() == other.keys()
    assert all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert any("moments" in key for key in mine) == ("fda" in options)


def test_mkd_has_eight_options_and_mkd_ablation_the_same_with_the_same_defaults():
    few, many = (inspect.signature(METHODS[name]).parameters for name in ("mkd", "mkd_ablation"))
    assert len(few) == 1 + 8 and all(many[name].default == few[name].default for name in few)
    for name in ("mkd", "mkd_ablation"):
        assert make(name).min_batch == 2 and make(name, boxes=0).min_batch == 1


OFF = {"boxes": 0}  # with strong="none": everybody sees the weak view
PAPER = {  # row -> ticks besides co-training (mutual MT, SDA, KS on L_st or L_ss, FDA), and options
    "Table 4, co-training": ("", {"alpha": 0.0, "threshold": 0.0} | OFF),
    "Table 4, + MT": ("MT", {"threshold": 0.0} | OFF),
    "Table 4, + MT + FDA": ("MT FDA", {"threshold": 0.0, "fda": 1.5} | OFF),
    "Table 4, + SDA": ("SDA", {"alpha": 0.0, "threshold": 0.0}),
    "Table 4, + MT + SDA": ("MT SDA", {"threshold": 0.0}),
    "Table 4, + MT + SDA + KS; Table 5, L_st; Table 6, SN": ("MT SDA KS", {}),
    "Table 5, L_ss": ("MT SDA KS_ss", {"threshold": 0.0, "threshold_ss": 0.95}),
    "Table 5, both": ("MT SDA KS KS_ss", {"threshold_ss": 0.95}),
    "Table 6, HN": ("MT SDA KS HN", {}),
}


@pytest.mark.parametrize("row", PAPER)
def test_every_row_of_the_papers_ablations_is_a_configuration(row):
    ticks, options = PAPER[row]
    keys = {"strong": "none"} if options.get("boxes") == 0 else {}
    keys |= {"arch2": "pspnet", "encoder": "mobilenet_v2"} if "HN" in ticks else {}
    c = config("mkd_ablation", options=options, **keys)
    method = build_method(c, CLASSES)
    first, second = method.students
    found = {
        "MT": bool(method.teachers), "SDA": c.strong != "none" and method.boxes > 0,
        "KS": method.threshold == 0.95, "KS_ss": method.threshold_ss == 0.95, "FDA": bool(method.moments),
        "HN": type(first.decoder) is not type(second.decoder)}  # fmt: skip
    assert {name for name, there in found.items() if there} == set(ticks.split())
    for student, teacher in zip(method.students, method.teachers, strict=False):
        assert type(student.decoder) is type(teacher.module.decoder)
    few = {k: v for k, v in options.items() if k in inspect.signature(METHODS["mkd"]).parameters}
    if few == options and few.get("alpha", 1):  # then the clean class has the row too
        assert RunConfig(**c.model_dump() | {"method": "mkd", "options": options}).method == "mkd"


@pytest.mark.parametrize("options, message", [
    ({"fda_ramp": "linear"}, "fda above 0"), ({"fda_detach": False}, "fda above 0"),
    ({"fda_own": True}, "fda above 0"),
    ({"law": "half", "boxes": 1}, "law='xor'")])  # fmt: skip
def test_options_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make("mkd_ablation", **options)


def test_co_training_without_strong_views_is_cps():
    """Row 1 of Table 4: CPS with weight beta on unlabeled pixels, term for term and gradient for gradient."""
    mkd, cps = make("mkd_ablation", alpha=0.0, boxes=0, beta=1.5), make("cps", weight=1.5, on_labeled=False)
    b = batch()
    ours, theirs = mkd(weakly(b), 0.3)[0], cps(b, 0.3)[0]
    torch.testing.assert_close(ours["sup"], theirs["sup"])
    torch.testing.assert_close(ours["ss"], theirs["cross"])
    a, c = (torch.autograd.grad(sum(t.values()), [*m.parameters()]) for t, m in ((ours, mkd), (theirs, cps)))
    for mine, other in zip(a, c, strict=True):
        torch.testing.assert_close(mine, other)


def weakly(b: Batch) -> Batch:
    """What the run's strong="none" gives."""
    return Batch(b.x, b.y, b.weak, (b.weak,), b.valid, b.label)


def one_shot_table(weight: Tensor, seen: list[tuple[Tensor, Tensor]], strength: float) -> Tensor:
    """The C x C shifts of Eq. (4) from all (features (N, A), labels (N,)) so far, float64, entry by entry."""
    features, label = (torch.cat([s[k] for s in seen]) for k in (0, 1))
    w = weight.double()
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
    """MKD written out from the specification for four separate networks: sup, st, ss of one step."""

    def __init__(self, method: Method):
        self.s = [copy.deepcopy(s) for s in method.students]
        self.t = [copy.deepcopy(t.module) for t in method.teachers]
        self.seen: list[list] = [[], [], [], []]

    def paper(self, b: Batch, mask: Tensor, *, alpha=1.5, beta=1.0, threshold=0.0, threshold_ss=0.0,
              mutual=True, fda=0.0, fda_detach=True, progress=0.0, denominator="selected") -> dict[str, Tensor]:  # fmt: skip
        """Unlabeled pixels inside the image at full resolution; Eq. (2), (3), (4), (7)."""
        x, v = mixed(b.strong[0], mask), mixed(b.valid, mask)
        count = v.sum() if denominator == "valid" else None
        z = [s(x) for s in self.s]
        with torch.no_grad():
            t = [mixed(net(b.weak), mask) for net in self.t]

        def target(logits: Tensor, least: float) -> Tensor:
            q, y = logits.detach().softmax(1).max(1)
            return torch.where(v & (q >= least), y, IGNORE)

        by_teacher, by_student = [target(k, threshold) for k in t], [target(k, threshold_ss) for k in z]
        from_teacher = by_teacher[::-1] if mutual else by_teacher  # for student 1, for student 2
        terms, self.tables = {"sup": sum(ce(s(b.x), b.y) for s in self.s), "st": 0.0, "ss": 0.0}, []
        for i in (0, 1):
            z_st = z_ss = z[i]
            if fda:
                features, w = self.s[i].features(x), self.s[i].classifier.weight[:, :, 0, 0]
                small = features.shape[-2:]
                self.seen[i] += [rows(self.s[i].features(b.x), coarse(b.y, small))]
                self.seen[i] += [rows(features, coarse(from_teacher[i], small))]
                strength = fda * (1 - (math.cos(math.pi * progress) + 1) / 2)
                table = one_shot_table(w.detach() if fda_detach else w, self.seen[i], strength)
                assert table.max() > 1e-3  # else nothing is tested
                self.tables.append(table.detach())
                z_st, z_ss = add_rows(z[i], from_teacher[i], table), add_rows(z[i], by_student[1 - i], table)
            terms["st"] = terms["st"] + alpha * ce(z_st, from_teacher[i], count)
            terms["ss"] = terms["ss"] + beta * ce(z_ss, by_student[1 - i], count)
        self.kept = torch.stack([(y != IGNORE).sum() for y in by_teacher]).sum() / (2 * v.sum())
        return terms

    def released(self, b: Batch, mask: Tensor, *, progress: float, threshold: float) -> dict[str, Tensor]:
        """Labeled and unlabeled pixels on the 1/8 grid, padding too, mixed before; FDA on all four, labeled pixels first; argmax after."""
        grid = [side // 8 for side in b.weak.shape[-2:]]
        x, y = mixed(b.strong[0], mask), coarse(b.y, grid)
        strength = 1.5 * (1 - (math.cos(math.pi * progress) + 1) / 2)
        raw, shifted = [], []
        for k, net in enumerate([*self.s, *self.t]):
            with torch.set_grad_enabled(k < 2):
                f_l, f_u = net.features(b.x), net.features(x if k < 2 else b.weak)
                z_l, z_u = net.classifier(f_l), net.classifier(f_u)
                if k >= 2:
                    m = coarse(mask, f_u.shape[-2:])
                    z_u, f_u = mixed(z_u, m), mixed(f_u, m)
                f_l, f_u, z_l, z_u = (bilinear(maps, grid) for maps in (f_l, f_u, z_l, z_u))
            own, both = z_u.argmax(1), []
            for features, logits, label in ((f_l, z_l, y), (f_u, z_u, own)):
                self.seen[k] += [rows(features, label)]
                table = one_shot_table(net.classifier.weight.detach()[:, :, 0, 0], self.seen[k], strength)
                both.append(add_rows(logits, label, table))
            raw.append(torch.cat([z_l, z_u]))
            shifted.append(torch.cat(both))
        self.flipped = sum(int((a.argmax(1) != b.argmax(1)).sum()) for a, b in zip(raw, shifted, strict=True))
        targets = [z.argmax(1) for z in shifted]
        for k in (2, 3):
            targets[k] = torch.where(raw[k].softmax(1).amax(1) >= threshold, targets[k], IGNORE)
        z1, z2 = shifted[:2]
        return {
            "sup": sum(ce(s(b.x), b.y) for s in self.s),
            "st": 1.5 * (ce(z1, targets[3]) + ce(z2, targets[2])),
            "ss": ce(z1, targets[1]) + ce(z2, targets[0]),
        }


def compare(ours: dict[str, Tensor], reference: dict[str, Tensor], method: Method, other: Reference) -> None:
    """Terms and the gradient of their sum."""
    for key in ("sup", "st", "ss"):
        close(ours[key], reference[key], msg=lambda m, k=key: f"{k}: {m}")
    for mine, theirs in zip(method.students, other.s, strict=True):
        a = torch.autograd.grad(sum(ours.values()), [*mine.parameters()], retain_graph=True)
        b = torch.autograd.grad(sum(reference.values()), [*theirs.parameters()], retain_graph=True)
        norm = torch.stack([g.square().sum() for g in b]).sum().sqrt()
        difference = torch.stack([(g - h).square().sum() for g, h in zip(a, b, strict=True)]).sum().sqrt()
        assert difference < 1e-3 * norm


@pytest.mark.parametrize("name, options", [
    ("mkd", {"threshold": 0.0}), ("mkd", {"threshold": 0.6}), ("mkd", {"threshold": 0.6, "fda": 1.5}),
    ("mkd_ablation", {"threshold": 0.0, "threshold_ss": 0.6}),
    ("mkd_ablation", {"threshold": 0.6, "threshold_ss": 0.6}),
    ("mkd_ablation", {"threshold": 0.6, "mutual": False}),
    ("mkd_ablation", {"threshold": 0.6, "threshold_ss": 0.6, "denominator": "valid"}),
    ("mkd", {"threshold": 0.0, "boxes": 0}), ("mkd_ablation", {"threshold": 0.6, "boxes": 0}),
    ("mkd_ablation", {"threshold": 0.6, "fda": 1.5, "fda_detach": False}),
    ("mkd_ablation", {"threshold": 0.0, "fda": 1.5, "mutual": False, "alpha": 0.7, "beta": 0.4}),
    ("mkd_ablation", {"threshold": 0.6, "fda": 1.5, "arch2": "pspnet"})], ids=str)  # fmt: skip
def test_the_paper_s_losses_are_the_reference(name, options, monkeypatch):
    method, whole = sharp(name, **options), options.get("boxes") == 0
    mask = torch.ones(3, 32, 32) > 0 if whole else fix(monkeypatch, f"{name}.xor_boxes")
    reference = Reference(method)
    arguments = {k: v for k, v in options.items() if k not in ("arch2", "boxes")}
    for step in range(2):  # the second one meets moments that are not empty
        progress = 0.3 + step / 3
        ours, stats = method(batch(step), progress)
        compare(ours, reference.paper(batch(step), mask, progress=progress, **arguments), method, reference)
        torch.testing.assert_close(stats["kept"], reference.kept)
        assert 0.05 < stats["kept"] < 0.95 or not options["threshold"]
        if "shift" in stats:
            shift = torch.stack(reference.tables).mean()
            close(stats["shift"].double(), shift)


@pytest.mark.parametrize("threshold", [0.0, 0.6])
def test_the_released_losses_are_the_reference(threshold, monkeypatch):
    method = sharp("mkd_ablation", 6.0, **RELEASED | {"threshold": threshold})
    mask, flipped, reference = blocks(4, 64), 0, Reference(method)
    fix(monkeypatch, "mkd_ablation.xor_boxes", mask)
    for step in range(2):
        b, progress = batch(step, n=4, size=64), 0.5 + step / 3
        ours, _ = method(b, progress)
        theirs = reference.released(b, mask, progress=progress, threshold=threshold)
        for moments, seen in zip(method.moments, reference.seen, strict=True):
            eye = torch.eye(CLASSES, moments.mean.shape[1])
            expected = one_shot_table(eye, seen, 1.0)
            torch.testing.assert_close(moments.table(eye, 1.0).double(), expected, rtol=1e-3, atol=1e-5)
        compare(ours, theirs, method, reference)
        flipped += reference.flipped
    assert flipped > 0  # FDA raised a competitor above an argmax: before or after it is not the same


def test_the_strength_of_fda_grows_as_asked_for():
    """Every ramp at a moment is the constant one of that moment's strength."""

    def terms(progress: float, **options) -> list[float]:
        method = sharp("mkd_ablation", threshold=0.0, **options)
        torch.manual_seed(7)
        return [term.item() for term in method(batch(), progress)[0].values()]

    shares = {"linear": 0.3, "cosine": (1 - math.cos(math.pi * 0.3)) / 2, "constant": 1.0}
    for name, share in shares.items():
        constant = terms(0.1, fda=2.0 * share, fda_ramp="constant")
        assert terms(0.3, fda=2.0, fda_ramp=name) == pytest.approx(constant), name
    assert terms(0.3, fda=2.0, fda_ramp="linear") != pytest.approx(terms(0.3, fda=2.0))


def test_the_law_draws_the_mask_of_images_and_labels(monkeypatch):
    """Under one mask all laws are one method; each asks for its own."""
    mask = augment.xor_boxes(3, (32, 32))
    drawn: list[str] = []
    for name in ("xor_boxes", "half_box", "ratio_box", "beta_box"):
        law = lambda *a, name=name, **k: drawn.append(name) or mask  # noqa: E731
        monkeypatch.setattr(f"mkd_core.methods.mkd_ablation.{name}", law)
    laws = ("xor", "half", "ratio", "beta")
    methods = [sharp("mkd_ablation", threshold=0.0, law=law) for law in laws]
    found = [[t.item() for t in method(batch(), 0.5)[0].values()] for method in methods]
    assert drawn == ["xor_boxes", "half_box", "ratio_box", "beta_box"]
    assert found[0] == found[1] == found[2] == found[3]
