"""What every method keeps: who gets a gradient, what reduces to what, that state is saved and no step waits.

A method is in every test with `every_case` at its defaults as soon as it is in METHODS.
"""

import copy
from dataclasses import replace

import pytest
import torch
from memory import pretended
from oracle import METHODS_OF, labels
from released import SWITCHES as RELEASED
from slow import IGNORE, ce, close, fix, mixed, sharp
from tiny import CLASSES, Pointwise, batch, build, gradients, make
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from mkd_core.augment.colour import blur, colour_jitter, equalize, greyscale, solarize
from mkd_core.augment.weak import constant
from mkd_core.ema import EMA
from mkd_core.losses import confidence, pseudo_label
from mkd_core.methods import METHODS, Batch, Method
from mkd_core.models import SegNet, checkpoint_activations

SOFT = 0.3  # a threshold that networks at their random start reach on some pixels

# Options under which small networks at their random start show all terms of a method at work.
SELECTING = ("cutmix_seg", "mkd", "mkd_ablation", "fixmatch", "unimatch", "unimatch_v2", "vat")
AT_WORK: dict[str, dict] = {name: {"threshold": SOFT} for name in SELECTING} | {
    "advsemseg": {"threshold": SOFT, "start": 0.5, "width": 16}, "gct": {"width": 16},
    "u2pl": {"dim": 16, "bank": 200}, "pc2seg": {"dim": 16}, "speed": {"threshold": SOFT, "grid": 4},
    "ps_mt": {"threshold": SOFT, "top": 2}}  # fmt: skip
# A method's name and what is special.
VARIANTS: dict[str, dict] = {
    "mean_teacher eval": {"teacher_mode": "eval", "ema_buffers": "all"},
    "cutmix_seg no boxes": {"threshold": 0.0, "boxes": 0, "colour": False},
    "cps joint": {"joint": True, "on_labeled": False}, "cps cutmix": {"boxes": 3, "weight": 1.0},
    "mkd fda": {"threshold": SOFT, "fda": 1.5},
    "mkd no selection": {"threshold": 0.0, "boxes": 0, "ema_buffers": "all"},
    "mkd_ablation a": {"alpha": 0.0, "boxes": 0, "threshold": 0.0},
    "mkd_ablation alone": {"threshold": SOFT, "beta": 0.0, "fda": 1.5},
    "mkd_ablation d own": {"alpha": 0.0, "threshold": 0.0, "fda": 1.5, "fda_own": True},
    "mkd_ablation naive": {"threshold": SOFT, "mutual": False},
    "mkd_ablation both": {"threshold": SOFT, "threshold_ss": SOFT, "denominator": "valid"},
    "mkd_ablation labeled": {"threshold": SOFT, "on_labeled": True, "stride": 4},
    "mkd_ablation eval": {"threshold": 0.0, "teacher_mode": "eval", "ema_buffers": "all", "joint": True},
    "mkd_ablation beta": {"threshold": SOFT, "law": "beta", "fda": 1.0, "fda_ramp": "linear"},
    "mkd_ablation pspnet": {"threshold": SOFT, "arch2": "pspnet", "fda": 1.0, "fda_detach": False},
    "mkd_ablation released": RELEASED,
    "u2pl separate": {"dim": 16, "bank": 200, "joint": False, "cutmix": 1.0, "contrast": 0.1},
    "fixmatch separate": {"threshold": SOFT, "joint": False, "cutmix": 0.0},
    "fixmatch teacher": {"threshold": SOFT, "decay": 0.996},
    "unimatch_v2 whole": {"threshold": SOFT, "drop": 0.0, "cutmix": 0.0},
    "unimatch one": {"threshold": SOFT, "streams": 1, "feature": 0.0},
    "vat radius 0": {"threshold": 0.0, "radius": 0.0},
    "ps_mt plain": {"threshold": 0.0, "vat": 0.0, "cutmix": False},
    "st_plus_plus plain": {"selection": False, "cutout": 0.0, "joint": False},
    "cct joint": {"copies": 1, "bootstrap": 0.0, "joint": True}, "pseudoseg all": {"background": False},
    "simple_baseline one norm": {"dsbn": False}}  # fmt: skip
