"""Costs count what a method's definition needs; a step asks the host nothing."""

import traceback

import pytest
import torch
from tiny import config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mkd_core.methods import METHODS
from mkd_core.suite.cost import Step, costs, peak_bytes, ratio

# What needs a value of a tensor on the host: a GPU would wait for it in every step.
SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_dim", "_unique2"}


class Syncs(TorchDispatchMode):
    """Collects calls that synchronise with the host, with the lines that made them."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in tree_leaves(args[1])
        )
        if name in SYNCS or by_mask:
            lines = [f for f in traceback.extract_stack() if "mkd_core" in f.filename]
            if not lines or not lines[-1].filename.endswith("augment.py"):  # boxes are drawn on the host
                self.found.append(f"{name}: {lines[-1].filename}:{lines[-1].lineno}" if lines else name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_step_makes_the_passes_that_the_class_states(method):
    assert Step(config(method)).passes() == METHODS[method].passes


@pytest.mark.parametrize(
    ("keys", "passes"),
    [
        ({"method": "cps", "options": {"boxes": 3}}, (4, 2)),
        ({"method": "mkd_ablation", "options": {"on_labeled": True}}, (4, 4)),
    ],
)
def test_options_change_the_passes(keys, passes):
    assert Step(config(**keys)).passes() == passes


@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_host(method):
    step = Step(config(method))
    step()  # what is made once
    with Syncs() as syncs:
        step()
    assert not syncs.found


def test_what_waits_for_the_host_is_seen():
    x = torch.arange(3.0)
    for wait in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: bool(x.any()),
        lambda: x.unique(),
    ):
        with Syncs() as syncs:
            wait()
        assert syncs.found


def test_bytes_are_those_of_the_tensors():
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == 3 * 4000
    assert peak_bytes(lambda: [torch.ones(1000) for _ in range(2)]) == 2 * 4000
    assert peak_bytes(lambda: [torch.ones(1000).sum() for _ in range(9)]) < 2 * 4000


def test_ratios_are_those_of_the_work():
    one = torch.randn(400, 400)
    value, (least, most), slow, fast = ratio(
        lambda: [one @ one for _ in range(8)], lambda: one @ one, pairs=3
    )
    assert 3 < value < 20 and least <= value <= most and slow > fast


def test_the_table_stands_beside_its_first_row():
    frame = costs({"SupOnly": config("supervised"), "CPS": config("cps")}, pairs=1)
    assert list(frame.index) == ["SupOnly", "CPS"]
    assert (frame > 0)[["x time", "x memory", "x passes", "ms"]].all().all()
    assert frame.loc["SupOnly", "x time"] == 1 and frame.loc["SupOnly", "x memory"] == pytest.approx(
        1, rel=0.02
    )
    assert frame.loc["CPS", "x memory"] > 1.5 and list(frame.loc["CPS", ["gradient", "plain"]]) == [4, 0]
