"""Where the runs of a table are executed, each in a process of its own: this machine's slots, a Dask cluster, or Slurm."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from .. import records
from ..config import RunConfig
from ..evaluate import pick_device
from ..runner import Busy, run

PAUSE = 3.0  # seconds before a run that failed, or that another process holds, is tried again
PROCESSES: WeakSet[subprocess.Popen[str]] = WeakSet()  # runs under way
SLOT = threading.local()  # has the device of a slot's thread


def pick_slots(words: str, slots: int = 1) -> list[str]:
    """Return the devices of "0,1,cpu": ["cuda:0", "cuda:1", "cpu"]; "": every GPU, else `slots` CPUs.

    "0+1,2+3": each run on two GPUs, ["cuda:0+1", "cuda:2+3"].
    """
    gpus = [str(i) for i in range(torch.cuda.device_count())]
    names = [word.strip() for word in words.split(",")] if words else gpus or ["cpu"] * slots
    for name in names or [f"slots={slots}"]:
        parts = name.split("+")
        once = "cpu" in parts or len({*parts}) == len(parts)
        if not once or not re.fullmatch(r"\d+(\+\d+)*|cpu(\+cpu)*", name):
            how = "0,1,2,3 or cpu,cpu or 0+1,2+3"
            raise ValueError(f"slots are numbers of GPUs, or cpu: {how}; got {name!r}")
    for part in "+".join(names).split("+"):
        pick_device(part if part == "cpu" else f"cuda:{part}")
    return [name if name.startswith("cpu") else f"cuda:{name}" for name in names]


@contextmanager
def executor(
    slots: Sequence[str], address: str = "", resources: Mapping[str, Any] | None = None
) -> Iterator[Executor]:
    """Open where runs are executed: a thread for each slot's device; where there are none, Dask's or Slurm's workers.

    address: of the Dask scheduler. resources: keywords of dask_jobqueue.SLURMCluster, and `jobs`,
    how many at most. All workers see the project and runs/ at the same paths.
    """
    if slots:
        take = iter(slots).__next__
        with ThreadPoolExecutor(len(slots), initializer=lambda: vars(SLOT).update(device=take())) as pool:
            yield pool
        return
    from dask_jobqueue import SLURMCluster
    from distributed import Client

    if address:
        with Client(address) as client:
            yield client.get_executor(pure=False)
        return
    keywords = {"jobs": 1, **(resources or {})}
    jobs = keywords.pop("jobs")
    with SLURMCluster(**keywords) as cluster, Client(cluster) as client:
        script = cluster.job_script()
        test = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)
        if test.returncode:
            raise ValueError(f"Slurm refuses these resources: {test.stderr.strip()}")
        # A job for every run that waits; one that Slurm ended is replaced, one without work is given back.
        cluster.adapt(minimum_jobs=0, maximum_jobs=jobs, target_duration="1ms")
        yield client.get_executor(pure=False)


def execute(config: dict[str, Any], folder: str, where: str, threads: int = 0) -> None:
    """Train a run in a process of its own, which ends with this one. Raises Busy, or RuntimeError.

    where: the working directory. threads: where OMP_NUM_THREADS is not set; 0: torch's choice.
    No pool of multiprocessing: a killed worker breaks it, and Dask's workers must not have one.
    """
    if Path(folder, "record.json").exists():  # made by another batch
        return
    environment = dict(os.environ)
    if config["device"] == "auto":
        device = getattr(SLOT, "device", "auto")
        config = config | {"device": device}
        if more := device.count("+"):  # the run's processes take the first ones that they see
            gpus, seen = device.partition(":")[2], environment.get("CUDA_VISIBLE_DEVICES", "")
            visible = [seen.split(",")[int(gpu)] if seen else gpu for gpu in gpus.split("+") if gpus]
            environment |= {"CUDA_VISIBLE_DEVICES": ",".join(visible)}
            config |= {"device": "cuda" if gpus else "cpu", "devices": more + 1}
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, threads // config["devices"])))
    code = f"import sys; sys.path.insert(0, {str(records.ROOT)!r}); from mkd_core.suite.execution import work; work()"
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", code], cwd=where, env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,  # no Ctrl-C
    ) as process:  # fmt: skip
        PROCESSES.add(process)
        text = process.communicate(json.dumps([config, str(Path(folder).parent)]))[1]
    errors = "\n".join(text.strip().splitlines()[-5:])
    if status := process.returncode:
        time.sleep(PAUSE)  # before it is tried again
        if f"{Busy.__name__}: " in errors:
            raise Busy(errors)
        raise RuntimeError(f"ended by signal {-status}" if status < 0 else errors)


def work() -> None:
    """Train the run whose configuration, and folder of runs, come by stdin."""
    config, runs = json.load(sys.stdin)
    run(RunConfig(**config), Path(runs), quiet=True)
