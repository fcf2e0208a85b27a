"""Configuration in, weights out: networks, batches, optimisers, and the one training loop, which does not know its method.

A step is a function of (weights, seed, step): samples, views and every random draw are derived from the seed and the
step number. So a run that was killed ends with the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import parallel
from .augment import STRONG, distort, normalise
from .config import RunConfig
from .data import SegDataset
from .data.base import read_label
from .data.stream import Crops, Steps, Stream
from .evaluate import Each, Predictor, autocast, pick_device
from .methods import METHODS, Batch, Method
from .models import SegNet, checkpoint_activations, load_encoder


class NonFiniteLoss(RuntimeError):
    """The loss or a weight is not finite; the message names the step and its images. The last checkpoint is from before."""


def train(
    config: RunConfig, method: Method, optimizers: Sequence[torch.optim.Optimizer], steps: Steps, span: tuple[int, int, int],
    due: Callable[[int], bool],
) -> Iterator[dict[str, float]]:  # fmt: skip
    """Train over span = (first step, start of its stage, end of its stage); yield a row after each step that is due, and after the last.

    A row holds step (those made so far), lr, loss, term/<name>, stat/<name>, and `seconds`, the time since the row before. Only here
    does the host wait for the device. Raises NonFiniteLoss.
    """
    step, start, end = span
    device = next(method.parameters()).device
    forward = parallel.wrap(method)
    bad = torch.full((), -1, device=device)  # the first step with a loss that is not finite
    method.train()
    clock = time.perf_counter()
    for crops in steps.batches(step, end, loaders(config), pin=device.type == "cuda"):
        seed_step(config.seed, step)
        rate = poly(config, step, start, end)
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * rate
        batch = make_batch(crops, config, method.views, device)  # colour stays in float32
        with autocast(config.precision, device):
            terms, stats = forward(batch, step / config.steps)
        loss = torch.stack([t.float() for t in terms.values()]).sum()
        bad = torch.where((bad < 0) & ~loss.detach().isfinite(), step, bad)
        method.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        method.update(step)

        if due(step) or step == end:
            _refuse_bad(bad, method, step, steps)
            row = {"step": step, "lr": config.lr * rate, "loss": loss.item()}
            row |= {f"term/{k}": v.item() for k, v in terms.items()}
            row |= {f"stat/{k}": v.item() for k, v in stats.items()}
            yield row | {"seconds": time.perf_counter() - clock}
            clock = time.perf_counter()


def _refuse_bad(bad: Tensor, method: Method, step: int, steps: Steps) -> None:
    norms = torch.stack(torch._foreach_norm([p.detach() for p in method.parameters()]))
    first = int(torch.where((bad < 0) & ~norms.isfinite().all(), step - 1, bad))
    if first >= 0:
        labeled, unlabeled = (", ".join(ids) or "none" for ids in steps.ids(first))
        what = f"the loss was not finite at step {first}, or the weights after it"
        images = f"Labeled images: {labeled}; unlabeled images: {unlabeled}"
        raise NonFiniteLoss(f"{what}. {images}. The last checkpoint is from before")


def build_net(config: RunConfig, num_classes: int) -> SegNet:
    """Make a new network, its encoder from config.weights where given. Two calls differ in what is random."""
    keys = {"arch", "encoder", "encoder_depth", "channels", "dropout", "norm", "bn_momentum"}
    try:
        net = SegNet(num_classes, **config.model_dump(include=keys))
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # of smp, timm
        what = f"{config.arch} on {config.encoder}"
        raise ValueError(f"{what} cannot be built: {type(error).__name__} {error}") from error
    if config.weights:
        load_encoder(net, config.weights)
    if config.activation_checkpointing:
        checkpoint_activations(net)
    return net


def build_method(config: RunConfig, num_classes: int) -> Method:
    """Make the method with networks drawn from the seed: the first network is the same for every method."""
    seed_step(config.seed, -1)
    built = count(1)

    def build() -> SegNet:
        return build_net(config.second if next(built) == 2 else config, num_classes)

    method = METHODS[config.method](build, **config.options)
    method.ohem_keep = config.ohem_keep if config.supervised_loss == "ohem" else 0
    if (config.encoder2 or config.arch2) and next(built) != 3:
        raise ValueError(f"encoder2 and arch2 are of a second network; {config.method} has one")
    needs = {"crop": (min(config.crop), method.min_side), "batch": (config.batch, method.min_batch)}
    for what, (value, least) in needs.items():
        if value < least:
            needed = f"{config.method} with these options needs a {what} of at least {least}"
            raise ValueError(f"{needed}; got {getattr(config, what)}")
    stage_marks(config, method)
    return method


def stage_marks(config: RunConfig, method: Method) -> list[int]:
    """Steps at which the stages of a method begin, and the last step."""
    marks = [0, *(round(share * config.steps) for share in method.stages), config.steps]
    if any(start >= end for start, end in pairwise(marks)):
        what = f"{config.method} trains in {len(marks) - 1} stages"
        raise ValueError(f"{what}; {config.steps} steps are too few for them")
    return marks


def make_optimizers(config: RunConfig, method: Method) -> list[torch.optim.Optimizer]:
    """Make the optimiser of the networks, all but their encoders at head_lr times the rate, and that of a critic where there is one.

    The critic's is Adam with betas (0.9, 0.99), as AdvSemSeg and GCT have it.
    """
    judges = set(method.critic[0].parameters()) if method.critic else set()
    encoders = {p for net in method.modules() if isinstance(net, SegNet) for p in net.encoder.parameters()}
    mine = [p for p in method.parameters() if p.requires_grad and p not in judges]
    groups: list[dict[str, Any]] = [{"params": mine, "lr": config.lr}]
    if config.head_lr != 1:
        groups = [{"params": [p for p in mine if p in encoders], "lr": config.lr}]
        groups.append({"params": [p for p in mine if p not in encoders], "lr": config.lr * config.head_lr})
    kinds: dict[str, Any] = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=0.9)}
    optimizers = [kinds[config.optimizer](groups, weight_decay=config.weight_decay, fused=True)]
    if method.critic:
        critic, lr = method.critic
        optimizers.append(torch.optim.Adam(critic.parameters(), lr, betas=(0.9, 0.99), fused=True))
    for group in (g for optimizer in optimizers for g in optimizer.param_groups):
        group["initial_lr"] = group["lr"]
    return optimizers


def poly(config: RunConfig, step: int, start: int = 0, end: int = 0) -> float:
    """Share of the initial learning rate at a step of the stage [start, end); end 0: of the whole run."""
    return (1 - (step - start) / ((end or config.steps) - start)) ** config.power


def seed_step(seed: int, step: int, *stage: int) -> None:
    """Make torch's draws on every device a function of (seed, step); step -1: what comes before the first, or before a stage."""
    drawn = np.random.SeedSequence([seed, step + 1, *stage]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(drawn >> 1))