CASES = {name: (name, AT_WORK.get(name, {})) for name in METHODS}
CASES |= {name: (name.split()[0], options) for name, options in VARIANTS.items()}
every_case = pytest.mark.parametrize("name", CASES)

# Parts of the network that a term leaves alone by definition.
UNREACHED = {
    ("cct", "consistency"): {"classifier"}, ("u2pl", "contrast"): {"classifier"},
    ("pc2seg", "contrast"): {"classifier"}, ("pseudoseg", "image"): {"decoder", "classifier"},
    ("pseudoseg", "attention"): {"encoder", "decoder", "classifier"}}  # fmt: skip


def case(name: str, seed: int = 0) -> Method:
    return make(CASES[name][0], seed, **CASES[name][1])


def students(method: Method) -> list[nn.Module]:
    return list(method.students) if hasattr(method, "students") else [method.net]


def teachers(method: Method) -> list[EMA]:
    found = [(n, m) for n, m in method.named_modules() if isinstance(m, EMA) and isinstance(m.module, SegNet)]
    return [m for n, m in found if "checkpoints" not in n]


@every_case
def test_every_term_reaches_every_student_and_no_teacher(name):
    method = case(name)
    for teacher in teachers(method):
        teacher.requires_grad_(True)  # even a teacher that could learn must not
        for p in teacher.parameters():
            # an exact copy that sees the same image agrees, and nothing is to be learnt from it
            p.data.mul_(1.2)
    judge = [method.critic[0]] if method.critic else []
    for module in judge:
        list(module.modules())[-1].weight.data.mul_(20)  # one that has an opinion
    given = batch(size=64 if judge else 32)
    given = replace(given, strong=given.strong[: method.views])  # as many as the loop makes for it
    terms, stats = method(given, 0.7)
    assert all(t.ndim == 0 and t.isfinite() for t in terms.values())
    assert not any(s.requires_grad for s in stats.values()) and all(s.isfinite() for s in stats.values())
    weights = {"st": "alpha", "ss": "beta", "feature": "feature"}
    stated = {term for term in method.terms if CASES[name][1].get(weights.get(term)) != 0}
    assert set(terms) == stated, "returned, and stated as `terms`"
    for key, term in terms.items():
        assert term > 0, f"{key} is zero: do untrained networks need other options (AT_WORK, SELECTING)?"
        for number, student in enumerate(students(method), 1):
            for part in ("encoder", "decoder", "classifier"):
                wanted = key != "critic" and part not in UNREACHED.get((CASES[name][0], key), ())
                reached = gradients(term, getattr(student, part)) > 0
                assert reached == wanted, f"{key} at the {part} of student {number}: {wanted}"
        for module in judge:
            assert (gradients(term, module) > 0) == (key == "critic"), f"{key} and the critic"
        for teacher in teachers(method):
            assert gradients(term, teacher) == 0, f"{key} reaches a teacher"
    fixed = {id(p) for teacher in teachers(method) for p in teacher.parameters()}
    free = {name: p for name, p in method.named_parameters() if p.requires_grad and id(p) not in fixed}
    found = torch.autograd.grad(sum(terms.values()), [*free.values()], allow_unused=True)
    idle = [name for name, g in zip(free, found, strict=True) if g is None]
    assert not idle, "parameters that nothing trains"


@every_case
def test_teachers_start_as_copies_follow_their_student_and_are_not_optimised(name):
    method = case(name)
    pairs = list(zip(students(method), teachers(method), strict=False))
    for student, teacher in pairs:
        theirs = teacher.module.state_dict()
        for (key, a), b in zip(student.state_dict().items(), theirs.values(), strict=True):
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
        three = [*zip(start.parameters(), student.parameters(), teacher.module.parameters(), strict=True)]
        for a, b, mine in three:
            torch.testing.assert_close(mine, keep * a + (1 - keep) * b, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(a, mine) for a, _, mine in three)


