"""Checks of tests/gpu.py: a device against the CPU, bfloat16 against float32, no waiting in a step, resume.

Each check is one line: `put(name, ok, **measures)`. Without a GPU the "device" is a CPU whose convolutions are computed another
way (oneDNN off), so that the comparison has real rounding to bound. What loses CUDA ends its process (`attempt`): gpu.py begins
the part again without what is done.
"""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from test_methods import AT_WORK, students, teachers
from tiny import CLASSES, batch, build, config, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mkd_core import losses, parallel, runner
from mkd_core.augment import boxes, colour
from mkd_core.config import RunConfig
from mkd_core.data.stream import Crops
from mkd_core.ema import EMA
from mkd_core.methods import METHODS, Batch, Method
from mkd_core.methods.noise import three_of
from mkd_core.metrics import confusion_matrix
from mkd_core.models import nearest, resize
from mkd_core.prepare import prepare
from mkd_core.semantics import ClassMoments
from mkd_core.train import make_batch, make_optimizers, streams, train

Put = Callable[..., None]
# Largest relative difference of a loss term, and of the gradient as a vector; bounds of float32 are about ten times what
# another way to compute the convolutions changes on a CPU, those of bfloat16 twice what it changes there.
BOUNDS = {"float32": (1e-3, 2e-2), "bfloat16": (0.2, 0.6)}
# The direction of PS-MT's attack is a difference quotient over a tiny step: rounding alone turned the gradient by 0.09 on a CPU.
BOUNDS_OF = {("ps_mt", "float32"): (1e-3, 0.5)}


class SameDraws(TorchDispatchMode):
    """Random numbers are drawn on the CPU in float32, then sent: the same on every device and in every precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)

        def host(t: Tensor) -> Tensor:
            return t.cpu().float() if t.is_floating_point() else t.cpu()

        like = next((a for a in args if isinstance(a, Tensor)), None)
        device = kwargs.get("device") or (like.device if like is not None else "cpu")
        dtype = kwargs.get("dtype") or (like.dtype if like is not None else torch.float32)
        there = kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})
        there |= {"dtype": torch.float32} if dtype == torch.bfloat16 and "dtype" in kwargs else {}
        drawn = func(*tree_map_only(Tensor, host, args), **there)
        if func.overloadpacket.__name__.endswith("_"):
            return args[0].copy_(drawn)
        return tree_map_only(
            Tensor, lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), drawn
        )


def apart(a: Tensor, b: Tensor) -> float:
    """Relative distance of two vectors."""
    a, b = a.double().cpu(), b.double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def onto(b: Batch, device: torch.device) -> Batch:
    return Batch(**tree_map_only(Tensor, lambda t: t.to(device), vars(b)))


def other_way(device: torch.device) -> Any:
    return nullcontext() if device.type == "cuda" else torch.backends.mkldnn.flags(enabled=False)


def one_step(name: str, options: dict, device: torch.device, precision: str) -> tuple[dict, Tensor, Method]:
    """Terms, gradient as one vector, and the method after a backward from the same weights and draws."""
    method = make(name, **options).to(device)
    forward = parallel.wrap(method)
    torch.manual_seed(1)
    low = precision == "bfloat16"
    with SameDraws(), torch.autocast(device.type, torch.bfloat16, enabled=low, cache_enabled=False):
        terms, _ = forward(onto(batch(size=64), device), 0.7)
    torch.stack([t.float() for t in terms.values()]).sum().backward()
    fixed = {id(p) for t in teachers(method) for p in t.parameters()}
    free = [p for p in method.parameters() if p.requires_grad and id(p) not in fixed]
    return terms, torch.cat([p.grad.float().flatten() for p in free]), method


def methods(device: torch.device, put: Put, names: Sequence[str] = tuple(METHODS)) -> None:
    """Every method: float32 against the CPU, bfloat16 against float32, on one small batch."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for name in names:
        options = AT_WORK.get(name, {})
        sure = options | ({"threshold": 0.0} if "threshold" in options else {})  # no pixel is on the edge
        with attempt(put, f"{name} float32"), other_way(device):
            found = one_step(name, options, device, "float32")
            with torch.backends.mkldnn.flags(enabled=True):
                exact = one_step(name, options, torch.device("cpu"), "float32")
            put(f"{name} float32", **compare(name, "float32", found, exact))
        with attempt(put, f"{name} bfloat16"):
            low, exact = (one_step(name, sure, device, p) for p in ("bfloat16", "float32"))
            put(f"{name} bfloat16", **compare(name, "bfloat16", low, exact))
        with attempt(put, f"{name} waits for nothing"):
            waits(name, device)
            put(f"{name} waits for nothing", True)


