"""Memory of a training step, computed without a GPU: python tests/memory.py

A step of tables 1, 2 and today's VOC is made with tensors that have a shape and no values; counted is what they would hold at once. For MKD on
two ResNet-50 (crop 256, 2 + 2 images) that is 1,335 MiB where a CPU held 1,330, and 737 with activation_checkpointing where it held 714.
Not in it: workspaces of convolutions, what an allocator cannot reuse, and the CUDA context; so a tenth of the GPU is left free.
"""

import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mkd_core import METHODS, RunConfig
from mkd_core.suite.cost import Step

T = TypeVar("T")
CARDS = (11, 24, 40, 80)  # GiB
ON_VIT = {"arch": "dpt", "encoder": "tu-vit_small_patch14_dinov2", "channels": 64, "crop": (518, 518)}
PAPERS = {"arch": "deeplabv3plus_mmseg", "channels": 256, "crop": (512, 512)}
NETWORKS = {
    "ResNet-50": {"encoder": "tu-resnet50c"} | PAPERS,
    "ResNet-101": {"encoder": "tu-resnet101c"} | PAPERS,
    "DINOv2-S": ON_VIT,
}
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


def memory(**keys: Any) -> tuple[int, int]:
    """(bytes of a step, gradients included; of weights, buffers and momentum) of a run on one device, in float32."""
    step = Step(RunConfig(device="cpu", strong="none", split="random/6", **keys))
    own = [*step.method.parameters()]
    fixed = [*own, *step.method.buffers(), *(p for p in own if p.requires_grad)]
    with FakeTensorMode(), Held() as held:
        pretended(step.method, "cpu")
        vars(step.batch).update(pretended(vars(step.batch), "cpu"))
        before, held.most = held.now, held.now
        step()
    return held.most - before, sum(t.numel() * t.element_size() for t in fixed)


def main() -> None:
    torch.distributions.Distribution.set_default_validate_args(False)
    print(
        "| | MiB, step of 2 + 2 | MiB, each image pair more | batch on",
        ", ".join(map(str, CARDS)),
        "GiB |\n|:--|--:|--:|:--|",
    )
    for network, keys in NETWORKS.items():
        for method in SHOWN:
            for again in (False, True) if method == "mkd" else (False,):
                two, four = (
                    memory(method=method, batch=n, activation_checkpointing=again, **keys) for n in (2, 4)
                )
                a_pair, fixed = (four[0] - two[0]) / 2, two[1] + two[0] - (four[0] - two[0])
                fits = [int((0.9 * card * 2**30 - fixed) / a_pair) for card in CARDS]
                row = f"{METHODS[method].label}, {network}" + ", activation_checkpointing" * again
                print(
                    f"| {row} | {sum(two) / 2**20:,.0f} | {a_pair / 2**20:,.0f} | {', '.join(map(str, fits))} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