def make_batch(crops: Crops, config: RunConfig, views: int, device: torch.device) -> Batch:
    """Send the crops of a step to the device, draw the colour views there, normalise."""
    x, y, u, valid, label = (t.to(device, non_blocking=True) for t in crops)
    # Colour is drawn for the whole batch, before the weak distortion as released.
    x, u = parallel.gather(x).float() / 255, parallel.gather(u).float() / 255
    strong = tuple(normalise(parallel.share(STRONG[config.strong](u))) for _ in range(views if len(u) else 0))
    if config.weak_photometric:
        x, u = distort(x), distort(u)
    x, u = parallel.share(x), parallel.share(u)
    return Batch(normalise(x), y.long(), normalise(u), strong, valid, label.long())


def loaders(config: RunConfig) -> int:
    """Loaders of a process: at most a core each; -1: up to 8 beside a GPU, none on a CPU. Results do not depend on them."""
    cores = max(1, len(os.sched_getaffinity(0)) // parallel.on_this_host())
    if config.workers < 0:
        return min(8, cores - 1) if pick_device(config.device).type == "cuda" else 0
    return min(config.workers, cores)


def streams(
    config: RunConfig, dataset: SegDataset, labeled: Sequence[str], unlabeled: Sequence[str], stage: Path | None
) -> Steps:  # fmt: skip
    """Make the training steps of a stage. stage: folder of the unlabeled images' pseudo-labels, or None; unlabeled may be ()."""
    make = partial(Stream, seed=config.seed, crop=config.crop, scale=config.scale, base=config.base)
    first = make(dataset, labeled, name="labeled", labeled=True)
    if not unlabeled:
        return Steps(first, None, config.batch)
    relabeled = _Relabeled(dataset, unlabeled, stage) if stage else None
    ids = relabeled.ids if relabeled else unlabeled
    second = make(relabeled or dataset, ids, name="unlabeled", labeled=stage is not None, block=config.batch)
    return Steps(first, second, config.batch)


@torch.no_grad()
def write_labels(
    config: RunConfig, method: Method, stage: int, dataset: SegDataset, ids: Sequence[str], folder: Path, before: Path
) -> None:  # fmt: skip
    """Write the pseudo-labels of a stage to `folder`, all or nothing: those of the folder `before` (where it is there) and new ones."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    for old in (folder, temporary):
        shutil.rmtree(old, ignore_errors=True)
    if before.is_dir():
        shutil.copytree(before, temporary)
    temporary.mkdir(exist_ok=True)
    kept = {int(path.stem) for path in temporary.iterdir()}
    predictor = Predictor.of(config, {"all": method}, next(method.parameters()).device)
    images = Each(lambda id: predictor.input(dataset.image(id)[None]), ids)
    seed_step(config.seed, -1, stage)
    with predictor.at_work():
        for i, label in method.relabel(stage, images, predictor.prob, kept):
            Image.fromarray(label.to("cpu", torch.uint8).numpy()).save(temporary / f"{i}.png")
    os.replace(temporary, folder)


class _Relabeled(SegDataset):
    """The images that a stage has pseudo-labels for; read back through the loader, labels share the images' geometry."""

    def __init__(self, dataset: SegDataset, ids: Sequence[str], folder: Path):
        self.dataset, self.folder = dataset, folder
        self.places = {id: i for i, id in enumerate(ids) if (folder / f"{i}.png").exists()}
        self.ids = tuple(self.places)
        if not self.ids:
            raise ValueError(f"the stage has no pseudo-labelled image in {folder}")

    def image(self, id: str) -> Tensor:
        return self.dataset.image(id)

    def label(self, id: str) -> Tensor:
        return read_label(self.folder / f"{self.places[id]}.png")