def compare(name: str, precision: str, found: tuple, reference: tuple) -> dict[str, Any]:
    """ok and measures: terms and gradients near the reference's, finite; students get a gradient, teachers none."""
    (terms, gradient, method), (exact, wanted, _) = found, reference
    # Of a small term, the absolute difference counts.
    loss = max(abs(terms[k].item() - t.item()) / max(abs(t.item()), 0.1) for k, t in exact.items())
    ends = [part for s in students(method) for part in (s.encoder, s.decoder, s.classifier)]
    reached = all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in e.parameters()) for e in ends)
    untouched = all(p.grad is None for t in teachers(method) for p in t.parameters())
    finite = bool(gradient.isfinite().all()) and all(bool(t.isfinite()) for t in terms.values())
    most = BOUNDS_OF.get((name, precision), BOUNDS[precision])
    of_gradient = apart(gradient, wanted)
    ok = terms.keys() == exact.keys() and loss <= most[0] and of_gradient <= most[1]
    measures = {"loss": loss, "gradient": of_gradient, "finite": finite}
    ok = ok and finite and reached and untouched
    return {"ok": ok, **measures, "students": reached, "teachers": untouched}


def waits(name: str, device: torch.device) -> None:
    """Training steps after the first, views, optimiser and teachers included; CUDA raises where the host would wait."""
    plain = AT_WORK.get(name, {})
    keys = {"crop": (64, 64), "device": device.type, "weak_photometric": True, "precision": "bfloat16"}
    c = config(name, options=plain, **keys)
    method, b = make(name, **plain).to(device), batch(size=64)
    optimizers = make_optimizers(c, method)
    u = slice(0, None if method.unlabeled or method.stages else 0)
    x, weak = ((40 * t + 128).clamp(0, 255).byte() for t in (b.x, b.weak))
    parts = x, b.y.byte(), weak[u], b.valid[u], b.label.byte()[u]
    crops = Crops(*(t.pin_memory() if device.type == "cuda" else t for t in parts))
    for operation in (colour.colour_jitter, colour.equalize, colour.distort):  # what is made once
        operation(b.x.sigmoid().to(device))
    try:
        for step, strong in enumerate(("one_of", "one_of", "chain")):
            sync_is_an_error(device, step > 0)
            made = make_batch(crops, c.model_copy(update={"strong": strong}), method.views, device)
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                terms, _ = method(made, 0.7)
            torch.stack([t.float() for t in terms.values()]).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            method.update(step + 1)
    finally:
        sync_is_an_error(device, False)


def sync_is_an_error(device: torch.device, on: bool) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if on else "default")


def loop(device: torch.device, put: Put) -> None:
    """The training loop itself with its loader waits for nothing, from the third step to the last but one."""
    with attempt(put, "waits for nothing"):
        loop_waits(device)
        put("waits for nothing", True)


