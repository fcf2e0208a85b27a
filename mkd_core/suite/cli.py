"""The `mkd` command: run notebooks with parameters, check data before training, put trained runs to use."""

import argparse
import hashlib
import inspect
import itertools
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .commands import Words, add_commands


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
        return words.handle(words) or 0
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

    def command(handle: Callable[[Words], int | None], example: str) -> Any:
        name, about = handle.__name__[1:].replace("_", "-"), inspect.getdoc(handle) or ""
        first, example = about.splitlines()[0].rstrip("."), f"Example: mkd {name} {example}"
        added = commands.add_parser(name, help=first, description=about, epilog=example)
        added.set_defaults(handle=handle)
        return added.add_argument

    _add_notebooks(command)
    add_commands(command)
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
    add("--only", action="append", default=[], metavar="KEY=VALUE", help="row=MKD, split=..., ...")
    add("--seeds", help="instead of the file's: 0,1,2")
    add("--slots", default="", help="0,1,2 or cpu,cpu (default: every GPU, else the file's slots on the CPU)")
    add("--retries", type=int, default=1, help="how often a failed run is tried again (default: %(default)s)")
    add("--dask", default="", metavar="ADDRESS", help="scheduler whose workers run them: tcp://host:8786")
    add("--slurm", type=Path, metavar="FILE", help="a job's resources, YAML: parameters/cluster/slurm.yaml")
    add("-o", "--out", type=Path, help="folder of the executed table notebook")
    add("--html", action="store_true", help="write the table notebook as HTML too")


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
    from . import batch, execution, tables
    from .notebook import PLAIN, read_all, read_cell

    if sum(map(bool, (words.slots, words.dask, words.slurm))) > 1:
        raise ValueError("--slots are this machine's: give these, --dask or --slurm, not two of them")
    table = ROOT / "notebooks" / f"{words.file.stem}.ipynb"
    seeds = [f"seeds=[{words.seeds}]"] if words.seeds is not None else []
    if not table.is_file():
        what = f"the runs of {words.file.name} belong to no report"
        print(f"There is no notebook {table.stem}: {what}", file=sys.stderr)
    ready = read_all(read_cell(table) if table.is_file() else PLAIN, words.file, [*words.pairs, *seeds])
    grid, parameters = ready.grid, ready.parameters
    assert grid is not None
    shown = {key: parameters[key] for key in ("shown", "against") if key in parameters}
    tables.check(grid, parameters.get("published", ""), **shown)
    every = batch.expand(grid)
    runs = batch.select(every, words.only)
    cluster, resources = words.dask or words.slurm, read_parameters(words.slurm) if words.slurm else {}
    slots = [] if cluster else execution.pick_slots(words.slots, parameters.get("slots", 1))
    for run, slot in itertools.product(runs, slots):
        count, config = slot.count("+") + 1, run.config
        if config.batch % count:
            raise ValueError(f"{run}: a batch of {config.batch} cannot be shared by {count} devices")
        if config.devices not in (1, count) and slot.startswith("cuda"):
            raise ValueError(f"{run} has devices={config.devices}: give it such slots, as in --slots 0+1,2+3")
    print(batch.plan(runs, len(slots)), flush=True)
    missing, failed = [run for run in runs if not run.record], dict[batch.Run, str]()
    batch.check(runs)
    if words.dry_run:
        return 0
    if missing:
        with execution.executor(slots, words.dask, resources) as pool:
            failed = batch.run_batch(missing, pool, len(slots), words.retries)
    for run, error in failed.items():
        print(f"\nmkd batch: {run} failed; its folder is {run.folder}\n{error}", file=sys.stderr)
    lost = f", {len(failed)} failed" if failed else ""
    print(f"{len(runs) - len(failed)} of {len(runs)} runs are done{lost}")
    if failed or not table.is_file() or not all(run.record for run in every):
        return bool(failed)
    return _execute(words, table, parameters, ready.results)


if __name__ == "__main__":
    sys.exit(main())
