"""Notebooks with parameters: read them, refuse what is wrong before a kernel starts, execute with papermill."""

import ast
import inspect
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..choices import choose
from ..config import Grid, RunConfig, drop_foreign_options, with_bases
from ..data import DATASETS
from ..parameters import merge, parse_values, read_parameters
from ..records import ROOT, RUNS, below_root, read_cells, write_atomically


class NotebookFailed(RuntimeError):
    """A cell raised, or the kernel died."""


def execute(notebook: Path, parameters: dict[str, Any], folder: Path, html: bool = False) -> list[Path]:
    """Run a notebook into folder/<name>.ipynb, which appears whole or not at all. Returns the paths written.

    A failing notebook is kept as folder/<name>.failed.ipynb and its error raised.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    if folder.resolve() == notebook.resolve().parent:
        raise ValueError(f"--out {folder} is where the notebook itself lies: it would be overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    out, failed = folder / notebook.name, folder / f"{notebook.stem}.failed.ipynb"
    temporary = folder / f".{notebook.stem}.{os.getpid()}.tmp.ipynb"
    # No template is meant by braces in a path.
    source, target = (str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, temporary))
    try:
        papermill.execute_notebook(
            source, target, parameters, progress_bar=False, cwd=os.getcwd(), kernel_name="python3",
            kernel_manager_class=_own_kernel(), stdout_file=sys.stdout, stderr_file=sys.stderr,
        )  # fmt: skip
        os.replace(temporary, out)
        failed.unlink(missing_ok=True)
    except (papermill.exceptions.PapermillExecutionError, DeadKernelError, CellTimeoutError) as error:
        if temporary.exists():
            os.replace(temporary, failed)
        last = f"{getattr(error, 'ename', type(error).__name__)}: {getattr(error, 'evalue', error)}"
        raise NotebookFailed(f"{notebook} failed: {last}\nThe notebook up to there: {failed}") from error
    finally:
        temporary.unlink(missing_ok=True)
    if html:
        from nbconvert import HTMLExporter

        write_atomically(out.with_suffix(".html"), HTMLExporter().from_filename(str(out))[0])
    return [out, *[out.with_suffix(".html")] * html]


def _own_kernel() -> type:
    """A kernel of this interpreter with this mkd_core, whatever is installed under the name python3."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    start = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import mkd_core; from ipykernel import kernelapp as k; "
    argv = [sys.executable, "-c", f"{start} k.launch_new_instance()", "-f", "{connection_file}"]
    argv.append("--log-level=CRITICAL")  # no warnings about TCP and interrupts
    spec = KernelSpec(argv=argv, display_name="Python 3", language="python")
    return type("OwnKernel", (AsyncKernelManager,), {"kernel_spec": spec})


class Parameter(NamedTuple):
    default: Any
    help: str = ""  # its comment


# Of a table without a notebook of its own.
PLAIN = {name: Parameter({}) for name in ("recipes", "common", "rows")}
PLAIN |= {"base": Parameter(""), "columns": Parameter({"": {}}), "seeds": Parameter([])}


def read_cell(notebook: Path) -> dict[str, Parameter]:
    """Read the cell of a notebook that is tagged parameters."""
    if not notebook.is_file():
        near = ", ".join(sorted(str(path) for path in notebook.parent.glob("*.ipynb")))
        raise ValueError(f"notebook {notebook} does not exist" + (f"; there are {near}" if near else ""))
    tree = notebook.resolve().parents[1]
    if (tree / "mkd_core").is_dir() and tree != ROOT:
        raise ValueError(f"{notebook} is of another copy of the project than this command, of {ROOT}")
    try:
        cells, found = json.loads(notebook.read_bytes())["cells"], {}
        tagged = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", []))
        code = ast.parse(source := next(tagged, ""))
    except (ValueError, KeyError, TypeError, SyntaxError) as error:
        raise ValueError(f"{notebook} is no notebook with parameters in Python: {error!r}") from error
    for node in code.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            line = source.splitlines()[(node.end_lineno or 1) - 1].encode()[node.end_col_offset :].decode()
            found[name] = Parameter(ast.literal_eval(node.value), line.strip(" #"))
    return found


class Ready(NamedTuple):
    """What a notebook gets, its runs, and where it leaves its results."""

    parameters: dict[str, Any]
    grid: Grid | None
    results: list[Path]


def read_all(known: Mapping[str, Parameter], file: Path | None, pairs: Sequence[str]) -> Ready:
    """Read parameters from a file and key=value words; ValueError for all that is wrong with them.

    Options of a data set may stand alone, as in `mkd check`.
    """
    single = RunConfig.model_fields.keys() <= known.keys()
    texts = {name for name, about in known.items() if isinstance(about.default, str)}
    texts |= {name for name, field in RunConfig.model_fields.items() if isinstance(field.default, str)}
    values = read_parameters(file, texts) if file else {}
    whole = with_bases(values, file.parent) if file else values
    if file and "rows" in known and (names := values.get("base")):  # beside the file, where no notebook looks
        beside, names = file.parent.absolute(), [names] if isinstance(names, str) else names
        values["base"] = [str(beside / name) if (beside / name).is_file() else name for name in names]
    typed = parse_values(pairs, texts)
    merged = merge(whole if single else values, typed, whole)
    own = [key for key in ("common", "rows", "columns") if key in known and key not in merged]
    if own and merged.get("base") and known is not PLAIN:  # its smoke run; papermill takes it silently
        where = "would lie over the file's base: state it in the file"
        raise ValueError(f"the notebook's own {', '.join(own)} {where}")
    if single:
        dataset = choose("data set", merged.get("dataset", known["dataset"].default), DATASETS)
        for key in (typed.keys() - known.keys()) & inspect.signature(DATASETS[dataset]).parameters.keys():
            merged["dataset_options"] = merged.get("dataset_options", {}) | {key: merged.pop(key)}
            typed[f"dataset_options.{key}"] = typed[key]
    for name in merged:
        choose("parameter", name, known)
    for name in merged.keys() - RunConfig.model_fields.keys() - Grid.model_fields.keys():
        if (kind := type(known[name].default)) is not type(merged[name]):
            raise ValueError(f"parameter {name} is a {kind.__name__}; got {merged[name]!r}")
    every = {name: about.default for name, about in known.items()} | merged
    results = [below_root(every["out"])] if every.get("out") else []
    grid = Grid(**{key: every[key] for key in Grid.model_fields if key in every}) if "rows" in known else None
    if grid and typed and "out" not in typed and results and holds_other_runs(results[0], grid):
        raise ValueError(f"{results[0]} holds the results of other settings; give these a folder, out=FOLDER")
    if single:
        every = drop_foreign_options(every, typed)
        merged |= {key: every[key] for key in ("options", "dataset_options")}
        results.append(RUNS / RunConfig(**{key: every[key] for key in RunConfig.model_fields}).id)
    return Ready(merged, grid, results)


def holds_other_runs(folder: Path, grid: Grid) -> bool:
    """Whether the report in a folder has runs that are not of this grid: to be overwritten only where that is meant."""
    if not (folder / "records.jsonl").is_file():
        return False
    planned = {config.id for configs in grid.runs.values() for config in configs if config.named}
    cells = read_cells(folder / "records.jsonl")
    return not {record.id for of in cells.values() for found in of.values() for record in found} <= planned
