"""explore(run): look at pseudo-labels in JupyterLab, of one run or of several side by side.

The controls are ipywidgets. Pictures go to the browser as an image and a palette PNG over it
(widget.js), whose opacity changes there without the kernel.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache, partial, wraps
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from .. import records
from ..evaluate import QUALITY_THRESHOLD
from ..records import labeler
from ..suite.predict import indexed
from . import panes
from .panes import LAYERS, SORTS, Choice, Shown, number
from .study import VIEWS, Checkpoint, Runs, Study, newest_runs

BUTTONS = ("previous", "next", "random", "redraw views", "look again", "save view", "save pseudo-label")
THUMBNAILS = 12


class Canvas(anywidget.AnyWidget):
    """What the browser draws (widget.js); bytes are PNG or JPEG files."""

    _esm = Path(__file__).with_suffix(".js")
    _css = Path(__file__).with_suffix(".css")
    state = traitlets.Dict().tag(sync=True)
    image_a, image_b, mask_a, mask_b = (traitlets.Bytes().tag(sync=True) for _ in range(4))
    strip: Any = traitlets.List().tag(sync=True)
    opacity = traitlets.Float(0.55).tag(sync=True)
    pointer: Any = traitlets.List().tag(sync=True)  # pane, x, y
    pixel, progress = (traitlets.Unicode().tag(sync=True) for _ in range(2))


def guarded(action: Callable[..., None]) -> Callable[..., None]:
    """Say in the widget what is wrong with a run or an image; the kernel and the controls stay usable.

    The panes become empty: what they showed before must not be seen, or saved, as what was asked for.
    """

    @wraps(action)
    def call(self: Any, *args: Any) -> None:
        try:
            action(self, *args)
        except (ValueError, OSError, RuntimeError) as error:
            self.shown, self.changing = [], False
            with self.canvas.hold_sync():
                self.canvas.image_a = self.canvas.image_b = self.canvas.mask_a = self.canvas.mask_b = b""
                self.canvas.state, self.canvas.pixel = {"message": str(error)}, ""

    return call


def control(kind: type[Any], name: str, **keys: Any) -> Any:
    """Make a control that shares the width of its row with the others."""
    style = {"description_width": f"{10 + 7 * len(name)}px"}
    layout = widgets.Layout(flex="1 1 130px", width="auto", max_width="340px")
    return kind(description=name, layout=layout, style=style, **keys)


def choose(name: str, options: Iterable[Any], **keys: Any) -> Any:
    return control(widgets.Dropdown, name, options=list(options), **keys)


class Pane:
    """The controls of one pane."""

    def __init__(self, study: Study, k: int):
        """A: the labeler of the first run. B: that of the second run, or the other branch of the same one."""
        self.study, letter, run = study, "AB"[k], min(k, len(study.names) - 1)
        steps = list(study.checkpoints(run).items())
        sources = self.sources(run, steps[-1][1])
        label = labeler(sources[2:])
        twin = label.replace("1", "2")
        source = label if k == run else twin if twin in sources and twin != label else "truth"
        self.run = choose(f"{letter} run", zip(study.names, itertools.count()), value=run)
        self.source = choose(f"{letter} shows", sources, value=source)
        self.layer = choose(f"{letter} as", LAYERS)
        slider = widgets.SelectionSlider
        self.checkpoint = control(slider, f"{letter} weights", options=steps, value=steps[-1][1])
        self.controls = [self.run, self.source, self.layer, self.checkpoint][len(study.names) == 1 :]

    def sources(self, run: int, checkpoint: Checkpoint) -> list[str]:
        views = VIEWS if self.study.configs[run].options.get("boxes") else VIEWS[:-1]
        return ["image", "truth", *self.study.open(run, checkpoint).predictor().names, *views]

    def renew(self) -> None:
        """Offer what the chosen run has now; what was chosen stays where it exists there."""
        step, source, steps = self.checkpoint.label, self.source.value, self.study.checkpoints(self.run.value)
        self.checkpoint.options = list(steps.items())
        self.checkpoint.label = step if step in steps else list(steps)[-1]
        self.source.options = sources = self.sources(self.run.value, self.checkpoint.value)
        self.source.value = source if source in sources else labeler(sources[2:])

    @property
    def choice(self) -> Choice:
        return Choice(self.run.value, self.checkpoint.value, self.source.value, self.layer.value)

    @property
    def title(self) -> str:
        run = "" if self.source.value in ("image", "truth") else self.study.names[self.run.value]
        return ", ".join(filter(None, (run, run and self.checkpoint.label, self.source.value)))


class Explorer(widgets.VBox):
    """The controls above one Canvas. Every number is computed in Python, from the Study."""

    def __init__(self, study: Study, out: str = "runs/explorer"):
        self.study, self.draws, self.changing = study, 0, False
        self.shown: list[Shown] = []  # by pane; empty where nothing could be shown
        self.search: asyncio.Task[None] | None = None
        self.score = lru_cache(None)(partial(panes.score, study))
        self.panes, self.canvas = [Pane(study, k) for k in (0, 1)], Canvas()
        self.set = choose("images", study.sets)
        self.order = study.sets[self.set.value]
        self.index = control(widgets.IntSlider, "image", max=len(self.order) - 1)
        self.sort = choose("order", SORTS)
        self.present = choose("with", [("any class", -1), *zip(study.classes, itertools.count())])
        critic = study.open(*self.panes[0].choice[:2]).method.critic  # its threshold is none of confidence
        T = QUALITY_THRESHOLD if critic else study.configs[0].options.get("threshold", QUALITY_THRESHOLD)
        unit = {"max": 1, "step": 0.01}
        self.threshold = control(widgets.FloatSlider, "T", value=T, **unit)
        self.opacity = control(widgets.FloatSlider, "opacity", value=0.55, **unit)
        self.out = control(widgets.Text, "save to", value=out)
        self.saved = widgets.Label(layout=widgets.Layout(flex="1 1 60px", min_width="0"))
        fixed = widgets.Layout(width="auto", flex="none")
        self.buttons = [widgets.Button(description=name, layout=fixed) for name in BUTTONS]
        self._connect()
        rows: list[list[Any]] = [
            [self.set, self.index, *self.buttons[:3], self.sort, self.present],
            *(pane.controls for pane in self.panes),
            [self.threshold, self.opacity, *self.buttons[3:5], self.out, *self.buttons[5:], self.saved],
        ]
        boxes = [widgets.Box(row) for row in rows]
        for box in boxes:
            box.add_class("mkd-controls")
        super().__init__([*boxes, self.canvas])
        self.add_class("mkd-whole")
        self.draw()

    def _connect(self) -> None:
        widgets.jslink((self.opacity, "value"), (self.canvas, "opacity"))
        for one in (self.index, self.threshold, *(c for pane in self.panes for c in pane.controls[-3:])):
            one.observe(self.draw, "value")
        for one in (self.set, self.sort, self.present):
            one.observe(self.find, "value")
        for pane in self.panes:
            pane.run.observe(lambda _, pane=pane: self._renew(pane), "value")
        for button in self.buttons:
            button.on_click(lambda button: self.do(button.description))
        self.canvas.observe(self._point, "pointer")
        self.canvas.on_msg(lambda _, message, __: self.do(message.get("command", ""), message.get("id", "")))

    @property
    def id(self) -> str:
        return self.order[self.index.value]

    @property
    def T(self) -> float:
        return round(self.threshold.value, 4)

    @guarded
    def draw(self, *_: Any) -> None:
        """Draw the current image in both panes, with every number; nothing while several controls change."""
        if self.changing:
            return
        study, canvas, truth = self.study, self.canvas, self.study.load(self.id)[1]
        choices = [pane.choice for pane in self.panes]
        a, b = self.shown = panes.show(study, self.id, choices, self.T, self.draws)
        said = [panes.describe(shown, truth, self.T, len(study.classes)) for shown in (a, b)]
        note = self.id
        if a.labels is not None and b.labels is not None:
            note += f" · A = B on {number(100 * (a.labels == b.labels).mean())} % of the pixels"
        with canvas.hold_sync():
            canvas.image_a, canvas.image_b = panes.image_bytes(a.image), panes.image_bytes(b.image)
            canvas.mask_a, canvas.mask_b = panes.mask_png(a), panes.mask_png(b)
            canvas.state = {
                "panes": [says | {"title": p.title} for (says, _), p in zip(said, self.panes, strict=True)],
                "legend": panes.legend(study, [table for _, table in said]), "id": self.id, "note": note,
            }  # fmt: skip
            self._point()
        first = self.index.value // THUMBNAILS * THUMBNAILS
        if [entry["id"] for entry in canvas.strip] != (ids := self.order[first : first + THUMBNAILS]):
            canvas.strip = [{"id": id, "png": self._thumbnail(id)} for id in ids]

    def _thumbnail(self, id: str) -> bytes:
        with suppress(ValueError, OSError):  # said when the image itself is chosen
            return panes.image_bytes(self.study.load(id)[0], 84)
        return b""

    def _point(self, *_: Any) -> None:
        k, x, y = self.canvas.pointer or (0, 0, 0)
        if self.shown and self.canvas.pointer:
            (image, truth), view = self.study.load(self.id), self.panes[k].source.value in VIEWS
            inside = x < image.shape[1] and y < image.shape[0] and not view  # the pixels of a view are others
            self.canvas.pixel = panes.pixel(self.study, self.shown, truth, x, y) if inside else ""

    # What the controls do.

    @guarded
    def _renew(self, *panes: Pane) -> None:
        self.changing = True
        for pane in panes:
            pane.renew()
        self.changing = False
        self.draw()

    def find(self, *_: Any) -> None:
        """Order and filter the images. Predicting them all goes on between the kernel's messages."""
        if self.search:
            self.search.cancel()
        try:
            self.search = asyncio.get_running_loop().create_task(self._find())
        except RuntimeError:  # no kernel
            asyncio.run(self._find())

    async def _find(self) -> None:
        """Images that cannot be read are left out."""
        ids, wanted, note = self.study.sets[self.set.value], self.present.value, ""
        what, sign = SORTS[self.sort.value]
        if what or wanted >= 0:
            found: dict[str, Any] = {}
            choices = [pane.choice._replace(layer="") for pane in self.panes]
            note = f"found and ordered by A = {self.panes[0].title}; B = {self.panes[1].title}"
            try:
                for k, id in enumerate(ids):
                    self.canvas.progress = f"predicting image {k + 1:,} of {len(ids):,}"
                    await asyncio.sleep(0)
                    with suppress(ValueError, OSError):
                        found[id] = self.score(id, *choices)
            except RuntimeError as error:
                self.canvas.progress = str(error)
                return
            if left := len(ids) - len(found):
                note += f"; {left} of {len(ids)} are left out: not readable, or with a mask of another size"
            ids = [id for id in found if wanted < 0 or wanted in found[id]["classes"]]
            if what:  # NaN comes last
                ids.sort(key=lambda id: (np.isnan(found[id][what]), sign * found[id][what]))
        self.canvas.progress = note if ids else f"no such image, {note}"
        if ids:
            self.changing = True
            self.order, self.index.value, self.index.max = ids, 0, len(ids) - 1
            self.changing = False
            self.draw()

    def do(self, name: str, id: str = "") -> None:
        """Do what a button, a key or a thumbnail asks for."""
        steps = {"next": 1, "previous": -1, "random": int(np.random.default_rng().integers(len(self.order)))}
        if name in steps:
            self.index.value = (self.index.value + steps[name]) % len(self.order)
        elif name == "show" and id in self.order:
            self.index.value = self.order.index(id)
        elif name == "redraw views":
            self.draws += 1
            self.draw()
        elif name == "look again":  # for new checkpoints of a run that still trains, and a new order
            self._renew(*self.panes)
            if self.sort.value != "file order" or self.present.value >= 0:
                self.find()
        elif name.startswith("save"):
            try:
                self.saved.value = f"saved: {self._save(name)}"
            except (ValueError, OSError) as error:
                self.saved.value = f"not saved: {error}"
            self.saved.tooltip = self.saved.value

    def _save(self, name: str) -> Path:
        """Write what is shown, nothing else; return the new file."""
        folder, pane = self.out.value.strip(), self.panes[0]
        if not self.shown or not folder:
            raise ValueError("name a folder to save to" if self.shown else "the panes show nothing")
        found, stem = self.shown[0].found, "view"
        if name == "save view":
            picture = panes.side_by_side(self.shown, self.opacity.value)
        elif found is None:
            raise ValueError("pane A shows no prediction: choose a network there")
        else:
            run = self.study.folders[pane.run.value].name
            stem = f"{run}-{pane.checkpoint.label}-{pane.source.value}-T{self.T:.2f}"
            picture = indexed(found.pseudo_label(self.T), self.study.palette)
        return panes.write_new(records.folder(folder), f"{self.id}-{stem}", picture)


def explore(runs: Runs | None = None, out: str | Path = "runs/explorer") -> Explorer:
    """Open the explorer of a run, or of several on the same data, to be shown in a notebook.

    runs: run folders or configurations (see Study); None: those of newest_runs().
    out: the only folder that is written, and only by the save buttons.
    """
    return Explorer(Study(newest_runs() if runs is None else runs), str(out))
