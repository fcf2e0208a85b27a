"""Pictures: exact colours, an honest choice of columns, the axes and labels that a reader needs, reproducible files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from tiny import record

from mkd_core.augment import normalise
from mkd_core.suite import figures

PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
CLASSES = ("none", "red", "blue")


def trained(values, accuracy=80.0, **keys):
    quality = {"kept": 10.0, "accuracy": accuracy, "accuracy_all": 50.0}
    labels = {"student 1": {}, "teacher 1": quality}
    found = [{"step": 10 * i, "miou": {"student 1": value}, "pseudo_labels": labels} for i, value in enumerate(values, 1)]
    return record(evaluations=found, **keys)


def test_an_image_survives_normalisation():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    expected = image.permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(figures.to_image(image), expected)
    np.testing.assert_allclose(figures.to_image(normalise(image[None].float() / 255)[0]), expected, atol=1e-6)


def test_colours_are_the_palette_and_ignored_pixels_are_grey():
    colours = figures.colourise(torch.tensor([[0, 1], [2, 255]]), PALETTE)
    np.testing.assert_array_equal(colours[0], [[0, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(colours[1, 0], [0, 0, 1])
    assert np.ptp(colours[1, 1]) == 0 and 0.5 < colours[1, 1, 0] < 1  # a light grey, in no palette


def test_overlay_blends_classes_and_leaves_ignored_pixels():
    image = np.full((1, 2, 3), 0.5)
    np.testing.assert_allclose(figures.overlay(image, np.array([[1, 255]]), PALETTE, alpha=0.4), [[[0.7, 0.3, 0.3], [0.5, 0.5, 0.5]]])


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
    figure = figures.figure2(images, truth, {"co-training": truth, "MKD": truth[::-1]}, PALETTE, CLASSES, columns=columns)
    shown = min(columns, 5)
    assert [ax.get_ylabel() for ax in figure.axes[::shown]] == ["input", "ground truth", "co-training", "MKD"]
    assert "largest gains of MKD over co-training" in figure.texts[-1].get_text() and "at random (seed 0)" in figure.texts[-1].get_text()
    assert [t.get_text() for t in figure.legends[0].texts] == list(CLASSES)


def test_curves_show_every_method_with_its_band():
    figure = figures.curves({"CPS": [trained([40, 50])], "MKD": [trained([40, 60]), trained([50, 70])]})
    assert [ax.get_ylabel() for ax in figure.axes] == ["mIoU (%)", "pixels kept (%)", "accuracy of kept pixels (%)"]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [45, 65])
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (40, 70)
    assert "MKD (2 seeds)" in [t.get_text() for t in figure.legends[0].texts]


def test_curves_survive_what_was_not_measured():
    assert len(figures.curves({"MKD": [record(evaluations=[{"step": 1, "miou": {"student 1": 3.0}}])]}).axes) == 1
    nothing_kept = figures.curves({"MKD": [trained([40, 50], accuracy=None)]})
    assert np.isnan(nothing_kept.axes[2].lines[0].get_ydata()).all()
    some = figures.curves({"MKD": [trained([40, 50]), record()]})  # one of a version that kept no evaluations
    assert "MKD (1 of 2 seeds)" in [t.get_text() for t in some.legends[0].texts]


def test_a_table_has_the_pictures_that_its_records_allow():
    def at(labeled, encoder="resnet50", **keys):
        split = {"name": "s", "sha256": "", "labeled": labeled, "unlabeled": 9}
        return record(split=split, config=record().config | {"encoder": encoder}, **keys)

    counts = [[3, 1], [0, 4]]
    cells = {
        "MKD": {"92": [at(92, confusion=counts), at(92, confusion=[[4, 0], [0, 4]])], "183": [at(183)], "183 ‡": [at(183)], "none": []},
        "SupOnly": {"92": [at(92)]},
    }
    pictures = figures.of_table(cells, "92", against="SupOnly")
    assert [*pictures] == ["classes", "confusion", "labels"]
    assert "minus SupOnly" in pictures["classes"].axes[0].get_xlabel()
    assert "12" in [t.get_text() for t in pictures["confusion"].axes[0].texts]  # of both runs: 1 of 8 pixels of x
    assert [t.get_text() for t in pictures["labels"].axes[0].get_xticklabels()] == ["92", "183"]
    assert [*figures.of_table(cells | {"MKD": cells["MKD"] | {"92": [trained([40, 50])]}}, "92")] == ["curves", "classes"]
    # Other families of lists and other encoders are not joined to a line; a column without runs has no picture.
    assert [*figures.of_table(cells, "183 ‡")] == ["classes"]
    assert [*figures.of_table({"MKD": {"92": [at(92)], "183": [at(183, "resnet101")]}}, "92")] == ["classes"]
    assert figures.of_table(cells, "none") == {}


METHODS = ["SupOnly", "MT", "CutMix-Seg", "CPS", "CPS with CutMix", "MKD", "MKD (released)", "CCT", "GCT", "VAT", "AdvSemSeg", "PseudoSeg", "PC2Seg",
           "ST++", "PS-MT", "U2PL", "SimpleBaseline", "FixMatch", "UniMatch"]  # fmt: skip


def test_a_method_looks_the_same_in_every_figure_and_like_no_other():
    every = figures.looks([*METHODS, "mine", "+ mutual MT"])
    assert len({tuple(look.values()) for look in every.values()}) == 21
    for some in (["MKD", "SupOnly"], ["mine", "UniMatch", "CPS"]):
        found = figures.looks(some)
        assert [*found] == some and all(found[name] == every[name] for name in some if name in METHODS)
    assert len({look["color"] for look in figures.looks(METHODS[:7]).values()}) == 7
    both = figures.looks(["CPS", "co-training"])  # two names of one method
    assert both["CPS"] != both["co-training"]


def runs(*pairs, **keys):
    """Records of (seed, mIoU)."""
    return [record(seed=seed, miou=float(miou), **keys) for seed, miou in pairs]


def labels_of(figure):
    """Extents of the names at the right, in pixels, top first."""
    FigureCanvasAgg(figure).draw()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without the leader
    return sorted(boxes, key=lambda box: -box.y0)


def test_label_counts_joins_means_over_columns():
    cells = {
        "MKD": {f"1/{n}": runs((0, 40 + n), (1, 44 + n), split={"labeled": n, "sha256": "a"}) for n in (8, 16)},
        "not run": {"1/8": []},
    }
    ax = figures.label_counts(cells).axes[0]
    dots, means = ax.lines
    assert [*means.get_xdata()] == [8, 16] and [*means.get_ydata()] == [50, 58]
    assert sorted(dots.get_ydata()) == [48, 52, 56, 60] and ax.get_xscale() == "log"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["8", "16"] and [t.get_text() for t in ax.texts] == ["MKD"]


def test_cost_stands_at_the_time_given_and_names_do_not_overlap():
    rows = {name: runs((0, 50 + k % 3), (1, 51)) for k, name in enumerate(METHODS)}
    figure = figures.cost(rows, {name: 1.5 * k for k, name in enumerate(METHODS, 1)})
    means = figure.axes[0].lines[1::2]
    assert [line.get_xdata()[0] for line in means] == pytest.approx([1.5 * k for k in range(1, 20)])
    assert [line.get_ydata()[0] for line in means[:3]] == [50.5, 51, 51.5]
    boxes = labels_of(figure)
    assert len(boxes) == 19 and all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


def test_terms_of_methods_side_by_side():
    histories = {"a": [{"step": 1, "loss": 3.0, "term/sup": 2.0, "term/x": 0.0}, {"step": 2, "loss": 2.0, "term/sup": 1.0, "term/x": 1.0}],
                 "b": [{"step": 1, "loss": 1.0, "term/sup": 1.0}]}  # fmt: skip
    first, second = figures.terms_of(histories, across=2).axes
    assert [(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in first.lines] == [
        ("sup", [1, 2], [2, 1]),
        ("x", [2], [1]),
    ]
    assert (first.get_title(), second.get_title(), first.get_yscale()) == ("a", "b", "log")


def test_gains_of_a_class_are_paired_by_seed():
    def iou(first, second):
        return {"iou": [first, second], "classes": ["x", "y"]}

    rows = {
        "SupOnly": [*runs((0, 1), **iou(10, 50)), *runs((1, 1), **iou(30, None))],
        "MKD": [*runs((1, 1), **iou(35, 60)), *runs((0, 1), **iou(20, 40))],
    }
    ax = figures.class_iou(rows, over="SupOnly").axes[0]
    assert [*ax.lines[0].get_xdata()] == [7.5, -10]  # (20 - 10 + 35 - 30) / 2; the second class exists for seed 0 alone
    assert ax.get_xlabel() == "IoU minus SupOnly's (points)" and len(ax.lines) == 2  # MKD and the zero
    assert [*figures.class_iou(rows).axes[0].lines[0].get_xdata()] == [20, 50]
    more = {f"other {k}": rows["MKD"] for k in range(8)} | {"not run": []}
    many = figures.class_iou(rows | more, over="SupOnly").axes[0]  # so many can be told apart as a table alone
    assert [t.get_text() for t in many.texts[:2]] == ["7.5", "-10.0"] and many.get_yticklabels()[0].get_text() == "MKD"


def test_dollars_in_names_are_dollars():
    rows = {
        r"MKD $\nope$": runs((0, 40), (1, 44), iou=[1.0, 2.0], classes=["a_$b^$", "y"]),
        "b": runs((0, 3), iou=[1.0, 2.0], classes=["x", "y"]),
    }
    names = []
    for figure in (figures.seeds(rows), figures.class_iou(rows), figures.confusion([[1, 2], [3, 4]], ["a_$b^$", "y"])):
        FigureCanvasAgg(figure).draw()
        names += [t.get_text() for t in figure.axes[0].get_yticklabels()]
    FigureCanvasAgg(figures.lines({r"a $\nope$": ([1, 2], [3, 4])}, "x", "y")).draw()
    assert r"MKD \$\nope\$" in names and names.count(r"a_\$b^\$") == 2


def test_a_confusion_of_many_classes_stays_small():
    figure = figures.confusion(np.ones((150, 150)), [f"class {k}" for k in range(150)])
    FigureCanvasAgg(figure).draw()
    assert max(figure.get_size_inches()) < 15 and not figure.axes[0].texts
    boxes = [t.get_window_extent() for t in figure.axes[0].get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_every_seed_is_shown_and_joined_to_itself():
    ax = figures.seeds({"SupOnly": runs((0, 40), (1, 44)), "MKD": runs((1, 50), (0, 48)), "not run": []}).axes[0]
    joined, dots = ax.lines[:2], ax.lines[2:]
    assert [[*line.get_xdata()[:2]] for line in joined] == [[40, 48], [44, 50]]
    assert [*dots[0].get_xdata()] == [40, 44] and [*dots[1].get_xdata()] == [42, 42]
    assert [t.get_text() for t in ax.texts] == ["42.0", "49.0"] and [t.get_text() for t in ax.get_yticklabels()] == [
        "SupOnly",
        "MKD",
        "not run",
    ]


def test_long_row_names_and_legends_keep_clear_of_each_other():
    truth = [np.arange(9 * 12).reshape(9, 12) % 11 for _ in range(8)]
    palette, classes = np.zeros((11, 3), np.uint8), [f"class {k}" for k in range(11)]
    maps = {"CPS with CutMix": truth, "MKD (released)": truth}
    for columns in (3, 8):
        figure = figures.figure2([torch.zeros(3, 9, 12, dtype=torch.uint8)] * 8, truth, maps, palette, classes, columns=columns)
        FigureCanvasAgg(figure).draw()
        names = [ax.yaxis.label.get_window_extent() for ax in figure.axes[::columns]]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(names)) and min(box.x0 for box in names) > 0
        legend, caption = figure.legends[0].get_window_extent(), figure.texts[-1].get_window_extent()
        pictures = min(ax.get_window_extent().y0 for ax in figure.axes)
        assert pictures > legend.y1 > legend.y0 > caption.y1 > caption.y0 > 0


def test_tables_are_annotated():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), CLASSES)
    assert [t.get_text() for t in figure.axes[0].texts] == ["75", "25", "0", "0", "100", "0", "0", "0", "0"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(CLASSES)
    figure = figures.confusion([[[3, 1], [0, 2]], [[1, 3], [0, 0]]], CLASSES[:2])  # two runs
    assert [t.get_text() for t in figure.axes[0].texts] == ["50", "50", "0", "100"]


def test_figure1_names_every_loss_and_network():
    found = " ".join(t.get_text() for t in figures.figure1().axes[0].texts)
    for part in ("teacher 1", "teacher 2", "student 1", "student 2", r"\ell_{st}^{\theta_1}", r"\ell_{ss}^{\theta_2}", r"\ell_s", "EMA"):
        assert part in found


def test_files_are_whole_and_reproducible(tmp_path):
    first, second = (figures.save(figures.terms([{"step": 1, "loss": 2.0, "term/sup": 2.0}]), tmp_path / n) for n in ("a.png", "new/b.png"))
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
