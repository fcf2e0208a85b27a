"""Pictures: exact colours, an honest choice of columns, the axes and labels that a reader needs, reproducible files."""

import numpy as np
import pytest
import torch

from mkd_core import figures
from mkd_core.augment import normalise

PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)
CLASSES = ("none", "red", "blue")


def rows(values, accuracy=80.0):
    quality = {"kept": 10.0, "accuracy": accuracy, "accuracy_all": 50.0}
    labels = {"student 1": {}, "teacher 1": quality}
    found = [{"step": 10 * i, "miou": {"student 1": value}, "pseudo_labels": labels} for i, value in enumerate(values, 1)]
    return [*found, {"step": 99, "loss": 1.0}]  # rows without evaluation are skipped


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
    figure = figures.curves({"CPS": [rows([40, 50])], "MKD": [rows([40, 60]), rows([50, 70])]})
    assert [ax.get_ylabel() for ax in figure.axes] == ["mIoU (%)", "pixels kept (%)", "accuracy of kept pixels (%)"]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), [45, 65])
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (40, 70)
    assert "MKD (2 seeds)" in [t.get_text() for t in figure.legends[0].texts]


def test_curves_survive_what_was_not_measured():
    assert len(figures.curves({"MKD": [[{"step": 1, "miou": {"student 1": 3.0}}]]}).axes) == 1
    nothing_kept = figures.curves({"MKD": [rows([40, 50], accuracy=None)]})
    assert np.isnan(nothing_kept.axes[2].lines[0].get_ydata()).all()


def test_tables_are_annotated():
    figure = figures.confusion(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), CLASSES)
    assert [t.get_text() for t in figure.axes[0].texts] == ["75", "25", "0", "0", "100", "0", "0", "0", "0"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == list(CLASSES)


def test_figure1_names_every_loss_and_network():
    found = " ".join(t.get_text() for t in figures.figure1().axes[0].texts)
    for part in ("teacher 1", "teacher 2", "student 1", "student 2", r"\ell_{st}^{\theta_1}", r"\ell_{ss}^{\theta_2}", r"\ell_s", "EMA"):
        assert part in found


def test_files_are_whole_and_reproducible(tmp_path):
    first, second = (figures.save(figures.terms([{"step": 1, "loss": 2.0, "term/sup": 2.0}]), tmp_path / n) for n in ("a.png", "new/b.png"))
    assert first.read_bytes() == second.read_bytes() and first.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.rglob("*.tmp")] == []
