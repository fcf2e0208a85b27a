"""What the benchmark compares with does the same; its rows are of what they say."""

from __future__ import annotations

import copy

import bench
import pytest
import torch
from memory import counter, planned
from released import SWITCHES, Released
from tiny import batch, make

from mkd_core import RunConfig
from mkd_core.suite.cost import Step, peak_bytes

SMALL = {"encoder": "tu-test_resnet", "channels": 16, "crop": (32, 32), "batch": 2}


def test_the_re_enacted_step_has_the_terms_and_moments_of_the_method():
    method, b = make("mkd_ablation", **SWITCHES), batch(size=64)
    for student, teacher in zip(method.students, method.teachers, strict=True):
        student.classifier.weight.data.mul_(3)  # one that has an opinion
        teacher.module.load_state_dict(student.state_dict())
    released = Released(copy.deepcopy(method), b, 0.5)
    torch.manual_seed(5)
    terms, _ = method(b, 0.5)
    torch.manual_seed(5)
    released.step(momentum=1.0)
    assert terms.keys() == released.terms.keys()
    for key, term in terms.items():
        assert released.terms[key].item() == pytest.approx(term.item(), rel=1e-6), key
    for own, other in zip(method.moments, released.moments, strict=True):
        for a, c in zip((own.count, own.mean, own.var), other, strict=True):
            torch.testing.assert_close(a.float(), c, rtol=1e-4, atol=1e-5)
    before = released.method.teachers[0].module.classifier.weight.clone()
    released.step(momentum=0.6)
    expected = 0.6 * before + 0.4 * released.method.students[0].classifier.weight
    torch.testing.assert_close(released.method.teachers[0].module.classifier.weight, expected)


def test_every_comparison_runs_small_and_has_a_number():
    rows = [
        *bench.fda(1024, 1), *bench.parts((48, 64), 1), *bench.loader((60, 80), (32, 32), 1), *bench.waiting(SMALL, 6),
        *bench.evaluation(4, 32, 1), *bench.released(SMALL, 1), *bench.growth(SMALL, 1),
        *bench.start(1, 300),
    ]  # fmt: skip
    frame = bench.table(rows)
    assert len(rows) == len(frame) == len(set(frame.index)) >= 28
    assert (frame["value"] > 0).all() and frame["value"].notna().all()
    of = {row.what.split(",")[0].split(":")[0]: row for row in rows if row.unit == "x"}
    spans = [row for row in rows if row.low == row.low and row.unit == "x"]
    assert of["FDA"].value > 1 and all(row.low <= row.value <= row.high for row in spans)
    assert sum(row.value for row in rows if row.what.startswith("loader")) == pytest.approx(100)


def test_the_table_of_steps_has_a_vision_transformer_and_targets_are_met_or_missed():
    frame = bench.steps(SMALL, ["supervised"], 1, "tu-test_vit")
    assert list(frame.index) == ["supervised", "supervised, ViT", "mkd, ViT"]
    assert list(frame.loc["mkd, ViT", ["gradient", "plain"]]) == [4, 2]
    assert frame.loc["mkd, ViT", "x memory"] > 1.5 * frame.loc["supervised, ViT", "x memory"] > 0
    assert bench.Row("a", 3.0, target=2).met == "met" and bench.Row("a", 1.0, target=2).met == "MISSED"
    share = bench.Row("a", 3.0, target=2, unit="%")
    assert share.met == "MISSED" and bench.Row("a", 3.0).met == ""


@pytest.mark.parametrize("method", ["supervised", "mkd"])
def test_the_memory_that_is_computed_grows_with_the_batch_as_what_is_held(method):
    small = {"method": method, "encoder": "tu-test_resnet", "channels": 16, "crop": (96, 96)}
    computed, held = [], []
    for n in (2, 8):
        computed.append(planned(batch=n, **small))
        held.append(
            peak_bytes(Step(RunConfig(batch=n, device="cpu", strong="none", split="random/6", **small)))
        )
    assert computed[1].step - computed[0].step == pytest.approx(held[1] - held[0], rel=0.05)
    assert computed[1].operations == 4 * computed[0].operations > 0


@pytest.mark.parametrize("layer", [torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.Conv2d(8, 4, 3, groups=2, stride=2),
                                   torch.nn.ConvTranspose2d(8, 4, 2, 2, groups=2)])  # fmt: skip
def test_a_convolution_with_groups_is_counted_as_such(layer):
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    with counter() as forward:
        out = layer(x)
    with counter() as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops() > 0
