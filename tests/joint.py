"""What the processes of test_parallel.py do: a module of its own, which they import without the tests."""

import os
import signal
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import DropPath, drop_path
from tiny import batch, make
from torch import Tensor, nn

from mkd_core import parallel
from mkd_core import train as loop
from mkd_core.augment.weak import constant
from mkd_core.config import RunConfig
from mkd_core.methods import METHODS, Batch
from mkd_core.models import SegNet
from mkd_core.runner import run

Found = tuple[dict[str, float], dict[str, np.ndarray]]


def train(cases: dict[str, tuple[str, dict[str, Any], int]], parts: int = 1) -> dict[str, Found]:
    """Case -> terms and statistics of the second step, state after it; in float64, on this process's rows of 4 + 4 images."""
    # What a method makes float32 stays float64, so that rounding cannot hide an error.
    to_float, Tensor.float = Tensor.float, lambda t: t if t.dtype == torch.float64 else t.double()
    torch.set_default_dtype(torch.float64)
    try:
        return {case: two_steps(*what, parts) for case, what in cases.items()}
    finally:
        Tensor.float = to_float
        torch.set_default_dtype(torch.float32)
        constant.cache_clear()  # of the other dtype


def two_steps(name: str, options: dict[str, Any], size: int, parts: int) -> Found:
    torch.manual_seed(0)
    own = options.get("encoder")
    method = METHODS[name](lambda: SegNet(4, encoder=own, channels=16)) if own else make(name, **options)
    for module in method.train().modules():
        if isinstance(module, DropPath):  # all processes draw alike, and so does one for each of the parts
            module.drop_prob = 0.5
            module.forward = partial(_drop_path, parts) if parts > 1 else module.forward
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0  # of [labeled; unlabeled] in one forward: other masks, of the same law
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.05)
    forward = parallel.wrap(method)
    for step in range(2):
        torch.manual_seed(step)
        terms, stats = forward(rows(batch(step, n=4, size=size)), (step + 0.6) / 2)
        optimizer.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        optimizer.step()
        method.update(step + 1)
    values = {key: value.item() for key, value in (terms | stats).items()}
    return values, {key: value.numpy().copy() for key, value in method.state_dict().items()}


def _drop_path(parts: int, x: Tensor) -> Tensor:
    ones = [1] * (x.ndim - 1)
    return x * drop_path(x.new_ones(len(x) // parts, *ones), 0.5, True).repeat(parts, *ones)


def rows(whole: Batch) -> Batch:
    """Take this process's rows of a batch, in float64."""

    def own(tensor: Tensor) -> Tensor:
        tensor = parallel.share(tensor)
        return tensor.double() if tensor.is_floating_point() else tensor

    values = {f.name: getattr(whole, f.name) for f in fields(Batch)}
    return Batch(**{k: tuple(map(own, v)) if isinstance(v, tuple) else own(v) for k, v in values.items()})


def die(config: RunConfig, runs: Path, at: int) -> None:
    """Run, but the second process is killed before step `at`."""
    make_batch, calls = loop.make_batch, []

    def deadly(*args: Any) -> Batch:
        calls.append(1)
        if len(calls) == at and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return make_batch(*args)

    loop.make_batch = deadly
    run(config, runs, quiet=True)
