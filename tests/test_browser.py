"""The explorer in a real browser: JupyterLab and voila, headless Chromium.

Every control is moved; what is seen is compared with Python. The picture in figures/ is made by
`python tests/test_browser.py RUNS PICTURE.png [light|dark]`: the newest runs of the folder RUNS.
"""

import io
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from PIL import Image
from tidy import NOTEBOOKS
from tiny import spread

from mkd_core import checkpoints
from mkd_core.augment import normalise
from mkd_core.config import RunConfig
from mkd_core.data.base import read_image
from mkd_core.data.shapes import PALETTE, Shapes
from mkd_core.explorer.panes import LAYERS, by_class, layer
from mkd_core.explorer.study import Study
from mkd_core.train import build_method

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT, TOKEN, COUNT, T = NOTEBOOKS.parent, "mkd-test", 1_000, 0.6
NAMES = [f"images/{k:04d}.jpg" for k in range(COUNT)]
SLACK = float(os.environ.get("MKD_SLACK", 3))  # the limits are for an idle machine; tests run on busy ones
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
]  # fmt: skip
# voila asks a content network for two icon fonts and does without them
HARMLESS = ("net::ERR_", "favicon")


def make_data(root):
    """1,000 images of 512 x 512 pixels with masks; 5 has none, 6 is grey and smaller, 7 is damaged."""
    data = Shapes(train_size=8, val_size=1)
    for folder in ("images", "masks", "mine"):
        (root / folder).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        place, mask = root / name, root / f"masks/{k:04d}.png"
        if k >= 8:
            os.link(root / NAMES[k % 5], place)
            os.link(root / f"masks/{k % 5:04d}.png", mask)
            continue
        id = data.train[k]
        image, label = data.image(id).permute(1, 2, 0).numpy(), data.label(id).numpy()
        tall, wide = (200, 300) if k == 6 else (512, 512)
        # textures as the networks know them
        picture = Image.fromarray(np.tile(image, (11, 11, 1))[:tall, :wide])
        picture.convert("L" if k == 6 else "RGB").save(place, quality=90)
        Image.fromarray(np.tile(label, (11, 11))[:tall, :wide]).save(mask)
        if k == 7:
            place.write_bytes(place.read_bytes()[:500])
    lines = [name if k == 5 else f"{name} masks/{k:04d}.png" for k, name in enumerate(NAMES)]
    (root / "classes.txt").write_text("\n".join(data.classes))
    (root / "mine/unlabeled.txt").write_text("\n".join(lines[:-8]))
    (root / "mine/labeled.txt").write_text("\n".join(lines[-8:]))


def make_run(runs, root, method, seed, **options):
    """A run of two checkpoints of random networks: logits of mean 0 and deviation 2 in every class."""
    config = RunConfig(
        dataset="folder", root=str(root), split="mine", method=method, options=options, seed=seed,
        dataset_options={"val": "", "palette": PALETTE.tolist()}, encoder="tu-test_resnet", channels=16,
        crop=(64, 64), steps=20, batch=2, device="cpu",
    )  # fmt: skip
    folder = runs / method
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config.model_dump_json())
    image = normalise(read_image(root / NAMES[0])[None] / 255)
    for step, name in ((10, "checkpoint-10.pt"), (20, "checkpoint.pt")):
        drawn = build_method(config.model_copy(update={"seed": seed + step}), 5).eval()
        for net in drawn.predictors.values():
            spread(net, image)
        state = {"step": step, "method": drawn.state_dict(), "optimizers": [], "history": "[]"}
        state |= {"data": "{}", "classes": list(Shapes.classes), "seconds": 0.0, "seconds_training": 0.0}
        checkpoints.write(state, folder, [name])
    return folder


@contextmanager
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: install the extra `test`")
    if not CHROMIUM:
        pytest.skip("needs Chromium: on Debian, apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data, two runs, and the settings of a Jupyter without dialogs."""
    place = tmp_path_factory.mktemp("browser")
    make_data(place / "data")
    make_run(place / "runs", place / "data", "mkd", seed=0, threshold=T)
    make_run(place / "runs", place / "data", "cps", seed=1, boxes=3)
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "doNotDisturbMode": True},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, values in settings.items():
        path = place / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    return place


