"""EMA: the one moving average of the suite, a teacher that follows a student."""

import copy
from typing import Self

import torch
from torch import Tensor, nn


class EMA(nn.Module):
    """A teacher: at first an exact copy, then teacher <- m teacher + (1 - m) student.

    m = min(1 - 1 / (step + 1), decay), the warm start of MKD's code and of U2PL.

    decay    the cap of m
    warmup   False: m = decay from the first step on
    buffers  "none": parameters only; BatchNorm statistics come from the teacher's own forwards (MKD)
             "all": floating buffers are averaged too, integers copied (CutMix-Seg, PS-MT)
    mode     of the teacher while its method trains: "train" (statistics of the batch; MKD) or "eval"

    It shares no storage with the student and asks for no gradient; `method.train()` keeps its mode.
    """

    def __init__(
        self, module: nn.Module, decay: float, *, warmup: bool = True, buffers: str = "none",
        mode: str = "train",
    ):  # fmt: skip
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.buffers_of, self.mode, self.warmup = decay, buffers, mode, warmup
        self.train()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.module.train(mode and self.mode == "train")
        return self

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow `module` after optimiser step number `step` (the first is 1)."""
        keep = min(1 - 1 / (step + 1), self.decay) if self.warmup else self.decay
        mine, theirs = list[Tensor](self.module.parameters()), list[Tensor](module.parameters())
        if self.buffers_of == "all":
            for own, other in zip(self.module.buffers(), module.buffers(), strict=True):
                if own.is_floating_point():
                    mine.append(own)
                    theirs.append(other)
                else:
                    own.copy_(other)
        torch._foreach_lerp_(mine, theirs, 1 - keep)
