"""`mkd batch` and run_table: plans and refusals; whatever is killed, the same command ends with an uninterrupted run's records."""

import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import yaml
from filelock import FileLock
from test_cli import printed, write
from tiny import config

from mkd_core import progress, records, runner
from mkd_core.config import Grid, RunConfig
from mkd_core.runner import Busy
from mkd_core.suite import batch, execution
from mkd_core.suite.cli import main

ROOT = Path(__file__).parents[1]
TIED = ["setpriv", "--pdeathsig", "KILL"]  # ends with the test, whatever ends the test
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["mkd_core.runner", "mkd_core.suite.batch", "mkd_core.suite.notebook"])
MEASURED = {"miou", "miou_best", "step_best", "iou", "predictors", "pseudo_labels"}
MEASURED |= {"evaluations", "confusion", "split"}


def keys(**more):
    """What a grid's `common` holds: the tiny configuration."""
    every = config(**more).model_dump(mode="json", exclude={"seed", "method", "options", "device"})
    return {key: value for key, value in every.items() if value != RunConfig.model_fields[key].default}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a parameters file of two rows and two seeds, and runs that begin from nothing."""
    rows = {"MKD": {"method": "mkd"}, "SupOnly": {"method": "supervised"}}
    values = {"common": keys(steps=60, checkpoint_every=2), "rows": rows, "seeds": [0, 1]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(records, "RUNS", tmp_path / "runs")
    return tmp_path


def environment(place):
    slurm = {"SLURM_CONF": str(place / "slurm/slurm.conf")} if (place / "slurm").is_dir() else {}
    return {"MKD_RUNS": str(place / "runs"), "PYTHONPATH": str(ROOT)} | slurm


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
        records.RUNS, execution.PAUSE = self.place / "runs", 0.5
        sys.exit(main(["batch", str(self.place / "tiny.yaml"), *self.words]))

    def finish(self, status=0):
        self.join(900)
        text = self.log.read_text()
        assert self.exitcode == status, text
        return text


def processes(place):
    """Pids of whatever works for the runs of this test, the test apart."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"MKD_RUNS={place / 'runs'}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def until(condition, what, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def hold(process, *runs):
    """Stop the process of each run when it has a checkpoint and much to do; returns their pids."""
    held = {}

    def all_are():
        for run in runs:
            if run not in held and run.step >= 4:
                pids = [p for p in processes(process.place) if opens(p, run.folder / "lock")]
                held[run] = max(pids)  # a batch that looks at the lock for a moment is older
                os.kill(held[run], signal.SIGSTOP)
        return len(held) == len(runs) or not process.is_alive()

    until(all_are, f"{runs} are under way")
    assert len(held) == len(runs) and not any(run.record for run in runs), process.log.read_text()
    return list(held.values())


def opens(pid, path):
    try:
        files = [file for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists()]
        return any(os.path.samefile(file, path) for file in files)
    except OSError:
        return False


def expect(place, *names):
    """The runs of the file, of these rows."""
    grid = Grid(**yaml.safe_load((place / "tiny.yaml").read_text()))
    return [run for run in batch.expand(grid) if run.row in names]


def check_equal(place, runs):
    """Every record says what an uninterrupted run says; nothing half-written lies about."""
    for run in runs:
        found, whole = run.record, runner.run(run.config, place / "whole", quiet=True)
        assert found is not None and found.model_dump(include=MEASURED) == whole.model_dump(include=MEASURED)
        assert run.config.model_validate(found.config).id == run.config.id == found.id
        assert [row["step"] for row in records.history(run.folder)] == list(range(1, run.config.steps + 1))
        whole_files = {path.name for path in (place / "whole" / run.folder.name).iterdir()}
        assert {path.name for path in run.folder.iterdir()} == whole_files


def test_a_killed_run_is_tried_again_a_killed_batch_leaves_nothing_running_and_two_at_once_finish_it(place):
    runs = expect(place, "SupOnly")
    process = Batch(place, "--only", "row=SupOnly", "--slots", "cpu,cpu")
    os.kill(hold(process, *runs)[0], signal.SIGKILL)
    until(lambda: "failed, try 1: ended by signal 9" in process.log.read_text(), "the kill is noticed")
    process.kill()
    until(lambda: not processes(place), "nothing is left running", 60)
    both = [Batch(place, "--only", "row=SupOnly", "--slots", "cpu") for _ in range(2)]
    for other in both:
        assert "2 of 2 runs are done" in other.finish()
    check_equal(place, runs)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_batch_ends_with_its_runs_and_one_line(place, how, status):
    process = Batch(place, "--only", "row=SupOnly", "--slots", "cpu,cpu")
    hold(process, expect(place, "SupOnly")[0])
    os.kill(process.pid, how)
    text = process.finish(status)
    assert "Traceback" not in text
    assert ("mkd batch: interrupted; the same command goes on" in text) == (status == 130)
    until(lambda: not processes(place), "nothing is left running", 30)


def test_a_full_disk_fails_the_run_that_meets_it_and_no_other(place):
    large, small = expect(place, "MKD")[0], expect(place, "SupOnly")[0]
    process = Batch(place, "--only", "seed=0", "--retries", "0", "--slots", "cpu,cpu", limit=8_000_000)
    text = process.finish(1)
    assert "1 of 2 runs are done, 1 failed" in text
    assert f"MKD, seed 0 failed; its folder is {large.folder}" in text
    assert "File too large" in text or "no space" in text
    assert small.record and not large.record and not [*large.folder.glob(".*.tmp")]
    assert "1 done, 0 running now, 1 to run" in Batch(place, "--only", "seed=0", "--slots", "cpu").finish()
    check_equal(place, [large, small])


def test_a_dask_worker_is_lost_and_the_other_takes_its_run(place):
    Client = pytest.importorskip("distributed").Client
    runs, command = expect(place, "SupOnly"), [*TIED, sys.executable, "-m"]
    file = place / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    common = {"cwd": place, "env": os.environ | environment(place), **quiet}
    scheduler = ["distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    started = [subprocess.Popen([*command, *scheduler, "--scheduler-file", str(file)], **common)]
    try:
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"), "the scheduler is up")
        address = yaml.safe_load(file.read_text())["address"]
        for nanny in ([], ["--no-nanny"]):
            worker = ["distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard", *nanny]
            worker += ["--local-directory", str(place / "dask")]
            started.append(subprocess.Popen([*command, *worker], **common))
        with Client(address) as client:
            client.wait_for_workers(2, timeout=120)
        words = ["--dask", address, "--retries", "0"]
        process = Batch(place, "--only", "row=SupOnly", *words)
        pids = hold(process, *runs)
        started[2].kill()
        left = lambda: [p for p in pids if Path(f"/proc/{p}").exists()]  # noqa: E731
        until(lambda: len(left()) == 1, "a run is lost with its worker")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        assert "2 of 2 runs are done" in process.finish()
    finally:
        for child in reversed(started):
            child.terminate()
            child.wait()
    check_equal(place, runs)


@pytest.fixture
def slurm(place, monkeypatch):
    """A Slurm of one node and two cores, of Debian's packages, that ends with the test."""
    programs = {name: shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch")}
    if missing := [name for name, path in programs.items() if path is None]:
        packages = "apt-get install slurmctld slurmd slurm-client munge"
        pytest.skip(f"needs Slurm ({packages}): no {', '.join(missing)}")
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
    files = ("socket", "pid-file", "log-file", "seed-file")
    munge = [f"--{what}={folder}/munge.{what.split('-')[0]}" for what in files]
    munged = ["munged", "-F", "--force", f"--key-file={folder}/key", *munge]
    started = []
    try:
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", "localhost"]):
            with open(folder / f"{command[0]}.out", "w") as out:
                started.append(subprocess.Popen([*TIED, *command], stdout=out, stderr=out))
            time.sleep(1)
        end, sinfo = time.monotonic() + 30, ["sinfo", "-h", "-o", "%T"]
        while "idle" not in subprocess.run(sinfo, capture_output=True, text=True).stdout:
            if time.monotonic() > end:
                said = " ".join(path.read_text()[-300:] for path in folder.glob("*.out"))
                pytest.skip(f"Slurm does not start here: {said}")
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
    resources |= dict.fromkeys(("log_directory", "local_directory"), str(place))
    resources |= {"jobs": 2, "job_cpu": 1, "interface": "lo"}
    without = ("queue", "account", "job_extra_directives", "walltime", "job_script_prologue")
    small = {key: value for key, value in resources.items() if key not in without} | {"job_mem": "100M"}
    (place / "slurm.yaml").write_text(yaml.safe_dump(small | {"queue": "nowhere"}))
    words = ["--slurm", str(place / "slurm.yaml")]
    text = Batch(place, *words).finish(2)
    assert "Slurm refuses these resources" in text and "partition" in text
    (place / "slurm.yaml").write_text(yaml.safe_dump(small))
    process = Batch(place, "--only", "row=SupOnly", *words)
    hold(process, *runs)
    jobs = subprocess.run(["squeue", "-h", "-o", "%A"], capture_output=True, text=True).stdout.split()
    assert len(jobs) == 2
    subprocess.run(["scancel", *jobs], check=True)
    assert "2 of 2 runs are done" in process.finish()
    check_equal(place, runs)


def test_the_plan_says_what_is_done_running_and_to_run_and_how_long(place, capsys):
    first, second, *rest = expect(place, "MKD", "SupOnly")
    done = {"id": first.folder.name, "config": first.config.model_dump(mode="json"), "split": {}}
    made = tiny.record(**done, seconds=8 * 3600.0)
    first.folder.mkdir(parents=True)
    records.save(made, first.folder)
    # Of runs alike those with equal options count; damaged records of other work stop no plan.
    other = made.config | {"options": made.config["options"] | {"alpha": 0.5}}
    for name, options, hours in (("a", other, 2), ("b", made.config, 4), ("c", made.config, 3)):
        (records.RUNS / name).mkdir()
        keys = {"id": name, "config": options, "seconds": hours * 3600.0}
        records.save(made.model_copy(update=keys), records.RUNS / name)
    (records.RUNS / "damaged").mkdir()
    (records.RUNS / "damaged/record.json").write_text("{")
    second.folder.mkdir()
    assert main(["batch", str(place / "tiny.yaml"), "--dry-run", "--only", "row=MKD"]) == 0
    text = capsys.readouterr().out
    assert "1 done, 0 running now, 1 to run; about 4.0 h" in text and first.config.id in text
    with FileLock(second.folder / "lock"):
        assert main(["batch", str(place / "tiny.yaml"), "--dry-run", "--slots", "cpu,cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["done", "running", "to", "to"]
    assert lines[4].startswith("1 done, 1 running now, 2 to run; expected hours unknown")
    assert "unknown time" in lines[3]
    assert not any(run.folder.exists() for run in rest)


def test_a_dry_run_needs_neither_weights_nor_data_to_show_its_plan(place, capsys):
    """What is missing is said below it, each fault once; a real batch stops there too."""
    absent = ["common.weights=no.pth", "common.dataset=voc", "common.dataset_options={}"]
    command = ["batch", str(place / "tiny.yaml"), *absent]
    for words in (["--dry-run"], []):
        assert main([*command, *words]) == 2
        out, err = capsys.readouterr()
        assert out.count("(no id: its weights or lists are missing)") == 4
        assert "0 done, 0 running now, 4 to run; expected hours unknown" in out
        assert err.count("MKD, seed 0 and 3 more: weights file no.pth does not exist") == 1
        assert err.count("MKD, seed 0 and 3 more: data set 'voc' needs root") == 1
    assert not (place / "runs").exists()


def test_equal_networks_are_built_once_and_every_fault_is_told(place, monkeypatch):
    built, build = [], batch.build_method
    monkeypatch.setattr(batch, "build_method", lambda *args: built.append(args) or build(*args))
    runs = expect(place, "MKD", "SupOnly")
    batch.check(runs)
    assert len(built) == 2
    odd = batch.Run("odd", "", config(split="random/30"))
    with pytest.raises(ValueError, match="odd, seed 0: .*30"):
        batch.check([*runs, odd])


def test_the_runs_that_only_chooses(place):
    values = yaml.safe_load((place / "tiny.yaml").read_text())
    values["columns"] = {"1_16": {"lr": 0.001}, "large # 2": {"lr": 1.0}}
    every = batch.expand(Grid(**values))
    assert len(every) == 8 and batch.select(every, []) == every
    chosen = batch.select(every, ["row=MKD", "lr=1.0", "seed=0", "seed=1"])
    assert [str(run) for run in chosen] == ["MKD, large # 2, seed 0", "MKD, large # 2, seed 1"]
    assert batch.select(every, ["column=large # 2", "row=MKD"]) == chosen
    chosen = batch.select(every, ["seed=1", "column=1_16", "lr=1e-3", "crop=[32,32]"])
    assert [str(run) for run in chosen] == ["MKD, 1_16, seed 1", "SupOnly, 1_16, seed 1"]
    wrong = {"rows=MKD": "did you mean 'row'", "row=MKDD": "did you mean 'MKD'", "seed=7": "There are: 0, 1"}
    for only, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            batch.select(every, [only])


def test_refused_before_anything_runs(place, monkeypatch, capsys):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    wrong = {
        "--slots 0,x": "0,1,2,3 or cpu,cpu", "--slots cpu,77": "cuda:77 asked for", "common.split=random/30": "30",
        "--slurm nowhere.yaml --slots 0": "--slots are this machine's", "colums={}": "did you mean 'columns'",
        "--slots cpu+cpu": "a batch of 3 cannot be shared by 2 devices",
        "common.dataset=folder common.dataset_options={} common.root=nowhere": "nowhere",
    }  # fmt: skip
    for words, said in wrong.items():
        assert main(["batch", str(place / "tiny.yaml"), *words.split()]) == 2
        assert said in capsys.readouterr().err, words
    assert not (place / "runs").exists()
    monkeypatch.setattr(records, "RUNS", place / "tiny.yaml/runs")
    assert main(["batch", str(place / "tiny.yaml")]) == 2
    assert f"{place / 'tiny.yaml'} is no folder that can be written" in capsys.readouterr().err


def test_what_the_tables_notebook_would_refuse_is_told_first(place, monkeypatch, capsys):
    monkeypatch.setattr(batch, "execute", lambda *args: pytest.fail("it ran"))
    values = yaml.safe_load((place / "tiny.yaml").read_text())
    values |= {"columns": {"small": {}}, "out": str(place / "out")}
    (place / "30_table4_components.yaml").write_text(yaml.safe_dump(values))
    command = ["batch", str(place / "30_table4_components.yaml")]
    assert main([*command, "--dry-run"]) == 0
    for words, said in {
        ("published=tabel4",): "did you mean 'table4'", ("train=maybe",): "parameter train is a bool; got 'maybe'",
        ("slots=true",): "parameter slots is a int; got True", ("rows.SupOnly.protocol=long512",): "long512, whole",
        ("published=table4", "columns={1/16 (662): {}}"): "give it another title",
    }.items():  # fmt: skip
        assert main([*command, *words]) == 2
        assert said in capsys.readouterr().err, words


def here(config, *rest):
    """`execute` in this process."""
    runner.run(RunConfig(**config), quiet=True)


def test_the_queue(place, monkeypatch, capsys):
    """Each slot has its device, failures are tried again, what others hold is waited for; a function plays it."""
    runs, calls, at_once, most = expect(place, "MKD", "SupOnly"), [], [], []

    def play(config, folder, where, threads):
        device = execution.SLOT.device
        at_once.append(device)
        most.append(sorted(at_once))
        time.sleep(0.05)
        at_once.remove(device)
        calls.append(folder)
        if folder == str(runs[0].folder) or (folder == str(runs[1].folder) and calls.count(folder) == 1):
            raise RuntimeError("a first line\nits last line")
        if folder == str(runs[2].folder) and calls.count(folder) < 3:
            raise Busy("another process is at it")

    monkeypatch.setattr(batch, "execute", play)
    with execution.executor(["cuda:0", "cuda:1"]) as pool:
        failed = batch.run_batch(runs, pool, 2, retries=1)
    assert failed == {runs[0]: "a first line\nits last line"}
    assert [calls.count(str(run.folder)) for run in runs] == [2, 2, 3, 1]
    assert ["cuda:0", "cuda:1"] in most and max(map(len, most)) == 2 and ["cuda:0", "cuda:0"] not in most
    out = capsys.readouterr().out
    assert "batch: MKD, seed 1 failed, try 1: a first line" in out and "batch: SupOnly, seed 0 is done" in out


def test_a_process_of_its_own_tells_whom_it_waits_for(place, monkeypatch):
    monkeypatch.setattr(execution, "PAUSE", 0.0)
    run = expect(place, "SupOnly")[0]
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / "lock"), pytest.raises(Busy, match=run.config.id):
        execution.execute(run.config.model_dump(mode="json"), str(run.folder), str(place), 1)


def test_run_table_runs_what_is_missing_and_returns_rows_of_columns_of_records(place, monkeypatch):
    values = yaml.safe_load((place / "tiny.yaml").read_text())
    values["common"]["steps"] = 2
    # equal in both columns
    values["rows"]["all labels"] = {"method": "supervised", "split": "full", "lr": 0.03}
    grid = Grid(**values | {"columns": {"a": {}, "b": {"lr": 0.02}}, "seeds": [0]})
    nothing = {"a": [], "b": []}
    assert batch.run_table(grid, train=False) == dict.fromkeys(["MKD", "SupOnly", "all labels"], nothing)
    assert len(batch.expand(grid)) == 5
    runner.run(grid.cells["MKD"]["a"][0], quiet=True)
    calls, run = [], batch.run
    monkeypatch.setattr(batch, "run", lambda config: calls.append(config.id) or run(config, quiet=True))
    cells = batch.run_table(grid)
    assert calls == [run.config.id for run in batch.expand(grid)[1:]]
    found, wanted = ({row: {c: [one.id for one in each] for c, each in columns.items()} for row, columns in of.items()}
                     for of in (cells, grid.cells))  # fmt: skip
    assert found == wanted
    monkeypatch.setattr(batch, "execute", here)
    del values["rows"]["all labels"]
    more = Grid(**values)
    assert all(len(of[""]) == 2 for of in batch.run_table(more, slots=2).values())
    bad = Grid(**values | {"seeds": [3, 4]})
    monkeypatch.setattr(batch, "execute", lambda config, *rest: {}["broken"])
    with pytest.raises(RuntimeError, match="(?s)MKD, seed 3 failed: 'broken'.*SupOnly, seed 4 failed"):
        batch.run_table(bad, slots=2)


def test_the_tables_notebook_follows_when_all_is_done(place, monkeypatch, capsys):
    """It gets the file's parameters, and is left alone while a run of the table is missing."""
    parameters = "common: dict = {}\nrows: dict = {}\nseeds: list = []\ntitle: str = ''\nout: str = ''"
    write(place / "notebooks/tiny.ipynb", parameters, "print(title, *rows, seeds)")
    monkeypatch.setattr(records, "ROOT", place)
    words = ["title=Table # 1", f"out={place / 'results'}", "common.steps=1"]
    words += ["--seeds", "0", "--slots", "cpu", "-o", str(place / "o")]
    command = ["batch", str(place / "tiny.yaml"), *words]
    monkeypatch.setattr(batch, "execute", here)
    assert main([*command, "--only", "row=SupOnly"]) == 0
    assert not (place / "o").exists()
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"Written:\n  {place / 'o/tiny.ipynb'}\n  {place / 'results'}/\n")
    assert printed(place / "o/tiny.ipynb") == "Table # 1 MKD SupOnly [0]\n"
    assert main([*command, "tilte=x"]) == 2


def test_without_a_gpu_the_files_slots_are_on_the_cpu(monkeypatch):
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 0)
    assert execution.pick_slots("", 2) == ["cpu", "cpu"]
    assert execution.pick_slots("cpu", 2) == ["cpu"] == execution.pick_slots("")
    assert execution.pick_slots("cpu+cpu,cpu") == ["cpu+cpu", "cpu"]
    monkeypatch.setattr(execution.torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(execution.torch.cuda, "is_available", lambda: True)
    assert execution.pick_slots("0+1,2+3") == ["cuda:0+1", "cuda:2+3"]
    for words in ("0+cpu", "gpu", "0+", "3+4"):
        with pytest.raises(ValueError, match="slots are numbers|torch sees 4"):
            execution.pick_slots(words)


def test_progress_is_a_line_now_and_then_and_ever_more_rarely(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    say, quiet = progress.Progress("run"), progress.Progress("run", quiet=True)
    for clock[0] in range(24 * 3600):
        say(f"second {clock[0]}")
        quiet("nothing", now=True)
    say("done", now=True)
    lines = capsys.readouterr().out.splitlines()
    seconds = [int(line.split()[-1]) for line in lines[:-1]]
    gaps = [b - a for a, b in itertools.pairwise(seconds)]
    assert lines[0] == "run: second 0" and lines[-1] == "run: done" and len(lines) < 400
    assert gaps == sorted(gaps) and gaps[0] == 10 and gaps[-1] == 300
