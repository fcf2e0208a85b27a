"""explore(run): look at pseudo-labels in JupyterLab, of one run or of several side by side.

The widget around a Study: it moves maps and numbers to the browser, an image layer and a palette PNG over it, whose opacity changes there
without the kernel.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from PIL import Image

from .. import records
from ..data.base import IGNORE
from ..evaluate import QUALITY_THRESHOLD
from .study import (
    HEAT,
    LAYERS,
    MARK,
    VIEWS,
    WRONG,
    Array,
    Prediction,
    Recent,
    Runs,
    Study,
    accuracy_curve,
    by_class,
    image_bytes,
    labeler,
    layer,
    mask_png,
    newest_runs,
    palette_picture,
    percent,
    write_new,
)

NOT_PREDICTED = ("image", "truth", *VIEWS)
MODES = ("side by side", "swipe", "A alone")
SORTS = {
    "file order": ("", 1), "A and B differ most": ("differ", -1), "A least confident": ("confidence", 1), "A most confident": ("confidence", -1),
    "A worst mIoU": ("miou", 1), "A best mIoU": ("miou", -1),
}  # fmt: skip
THUMBNAILS = 12


class Canvas(anywidget.AnyWidget):
    """What the browser draws (widget.js); bytes are PNG or JPEG files."""

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    state = traitlets.Dict().tag(sync=True)
    image_a, image_b, mask_a, mask_b = (traitlets.Bytes().tag(sync=True) for _ in range(4))
    strip: Any = traitlets.List().tag(sync=True)
    opacity = traitlets.Float(0.55).tag(sync=True)
    divider = traitlets.Float(0.5).tag(sync=True)
    isolated = traitlets.Int(-1).tag(sync=True)
    pointer: Any = traitlets.List().tag(sync=True)  # pane, x, y
    pixel = traitlets.Unicode().tag(sync=True)


def guarded(action: Callable[..., None]) -> Callable[..., None]:
    """What is wrong with runs, files and images is said in the widget; the kernel and the controls stay usable."""

    @wraps(action)
    def call(self: Explorer, *args: Any) -> None:
        try:
            action(self, *args)
        except (ValueError, OSError, RuntimeError) as error:
            self.say(str(error))

    return call


def background(task: Coroutine[Any, Any, None]) -> None:
    """Between the kernel's messages where there is a kernel, at once elsewhere."""
    try:
        asyncio.get_running_loop().create_task(task)
    except RuntimeError:
        asyncio.run(task)


@dataclass
class Pane:
    """One pane's controls, and what it shows now."""

    run: widgets.Dropdown
    checkpoint: widgets.SelectionSlider
    source: widgets.Dropdown
    layer: widgets.Dropdown
    image: Array = field(default_factory=lambda: np.zeros((1, 1, 3), np.uint8))
    mask: Array | None = None
    colours: Array = field(default_factory=lambda: np.zeros((1, 3), np.uint8))
    found: Prediction | None = None
    key: Sequence[tuple[str, str]] = ()

    @property
    def place(self) -> tuple[int, str]:
        return self.run.value, self.checkpoint.value


