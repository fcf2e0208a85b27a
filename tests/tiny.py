"""Tiny networks, batches and configurations for the tests: seconds on one core. One thread: the tests share the machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mkd_core.config import RunConfig
from mkd_core.methods import METHODS, Batch, Method
from mkd_core.models import SegNet
from mkd_core.records import Record

torch.set_num_threads(1)
CLASSES = 4


def build(arch: str = "deeplabv3plus", **options: Any) -> SegNet:
    """An 0.4 M parameter network; PSPNet with the smallest encoder that can be dilated."""
    encoder = "tu-test_resnet" if arch == "deeplabv3plus" else "mobilenet_v2"
    return SegNet(CLASSES, arch=arch, encoder=encoder, channels=16, **options)


class Pointwise(nn.Module):
    """A network that sees pixels one by one."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        if seed is not None:
            torch.manual_seed(seed)
        self.encoder, self.classifier = nn.Conv2d(3, 6, 1), nn.Conv2d(6, CLASSES, 1)

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


@torch.no_grad()
def spread(net: nn.Module, images: Tensor) -> None:
    """Every class is predicted somewhere, without ties: logits of mean 0 and deviation 2 on these images."""
    deviation, mean = torch.std_mean(net(images), (0, 2, 3))
    head = getattr(net, "module", net).classifier
    head.bias.sub_(mean).div_(deviation / 2)
    head.weight.div_(deviation[:, None, None, None] / 2)


def make(name: str, seed: int = 0, arch2: str = "deeplabv3plus", **options: Any) -> Method:
    """A method in training mode, its networks drawn from `seed`; arch2: of its second network."""
    torch.manual_seed(seed)
    archs = [arch2, "deeplabv3plus"]
    return METHODS[name](lambda: build(archs.pop() if archs else "deeplabv3plus"), **options).train()


def batch(seed: int = 0, n: int = 3, size: int = 32, padded: bool = True) -> Batch:
    """Random images; some labels are IGNORE and, where padded, a border of different width per image is padding; pseudo-labels too."""
    g = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(n, 3, size, size, generator=g)

    y = torch.randint(0, CLASSES, (n, size, size), generator=g)
    y[torch.rand(y.shape, generator=g) < 0.1] = 255
    valid = torch.ones(n, size, size, dtype=torch.bool)
    for i in range(n if padded else 0):
        valid[i, size - 3 - 4 * i :] = False
        y[i, :, : 2 + i] = 255
    weak = noise()
    images = noise(), y, weak, (weak + 0.5 * noise(), weak + 0.5 * noise()), valid
    return Batch(*images, torch.randint(0, CLASSES, y.shape, generator=g).masked_fill(~valid, 255))


def gradients(term: Tensor, module: nn.Module) -> float:
    """Sum of absolute gradients of `term` in the parameters of `module`; 0 where none arrives."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        return 0.0
    found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return sum(g.abs().sum().item() for g in found if g is not None)


def config(method: str = "supervised", **keys: Any) -> RunConfig:
    """A run of a second or two on 24 images of 32 x 32 pixels."""
    small: dict[str, Any] = dict(
        dataset="shapes", dataset_options={"train_size": 24, "val_size": 6, "size": 32}, split="random/6", method=method,
        encoder="tu-test_resnet", channels=16, crop=(32, 32), scale=(0.6, 1.6), steps=6, batch=3, lr=0.01, seed=0, device="cpu", threads=1,
        checkpoint_every=2, log_every=1, quality_images=4,
    )  # fmt: skip
    return RunConfig(**small | keys)


def save(path: Path, array: Any, **how: Any) -> Path:
    """A picture file of an array, or of lists of bytes."""
    array = np.asarray(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(array, np.uint8 if array.dtype == int else None)).save(path, **how)
    return path


def record(id: str = "a", miou: float = 50.0, seed: int = 0, **keys: Any) -> Record:
    """What a run of `config` could have left."""
    c = config(seed=seed)
    return Record(
        **{
            "id": id, "config": c.model_dump(mode="json"), "miou": miou, "miou_best": miou + 1, "step_best": 3,
            "iou": [miou, None], "classes": ["x", "y"], "predictors": {"net": miou}, "predictors_best": {"net": miou + 1}, "pseudo_labels": None, "evaluations": [], "confusion": [],
            "seconds": 2.0, "images_per_second": 3.0, "peak_memory_mb": 4.0, "device": "cpu", "threads": 1, "precision": "float32", "seed": seed,
            "split": {"name": "random/6@0", "sha256": f"labeled by seed {seed}", "labeled": 6, "unlabeled": 18, "sha256_unlabeled": f"unlabeled by seed {seed}", "sha256_val": "val"}, "weights": {"name": "", "sha256": ""},
            "protocol": "whole", "evaluated": {"images": 6, "set": "val"}, "versions": {}, "commit": "unknown",
        }
        | keys
    )  # fmt: skip


def child(keys: dict[str, Any], runs: str, delay: float = 0.0, wait: bool = False, die: str = "") -> None:
    """runner.run in a process of its own, every step `delay` seconds slower; it kills itself inside the operation named by `die`.

    wait   stop before the last step until killed
    die    "half checkpoint 2": while the second checkpoint is half written; "full record.json 2" and "renamed record.json 2": just before
           and just after that file or folder, written completely, gets its name, two checkpoint.pt having been saved; "half label 2":
           while the second pseudo-label is half written
    """
    import os
    import signal
    import time

    from mkd_core import checkpoints, prepare, records, runner

    def slow(method: Method, *args: Any) -> None:
        last = round(args[0][1] * keys["steps"]) == keys["steps"] - 1
        time.sleep(600 if wait and last else delay)

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    build_method = prepare.build_method

    def slowed(*args: Any) -> Method:
        method = build_method(*args)
        method.register_forward_pre_hook(slow)
        return method

    prepare.build_method = slowed
    counts = {"save": 0, "label": 0}
    save, replace, draw, write = torch.save, os.replace, Image.Image.save, checkpoints.write

    def counted_write(state: Any, folder: Path, names: Sequence[str]) -> None:
        counts["save"] += "checkpoint.pt" in names
        write(state, folder, names)

    def dying_save(state: Any, file: Any) -> None:
        save(state, file)
        if die == f"half checkpoint {counts['save']}":
            file.flush()
            file.truncate(file.tell() // 2)
            kill()

    def dying_replace(source: Any, target: Any) -> None:
        name = Path(target).name
        if die == f"full {name} {counts['save']}":
            kill()
        replace(source, target)
        if die == f"renamed {name} {counts['save']}":
            kill()

    def dying_draw(image: Image.Image, path: Path) -> None:
        counts["label"] += 1
        draw(image, path)
        if die == f"half label {counts['label']}":
            os.truncate(path, path.stat().st_size // 2)
            kill()

    torch.save, os.replace, Image.Image.save = dying_save, dying_replace, dying_draw
    checkpoints.write = counted_write
    assert records.os.replace is dying_replace
    runner.run(RunConfig(**keys), Path(runs), quiet=True)
