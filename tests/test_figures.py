"""Pictures: exact colours, an honest choice of columns, the axes and labels that a reader needs, reproducible files."""

from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from tiny import record

from mkd_core import records
from mkd_core.augment import normalise
from mkd_core.data.base import colormap, visible
from mkd_core.data.cityscapes import Cityscapes
from mkd_core.methods import METHODS
from mkd_core.suite import figures, report

PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
CLASSES = ("none", "red", "blue")


def trained(values, accuracy=80.0, **keys):
    quality = {"kept": 10.0, "accuracy": accuracy, "accuracy_all": 50.0}
    labels = {"student 1": {}, "teacher 1": quality}
    found = [
        {"step": 10 * i, "miou": {"student 1": v}, "pseudo_labels": labels} for i, v in enumerate(values, 1)
    ]
    return record(evaluations=found, **keys)


def test_images_colours_and_overlays():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    expected = image.permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(figures.to_image(image), expected)
    np.testing.assert_allclose(figures.to_image(normalise(image[None].float() / 255)[0]), expected, atol=1e-6)
    colours = figures.colourise(torch.tensor([[0, 1], [2, 255]]), PALETTE)
    np.testing.assert_array_equal(colours[0], [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(colours[1, 0], [0, 0, 1])
    assert np.ptp(colours[1, 1]) == 0 and 0.5 < colours[1, 1, 0] < 1  # a light grey, in no palette
    image = np.full((1, 2, 3), 0.5)
    expected = [[[0.7, 0.3, 0.3], [0.5, 0.5, 0.5]]]
    np.testing.assert_allclose(figures.overlay(image, np.array([[1, 255]]), PALETTE, alpha=0.4), expected)
    for first in ("background", "none"):  # the data set says what is one
        shown = figures.overlay(image, np.array([[0, 1]]), PALETTE, (first, "red", "blue"), alpha=0.4)
        tinted = (shown[0] != image[0]).any(-1)
        assert tinted.tolist() == [first == "none", True]


def lab(colours):
    """CIE L*a*b* of (n, 3) sRGB colours in 0..1, for D65."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.transpose(to_xyz) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def test_dark_classes_are_seen_on_black_and_differ_from_the_others_as_before():
    for palette in (colormap(21)[1:], Cityscapes.palette):
        before, after = (lab(colours / 255) for colours in (palette, visible(palette)))
        assert before[:, 0].min() < 10 and after[:, 0].min() > 25  # lightness, 0 to 100
        pairs = np.triu_indices(len(palette), 1)
        least = [np.linalg.norm(of[:, None] - of, axis=-1)[pairs].min() for of in (before, after)]
        assert least[1] >= least[0] - 1e-9
        assert not (visible(palette) != palette)[before[:, 0] > 30].any()
    for name, black in (("footwear", False), ("background", True)):
        drawn = figures.sheet({"": [np.zeros((2, 2), int)]}, palette=PALETTE, classes=(name, "red", "blue"))
        assert (drawn.axes[0].images[0].get_array().max() == 0) == black


def test_columns_are_gains_losses_and_a_seeded_draw():
    n = 12
    truth = [np.repeat([[1, 2]], 4, 0) for _ in range(n)]
    good, bad = [m.copy() for m in truth], [np.full_like(m, 1) for m in truth]
    first = [bad[i] if i in (3, 5) else good[i] for i in range(n)]  # the second method gains on 3 and 5 ...
    second = [bad[i] if i in (8, 9) else good[i] for i in range(n)]  # ... and loses on 8 and 9
    chosen, scores = figures.pick(truth, first, second, columns=8, seed=0)
    assert sorted(chosen[:2]) == [3, 5] and sorted(chosen[2:4]) == [8, 9] and len(set(chosen)) == 8
    np.testing.assert_allclose(scores[:, 3], [25, 100])  # all "1" on half "1", half "2": IoU 50 and 0
    assert chosen == figures.pick(truth, first, second, columns=8, seed=0)[0]
    assert chosen[4:] != figures.pick(truth, first, second, columns=8, seed=1)[0][4:]


@pytest.mark.parametrize("columns", [1, 4, 9])
def test_figure2_has_the_papers_rows_and_states_its_rule(columns):
    truth = [np.random.default_rng(i).integers(0, 3, (6, 6)) for i in range(5)]
    images = [torch.zeros(3, 6, 6, dtype=torch.uint8)] * 5
    maps = {"co-training": truth, "MKD": truth[::-1]}
    figure = figures.figure2(images, truth, maps, PALETTE, CLASSES, columns=columns)
    shown = min(columns, 5)
    assert [ax.get_ylabel() for ax in figure.axes[::shown]] == ["input", "ground truth", "co-training", "MKD"]
    caption = figure.legends[0].get_title().get_text()
    ruled = "largest gains of MKD over co-training" in caption
    assert ruled == ("at random (seed 0)" in caption) == (columns < 5)
    assert [t.get_text() for t in figure.legends[0].texts] == list(CLASSES)


def runs(*pairs, **keys):
    """Records of (seed, mIoU)."""
    return [record(seed=seed, miou=float(miou), **keys) for seed, miou in pairs]


def of(method, split="random/6", **config):
    return record().config | {"method": method, "split": split} | config


def legend(figure):
    return [t.get_text() for t in figure.legends[0].texts]


def test_curves_show_every_method_with_its_band():
    rows = {"CPS": [trained([40, 50])], "MKD": [trained([40, 60]), trained([50, 70], seed=1)]}
    figure = report.curves(rows)
    titles = ["mIoU (%)", "pixels kept (%)", "accuracy of kept pixels (%)"]
    assert [ax.get_title() for ax in figure.axes] == titles
    drawn = [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]
    assert sorted(tuple(line[:, 1]) for c in drawn for line in c.get_segments()) == [(40, 50), (45, 65)]
    bands = [band.get_xy()[:, 1] for band in figure.axes[0].patches]
    assert any((band.min(), band.max()) == (40, 70) for band in bands)
    assert legend(figure) == ["CPS", "MKD (2 seeds)"]


def test_curves_draw_what_was_measured_and_all_labels_as_the_upper_line():
    once = record(evaluations=[{"step": 1, "miou": {"student 1": 3.0}}])
    assert len(report.curves({"MKD": [once]}).axes) == 1
    # nothing kept: no accuracy
    assert len(report.curves({"MKD": [trained([40, 50], accuracy=None)]}).axes) == 2
    found = legend(report.curves({"MKD": [trained([40, 50]), record(seed=1)], "CPS": [record()]}))
    assert found == ["MKD (1 of 2 seeds)"]
    best = runs((0, 70), (1, 74), config=of("supervised", "full"))
    for figure in (
        report.curves({"MKD": [trained([40, 50], config=of("mkd"))], "all labels": best}),
        report.label_counts({"MKD": {"8": runs((0, 40), config=of("mkd"))}, "all labels": {"8": best}}),
    ):
        assert legend(figure) == ["MKD"] and "all labels" in [t.get_text() for t in figure.axes[0].texts]
        assert any(set(line.get_ydata()) == {72} for line in figure.axes[0].lines)


def test_a_table_has_the_pictures_that_its_records_allow():
    def at(labeled, encoder="resnet50", **keys):
        split = {"name": "s", "sha256": "", "labeled": labeled, "unlabeled": 9}
        return record(split=split, config=record().config | {"encoder": encoder}, **keys)

    counts = [[3, 1], [0, 4]]
    two = [at(92, confusion=counts), at(92, seed=1, confusion=[[4, 0], [0, 4]])]
    mkd = {"92": two, "183": [at(183)], "183 ‡": [at(183)], "none": []}
    cells = {"MKD": mkd, "SupOnly": {"92": [at(92)]}}
    pictures = report.of_table(cells, "92", against="SupOnly")
    assert [*pictures] == ["classes", "confusion", "labels"]
    assert "of SupOnly" in pictures["classes"].axes[0].get_xlabel()
    # of both runs: 1 of 8 pixels of x
    assert "12" in [t.get_text() for t in pictures["confusion"].axes[0].texts]
    assert [*pictures["labels"].axes[0].get_xticks()] == [92, 183]
    with_curves = cells | {"MKD": cells["MKD"] | {"92": [trained([40, 50])]}}
    assert [*report.of_table(with_curves, "92")] == ["curves", "classes"]
    # Other families of lists and other encoders are not joined to a line; a column without runs has no picture.
    assert [*report.of_table(cells, "183 ‡")] == ["classes"]
    assert [*report.of_table({"MKD": {"92": [at(92)], "183": [at(183, "resnet101")]}}, "92")] == ["classes"]
    assert report.of_table(cells, "none") == {}


def test_a_row_has_its_methods_colour_and_no_two_rows_share_one(monkeypatch):
    for name, colour in {"mkd": "#0072b2", "cps": "#d55e00", "supervised": "#8a8a8a"}.items():
        monkeypatch.setattr(METHODS[name], "colour", colour, raising=False)
    rows = {"CPS": "cps", "CPS with CutMix": "cps", "MKD": "mkd", "MKD (released)": "mkd"}
    rows["SupOnly"] = "supervised"
    cells = {row: [record(config=of(method))] for row, method in rows.items()}
    _, colours = report.look(cells | {"all labels": [record(config=of("supervised", "full"))]})
    own = {"CPS": "#d55e00", "MKD": "#0072b2", "SupOnly": "#8a8a8a", "all labels": figures.INK}
    assert own.items() <= colours.items() and len({*map(str, colours.values())}) == 6
    assert report.look(dict(reversed(cells.items())))[1]["SupOnly"] == "#8a8a8a"
    alike = report.look({name: [record(config=of(name))] for name in METHODS})[1]
    assert len({*alike.values()}) == len(METHODS) > len({method.colour for method in METHODS.values()})
    many = report.look({f"row {k}": [record(config=of("mkd"))] for k in range(30)})[1]
    assert len({*map(str, many.values())}) == 30


def test_label_counts_and_costs_stand_where_they_belong():
    at = {n: runs((0, 40 + n), (1, 44 + n), split={"labeled": n, "sha256": "a"}) for n in (8, 16)}
    figure = report.label_counts({"MKD": {"1/8": at[8], "1/16": at[16]}, "not run": {"1/8": []}})
    ax = figure.axes[0]
    (drawn,) = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 2]
    np.testing.assert_allclose(drawn, [[8, 50], [16, 58]])
    assert [*ax.get_xticks()] == [8, 16] and legend(figure) == ["MKD"]
    rows = {name: runs((0, 50 + k), (1, 51 + k)) for k, name in enumerate(("SupOnly", "MKD $a$"))}
    figure = report.cost(rows, {"SupOnly": 1, "MKD $a$": 5.5})
    places = {tuple(xy) for dots in figure.axes[0].collections for xy in dots.get_offsets().round(2).tolist()}
    assert {(1, 50), (1, 51), (1, 50.5), (5.5, 51), (5.5, 52), (5.5, 51.5)} == places
    assert legend(figure) == ["SupOnly", r"MKD \$a\$"]


def test_terms_of_methods_side_by_side():
    rows = [{"step": 1, "term/sup": 2.0, "term/x": 0.0}, {"step": 2, "term/sup": 1.0, "term/x": 1.0}]
    histories = {"a": rows, "b": [{"step": 1, "term/sup": 1.0}]}
    first, second = figures.terms(histories).axes
    drawn = [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in first.lines]
    assert drawn == [("sup", [1, 2], [2, 1]), ("x", [2], [1])]
    assert (first.get_title(), second.get_title(), first.get_yscale()) == ("a", "b", "log")


def test_gains_of_a_class_are_paired_by_seed():
    def iou(first, second):
        return {"iou": [first, second], "classes": ["x", "y"]}

    rows = {
        "SupOnly": [*runs((0, 1), **iou(10, 50)), *runs((1, 1), **iou(30, None))],
        "MKD": [*runs((1, 1), **iou(35, 60)), *runs((0, 1), **iou(20, 40))],
    }

    def dots(figure):
        return [round(x, 6) for drawn in figure.axes[0].collections for x, _ in drawn.get_offsets().tolist()]

    figure = report.class_iou(rows, over="SupOnly")
    assert {7.5, -10} <= {*dots(figure)}  # (20 - 10 + 35 - 30) / 2; the second class exists for seed 0 alone
    assert figure.axes[0].get_xlabel() == "IoU minus that of SupOnly (points)" and legend(figure) == ["MKD"]
    assert {20, 50, 27.5} <= {*dots(report.class_iou(rows))}
    apart = {"SupOnly": {"a": rows["SupOnly"], "b": rows["MKD"]}, "MKD": {"a": rows["MKD"], "b": []}}
    assert dots(report.class_iou(apart, over="SupOnly")) == dots(figure)  # paired in each column
    more = {f"other {k}": rows["MKD"] for k in range(8)} | {"not run": []}
    many = report.class_iou(rows | more, over="SupOnly").axes[0]  # so many can be told apart as a table alone
    assert [t.get_text() for t in many.texts[:2]] == ["7.5", "-10.0"]
    assert many.get_yticklabels()[0].get_text() == "MKD"


def test_names_of_data_are_escaped_and_own_labels_are_mathematics():
    names, classes = [], ["a_$b^$", "y"]
    about = {"iou": [1.0, 2.0], "classes": classes}
    rows = {r"MKD $\nope$": runs((0, 40), (1, 44), **about), "b": runs((0, 3), **about)}
    drawn = (report.seeds(rows), report.class_iou(rows), figures.confusion([[1, 2], [3, 4]], classes))
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        names += [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert r"MKD \$\nope\$" in names and names.count(r"a_\$b^\$") == 2
    own = figures.lines({r"$\gamma$ = 0.9": ([1, 2], [3, 4]), "b": ([1, 2], [4, 5])}, "step $t$", "$m$")
    assert legend(own) == [r"$\gamma$ = 0.9", "b"]  # rendered as a Greek letter: narrower than its words
    plain = figures.lines({r"\$\gamma\$ = 0.9": ([1, 2], [3, 4])}, "step", "m")
    widths = []
    for figure in (own, plain):
        FigureCanvasAgg(figure).draw()
        widths.append(figure.legends[0].texts[0].get_window_extent().width)
    assert widths[0] < 0.8 * widths[1]
    sheet = figures.sheet({"mask $m$": [np.zeros((4, 4), bool)]})
    assert sheet.axes[0].get_ylabel() == "mask $m$"


def test_every_seed_is_shown_and_no_line_joins_methods():
    figure = report.seeds({"SupOnly": runs((0, 40), (1, 44)), "MKD": runs((1, 50), (0, 48)), "not run": []})
    ax = figure.axes[0]
    places = [tuple(xy) for dots in ax.collections for xy in dots.get_offsets().tolist()]
    assert {(40, 0), (44, 0), (48, 1), (50, 1)} <= {*places}
    assert not [line for line in ax.lines if len({*line.get_ydata()}) > 2]
    assert [t.get_text() for t in ax.texts] == ["42.0", "49.0"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["SupOnly", "MKD"]


def test_a_report_leaves_whole_and_reproducible_files(tmp_path, capsys):
    cells = {"MKD": {"92": [trained([40, 50])]}, "SupOnly": {"92": runs((0, 30))}}
    report.report(cells, out=str(tmp_path / "made"), against="SupOnly")
    names = {"records.jsonl", "table.md", "table.html", "table.tex", "curves.png", "classes.png"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    assert records.read_cells(tmp_path / "made/records.jsonl") == cells
    history = [{"step": 1, "loss": 2.0, "term/sup": 2.0}]
    first, second = (figures.save(figures.terms({"": history}), tmp_path / n) for n in ("a.png", "new/b.png"))
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []


def test_long_row_names_and_legends_keep_clear_of_each_other():
    truth = [np.arange(9 * 12).reshape(9, 12) % 11 for _ in range(8)]
    palette, classes = np.zeros((11, 3), np.uint8), [f"class {k}" for k in range(11)]
    maps = {"CPS with CutMix": truth, "MKD (released)": truth}
    for columns in (3, 8):
        images = [torch.zeros(3, 9, 12, dtype=torch.uint8)] * 8
        figure = figures.figure2(images, truth, maps, palette, classes, columns=columns)
        FigureCanvasAgg(figure).draw()
        names = [ax.yaxis.label.get_window_extent() for ax in figure.axes[::columns]]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(names))
        assert min(box.x0 for box in names) > 0
        legend = figure.legends[0].get_window_extent()
        assert min(ax.get_window_extent().y0 for ax in figure.axes) > legend.y1 > legend.y0 >= 0


def test_a_confusion_is_annotated_and_of_many_classes_stays_small():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), CLASSES)
    assert [t.get_text() for t in figure.axes[0].texts] == ["75", "25", "0", "0", "100", "0", "0", "0", "0"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(CLASSES)
    figure = figures.confusion([[[3, 1], [0, 2]], [[1, 3], [0, 0]]], CLASSES[:2])  # two runs
    assert [t.get_text() for t in figure.axes[0].texts] == ["50", "50", "0", "100"]
    figure = figures.confusion(np.ones((150, 150)), [f"class {k}" for k in range(150)])
    FigureCanvasAgg(figure).draw()
    assert max(figure.get_size_inches()) < 15 and not figure.axes[0].texts
    boxes = [t.get_window_extent() for t in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_figure1_names_every_loss_and_network():
    root = ElementTree.parse(records.ROOT / "figures/figure1.svg").getroot()
    found = ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]
    names = {"ℓs", "EMA, Eq. (1)", "= Ls", "+ α Lst", "+ β Lss"}
    for k in "12":
        names |= {f"teacher {k}", f"student {k}", f"ℓθ{k}st", f"ℓθ{k}ss"}
    assert names <= {*found}
