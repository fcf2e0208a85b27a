"""The one moving average against its closed form; modes, buffers, storage."""

import pytest
import torch
from tiny import make
from torch import nn

from mkd_core.ema import EMA


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("warmup", [True, False])
def test_closed_form(decay, warmup):
    """theta_t = sum_s (1 - m_s) prod_{r > s} m_r theta_s, m_t = min(1 - 1 / (t + 1), decay) if warm."""
    student = network()
    start = student[0].weight.detach().clone().double()
    teacher = EMA(student, decay, warmup=warmup)
    weights = torch.randn(12, *start.shape, generator=torch.Generator().manual_seed(0))  # a random walk
    for t, w in enumerate(weights, 1):
        student[0].weight.data.copy_(w)
        teacher.update(student, t)
        assert torch.equal(student[0].weight, w)
    m = [min(1 - 1 / (t + 1), decay) if warmup else decay for t in range(1, 13)]
    expected = start * torch.tensor(m).double().prod()
    for t, w in enumerate(weights):
        expected = expected + (1 - m[t]) * torch.tensor(m[t + 1 :]).double().prod() * w.double()
    torch.testing.assert_close(teacher.module[0].weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_the_teacher_s_own_or_averaged():
    student = network().train()
    own, averaged = EMA(student, 0.9), EMA(student, 0.75, buffers="all", warmup=False)
    for _ in range(3):
        student(torch.randn(4, 3, 5, 5) + 3)
    own.update(student, 1)
    norm = own.module[1]
    assert (norm.running_mean == 0).all() and norm.num_batches_tracked == 0
    own(torch.randn(4, 3, 5, 5))
    assert (norm.running_mean != 0).any() and norm.num_batches_tracked == 1
    averaged.update(student, 1)
    norm = averaged.module[1]
    torch.testing.assert_close(norm.running_mean, 0.25 * student[1].running_mean)
    torch.testing.assert_close(norm.running_var, 0.75 + 0.25 * student[1].running_var)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_method_cannot_flip_the_mode_of_its_teacher(mode):
    method = make("mkd_ablation", teacher_mode=mode)
    for _ in range(2):
        method.train()
        for teacher in method.teachers:
            assert {m.training for m in teacher.module.modules()} == {mode == "train"}
        assert all(m.training for s in method.students for m in s.modules())
        method.eval()
        assert not any(m.training for t in method.teachers for m in t.modules())
    # A teacher in mode "eval" keeps its statistics, one in mode "train" gathers its own.
    method.train()
    before = {k: v.clone() for k, v in method.teachers[0].state_dict().items()}
    method.teachers[0](torch.randn(2, 3, 32, 32))
    changed = [k for k, v in method.teachers[0].state_dict().items() if not torch.equal(v, before[k])]
    assert bool(changed) == (mode == "train")