class Explorer(widgets.VBox):
    """The controls about one Canvas. Every number shown is computed here, from the Study, by the functions above."""

    def __init__(self, study: Study, out: str = "runs/explorer"):
        self.study, self.draws, self.search, self.changing = study, 0, 0, False
        self.thumbs = Recent(2_000)
        slider = {"layout": widgets.Layout(width="260px"), "style": {"description_width": "55px"}}
        choice = {"layout": widgets.Layout(width="210px"), "style": {"description_width": "55px"}}
        button = {"layout": widgets.Layout(width="auto")}
        self.set = widgets.Dropdown(options=list(study.sets), description="images", **choice)
        self.order = list(study.sets[self.set.value])
        self.index = widgets.IntSlider(0, 0, len(self.order) - 1, description="image", **slider)
        self.sort = widgets.Dropdown(options=list(SORTS), description="order", **choice)
        self.present = widgets.Dropdown(
            options=[("any class", -1), *zip(study.data.classes, itertools.count())], description="shows", **choice
        )
        self.progress = widgets.IntProgress(0, 0, 1, description="looking", layout=widgets.Layout(width="210px", display="none"))
        self.threshold = widgets.FloatSlider(self._default_threshold(), min=0, max=1, step=0.01, description="T", **slider)
        self.opacity = widgets.FloatSlider(0.55, min=0, max=1, step=0.01, description="opacity", **slider)
        self.mode = widgets.ToggleButtons(options=MODES, style={"button_width": "auto"})
        self.out = widgets.Text(out, description="save to", **choice)
        names = ("previous", "next", "random", "redraw views", "look again", "save view", "save pseudo-label")
        self.buttons = {name: widgets.Button(description=name, **button) for name in names}
        self.panes = [self._make_pane(k) for k in (0, 1)]
        self.canvas = Canvas()
        widgets.jslink((self.opacity, "value"), (self.canvas, "opacity"))

        for control in (self.threshold, self.mode, *(pane.layer for pane in self.panes)):
            control.observe(self.draw, "value")
        for control in (c for pane in self.panes for c in (pane.checkpoint, pane.source)):
            control.observe(self._look, "value")
        for control in (self.set, self.sort, self.present):
            control.observe(self.find, "value")
        for pane in self.panes:
            pane.run.observe(lambda _, pane=pane: self._choose_run(pane), "value")
        self.index.observe(self.draw, "value")
        self.canvas.observe(self._answer, "pointer")
        self.canvas.observe(self.draw, "isolated")
        self.canvas.on_msg(lambda _, message, __: self.do(message.get("command", ""), message.get("id", "")))
        for name, one in self.buttons.items():
            one.on_click(lambda _, name=name: self.do(name))

        row = widgets.Layout(flex_flow="row wrap", align_items="center")
        parts = (
            [self.set, self.index, *(self.buttons[n] for n in names[:3]), self.sort, self.present, self.progress],
            *([*([pane.run] if len(study.names) > 1 else []), pane.source, pane.layer, pane.checkpoint] for pane in self.panes),
            [self.threshold, self.opacity, self.mode, *(self.buttons[n] for n in names[3:5])],
        )
        saving = widgets.Box([self.out, *(self.buttons[n] for n in names[5:])], layout=row)
        super().__init__([*(widgets.Box(part, layout=row) for part in parts), self.canvas, saving])
        self.draw()

    def _default_threshold(self) -> float:
        """The method's own, where it is one of confidence: that of a critic is not."""
        own = self.study.configs[0].options.get("threshold")
        critic = self.study.method(0, [*self.study.checkpoints(0).values()][-1]).critic
        return QUALITY_THRESHOLD if own is None or critic else own

    def _make_pane(self, k: int) -> Pane:
        """A: the labeler of the first run. B: that of the second run, or the other branch of the same one."""
        study, wide = self.study, {"layout": widgets.Layout(width="210px"), "style": {"description_width": "55px"}}
        run = min(k, len(study.names) - 1)
        checkpoints = study.checkpoints(run)
        names = study.predictors(run, [*checkpoints.values()][-1])
        label = labeler(names)
        twin = label.replace("1", "2")
        source = label if k == run else twin if twin in names and twin != label else "truth"
        return Pane(
            widgets.Dropdown(options=list(zip(study.names, itertools.count())), value=run, description=f"{'AB'[k]} run", **wide),
            widgets.SelectionSlider(
                options=list(checkpoints.items()), value=[*checkpoints.values()][-1], description=f"{'AB'[k]} weights",
                layout=widgets.Layout(width="290px"), style={"description_width": "72px"},
            ),
            widgets.Dropdown(options=["image", "truth", *names, *VIEWS], value=source, description=f"{'AB'[k]} shows", **wide),
            widgets.Dropdown(options=LAYERS, description=f"{'AB'[k]} as", **wide),
        )  # fmt: skip

    # What is shown.

    @property
    def id(self) -> str:
        return self.order[self.index.value]

    def say(self, text: str) -> None:
        self.canvas.state = self.canvas.state | {"message": text}

    @guarded
    def draw(self, *_: Any) -> None:
        """The current image in both panes, with every number; nothing while several controls are being changed."""
        if self.changing:
            return
        study, id, threshold = self.study, self.id, round(self.threshold.value, 4)
        image, truth = study.image(id), study.truth(id)
        maps: list[Array | None] = []  # the label map of each pane
        for pane in self.panes:
            found = {} if pane.source.value in NOT_PREDICTED else study.predict(*pane.place, id)
            if found and pane.source.value not in found:
                raise ValueError(f"{study.names[pane.run.value]} has no {pane.source.value}; it has {', '.join(found)}")
            pane.found = found.get(pane.source.value)
            maps.append(pane.found.label if pane.found else truth if pane.source.value == "truth" else None)
        for pane, other in zip(self.panes, maps[::-1], strict=True):
            self._fill(pane, other, id, image, truth, threshold)
        tables = [by_class(p.found, truth, threshold, len(study.data.classes)) if p.found else None for p in self.panes]
        panes = [self._numbers(pane, table, truth, threshold) for pane, table in zip(self.panes, tables, strict=True)]
        agree = "" if maps[0] is None or maps[1] is None else f"A = B on {_text(100 * (maps[0] == maps[1]).mean())} % of the pixels"
        with self.canvas.hold_sync():
            self.canvas.image_a, self.canvas.image_b = (image_bytes(pane.image) for pane in self.panes)
            self.canvas.mask_a, self.canvas.mask_b = (b"" if p.mask is None else mask_png(p.mask, p.colours) for p in self.panes)
            self.canvas.state = {"message": "", "mode": self.mode.value, "panes": panes, "current": id, "agree": agree} | self._legend(
                tables, maps
            )
            self._answer()
        background(self._fill_strip())

    def _numbers(self, pane: Pane, table: dict[str, Array] | None, truth: Array | None, threshold: float) -> dict[str, Any]:
        """Title, summary and accuracy-coverage curve of a pane."""
        shown: dict[str, Any] = {"title": self._title(pane), "numbers": "", "size": pane.image.shape[1::-1], "key": pane.key}
        if pane.found and table:
            shown["numbers"] = f"kept {_text(table['kept'][-1])} %"
            if truth is not None:
                shown["numbers"] += f" · right {_text(table['right'][-1])} % of the kept · mIoU {_text(self.study.miou(pane.found, truth))}"
                points, known = accuracy_curve(pane.found, truth)[:, 1:], truth != IGNORE
                shown["curve"] = np.round(points[~np.isnan(points).any(1)], 2).tolist()
                if (kept := (known & (pane.found.confidence >= threshold)).sum()) > 0:
                    shown["now"] = [float(percent(kept, known.sum())), float(table["right"][-1])]
        return shown

    def _fill(self, pane: Pane, other: Array | None, id: str, image: Array, truth: Array | None, threshold: float) -> None:
        source, name, palette = pane.source.value, pane.layer.value, self.study.palette
        pane.image, pane.mask, pane.colours, pane.key = image, None, palette, ()
        if source in VIEWS:
            pane.image, own, partner = self.study.view(source, *pane.place, id, self.draws)
            if not own.all():
                pane.mask, pane.colours = np.where(own, IGNORE, 0).astype(np.uint8), MARK
                pane.key = [(_colour(MARK[0]), f"CutMix: pasted from {partner}")]
            elif source == "partner":
                pane.key = [("transparent", partner)]
        elif source == "truth":
            pane.mask = truth
            pane.key = [] if truth is not None else [("transparent", "this image has no truth")]
        elif pane.found:
            pane.mask, pane.colours = layer(name, pane.found, other, truth, threshold, palette)
            pane.key = KEYS.get(name, ())
            if (name == "errors" and truth is None) or (name == "A ≠ B" and other is None):
                pane.key = [("transparent", "this image has no truth" if name == "errors" else "the other pane shows no labels")]
        if pane.mask is not None and pane.colours is palette and self.canvas.isolated >= 0:
            pane.mask = np.where(pane.mask == self.canvas.isolated, pane.mask, np.uint8(IGNORE))

    def _title(self, pane: Pane) -> str:
        words = [self.study.names[pane.run.value]] if len(self.study.names) > 1 and pane.source.value not in ("image", "truth") else []
        if len(pane.checkpoint.options) > 1 and pane.found:
            words.append(pane.checkpoint.label)
        return ", ".join([*words, pane.source.value, *([pane.layer.value] if pane.found else [])])

    def _legend(self, tables: list[Any], maps: list[Any]) -> dict[str, Any]:
        """Rows for the classes that a pane shows, the largest first."""
        classes = len(self.study.data.classes)
        nothing = np.full(classes, np.nan)
        counts = [nothing if m is None else percent(np.bincount(m.ravel(), minlength=256)[:classes], m.size) for m in maps]
        columns = [*counts, *(nothing if t is None else t[what] for what in ("kept", "right") for t in tables)]
        size = np.nansum(counts, 0)
        rows = [
            {"index": int(c), "name": self.study.data.classes[c], "colour": _colour(self.study.palette[c]), "cells": [_text(v[c]) for v in columns]}
            for c in np.argsort(-size, kind="stable") if size[c] > 0 or c == self.canvas.isolated
        ]  # fmt: skip
        absent = [name for c, name in enumerate(self.study.data.classes) if not size[c] > 0 and c != self.canvas.isolated]
        return {
            "legend": rows,
            "absent": f"not here: {', '.join(absent) if len(absent) <= 12 else f'{len(absent)} classes'}" if absent else "",
        }

    @guarded
    def _answer(self, *_: Any) -> None:
        """What the pixel under the pointer is, in both panes."""
        if not self.canvas.pointer:
            return
        k, x, y = self.canvas.pointer
        names, truth, parts = self.study.data.classes, self.study.truth(self.id), []
        for letter, pane in zip("AB", self.panes, strict=True):
            if pane.found and y < pane.found.label.shape[0] and x < pane.found.label.shape[1] and self.panes[k].source.value not in VIEWS:
                first, *rest = ((names[c], 100 * p) for c, p in zip(pane.found.classes[:, y, x], pane.found.probs[:, y, x], strict=True))
                parts.append(f"{letter}: {first[0]} {first[1]:.1f} % ({', '.join(f'{n} {p:.1f}' for n, p in rest)})")
        if truth is not None and self.panes[k].source.value not in VIEWS and y < truth.shape[0] and x < truth.shape[1]:
            parts.append(f"truth: {'none' if truth[y, x] == IGNORE else names[truth[y, x]]}")
        self.canvas.pixel = "   ".join([f"x {x}, y {y}", *parts])

    async def _fill_strip(self) -> None:
        """Thumbnails of the images around the current one, one at a time."""
        first = self.index.value // THUMBNAILS * THUMBNAILS
        ids = self.order[first : first + THUMBNAILS]
        if [entry["id"] for entry in self.canvas.strip] == ids:
            return
        strip = []
        for id in ids:
            try:
                strip.append({"id": id, "png": self.thumbs.get(id, partial(self._thumbnail, id))})
            except (ValueError, OSError):  # said when the image is chosen
                continue
            await asyncio.sleep(0)
            if self.order[self.index.value // THUMBNAILS * THUMBNAILS :][:THUMBNAILS] != ids:
                return
        self.canvas.strip = strip

    def _thumbnail(self, id: str) -> bytes:
        picture = Image.fromarray(self.study.data.image(id).permute(1, 2, 0).numpy())
        picture.thumbnail((160, 84))
        return image_bytes(np.asarray(picture))

    # What the controls do.

    @guarded
    def _choose_run(self, pane: Pane) -> None:
        """Other runs have other checkpoints and predictors; what was chosen stays where it exists there."""
        checkpoints = self.study.checkpoints(pane.run.value)
        last, before, source = [*checkpoints.values()][-1], pane.checkpoint.value, pane.source.value
        self.changing = True
        try:
            pane.checkpoint.options = list(checkpoints.items())
            pane.checkpoint.value = before if before in checkpoints.values() else last
            names = self.study.predictors(pane.run.value, pane.checkpoint.value)
            pane.source.options = ["image", "truth", *names, *VIEWS]
            pane.source.value = source if source in pane.source.options else labeler(names)
        finally:
            self.changing = False
        self._look()

    def _look(self, *_: Any) -> None:
        """Draw; where images are ordered or filtered by what a pane predicts, find them anew first."""
        if self.changing or (self.sort.value == "file order" and self.present.value < 0):
            self.draw()
        else:
            self.find()

    def find(self, *_: Any) -> None:
        """Order and filter the images; what needs predictions of them all goes on in the background, image by image, until the next call."""
        self.search += 1
        ids = list(self.study.sets[self.set.value])
        self.progress.layout.display = "none"
        if self.sort.value == "file order" and self.present.value < 0:
            self._take(ids)
        else:
            background(self._find(ids, self.search))

    async def _find(self, ids: list[str], search: int) -> None:
        (attribute, sign), wanted, found = SORTS[self.sort.value], self.present.value, {}
        chosen, faults = [], []
        self.progress.max, self.progress.layout.display = len(ids), "flex"
        try:
            for pane in self.panes:
                names = self.study.predictors(*pane.place)
                chosen.append((*pane.place, pane.source.value if pane.source.value in names else labeler(names)))
            for k, id in enumerate(ids):
                try:
                    found[id] = self.study.score(chosen[0], chosen[1], id)
                except (ValueError, OSError) as error:  # an image that cannot be read
                    faults.append(str(error))
                self.progress.value = k + 1
                await asyncio.sleep(0)
                if search != self.search:
                    return
        except (ValueError, OSError, RuntimeError) as error:
            self.say(f"the search stopped: {error}")
            return
        finally:
            if search == self.search:
                self.progress.layout.display = "none"
        hits = [id for id in found if wanted < 0 or wanted in found[id]["classes"]]
        if attribute:
            hits.sort(key=lambda id: (found[id][attribute] is None, sign * (found[id][attribute] or 0)))
        if hits:
            self._take(hits)
        if faults:
            self.say(f"{len(faults)} of {len(ids)} images are left out, the first: {faults[0]}")
        elif not hits:
            self.say(f"in none of the {len(ids)} {self.set.value} images does A predict {self.study.data.classes[wanted]}")

    def _take(self, ids: list[str]) -> None:
        self.changing = True
        self.order, self.index.value, self.index.max = ids, 0, len(ids) - 1
        self.changing = False
        self.draw()

    @guarded
    def do(self, name: str, id: str = "") -> None:
        """A button, a key or a thumbnail."""
        if name in ("next", "previous"):
            self.index.value = (self.index.value + (1 if name == "next" else -1)) % len(self.order)
        elif name == "random":
            self.index.value = int(np.random.default_rng().integers(len(self.order)))
        elif name == "show" and id in self.order:
            self.index.value = self.order.index(id)
        elif name == "redraw views":
            self.draws += 1
            self.draw()
        elif name == "look again":  # a run that still trains has newer checkpoints
            for pane in self.panes:
                self._choose_run(pane)
        elif name == "save view":
            self._save("view", Image.fromarray(self._view()))
        elif name == "save pseudo-label":
            pane = self.panes[0]
            if pane.found is None:
                raise ValueError("pane A shows no prediction: choose a network there, its pseudo-label is saved")
            picture = palette_picture(pane.found.pseudo_label(round(self.threshold.value, 4)), self.study.palette)
            self._save(
                f"{self.study.folders[pane.run.value].name}-{pane.checkpoint.label}-{pane.source.value}-T{self.threshold.value:.2f}",
                picture,
            )

    def _view(self) -> Array:
        """What the panes show, as one picture of at least 480 rows."""
        a, b = (_blend(pane, self.opacity.value) for pane in self.panes)
        if self.mode.value == "swipe" and a.shape == b.shape:
            cut = round(self.canvas.divider * a.shape[1])
            a = np.concatenate((a[:, :cut], b[:, cut:]), 1)
        elif self.mode.value != "A alone":
            tall = max(len(a), len(b))
            a, b = (np.pad(x, ((0, tall - len(x)), (0, 0), (0, 0)), constant_values=255) for x in (a, b))
            a = np.concatenate((a, np.full((tall, max(1, tall // 48), 3), 255, np.uint8), b), 1)
        return a.repeat(max(1, 480 // len(a)), 0).repeat(max(1, 480 // len(a)), 1)

    def _save(self, stem: str, picture: Image.Image) -> None:
        if not self.out.value.strip():
            raise ValueError("name a folder to save to")
        self.say(f"saved: {write_new(records.folder(self.out.value.strip()), f'{self.id}-{stem}', picture)}")


def _text(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.1f}"


def _colour(rgb: Array) -> str:
    return "#" + bytes(rgb.tolist()).hex()


KEYS = {
    "pseudo-labels": [("transparent", "clear: confidence below T")],
    "errors": [(_colour(WRONG[0]), "wrong, kept"), (_colour(WRONG[1]), "wrong, not kept")],
    "A ≠ B": [(_colour(MARK[0]), "labels differ")],
    "confidence": [(_colour(HEAT[k]), text) for k, text in ((0, "0"), (127, "0.5"), (254, "1"))],
}


def _blend(pane: Pane, alpha: float) -> Array:
    if pane.mask is None:
        return pane.image
    colours = pane.colours[np.minimum(pane.mask, len(pane.colours) - 1)]
    share = np.where(pane.mask == IGNORE, 0, alpha)[..., None]
    return np.round((1 - share) * pane.image + share * colours).astype(np.uint8)


def explore(runs: Runs | None = None, out: str | Path = "runs/explorer", memory: int = 2**29, device: str = "auto") -> Explorer:
    """The explorer of a run or of several runs on the same data, to be shown in a notebook; without runs, of `newest_runs()`.

    runs: run folders or configurations, see Study, which raises ValueError for what cannot be opened. out: the only folder that is written,
    and only by the save buttons. memory: bytes for predictions that are kept.
    """
    return Explorer(Study(newest_runs() if runs is None else runs, memory, device), str(out))