def environment(place):
    names = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTER_DATA_DIR": "share",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "MKD_RUNS": "runs",
    }  # fmt: skip
    return os.environ | {key: str(place / name) for key, name in names.items()} | {"PYTHONPATH": str(ROOT)}


def notebook(place, name, **parameters):
    """50_explorer with other parameters, as papermill sets them, and a last cell that says when all ran."""
    book = nbformat.read(NOTEBOOKS / "50_explorer.ipynb", as_version=4)
    where = next(k for k, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    book.cells.insert(where + 1, nbformat.v4.new_code_cell(given))
    cell = next(cell for cell in book.cells if cell.source.startswith("explore("))
    cell.source = f"import time\nstart = time.perf_counter()\nshown = {cell.source}\n"
    cell.source += "print(f'opened in {time.perf_counter() - start:.2f} s')\nshown"
    book.cells.append(nbformat.v4.new_code_cell("print('ALL', 'RAN')"))
    nbformat.write(book, place / name)


class Server:
    """A command that serves on a free loopback port; stopped as Ctrl-C would."""

    def __init__(self, place, words, ready, **variables):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [word.format(port=self.port) for word in words]
        self.log = place / f"{words[0]}.log"
        with open(self.log, "w") as log:
            given = {"env": environment(place) | variables, "cwd": place, "stdout": log, "stderr": log}
            self.process = subprocess.Popen([sys.executable, "-m", *words], **given)
        self.url = f"http://127.0.0.1:{self.port}"
        for _ in range(int(200 * SLACK)):
            try:
                urllib.request.urlopen(f"{self.url}/{ready}", timeout=5)
                return
            except OSError as error:
                if getattr(error, "code", 0) in (401, 403):  # it is up and asks for the token
                    return
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.1)
        raise AssertionError(f"{words} is not up")

    def stop(self):
        """Its exit status; every process that it started is gone."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)
        if self.process.poll() is None:
            time.sleep(0.5)
            self.process.send_signal(signal.SIGTERM)  # JupyterLab asks back after the first one
        status = self.process.wait(30)
        left = psutil.wait_procs(children, timeout=10)[1]
        for child in left:
            child.kill()
        assert not left, f"left behind: {left}"
        return status


class Seen:
    """The explorer in a page: its controls by their names, its pictures as arrays, its numbers as text."""

    def __init__(self, page):
        self.page, self.errors = page, []
        page.set_default_timeout(20_000 * SLACK)
        page.on("console", lambda message: self.hear(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.hear(str(error)))

    def hear(self, error):
        if not any(harmless in error for harmless in HARMLESS):
            self.errors.append(error)

    def control(self, name):
        label = self.page.locator("label.widget-label", has_text=re.compile(f"^{re.escape(name)}$"))
        return self.page.locator(":is(.widget-inline-hbox, .widget-hslider)", has=label)

    def choose(self, name, option):
        self.after(lambda: self.control(name).locator("select").select_option(option))

    def slide(self, name, key, times=1):
        self.control(name).locator(".noUi-handle").focus()
        for _ in range(times):
            self.after(lambda: self.page.keyboard.press(key))

    def press(self, name):
        self.after(lambda: self.page.get_by_role("button", name=name, exact=True).click())

    def after(self, action):
        """Do it, and wait until the picture or the text of the canvas changed and the kernel has answered."""
        before = self.page.evaluate(STATE)
        action()
        self.page.wait_for_function(f"before => ({STATE})() !== before", arg=before)
        self.page.wait_for_timeout(60)

    def array(self, selector):
        """The pixels of an <img>, as it was sent."""
        read = "async (i) => [...new Uint8Array(await (await fetch(i.src)).arrayBuffer())]"
        return np.array(Image.open(io.BytesIO(bytes(self.page.locator(selector).evaluate(read)))))

    def mask(self, pane):
        return self.array(f".mkd-pane.mkd-pane{pane} .mkd-mask")

    def text(self, selector):
        return self.page.locator(selector).inner_text()

    def home(self):
        self.after(lambda: self.control("image").locator(".noUi-handle").press("Home"))

    def open_voila(self, server):
        self.page.goto(f"{server.url}/?token={TOKEN}", wait_until="domcontentloaded", timeout=80_000 * SLACK)
        self.page.locator(".mkd-pane0 .mkd-mask").wait_for(timeout=30_000 * SLACK)
        self.page.wait_for_function(STRIP, timeout=20_000 * SLACK)

    def rows(self):
        found = self.page.locator(".mkd-legend tbody tr").all()
        rows = [row.locator("td").all_inner_texts() for row in found]
        return {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}


@pytest.fixture(scope="module")
def lab(place):
    server = Server(place, [
        "jupyterlab", "--no-browser", "--ip=127.0.0.1", "--port={port}", "--ServerApp.port_retries=0",
        "--allow-root", f"--ServerApp.root_dir={place}", f"--IdentityProvider.token={TOKEN}",
        "--ServerApp.password=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ], "api/status")  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="module")
def seen(browser, lab, place):
    """50_explorer on the two runs, all cells run in JupyterLab."""
    runs = [str(place / "runs" / name) for name in ("mkd", "cps")]
    notebook(place, "explorer.ipynb", runs=runs, out=str(place / "out"))
    page = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
    seen = Seen(page)
    page.goto(f"{lab.url}/doc/tree/explorer.ipynb?reset&token={TOKEN}", wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook")
    page.get_by_text("| Idle").wait_for(timeout=20_000 * SLACK)  # anything earlier loses the run
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('li[data-command="runmenu:run-all"]').click()
    done = page.get_by_text("ALL RAN", exact=True)
    failed = page.get_by_text("Traceback (most recent call last)")
    done.or_(failed).first.wait_for(state="attached", timeout=30_000 * SLACK)
    assert not failed.count(), page.locator(".jp-Notebook").inner_text()
    page.wait_for_function(STRIP, timeout=20_000 * SLACK)
    seen.opened = float(re.search(r"opened in ([\d.]+) s", page.locator(".jp-Notebook").inner_text())[1])
    yield seen
    page.close()


@pytest.fixture(scope="module")
def study(place):
    return Study([place / "runs/mkd", place / "runs/cps"])


A, B = (0, "last", "teacher 1"), (1, "last", "student 1")


def predicted(study, network, id):
    run, label, name = network
    return study.predict(run, study.checkpoints(run)[label], id)[name]


def check(seen, study, id, a=A, b=B, threshold=T, layers=("pseudo-labels",) * 2):
    """Masks, class table and summary in the page are those that the Study gives for panes a and b."""
    found, truth = [predicted(study, network, id) for network in (a, b)], study.load(id)[1]
    for k, name in enumerate(layers):
        expected, _ = layer(name, found[k], found[1 - k].label, truth, threshold, study.palette)
        until = time.monotonic() + 3 * SLACK  # an answer may come in parts on a busy machine
        while not (same := np.array_equal(seen.mask(k), expected)) and time.monotonic() < until:
            seen.page.wait_for_timeout(50)
        assert same, (id, name)
    tables = [by_class(one, truth, threshold, 5) for one in found]
    rows = seen.rows()
    assert rows.keys() == {n for c, n in enumerate(study.classes) if any(t["pixels"][c] > 0 for t in tables)}
    for name, cells in rows.items():
        c = study.classes.index(name)
        values = [table[what][c] for what in ("pixels", "kept", "right") for table in tables]
        assert cells == ["–" if np.isnan(v) else f"{v:.1f}" for v in values], name
    for k, table in enumerate(tables):
        text = seen.text(f".mkd-pane.mkd-pane{k} small")
        assert f"kept {table['kept'][-1]:.1f} %" in text
        assert ("right" in text) == (truth is not None)
    assert f"A = B on {100 * (found[0].label == found[1].label).mean():.1f} %" in seen.text(".mkd-note")


def test_opens_a_thousand_images_at_once(seen, study):
    print(f"\na set of {len(study.sets['unlabeled']):,} images opened in {seen.opened:.2f} s")
    assert len(study.sets["unlabeled"]) == COUNT - 8 and seen.opened < 3 * SLACK
    check(seen, study, study.sets["unlabeled"][0])
    rows = seen.page.locator(".mkd-controls").all()
    heights = [row.bounding_box()["height"] for row in rows]
    assert len(rows) == 4 and max(heights) < 45, f"a row wraps at 1300 pixels: {heights}"
    for part in (".mkd-curve", ".mkd-legend"):
        box = seen.page.locator(part).bounding_box()
        assert box["x"] + box["width"] < 1300 and box["width"] > 250
    assert not seen.errors


def test_threshold_layers_and_predictors(seen, study):
    id = study.sets["unlabeled"][0]
    seen.slide("T", "ArrowLeft", 3)
    seen.choose("A shows", "mean")
    for name in list(LAYERS)[1:]:
        seen.choose("A as", name)
        check(seen, study, id, a=(0, "last", "mean"), threshold=T - 0.03, layers=(name, "pseudo-labels"))
    seen.choose("A shows", "truth")
    assert np.array_equal(seen.mask(0), study.load(id)[1])
    seen.choose("A shows", "weak view")
    seen.choose("B shows", "CutMix")
    seen.press("redraw views")
    for pane, name in enumerate(("weak view", "CutMix")):
        assert np.array_equal(seen.array(f".mkd-pane{pane} .mkd-image"), study.views(pane, id, 1)[name])
    seen.choose("A shows", "teacher 1")
    seen.choose("B shows", "student 1")
    seen.choose("A as", "pseudo-labels")
    seen.slide("T", "ArrowRight", 3)
    check(seen, study, id)


def test_images_are_reached_by_slider_buttons_keys_and_thumbnails(seen, study):
    ids = study.sets["unlabeled"]
    seen.slide("image", "ArrowRight", 2)
    check(seen, study, ids[2])
    seen.press("next")
    check(seen, study, ids[3])
    seen.press("previous")
    for key, k in (("ArrowLeft", 1), ("ArrowRight", 2)):
        seen.page.locator(".mkd-explorer").focus()
        seen.after(lambda key=key: seen.page.keyboard.press(key))
        check(seen, study, ids[k])
    seen.after(lambda: seen.page.locator(".mkd-strip button").nth(6).click())
    assert seen.array(".mkd-pane0 .mkd-image").shape[:2] == (200, 300)  # grey and of another size
    check(seen, study, ids[6])
    assert seen.page.locator(".mkd-strip button.mkd-on").get_attribute("title") == ids[6]
    seen.press("random")
    seen.page.locator(".mkd-explorer").focus()
    seen.after(lambda: seen.page.keyboard.press("r"))
    assert seen.page.locator(".mkd-strip button.mkd-on").get_attribute("title") in ids
    seen.home()
    check(seen, study, ids[0])


def test_an_image_without_truth_and_a_damaged_one(seen, study, place):
    ids = study.sets["unlabeled"]
    seen.slide("image", "ArrowRight", 5)
    check(seen, study, ids[5])
    seen.choose("A as", "errors")
    assert "no truth" in seen.text(".mkd-pane.mkd-pane0 .mkd-key")
    assert seen.page.locator(".mkd-curve").is_hidden()
    seen.choose("A as", "pseudo-labels")
    seen.slide("image", "ArrowRight", 2)
    assert "0007.jpg: not a readable picture" in seen.text(".mkd-message")
    assert seen.page.locator(".mkd-middle").is_hidden(), "nothing of the image before is left"
    seen.page.get_by_role("button", name="save pseudo-label").click()
    seen.page.get_by_text("not saved: the panes show nothing").wait_for()
    assert not (place / "out").exists()
    seen.slide("image", "ArrowRight")
    check(seen, study, ids[8])
    assert seen.page.locator(".mkd-message").is_hidden()
    seen.home()


def test_a_pixel_is_read_held_and_enlarged(seen, study):
    id = study.sets["unlabeled"][0]
    found, picture = predicted(study, A, id), seen.page.locator(".mkd-pane0 .mkd-picture")
    box = picture.bounding_box()

    def at(x, y):
        return {"x": x * box["width"], "y": y * box["height"]}

    def read():
        return tuple(map(int, re.match(r"x (\d+), y (\d+)", seen.text(".mkd-readout")).groups()))

    seen.after(lambda: picture.hover(position=at(0.3, 0.6)))
    x, y = read()
    assert abs(x - 0.3 * 512) < 3 and abs(y - 0.6 * 512) < 3
    values = zip(found.classes[:, y, x], found.probs[:, y, x], strict=True)
    parts = [f"{study.classes[c]} {100 * p:.1f}" for c, p in values]
    assert f"A: {parts[0]} % ({parts[1]}, {parts[2]})" in seen.text(".mkd-readout")
    assert f"truth: {study.classes[study.load(id)[1][y, x]]}" in seen.text(".mkd-readout")
    seen.after(lambda: picture.click(position=at(0.2, 0.2)))
    seen.page.wait_for_timeout(300 * SLACK)  # the way there and the click are told one after the other
    held = seen.text(".mkd-readout")
    picture.hover(position=at(0.8, 0.8))
    seen.page.wait_for_timeout(300)
    assert seen.text(".mkd-readout") == held
    seen.after(lambda: picture.click(position=at(0.8, 0.8)))
    seen.after(lambda: picture.dblclick(position=at(0.5, 0.5)))
    seen.after(lambda: picture.hover(position=at(0.9, 0.3)))
    x, y = read()  # four times as large about the middle
    assert abs(x - (0.5 + 0.1) * 512) < 3 and abs(y - (0.5 - 0.05) * 512) < 3
    seen.after(lambda: picture.dblclick(position=at(0.5, 0.5)))
    seen.after(lambda: picture.hover(position=at(0.9, 0.3)))
    assert abs(read()[0] - 0.9 * 512) < 3


def test_opacity_needs_no_kernel(seen):
    seen.control("opacity").locator(".noUi-handle").focus()
    before = float(seen.page.locator(".mkd-pane0 .mkd-mask").evaluate("e => getComputedStyle(e).opacity"))
    seen.page.keyboard.press("ArrowLeft")
    now = "getComputedStyle(document.querySelector('.mkd-mask')).opacity"
    seen.page.wait_for_function(f"before => Math.abs({now} - before + 0.01) < 1e-6", arg=before)


def test_the_curve_is_accuracy_against_coverage_and_its_dot_is_now(seen, study):
    """Points in the drawing's units against those of the kernel's own function."""
    id = study.sets["unlabeled"][0]
    found, truth = predicted(study, A, id), study.load(id)[1]
    known = truth != 255
    right = (found.label == truth)[known]
    for presses in (0, 4):
        seen.slide("T", "ArrowLeft", presses)
        kept = (found.confidence >= np.float32(T - 0.01 * presses))[known]
        drawn = seen.page.locator(".mkd-curve path.pane0").get_attribute("d")
        points = np.array([pair.split() for pair in re.split("[ML]", drawn)[1:]], float)
        assert abs(points[:, 0].max() - 36 - 252) < 0.2, "at threshold 0 every pixel is kept"
        low = float(seen.page.locator(".mkd-curve text[text-anchor=end]").first.text_content())
        dot = seen.page.locator(".mkd-curve circle.pane0")
        x, y = (float(dot.get_attribute(name)) for name in ("cx", "cy"))
        assert abs((x - 36) / 2.52 - 100 * kept.mean()) < 0.1
        assert abs(100 - (y - 14) * (100 - low) / 136 - 100 * right[kept].mean()) < 0.1
        assert np.abs(points - (x, y)).max(1).min() < 8, "the dot lies on the curve"
    seen.slide("T", "ArrowRight", 4)


def test_ordering_leaves_the_kernel_answering(seen, study):
    seen.choose("images", "labeled")
    ids = study.sets["labeled"]
    differ = {i: (predicted(study, A, i).label != predicted(study, B, i).label).mean() for i in ids}
    order = sorted(ids, key=lambda i: -differ[i])
    seen.control("order").locator("select").select_option("A and B differ most")
    titles = "[...document.querySelectorAll('.mkd-strip button')].map((b) => b.title)"
    seen.page.wait_for_function(f"ids => {titles}.join() === ids.join()", arg=order)
    seen.page.wait_for_timeout(100)
    seen.slide("A weights", "ArrowLeft")  # another checkpoint is shown at once, the order waits
    check(seen, study, order[0], a=(0, "step 10", "teacher 1"))
    seen.slide("A weights", "ArrowRight")
    seen.control("images").locator("select").select_option("unlabeled")  # hundreds of images
    seen.page.get_by_text("predicting image").wait_for()
    seen.slide("T", "ArrowLeft", 2)
    assert "predicting image" in seen.text(".mkd-progress")
    seen.control("order").locator("select").select_option("file order")
    seen.page.wait_for_function("document.querySelector('.mkd-progress').textContent === ''")
    seen.page.wait_for_timeout(300)
    check(seen, study, study.sets["unlabeled"][0], threshold=T - 0.02)


def test_new_pixels_come_fast(seen):
    """Median time from a key press to the decoded mask, predictions kept, two panes of 512 x 512 pixels."""
    times = {}
    for name, keys in {"image": ("ArrowRight", "ArrowLeft"), "T": ("ArrowLeft", "ArrowRight")}.items():
        seen.slide(name, keys[0])
        seen.slide(name, keys[1])
        handle = seen.control(name).locator(".noUi-handle")
        times[name] = [handle.evaluate(STOPWATCH, keys[k % 2]) for k in range(21)]
        print(f"\n{name} slider: median {statistics.median(times[name]):.0f} ms")
    assert all(statistics.median(t) < 100 * SLACK for t in times.values())
    assert not seen.errors


def voila(place, runs, *words):
    """The notebook as `make viewer` serves it."""
    return Server(place, [
        "voila", str(NOTEBOOKS / "50_explorer.ipynb"), "--no-browser", "--Voila.ip=127.0.0.1",
        "--port={port}", f"--Voila.token={TOKEN}", *words,
    ], "", MKD_RUNS=str(runs))  # fmt: skip


def test_voila_serves_the_explorer_alone(browser, place):
    """The notebook as it is, without any run: it trains its own, shows it, and leaves no process behind."""
    (place / "empty").mkdir()
    server = voila(place, place / "empty")
    try:
        process = psutil.Process(server.process.pid)
        for one in (process, *process.children(recursive=True)):
            listening = {c.laddr.ip for c in one.net_connections("inet") if c.status == "LISTEN"}
            assert listening <= {"127.0.0.1"}
        page = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
        page.goto(server.url)
        assert "token" in page.content().lower(), "it asks for it"
        assert not page.locator(".mkd-explorer").count()
        seen = Seen(page)
        seen.open_voila(server)
        assert page.locator("h1").count() and not page.locator("h1").first.is_visible(), "alone"
        study = Study(next((place / "empty").glob("*/")))
        a, b = ((0, "last", f"teacher {k}") for k in (1, 2))
        check(seen, study, study.sets["unlabeled"][0], a, b, threshold=0.95)
        seen.slide("image", "ArrowRight")
        check(seen, study, study.sets["unlabeled"][1], a, b, threshold=0.95)
        assert not seen.errors
        page.close()
    finally:
        server.stop()


STRIP = "document.querySelectorAll('.mkd-strip img').length === 12"
STATE = """() => { const e = document.querySelector(".mkd-explorer");
    return [...e.querySelectorAll("img")].map((i) => i.src).join() + e.innerText; }"""
STOPWATCH = """(handle, key) => new Promise((done) => {
    const root = document.querySelector(".mkd-explorer"), start = performance.now();
    const stop = (_, observer) => { observer.disconnect(); done(performance.now() - start); };
    new MutationObserver(stop).observe(root, { attributeFilter: ["data-drawn"] });
    handle.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
})"""


def main(runs, picture, theme="light"):
    """Make the picture of the explorer on the newest runs of a folder."""
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        server = voila(Path(place), Path(runs).resolve(), f"--theme={theme}")
        try:
            seen = Seen(browser.new_context(viewport={"width": 1300, "height": 900}).new_page())
            seen.open_voila(server)
            seen.page.wait_for_timeout(500)
            seen.page.locator(".mkd-whole").screenshot(path=picture)
        finally:
            server.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
