"""`mkd batch`: what it plans and refuses; and that whatever is killed, the same command ends with the records of an uninterrupted run."""

import io
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
import tiny
import yaml
from filelock import FileLock
from tiny import config

from mkd_core import records, runner
from mkd_core.config import Grid, RunConfig
from mkd_core.runner import is_busy
from mkd_core.suite import batch
from mkd_core.suite.cli import main

ROOT = Path(__file__).parents[1]
TIED = ["setpriv", "--pdeathsig", "KILL"]  # ends with the test, whatever ends the test
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["mkd_core.runner", "mkd_core.suite.batch"])
# 10_run without its pictures, which stays in the middle while a file named `hold` lies there.
TRAIN = """
import os, time
from mkd_core import RunConfig, run, runner, train
build = runner.build_method
def hold(method, args):
    while args[1] >= 0.5 and os.path.exists(os.environ["HOLD"]):
        time.sleep(0.02)
def held(*args):
    method = build(*args)
    method.register_forward_pre_hook(hold)
    return method
runner.build_method = held
run(RunConfig(**{name: globals()[name] for name in RunConfig.model_fields}))
"""
SAME = {
    "status",
    "config",
    "miou",
    "miou_best",
    "step_best",
    "iou",
    "predictors",
    "predictors_best",
    "pseudo_labels",
    "evaluations",
    "confusion",
    "split",
}


def keys(**more):
    """What a grid's `common` holds: the tiny configuration."""
    every = config(**more).model_dump(mode="json", exclude={"seed", "method", "options"})
    return {key: value for key, value in every.items() if value != RunConfig.model_fields[key].default}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a parameters file of two rows and two seeds, a short 10_run, and runs that begin from nothing."""
    values = {
        "common": keys(steps=8, checkpoint_every=2),
        "rows": {"MKD": {"method": "mkd"}, "SupOnly": {"method": "supervised"}},
        "seeds": [0, 1],
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    cells = nbformat.read(ROOT / "notebooks/10_run.ipynb", 4).cells
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(TRAIN)], metadata=kernel)
    nbformat.write(notebook, tmp_path / "10_run.ipynb")
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    return tmp_path


class Batch(server.Process):
    """`mkd batch tiny.yaml` in a process of its own, which need not import torch anew; limit: the largest file in bytes."""

    def __init__(self, place, *words, limit=0):
        super().__init__(daemon=True)
        self.place, self.words, self.limit = place, words, limit
        self.log = place / f"batch-{time.monotonic_ns()}.log"
        self.log.touch()
        self.start()

    def run(self):
        os.dup2(os.open(self.log, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.chdir(self.place)
        os.environ.update(environment(self.place))
        if self.limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))
        records.RUNS, batch.NOTEBOOK, batch.PAUSE = self.place / "runs", self.place / "10_run.ipynb", 0.5
        sys.exit(main(["batch", str(self.place / "tiny.yaml"), *self.words]))

    def finish(self, status=0):
        self.join(900)
        text = self.log.read_text()
        assert self.exitcode == status, text
        return text


def environment(place):
    slurm = {"SLURM_CONF": str(place / "slurm/slurm.conf")} if (place / "slurm").is_dir() else {}
    return {"MKD_RUNS": str(place / "runs"), "HOLD": str(place / "hold"), "PYTHONPATH": str(ROOT)} | slurm


def processes(place):
    """pid -> (parent, command line) of whatever works for the runs of this test, the test apart."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MKD_RUNS={place / 'runs'}".encode() in (path / "environ").read_bytes().split(b"\0"):
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                found[int(path.name)] = parent, (path / "cmdline").read_text().replace("\0", " ")
        except (OSError, ProcessLookupError):  # it ended meanwhile
            continue
    return found


def execution(place, run):
    """Pids of the papermill execution of a run and of its kernel."""
    every = processes(place)
    (parent,) = [pid for pid, (_, line) in every.items() if "mkd_core.suite.cli run" in line and run.config.id in line]
    (kernel,) = [pid for pid, (above, line) in every.items() if above == parent and "ipykernel" in line]
    return parent, kernel