@pytest.mark.parametrize("name", [*METHODS, "mkd_ablation pspnet", "fixmatch teacher"])
def test_predictors_map_images_to_logits_and_the_first_is_the_reported_one(name):
    method = case(name).eval()
    reported = {"mean_teacher": "student", "cutmix_seg": "teacher", "vat": "teacher", "u2pl": "teacher",
                "ps_mt": "teachers", "cct": "main", "pseudoseg": "decoder"}  # fmt: skip
    reported |= dict.fromkeys(("cps", "mkd", "mkd_ablation", "gct"), "student 1")
    reported |= {"unimatch_v2": "student", "fixmatch": "student" if "decay" in CASES[name][1] else "net"}
    first = next(iter(method.predictors))
    assert first == reported.get(CASES[name][0], first)
    assert len(method.predictors) == len(students(method)) + len(teachers(method))
    with torch.no_grad():
        outputs = [net(torch.randn(1, 3, 32, 32)) for net in method.predictors.values()]
    assert all(out.shape == (1, CLASSES, 32, 32) for out in outputs)


def test_facts_of_a_method_are_on_its_class_and_two_students_start_differently():
    labels = [method.label for method in METHODS.values()]
    assert not {label for label in labels if labels.count(label) > 1}
    for method in METHODS.values():
        assert len(method.colour) == 7 and int(method.colour[1:], 16) >= 0 and len(method.passes) == 2, method
    method = make("mean_teacher")
    method.evaluated = ("student", "teachr")
    with pytest.raises(ValueError, match="no network 'teachr'; did you mean 'teacher'"):
        method.predictors  # noqa: B018
    for name in ("cps", "mkd", "mkd_ablation", "gct"):
        a, b = make(name).students
        assert not torch.equal(a.classifier.weight, b.classifier.weight)


@every_case
def test_saved_and_loaded_state_continues_alike(name):
    """State is submodules and buffers: a fresh method with the loaded state gives the same next terms."""
    torch.manual_seed(0)
    method = case(name)
    method(batch(0), 0.2)
    method.update(1)
    other = case(name, seed=9)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    results = []
    for m in (method, other):
        torch.manual_seed(4)
        results.append(m(batch(1), 0.6)[0])
    for key in results[0]:
        assert torch.equal(results[0][key], results[1][key]), key


@pytest.mark.parametrize(
    "name", ["supervised", "mkd", "vat", "ps_mt", "simple_baseline", "cct", "gct", "u2pl"]
)
def test_activations_that_are_computed_again_change_nothing(name):
    """Terms, gradients and BatchNorm's averages, bit for bit; less is kept."""
    found = []
    for again in (False, True):
        method, kept = case(name), []
        for norm in getattr(method, "norms", ()):  # of SimpleBaseline: they have learned
            torch.nn.init.uniform_(norm.weight, 0.5, 2, torch.Generator().manual_seed(0))
        for net in [m for m in method.modules() if again and isinstance(m, SegNet)]:
            checkpoint_activations(net)
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # noqa: B023
            terms, _ = method(batch(), 0.7)
        sum(terms.values()).backward()
        state = {f"grad {n}": p.grad for n, p in method.named_parameters() if p.grad is not None}
        found.append((terms | state | method.state_dict(), len(kept)))
    (plain, kept), (ours, fewer) = found
    assert plain.keys() == ours.keys() and all(torch.equal(plain[key], ours[key]) for key in plain)
    assert fewer < kept


@pytest.fixture
def gpu(monkeypatch):
    """A pretended GPU under its autocast: tensors have no values; mixing devices, or asking for a value or how many there are, raises."""
    # A draw on the host checks its parameters there. What needs a real GPU: pinned memory, a gradient.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.autograd, "grad", lambda out, of: [torch.zeros_like(of)])
    for name in ("weak", "colour"):
        monkeypatch.setattr(f"mkd_core.augment.{name}.constant", constant.__wrapped__)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    with fake_tensor.FakeTensorMode():
        yield
    torch.set_autocast_enabled("cuda", False)
    torch.clear_autocast_cache()