def loop_waits(device: torch.device) -> None:
    c = config("mkd", device=device.type, steps=8, workers=1)
    dataset, split, method = prepare(c)
    optimizers = make_optimizers(c, method.to(device))

    def due(step: int) -> bool:
        sync_is_an_error(device, 2 <= step < c.steps)
        return False

    steps = streams(c, dataset, split.labeled, split.unlabeled, None)
    try:
        assert [row["step"] for row in train(c, method, optimizers, steps, (0, 0, c.steps), due)] == [c.steps]
    finally:
        sync_is_an_error(device, False)


LOST = 86  # exit status of a process whose CUDA answers nothing any more, as after an index out of range


def lost() -> bool:
    try:
        torch.cuda.synchronize() if torch.cuda.is_initialized() else None
    except RuntimeError:
        return True
    return False


class attempt:
    """What fails inside is put down with its last lines, and the next check goes on; LOST where it could not."""

    def __init__(self, put: Put, name: str):
        self.put, self.name = put, name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        own = [f for f in traceback.extract_tb(trace) if "mkd_core" in f.filename or "tests" in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}" if own else ""
        self.put(self.name, False, error=f"{kind.__name__}: {str(error)[:300]}", where=where)
        if lost():
            os._exit(LOST)
        return True


def kernels(device: torch.device, put: Put) -> None:
    """Losses, moments, EMA, resizing, boxes, metrics, colour: on the device against the CPU, from the same draws."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    g = torch.Generator().manual_seed(0)
    maps, others = (3 * torch.randn(3, CLASSES, 40, 48, generator=g) for _ in range(2))
    label = torch.randint(0, CLASSES, (3, 40, 48), generator=g).masked_fill(maps[:, 0] > 3, 255)
    features, image = torch.randn(3, 16, 40, 48, generator=g), torch.rand(5, 3, 48, 64, generator=g)
    valid = others[:, 0] > -2

    def moments(f: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        m = ClassMoments(CLASSES, 16).to(f.device)
        for part in f.split(1), f.flip(0).split(2):
            for p, q in zip(part, y.split([len(p) for p in part]), strict=True):
                m.update(p, q)
        table = m.table(f[0, :, :CLASSES, 0].T, 1.5)
        return [m.count, m.mean, m.var, table, m.shift(z, y, table)]

    def average(*_: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        net, other = build().to(_[0].device), build().to(_[0].device)
        teacher = EMA(net, 0.9, buffers="all")
        teacher.update(other, 3)
        return [p for p in teacher.module.state_dict().values() if p.is_floating_point()]

    def slope(f: Callable[..., Tensor], *args: Any) -> list[Tensor]:
        x = args[0].detach().requires_grad_()
        out = f(x, *args[1:])
        return [out, *torch.autograd.grad(out.sum(), [x])]

    near = {  # name -> (function, arguments); float32
        "cross_entropy": (partial(slope, losses.cross_entropy), maps, label),
        "cross_entropy over": (partial(slope, losses.cross_entropy), maps, label, valid),
        "confidence": (losses.confidence, maps), "entropy": (partial(slope, losses.entropy), maps),
        "kl_divergence": (partial(slope, losses.kl_divergence), maps, others),
        "squared_distance": (losses.squared_distance, maps, others),
        "masked_mean": (losses.masked_mean, maps[:, 0], valid), "unit": (losses.unit, maps),
        "percentiles": (losses.percentiles, maps[:, 0], valid, (0.2, 0.5, 0.83)),
        "resize": (partial(slope, resize), maps, (93, 111)), "EMA": (average, maps),
        "class moments, table, shift": (moments, features, label, maps),
    }  # fmt: skip
    for name in ("brightness", "contrast", "saturation", "hue", "blur", "greyscale", "chain", "distort"):
        near[f"colour {name}"] = getattr(colour, name), image
    same = {  # equal to the last bit
        "pseudo_label": (losses.pseudo_label, maps, 0.7, valid), "nearest": (nearest, label, (13, 31)),
        "confusion_matrix": (lambda z, y: confusion_matrix(z.max(1).indices, y, CLASSES), maps, label),
        "draw": (losses.draw, valid.flatten(1), 9), "mix": (boxes.mix, maps, valid),
        "colour one_of": (lambda x: (colour.one_of(x) * 255).round(), image),
        "colour three_of": (lambda x: (three_of(x) * 255).round(), image),
    }  # fmt: skip
    for law in ("xor_boxes", "ratio_box", "beta_box", "half_box", "square"):
        draw = getattr(boxes, law)
        same[f"boxes {law}"] = lambda x, draw=draw: draw(len(x), (48, 64), x.device), image
    for exact, cases in ((False, near), (True, same)):
        for name, (f, *args) in cases.items():
            with attempt(put, name):
                found = []
                for place in (torch.device("cpu"), device):
                    torch.manual_seed(3)
                    with SameDraws():
                        out = f(*tree_map_only(Tensor, lambda t, place=place: t.to(place), args))
                    out = [out] if isinstance(out, Tensor) else [*out]
                    found.append([t.detach().cpu().double() for t in out])
                pairs = [*zip(*found, strict=True)]
                error = max(((a - b).abs() / b.abs().clamp_min(1)).max().item() for b, a in pairs)
                # A value on the edge of two classes or grey levels may fall to either side.
                few = max((a != b).double().mean().item() for b, a in pairs)
                put(name, few <= 1e-3 if exact else error <= 1e-4, error=error, differing=few)


RESUMED: dict[str, dict] = {"supervised": {}, "mkd": {"threshold": 0.3, "fda": 1.5}, "unimatch": {}}
RESUMED["st_plus_plus"] = {"scales": [1.0]}


def resume(device: torch.device, put: Put, names: Sequence[str] = tuple(RESUMED)) -> None:
    """A run that was stopped and goes on ends with the weights of one that was not; beside it, two that were not."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.deterministic = True
    for name in names:
        with attempt(put, f"{name} resumed"), tempfile.TemporaryDirectory() as place:
            c = config(name, options=RESUMED[name], device=device.type, steps=8)
            ends = [finish(c, Path(place, str(i)), stop=4 if i == 2 else 0) for i in range(3)]
            again, resumed = apart(ends[1], ends[0]), apart(ends[2], ends[0])
            put(f"{name} resumed", resumed <= 10 * again, twice=again, resumed=resumed, exact=resumed == 0)


