"""The `mkd` command: run a notebook with parameters, check data before training, put a trained run to use."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml

from ..choices import choose

if TYPE_CHECKING:
    from ..config import Grid

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; user errors are one message on stderr and exit status 2, a notebook that fails is status 1."""
    parser = argparse.ArgumentParser(
        prog="mkd",
        description="Mutual Knowledge Distillation for semi-supervised semantic segmentation, re-run.",
        epilog="Start with `make demo`, or look at your data with `mkd check folder --root MY_IMAGES --split random/1_16`.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_run, _add_check, _add_batch, _add_predict, _add_pseudo_label, _add_export):
        add(commands)
    # A polite end, so that no half-written notebook stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # argparse closes a list of positionals at the first option; here key=value, and images, may stand anywhere.
    words, rest = parser.parse_known_args(argv)
    anywhere = "pairs" if "pairs" in words else "images"
    if wrong := [word for word in rest if word.startswith("-") or anywhere not in words or (anywhere == "pairs" and "=" not in word)]:
        words.parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if rest:
        getattr(words, anywhere).extend(rest)
    try:
        return words.handle(words)
    except (ValueError, FileNotFoundError, OSError) as error:
        print(f"mkd {words.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command goes on from the last checkpoint" if words.command in ("run", "batch") else ""
        print(f"mkd {words.command}: interrupted{hint}", file=sys.stderr)
        return 130


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="execute a notebook with parameters",
        description="Execute a notebook with papermill. The parameters of a notebook, with their meaning: mkd run NOTEBOOK --list.",
        epilog="Example: mkd run notebooks/10_run.ipynb method=cps steps=2000 'options={boxes: 3, weight: 1.0}' seed=1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("notebook", type=Path)
    run.add_argument(
        "pairs", nargs="*", metavar="key=value", help="a parameter as YAML, wins over the file: lr=1e-3, crop=[512,512], common.root=DIR"
    )
    run.add_argument("-f", "--file", type=Path, help="YAML file of parameters")
    run.add_argument("-o", "--out", type=Path, help="folder for the executed notebook (default: runs/notebooks/<hash of the parameters>)")
    run.add_argument("--html", action="store_true", help="write the executed notebook as HTML too")
    run.add_argument("--list", action="store_true", help="list the notebook's parameters and stop")
    run.set_defaults(handle=_run, parser=run)


def _add_check(commands: Commands) -> None:
    check = commands.add_parser(
        "check",
        help="look for faults in a data set and a split before training",
        description="Counts, hashes, class shares, and every missing, damaged or mismatched file. Exit status 1 where there is a problem.",
        epilog="Example: mkd check voc_aug --root VOCdevkit/VOC2012 --split cps/1_16",
    )
    check.add_argument("dataset", help="shapes, folder, voc, voc_aug, cityscapes, coco")
    check.add_argument("pairs", nargs="*", metavar="key=value", help="options of the data set as YAML: classes=11 val=test.txt")
    check.add_argument("--root", default="", help="folder of the data set")
    check.add_argument("--split", default="random/1_16", help="labeled images (default: %(default)s)")
    check.add_argument("--seed", type=int, default=0, help="of a random split")
    check.add_argument("--quick", action="store_true", help="lists and file names only, open nothing")
    check.add_argument("--download", action="store_true", help="fetch and verify the data first, where its terms allow that (voc, voc_aug)")
    check.set_defaults(handle=_check, parser=check)


def _add_batch(commands: Commands) -> None:
    batch = commands.add_parser(
        "batch",
        help="execute every run of a table, then the table's notebook",
        description="Each run of FILE (common, rows, columns, seeds) is one execution of notebooks/10_run.ipynb, kept in runs/<id>/. A run with\n"
        "a record is not run again, one that was killed goes on from its checkpoint: after any mishap, give the same command again.\n"
        "When all are done, the notebook that is named like FILE is executed with it. Exit status 1 where a run failed.",
        epilog="Example: mkd batch parameters/quick/20_table1_voc.yaml common.root=CAMVID --slots 0,1,2,3 --only row=MKD --dry-run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("file", type=Path, metavar="FILE")
    batch.add_argument("pairs", nargs="*", metavar="key=value", help="a parameter as YAML, wins over the file: common.root=DIR")
    batch.add_argument(
        "--dry-run", action="store_true", help="check everything and show what is done, running and to run, with expected hours"
    )
    batch.add_argument(
        "--only", action="append", default=[], metavar="KEY=VALUE",
        help="these runs alone; KEY is row, column, or a key of the runs (method, split, seed); may be repeated",
    )  # fmt: skip
    batch.add_argument("--seeds", help="instead of the file's: 0,1,2")
    batch.add_argument(
        "--slots",
        default="",
        help="one run at a time on each: GPUs 0,1,2,3, or cpu,cpu (default: every GPU, else the file's slots on the CPU)",
    )
    batch.add_argument("--retries", type=int, default=1, help="how often a failed run is tried again (default: %(default)s)")
    batch.add_argument(
        "--engine", choices=["local", "dask", "slurm"], default="local", help="where runs are executed (default: %(default)s)"
    )
    batch.add_argument("--address", default="", help="of the Dask scheduler: tcp://host:8786")
    batch.add_argument("--resources", type=Path, help="YAML file of a Slurm job's resources (parameters/cluster/slurm.yaml)")
    batch.add_argument(
        "-o", "--out", type=Path, help="folder of the executed table notebook (default: runs/notebooks/<hash of the parameters>)"
    )
    batch.add_argument("--html", action="store_true", help="write the table notebook as HTML too")
    batch.set_defaults(handle=_batch, parser=batch)


def _add_predict(commands: Commands) -> None:
    predict = commands.add_parser(
        "predict",
        help="masks, overlays and confidence of images, by a trained run",
        description="Writes OUT/masks, OUT/overlays and OUT/confidence as PNG, under the images' paths below the folder that holds them all.",
        epilog="Example: mkd predict runs/my_run photos/ --out predictions",
    )
    _add_predictor(predict)
    predict.add_argument("images", nargs="*", metavar="IMAGE", help="files of any size, or folders with all pictures below them")
    _add_output(predict)
    predict.set_defaults(handle=_predict, parser=predict)


def _add_pseudo_label(commands: Commands) -> None:
    label = commands.add_parser(
        "pseudo-label",
        help="label images by a trained run, as a data set for training",
        description="Writes OUT/masks (PNG, 255 where the confidence is below the threshold), OUT/classes.txt and OUT/train.txt, which the "
        "data set `folder` reads; a val.txt with images to evaluate is yours to add. Prints what was kept of each class, and how much of that is right where the truth is known.",
        epilog="Example: mkd pseudo-label runs/my_run --threshold 0.95 --out labels",
    )
    _add_predictor(label)
    label.add_argument("images", nargs="*", metavar="IMAGE", help="files or folders (default: the unlabeled images of the run's own split)")
    label.add_argument("--threshold", type=float, default=0.95, help="confidence from which a pixel is kept, 0 to 1 (default: %(default)s)")
    _add_output(label)
    label.set_defaults(handle=_pseudo_label, parser=label)


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a trained network as a torch.export file",
        description="Writes <predictor>.pt2 and, with preprocessing, classes and colours, <predictor>.json. Checked to give the same labels.",
        epilog="Example: mkd export runs/my_run --predictor 'student 1' --out exported",
    )
    _add_predictor(export)
    export.add_argument("-o", "--out", default="", metavar="DIR", help="folder of both files (default: that of the run)")
    export.add_argument("--overwrite", action="store_true", help="replace files that exist")
    export.set_defaults(handle=_export, parser=export)


def _add_predictor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or the id of one under runs/")
    parser.add_argument(
        "--predictor", default="", metavar="NAME", help="'student 1', 'teacher 2', 'mean' ... (default: the one that the record reports)"
    )
    parser.add_argument(
        "--step",
        help="best: of the run's evaluations, which is optimistic where they rank; or the kept checkpoint-STEP.pt (default: the last)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist (default: refuse before anything is predicted)")
    parser.add_argument(
        "--protocol", default="", help="whole, long512 or sliding (default: the run's; whole becomes sliding above 2 megapixels)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: %(default)s)")


def parse_values(pairs: Sequence[str]) -> dict[str, Any]:
    """["lr=1e-3", "crop=[64, 64]"] -> {"lr": 0.001, "crop": [64, 64]}; values are YAML, numbers like 1e-3 are floats."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"expected key=value, got {pair!r}")
        if key in values:
            raise ValueError(f"{key} is given twice")
        values[key] = _parse(text, f"{key}: {text!r}") if text else ""
    return values


def merge(parameters: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Parameters with values put over them; "common.root" reaches into the mapping `common`, which must be there."""
    merged = copy.deepcopy(parameters)
    for key, value in values.items():
        *path, last = key.split(".")
        inner = merged
        for name in path:
            if not isinstance(inner.get(name), dict):
                raise ValueError(f"{key}: the parameters file has no mapping {name!r} to put {last!r} into")
            inner = inner[name]
        inner[last] = value
    return merged


def read_parameters(file: Path) -> dict[str, Any]:
    """A YAML file of parameters; ValueError unless it is a mapping."""
    if not file.is_file():
        raise ValueError(f"parameters file {file} does not exist")
    values = _parse(file.read_bytes(), str(file)) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold `name: value` lines, it holds a {type(values).__name__}")
    return values


def _parse(text: str | bytes, place: str) -> Any:
    try:
        return _numbers(yaml.load(text, _Once))
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{place}: a value stands inside itself (an anchor and its alias)") from None


class _Once(yaml.SafeLoader):
    """YAML in which a key stands once in a mapping: of two, PyYAML takes the last, and a row of a table would be gone."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for key, _ in reversed(node.value):
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError("in a mapping", node.start_mark, f"the key {key.value!r} stands twice", key.start_mark)
        return node


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string; nobody means that."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and value[:1] in "-+.0123456789" and "e" in value.lower():
        try:
            return float(value)
        except ValueError:
            return value
    return value


def execute(notebook: Path, parameters: dict[str, Any], folder: Path, html: bool = False) -> list[Path]:
    """Run a notebook into folder/<name>.ipynb; unknown parameters are refused; the output appears whole or not at all.

    A failing notebook is kept as folder/<name>.failed.ipynb and its error raised. Returns the paths written.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    _refuse_unknown(notebook, parameters)
    folder.mkdir(parents=True, exist_ok=True)
    if folder.resolve() == notebook.resolve().parent:
        raise ValueError(f"--out {folder} is where the notebook itself lies: it would be overwritten")
    out, failed = folder / notebook.name, folder / f"{notebook.stem}.failed.ipynb"
    temporary = folder / f".{notebook.stem}.{os.getpid()}.tmp.ipynb"
    try:
        with _shown_progress():
            papermill.execute_notebook(
                _literal(notebook), _literal(temporary), parameters=parameters, progress_bar=False, cwd=os.getcwd(),
                kernel_name="python3", stdout_file=sys.stdout, stderr_file=sys.stderr,
            )  # fmt: skip
        os.replace(temporary, out)
        failed.unlink(missing_ok=True)
    except (papermill.exceptions.PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
        if temporary.exists():
            os.replace(temporary, failed)
        raise NotebookFailed(f"{notebook} failed: {_last_line(error)}\nThe notebook up to there: {failed}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return [out, *([_to_html(out)] if html else [])]


def _refuse_unknown(notebook: Path, parameters: dict[str, Any]) -> Collection[str]:
    """The notebook's parameters; ValueError where it does not exist, has no such parameter (papermill would only log it) or one of another type."""
    import papermill

    if not notebook.is_file():
        near = sorted(str(p) for p in notebook.parent.glob("*.ipynb"))
        raise ValueError(f"notebook {notebook} does not exist" + (f"; {notebook.parent} has {', '.join(near)}" if near else ""))
    known = papermill.inspect_notebook(str(notebook))
    kinds: dict[str, Any] = {"str": str, "bool": bool, "int": int, "float": (int, float), "list": list, "dict": dict}
    for name, value in parameters.items():
        kind = known[choose(f"parameter of {notebook.name}", name, known)]["inferred_type_name"]
        if not isinstance(value, kinds.get(kind, object)) or (isinstance(value, bool) and kind in ("int", "float")):
            raise ValueError(f"parameter {name} of {notebook.name} is a {kind}; got {value!r}")
        if name == "out" and value == "" != known[name]["default"].strip("\"'"):  # 10_run has a folder of its own
            raise ValueError(f"parameter out of {notebook.name} must name a folder")
    return known


@contextmanager
def _shown_progress() -> Iterator[None]:
    """What the kernel reports of its progress, on this terminal: one line that changes, or a line every 15 seconds in a log."""
    with tempfile.NamedTemporaryFile("r", prefix="mkd-progress-") as file:
        os.environ["MKD_PROGRESS"] = file.name
        over = threading.Event()

        def show() -> None:
            live, shown = sys.stderr.isatty(), ""
            while not over.wait(0.5 if live else 15):
                line = Path(file.name).read_text()
                if line and line != shown:
                    print(f"\r\x1b[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
                    shown = line
            if live and shown:
                print(file=sys.stderr)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            del os.environ["MKD_PROGRESS"]


def _literal(path: Path) -> str:
    """papermill fills its parameters into {braces} of a path; none is meant."""
    return str(path).replace("{", "{{").replace("}", "}}")


class NotebookFailed(RuntimeError):
    """A cell raised, the kernel died, or time ran out."""


def _last_line(error: Exception) -> str:
    name, value = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error))
    return f"{name}: {value}"


def _to_html(notebook: Path) -> Path:
    from nbconvert import HTMLExporter

    from ..records import write_atomically

    body, _ = HTMLExporter().from_filename(str(notebook))
    path = notebook.with_suffix(".html")
    write_atomically(path, body)
    return path


def _run(words: argparse.Namespace) -> int:
    if words.list:
        import papermill

        if not words.notebook.is_file():
            raise ValueError(f"notebook {words.notebook} does not exist")
        for name, about in papermill.inspect_notebook(str(words.notebook)).items():
            print(f"{name} = {about['default']}" + (f"    {about['help']}" if about["help"] else ""))
        return 0
    parameters = merge(read_parameters(words.file) if words.file else {}, parse_values(words.pairs))
    return _execute(words, words.notebook, parameters)


def _execute(words: argparse.Namespace, notebook: Path, parameters: dict[str, Any]) -> int:
    from ..records import RUNS

    digest = hashlib.sha256(repr(sorted(parameters.items())).encode()).hexdigest()[:8]
    try:
        written = execute(notebook, parameters, words.out or RUNS / "notebooks" / digest, words.html)
    except NotebookFailed as error:
        print(f"mkd {words.command}: {error}", file=sys.stderr)
        return 1
    print("\nWritten:", *written, sep="\n  ")
    return 0


def _check(words: argparse.Namespace) -> int:
    from ..data import check, load_split, open_dataset

    if words.download:
        from ..data.voc import download

        download(words.dataset, words.root)
    options = parse_values(words.pairs)
    if clash := options.keys() & {"root", "name"}:
        raise ValueError(f"{clash.pop()} is no option of a data set; the folder is given by --root DIR")
    dataset = open_dataset(words.dataset, words.root, **options)
    split = load_split(dataset, words.split, words.seed)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty() and (done % 50 == 0 or done == total):
            print(f"\r{done:,} of {total:,} files", end="\n" if done == total else "", file=sys.stderr, flush=True)

    report = check(dataset, split, deep=not words.quick, progress=progress)
    print(report)
    return 1 if report.problems else 0


def _predict(words: argparse.Namespace) -> int:
    from .predict import predict

    masks = predict(words.run, words.images, words.out, **_options(words))
    print(f"Masks, overlays and confidence of {len(masks):,} images: {words.out}")
    return 0


def _pseudo_label(words: argparse.Namespace) -> int:
    from .predict import pseudo_label

    table = pseudo_label(words.run, words.out, words.images, threshold=words.threshold, **_options(words))
    print(f"In percent, at confidence {words.threshold} and above: share of the pixels, kept of these, accuracy of the kept ones")
    print(table.to_string(float_format="{:.1f}".format, na_rep="-"))
    print(f"Data set: {words.out} (folder; a val.txt with images to evaluate is yours to add)")
    return 0


def _export(words: argparse.Namespace) -> int:
    from .export import export

    print("Written:", *export(words.run, words.out, predictor=words.predictor, step=words.step, overwrite=words.overwrite), sep="\n  ")
    return 0


def _options(words: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(words, name) for name in ("predictor", "step", "protocol", "device", "overwrite")}


def _refuse_late(table: Path, parameters: dict[str, Any], grid: Grid) -> None:
    """ValueError for what a table's notebook would refuse when all has run."""
    from .tables import check

    if parameters.get("slots", 1) < 1:
        raise ValueError(f"slots must be a number from 1 on; got {parameters['slots']}")
    if not parameters.get("train", True):
        raise ValueError(f"train: false asks for the table of what is done, without runs: mkd run {table}")
    check(grid, *(parameters.get(key, "") for key in ("published", "shown", "against")))


def _batch(words: argparse.Namespace) -> int:
    from ..config import Grid, RunConfig
    from ..records import ROOT, below_root, nearest
    from . import batch

    wants = {"dask": ("--address", words.address), "slurm": ("--resources", words.resources)}
    for engine, (option, given) in wants.items():
        if bool(given) != (words.engine == engine):
            raise ValueError(f"{option} and --engine {engine} belong together")
    if words.slots and words.engine != "local":
        raise ValueError("--slots are this machine's; a cluster has as many as it has workers")
    if words.retries < 0:
        raise ValueError(f"--retries must be 0 or more; got {words.retries}")
    resources = read_parameters(words.resources) if words.resources else None
    seeds = [f"seeds=[{words.seeds}]"] if words.seeds is not None else []
    parameters = merge(read_parameters(words.file), parse_values([*words.pairs, *seeds]))
    for name, out in (("--out", words.out and words.out.absolute()), ("out:", below_root(str(parameters.get("out", ""))))):
        if out and not (place := nearest(out)).is_dir():
            raise ValueError(f"{name} {out} cannot be made: {place} is not a folder")
    table = ROOT / "notebooks" / f"{words.file.stem}.ipynb"
    if table.is_file() and "columns" in _refuse_unknown(table, parameters) and "columns" not in parameters:
        raise ValueError(f"{words.file} has no `columns`, and {table.name} would take its own; for a single one: columns: {{TITLE: {{}}}}")
    for key in parameters if not table.is_file() else ():
        choose(f"key of {words.file} (there is no {table.name} to take it)", key, Grid.model_fields)
    grid = Grid(**{key: value for key, value in parameters.items() if key in Grid.model_fields})
    if table.is_file():
        _refuse_late(table, parameters, grid)
    every = batch.expand(grid)
    only: dict[str, list[Any]] = {}
    for pair in words.only:
        key, equals, text = pair.partition("=")
        written = key in ("row", "column") or (key in RunConfig.model_fields and any(text == run.value(key) for run in every))
        only.setdefault(key, []).append(text if equals and written else parse_values([pair])[key])
    runs = batch.select(every, only)
    slots = batch.parse_slots(words.slots, parameters.get("slots", 1)) if words.engine == "local" else [""] * len(runs)
    print(batch.plan(runs, len(slots) if words.engine == "local" else 0), flush=True)
    batch.check([run for run in runs if not run.done])
    if words.dry_run:
        return 0
    failed: dict[batch.Run, str] = {}
    if not all(run.done for run in runs):
        with batch.executor(words.engine, len(slots), words.address, resources) as pool:
            failed = batch.run_batch(runs, pool, slots, words.retries)
    for run, error in failed.items():
        print(f"\nmkd batch: {run} failed; its folder is {run.folder}\n{error}", file=sys.stderr)
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done" + (f", {len(failed)} failed" if failed else ""))
    if failed or not table.is_file() or not all(run.done for run in every):
        return bool(failed)
    return _execute(words, table, parameters)


if __name__ == "__main__":
    sys.exit(main())