@every_case
def test_a_step_stays_on_its_device_and_asks_it_nothing(name, request):
    methods, b = {device: case(name) for device in ("cuda", "cpu")}, batch()
    request.getfixturevalue("gpu")
    for device, method in methods.items():
        terms, stats = pretended(method, device)(Batch(**pretended(vars(b), device)), 0.7)
        if device == "cpu":  # a backward on the other needs a real one
            torch.stack([*terms.values()]).sum().backward()
        method.update(1)
        assert {t.device.type for t in (terms | stats).values()} == {device}


@pytest.mark.parametrize("operation", [colour_jitter, blur, equalize, solarize, greyscale])
def test_colour_stays_on_its_device_and_asks_it_nothing(operation, gpu):
    assert operation(torch.rand(3, 3, 32, 32, device="cuda")).device.type == "cuda"


def test_what_asks_the_device_or_leaves_it_is_seen(gpu):
    x, host = torch.rand(3, device="cuda"), torch.rand(3, device="cpu")
    by_code = lambda: x[x > 1], lambda: bool(x.any()), lambda: torch.equal(x, x), lambda: x + host
    for wrong in (x.sum().item, x.nonzero, x.unique, *by_code):
        asks = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException
        with pytest.raises((*asks, RuntimeError)):
            wrong()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "mkd_ablation"])
def test_bfloat16_gives_nearly_the_same_terms(name):
    """A step under autocast: finite, near the terms of float32."""
    options = AT_WORK.get(name, {}) | ({"threshold": 0.0} if "threshold" in AT_WORK.get(name, {}) else {})
    found = []
    for enabled in (False, True):
        method = make(name, **options)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
            found.append(method(batch(size=64), 0.7)[0])
        sum(t.float() for t in found[-1].values()).backward()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    for key, term in found[0].items():
        assert found[1][key].item() == pytest.approx(term.item(), rel=0.2, abs=0.02), key


ZERO = {"strong": "fixmatch unimatch unimatch_v2 speed", "st": "mkd mkd_ablation", "consistency": "cutmix_seg vat ps_mt",
        "pseudo": "st_plus_plus simple_baseline"}  # fmt: skip
NOTHING = {name: term for term, names in ZERO.items() for name in names.split()}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_selected_is_zero_not_nan(name):
    """Also where one image is all padding."""
    staged, b = NOTHING[name] == "pseudo", batch()
    b.valid[1] = False
    b = replace(b, label=torch.full_like(b.label, IGNORE)) if staged else b
    method = make(name, **{} if staged else {"threshold": 0.999999})
    terms, stats = method(b, 0.7)
    assert terms[NOTHING[name]] == 0 < terms["sup"] and not stats.get("kept", 0)
    sum(terms.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in METHODS_OF if not name.endswith("shares")])
def test_an_oracle_learns_what_is_withheld_and_nothing_else(name):
    method, b = METHODS_OF[name](build, threshold=0.01), batch()
    none, _ = method(replace(b, label=torch.full_like(b.label, IGNORE)), 0.7)
    every, _ = method(b, 0.7)
    assert all((none[key] == 0) and term > 0 for key, term in every.items() if key != "sup")