def finish(c: RunConfig, runs: Path, stop: int) -> Tensor:
    """The weights after a run; stop: the step after whose checkpoint it is left, to be gone on with."""

    class Left(Exception):
        pass

    whole = runner.train

    def left(*args: Any) -> Any:
        for row in whole(*args):
            yield row
            if row["step"] == stop:
                raise Left

    runner.train = left if stop else whole
    try:
        runner.run(c, runs, quiet=True)
    except Left:
        runner.train = whole
        runner.run(c, runs, quiet=True)
    finally:
        runner.train = whole
    state = torch.load(runs / c.id / "checkpoint.pt", weights_only=True, map_location="cpu")["method"]
    return torch.cat([t.double().flatten() for t in state.values()])


class Several(int):
    """A number of processes that is never 1: one of them alone sends itself all that they send each other."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return True


GATHERING = "mkd", "u2pl", "pc2seg", "gct"


def several(device: torch.device, put: Put, names: Sequence[str] = GATHERING) -> None:
    """The code of several processes, NCCL's collectives and DistributedDataParallel, on one: the plain step again."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    plain = {name: one_step(name, AT_WORK[name], device, "float32") for name in names}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    parallel.join()
    parallel.world = lambda: Several(1)
    for name in names:
        with attempt(put, name):
            found = one_step(name, AT_WORK[name], device, "float32")
            put(name, **compare(name, "float32", found, plain[name]))


CHECKS = {"methods": methods, "loop": loop, "kernels": kernels, "resume": resume, "several": several}
# What these do, one after the other.
NAMES = {"methods": (*METHODS,), "resume": (*RESUMED,), "several": GATHERING}
