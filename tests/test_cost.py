"""Costs count what a method's definition needs."""

import pytest
import torch
from tiny import config

from mkd_core.methods import METHODS
from mkd_core.suite.cost import Step, costs, peak_bytes, ratio

OPTIONS = [("cps", {"boxes": 3}, (4, 2)), ("mkd_ablation", {"on_labeled": True}, (4, 4))]


@pytest.mark.parametrize(
    "method, options, passes", [*((m, {}, METHODS[m].passes) for m in METHODS), *OPTIONS]
)
def test_a_step_makes_the_passes_that_the_class_states(method, options, passes):
    assert Step(config(method, options=options)).passes() == passes, "counted, and stated as `passes`"


def test_bytes_and_ratios_are_those_of_the_work():
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 3 * 4000
    assert peak_bytes(lambda: [torch.ones(1000) for _ in range(2)]) == 2 * 4000
    assert peak_bytes(lambda: [torch.ones(1000).sum() for _ in range(9)]) < 2 * 4000
    one = torch.randn(400, 400)
    value, (least, most), slow, fast = ratio(lambda: [one @ one for _ in range(8)], lambda: one @ one, 3)
    assert 3 < value < 20 and least <= value <= most and slow > fast


def test_the_table_stands_beside_its_first_row():
    frame = costs({"SupOnly": config("supervised"), "CPS": config("cps")}, pairs=1)
    assert list(frame.index) == ["SupOnly", "CPS"]
    assert (frame > 0)[["x time", "x memory", "x passes", "ms"]].all().all()
    first = frame.loc["SupOnly"]
    assert first["x time"] == 1 and first["x memory"] == pytest.approx(1, rel=0.02)
    assert frame.loc["CPS", "x memory"] > 1.5 and list(frame.loc["CPS", ["gradient", "plain"]]) == [4, 0]
