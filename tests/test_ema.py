"""The one moving average against its closed form; modes, buffers, storage."""

import pytest
import torch
from tiny import make
from torch import nn

from mkd_core.ema import EMA


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


def walk(net: nn.Module, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Weights that a student might take: a random walk of one tensor."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(net.layer.weight.shape, generator=g) for _ in range(steps)]


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.9, 1.0])
@pytest.mark.parametrize("warmup", [True, False])
def test_closed_form(decay, warmup):
    """theta_t = sum_s (1 - m_s) prod_{r > s} m_r theta_s, m_t = min(1 - 1 / (t + 1), decay) if warm."""
    student = Net()
    start = student.layer.weight.detach().clone().double()
    teacher = EMA(student, decay, warmup=warmup)
    weights = walk(student, 12)
    for t, w in enumerate(weights, 1):
        student.layer.weight.data.copy_(w)
        teacher.update(student, t)
        assert torch.equal(student.layer.weight, w)
    m = [min(1 - 1 / (t + 1), decay) if warmup else decay for t in range(1, 13)]
    expected = start * torch.tensor(m).double().prod()
    for t, w in enumerate(weights):
        expected = expected + (1 - m[t]) * torch.tensor(m[t + 1 :]).double().prod() * w.double()
    torch.testing.assert_close(teacher.module.layer.weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_buffers_are_the_teacher_s_own_or_averaged():
    student = Net().train()
    teacher = EMA(student, 0.9)
    student(torch.randn(4, 3, 5, 5) + 3)
    teacher.update(student, 1)
    assert (teacher.module.norm.running_mean == 0).all() and teacher.module.norm.num_batches_tracked == 0
    teacher(torch.randn(4, 3, 5, 5))
    assert (teacher.module.norm.running_mean != 0).any() and teacher.module.norm.num_batches_tracked == 1
    student = Net().train()
    teacher = EMA(student, 0.75, buffers="all", warmup=False)
    for _ in range(3):
        student(torch.randn(4, 3, 5, 5) + 3)
    teacher.update(student, 1)
    torch.testing.assert_close(teacher.module.norm.running_mean, 0.25 * student.norm.running_mean)
    torch.testing.assert_close(teacher.module.norm.running_var, 0.75 + 0.25 * student.norm.running_var)
    assert teacher.module.norm.num_batches_tracked == 3


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
