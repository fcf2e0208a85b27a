"""Costs count what a method's definition needs: passes known from the equations, bytes known from shapes, time that follows both."""

import pytest
import torch
from tiny import config
from torch import nn

from mkd_core.methods import METHODS
from mkd_core.suite.cost import Step, costs, peak_bytes, replay

# Batches through an encoder with gradient (students on labeled and unlabeled images) and without (teachers, targets), from the equations.
PASSES = {
    "supervised": (1, 0), "mean_teacher": (2, 1), "cutmix_seg": (2, 1), "cps": (4, 0), "mkd": (4, 2),
    "st_plus_plus": (2, 0), "cct": (2, 0), "pseudoseg": (2, 1), "simple_baseline": (2, 0),
    "advsemseg": (2, 0), "gct": (4, 0), "pc2seg": (2, 1), "u2pl": (2, 3),  # U2PL's teacher looks at plain images, and at what the student sees
    "fixmatch": (3, 0), "unimatch": (4, 0), "speed": (4, 1), "vat": (3, 1), "ps_mt": (2, 2),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_step_makes_the_passes_that_the_equation_needs(method):
    step = Step(config(method))
    step.passes()
    assert step.encoded == PASSES[method]


def test_options_change_the_passes():
    def encoded(**keys):
        step = Step(config(**keys))
        step.passes()
        return step.encoded

    assert encoded(method="cps", options={"boxes": 3}) == (4, 2)
    assert encoded(method="mkd", options={"alpha": 0.0}) == (4, 0)
    assert encoded(method="mkd", options={"on_labeled": True}) == (4, 4)


def test_a_replay_is_the_same_passes(monkeypatch):
    """Every convolution that saw gradient in the step sees as many forwards in the replay, and none is seen that was not there."""
    step = Step(config("mkd"))
    calls = step.passes()
    counts = {}
    for name, module in step.method.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, name=name: counts.__setitem__(name, counts.get(name, 0) + 1))
    step()
    first = dict(counts)
    counts.clear()
    replay(calls)
    assert counts == first and len(counts) > 20


def test_bytes_are_those_of_the_tensors():
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 3 * 4000
    assert peak_bytes(lambda: [torch.ones(1000) for _ in range(2)]) == 2 * 4000


def test_the_table_stands_beside_its_first_row():
    frame = costs({"SupOnly": config("supervised"), "CPS": config("cps")}, pairs=1)
    assert list(frame.index) == ["SupOnly", "CPS"] and (frame > 0)[["x time", "x memory", "x passes", "ms"]].all().all()
    assert frame.loc["SupOnly", "x memory"] == pytest.approx(1, rel=0.02) and frame.loc["CPS", "x memory"] > 2