def until(condition, what, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def half_way(process, *runs):
    def half(run):
        return run.step >= run.config.steps // 2

    for run in runs:
        until(lambda run=run: half(run) or not process.is_alive() or ": failed" in process.log.read_text(), f"{run} is half done")
        assert half(run) and not run.done, process.log.read_text()


def expect(place, *names):
    """The runs of the file, of these rows."""
    grid = Grid(**yaml.safe_load((place / "tiny.yaml").read_text()))
    return [run for run in batch.expand(grid) if run.row in names]


def check_equal(place, runs):
    """Every record is whole and says what an uninterrupted run says; nothing half-written lies about."""
    for run in runs:
        found, whole = records.load(run.folder), runner.run(run.config, place / "whole", quiet=True)
        assert found is not None and found.model_dump(include=SAME - {"config"}) == whole.model_dump(include=SAME - {"config"})
        assert run.config.model_validate(found.config).id == run.config.id == found.id
        history = [row | {"lr": 0} for row in records.history(run.folder)]
        assert [row["step"] for row in history] == list(range(1, run.config.steps + 1))
        assert nbformat.read(run.folder / "10_run.ipynb", 4).metadata.papermill.end_time
        assert not {p.name for p in run.folder.iterdir()} - {
            "10_run.ipynb",
            "checkpoint.pt",
            "checkpoint-best.pt",
            "config.json",
            "history.jsonl",
            "lock",
            "record.json",
        }


# What is killed.


def test_a_kernel_and_an_execution_are_killed_in_mid_run_and_the_batch_finishes(place):
    runs = expect(place, "SupOnly")
    (place / "hold").touch()
    process = Batch(place, "--only", "row=SupOnly", "--slots", "cpu,cpu")
    half_way(process, *runs)
    os.kill(execution(place, runs[0])[0], signal.SIGKILL)
    os.kill(execution(place, runs[1])[1], signal.SIGKILL)
    (place / "hold").unlink()
    text = process.finish()
    assert text.count("is tried again") == 2 and "2 of 2 runs are done" in text
    check_equal(place, runs)


def test_the_batch_is_killed_nothing_is_left_running_and_two_at_once_finish_it(place):
    runs = expect(place, "MKD")
    (place / "hold").touch()
    process = Batch(place, "--only", "row=MKD", "--slots", "cpu,cpu")
    half_way(process, *runs)
    assert len(processes(place)) >= 4
    process.kill()
    until(lambda: not processes(place), "nothing is left running", 60)
    assert not any(run.done for run in runs)
    both = [Batch(place, "--only", "row=MKD", "--slots", "cpu") for _ in range(2)]
    until(lambda: all(is_busy(run.folder) for run in runs), "each batch is at a run")  # both began with the same one
    (place / "hold").unlink()
    for other in both:
        assert "2 of 2 runs are done" in other.finish()
    check_equal(place, runs)


def test_a_full_disk_fails_the_run_that_meets_it_and_no_other(place):
    large, small = expect(place, "MKD")[0], expect(place, "SupOnly")[0]
    process = Batch(place, "--only", "seed=0", "--retries", "0", "--slots", "cpu,cpu", limit=8_000_000)
    text = process.finish(1)
    assert "1 of 2 runs are done, 1 failed" in text and "mkd batch: MKD, seed 0 failed" in text
    assert "File too large" in text and str(large.folder / "10_run.failed.ipynb") in text
    assert small.done and not large.done
    assert "1 done, 0 running now, 1 to run" in Batch(place, "--only", "seed=0", "--slots", "cpu").finish()
    check_equal(place, [large, small])


def test_a_dask_worker_is_lost_and_the_other_takes_its_run(place):
    Client = pytest.importorskip("distributed").Client
    runs, dask = expect(place, "SupOnly"), [*TIED, sys.executable, "-m", "distributed.cli.dask_worker"]
    (place / "hold").touch()
    scheduler_file, options = place / "scheduler.json", ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory"]
    common = dict(cwd=place, env=os.environ | environment(place), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    scheduler = subprocess.Popen(
        [*TIED, sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(scheduler_file)],
        **common,
    )  # fmt: skip
    workers = []
    try:
        until(lambda: scheduler_file.exists() and scheduler_file.read_text().rstrip().endswith("}"), "the scheduler is up")
        address = yaml.safe_load(scheduler_file.read_text())["address"]
        workers += [subprocess.Popen([*dask, address, *options, str(place / f"worker {k}")], **common) for k in range(2)]
        with Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        process = Batch(place, "--only", "row=SupOnly", "--engine", "dask", "--address", address, "--retries", "0")
        half_way(process, *runs)
        workers[0].kill()
        (place / "hold").unlink()
        assert "2 of 2 runs are done" in process.finish()
    finally:
        for child in [*workers, scheduler]:
            child.kill()
            child.wait()
    check_equal(place, runs)


@pytest.fixture
def slurm(place, monkeypatch):
    """A Slurm of one node and two cores, of Debian's packages, that ends with the test."""
    programs = {name: shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if missing := [name for name, path in programs.items() if path is None]:
        pytest.skip(f"needs Slurm (apt-get install slurmctld slurmd slurm-client munge): no {', '.join(missing)}")
    if os.geteuid():
        pytest.skip("starts slurmd, which must be root")
    folder = place / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (folder / "slurm.conf").write_text(
        f"ClusterName=test\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\nAuthType=auth/munge\n"
        f"AuthInfo=socket={folder}/munge.socket\nCredType=cred/munge\nSlurmUser=root\nSlurmdUser=root\nStateSaveLocation={folder}/state\n"
        f"SlurmdSpoolDir={folder}/spool\nSlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\nKillWait=5\n"
        "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nMpiDefault=none\n"
        "JobAcctGatherType=jobacct_gather/none\nAccountingStorageType=accounting_storage/none\nReturnToService=2\n"
        "NodeName=localhost NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN\nPartitionName=main Nodes=localhost Default=YES State=UP\n"
    )
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{what}={folder}/munge.{what.split('-')[0]}" for what in ("socket", "pid-file", "log-file", "seed-file")]
    started = []
    try:
        for command in (
            ["munged", "-F", "--force", f"--key-file={folder}/key", *munge],
            ["slurmctld", "-D", "-i"],
            ["slurmd", "-D", "-N", "localhost"],
        ):
            with open(folder / f"{command[0]}.out", "w") as out:
                started.append(subprocess.Popen([*TIED, *command], stdout=out, stderr=out))
            time.sleep(1)
        end = time.monotonic() + 30
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
            if time.monotonic() > end:
                pytest.skip("Slurm does not start here: " + " ".join(path.read_text()[-300:] for path in folder.glob("*.out")))
            time.sleep(0.2)
        yield place
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(20)


def test_slurm_jobs_that_are_cancelled_are_replaced(slurm):
    place, runs = slurm, expect(slurm, "SupOnly")
    resources = yaml.safe_load((ROOT / "parameters/cluster/slurm.yaml").read_text())
    # What the example asks of a GPU node is more than this one has.
    resources |= {"jobs": 2, "job_cpu": 1, "interface": "lo", "log_directory": str(place), "local_directory": str(place)}
    without = ("queue", "account", "job_extra_directives", "walltime", "job_script_prologue")
    small = {key: value for key, value in resources.items() if key not in without} | {"job_mem": "100M"}
    (place / "slurm.yaml").write_text(yaml.safe_dump(small | {"queue": "nowhere"}))
    text = Batch(place, "--engine", "slurm", "--resources", str(place / "slurm.yaml")).finish(2)
    assert "Slurm refuses these resources" in text and "partition" in text
    (place / "slurm.yaml").write_text(yaml.safe_dump(small))
    (place / "hold").touch()
    process = Batch(place, "--only", "row=SupOnly", "--engine", "slurm", "--resources", str(place / "slurm.yaml"))
    half_way(process, *runs)
    jobs = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True).stdout.split()
    assert len(jobs) == 2
    subprocess.run(["scancel", *jobs], check=True)
    (place / "hold").unlink()
    assert "2 of 2 runs are done" in process.finish()
    check_equal(place, runs)


# What is planned, and what is refused.


def test_the_plan_says_what_is_done_running_and_to_run_and_how_long(place, capsys):
    first, second, *rest = expect(place, "MKD", "SupOnly")
    record = runner.run(first.config, quiet=True)
    records.save(record.model_copy(update={"seconds": 8 * 3600.0}), first.folder)
    # Of runs alike those with equal options count, here one from before MKD had these two.
    other = first.config.model_copy(update={"options": first.config.options | {"sda": False}})
    older = {name: value for name, value in first.config.options.items() if name not in ("law", "fda_ramp")}
    for options, hours in ((other.options, 2), (other.options, 2), (older, 4)):
        config = first.config.model_dump(mode="json") | {"options": options}
        folder = records.RUNS / f"{hours} {len(list(records.RUNS.iterdir()))}"
        folder.mkdir()
        records.save(record.model_copy(update={"id": folder.name, "config": config, "seconds": hours * 3600.0}), folder)
    second.folder.mkdir()
    assert main(["batch", str(place / "tiny.yaml"), "--dry-run", "--only", "row=MKD"]) == 0
    text = capsys.readouterr().out
    assert "1 done, 0 running now, 1 to run; about 6.0 h" in text and first.config.id in text
    with FileLock(second.folder / "lock"):
        assert main(["batch", str(place / "tiny.yaml"), "--dry-run", "--slots", "cpu,cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["done", "running", "to", "to"]
    assert lines[4].startswith("1 done, 1 running now, 2 to run; expected hours unknown") and "unknown time" in lines[3]
    assert not any(run.folder.exists() for run in rest)


def test_a_dry_run_needs_neither_weights_nor_data_to_show_its_plan(place, capsys):
    """What is missing is said below it, each fault once; a real batch stops there too."""
    command = ["batch", str(place / "tiny.yaml"), "common.weights=no.pth", "common.dataset=voc", "common.dataset_options={}"]
    for words in (["--dry-run"], []):
        assert main([*command, *words]) == 2
        out, err = capsys.readouterr()
        assert (
            out.count("(no id: its weights or lists are missing)") == 4 and "0 done, 0 running now, 4 to run; expected hours unknown" in out
        )
        assert err.count("MKD, seed 0 and 3 more: weights file no.pth does not exist") == 1
        assert err.count("MKD, seed 0 and 3 more: data set 'voc' needs root") == 1
    assert not (place / "runs").exists()


def test_the_runs_that_only_chooses(place):
    values = yaml.safe_load((place / "tiny.yaml").read_text())
    values["columns"] = {"small": {"lr": 0.01}, "large": {"lr": 1.0, "options": {}}}
    every = batch.expand(Grid(**values))
    assert len(every) == 8 and len(batch.select(every, {})) == 8
    chosen = batch.select(every, {"row": ["MKD"], "lr": [1.0], "seed": [0, 1]})
    assert [str(run) for run in chosen] == ["MKD, large, seed 0", "MKD, large, seed 1"]
    assert [str(run) for run in batch.select(every, {"seed": [1], "column": ["small"]})] == ["MKD, small, seed 1", "SupOnly, small, seed 1"]
    for only, said in (
        ({"rows": ["MKD"]}, "did you mean 'row'"),
        ({"row": ["MKDD"]}, "did you mean 'MKD'"),
        ({"seed": [7]}, "There are: 0, 1"),
    ):
        with pytest.raises(ValueError, match=said):
            batch.select(every, only)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--slots", "0,x"], "0,1,2,3 or cpu,cpu"),
        (["--slots", "cpu,77"], "cuda:77 asked for"),
        (["--engine", "dask"], "--address and --engine dask belong together"),
        (["--engine", "slurm", "--resources", "nowhere.yaml", "--slots", "0"], "--slots are this machine's"),
        (["--retries", "-1"], "0 or more"),
        (["--seeds", "0,0"], "given twice"),
        (["common.split=random/30"], "30"),
        (["common.dataset=folder", "common.dataset_options={}", "common.root=nowhere"], "nowhere"),
        (["rows={A: {method: mkd}, B: {method: mdk}}"], "B, seed 0: there is no method 'mdk'; did you mean 'mkd'"),
        ([r'rows={"a\nb": {method: mkd}}'], "names of rows and columns are one line"),
        (["-o", __file__], "test_batch.py is not a folder"),
        (["-o", f"{__file__}/below"], "test_batch.py is not a folder"),
        (["rows={A: {method: mkd}, B: {method: mkd}}"], "two rows are the same run: 'A' and 'B'"),
        (["colums={}"], "did you mean 'columns'"),
    ],
)
def test_refused_before_anything_runs(place, monkeypatch, capsys, words, said):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    assert main(["batch", str(place / "tiny.yaml"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["published=tabel4"], "did you mean 'table4'"),
        (["shown=smal"], "did you mean 'small'"),
        (["against=SupOnli"], "did you mean 'SupOnly'"),
        (["slots=0"], "slots must be a number from 1 on; got 0"),
        (["train=false"], "mkd run"),
        (["train=maybe"], "parameter train of 30_table4_components.ipynb is a bool; got 'maybe'"),
        (["out=''"], "must name a folder"),
        (["out=5"], "parameter out of 30_table4_components.ipynb is a str; got 5"),
        (["against=[]"], "is a str; got []"),
        (["slots=true"], "is a int; got True"),
        (["rows.SupOnly.protocol=long512"], "column 'small', different evaluation protocols: long512, whole"),
        (["published=table4", "columns={1/16 (662): {}}"], "give it another title"),
    ],
)
def test_what_the_tables_notebook_would_refuse_is_told_before_anything_runs(place, monkeypatch, capsys, words, said):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    values = yaml.safe_load((place / "tiny.yaml").read_text()) | {"columns": {"small": {}}, "out": str(place / "out")}
    (place / "30_table4_components.yaml").write_text(yaml.safe_dump(values))
    assert main(["batch", str(place / "30_table4_components.yaml"), "--dry-run"]) == 0
    assert main(["batch", str(place / "30_table4_components.yaml"), *words]) == 2
    assert said in capsys.readouterr().err


def test_names_are_taken_as_they_are_written(place, capsys):
    """What YAML would read otherwise, in rows and columns; braces and pictographs in paths."""
    values = yaml.safe_load((place / "tiny.yaml").read_text())
    values |= {"rows": {"1_16": {"method": "mkd"}, "MKD # 2": {"method": "cps"}, "MKD": {"method": "supervised"}}, "seeds": [0]}
    (place / "tiny.yaml").write_text(yaml.safe_dump(values))
    for name in values["rows"]:
        assert main(["batch", str(place / "tiny.yaml"), "--dry-run", "--only", f"row={name}"]) == 0
        assert f"to run   {name}, seed 0 " in (out := capsys.readouterr().out) and "1 to run" in out
    out = place / "odd {x} \N{FOX FACE}"
    words = ["steps=1", "dataset=voc", "dataset_options={}", "root=\N{FOX FACE}"]
    assert main(["run", str(place / "10_run.ipynb"), "-o", str(out), *words]) == 1
    assert "\N{FOX FACE} is not a folder" in capsys.readouterr().err


def test_a_runs_folder_that_cannot_be_made_is_refused(place, monkeypatch, capsys):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    monkeypatch.setattr(records, "RUNS", place / "tiny.yaml/runs")
    assert main(["batch", str(place / "tiny.yaml")]) == 2
    assert f"{place / 'tiny.yaml'} is no folder that can be written" in capsys.readouterr().err


def test_what_lies_where_a_run_is_kept_is_looked_at_before_any_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    first, second = expect(place, "MKD")[:2]

    def refused(said: str) -> None:
        assert main(["batch", str(place / "tiny.yaml"), "--dry-run"]) == 2
        assert said in capsys.readouterr().err

    first.folder.mkdir(parents=True)
    checkpoint = first.folder / "checkpoint.pt"
    checkpoint.write_bytes(b"PK half")
    refused(f"MKD, seed 0: {checkpoint} is damaged; delete it")
    checkpoint.unlink()
    checkpoint.mkdir()
    refused(f"{checkpoint} would be a file, and is none")
    checkpoint.rmdir()
    (first.folder / "record.json").write_text(tiny.record(id="other").model_dump_json())
    refused("is the record of another run (other); delete it")
    (first.folder / "record.json").unlink()
    second.folder.write_text("")
    refused(f"MKD, seed 1: {second.folder} would be its folder, and is none")
    second.folder.unlink()
    second.folder.symlink_to(place / "gone")
    refused("would be its folder, and is none")


def test_records_of_other_work_stop_no_plan(place):
    """One damaged, one of a version that knew fewer keys."""
    (run,) = expect(place, "MKD")[:1]
    odd = [tiny.record(config=tiny.record().config | part) for part in ({"steps": 0}, {"steps": "4"}, {"options": []}, {"steps": None})]
    odd += [tiny.record(config={"dataset": "shapes"}), tiny.record(seconds=float("nan"))]
    for name, content in (("a", "{"), *((f"b{k}", record.model_dump_json()) for k, record in enumerate(odd))):
        (records.RUNS / name).mkdir(parents=True)
        (records.RUNS / name / "record.json").write_text(content)
    assert "1 to run; expected hours unknown" in batch.plan([run], 1)
    (records.RUNS / run.folder.name).mkdir()
    (run.folder / "record.json").write_text("{")
    with pytest.raises(ValueError, match="record.json is damaged; delete it"):  # its own
        batch.plan([run], 1)


def test_a_refused_run_does_not_take_the_notebook_with_it(place):
    refused = config(split="random/30")
    folder = records.RUNS / refused.id
    for left in ([], [".10_run.1.tmp.ipynb"]):
        for name in left:
            folder.mkdir(parents=True)
            (folder / name).touch()
        with pytest.raises(ValueError, match="30"):
            runner.run(refused, quiet=True)
        assert [path.name for path in folder.parent.glob("*/*")] == left and folder.exists() == bool(left)


def test_one_run_on_a_device_at_a_time_retries_and_what_is_reported(place, monkeypatch, capsys):
    """The loop alone: runs are played by a function."""
    runs, calls, at_once, most = expect(place, "MKD", "SupOnly"), [], [], []

    def play(config, notebook, folder, where, threads):
        at_once.append(config["device"])
        most.append(sorted(at_once))
        time.sleep(0.05)
        at_once.remove(config["device"])
        calls.append(Path(folder).name)
        if folder == str(runs[0].folder):
            raise OSError("the worker is gone")
        if folder == str(runs[1].folder) and calls.count(Path(folder).name) == 1:
            return "failed", "a first line\nits last line"
        if folder == str(runs[2].folder) and calls.count(Path(folder).name) < 3:
            return "busy", ""
        if folder == str(runs[3].folder):  # another batch has it, and finishes it
            records.save(runner.run(runs[3].config, quiet=True), runs[3].folder)
            return "busy", ""
        return "done", ""

    monkeypatch.setattr(batch, "execute", play)
    monkeypatch.setattr(batch, "PAUSE", 0.0)
    with ThreadPoolExecutor(8) as pool:
        failed = batch.run_batch(runs, pool, ["cuda:0", "cuda:1"], retries=1)
    assert failed == {runs[0]: "OSError: the worker is gone"}
    assert [calls.count(run.folder.name) for run in runs] == [2, 2, 3, 1]
    assert ["cuda:0", "cuda:1"] in most and max(map(len, most)) == 2 and ["cuda:0", "cuda:0"] not in most
    assert "MKD, seed 1 failed and is tried again:\na first line\nits last line\n" in capsys.readouterr().err


def test_the_tables_notebook_follows_when_all_is_done(place, monkeypatch, capsys):
    """It gets the file's parameters, and is left alone while a run of the table is missing."""
    (place / "notebooks").mkdir()
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    cells = [
        nbformat.v4.new_code_cell("common = {}\nrows = {}\nseeds = []\ntitle = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(title, *rows, seeds)"),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), place / "notebooks/tiny.ipynb")
    monkeypatch.setattr(records, "ROOT", place)
    command = ["batch", str(place / "tiny.yaml"), "title=Table", "--seeds", "0", "--slots", "cpu", "-o", str(place / "out")]
    monkeypatch.setattr(batch, "execute", lambda config, *rest: (runner.run(RunConfig(**config), quiet=True).status, ""))
    assert main([*command, "--only", "row=SupOnly"]) == 0
    assert not (place / "out").exists()
    assert main(command) == 0
    assert str(place / "out/tiny.ipynb") in capsys.readouterr().out
    text = "".join(o.text for c in nbformat.read(place / "out/tiny.ipynb", 4).cells for o in c.get("outputs", []))
    assert text == "Table MKD SupOnly [0]\n"
    assert main([*command, "tilte=x"]) == 2


def test_the_overview_redraws_on_a_terminal_and_is_a_line_in_a_log(place, monkeypatch):
    run, other = expect(place, "SupOnly")
    run.folder.mkdir(parents=True)

    class Terminal(io.StringIO):
        def isatty(self):
            return self.live

    for live in (True, False):
        out, clock = Terminal(), iter(range(0, 10_000, 60))
        out.live = live
        monkeypatch.setattr(batch.time, "monotonic", lambda clock=clock: next(clock))
        view = batch.Overview([run, other], out)
        with FileLock(run.folder / "lock"):
            for step in (2, 4):
                (run.folder / "history.jsonl").write_text(f'{{"step": {step}}}\n')
                view.show({other: "it broke"})
        text = out.getvalue()
        assert "0 of 2 done, 1 running, 1 failed" in text and "SupOnly, seed 0: 25 %" in text and "SupOnly, seed 1: failed" in text
        assert "SupOnly, seed 0: 50 %, " in text and "min left" in text
        assert ("\x1b[3F\x1b[J" in text) == live and len(text.splitlines()) == (6 if live else 2)


def test_without_a_gpu_the_files_slots_are_on_the_cpu(monkeypatch):
    monkeypatch.setattr(batch.torch.cuda, "device_count", lambda: 0)
    assert batch.parse_slots("", 2) == ["cpu", "cpu"] and batch.parse_slots("cpu", 2) == ["cpu"] == batch.parse_slots("")