def test_labels_of_equal_shares_keep_as_many_and_of_every_class_as_many():
    logits = torch.randn(2, 4, 40, 50).cumsum(1)  # later classes are predicted more often and more surely
    valid = torch.rand(2, 40, 50) < 0.9
    one, every = (pseudo_label(logits, t, valid) for t in (0.8, 0.0))
    equal = labels("shares", None, logits, 0.8, valid)
    assert (equal[equal != IGNORE] == every[equal != IGNORE]).all() and (equal[~valid] == IGNORE).all()
    shares = [[(of == c).sum() / (every == c).sum() for c in range(4)] for of in (one, equal)]
    assert max(shares[0]) > 1.5 * min(shares[0]) and max(shares[1]) - min(shares[1]) < 0.01
    assert abs(int((one != IGNORE).sum()) - int((equal != IGNORE).sum())) <= 4
    kept = confidence(logits)
    assert all(kept[equal == c].min() > kept[(every == c) & (equal != c)].max() for c in range(4))


OFF = {
    "mean_teacher": {"weight": 0.0}, "cutmix_seg": {"weight": 0.0}, "cps": {"weight": 0.0},
    "cps cutmix": {"weight": 0.0, "boxes": 3}, "mkd": {"alpha": 0.0, "beta": 0.0, "fda": 1.5},
    "mkd_ablation": {"alpha": 0.0, "beta": 0.0, "fda": 1.5, "boxes": 0}, "vat": {"weight": 0.0},
    "ps_mt": {"weight": 0.0, "vat": 0.0}, "cct": {"weight": 0.0, "bootstrap": 0.0},
    "advsemseg": {"width": 8, "adversarial": 0.0, "adversarial_unlabeled": 0.0, "weight": 0.0},
    "gct": {"weight": 0.0, "correction": 0.0, "width": 8},
    "u2pl": {"weight": 0.0, "contrast": 0.0, "joint": False, "dim": 8, "bank": 50},
    "pc2seg": {"weight": 0.0, "contrast": 0.0, "dim": 8}, "pseudoseg": {"weight": 0.0}}  # fmt: skip


