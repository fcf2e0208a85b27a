"""Commands that run no notebook: one's own photos, the check of data, trained runs at work, lists of what there is."""

import argparse
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

Words = argparse.Namespace


def add_commands(command: Callable[..., Any]) -> None:
    add = command(_prepare, "my_photos --classes wall,window,door --group-by 8")
    _add_folder(add)
    add("--test", type=float, default=0.0, metavar="SHARE", help="of the photos with masks, for test.txt")
    add("--labeled", default="", help="1/4, 40 or all with masks (default: all; 1/4 where all have one)")
    add("--group-by", default="", metavar="N|REGEX", help="equal first N letters, or match, stay together")
    add("--colours", default="", metavar="FILE", help="lines 'r g b name' (default: a table in the folder)")
    add("--images", default="", metavar="DIR", help="folder of the photos, where its name does not tell")
    add("--masks", default="", metavar="DIR", help="folder of the masks, where its name does not tell")
    add("--val", type=float, default=0.2, metavar="SHARE", help="for val.txt (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the draws")
    add("--overwrite", action="store_true", help="prepare anew what is prepared")
    add = command(_train, "my_photos --quick")
    _add_folder(add)
    listed: Any = {"default": ("supervised", "mkd"), "type": lambda text: text.split(",")}
    add("--methods", help="default: supervised,mkd; mkd methods lists all", **listed)
    add("--quick", action="store_true", help="few steps, to see that all works")
    add = command(_check, "voc_aug --root VOCdevkit/VOC2012 --split cps/1_16")
    add("dataset", help="shapes, folder, voc, voc_aug, cityscapes, coco")
    add("pairs", nargs="*", metavar="key=value", help="options of the data set: classes=11 val=test.txt")
    add("--root", default="", help="folder of the data set")
    add("--split", default="random/1_16", help="labeled images (default: %(default)s)")
    add("--seed", type=int, default=0, help="of a random split")
    add("--quick", action="store_true", help="lists and file names only, open nothing")
    add("--download", action="store_true", help="fetch and verify the data first (voc, voc_aug)")
    add = command(_predict, "runs/my_run photos/ --out predictions")
    _add_predictor(add)
    add("images", nargs="*", metavar="IMAGE", help="files of any size, or folders with pictures below them")
    _add_output(add)
    add = command(_pseudo_label, "runs/my_run --threshold 0.95 --out labels")
    _add_predictor(add)
    add("images", nargs="*", metavar="IMAGE", help="files or folders (default: the run's unlabeled images)")
    add("--threshold", type=float, default=0.95, help="least confidence that is kept (default: %(default)s)")
    add("--with-labeled", action="store_true", help="the run's labeled images join, with their true masks")
    add("--val", action="store_true", help="write a val.txt of the run's evaluated images")
    _add_output(add)
    add = command(_export, "runs/my_run --predictor 'student 1' --out exported")
    _add_predictor(add)
    add("-o", "--out", default="", metavar="DIR", help="folder of both files (default: that of the run)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--onnx", action="store_true", help="write an .onnx file instead (needs the extra onnx)")
    add("--licence", default="", help="of the data, for the model card")
    command(_methods, "mkd")("name", nargs="?", help="of the method")
    add = command(_runs, "--remove RUN")
    add("--remove", nargs="+", metavar="RUN", help="folders or ids of runs to delete")


def _add_folder(add: Any) -> None:
    add("folder", metavar="FOLDER", help="photos with masks or JSON of labelme or COCO, told apart by names")
    add("pairs", nargs="*", metavar="key=value", help="parameters of the runs: weights=FILE, steps=5000")
    add("-o", "--out", metavar="DIR", help="folder of lists and report (default: FOLDER/mkd)")
    add("--classes", help="names in the order of the masks' values, a,b,c; or their number")


def _add_predictor(add: Any) -> None:
    add("run", metavar="RUN", help="a run folder, or the id of one under runs/")
    add("--predictor", default="", metavar="NAME", help="'student 1', 'mean' ... (default: the reported one)")
    add("--step", help="best (chosen on val), or that of a checkpoint-STEP.pt that was kept (default: last)")


def _add_output(add: Any) -> None:
    add("-o", "--out", required=True, metavar="DIR", help="folder to write to")
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse at the start)")
    add("--protocol", default="", help="whole, long512, sliding (default: the run's; sliding if huge)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")


def _prepare(words: Words) -> None:
    """Make a data set of one's own photos and masks.

    Pairs them by name, says what the masks mean, draws val and labeled photos, writes lists into
    FOLDER/mkd, checks all, and draws a sheet to look at. No photo and no mask is changed.
    """
    from ..parameters import parse_values
    from .own_images import TEXT, prepare_folder

    prepare_folder(**_given(words, **parse_values(words.pairs, TEXT)))


