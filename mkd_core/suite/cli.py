"""The `mkd` command: run notebooks with parameters, check data before training, put trained runs to use."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Words = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Wrong input is one message and status 2; a notebook or run that fails, status 1."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing half-written or running is left behind
    parser = _parser()
    # argparse closes a list of positionals at the first option; here key=value, and images, may stand anywhere.
    words, rest = parser.parse_known_args(argv)
    anywhere = "pairs" if "pairs" in words else "images"
    if any(w[0] == "-" or anywhere not in words or (anywhere == "pairs" and "=" not in w) for w in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    vars(words).get(anywhere, []).extend(rest)
    try:
        return words.handle(words)
    except (ValueError, OSError) as error:
        print(f"mkd {words.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" * (words.command in ("run", "batch"))
        print(f"\nmkd {words.command}: interrupted{hint}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mkd", description="Mutual Knowledge Distillation; first: make demo")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(handle: Callable[[Words], int], example: str) -> Any:
        name, about = handle.__name__[1:].replace("_", "-"), inspect.getdoc(handle) or ""
        first, example = about.splitlines()[0].rstrip("."), f"Example: mkd {name} {example}"
        added = commands.add_parser(name, help=first, description=about, epilog=example)
        added.set_defaults(handle=handle)
        return added.add_argument

    _add_notebooks(command)
    _add_others(command)
    return parser


def _add_notebooks(command: Callable[..., Any]) -> None:
    add = command(_run, "notebooks/10_run.ipynb method=cps steps=2000 'options={boxes: 3}' seed=1")
    add("notebook", type=Path)
    add("pairs", nargs="*", metavar="key=value", help="lr=1e-3, crop=[512,512], common.root=DIR")
    add("-f", "--file", type=Path, help="YAML file of parameters, or the config.json of a run")
    add("-o", "--out", type=Path, help="folder of the executed notebook (default: below runs/notebooks)")
    add("--html", action="store_true", help="write the executed notebook as HTML too")
    add("--list", action="store_true", help="list the notebook's parameters with their meaning and stop")
    add = command(_batch, "parameters/demo/34_fda.yaml common.steps=300 --slots cpu,cpu --dry-run")
    add("file", type=Path, metavar="FILE")
    add("pairs", nargs="*", metavar="key=value", help="parameters that win over the file: common.root=DIR")
    add("--dry-run", action="store_true", help="check everything, show the plan with expected hours")
    add(
        "--only",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="row=MKD, column=1/16, split=..., ...",
    )
    add("--seeds", help="instead of the file's: 0,1,2")
    add("--slots", default="", help="0,1,2 or cpu,cpu (default: every GPU, else the file's slots on the CPU)")
    add("--retries", type=int, default=1, help="how often a failed run is tried again (default: %(default)s)")
    add("--engine", choices=["local", "dask", "slurm"], default="local", help="default: %(default)s")
    add("--address", default="", help="of the Dask scheduler: tcp://host:8786")
    add("--resources", type=Path, help="YAML file of a Slurm job's resources (parameters/cluster/slurm.yaml)")
    add("-o", "--out", type=Path, help="folder of the executed table notebook")
    add("--html", action="store_true", help="write the table notebook as HTML too")


def _add_others(command: Callable[..., Any]) -> None:
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
    command(_runs, "")


def _add_predictor(add: Any) -> None:
    add("run", metavar="RUN", help="a run folder, or the id of one under runs/")
    add("--predictor", default="", metavar="NAME", help="'student 1', 'mean' ... (default: the reported one)")
    add("--step", help="best (chosen on val), or that of a checkpoint-STEP.pt that was kept (default: last)")


def _add_output(add: Any) -> None:
    add("-o", "--out", required=True, metavar="DIR", help="folder to write to")
    add("--overwrite", action="store_true", help="replace files that exist (default: refuse at the start)")
    add("--protocol", default="", help="whole, long512, sliding (default: the run's; sliding if huge)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")


def _run(words: Words) -> int:
    """Execute a notebook with parameters.

    A parameter is YAML; where the notebook declares text, it is taken as typed.
    """
    from ..config import RunConfig
    from .notebook import read_all, read_cell

    known = read_cell(words.notebook)
    if words.list:
        for name, about in known.items():
            field = RunConfig.model_fields.get(name)
            meaning = about.help or (field and field.description) or ""
            print(f"{name} = {about.default!r}    {meaning}".rstrip())
        return 0
    ready = read_all(known, words.file, words.pairs)
    return _execute(words, words.notebook, ready.parameters, ready.results)


def _execute(words: Words, notebook: Path, parameters: dict[str, Any], results: Sequence[Path]) -> int:
    from ..records import RUNS
    from .notebook import NotebookFailed, execute

    digest = hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest()[:8]
    try:
        written = execute(notebook, parameters, words.out or RUNS / "notebooks" / digest, words.html)
    except NotebookFailed as error:
        print(f"mkd {words.command}: {error}", file=sys.stderr)
        return 1
    print("\nWritten:", *written, *(f"{folder}/" for folder in results), sep="\n  ")
    return 0


def _batch(words: Words) -> int:
    """Execute every run of a table, then the table's notebook.

    What has a record under runs/ is not run again, and what was killed goes on: after any mishap,
    give the same command again. Status 1 where a run failed.
    """
    from ..parameters import read_parameters
    from ..records import ROOT
    from . import batch, tables
    from .notebook import PLAIN, read_all, read_cell

    if [words.engine == "dask", words.engine == "slurm"] != [bool(words.address), bool(words.resources)]:
        raise ValueError("--address belongs to --engine dask, --resources to --engine slurm")
    if words.slots and words.engine != "local":
        raise ValueError("--slots are this machine's; a cluster has as many as it has workers")
    table = ROOT / "notebooks" / f"{words.file.stem}.ipynb"
    seeds = [f"seeds=[{words.seeds}]"] if words.seeds is not None else []
    ready = read_all(read_cell(table) if table.is_file() else PLAIN, words.file, [*words.pairs, *seeds])
    grid, parameters = ready.grid, ready.parameters
    assert grid is not None
    shown = {key: parameters[key] for key in ("shown", "against") if key in parameters}
    tables.check(grid, parameters.get("published", ""), **shown)
    every = batch.expand(grid)
    runs = batch.select(every, words.only)
    slots = batch.pick_slots(words.slots, parameters.get("slots", 1)) if words.engine == "local" else []
    print(batch.plan(runs, len(slots)), flush=True)
    missing, failed = [run for run in runs if not run.record], dict[batch.Run, str]()
    batch.check(missing)
    if words.dry_run:
        return 0
    if missing:
        resources = read_parameters(words.resources) if words.resources else None
        with batch.executor(words.engine, slots, words.address, resources) as pool:
            failed = batch.run_batch(missing, pool, len(slots), words.retries)
    for run, error in failed.items():
        print(f"\nmkd batch: {run} failed; its folder is {run.folder}\n{error}", file=sys.stderr)
    lost = f", {len(failed)} failed" if failed else ""
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done{lost}")
    if failed or not table.is_file() or not all(run.record for run in every):
        return bool(failed)
    return _execute(words, table, parameters, ready.results)


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
    return 1 if report.problems else 0


def _predict(words: Words) -> int:
    """Predict images by a trained run.

    Writes OUT/masks, OUT/overlays and OUT/confidence as PNG, under the images' paths below the
    folder that holds them all.
    """
    from .predict import predict

    masks = predict(words.run, words.images, words.out, **_options(words))
    print(f"Masks, overlays and confidence of {len(masks):,} images: {words.out}")
    return 0


def _pseudo_label(words: Words) -> int:
    """Label images by a trained run, as a data set for training.

    Writes OUT/masks (PNG, 255 where the confidence is below the threshold), OUT/classes.txt and
    OUT/train.txt for the data set `folder`. Prints what was kept, how much of it is right, and the
    next command.
    """
    from .predict import pseudo_label

    parts = {"with_labeled": words.with_labeled, "val": words.val}
    pseudo_label(words.run, words.out, words.images, threshold=words.threshold, **parts, **_options(words))
    return 0


def _options(words: Words) -> dict[str, Any]:
    return {name: getattr(words, name) for name in ("predictor", "step", "protocol", "device", "overwrite")}


def _export(words: Words) -> int:
    """Write a trained network as a torch.export file.

    Writes <predictor>.pt2, checked to give the same labels, and <predictor>.json: preprocessing,
    classes and colours.
    """
    from .export import export

    options = {name: getattr(words, name) for name in ("predictor", "step", "overwrite", "onnx", "licence")}
    written = export(words.run, words.out, **options)
    print("Written:", *written, sep="\n  ")
    return 0


def _methods(words: Words) -> int:
    """List the methods, or one with its equation and options."""
    from ..choices import choose
    from ..methods import METHODS

    for name in [choose("method", words.name, METHODS)] if words.name else METHODS:
        about = inspect.getdoc(sys.modules[METHODS[name].__module__]) or ""
        options = inspect.getdoc(METHODS[name])
        print(f"{about}\n\n{options}" if words.name else f"{name:16} {about.splitlines()[0]}")
    return 0


def _runs(words: Words) -> int:
    """List the runs under runs/: method, data, step, mIoU in percent, size."""
    from .. import records

    for folder in sorted(path.parent for path in records.RUNS.glob("*/config.json")):
        config, record = json.loads((folder / "config.json").read_bytes()), records.load(folder)
        step = (records.history(folder) or [{"step": 0}])[-1]["step"]
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
        found = f"{record.miou:.1f}" if record else "-"
        print(
            f"{folder.name}  {config['method']}  {config['dataset']} {config['split']}  step {step:,}  mIoU {found}  {size:.0f} MB"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