@pytest.mark.parametrize("name", OFF)
def test_weight_zero_is_supervised(name):
    """After three optimiser steps the (first) student has the weights of the supervised run, exactly."""
    results = []
    for method in (make(name.split()[0], **OFF[name]), make("supervised")):
        net = students(method)[0]
        judged = {id(p) for p in method.critic[0].parameters()} if method.critic else set()
        free = [p for p in method.parameters() if p.requires_grad and id(p) not in judged]
        optimizer = torch.optim.SGD(free, 0.05, momentum=0.9)
        for step in range(3):
            torch.manual_seed(step)
            terms, _ = method(batch(step, size=64 if name == "pseudoseg" else 32), step / 3)
            # PseudoSeg's own losses on labels
            terms = {k: t for k, t in terms.items() if k not in ("attention", "image")}
            assert all(t == 0 for k, t in terms.items() if k not in ("sup", "critic"))
            optimizer.zero_grad()
            torch.stack([*terms.values()]).sum().backward()
            optimizer.step()
            method.update(step + 1)
        results.append([p.detach().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "name", ["cps", "mean_teacher", "mkd", "mkd_ablation", "cct", "pseudoseg", "u2pl", "pc2seg"]
)
def test_rampup_scales_the_unsupervised_terms_only(name):
    losses = []
    for rampup in (0.0, 0.4):
        method = make(name, **AT_WORK.get(name, {}), rampup=rampup)
        torch.manual_seed(3)
        losses.append(method(batch(), 0.1)[0])
    plain, ramped = losses
    for key in plain:
        factor = 1 if key in ("sup", "attention", "image") else 16  # (0.1 / 0.4)^2
        torch.testing.assert_close(plain[key] / factor, ramped[key])


def test_joint_forward_shares_batch_statistics():
    for name in ("cps", "mean_teacher", "cutmix_seg", "mkd_ablation"):
        separate, joint = make(name), make(name, joint=True)
        assert separate(batch(), 0.5)[0]["sup"] != joint(batch(), 0.5)[0]["sup"]
    joint = make("mean_teacher", joint=True)
    net, b = copy.deepcopy(joint.net), batch()
    sup = ce(net(torch.cat([b.x, b.weak]))[:3], b.y)
    close(joint(b, 0.5)[0]["sup"], sup)


def test_padding_carries_no_pseudo_label():
    """What lies under the padding changes nothing, where labeled pixels count too; with ignore_padding off it does."""
    b = batch()
    noise = torch.randn(b.weak.shape) * (~b.valid)[:, None]
    other = replace(b, weak=b.weak + noise, strong=(b.strong[0] - 2 * noise,))
    assert (noise != 0).any()

    def terms(view: Batch, **more) -> dict[str, Tensor]:
        torch.manual_seed(0)
        options = {"threshold": 0.26, "fda": 1.0, "on_labeled": True}
        return METHODS["mkd_ablation"](lambda **_: Pointwise(), **options | more)(view, 0.5)[0]

    first, second = terms(b), terms(other)
    for key in first:
        torch.testing.assert_close(first[key], second[key], msg=lambda m, k=key: f"{k}: {m}")
    assert terms(b, ignore_padding=False)["ss"] != terms(other, ignore_padding=False)["ss"]


@pytest.mark.parametrize("ignore", [True, False])
def test_cps_is_the_reference(ignore):
    """Labeled and unlabeled pixels in one mean; released: padding counts."""
    method, b = make("cps", weight=6.0, ignore_padding=ignore), batch()
    z = [torch.cat([net(b.x), net(b.weak)]) for net in copy.deepcopy(method.students)]
    inside = torch.cat([b.y != IGNORE, b.valid]) if ignore else torch.ones(6, 32, 32, dtype=torch.bool)
    y = [torch.where(inside, k.argmax(1), IGNORE) for k in z]
    ours = method(b, 0.5)[0]
    close(ours["cross"], 6.0 * (ce(z[0], y[1]) + ce(z[1], y[0])))
    close(ours["sup"], ce(z[0][:3], b.y) + ce(z[1][:3], b.y))


def test_cps_with_cutmix_is_the_reference(monkeypatch):
    """Logits of the clean images mixed, then argmax; unlabeled pixels only."""
    mask = fix(monkeypatch, "cps.xor_boxes")
    method, b = make("cps", weight=1.0, boxes=3), batch()
    f, v = copy.deepcopy(method.students), mixed(b.valid, mask)
    y = [torch.where(v, mixed(net(b.weak), mask).argmax(1), IGNORE) for net in f]
    z = [net(mixed(b.weak, mask)) for net in f]
    close(method(b, 0.5)[0]["cross"], ce(z[0], y[1]) + ce(z[1], y[0]))
    assert method.min_batch == 2 and make("cps").min_batch == 1


def test_mean_teacher_is_the_reference():
    """100, mean over the pixels inside and the classes."""
    method, b = sharp("mean_teacher"), batch()
    s, t = copy.deepcopy(method.net), copy.deepcopy(method.teacher.module)
    distance = (s(b.weak).softmax(1) - t(b.weak).softmax(1)).square().mean(1)
    close(method(b, 0.5)[0]["consistency"], 100 * distance[b.valid].mean())


@pytest.mark.parametrize("boxes", [3, 0])
def test_cutmix_seg_is_the_reference(boxes, monkeypatch):
    """Squared distance, summed over classes, to the teacher's mixed prediction, times the sure share."""
    mask = fix(monkeypatch, "cutmix_seg.xor_boxes") if boxes else torch.ones(3, 32, 32) > 0
    method, b = sharp("cutmix_seg", threshold=0.5, weight=3.0, boxes=boxes, colour=boxes > 0), batch()
    s, t = copy.deepcopy(method.net), copy.deepcopy(method.teacher.module)
    target, inside = mixed(t(b.weak), mask).softmax(1), mixed(b.valid, mask)
    conf = (target.amax(1) >= 0.5)[inside].float().mean()
    assert 0.05 < conf < 0.95
    seen = s(mixed(b.strong[0] if boxes else b.weak, mask)).softmax(1)
    distance = (seen - target).square().sum(1)[inside].mean()
    close(method(b, 0.5)[0]["consistency"], 3.0 * conf * distance)