def _train(words: Words) -> None:
    """Train methods on one's own photos and report.

    Prepares the folder where that was not done. Writes table, curves and predictions into
    FOLDER/mkd/report. What is trained already is not trained again, and what was killed goes on.
    """
    from ..parameters import parse_values
    from .own_images import TEXT, train_folder

    train_folder(**_given(words, **parse_values(words.pairs, TEXT)))


def _given(words: Words, /, **typed: Any) -> dict[str, Any]:
    """What was typed, as key=value too, by the names of a function's arguments."""
    given = {name: value for name, value in vars(words).items() if name not in ("command", "handle", "pairs")}
    if both := {*given, "dataset", "root"} & typed.keys():
        raise ValueError(f"give {min(both)} as mkd {words.command} --help says, not as key=value")
    return given | typed


def _check(words: Words) -> int:
    """Look for faults in a data set and a split before training.

    Counts, hashes, class shares, and every missing, damaged or mismatched file. Status 1 where
    there is a problem.
    """
    from ..data import check, load_split, open_dataset
    from ..parameters import parse_values
    from ..progress import Progress

    if words.download:
        from ..data.voc import download

        download(words.dataset, words.root)
    dataset = open_dataset(words.dataset, words.root, **parse_values(words.pairs))
    split, say = load_split(dataset, words.split, words.seed), Progress("check")
    report = check(dataset, split, not words.quick, lambda done, of: say(f"{done:,} of {of:,} files"))
    print(report)
    return bool(report.problems)


def _predict(words: Words) -> None:
    """Predict images by a trained run.

    Writes OUT/masks, OUT/overlays and OUT/confidence as PNG, under the images' paths below the
    folder that holds them all.
    """
    from .predict import predict

    masks = predict(**_given(words))
    print(f"Masks, overlays and confidence of {len(masks):,} images: {words.out}")


def _pseudo_label(words: Words) -> None:
    """Label images by a trained run, as a data set for training.

    Writes OUT/masks (PNG, 255 where the confidence is below the threshold), OUT/classes.txt and
    OUT/train.txt for the data set `folder`. Prints what was kept, how much of it is right, and the
    next command.
    """
    from .predict import pseudo_label

    pseudo_label(**_given(words))


def _export(words: Words) -> None:
    """Write a trained network as a torch.export file.

    Writes <predictor>.pt2, checked to give the same labels, and <predictor>.json: preprocessing,
    classes and colours.
    """
    from .export import export

    print("Written:", *export(**_given(words)), sep="\n  ")


def _methods(words: Words) -> None:
    """List the methods, or one with its equation and options."""
    from ..choices import choose
    from ..methods import METHODS

    about = {name: inspect.getdoc(sys.modules[of.__module__]) or "" for name, of in METHODS.items()}
    if not words.name:
        print(*(f"{name:16} {text.splitlines()[0]}" for name, text in about.items()), sep="\n")
        return
    method, options = METHODS[choose("method", words.name, METHODS)], ["Options:"]
    for option in [*inspect.signature(method).parameters.values()][1:]:
        values = get_args(option.annotation) if get_origin(option.annotation) is Literal else ()
        one_of = f"    one of {', '.join(map(str, values))}" * bool(values)
        options.append(f"{option.name} = {option.default!r}{one_of}")
    print(about[words.name], inspect.getdoc(method), "\n".join(options), sep="\n\n")


def _runs(words: Words) -> None:
    """List the runs under runs/: method, data, step, mIoU in percent, size. Or remove some."""
    from .. import records

    if words.remove:
        from ..trained import find_run

        folders = [*dict.fromkeys(map(find_run, words.remove))]
        if odd := [f for f in folders if f.resolve().parent != records.RUNS and not records.history(f)]:
            raise ValueError(f"{odd[0]} is no run that was begun, nothing is removed")
        if busy := [folder.name for folder in folders if records.is_busy(folder)]:
            raise ValueError(f"at work just now, nothing is removed: {', '.join(busy)}")
        for folder in folders:
            shutil.rmtree(folder)
            print(f"Removed: {folder}")
        return
    for folder in sorted(path.parent for path in records.RUNS.glob("*/config.json")):
        try:
            config, record = json.loads((folder / "config.json").read_bytes()), records.load(folder)
            step = (records.history(folder) or [{"step": 0}])[-1]["step"]
            about = f"{config['method']}  {config['dataset']} {config['split']}  step {step:,}"
        except (ValueError, TypeError, KeyError):
            about, record = "config.json, history.jsonl or record.json is damaged", None
        files = {path.stat().st_ino: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        found = f"{record.miou:.1f}" if record else "-"
        print(f"{folder.name}  {about}  mIoU {found}  {sum(files.values()) / 1e6:.0f} MB")
