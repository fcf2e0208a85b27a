"""Memory and operations of a training step, computed without a GPU: python tests/memory.py

A step of tables 1, 2 and today's VOC is made with tensors that have a shape and no values; counted is what they would hold at once. For MKD on
two ResNet-50 (crop 256, 2 + 2 images) that is 1,335 MiB where a CPU held 1,330, and 737 with activation_checkpointing where it held 714.
Not in it: workspaces of convolutions, what an allocator cannot reuse, and the CUDA context; so a tenth of the GPU is left free.
"""

import math
import weakref
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from mkd_core import METHODS, RunConfig
from mkd_core.suite.cost import CLASSES, Step

T = TypeVar("T")
CARDS = (11, 24, 40, 80)  # GiB
ON_VIT = {"arch": "dpt", "encoder": "tu-vit_small_patch14_dinov2", "channels": 64, "crop": (518, 518)}
PAPERS = {"arch": "deeplabv3plus_mmseg", "channels": 256, "crop": (512, 512)}
NETWORKS = {
    "ResNet-50": {"encoder": "tu-resnet50c"} | PAPERS,
    "ResNet-101": {"encoder": "tu-resnet101c"} | PAPERS,
    "DINOv2-S": ON_VIT,
}
GROWN: dict[str, dict[str, Any]] = {
    "as it is": {}, "crop 256": {"crop": (256, 256)}, "crop 768": {"crop": (768, 768)}, "81 classes": {"classes": 81}, "150 classes": {"classes": 150},
}  # fmt: skip
SHOWN = ("supervised", "fixmatch", "unimatch", "cps", "mkd", "u2pl")


def pretended(values: T, device: str) -> T:
    """Tensors as these but without values, on any device; of a module in place. Under FakeTensorMode."""

    def like(t: Tensor) -> Tensor:
        new = torch.empty(t.shape, dtype=t.dtype, device=device)
        return nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new

    if not isinstance(values, nn.Module):
        return tree_map_only(Tensor, like, values)
    for holder in [of for m in values.modules() for of in (m._parameters, m._buffers)]:
        holder.update({key: like(t) for key, t in holder.items() if t is not None})
    return values


class Held(TorchDispatchMode):
    """Counts the bytes that the tensors made inside hold at once."""

    now = most = 0

    def __enter__(self):
        self.seen: dict[int, int] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, out)
        return out

    def count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, storage._cdata)

    def free(self, key: int) -> None:
        self.now -= self.seen.pop(key)


def of_gradients(grad: Any, x: Any, weight: Any, _b: Any, _s: Any, _p: Any, _d: Any, transposed: bool, _o: Any, _g: Any,
                 wanted: Any, **_: Any) -> int:  # fmt: skip
    """Operations of a convolution's backward. torch's own count takes one with groups for a dense one."""
    pixels = math.prod((x if transposed else grad)[2:])
    return 2 * x[0] * pixels * math.prod(weight) * (wanted[0] + wanted[1])


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: of_gradients})


class Planned(NamedTuple):
    step: int  # bytes of a step, gradients included
    fixed: int  # bytes of weights, buffers and momentum
    sent: int  # bytes of gradients, which processes that share a batch exchange
    operations: int  # floating-point operations of a step


def planned(classes: int = CLASSES, **keys: Any) -> Planned:
    """What a step of a run asks of one device, in float32."""
    step = Step(RunConfig(device="cpu", strong="none", split="random/6", **keys), classes)
    own = [*step.method.parameters()]
    trained = [p for p in own if p.requires_grad]
    every = [*own, *step.method.buffers(), *trained]
    fixed, sent = (sum(t.numel() * t.element_size() for t in of) for of in (every, trained))
    with FakeTensorMode():
        with Held() as held:
            pretended(step.method, "cpu")
            vars(step.batch).update(pretended(vars(step.batch), "cpu"))
            before, held.most = held.now, held.now
            step()
        with counter() as operations:  # apart: it keeps tensors alive
            step()
    return Planned(held.most - before, fixed, sent, operations.get_total_flops())


def a_pair(**keys: Any) -> tuple[Planned, Planned]:
    """A step of 2 + 2 images, and what a pair more takes."""
    two, four = (planned(batch=n, **keys) for n in (2, 4))
    return two, Planned(*((b - a) // 2 for a, b in zip(two, four, strict=True)))


def main() -> None:
    torch.distributions.Distribution.set_default_validate_args(False)
    say = partial(print, flush=True)  # each row takes a while
    say(
        f"| | 2 + 2 images, MiB | each pair more, MiB | TFLOP a pair | batch on {CARDS} GiB | gradients, MiB |"
    )
    say("|:--|--:|--:|--:|:--|--:|")
    for network, keys in NETWORKS.items():
        for method in SHOWN:
            for again in (False, True) if method == "mkd" else (False,):
                two, more = a_pair(method=method, activation_checkpointing=again, **keys)
                rest = two.fixed + two.step - 2 * more.step
                fits = ", ".join(str(int((0.9 * card * 2**30 - rest) / more.step)) for card in CARDS)
                row = f"{METHODS[method].label}, {network}" + ", activation_checkpointing" * again
                mib = [f"{of / 2**20:,.0f}" for of in (two.step + two.fixed, more.step, two.sent)]
                say("|", " | ".join((row, *mib[:2], f"{more.operations / 1e12:.2f}", fits, mib[2])), "|")
    first = None
    say("\n| MKD, ResNet-50, but | MiB a pair | x | TFLOP a pair | x |\n|:--|--:|--:|--:|--:|")
    for what, keys in GROWN.items():
        more = a_pair(**{"method": "mkd", **NETWORKS["ResNet-50"], **keys})[1]
        first = first or more
        size, work = more.step / first.step, more.operations / first.operations
        say(f"| {what} | {more.step / 2**20:,.0f} | {size:.2f} | {more.operations / 1e12:.2f} | {work:.2f} |")


if __name__ == "__main__":
    main()
