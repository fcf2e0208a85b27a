"""make bench: speed and memory of the parts as ratios against their plain forms, measured side by side in one run.

A ratio is the median of alternating pairs in CPU time, its range beside it, so that it stands other work on the machine;
extra memory is the most that was held at once (mkd_core/suite/cost.py). notebooks/80_speed.ipynb runs the same functions
at a small size.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from released import SWITCHES, Released
from tiny import build, config, save
from torch import Tensor

from mkd_core.augment import FILL, colour, geometry, normalise
from mkd_core.data.base import decoded, read_image, read_label
from mkd_core.data.check import check
from mkd_core.data.stream import Crops, Steps
from mkd_core.ema import EMA
from mkd_core.evaluate import Predictor, evaluate
from mkd_core.methods import METHODS
from mkd_core.metrics import confusion_matrix, miou
from mkd_core.prepare import open_data, prepare
from mkd_core.semantics import ClassMoments
from mkd_core.suite.cost import Step, costs, peak_bytes, ratio
from mkd_core.train import make_optimizers, streams, train

N, C, A = 16_384, 21, 256  # pixels, classes, channels: 4 crops of VOC at 1/8
# A ResNet-18 with the decoder of the paper's networks: beside smaller networks a step is mostly the overhead of torch's calls.
REAL = {"encoder": "resnet18", "channels": 256, "crop": (192, 192), "batch": 4}


class Row(NamedTuple):
    """One comparison: how many times as much the plain form takes; or, where `unit` says so, another number."""

    what: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    target: float = float("nan")
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> str:
        if self.target != self.target:
            return ""
        more, less = self.value >= self.target, self.value <= self.target
        return "met" if (more if self.unit == "x" else less) else "MISSED"


def compare(
    what: str, plain: Callable[[], Any], ours: Callable[[], Any], pairs: int, target: float = float("nan")
) -> Row:
    value, (low, high), slow, fast = ratio(plain, ours, pairs)
    return Row(what, value, low, high, target, note=f"{1e3 * slow:.3g} ms -> {1e3 * fast:.3g} ms")


def memory(what: str, plain: float, ours: float, target: float = float("nan")) -> Row:
    return Row(what, plain / ours, target=target, note=f"{plain / 2**20:.3g} MiB -> {ours / 2**20:.3g} MiB")


def table(rows: Iterable[Row]) -> pd.DataFrame:
    return pd.DataFrame([{**row._asdict(), "target met": row.met} for row in rows]).set_index("what")


def fda(n: int = N, pairs: int = 3) -> Iterator[Row]:
    """FDA's table and the class moments against their per-pixel forms, n pixels."""
    g = torch.Generator().manual_seed(0)
    logits, label = torch.randn(n, C, generator=g), torch.randint(0, C, (n,), generator=g)
    weight, features = 0.1 * torch.randn(C, A, generator=g), torch.randn(n, A, generator=g)
    moments = ClassMoments(C, A)
    moments.update(features, label)

    def per_pixel(of: Tensor | slice = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        w, y = weight.to(dtype), label[of]
        v = w[None] - w[y][:, None]  # (n, C, A)
        return logits[of].to(dtype) + 0.75 * (v.square() * moments.var.to(dtype)[y][:, None]).sum(-1)

    as_maps, label_map = logits.T.reshape(1, C, n // 64, 64), label.view(1, n // 64, 64)

    def by_table() -> Tensor:
        return ClassMoments.shift(as_maps, label_map, moments.table(weight, 1.5))

    exact = torch.cat([per_pixel(part, torch.float64) for part in torch.arange(n).chunk(16)])
    error = ((by_table()[0].flatten(1).T.double() - exact).abs() / exact.abs().clamp_min(1)).max().item()
    yield compare(f"FDA, table against {n} x {C} x {A}: time", per_pixel, by_table, pairs, 100)
    plain, ours, result = peak_bytes(per_pixel), peak_bytes(by_table), logits.numel() * 4
    yield memory("FDA: extra memory, result included", plain, ours)
    yield memory("FDA: extra memory beyond the result", plain - result, ours - result, 100)
    yield Row("FDA: largest relative difference from float64", error, target=1e-6, unit="")

    few, label, moments = features[: n // 4], label[: n // 4], ClassMoments(C, A)

    def expanded() -> Tensor:  # released form: features expanded to n x C x A and masked
        one_hot = torch.nn.functional.one_hot(label, C).float()
        by_class = few[:, None] * one_hot[..., None]
        amount = one_hot.sum(0)[:, None]
        mean = by_class.sum(0) / amount
        return ((by_class - mean) * one_hot[..., None]).square().sum(0) / amount

    moments.update(few, label)
    torch.testing.assert_close(expanded(), moments.var, rtol=1e-3, atol=1e-5)
    update = partial(moments.update, few, label)
    yield compare(
        f"class moments of {n // 4} pixels, products against expansion: time", expanded, update, pairs
    )
    yield memory("class moments: extra memory", peak_bytes(expanded), peak_bytes(update))


def parts(size: tuple[int, int] = (375, 500), pairs: int = 3) -> Iterator[Row]:
    """The confusion matrix, the EMA, colour on the images that are drawn for it."""
    label, prediction = torch.randint(0, C, (1, *size)), torch.randint(0, C, (1, *size))
    label[:, :20] = 255

    def masks() -> Tensor:
        every = [((label == t) & (prediction == p)).sum() for t in range(C) for p in range(C)]
        return torch.stack(every).view(C, C)

    ours = partial(confusion_matrix, prediction, label, C)
    assert torch.equal(masks(), ours())
    yield compare("confusion matrix, one bincount against C x C masks", masks, ours, pairs)

    net = build()
    teacher, plain = EMA(net, 0.99), EMA(net, 0.99)

    @torch.no_grad()
    def loop() -> None:
        for own, other in zip(plain.module.parameters(), net.parameters(), strict=True):
            own.mul_(0.99).add_(other, alpha=0.01)

    foreach = partial(teacher.update, net, 1000)
    yield compare("EMA, foreach against a loop over parameters", loop, foreach, 5 * pairs)

    images = torch.rand(8, 3, *size)

    def whole(images: Tensor, operation: Callable[..., Tensor], probability: float) -> Tensor:
        coin = torch.rand(len(images), 1, 1, 1) < probability
        return torch.where(coin, operation(images), images)

    def drawn() -> Tensor:
        torch.manual_seed(0)
        return colour.chain(images)

    def every() -> Tensor:
        with mock.patch.object(colour, "_sometimes", whole):
            return drawn()

    assert torch.equal(every(), drawn())
    yield compare("colour `chain`, on the images drawn for it against on all", every, drawn, 2 * pairs)


def released(keys: dict[str, Any] = REAL, pairs: int = 3) -> Iterator[Row]:
    """The released recipe's step, and the paper's, against what the released code does in one (tests/released.py)."""
    step = Step(config("mkd_ablation", options=SWITCHES, **keys))
    theirs = Released(step.method, step.batch)
    yield compare("step of the released recipe, against its released work: time", theirs.step, step, pairs, 2)
    most = peak_bytes(theirs.step)
    yield memory("step of the released recipe: memory", most, peak_bytes(step), 2)
    paper = Step(config("mkd", **keys))
    yield compare("step of the paper's recipe, against the released work: time", theirs.step, paper, pairs)
    yield memory("step of the paper's recipe: memory", most, peak_bytes(paper))


def growth(keys: dict[str, Any] = REAL, pairs: int = 3) -> Iterator[Row]:
    """SupOnly's step against the same of another size: no goal, but what a change of it costs."""
    first = Step(config("supervised", **keys))
    side, batch, most = keys["crop"][0], keys["batch"], peak_bytes(first)
    for what, more, classes in (
        ("crop x 2", {"crop": (2 * side, 2 * side)}, 21), ("batch x 2", {"batch": 2 * batch}, 21),
        ("81 classes", {}, 81), ("150 classes", {}, 150), ("ResNet-50", {"encoder": "resnet50"}, 21),
    ):  # fmt: skip
        step = Step(config("supervised", **keys | more), classes)
        yield compare(f"growth, SupOnly, {what}: time of a step", step, first, pairs)
        yield memory(f"growth, SupOnly, {what}: memory", peak_bytes(step), most)


def checkpointing(keys: dict[str, Any] = REAL, pairs: int = 3) -> Iterator[Row]:
    """MKD's step that keeps every activation, against one that computes those of the encoder's blocks again."""
    plain, again = (Step(config("mkd", activation_checkpointing=on, **keys)) for on in (False, True))
    yield memory("activation checkpointing, MKD: memory of a step", peak_bytes(plain), peak_bytes(again))
    yield compare("activation checkpointing, MKD: time of a step", plain, again, pairs)


def loader(size: tuple = (375, 500), crop: tuple = (320, 320), pairs: int = 5) -> Iterator[Row]:
    """A sample's way into a batch: files are opened, one window is cut and only it is resampled."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 255, (size[0] // 8, size[1] // 8, 3), np.uint8)
    with tempfile.TemporaryDirectory() as place:
        files = Path(place, "a.jpg"), Path(place, "a.png")
        Image.fromarray(low).resize(size[::-1], Image.Resampling.BICUBIC).save(files[0])
        Image.fromarray(low[..., 0] // 13).resize(size[::-1], 0).save(files[1])
        image, label = read_image(files[0]), read_label(files[1])

        def cut() -> tuple[Tensor, ...]:
            return geometry(image, label, crop, (0.5, 2.0), 0, np.random.default_rng(int(rng.integers(1000))))

        def whole() -> tuple[Tensor, Tensor]:  # as most code bases do: resize all, pad all, crop, flip
            factor = rng.uniform(0.5, 2.0)
            scaled = [round(side * factor) for side in size]
            x = TF.resize_image(image, scaled, antialias=True)
            y = TF.resize_image(label[None], scaled, interpolation=TF.InterpolationMode.NEAREST)
            room = [max(0, c - s) for c, s in zip(crop, scaled, strict=True)]
            x = TF.pad_image(x, [0, 0, room[1], room[0]], fill=list(map(float, FILL)))
            y = TF.pad_image(y, [0, 0, room[1], room[0]], fill=255.0)
            top, left = (int(rng.integers(s - c + 1)) for s, c in zip(x.shape[1:], crop, strict=True))
            x, y = (t[:, top : top + crop[0], left : left + crop[1]] for t in (x, y))
            return (x.flip(-1), y.flip(-1)) if rng.random() < 0.5 else (x.contiguous(), y.contiguous())

        yield compare("a crop, cut before it is resampled against after", whole, cut, pairs)
        ways = {"image": partial(read_image, files[0]), "mask": partial(read_label, files[1]), "crop": cut}
        times = {name: ratio(f, f, 1)[2] for name, f in ways.items()}
    for name, seconds in times.items():
        share, note = 100 * seconds / sum(times.values()), f"{1e3 * seconds:.3g} ms"
        yield Row(f"loader: {name}, share of a labeled sample's time", share, unit="%", note=note)


def cache(
    size: tuple[int, int] = (1024, 2048), crop: tuple[int, int] = (512, 1024), pairs: int = 3
) -> Iterator[Row]:
    """A sample of a set of large PNGs, as Cityscapes' are, decoded every time against mapped (`cache`)."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (8, 16, 3), np.uint8)).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "a.png")
        Image.fromarray(
            (np.asarray(smooth) + rng.normal(0, 2, (*size, 3))).clip(0, 255).astype(np.uint8)
        ).save(file)

        def sample(cache: Path | None) -> tuple[Tensor, ...]:
            generator = np.random.default_rng(int(rng.integers(1000)))
            return geometry(decoded(file, read_image, cache), None, crop, (0.5, 2.0), 0, generator)

        yield compare(f"a sample of a {file.stat().st_size / 1e6:.1f} MB PNG, mapped against decoded", partial(sample, None), partial(sample, Path(place)), pairs)  # fmt: skip


class Timed(Steps):
    """Steps that note how long each batch was waited for."""

    waits: list[float]

    def batches(self, *args: Any, **keys: Any) -> Iterator[Crops]:
        source, self.waits = super().batches(*args, **keys), []
        while True:
            began = time.perf_counter()
            crops = next(source, None)
            self.waits.append(time.perf_counter() - began)
            if crops is None:
                return
            yield crops


def waiting(keys: dict[str, Any] | None = None, steps: int = 24) -> Iterator[Row]:
    """Share of a step that waits for its batch, one loader process beside the training one; the first third does not count."""
    real = {"encoder": "resnet18", "channels": 64, "crop": (96, 96), "batch": 4}
    c = config("mkd", workers=1, steps=steps, **keys or real)
    dataset, split, method = prepare(c)
    made = streams(c, dataset, split.labeled, split.unlabeled, None)
    timed = Timed(made.labeled, made.unlabeled, made.batch)
    rows = train(c, method, make_optimizers(c, method), timed, (0, 0, steps), lambda step: True)
    times, waits = [row["seconds"] for row in rows][steps // 3 :], timed.waits[steps // 3 : steps]
    usual = statistics.median(times)
    low, high = 100 * min(waits) / max(times), 100 * max(waits) / usual
    what, note = "share of a step that waits for its batch, one loader", f"step {1e3 * usual:.3g} ms"
    yield Row(what, 100 * sum(waits) / sum(times), low, high, 2, "%", note)


def evaluation(images: int = 24, size: int = 64, pairs: int = 3) -> Iterator[Row]:
    """mIoU of one network: batches and a bincount on the device, against an image at a time with numpy; the same number."""
    c = config(dataset_options={"train_size": 8, "val_size": images, "size": size})
    dataset, _, method = prepare(c)
    predictor = Predictor.of(c, method.predictors, torch.device("cpu"))
    net, classes = method.predictors["net"], len(dataset.classes)

    @torch.no_grad()
    def plain() -> float:
        net.eval()
        counts = np.zeros((classes, classes), np.int64)
        for id in dataset.val:
            x = dataset.image(id).numpy().astype(np.float32) / 255
            logits = net(normalise(torch.from_numpy(x)[None]))[0].numpy()
            prob = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
            y, label = prob.argmax(0), dataset.label(id).numpy()
            pairs = classes * label[label != 255].astype(int) + y[label != 255]
            counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
        over = counts.sum(0) + counts.sum(1) - counts.diagonal()
        return 100 * float(np.mean(counts.diagonal()[over > 0] / over[over > 0]))

    def ours() -> float:
        return miou(evaluate(predictor, dataset, dataset.val)[0]["net"])

    assert abs(plain() - ours()) < 1e-3, (plain(), ours())
    what = f"evaluation of {images} images of {size} x {size}, against one at a time with numpy"
    yield compare(what, plain, ours, pairs, 3)


def steps(
    keys: dict[str, Any] = REAL, methods: Iterable[str] = tuple(METHODS), pairs: int = 3,
    vit: str = "tu-vit_small_patch16_dinov3",
) -> pd.DataFrame:  # fmt: skip
    """Every method's step beside supervised's and beside as many passes through its first network alone (goal 1.10).

    Last supervised and mkd once more, with DPT on a vision transformer.
    """
    configs = {method: config(method, **keys) for method in methods}
    on_vit = keys | {"arch": "dpt", "encoder": vit}
    configs |= {f"{method}, ViT": config(method, **on_vit) for method in ("supervised", "mkd")}
    return costs(configs, pairs=pairs)


def start(times: int = 3, photos: int = 118_287) -> Iterator[Row]:
    """CPU time of the imports, of a run of one step of MKD on the embedded data set (goal 5 s), and of so many photos."""
    keys = dict(config("mkd", dataset_options={"val_size": 1}, steps=1, quality_images=0))
    yield process("start: imports", "mkd_core.run", times)
    one_step = f"mkd_core.run(mkd_core.RunConfig(**{keys}), quiet=True)"
    yield process("start: a run of one step", one_step, times, 5)
    yield many(photos)


def process(what: str, code: str, times: int, target: float = float("nan")) -> Row:
    """CPU time of a process until it has done `code`: to take down what torch imported takes a second more."""
    seconds, code = [], f"import time, mkd_core; {code}; print(time.process_time(), flush=True)"
    for _ in range(times):
        with tempfile.TemporaryDirectory() as place:
            own = os.environ | {"MKD_RUNS": place}
            seconds.append(float(subprocess.check_output([sys.executable, "-c", code], env=own).split()[-1]))
    return Row(what, statistics.median(seconds), min(seconds), max(seconds), target, "s", "CPU time")


def many(photos: int) -> Row:
    """What lists and the look for missing files cost where there are as many photos as COCO has (goal 2 s)."""
    with tempfile.TemporaryDirectory() as place:
        root, seconds, numbers = Path(place), [], range(photos // 4)
        for folder in "abcd":  # of one file there may be 65,000 links
            save(root / f"{folder}/0.png", np.eye(3, dtype=np.uint8))
            for k in numbers[1:]:
                os.link(root / f"{folder}/0.png", root / f"{folder}/{k}.png")
        for name, folders in (("train", "abc"), ("val", "d")):
            lines = [f"{folder}/{k}.png\ta/0.png\n" for folder in folders for k in numbers]
            (root / f"{name}.txt").write_text("".join(lines))
        c = config(dataset="folder", dataset_options={"classes": 2}, root=place, split="full")
        for _ in range(3):
            began = time.process_time()
            assert not check(*open_data(c), deep=False).problems
            seconds.append(time.process_time() - began)
    what = f"start: lists and files of {photos:,} photos, unopened"
    return Row(what, statistics.median(seconds), min(seconds), max(seconds), 2, "s", "CPU time")


def main() -> None:
    started = time.perf_counter()
    print(f"torch {torch.__version__}, CPU, {torch.get_num_threads()} thread")
    for part in (start, fda, parts, loader, cache, waiting, evaluation, released, checkpointing, growth):
        for row in part():
            span = f"{row.low:,.3g} .. {row.high:,.3g}" if row.low == row.low else ""
            goal = f"  (target {row.target:g}: {row.met})" if row.met else ""
            print(f"{row.what:<75} {row.value:>9,.3g} {row.unit:1} {span:16}{goal}  {row.note}", flush=True)
    frame = steps()
    over = [f"{method} {value:.2f}" for method, value in frame["x passes"].items() if value > 1.10]
    print(f"\n{frame.round(2)}\nmore than 1.10 x its own passes: {', '.join(over) or 'none'}")
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
